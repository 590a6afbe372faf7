"""`MRGPTQConfig`: what it refuses, what it fills in, and what it writes to config.json."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
import torch
from transformers.quantizers.auto import AutoQuantizationConfig

from hf_fp4 import MRGPTQConfig

INVALID = {
    "format": (["fp4", "NVFP4", "", None, 4], r"format must be one of 'nvfp4', 'mxfp4', got "),
    "activations": (["int8", "fp16", None, True], r"activations must be one of 'fp4', 'bf16', got "),
    "method": (["gptq", "MR-GPTQ", None], r"method must be one of 'mr-gptq', 'rtn', got "),
    "hadamard_group_size": (
        [0, 1, 8, 24, 48, 256, -16, 16.0, "16", "largest", True, [16]],
        r"hadamard_group_size must be one of 'auto', None, 16, 32, 64, 128, got ",
    ),
    "scale_rule": (
        ["max", "best", None, 4],
        r"scale_rule must be one of 'auto', 'absmax', 'mse', 'four_over_six', 'hessian', got ",
    ),
    "activation_scale_rule": (
        ["max", "hessian", "auto", 6],
        r"activation_scale_rule for nvfp4 must be one of 'absmax', 'four_over_six', 'mse', got ",
    ),
    "act_order": ([1, 0, "static", None], r"act_order must be one of True, False, got "),
    "equalize": ([1, 0, "norms"], r"equalize must be one of True, False, got "),
    "error_correction": (
        [-0.01, 1.01, float("nan"), float("inf"), "0.5", None, True],
        r"error_correction must be between 0 and 1, got ",
    ),
    "damp_percent": (
        [0, 0.0, 1, 1.0, -0.1, float("nan"), "1%", None, True],
        r"damp_percent must be between 0 and 1 \(0.01 to 0.1 is usual\), got ",
    ),
    "descent_passes": ([-1, 1.5, "3", True], r"descent_passes must be an integer of at least 0, got "),
    "num_samples": ([0, -1, 1.5, 128.0, "128", None, True], r"num_samples must be a positive integer, got "),
    "sequence_length": (
        [0, -1, 2048.0, "2k", None, True],
        r"sequence_length must be a positive integer, got ",
    ),
    "batch_size": ([0, -1, 0.5, "8", None, True], r"batch_size must be a positive integer, got "),
    "seed": ([0.5, "0", None, True], r"seed must be an integer, got "),
    "calibration_device": (
        ["gpu", "cuda:x", 0, ["cuda"], True],
        r"calibration_device must be a device such as ",
    ),
    "kernel_repo": (
        ["kernels", "a/b/c", 3, None],
        r'kernel_repo must be "owner/name" on the kernels hub, got ',
    ),
    "kernel_version": ([0, -1, 1.5, "1", None, True], r"kernel_version must be a positive integer, got "),
    "trust_kernel_repo": ([1, "yes", None], r"trust_kernel_repo must be one of True, False, got "),
    "modules_to_not_convert": (
        ["lm_head", {"lm_head": 1}, [1], ["q_proj", None], 3],
        r"modules_to_not_convert must be a list of module names, got ",
    ),
}
VALID = {
    "format": ["nvfp4", "mxfp4"],
    "activations": ["fp4", "bf16"],
    "method": ["mr-gptq", "rtn"],
    "hadamard_group_size": ["auto", None, 16, 32, 64, 128],
    "scale_rule": ["auto", "absmax", "mse", "four_over_six", "hessian"],
    "activation_scale_rule": ["absmax", "four_over_six", "mse"],
    "act_order": [True, False],
    "equalize": [True, False],
    "error_correction": [0, 0.0, 0.25, 1],
    "damp_percent": [0.001, 0.5],
    "descent_passes": [0, 10],
    "num_samples": [1, 4096],
    "sequence_length": [1, 8192],
    "batch_size": [1],
    "seed": [0, 7, -1],
    "calibration_device": [None, "cpu", "cuda", "cuda:1"],
    "kernel_repo": ["me/kernels"],
    "kernel_version": [1, 7],
    "trust_kernel_repo": [True, False],
    "modules_to_not_convert": [None, [], ["lm_head", r"model\.layers\.0"]],
}
CHANGED = {
    "format": "mxfp4",
    "activations": "bf16",
    "method": "rtn",
    "hadamard_group_size": 64,
    "scale_rule": "hessian",
    "activation_scale_rule": "absmax",
    "act_order": False,
    "equalize": False,
    "descent_passes": 1,
    "error_correction": 0.5,
    "damp_percent": 0.02,
    "dataset": "someone/some-text:config",
    "num_samples": 16,
    "sequence_length": 256,
    "seed": 3,
    "modules_to_not_convert": ["lm_head", "mlp"],
    "modules": {"model.layers.0.mlp.up_proj": 64, "model.layers.0.mlp.down_proj": None},
    "calibration": {"dataset": "some text", "fingerprint": "ab12", "tokens": 4096},
}
"""A value other than the default for every field that is saved."""


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, (values, _) in INVALID.items() for value in values]
)
def test_a_bad_value_is_refused_and_shown(field, value):
    with pytest.raises(ValueError, match=INVALID[field][1]) as caught:
        MRGPTQConfig(**{field: value})
    assert str(caught.value).endswith(f"got {value!r}")


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, values in VALID.items() for value in values]
)
def test_a_good_value_is_kept(field, value):
    assert getattr(MRGPTQConfig(**{field: value}), field) == value


def test_rules_belong_to_a_format():
    with pytest.raises(ValueError, match='scale_rule="four_over_six" is for nvfp4; for mxfp4 use "mse"'):
        MRGPTQConfig(format="mxfp4", scale_rule="four_over_six")
    with pytest.raises(
        ValueError,
        match="activation_scale_rule for mxfp4 must be one of 'absmax', 'mse', got 'four_over_six'",
    ):
        MRGPTQConfig(format="mxfp4", activation_scale_rule="four_over_six")
    assert MRGPTQConfig(format="mxfp4", activation_scale_rule="mse").activation_scale_rule == "mse"


def test_an_unknown_keyword_is_refused():
    with pytest.raises(TypeError, match="unexpected keyword argument 'group_size'"):
        MRGPTQConfig(group_size=16)
    with pytest.raises(TypeError, match="unexpected keyword argument 'quant_method'"):
        MRGPTQConfig(quant_method="gptq")


@pytest.mark.parametrize(("format", "activation_rule"), [("nvfp4", "mse"), ("mxfp4", "mse")])
def test_defaults(format, activation_rule):
    config = MRGPTQConfig(format=format)
    assert config.quant_method == "mr_gptq"
    assert (config.activations, config.method) == ("fp4", "mr-gptq")
    assert (config.hadamard_group_size, config.act_order) == ("auto", True)
    assert config.activation_scale_rule == activation_rule
    assert (config.num_samples, config.sequence_length, config.batch_size, config.seed) == (128, 2048, 8, 0)
    assert "/fineweb-edu" in config.dataset
    for unset in ("tokenizer", "modules_to_not_convert", "work_dir", "modules", "calibration"):
        assert getattr(config, unset) is None
    assert MRGPTQConfig().format == "nvfp4"


@pytest.mark.parametrize(("format", "passes"), [("nvfp4", 3), ("mxfp4", 12)])
def test_the_default_number_of_descent_passes_is_the_format_s(format, passes):
    assert MRGPTQConfig(format=format).descent_passes == passes
    assert MRGPTQConfig(format=format, descent_passes=1).descent_passes == 1
    assert MRGPTQConfig.paper(format).descent_passes == 0


@pytest.mark.parametrize(
    ("method", "rule", "resolved", "needs_data"),
    [
        ("mr-gptq", "auto", "hessian", True),
        ("mr-gptq", "mse", "mse", True),
        ("rtn", "auto", "mse", False),
        ("rtn", "absmax", "absmax", False),
        ("rtn", "hessian", "hessian", True),
    ],
)
def test_what_the_method_needs(method, rule, resolved, needs_data):
    config = MRGPTQConfig(method=method, scale_rule=rule)
    assert (config.weight_rule, config.needs_calibration) == (resolved, needs_data)


@pytest.mark.parametrize(("format", "size"), [("nvfp4", 16), ("mxfp4", 32)])
def test_the_papers_recipe(format, size):
    config = MRGPTQConfig.paper(format)
    assert (config.format, config.method, config.activations) == (format, "mr-gptq", "fp4")
    assert config.hadamard_group_size == size
    assert (config.scale_rule, config.activation_scale_rule) == ("mse", "absmax")
    assert (config.act_order, config.error_correction, config.damp_percent) == (True, 0.0, 0.01)


def test_the_papers_recipe_takes_other_fields():
    config = MRGPTQConfig.paper("mxfp4", num_samples=4, hadamard_group_size=128)
    assert (config.num_samples, config.hadamard_group_size, config.scale_rule) == (4, 128, "mse")
    assert MRGPTQConfig.paper().format == "nvfp4"
    with pytest.raises(ValueError, match="format must be one of"):
        MRGPTQConfig.paper("int4")


# --- config.json


def test_every_saved_field_survives_json():
    config = MRGPTQConfig(**CHANGED)
    written = json.loads(json.dumps(config.to_dict()))
    again = MRGPTQConfig.from_dict(written)
    assert {field: getattr(again, field) for field in CHANGED} == CHANGED
    assert again.to_dict() == config.to_dict()
    default = MRGPTQConfig().to_dict()
    assert all(default[field] != value for field, value in CHANGED.items())
    assert set(default) == {*CHANGED, "quant_method", "how_to_load"}


def test_transformers_finds_the_class_by_the_method():
    found = AutoQuantizationConfig.from_dict(MRGPTQConfig(format="mxfp4").to_dict())
    assert type(found) is MRGPTQConfig
    assert found.format == "mxfp4"


def test_the_printed_form_is_the_saved_form():
    config = MRGPTQConfig(**CHANGED)
    assert json.loads(config.to_json_string()) == json.loads(json.dumps(config.to_dict()))
    assert repr(config).startswith("MRGPTQConfig {")


def test_the_saved_form_says_how_to_load():
    assert "import hf_fp4" in MRGPTQConfig().to_dict()["how_to_load"]
    assert "pip install hf-fp4" in MRGPTQConfig().to_dict()["how_to_load"]


def test_tuples_of_names_are_lists():
    config = MRGPTQConfig(modules_to_not_convert=("q_proj", "k_proj"))
    assert config.modules_to_not_convert == ["q_proj", "k_proj"]


def test_unknown_fields_are_refused():
    written = {**MRGPTQConfig().to_dict(), "rotation": "learned", "version": 2}
    with pytest.raises(ValueError, match=r"unknown fields \['rotation', 'version'\].*pip install -U hf-fp4"):
        MRGPTQConfig.from_dict(written)


@pytest.mark.parametrize(
    "named", [{"kernel_repo": "someone/else"}, {"kernel_version": 9}, {"trust_kernel_repo": True}], ids=str
)
def test_a_checkpoint_cannot_choose_what_code_runs(named):
    with pytest.raises(ValueError, match=f"may not choose what code runs, got .*{next(iter(named))}"):
        MRGPTQConfig.from_dict({**MRGPTQConfig().to_dict(), **named})
    assert not set(named) & set(MRGPTQConfig(**named).to_dict())


def test_bad_values_in_a_file_are_refused():
    with pytest.raises(ValueError, match="format must be one of 'nvfp4', 'mxfp4', got 'nvfp5'"):
        MRGPTQConfig.from_dict({**MRGPTQConfig().to_dict(), "format": "nvfp5"})


def test_keywords_win_over_what_was_saved():
    config, unused = MRGPTQConfig.from_dict(
        MRGPTQConfig(seed=1).to_dict(), return_unused_kwargs=True, seed=2, torch_dtype="auto"
    )
    assert config.seed == 2
    assert unused == {"torch_dtype": "auto"}


@pytest.mark.parametrize(
    "dataset",
    [
        ["private text"],
        [torch.arange(8)],
        torch.zeros(2, 8, dtype=torch.int64),
        datasets.Dataset.from_dict({"text": ["private text"]}),
        Path("/home/someone/private.txt"),
    ],
    ids=["strings", "tensors", "tensor", "Dataset", "path"],
)
def test_objects_do_not_get_into_json(dataset, tmp_path):
    config = MRGPTQConfig(dataset=dataset, tokenizer=object(), work_dir=tmp_path, batch_size=2)
    written = json.dumps(config.to_dict())
    assert "private" not in written
    assert not {"tokenizer", "work_dir", "batch_size"} & set(json.loads(written))
    assert str(tmp_path) not in written

    config.calibration = {"dataset": "a list of 1 texts", "fingerprint": "ab", "tokens": 8}
    assert config.to_dict()["dataset"] == "a list of 1 texts"


def test_paths_of_this_machine_do_not_get_into_json(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("private")
    config = MRGPTQConfig(dataset=str(file))
    assert str(tmp_path) not in json.dumps(config.to_dict())
    config.calibration = {"dataset": "the file text.txt", "fingerprint": "ab", "tokens": 8}
    assert config.to_dict()["dataset"] == "the file text.txt"


def test_w4a4_is_equalized_by_default():
    assert MRGPTQConfig().equalize is True
    assert MRGPTQConfig(activations="bf16").equalize is False
    assert MRGPTQConfig.paper().equalize is False
