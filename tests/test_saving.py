"""Saving and reloading: the same logits in a new process, the same bytes when saved again, nothing lost when it fails."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers.modeling_utils
from model_zoo import tiny_model, tiny_tokens
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel
from transformers.utils import logging

import hf_fp4
from hf_fp4 import FP4Linear, MRGPTQConfig

TOKENS = tiny_tokens(2, 16, seed=3)
SIZES = {"num_samples": 4, "sequence_length": 16, "batch_size": 2}
SMALL_SHARDS = "20KB"

VARIANTS = {
    "nvfp4": ("qwen2", {}),
    "mxfp4": ("qwen2", {"format": "mxfp4"}),
    "nvfp4-w4a16": ("opt", {"activations": "bf16", "hadamard_group_size": 32}),
    "mxfp4-w4a16": ("phi3", {"format": "mxfp4", "activations": "bf16"}),
    "rtn": ("gemma3", {"method": "rtn"}),
    "skipped": ("llama-200", {"modules_to_not_convert": ["o_proj"]}),
}
"""Family and fields of what is saved whole and in shards, and reloaded in a new process."""


def quantize(source: Path, auto_class: type = AutoModelForCausalLM, **fields) -> PreTrainedModel:
    config = MRGPTQConfig(**{"dataset": list(tiny_tokens(4, 16)), **SIZES, **fields})
    return auto_class.from_pretrained(source, quantization_config=config)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """Path of a family's saved unquantized model."""
    root = tmp_path_factory.mktemp("zoo")

    def path(family: str) -> Path:
        if not (root / family).exists():
            tiny_model(family).save_pretrained(root / family)
        return root / family

    return path


@pytest.fixture(scope="module")
def model(zoo) -> PreTrainedModel:
    return quantize(zoo("llama"))


@pytest.fixture(scope="module")
def with_biases(zoo) -> PreTrainedModel:
    return quantize(zoo("opt"), format="mxfp4")


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(TOKENS).logits


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def weight_files(directory: Path) -> set[str]:
    return {file.name for file in directory.iterdir() if "safetensors" in file.name}


def run_python(code: str, *arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(Path(hf_fp4.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )


# --- a new process

RELOAD = """
import sys
from pathlib import Path
import torch
import hf_fp4
from transformers import AutoModelForCausalLM

root = Path(sys.argv[1])
tokens = torch.load(root / "tokens.pt")
for saved in sorted((root / "saved").iterdir()):
    model = AutoModelForCausalLM.from_pretrained(saved)
    (root / "again" / saved.name).mkdir(parents=True)
    with torch.no_grad():
        torch.save(model(tokens).logits, root / f"{saved.name}.pt")
    model.save_pretrained(root / "again" / saved.name, max_shard_size=saved.suffix == ".sharded" and "20KB" or "5GB")
"""


@pytest.fixture(scope="module")
def reloaded(zoo, tmp_path_factory):
    """Every variant quantized and saved here, then loaded and saved again in one other process."""
    root = tmp_path_factory.mktemp("reloaded")
    torch.save(TOKENS, root / "tokens.pt")
    expected = {}
    for name, (family, fields) in VARIANTS.items():
        quantized = quantize(zoo(family), **fields)
        expected[name] = logits(quantized)
        quantized.save_pretrained(root / "saved" / f"{name}.whole")
        quantized.save_pretrained(root / "saved" / f"{name}.sharded", max_shard_size=SMALL_SHARDS)
    run = run_python(RELOAD, root)
    assert run.returncode == 0, run.stderr
    return root, expected


@pytest.mark.parametrize("shape", ["whole", "sharded"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_new_process_gives_the_same_logits_and_bytes(variant, shape, reloaded):
    root, expected = reloaded
    name = f"{variant}.{shape}"
    assert (len(list((root / "saved" / name).glob("*.safetensors"))) > 1) == (shape == "sharded")
    assert torch.equal(torch.load(root / f"{name}.pt"), expected[variant])
    assert contents(root / "again" / name) == contents(root / "saved" / name)


OPEN_WITHOUT = """
import sys
from transformers import AutoModelForCausalLM

assert "hf_fp4" not in sys.modules
AutoModelForCausalLM.from_pretrained(sys.argv[1])
"""


def test_without_import_it_is_refused(model, tmp_path):
    """transformers warns that it does not know the method; that it stops is due to the shape of the packed weights."""
    model.save_pretrained(tmp_path)
    run = run_python(OPEN_WITHOUT, tmp_path)
    assert run.returncode != 0
    assert "Unknown quantization type, got mr_gptq" in run.stderr
    assert "weight" in run.stderr and "You set `ignore_mismatched_sizes` to `False`" in run.stderr
    note = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["how_to_load"]
    assert "pip install hf-fp4" in note and "`import hf_fp4`" in note


# --- what is written


def test_tensors_of_a_calibrated_nvfp4_linear(model, tmp_path):
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    for name, layer in model.named_modules():
        if isinstance(layer, FP4Linear):
            found = {k.removeprefix(f"{name}."): t for k, t in stored.items() if k.startswith(f"{name}.")}
            rows, columns = layer.out_features, layer.in_features
            assert {key: (t.dtype, list(t.shape)) for key, t in found.items()} == {
                "weight": (torch.uint8, [rows, columns // 2]),
                "weight_scale": (torch.float8_e4m3fn, [rows, columns // 16]),
                "weight_global_scale": (torch.float32, [1]),
                "input_global_scale": (torch.float32, [1]),
            }
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_tensors_of_an_mxfp4_linear_with_bias(with_biases, tmp_path):
    with_biases.save_pretrained(tmp_path)
    prefix = "model.decoder.layers.1.fc2."
    stored = load_file(tmp_path / "model.safetensors")
    found = {k.removeprefix(prefix): (t.dtype, list(t.shape)) for k, t in stored.items() if prefix in k}
    assert found == {
        "weight": (torch.uint8, [64, 64]),
        "weight_scale": (torch.uint8, [64, 4]),
        "bias": (torch.float32, [64]),
    }


def test_w4a16_and_uncalibrated_nvfp4_have_no_input_scale(zoo, tmp_path):
    for fields in ({"activations": "bf16"}, {"method": "rtn"}):
        quantize(zoo("llama"), **fields).save_pretrained(tmp_path)
        assert not any("input_global_scale" in key for key in load_file(tmp_path / "model.safetensors"))


ROW = [6, -6, 4, -4, 3, -3, 2, -2, 1.5, -1.5, 1, -1, 0.5, -0.5, 0.0, -0.0]
CODES = "f7 e6 d5 c4 b3 a2 91 80"  # low nibble first: +6 is 7 and -6 is f, +4 is 6 and -4 is e, ...


@pytest.mark.parametrize(
    ("format", "scale", "global_scale"),
    # nvfp4: 6/16 is the largest of the tensor; 2^12 is the largest power of two that takes it to at most 256 * 6, so
    # the block scale is 2^-4 * 2^12 = 2^8 (E4M3 0x78). mxfp4: 2^-4 is 127 - 4 = 123.
    [("nvfp4", 0x78, 4096.0), ("mxfp4", 123, None)],
)
def test_golden_bytes(format, scale, global_scale, zoo, tmp_path):
    original = tiny_model("mistral")
    name = "model.layers.0.self_attn.o_proj"
    with torch.no_grad():
        original.get_submodule(name).weight.copy_(torch.tensor(ROW).repeat(64, 4) / 16)
    original.save_pretrained(tmp_path / "original")
    fields = {"method": "rtn", "scale_rule": "absmax", "hadamard_group_size": None, "format": format}
    quantize(tmp_path / "original", **fields).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert stored[f"{name}.weight"].numpy().tobytes() == bytes.fromhex(CODES) * 4 * 64
    groups = 64 // (16 if format == "nvfp4" else 32)
    assert stored[f"{name}.weight_scale"].view(torch.uint8).tolist() == [[scale] * groups] * 64
    if global_scale is not None:
        assert stored[f"{name}.weight_global_scale"].tolist() == [global_scale]


def test_the_config_that_is_written(model, tmp_path):
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert written["quant_method"] == "mr_gptq"
    assert written["modules"] == {
        name: layer.hadamard_size for name, layer in model.named_modules() if isinstance(layer, FP4Linear)
    }
    assert written["calibration"]["tokens"] == 64
    assert len(written["calibration"]["fingerprint"]) == 64
    assert written["dataset"] == written["calibration"]["dataset"]
    assert "4 token sequences" in written["dataset"]


# --- other ways to load


def test_without_its_head(model, tmp_path):
    model.save_pretrained(tmp_path)
    bare = AutoModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(bare(TOKENS).last_hidden_state, model.model(TOKENS).last_hidden_state)
    assert set(bare.config.quantization_config.modules) == {
        name for name, module in bare.named_modules() if isinstance(module, FP4Linear)
    }


def test_a_model_saved_without_head_is_the_body_of_one_with_a_head(zoo, tmp_path):
    bare = quantize(zoo("llama"), AutoModel)
    bare.save_pretrained(tmp_path)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(whole.model(TOKENS).last_hidden_state, bare(TOKENS).last_hidden_state)


def test_an_encoder(zoo, tmp_path):
    rounded = quantize(zoo("bert"), AutoModelForMaskedLM, method="rtn")
    rounded.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForMaskedLM.from_pretrained(tmp_path)), logits(rounded))


def test_another_dtype(zoo, tmp_path):
    quantized = quantize(zoo("opt"), activations="bf16")
    quantized.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in again.parameters()} == {torch.bfloat16}
    for name, buffer in quantized.named_buffers():
        assert torch.equal(again.get_buffer(name), buffer)
    assert (logits(again).float() - logits(quantized)).norm() < 0.05 * logits(quantized).norm()


def test_dequantize_gives_back_linears(zoo, tmp_path):
    quantized = quantize(zoo("opt"), activations="bf16", hadamard_group_size=16)
    expected = logits(quantized)
    layers = {name: layer for name, layer in quantized.named_modules() if isinstance(layer, FP4Linear)}
    weights = {name: layer.dequantize(torch.float32) for name, layer in layers.items()}
    quantized.dequantize()
    assert len(layers) == 12
    for name, layer in layers.items():
        linear = quantized.get_submodule(name)
        assert type(linear) is nn.Linear
        assert torch.equal(linear.weight, weights[name])
        assert torch.equal(linear.bias, layer.bias)
    torch.testing.assert_close(logits(quantized), expected, rtol=1e-3, atol=1e-3)

    quantized.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not any(isinstance(module, FP4Linear) for module in plain.modules())
    assert torch.equal(logits(plain), logits(quantized))


# --- a save over another one, and a save that fails


def test_a_save_removes_the_weights_of_an_earlier_one(model, tmp_path):
    kept = ("notes.txt", "model.fp16.safetensors", "adapter_model.safetensors", "model-card.md")
    for name in kept:
        (tmp_path / name).write_text("keep me")
    model.save_pretrained(tmp_path, max_shard_size=SMALL_SHARDS)
    sharded = weight_files(tmp_path)
    assert "model.safetensors.index.json" in sharded
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert not (weight_files(tmp_path) & sharded) - {"model.safetensors.index.json", *kept}
    model.save_pretrained(tmp_path)
    assert weight_files(tmp_path) == {"model.safetensors", *kept[1:3]}
    model.save_pretrained(tmp_path, max_shard_size=SMALL_SHARDS)
    assert weight_files(tmp_path) == sharded
    assert all((tmp_path / name).read_text() == "keep me" for name in kept)
    assert not any(file.name.startswith(".") for file in tmp_path.iterdir())
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_a_save_of_no_weights_removes_none(model, tmp_path):
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path, variant="other")
    assert weight_files(tmp_path) == {"model.safetensors", "model.other.safetensors"}


def fail_at(monkeypatch: pytest.MonkeyPatch, nth: int) -> None:
    """The disk is full when the n-th weight file is written: half of the file is there."""
    save, calls = transformers.modeling_utils.safe_save_file, []

    def failing(tensors, filename, **kwargs):
        calls.append(filename)
        save(tensors, filename, **kwargs)
        if len(calls) == nth:
            os.truncate(filename, os.path.getsize(filename) // 2)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(filename))

    monkeypatch.setattr(transformers.modeling_utils, "safe_save_file", failing)


@pytest.mark.parametrize("nth", [1, 3])
def test_a_full_disk_leaves_the_old_files(nth, model, zoo, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path, max_shard_size=SMALL_SHARDS)
    before = contents(tmp_path)
    assert len(before) > 5
    other = quantize(zoo("llama"), method="rtn")
    fail_at(monkeypatch, nth)
    with pytest.raises(OSError, match="No space left on device"):
        other.save_pretrained(tmp_path, max_shard_size=SMALL_SHARDS)
    assert contents(tmp_path) == before


def test_a_full_disk_leaves_no_new_directory(model, tmp_path, monkeypatch):
    fail_at(monkeypatch, 1)
    with pytest.raises(OSError, match="No space left on device"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_files_that_may_not_grow_leave_the_old_ones(model, zoo, tmp_path):
    """The same with the system's own error: no file may be larger than half of what the weights need."""
    model.save_pretrained(tmp_path)
    before = contents(tmp_path)
    other = quantize(zoo("llama"), method="rtn")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before["model.safetensors"]) // 2, hard))
    try:
        with pytest.raises(Exception, match="File too large"):
            other.save_pretrained(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(tmp_path) == before


def test_a_file_is_no_directory(model, tmp_path):
    (tmp_path / "file").write_text("keep me")
    with pytest.raises(ValueError, match="file is a file; save into a directory"):
        model.save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "keep me"


# --- a checkpoint that is damaged

LAYER = "model.layers.1.mlp.gate_proj"


@pytest.fixture
def damaged(model, tmp_path):
    """A saved model with one tensor of `LAYER` changed: by a function, by another tensor, or None takes it away."""

    def make(key: str, change) -> Path:
        model.save_pretrained(tmp_path)
        file = tmp_path / "model.safetensors"
        tensors = load_file(file)
        name = f"{LAYER}.{key}"
        if callable(change):
            change(tensors[name])
        elif change is None:
            del tensors[name]
        else:
            tensors[name] = change
        save_file(tensors, file, {"format": "pt"})
        return tmp_path

    return make


def byte(value: int):
    """Sets one block scale."""
    return lambda scales: scales.view(torch.uint8)[3, 2].fill_(value)


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        (
            "weight_scale",
            byte(0),
            r" holds 1 zero, negative or NaN scales, the first at \[3, 2\]; the checkpoint",
        ),
        ("weight_scale", byte(0x7F), " holds 1 zero, negative or NaN scales"),
        ("weight_scale", byte(0x85), " holds 1 zero, negative or NaN scales"),
        (
            "weight_scale",
            torch.full((160, 5), 7, dtype=torch.uint8),
            r" must be torch.float8_e4m3fn \[160, 5\]",
        ),
        ("weight_global_scale", torch.zeros(1), " must be a positive finite number, got 0.0"),
        ("weight_global_scale", torch.tensor([-1.0]), " must be a positive finite number, got -1.0"),
        ("weight_global_scale", torch.tensor([torch.nan]), " must be a positive finite number, got nan"),
        ("input_global_scale", torch.tensor([torch.inf]), " must be a positive finite number, got inf"),
        (
            "weight",
            torch.zeros(160, 40, dtype=torch.int8),
            r" must be torch.uint8 \[160, 40\], got torch.int8",
        ),
    ],
)
def test_bad_values_are_refused(key, change, message, damaged):
    with pytest.raises(ValueError, match=f"{LAYER}.{key}{message}"):
        AutoModelForCausalLM.from_pretrained(damaged(key, change))


@pytest.mark.parametrize("key", ["weight", "weight_scale", "weight_global_scale", "input_global_scale"])
def test_a_missing_tensor_is_refused(key, damaged):
    with pytest.raises(
        ValueError, match=f"the checkpoint has no tensor {LAYER}.{key}; it is damaged or incomplete"
    ):
        AutoModelForCausalLM.from_pretrained(damaged(key, None))


MISSHAPEN = {
    "weight": torch.zeros(160, 32, dtype=torch.uint8),
    "weight_scale": torch.ones(160, 4).to(torch.float8_e4m3fn),
    "weight_global_scale": torch.ones(2),
    "input_global_scale": torch.ones(2),
}


@pytest.mark.parametrize("key", MISSHAPEN)
def test_a_misshapen_tensor_is_refused(key, damaged, caplog):
    """By transformers, which puts the name into a report that it logs, or by us, where transformers lets it pass."""
    source = damaged(key, MISSHAPEN[key])
    logging.enable_propagation()
    try:
        with pytest.raises((ValueError, RuntimeError)) as caught:
            AutoModelForCausalLM.from_pretrained(source)
    finally:
        logging.disable_propagation()
    assert f"{LAYER}.{key}" in str(caught.value) + caplog.text
    with pytest.raises(ValueError, match=f"{LAYER}.{key}"):
        AutoModelForCausalLM.from_pretrained(source, ignore_mismatched_sizes=True)


def test_an_mxfp4_scale_of_nan_is_refused(with_biases, tmp_path):
    with_biases.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["model.decoder.layers.0.fc1.weight_scale"][5, 1] = 255
    save_file(tensors, file, {"format": "pt"})
    message = r"model\.decoder\.layers\.0\.fc1\.weight_scale holds 1 zero, negative or NaN scales, the first at \[5, 1\]"
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modules": None}, "does not list its quantized modules"),
        (
            {"modules": {"model.layers.7.mlp.up_proj": 16}},
            r"has no linear model\.layers\.7\.mlp\.up_proj \(and 0 more\)",
        ),
        (
            {"modules": {LAYER: 64}},
            f"the Hadamard size of {LAYER} must be one of .* divide in_features 80, got 64",
        ),
        ({"rotation": "learned"}, r"unknown fields \['rotation'\]"),
        ({"format": "nvfp5"}, "format must be one of"),
    ],
)
def test_a_damaged_config_is_refused(change, message, model, tmp_path):
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    written = config["quantization_config"]
    modules = change.get("modules", {})
    change = {**change, "modules": {**written["modules"], **modules} if modules is not None else None}
    written.update(change)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("quantized", [False, True])
def test_pickled_weights_are_refused(quantized, model, zoo, tmp_path):
    original = model if quantized else AutoModelForCausalLM.from_pretrained(zoo("llama"))
    original.config.save_pretrained(tmp_path)
    torch.save(original.state_dict(), tmp_path / "pytorch_model.bin")
    given = {} if quantized else {"quantization_config": MRGPTQConfig(method="rtn")}
    with pytest.raises(
        ValueError, match=r"reads safetensors only, got pytorch_model\.bin, which can run code"
    ):
        AutoModelForCausalLM.from_pretrained(tmp_path, **given)
