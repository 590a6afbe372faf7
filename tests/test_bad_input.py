"""What cannot work is refused with what was expected, what came and what to do."""

from __future__ import annotations

import json

import pytest
import torch
from model_zoo import save_with_tokenizer, tiny_model, tiny_tokens
from transformers import AutoModelForCausalLM

from hf_fp4 import MRGPTQConfig

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


def test_activations_that_are_not_finite_name_their_layer(tmp_path):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight[5] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"finite values in the input of model\.layers\.1\.mlp\.gate_proj"):
        quantize(tmp_path)


@pytest.mark.parametrize("method", ["mr-gptq", "rtn"])
def test_a_hadamard_size_that_does_not_divide(method, source):
    with pytest.raises(
        ValueError, match=r"must divide in_features, got 128 for the 80 of model\.layers\.0\..*; use 16, None"
    ):
        quantize(source, method=method, hadamard_group_size=128)


@pytest.mark.parametrize("method", ["gptq", "compressed-tensors", "something_new"])
def test_a_model_that_another_method_quantized(method, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises((ValueError, ImportError), match=r"quantized|[Cc]ompress|GPTQ|gptq"):
        quantize(tmp_path)


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
        ({"dataset": ["some text"]}, "gives only 0"),
        ({"dataset": 3}, "dataset"),
    ],
)
def test_data_that_does_not_do(options, message, with_tokenizer):
    with pytest.raises(ValueError, match=message):
        quantize(with_tokenizer, **options)


def test_text_without_a_tokenizer(source):
    with pytest.raises(ValueError, match="a tokenizer|needs a tokenizer"):
        quantize(source, dataset=["some text " * 100])


def test_a_tokenizer_that_is_not_there(source, tmp_path):
    with pytest.raises(ValueError, match="tokenizer"):
        quantize(source, dataset=["some text " * 100], tokenizer=str(tmp_path / "nothing"))


def test_the_meta_device(source):
    with pytest.raises(ValueError, match="a model on the meta device has no weights to quantize"):
        quantize(source, load={"device_map": "meta"})


DISK = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "cpu",
    "lm_head": "cpu",
}


def test_disk_offload_says_why_calibration_does_not_work(source, tmp_path):
    load = {"device_map": {**DISK, "model.rotary_emb": "cpu"}, "offload_folder": str(tmp_path)}
    with pytest.raises(
        ValueError, match="calibration needs the weights in memory, and device_map puts some on disk"
    ):
        quantize(source, load=load)


def test_a_model_in_which_nothing_converts(source):
    with pytest.raises(
        ValueError, match="expected a model with linears that nvfp4 can hold, got LlamaForCausalLM"
    ):
        quantize(source, modules_to_not_convert=["model.layers"])


def test_a_name_that_matches_nothing(source):
    with pytest.raises(ValueError, match="model.layers.9"):
        quantize(source, modules_to_not_convert=["model.layers.9"])


def test_encoders_cannot_be_calibrated(tmp_path):
    from transformers import AutoModelForSeq2SeqLM

    tiny_model("t5").save_pretrained(tmp_path)
    config = MRGPTQConfig(dataset=TOKENS, **SIZES)
    with pytest.raises(ValueError, match='expected a decoder-only model to calibrate, .*use method="rtn"'):
        AutoModelForSeq2SeqLM.from_pretrained(tmp_path, quantization_config=config)
    assert AutoModelForSeq2SeqLM.from_pretrained(tmp_path, quantization_config=MRGPTQConfig(method="rtn"))
