"""What cannot work is refused with what was expected, what came and what to do."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from model_zoo import save_with_tokenizer, tiny_model, tiny_tokens
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM
from transformers.utils import logging

from hf_fp4 import MRGPTQConfig
from hf_fp4.calibration.group import Group

TOKENS = list(tiny_tokens(4, 16))
SIZES = {"num_samples": 4, "sequence_length": 16, "batch_size": 2}


def quantize(source, *, load=None, **options):
    config = MRGPTQConfig(**{"dataset": TOKENS, **SIZES, **options})
    return AutoModelForCausalLM.from_pretrained(source, quantization_config=config, **(load or {}))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    tiny_model("llama").save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def with_tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("with_tokenizer")
    save_with_tokenizer(directory)
    return directory


def damaged(tmp_path, name: str, value: float):
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_submodule(name).weight[2, 7] = value
    model.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("method", ["mr-gptq", "rtn"])
@pytest.mark.parametrize(("value", "found"), [(float("nan"), "1 NaN"), (float("inf"), "1 infinite")])
def test_weights_that_are_not_finite_name_their_layer(method, value, found, tmp_path):
    name = "model.layers.1.mlp.down_proj"
    with pytest.raises(ValueError, match=f"expected finite values in the weight of {name}, got .*{found}"):
        quantize(damaged(tmp_path, name, value), method=method)


@pytest.mark.parametrize("method", ["mr-gptq", "rtn"])
def test_a_bias_that_is_not_finite_names_its_layer(method, tmp_path):
    model, name = tiny_model("opt"), "model.decoder.layers.1.fc1"
    with torch.no_grad():
        model.get_submodule(name).bias[3] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"expected finite values in the bias of {name}, got 1 NaN"):
        quantize(tmp_path, method=method)


def test_activations_that_are_not_finite_name_their_layer(tmp_path):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight[5] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"finite values in the input of model\.layers\.1\.mlp\.gate_proj"):
        quantize(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("fmt", ["nvfp4", "mxfp4"])
def test_activations_of_a_later_batch_that_are_not_finite_name_their_layer(fmt, value, tmp_path, monkeypatch):
    tiny_model("llama").save_pretrained(tmp_path)
    observe, seen = Group.observe, []

    def broken(self, x, original, tokens):
        seen.append(self)
        if seen.count(self) == 2 and self.names == ["self_attn.o_proj"]:
            x[-1, -1, -1] = value
        observe(self, x, original, tokens)

    monkeypatch.setattr(Group, "observe", broken)
    with pytest.raises(
        ValueError, match=r"finite values in the input of model\.layers\.0\.self_attn\.o_proj"
    ):
        quantize(tmp_path, format=fmt)


def test_embeddings_that_are_not_finite_name_where_they_arrive(tmp_path):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[TOKENS[0][3]] = torch.inf
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"finite values in the input of model\.layers\.0, got "):
        quantize(tmp_path)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("q_proj", r"no weight for model\.layers\.1\.self_attn\.q_proj \(and 0 more\)"),
        ("o_proj", r"no weight for model\.layers\.1\.self_attn\.o_proj \(and 0 more\)"),
    ],
)
def test_rounding_a_checkpoint_that_lacks_a_weight(missing, message, source, tmp_path):
    shutil.copytree(source, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    del tensors[f"model.layers.1.self_attn.{missing}.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=f"the checkpoint has {message}"):
        quantize(tmp_path / "model", method="rtn")


def test_rounding_a_weight_of_another_shape_names_it(source, tmp_path, caplog):
    shutil.copytree(source, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    name = "model.layers.1.self_attn.o_proj"
    tensors = load_file(file)
    tensors[f"{name}.weight"] = tensors[f"{name}.weight"][:, :96].contiguous()
    save_file(tensors, file, {"format": "pt"})
    logging.enable_propagation()  # newer transformers put the name into a report that they log
    try:
        with pytest.raises((ValueError, RuntimeError)) as caught:
            quantize(tmp_path / "model", method="rtn")
    finally:
        logging.disable_propagation()
    assert f"{name}.weight" in str(caught.value) + caplog.text


@pytest.mark.parametrize("method", ["mr-gptq", "rtn"])
def test_a_hadamard_size_that_does_not_divide(method, source):
    with pytest.raises(
        ValueError, match=r"must divide in_features, got 128 for the 80 of model\.layers\.0\..*; use 16, None"
    ):
        quantize(source, method=method, hadamard_group_size=128)


@pytest.mark.parametrize("method", ["mr-gptq", "rtn"])
@pytest.mark.parametrize(
    ("other", "message"),
    [
        ("gptq", "The model is quantized with GPTQConfig but you are passing a MRGPTQConfig config"),
        ("fp8", "The model is quantized with FineGrainedFP8Config but you are passing a MRGPTQConfig config"),
        # transformers does not know it, and would read the checkpoint as if it were not quantized
        (
            "something_new",
            r"is quantized already \(quant_method 'something_new' .*quantize the original model",
        ),
    ],
)
def test_a_model_that_another_method_quantized(other, message, method, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": other, "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        quantize(tmp_path, method=method)


def test_a_part_of_a_model_that_another_method_quantized(tmp_path):
    tiny_model("llava").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["vision_config"]["quantization_config"] = {"quant_method": "something_new"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="is quantized already"):
        AutoModelForImageTextToText.from_pretrained(tmp_path, quantization_config=MRGPTQConfig(method="rtn"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format": "int4"}, "format must be one of 'nvfp4', 'mxfp4', got 'int4'"),
        ({"method": "gptq"}, "method must be one of 'mr-gptq', 'rtn', got 'gptq'"),
        ({"hadamard_group_size": 48}, "hadamard_group_size must be one of .*, got 48"),
        ({"bits": 4}, r"unknown fields \['bits'\]"),
    ],
)
def test_a_dict_is_checked_like_a_config(fields, message, source):
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(
            source, quantization_config={"quant_method": "mr_gptq", **fields}
        )


def test_a_quantized_model_keeps_its_own_config(source, tmp_path):
    quantize(source).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        again = quantize(tmp_path, format="mxfp4")
    assert again.config.quantization_config.format == "nvfp4"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": []}, "the dataset is empty"),
        ({"dataset": TOKENS[:2]}, r"gives only 2 .* lower num_samples to 2"),
        ({"dataset": TOKENS, "sequence_length": 500}, r"at most .*max_position_embeddings, 64, got 500"),
        (
            {"dataset": ["some text"]},
            r"gives only 0 \(10 tokens\); lower sequence_length, or bring more text",
        ),
        ({"dataset": 3}, "dataset must be a Hub dataset's name, .*, got int"),
    ],
)
def test_data_that_does_not_do(options, message, with_tokenizer):
    with pytest.raises(ValueError, match=message):
        quantize(with_tokenizer, **options)


def test_text_without_a_tokenizer(source):
    with pytest.raises(
        ValueError, match=r"a list of 1 texts needs a tokenizer, got .*; pass tokenizer=\.\.\., or token ids"
    ):
        quantize(source, dataset=["some text " * 100])


def test_a_tokenizer_that_is_not_there(source, tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer='.*nothing' could not be loaded: "):
        quantize(source, dataset=["some text " * 100], tokenizer=str(tmp_path / "nothing"))


def test_the_meta_device(source):
    with pytest.raises(ValueError, match="a model on the meta device has no weights to quantize"):
        quantize(source, load={"device_map": "meta"})


# --- weights on disk

DISK = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "cpu",
}


@torch.no_grad()
def logits(model):
    return model(tiny_tokens(2, 12, seed=3)).logits


@pytest.mark.parametrize("options", [{}, {"method": "rtn", "scale_rule": "hessian"}])
def test_disk_offload_says_why_calibration_does_not_work(options, source, tmp_path):
    load = {"device_map": DISK, "offload_folder": str(tmp_path)}
    with pytest.raises(
        ValueError, match="calibration needs the weights in memory, and device_map puts some on disk"
    ):
        quantize(source, load=load, **options)


def test_disk_offload_works_when_rounding(source, tmp_path):
    expected = logits(quantize(source, method="rtn"))
    model = quantize(source, load={"device_map": DISK, "offload_folder": str(tmp_path)}, method="rtn")
    assert model.model.layers[1].input_layernorm.weight.is_meta  # so it is offloaded
    assert torch.equal(logits(model), expected)


def test_offloading_what_is_being_rounded_is_refused(source, tmp_path):
    load = {"device_map": DISK, "offload_folder": str(tmp_path), "offload_buffers": True}
    message = (
        r"cannot be quantized and offloaded in one step, got .* model\.layers\.1\.self_attn\.q_proj on disk"
    )
    with pytest.raises(ValueError, match=message):
        quantize(source, load=load, method="rtn")


@pytest.mark.parametrize("buffers", [False, True])
def test_disk_offload_works_when_reloading(buffers, source, tmp_path):
    model = quantize(source)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved",
        device_map=DISK,
        offload_folder=str(tmp_path / "offload"),
        offload_buffers=buffers,
    )
    assert again.model.layers[1].mlp.up_proj.weight.is_meta == buffers
    assert torch.equal(logits(again), logits(model))
    with pytest.warns(UserWarning, match="offloaded modules"):
        again.save_pretrained(tmp_path / "again")
    files = [tmp_path / name / "model.safetensors" for name in ("saved", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()


# --- models


def test_a_model_in_which_nothing_converts(source):
    with pytest.raises(
        ValueError, match="expected a model with linears that nvfp4 can hold, got LlamaForCausalLM"
    ):
        quantize(source, modules_to_not_convert=["model.layers"])


@pytest.mark.parametrize("method", ["mr-gptq", "rtn"])
def test_a_model_without_a_single_linear_in_its_blocks(method, tmp_path):
    tiny_model("gpt2").save_pretrained(tmp_path)
    message = (
        r"got GPT2LMHeadModel where none converts \(transformers' Conv1D is not supported: transformer\.h"
    )
    with pytest.raises(ValueError, match=message):
        quantize(tmp_path, method=method)


def test_a_name_that_matches_nothing(source):
    with pytest.raises(ValueError, match="model.layers.9"):
        quantize(source, modules_to_not_convert=["model.layers.9"])


def test_encoder_decoders_are_refused_before_data_is_read(tmp_path):
    tiny_model("t5").save_pretrained(tmp_path)
    config = MRGPTQConfig(dataset=tmp_path / "no-such-file.txt", **SIZES)
    with pytest.raises(ValueError, match='expected a decoder-only model to calibrate, .*use method="rtn"'):
        AutoModelForSeq2SeqLM.from_pretrained(tmp_path, quantization_config=config)
    assert AutoModelForSeq2SeqLM.from_pretrained(tmp_path, quantization_config=MRGPTQConfig(method="rtn"))
