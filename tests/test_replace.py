"""Which modules convert, why the others do not, and putting new modules in their place."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from model_zoo import FAMILIES, OTHERS, linear_names, skeleton, tiny_config, tiny_model, tiny_tokens
from packaging.version import Version
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    MoonshineConfig,
    MoonshineForConditionalGeneration,
    UdopConfig,
    UdopForConditionalGeneration,
)
from transformers.quantizers.quantizers_utils import should_convert_module

from hf_fp4.formats import FP4Format
from hf_fp4.layers.replace import describe_skipped, replace_linears, select_linears, tower_names

NVFP4, MXFP4 = FP4Format.NVFP4, FP4Format.MXFP4
HEAD = "output embeddings are never converted"
FUSED = "experts in a form that is not understood ({} of the parameters)"
ROUTER = "an MoE router or gate is never converted"


def per_layer(names: list[str], layers: int = 2, prefix: str = "model.layers") -> list[str]:
    return [f"{prefix}.{layer}.{name}" for layer in range(layers) for name in names]


ATTENTION = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
MLP = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "llama-200"])
def test_every_linear_but_the_head_converts_to_nvfp4(family):
    model = tiny_model(family)
    selection = select_linears(model, NVFP4)
    head = next(
        name for name in linear_names(model) if model.get_submodule(name) is model.get_output_embeddings()
    )
    assert selection.selected == [name for name in linear_names(model) if name != head]
    assert selection.skipped == {head: HEAD}


@pytest.mark.parametrize("fmt", [NVFP4, MXFP4])
@pytest.mark.parametrize("family", [family for family in [*FAMILIES, *OTHERS] if family != "gpt2"])
def test_a_skeleton_selects_what_the_loaded_model_selects(family, fmt):
    assert select_linears(skeleton(family), fmt) == select_linears(tiny_model(family), fmt)


@pytest.mark.parametrize(
    ("family", "fmt", "selected", "reason"),
    [
        (
            "llama-200",
            NVFP4,
            [*ATTENTION, *MLP[:2]],
            "in_features must be a multiple of 16 for nvfp4, got 200",
        ),
        (
            "llama-200",
            MXFP4,
            [*ATTENTION, *MLP[:2]],
            "in_features must be a multiple of 32 for mxfp4, got 200",
        ),
        (
            "llama",
            MXFP4,
            ["self_attn.o_proj", "mlp.down_proj"],
            "in_features must be a multiple of 32 for mxfp4, got 80",
        ),
        ("llama-144", MXFP4, ["mlp.down_proj"], "in_features must be a multiple of 32 for mxfp4, got 144"),
    ],
)
def test_in_features_must_hold_whole_groups(family, fmt, selected, reason):
    selection = select_linears(skeleton(family), fmt)
    assert selection.selected == per_layer(selected)
    refused = [name for name in ATTENTION + MLP if name not in selected]
    assert selection.skipped == {**dict.fromkeys(per_layer(refused), reason), "lm_head": HEAD}


def test_any_out_features_converts():
    model = skeleton("llama")
    model.model.layers[0].mlp.up_proj = nn.Linear(80, 7, device="meta")
    assert "model.layers.0.mlp.up_proj" in select_linears(model, NVFP4).selected


def test_a_model_without_a_convertible_linear_is_an_error():
    with pytest.raises(
        ValueError, match=r"nvfp4 can hold, got GPT2LMHeadModel .*Conv1D is not supported: transformer.h"
    ):
        select_linears(skeleton("gpt2"), NVFP4)
    with pytest.raises(
        ValueError, match=r'none converts \("model" is in modules_to_not_convert: model.layers.*\(x14\)'
    ):
        select_linears(skeleton("llama"), NVFP4, ["model"])


def test_tied_linears_stay():
    model = tiny_model("llama")
    first, second = (layer.mlp for layer in model.model.layers)
    second.up_proj.weight = first.up_proj.weight
    skipped = select_linears(model, NVFP4).skipped
    reason = "its weight is tied to another module's"
    assert skipped == {**dict.fromkeys(per_layer(["mlp.up_proj"]), reason), "lm_head": HEAD}


def test_linears_that_loading_will_tie_stay():
    model = skeleton("llama-144")
    model.all_tied_weights_keys = {"model.layers.1.mlp.up_proj.weight": "model.layers.0.mlp.up_proj.weight"}
    assert set(select_linears(model, NVFP4).skipped) == {*per_layer(["mlp.up_proj"]), "lm_head"}


def test_a_module_registered_twice_stays():
    model = tiny_model("llama")
    model.model.layers[1].mlp = model.model.layers[0].mlp
    skipped = select_linears(model, NVFP4).skipped
    assert skipped["model.layers.0.mlp.up_proj"] == "it is the same module as model.layers.1.mlp.up_proj"
    assert set(skipped) == {*per_layer(MLP, layers=1), "lm_head"}


def test_subclasses_of_linear_stay():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = skeleton("llama")
    model.model.layers[0].mlp.up_proj = Doubled(80, 160, device="meta")
    reason = select_linears(model, NVFP4).skipped["model.layers.0.mlp.up_proj"]
    assert reason == "Doubled is a subclass of nn.Linear that may compute something else"


def test_fused_experts_and_routers_stay():
    selection = select_linears(skeleton("mixtral"), NVFP4)
    assert selection.selected == per_layer(ATTENTION)
    experts = per_layer(["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
    shares = {"gate_up_proj": "25.7%", "down_proj": "12.9%"}
    reasons = {name: FUSED.format(shares[name.rpartition(".")[2]]) for name in experts}
    assert selection.skipped == {**reasons, "lm_head": HEAD}


def test_experts_stacked_into_a_matrix_are_listed_and_their_biases_are_not():
    model = skeleton("mixtral")
    experts = model.model.layers[0].mlp.experts
    experts.w1 = nn.Parameter(torch.empty(4 * 128, 64, device="meta"))
    experts.w1_bias = nn.Parameter(torch.empty(4, 128, device="meta"))
    skipped = select_linears(model, NVFP4).skipped
    assert skipped["model.layers.0.mlp.experts.w1"] == FUSED.format("11.4%")
    assert "model.layers.0.mlp.experts.w1_bias" not in skipped


def test_gate_with_a_single_output_stays_and_shared_experts_convert():
    selection = select_linears(skeleton("qwen2_moe"), NVFP4)
    shared = [f"mlp.shared_expert.{name}" for name in ("gate_proj", "up_proj", "down_proj")]
    assert selection.selected == per_layer(ATTENTION + shared)
    assert selection.skipped["model.layers.0.mlp.shared_expert_gate"] == ROUTER


@pytest.mark.parametrize(
    ("name", "out_features", "converts"),
    [
        ("gate", 4, False),
        ("router", 4, False),
        ("router", 64, False),
        ("expert_router", 64, False),
        ("gate", 64, True),
        ("attn_gate", 1, False),
        ("gate_proj", 4, True),
        ("navigate", 4, True),
    ],
)
def test_linear_routers(name, out_features, converts):
    model = skeleton("mixtral")
    setattr(model.model.layers[0].mlp, name, nn.Linear(64, out_features, device="meta"))
    selection = select_linears(model, NVFP4)
    full_name = f"model.layers.0.mlp.{name}"
    assert (full_name in selection.selected) == converts
    assert (selection.skipped.get(full_name) == ROUTER) != converts


def test_a_router_may_be_a_module_around_the_linear():
    model = skeleton("mixtral")
    model.model.layers[0].mlp.router = nn.ModuleDict({"layer": nn.Linear(64, 4, device="meta")})
    assert select_linears(model, NVFP4).skipped["model.layers.0.mlp.router.layer"] == ROUTER


def test_gates_of_models_without_experts_convert():
    model = skeleton("llama")
    model.model.layers[0].self_attn.gate = nn.Linear(80, 4, device="meta")
    assert "model.layers.0.self_attn.gate" in select_linears(model, NVFP4).selected


def test_vision_tower_and_projector_stay():
    model = skeleton("llava")
    selection = select_linears(model, NVFP4)
    assert selection.selected == per_layer(ATTENTION + MLP, prefix="model.language_model.layers")
    reasons = {name.split(".")[1]: reason for name, reason in selection.skipped.items() if name != "lm_head"}
    assert reasons == {
        "vision_tower": "model.vision_tower is not part of the text model",
        "multi_modal_projector": "it is not part of the text model",
    }
    assert selection.skipped["lm_head"] == HEAD
    assert tower_names(model) == ["model.vision_tower"]
    assert len(selection.selected) + len(selection.skipped) == len(linear_names(model))


def test_linears_beside_the_text_model_stay():
    model = skeleton("llava")
    model.model.adapter = nn.Linear(32, 32, device="meta")
    assert select_linears(model, NVFP4).skipped["model.adapter"] == "it is not part of the text model"


@pytest.mark.parametrize(
    ("model_class", "config", "parts"),
    [
        # It reads speech: the encoder is a tower, and the body around both parts declares no text either.
        (MoonshineForConditionalGeneration, MoonshineConfig(), {"model.decoder"}),
        (UdopForConditionalGeneration, UdopConfig(num_layers=2), {"encoder.block", "decoder.block"}),
    ],
    ids=["moonshine", "udop"],
)
def test_text_parts_of_multimodal_encoder_decoders_convert(model_class, config, parts):
    with torch.device("meta"):
        model = model_class(config)
    selected = select_linears(model, NVFP4).selected
    assert {".".join(name.split(".")[:2]) for name in selected} == parts


def test_projectors_inside_the_text_model_stay_in_multimodal_models_only():
    for family, text in (("llava", "model.language_model"), ("llama", "model")):
        model = skeleton(family)
        model.get_submodule(text).image_proj = nn.Linear(32, 32, device="meta")
        assert (f"{text}.image_proj" in select_linears(model, NVFP4).selected) == (family == "llama")


def test_bert_converts_its_encoder_only():
    selection = select_linears(skeleton("bert"), NVFP4)
    names = ["attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"]
    assert selection.selected == per_layer(
        [*names, "intermediate.dense", "output.dense"], prefix="bert.encoder.layer"
    )
    assert selection.skipped == {
        "cls.predictions.transform.dense": "a task head is never converted",
        "cls.predictions.decoder": HEAD,
    }


@pytest.mark.parametrize("auto_class", [AutoModelForSequenceClassification, AutoModelForTokenClassification])
def test_classification_heads_stay(auto_class):
    with torch.device("meta"):
        model = auto_class.from_config(tiny_config("llama"))
    selection = select_linears(model, NVFP4)
    assert selection.selected == per_layer(ATTENTION + MLP)
    assert selection.skipped == {"score": "a task head is never converted"}


def test_t5_converts_encoder_and_decoder_but_what_it_keeps_in_float32():
    selection = select_linears(skeleton("t5"), NVFP4)
    assert sum(name.startswith("encoder.") for name in selection.selected) == 2 * 5
    assert sum(name.startswith("decoder.") for name in selection.selected) == 2 * 9
    kept = {name for name, reason in selection.skipped.items() if reason == "the model keeps it in float32"}
    assert len(kept) == 4 and all(name.endswith(".wo") for name in kept)
    assert selection.skipped["lm_head"] == HEAD


@pytest.fixture(scope="module")
def twelve_layers():
    config = tiny_config("llama")
    config.num_hidden_layers = 12
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


ENTRIES = {
    "model.layers.1": per_layer(ATTENTION + MLP)[7:],
    "model.layers.1.mlp": [f"model.layers.1.{name}" for name in MLP],
    "down_proj": per_layer(["mlp.down_proj"], 12),
    "mlp.gate_proj": per_layer(["mlp.gate_proj"], 12),
    "layers.3.mlp.up_proj": ["model.layers.3.mlp.up_proj"],
    r"model\.layers\.\d\.self_attn\.[qk]_proj": per_layer(["self_attn.q_proj", "self_attn.k_proj"], 10),
    "model.layers.*.mlp.up": [],
    "lm_head": ["lm_head"],
    "model.embed_tokens": [],
}


@pytest.mark.parametrize("entry", [entry for entry in ENTRIES if not entry.endswith("up")])
def test_modules_to_not_convert(twelve_layers, entry):
    skipped = select_linears(twelve_layers, NVFP4, [entry]).skipped
    assert sorted(skipped) == sorted({*ENTRIES[entry], "lm_head"})
    for name in set(skipped) - {"lm_head"}:
        assert skipped[name] == f'"{entry}" is in modules_to_not_convert'


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"),
    reason='in transformers 5.17 "layers.1" also excludes layers.11',
)
@pytest.mark.parametrize("entry", ENTRIES)
def test_entries_mean_what_they_mean_in_transformers(twelve_layers, entry):
    skipped = select_linears(twelve_layers, NVFP4, [entry], require_match=False).skipped
    expected = {name for name in linear_names(twelve_layers) if not should_convert_module(name, [entry])}
    assert {*skipped, "lm_head"} == {*expected, "lm_head"}


def test_entries_that_match_nothing_are_an_error(twelve_layers):
    with pytest.raises(
        ValueError, match=r"modules of LlamaForCausalLM, got \['model.layer.0', 'v_projj'\] which match"
    ):
        select_linears(twelve_layers, NVFP4, ["model.layers.0", "model.layer.0", "v_projj"])
    reloaded = select_linears(twelve_layers, NVFP4, ["model.layer.0"], require_match=False)
    assert reloaded == select_linears(twelve_layers, NVFP4)


@pytest.mark.parametrize("entry", ["*.mlp", "model.layers.(0"])
def test_entries_that_are_no_regular_expression_are_an_error(twelve_layers, entry):
    with pytest.raises(
        ValueError, match=r"modules_to_not_convert: expected module names or regular expressions, got"
    ):
        select_linears(twelve_layers, NVFP4, [entry])


@pytest.mark.parametrize("entry", ["", 3])
def test_entries_that_are_no_names_are_an_error(twelve_layers, entry):
    with pytest.raises(ValueError, match=r"modules_to_not_convert: expected module names, got"):
        select_linears(twelve_layers, NVFP4, [entry])


def test_skipped_modules_are_described_on_one_line():
    reason = "in_features must be a multiple of 16 for nvfp4, got 200"
    skipped = {
        **dict.fromkeys(per_layer(["mlp.down_proj"], 32), reason),
        "model.layers.0.mlp.extra": reason,
        "lm_head": HEAD,
        **dict.fromkeys(
            [f"model.tower.{layer}.{name}" for layer in range(3) for name in "abcdef"], "no text"
        ),
        **dict.fromkeys("uvwxyz", "six"),
    }
    assert describe_skipped(skipped) == (
        "in_features must be a multiple of 16 for nvfp4, got 200: "
        "model.layers.*.mlp.down_proj (x32), model.layers.*.mlp.extra; "
        "output embeddings are never converted: lm_head; "
        "no text: model.tower.*.* (x18); "
        "six: u, v, w, x, y and 1 more"
    )
    assert describe_skipped({}) == ""
    assert describe_skipped({"fc1.v2.layer_3": "x"}) == "x: fc1.v2.layer_3"


class Wrapped(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias)


@pytest.mark.parametrize("family", ["phi3", "gpt_neox", "llava", "t5"])
def test_replaced_linears_are_called(family):
    model = tiny_model(family)
    inputs = {"input_ids": tiny_tokens()}
    if family == "t5":
        inputs["decoder_input_ids"] = tiny_tokens(seed=1)
    with torch.no_grad():
        expected = model(**inputs).logits
    names = select_linears(model, NVFP4).selected
    given, called = {}, set()

    def factory(name, linear):
        given[name] = linear
        wrapped = Wrapped(linear)
        wrapped.register_forward_hook(lambda *_: called.add(name))
        return wrapped

    before = copy.copy(dict(model.named_modules()))
    replace_linears(model, factory, names)
    assert given == {name: before[name] for name in names}
    assert all(type(model.get_submodule(name)) is Wrapped for name in names)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, expected)
    assert called == set(names)


@pytest.mark.parametrize("training", [True, False])
def test_replaced_linears_keep_the_training_flag(training):
    model = tiny_model("llama").train(training)
    replace_linears(model, lambda _, linear: Wrapped(linear), ["model.layers.0.mlp.up_proj"])
    assert model.model.layers[0].mlp.up_proj.training is training


def test_replacing_twice_is_an_error():
    model = skeleton("llama")
    names = ["model.layers.0.mlp.up_proj"]
    replace_linears(model, lambda _, linear: Wrapped(linear), names)
    with pytest.raises(ValueError, match=r"expected an nn.Linear at model.layers.0.mlp.up_proj, got Wrapped"):
        replace_linears(model, lambda _, linear: Wrapped(linear), names)
