"""Experts that transformers keeps in 3-D parameters: taken apart, rounded, calibrated, stored, put together again."""

from __future__ import annotations

import ast
import copy
import importlib
import json
from pathlib import Path

import fake_kernels
import pytest
import torch
import transformers
from model_zoo import EXPERTS, skeleton, tiny_model, tiny_tokens
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from test_team import run_together
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3MoeConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightConverter
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from hf_fp4 import (
    FP4Experts,
    FP4Linear,
    MRGPTQConfig,
    export_compressed_tensors,
    import_compressed_tensors,
)
from hf_fp4.calibration import driver
from hf_fp4.calibration import experts as calibration
from hf_fp4.calibration.experts import ExpertsGroup
from hf_fp4.formats import FP4Format
from hf_fp4.hessian import OrderedFactor, SecondMoments, blended
from hf_fp4.layers.experts import (
    Routed,
    conversions_of_linears,
    experts_in,
    gather_rows,
    grouped_product,
    layout_of_experts,
    take_apart,
)
from hf_fp4.layers.replace import replace_linears, select_linears, take_experts_apart, text_experts

TOKENS = tiny_tokens(8, 64)
UNSEEN = tiny_tokens(4, 32, seed=5)
SIZES = {"num_samples": 8, "sequence_length": 64, "batch_size": 4}
STORED_AS = {"mixtral": "block_sparse_moe.experts.{}.w{}", "llama4": "feed_forward.experts.{}.{}_proj"}
ON_DISK = {
    "nvfp4": {"weight", "weight_scale", "weight_global_scale", "input_global_scale"},
    "mxfp4": {"weight", "weight_scale"},
}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory):
    """Path of a family's saved model, which is written at the first use."""
    root = tmp_path_factory.mktemp("zoo")

    def path(family: str) -> Path:
        if not (root / family).exists():
            tiny_model(family).save_pretrained(root / family)
        return root / family

    return path


def quantize(source: Path, **fields) -> PreTrainedModel:
    config = MRGPTQConfig(**{"dataset": list(TOKENS), **SIZES, **fields})
    return AutoModelForCausalLM.from_pretrained(source, quantization_config=config)


@torch.no_grad()
def logits(model: PreTrainedModel, tokens: torch.Tensor = UNSEEN) -> torch.Tensor:
    return model(tokens).logits


@torch.no_grad()
def kl(model: PreTrainedModel, other: PreTrainedModel) -> float:
    p, q = (logits(m).log_softmax(-1) for m in (other, model))
    return (p.exp() * (p - q)).sum(-1).mean().item()


def stored(directory: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in directory.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            tensors |= {key: opened.get_tensor(key) for key in list(opened.keys())}
    return tensors


# --- taken apart


@pytest.mark.parametrize("family", EXPERTS)
def test_taking_experts_apart_changes_nothing_and_can_be_undone(family):
    model = tiny_model(family)
    expected, before = logits(model), {n: p.clone() for n, p in model.named_parameters()}
    names = text_experts(model)
    assert names and all(name.endswith("experts") for name in names)
    for name, experts in take_apart(model, names).items():
        assert isinstance(model.get_submodule(name), FP4Experts)
        linear = experts.linears(0, ["down_proj"])[0]
        experts.release()
        assert linear.weight.untyped_storage().nbytes() == linear.weight.nbytes
        assert all(p.is_meta for n, p in experts.own.named_parameters() if n in experts.layout.parameters)
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
    for name, experts in experts_in(model).items():
        model.set_submodule(name, experts.fused())
    assert torch.equal(logits(model), expected)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name


class AnyConfig:
    """Answers a size for every name, so that a class of experts can be made without its model's config."""

    _experts_implementation = "eager"

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        sizes = {
            "experts": 4,
            "intermediate": 32,
            "ffn": 32,
            "hidden_size": 64,
            "act": "silu",
            "norm_eps": 1e-6,
        }
        constants = dict.fromkeys(("limit", "alpha", "beta"), 1.5)
        return next((value for part, value in (sizes | constants).items() if part in name), None)


def classes_of_experts() -> list[tuple[str, str]]:
    """Module and name of every class of transformers with experts in 3-D parameters."""
    root = Path(transformers.__file__).parent
    return [
        (".".join(("transformers", *file.relative_to(root).with_suffix("").parts)), node.name)
        for file in sorted(root.glob("models/*/modeling_*.py"))
        if "down_proj = nn.Parameter" in (source := file.read_text(encoding="utf-8"))
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef) and "self.down_proj = nn.Parameter" in ast.unparse(node)
    ]


@torch.no_grad()
def test_experts_of_every_model_of_transformers():
    """What is understood is computed as the model's own code does, for every class that can be made without its model."""
    understood, others = set(), set()
    for module, name in classes_of_experts():
        experts_class = getattr(importlib.import_module(module), name)
        try:
            own = experts_class(AnyConfig()).eval()
        except (TypeError, RuntimeError):
            continue
        for parameter in own.parameters():
            nn.init.normal_(parameter, std=0.2)
        layout = layout_of_experts(own)
        if layout is None:
            others.add(name)
            continue
        x = torch.randn(8, 64)
        routing = (torch.randint(0, 4, (8, 2)), torch.rand(8, 2))
        arguments = (x, *routing) if layout.routed else (x.repeat(4, 1),)
        try:
            expected = own(*arguments)
        except (TypeError, RuntimeError):  # of a size or constant that AnyConfig got wrong
            continue
        torch.testing.assert_close(FP4Experts(own, layout)(*arguments), expected, atol=1e-5, rtol=1e-5)
        understood.add(name)
    assert len(understood) >= 50
    assert {"MixtralExperts", "GptOssExperts", "Llama4TextExperts"} <= understood
    not_in_5_17 = {"AriaExperts"} & {name for _, name in classes_of_experts()}
    assert not_in_5_17 <= understood
    assert "LongcatFlashExperts" in others and len(others) <= 3


def test_rows_of_no_expert_are_zero_and_get_no_gradient():
    """Expert parallelism numbers what another process has as the one after the last."""
    own = tiny_model("qwen3_moe").model.layers[0].mlp.experts
    experts = FP4Experts(own, layout_of_experts(own))
    x = torch.randn(5, 64, requires_grad=True)
    index = torch.tensor([[8, 8], [0, 8], [3, 1], [8, 8], [1, 0]])
    weights = torch.rand(5, 2)
    y = experts(x, index, weights)
    # What transformers computes for such a row may be what lay in memory, so the weight alone decides.
    absent = index == 8
    expected = own(x, index.masked_fill(absent, 0), weights.masked_fill(absent, 0))
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    y.sum().backward()
    assert x.grad[[0, 3]].eq(0).all() and x.grad[[1, 2, 4]].ne(0).any(-1).all()


def test_no_tokens_at_all():
    routed = Routed(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(3, dtype=torch.int64))
    assert gather_rows(routed, lambda *where: pytest.fail("no expert has rows"), 6).shape == (0, 6)


@pytest.mark.parametrize("rows", [None, torch.tensor([4, 0, 9, 9, 1, 10, 3, 2, 5, 7, 6])])
def test_grouped_product_is_that_of_each_expert(rows):
    """Of tokens as they come or by their numbers; an expert has no rows, and some rows no expert."""
    weights, tokens = torch.randn(4, 16, 32), torch.randn(11, 32)
    routed = Routed(tokens, rows, torch.tensor([0, 3, 3, 7, 9]))
    expected = gather_rows(routed, lambda e, *where: routed.of_rows(tokens, *where) @ weights[e].T, 16)
    found = grouped_product(routed, tokens.bfloat16(), weights.bfloat16())
    torch.testing.assert_close(found.float(), expected, atol=0.1, rtol=0.02)
    assert found[9:].eq(0).all()


def test_renamings_of_a_checkpoint():
    conversions = get_checkpoint_conversion_mapping("mixtral")
    changed = conversions_of_linears(conversions)
    assert not any(isinstance(conversion, WeightConverter) for conversion in changed)
    names = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
    for stored_name, own in names.items():
        saved = f"model.layers.1.block_sparse_moe.experts.12.{stored_name}.weight_scale"
        name = saved
        for conversion in changed:
            name, _ = conversion.rename_source_key(name)
        assert name == f"model.layers.1.mlp.experts.12.{own}.weight_scale"
        for conversion in reversed(changed):
            name, _ = conversion.reverse_transform().rename_source_key(name)
        assert name == saved
    same = get_checkpoint_conversion_mapping("qwen3_moe")
    assert conversions_of_linears(same) == []


# --- through from_pretrained and back


@pytest.mark.parametrize("family", EXPERTS)
@pytest.mark.parametrize(
    "fields",
    [
        {"method": "rtn", "format": "mxfp4", "activations": "bf16"},
        {"method": "rtn", "format": "nvfp4"},
        {"format": "nvfp4"},
    ],
    ids=lambda fields: "-".join(fields.values()),
)
def test_saved_and_reloaded(family, fields, zoo, tmp_path):
    model = quantize(zoo(family), **fields)
    experts = experts_in(model)
    assert experts and all(
        isinstance(m, FP4Linear) for e in experts.values() for m in e.linears(1, ["down_proj"])
    )
    assert not any("experts" in name for name in model.hf_quantizer.skipped)
    assert 0 < kl(model, AutoModelForCausalLM.from_pretrained(zoo(family))) < 0.5
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    again = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu")
    assert torch.equal(logits(again), logits(model))
    again.save_pretrained(tmp_path / "again")
    first, second = stored(tmp_path), stored(tmp_path / "again")
    assert first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)
    assert not any(name.endswith(("gate_up_proj", "down_proj")) for name in first)


@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_bytes_of_every_expert(family, format, zoo, tmp_path):
    """The layout of a linear, under the names that the family's checkpoints and serving engines have."""
    model = quantize(zoo(family), format=format)
    model.save_pretrained(tmp_path)
    tensors = stored(tmp_path)
    config, fmt = model.config, FP4Format(format)
    hidden = config.hidden_size
    inner = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    path = {"mixtral": "block_sparse_moe.experts.{}.w{}"}.get(family, "mlp.experts.{}.{}_proj")
    gate, up, down = ("1", "3", "2") if family == "mixtral" else ("gate", "up", "down")
    shapes = {gate: (inner, hidden), up: (inner, hidden), down: (hidden, inner)}
    biases = {"bias"} if family == "gpt_oss" else set()
    for layer in range(config.num_hidden_layers):
        inputs = {down: set(), gate: set(), up: set()}
        for expert in range(config.num_local_experts):
            found = {}
            for linear, (rows, columns) in shapes.items():
                prefix = f"model.layers.{layer}.{path.format(expert, linear)}."
                own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
                assert own.keys() == ON_DISK[format] | biases
                assert (own["weight"].dtype, own["weight"].shape) == (torch.uint8, (rows, columns // 2))
                assert own["weight_scale"].dtype == fmt.scale_dtype
                assert own["weight_scale"].shape == (rows, columns // fmt.group_size)
                found[linear] = own
                inputs[linear].add(own["input_global_scale"].item() if format == "nvfp4" else None)
            if format == "nvfp4":
                assert found[gate]["weight_global_scale"] == found[up]["weight_global_scale"]
        assert len(inputs[down]) == len(inputs[gate] | inputs[up]) == 1, (
            "one scale of the input for all experts"
        )
        router = next(
            t
            for n, t in tensors.items()
            if n.startswith(f"model.layers.{layer}.") and "gate.w" in n or "router.weight" in n
        )
        assert router.dtype == torch.float32


def test_gate_and_up_rounded_without_data_share_their_scale(zoo):
    model = quantize(zoo("gpt_oss"), method="rtn")
    for experts in experts_in(model).values():
        for expert in range(experts.num_experts):
            gate, up, down = experts.linears(expert, ["gate_proj", "up_proj", "down_proj"])
            assert torch.equal(gate.weight_global_scale, up.weight_global_scale)
            assert down.input_global_scale is None


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "llama4"])
def test_rounding_while_loading_is_rounding_the_loaded_model(family, zoo):
    model = quantize(zoo(family), method="rtn", activations="bf16", scale_rule="absmax")
    original = AutoModelForCausalLM.from_pretrained(zoo(family))
    taken = take_apart(original, text_experts(original))
    for name, experts in experts_in(model).items():
        for expert in range(experts.num_experts):
            names = ["gate_proj", "up_proj", "down_proj"]
            for quantized, linear in zip(
                experts.linears(expert, names), taken[name].linears(expert, names), strict=True
            ):
                error = (quantized.dequantize(torch.float32) - linear.weight).abs()
                assert error.max() < linear.weight.abs().max() / 6
                assert error.mean() < 0.12 * linear.weight.abs().mean()
                if linear.bias is not None:
                    assert torch.equal(quantized.bias, linear.bias)


@pytest.mark.parametrize("family", EXPERTS)
def test_dequantized(family, zoo, tmp_path):
    """The model's own class again, in the layout and under the names of the original."""
    model = quantize(zoo(family), method="rtn", activations="bf16")
    expected = logits(model)
    model.dequantize()
    assert not experts_in(model)
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)
    model.save_pretrained(tmp_path)
    assert stored(tmp_path).keys() == stored(zoo(family)).keys()
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path)), expected, atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("fields", [{}, {"method": "rtn"}], ids=["calibrated", "rtn"])
@pytest.mark.parametrize(
    ("entry", "converted"),
    [("mlp.experts", 0), ("model.layers.0.mlp.experts", 1), (r".*experts\.[0-2]\.", 2), ("up_proj", 2)],
)
def test_experts_that_are_to_stay(entry, converted, fields, zoo, tmp_path):
    model = quantize(zoo("mixtral"), modules_to_not_convert=[entry], **fields)
    assert len(experts_in(model)) == (2 if converted else 0)
    total = sum(isinstance(m, FP4Linear) for e in experts_in(model).values() for m in e.modules())
    assert total == {"mlp.experts": 0, "model.layers.0.mlp.experts": 12, "up_proj": 16}.get(entry, 6)
    assert f'"{entry}" is in modules_to_not_convert' in model.hf_quantizer.skipped.values()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))


def test_offloaded(zoo, tmp_path):
    model = quantize(zoo("qwen3_moe"))
    model.save_pretrained(tmp_path / "quantized")
    parts = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "quantized",
        device_map={**dict.fromkeys(parts, "cpu"), "model.layers.1": "disk"},
        offload_folder=str(tmp_path / "offload"),
        offload_buffers=True,
    )
    assert experts_in(offloaded)["model.layers.1.mlp.experts"].linears(0, ["up_proj"])[0].weight.is_meta
    for _ in range(2):
        assert torch.equal(logits(offloaded), logits(model))


def test_the_config_lists_experts_of_a_layer_as_one():
    sizes = {f"model.layers.0.mlp.experts.{e}.up_proj": 32 for e in range(128)}
    others = {"model.layers.0.self_attn.q_proj": None, "a.experts.0.up_proj": 16, "a.experts.1.up_proj": None}
    gap = {f"b.experts.{e}.up_proj": 16 for e in (0, 2)}
    config = MRGPTQConfig(modules={**others, **sizes, **gap})
    saved = config.to_dict()["modules"]
    assert saved == {**others, "model.layers.0.mlp.experts.0-127.up_proj": 32, **gap}
    assert MRGPTQConfig.from_dict(config.to_dict()).modules == config.modules


# --- calibration


def moments_of(x: torch.Tensor, original: torch.Tensor | None = None) -> SecondMoments:
    moments = SecondMoments(x.shape[1], x.device, cross=original is not None)
    moments.add(x, original)
    return moments


@pytest.mark.parametrize(("tokens", "share"), [(0, 0.0), (4, 0.25), (15, 15 / 16), (16, 1.0), (40, 1.0)])
def test_missing_tokens_count_as_average_ones(tokens, share):
    x, other, rest = torch.randn(tokens, 16), torch.randn(tokens, 16), torch.randn(100, 16)
    pooled = moments_of(torch.cat([x, rest]), torch.cat([other, rest])).mean()
    missing = max(0, 16 - tokens)
    expected = [
        ((a.T @ x) + missing * mean) / max(tokens, 16) for a, mean in zip((x, other), pooled, strict=True)
    ]
    found, second, cross = blended(moments_of(x, other), pooled)
    assert found == share
    torch.testing.assert_close(second, expected[0])
    torch.testing.assert_close(cross, expected[1])
    scaled = tuple(mean / divisor for mean, divisor in zip(pooled, (16.0, 4.0), strict=True))
    _, second, cross = blended(moments_of(x, other), scaled, torch.tensor([4.0]))
    torch.testing.assert_close(second, expected[0] / 16)
    torch.testing.assert_close(cross, expected[1] / 4)


@pytest.mark.parametrize("ordered", [True, False])
def test_a_stack_of_factors_is_each_by_itself(ordered):
    second = torch.stack([(x := torch.randn(n, 24)).T @ x / n for n in (100, 24, 3)] + [torch.zeros(24, 24)])
    second[3, 0, 0] = -1.0  # only a larger damping helps
    names = list("abcd")
    order = torch.stack([torch.randperm(24) for _ in names]) if ordered else None
    weight, cross = torch.randn(4, 5, 24), torch.randn(4, 24, 24)
    stack = OrderedFactor.stack(second, order, 0.01, names)
    singles = [
        OrderedFactor.of(each, None if order is None else order[i], 0.01, names[i])
        for i, each in enumerate(second)
    ]
    torch.testing.assert_close(stack.added, torch.tensor([single.added for single in singles]))
    corrected = stack.correct_target(weight, weight @ cross, 0.5)
    for i, single in enumerate(singles):
        alone = single.correct_target(weight[i], weight[i] @ cross[i], 0.5)
        torch.testing.assert_close(corrected[i], alone, rtol=1e-4, atol=1e-4)
    upper = stack.part(slice(1, 4)).upper()
    assert torch.equal(upper, upper.triu())
    for each, single in zip(upper, singles[1:], strict=True):
        torch.testing.assert_close(each, single.upper(), rtol=1e-4, atol=1e-4)
    second[2, 3, 3] = torch.nan
    with pytest.raises(RuntimeError, match="second moments of c are not positive definite"):
        OrderedFactor.stack(second, order, 0.01, names)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "llama4"])
def test_one_product_of_all_experts(family, zoo, monkeypatch):
    """Calibration computes the same with it, and leaves no view of the tensor that holds all weights."""
    expected = quantize(zoo(family))
    called = []
    for module in ("layers.experts", "calibration.experts"):
        monkeypatch.setattr(f"hf_fp4.{module}.multiplies_groups", lambda x, weights: x.dtype == weights.dtype)
        monkeypatch.setattr(
            f"hf_fp4.{module}.grouped_product", lambda *args: called.append(0) or grouped_product(*args)
        )
    model = quantize(zoo(family))
    assert bool(called) == (family != "gpt_oss")  # biases are added expert by expert
    assert kl(expected, model) < 1e-4
    for experts in experts_in(model).values():
        assert experts.gate_up.together is experts.down.together is None


def starve(directory: Path, target: Path) -> None:
    """A Qwen3-MoE whose expert 5 of layer 1 gets no token and whose expert 2 gets few."""
    model = AutoModelForCausalLM.from_pretrained(directory)
    router = model.model.layers[1].mlp.gate
    with torch.no_grad():
        router.weight[0], router.weight[6] = -router.weight[1], -router.weight[7]
        router.weight[5] = 0  # never above both max(0, 1) and max(6, 7)
        router.weight[2] *= 0.2
    model.save_pretrained(target)


@pytest.mark.parametrize("fields", [{}, {"method": "rtn", "scale_rule": "hessian"}, {"format": "mxfp4"}])
def test_experts_with_few_tokens(fields, zoo, tmp_path, monkeypatch):
    warned = []
    monkeypatch.setattr("hf_fp4.quantizer.logger.warning", warned.append)
    starve(zoo("qwen3_moe"), tmp_path)
    model = quantize(tmp_path, **fields)
    rows = {row.name: row for row in model.hf_quantizer.report}
    layer = {e: rows[f"model.layers.1.mlp.experts.{e}.up_proj"] for e in range(8)}
    assert sum(row.tokens for row in layer.values()) == 2 * TOKENS.numel()
    assert 0 == layer[5].tokens < layer[2].tokens < 64 < layer[0].tokens
    for row in layer.values():
        assert row.own_share == min(1.0, row.tokens / 64) and 0 <= row.error < 0.1
    assert rows["model.layers.1.self_attn.q_proj"].tokens is None
    (warning,) = (text for text in warned if "fewer calibration tokens" in text)
    assert f"5 ({layer[5].tokens})" in warning and f"2 ({layer[2].tokens})" in warning
    assert "model.layers.1.mlp.experts: " in warning and "0 (" not in warning.split("layers.1")[1]
    for module in model.modules():
        if isinstance(module, FP4Linear):
            module.check("layer")
            assert torch.isfinite(module.dequantize(torch.float32)).all()


@pytest.fixture
def batches(monkeypatch):
    """The batches of tokens that a model is calibrated on, once it is."""
    found: list[torch.Tensor] = []
    real = driver.quantize_model
    monkeypatch.setattr(
        "hf_fp4.quantizer.quantize_model", lambda *args: found.extend(args[2].batches) or real(*args)
    )
    return found


def test_what_an_expert_is_calibrated_on(zoo, batches, monkeypatch):
    """Second moments of the tokens routed to it, and against the original model's inputs for the same tokens."""
    real, collected = ExpertsGroup.solve, {}

    def spy(self):
        collected[f"{self.prefix}.{self.entries[0]}"] = list(self._seen)
        return real(self)

    monkeypatch.setattr(ExpertsGroup, "solve", spy)
    fields = {"activations": "bf16", "hadamard_group_size": None, "batch_size": 8}
    model = quantize(zoo("qwen3_moe"), **fields)
    original = take_apart_original(zoo("qwen3_moe"))
    (tokens,) = batches
    inputs = {"quantized": inputs_of(model, tokens), "original": inputs_of(original, tokens)}
    for layer in (0, 1):
        name = f"model.layers.{layer}.mlp.experts"
        (batch,) = collected[f"{name}.gate_up"]
        x, index, _ = inputs["quantized"][name]
        y, _, _ = inputs["original"][name]
        (down,) = collected[f"{name}.down"]
        own: FP4Experts = original.get_submodule(name)
        for expert, start, stop in batch.routed.by_expert():
            tokens = (index == expert).any(-1)
            assert torch.equal(batch.quantized[batch.routed.rows[start:stop]], x[tokens])
            assert torch.equal(batch.original[batch.routed.rows[start:stop]], y[tokens])
            gate, up = own.linears(expert, ["gate_proj", "up_proj"])
            aimed = nn.functional.silu(gate(y[tokens])) * up(y[tokens])
            torch.testing.assert_close(down.original[start:stop], aimed, atol=1e-5, rtol=1e-5)


def take_apart_original(directory: Path) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(directory)
    take_apart(model, text_experts(model))
    return model


def inputs_of(model: PreTrainedModel, batch: torch.Tensor) -> dict[str, tuple[torch.Tensor, ...]]:
    found = {}
    handles = [
        experts.register_forward_pre_hook(lambda _, args, name=name: found.__setitem__(name, args))
        for name, experts in experts_in(model).items()
    ]
    with torch.no_grad():
        model(batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def test_tokens_that_a_model_gives_to_every_expert_are_told_apart(zoo):
    """Llama-4 multiplies each by its router's score, zero for all experts but one."""
    rows = {row.name: row for row in quantize(zoo("llama4"), error_correction=0.0).hf_quantizer.report}
    tokens = [rows[f"model.layers.1.feed_forward.experts.{e}.up_proj"].tokens for e in range(4)]
    assert sum(tokens) == TOKENS.numel() and max(tokens) < TOKENS.numel()


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "llama4", "deepseek_v3"])
@pytest.mark.parametrize(("format", "activations"), [("nvfp4", "fp4"), ("mxfp4", "bf16")])
def test_the_simulated_experts_are_the_real_ones(family, format, activations, zoo, batches, monkeypatch):
    """Inputs of each layer's experts while calibrating are those of the finished model."""
    seen = {}
    real = ExpertsGroup.start

    def spy(self, inputs):
        first = next(iter(inputs))
        seen.setdefault(f"{self.prefix}.{self._owner}", []).append(first.tokens)
        real(self, [first])

    monkeypatch.setattr(ExpertsGroup, "start", spy)
    model = quantize(zoo(family), format=format, activations=activations, batch_size=8)
    for name, (x, *_) in inputs_of(model, *batches).items():
        (tokens, _) = seen[name]
        assert torch.equal(tokens, x), name


def test_many_experts_are_solved_a_few_at_a_time(zoo, monkeypatch):
    first = quantize(zoo("olmoe"))
    monkeypatch.setattr(calibration, "STACKED_VALUES", 3 * 64 * 64)
    second = quantize(zoo("olmoe"))
    for name, tensor in first.state_dict().items():
        same = (second.state_dict()[name].view(torch.uint8) == tensor.view(torch.uint8)).float().mean()
        assert same > 0.99, name  # a batch of another size may be factored in another order of additions


def test_inputs_that_do_not_fit_are_computed_again(zoo, monkeypatch):
    first = quantize(zoo("deepseek_v3"))
    monkeypatch.setattr(driver, "_fits", lambda *_: False)
    assert torch.equal(logits(quantize(zoo("deepseek_v3"))), logits(first))


def test_a_killed_run_resumes(zoo, tmp_path, monkeypatch):
    fields = {"work_dir": str(tmp_path / "work")}
    expected = quantize(zoo("gpt_oss"))
    real = driver._Block._solve
    monkeypatch.setattr(
        driver._Block,
        "_solve",
        lambda self, *args, **kwargs: (
            real(self, *args, **kwargs) if self._index == 0 else pytest.fail("killed", pytrace=False)
        ),
    )
    with pytest.raises(pytest.fail.Exception, match="killed"):
        quantize(zoo("gpt_oss"), **fields)
    monkeypatch.setattr(driver._Block, "_solve", real)
    resumed = quantize(zoo("gpt_oss"), **fields)
    assert torch.equal(logits(resumed), logits(expected))
    for row, other in zip(resumed.hf_quantizer.report, expected.hf_quantizer.report, strict=True):
        assert (row.name, row.error, row.tokens) == (other.name, other.error, other.tokens)


@pytest.mark.once
def test_two_processes_make_what_one_makes(zoo, tmp_path):
    """Neither equalized nor with rotations chosen: where sums in another order turn a choice, all codes move (test_team.py)."""
    fields = {"equalize": False, "hadamard_group_size": 16}
    run_together(2, zoo("qwen3_moe"), tmp_path, **fields)
    files = [tmp_path / f"{rank}.safetensors" for rank in (0, 1)]
    assert files[0].read_bytes() == files[1].read_bytes()
    ids = torch.randint(4, 200, (12, 40), generator=torch.Generator().manual_seed(3))
    sizes = {"num_samples": 12, "sequence_length": 40, "batch_size": 2}
    model = quantize(zoo("qwen3_moe"), dataset=list(ids), **sizes, **fields)
    with safe_open(files[0], "pt") as opened:
        for name, tensor in model.state_dict().items():
            same = opened.get_tensor(name).view(torch.uint8) == tensor.view(torch.uint8)
            assert same.float().mean() > 0.9, name


# --- on kernels, with a package for the CPU


@pytest.fixture
def kernels_on_the_cpu(monkeypatch):
    for module in ("experts", "linear"):
        monkeypatch.setattr(f"hf_fp4.layers.{module}.select", lambda *_: fake_kernels.found())
    fake_kernels.grouped.clear()
    fake_kernels.gates.clear()
    fake_kernels.tiles.clear()


@pytest.fixture(params=[False, True], ids=["rows", "tiles"])
def tiles(request, kernels_on_the_cpu):
    """Both layouts that kernels have for the weights of all experts."""
    fake_kernels.tiles[:] = [True] * request.param
    yield
    fake_kernels.tiles.clear()


def in_bfloat16(directory: Path, **fields) -> PreTrainedModel:
    config = MRGPTQConfig(**{"dataset": list(TOKENS), **SIZES, **fields})
    return AutoModelForCausalLM.from_pretrained(
        directory, quantization_config=config, dtype=torch.bfloat16, device_map="cpu"
    )


@pytest.mark.once
@pytest.mark.parametrize(
    ("family", "fields"),
    [("mixtral", {}), ("gpt_oss", {"format": "mxfp4", "activations": "bf16"}), ("llama4", {})],
    ids=str,
)
def test_kernels_run_all_experts_at_once(family, fields, zoo, tmp_path, tiles):
    model = in_bfloat16(zoo(family), **fields)
    result = logits(model)
    layers = len(experts_in(model))
    assert len(fake_kernels.grouped) == 2 * layers
    for experts in experts_in(model).values():
        weight = experts.linears(1, ["up_proj"])[0].weight
        assert weight.untyped_storage().nbytes() > weight.nbytes, "a view of the weights of all"
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(copy.deepcopy(model)), result) and torch.equal(logits(model.to("cpu")), result)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), result)
    tensors = stored(tmp_path)
    fake_kernels.grouped.clear()
    for experts in experts_in(model).values():
        experts.use_kernels(None)
    torch.testing.assert_close(logits(model), result, atol=0.05, rtol=0.05)
    assert not fake_kernels.grouped
    model.save_pretrained(tmp_path / "reference")
    for name, tensor in stored(tmp_path / "reference").items():
        assert torch.equal(tensors[name], tensor), name


def test_kernels_make_silu_of_gate_and_up(zoo, tiles):
    """Unless somebody looks at what `down` is given."""
    model = in_bfloat16(zoo("mixtral"), method="rtn")
    result, every = logits(model), list(experts_in(model).values())
    assert len(fake_kernels.gates) == len(every)
    seen = []
    for experts in every:
        experts.down.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].tokens))
    assert torch.equal(logits(model), result)
    assert [x.shape[-1] for x in seen] == [experts.own.intermediate_dim for experts in every]
    assert len(fake_kernels.gates) == len(every) and len(fake_kernels.grouped) == 4 * len(every)


def test_kernels_leave_other_gates_to_the_model(zoo, tiles):
    logits(in_bfloat16(zoo("gpt_oss"), method="rtn"))
    assert fake_kernels.grouped and not fake_kernels.gates


def test_loading_into_experts_on_kernels(zoo, tiles):
    model, other = (in_bfloat16(zoo("mixtral"), method="rtn", seed=seed) for seed in (0, 1))
    expected = logits(other)
    with torch.no_grad():
        for name, tensor in (state := other.state_dict()).items():
            if "experts" in name and name.endswith("weight"):
                state[name] = tensor ^ 8  # the sign of every second value
    model.load_state_dict(state)
    other.load_state_dict(state)
    assert torch.equal(logits(model), logits(other)) and not torch.equal(logits(other), expected)


def test_gradients_and_adapters_take_the_linears_one_by_one(zoo, tiles):
    model = in_bfloat16(zoo("mixtral"), method="rtn")
    experts = experts_in(model)["model.layers.0.mlp.experts"]
    x, index, weights = torch.randn(4, 64), torch.tensor([[0, 1]] * 4), torch.rand(4, 2)
    arguments = (index, weights.bfloat16())
    expected = experts(x.bfloat16(), *arguments)
    assert len(fake_kernels.grouped) == 2
    leaf = x.bfloat16().requires_grad_()
    y = experts(leaf, *arguments)
    y.sum().backward()
    assert leaf.grad.ne(0).any() and len(fake_kernels.grouped) == 2
    torch.testing.assert_close(y, expected, atol=0.05, rtol=0.05)
    experts.get_submodule("0")["up_proj"] = nn.Linear(64, 128, dtype=torch.bfloat16)
    experts.use_kernels(experts._source)
    with torch.no_grad():
        experts(x.bfloat16(), *arguments)
    assert len(fake_kernels.grouped) == 3, "only down_proj has all of its linears"


def test_a_package_without_experts_serves_the_linears(zoo, kernels_on_the_cpu, monkeypatch):
    monkeypatch.delattr(fake_kernels, "grouped_linear")
    model = in_bfloat16(zoo("mixtral"), method="rtn")
    assert (
        experts_in(model)["model.layers.0.mlp.experts"].linears(0, ["up_proj"])[0].kernels.backend == "fake"
    )
    assert torch.isfinite(logits(model)).all()


# --- a list of modules, as before transformers 5


class Unfused(nn.ModuleList):
    gate_up_proj = down_proj = torch.zeros(0)  # for Mixtral's own initialization

    def __init__(self, config):
        names = ("gate_proj", "up_proj", "down_proj")
        sizes = (config.hidden_size, config.intermediate_size)
        super().__init__(
            nn.ModuleDict(
                {n: nn.Linear(*(sizes[::-1] if n == "down_proj" else sizes), bias=False) for n in names}
            )
            for _ in range(config.num_local_experts)
        )

    def forward(self, hidden_states, index, weights):
        output = torch.zeros_like(hidden_states)
        for number, expert in enumerate(self):
            token, place = (index == number).nonzero(as_tuple=True)
            x = hidden_states[token]
            y = expert["down_proj"](nn.functional.silu(expert["gate_proj"](x)) * expert["up_proj"](x))
            output.index_add_(0, token, y * weights[token, place, None])
        return output


@pytest.mark.parametrize("fields", [{"method": "rtn"}, {}, {"error_correction": 0.0}], ids=str)
def test_a_list_of_experts_is_linears_like_others(fields, zoo, tmp_path, monkeypatch):
    original = AutoModelForCausalLM.from_pretrained(zoo("mixtral"))
    tensors = take_apart_original(zoo("mixtral")).state_dict()
    monkeypatch.setattr("transformers.models.mixtral.modeling_mixtral.MixtralExperts", Unfused)
    with torch.device("meta"):
        unfused = AutoModelForCausalLM.from_config(original.config)
    unfused.load_state_dict(tensors, assign=True)
    unfused.model.rotary_emb = original.model.rotary_emb
    torch.testing.assert_close(logits(unfused), logits(original), atol=1e-4, rtol=1e-4)
    unfused.save_pretrained(tmp_path / "unfused")
    model = quantize(tmp_path / "unfused", **fields)
    assert sum(isinstance(m, FP4Linear) for m in model.model.layers[1].mlp.experts.modules()) == 12
    assert 0 < kl(model, original) < 0.2
    model.save_pretrained(tmp_path / "quantized")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")), logits(model))


# --- what is not understood


class Strange(MixtralExperts):
    """Has something beside its linears that nothing here knows about."""

    def __init__(self, config):
        super().__init__(config)
        self.gain = nn.Parameter(torch.ones(config.num_local_experts))


@pytest.fixture
def strange(zoo, monkeypatch, tmp_path):
    monkeypatch.setattr("transformers.models.mixtral.modeling_mixtral.MixtralExperts", Strange)
    AutoModelForCausalLM.from_pretrained(zoo("mixtral")).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("method", ["mr-gptq", "rtn"])
def test_a_model_that_would_stay_mostly_unconverted_is_refused(method, strange):
    message = (
        r"expected to convert most of MixtralForCausalLM, got \d\d% of its parameters that would stay as they are, .*"
        r"experts in a form that is not understood \(25\.7% of the parameters\): model\.layers\.\*\.mlp\.experts\.gate_up_proj "
        r"\(x2\); .*allow_unconverted=True"
    )
    with pytest.raises(ValueError, match=message):
        quantize(strange, method=method)


@pytest.mark.parametrize("method", ["mr-gptq", "rtn"])
def test_unless_it_is_allowed(method, strange):
    skipped = quantize(strange, method=method, allow_unconverted=True).hf_quantizer.skipped
    model = skeleton("mixtral")
    size = 4 * 128 * 64 / model.num_parameters()
    for name, share in (("gate_up_proj", 2 * size), ("down_proj", size)):
        assert (
            skipped[f"model.layers.1.mlp.experts.{name}"]
            == f"experts in a form that is not understood ({share:.1%} of the parameters)"
        )


def test_what_the_user_names_need_not_be_allowed(zoo):
    model = quantize(zoo("mixtral"), method="rtn", modules_to_not_convert=["mlp.experts"])
    assert not experts_in(model)


# --- memory, from the config alone


def test_memory_of_a_30b_a3b_model():
    """At most 0.30 of bfloat16, embeddings, output head, routers and all scales counted; no weight is loaded."""
    config = Qwen3MoeConfig(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        tie_word_embeddings=False,
    )
    config.num_hidden_layers = 4  # of 48, all alike
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    outside = sum(p.numel() for n, p in model.named_parameters() if ".layers." not in n)
    inside = model.num_parameters() - outside
    assert 30.0e9 < outside + 12 * inside < 31.0e9
    for fmt, limit in ((FP4Format.NVFP4, 0.30), (FP4Format.MXFP4, 0.285)):
        quantized = packed(model, fmt)
        size = 2 * outside + 12 * (quantized - 2 * outside)
        assert size / (2 * (outside + 12 * inside)) <= limit


def packed(model: PreTrainedModel, fmt: FP4Format) -> int:
    """Bytes of the model once it is quantized."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16)
    take_experts_apart(model, fmt, [])
    replace_linears(
        model,
        lambda _, linear: FP4Linear(
            linear.in_features,
            linear.out_features,
            fmt,
            static_input_scale=fmt.has_global_scale,
            device="meta",
        ),
        select_linears(model, fmt).selected,
    )
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


# --- others


@pytest.mark.parametrize(
    ("family", "format"), [*((family, "nvfp4") for family in EXPERTS), ("mixtral", "mxfp4")]
)
def test_exported_and_imported(family, format, zoo, tmp_path):
    model = quantize(zoo(family), format=format, hadamard_group_size=None)
    model.save_pretrained(tmp_path / "own")
    export_compressed_tensors(tmp_path / "own", tmp_path / "exported")
    own, exported = stored(tmp_path / "own"), stored(tmp_path / "exported")
    quantized = {
        name.removesuffix(".weight")
        for name, t in own.items()
        if t.dtype == torch.uint8 and name.endswith(".weight")
    }
    assert any(name.endswith((".experts.0.up_proj", ".experts.0.w3")) for name in quantized)
    for name, tensor in own.items():
        module = name.removesuffix(".weight")
        assert torch.equal(exported[f"{module}.weight_packed" if module in quantized else name], tensor)
    config = json.loads((tmp_path / "exported" / "config.json").read_text())["quantization_config"]
    assert not any("experts." in name for name in config["ignore"])
    import_compressed_tensors(tmp_path / "exported", tmp_path / "back")
    assert (tmp_path / "back" / "config.json").read_text() == (tmp_path / "own" / "config.json").read_text()
    (tmp_path / "exported" / "mr_gptq_config.json").unlink()  # as if another tool had written it
    rule = model.config.quantization_config.activation_scale_rule
    import_compressed_tensors(tmp_path / "exported", tmp_path / "other", activation_scale_rule=rule)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "other", dtype=torch.float32)
    torch.testing.assert_close(logits(again), logits(model), atol=1e-4, rtol=1e-4)


def test_an_expert_of_another_shape_is_refused(zoo, tmp_path):
    quantize(zoo("mixtral"), method="rtn", activations="bf16").save_pretrained(tmp_path / "own")
    config = json.loads((tmp_path / "own" / "config.json").read_text())
    (tmp_path / "own" / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))
    message = r"block_sparse_moe\.experts\.\d\.w\d\.weight must be uint8 \[64, 32\], got U8 "
    with pytest.raises(ValueError, match=message):
        export_compressed_tensors(tmp_path / "own", tmp_path / "exported")


@pytest.mark.filterwarnings(r"ignore:.\w*gradient_checkpointing\w*. is deprecated:FutureWarning")
def test_lora(zoo):
    """An adapter beside attention is trained, through the experts, and changes what the model gives."""
    model = quantize(zoo("qwen3_moe"))
    before = logits(model)
    adapted = get_peft_model(
        model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    )
    assert torch.equal(logits(adapted), before)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1.0)
    losses = []
    for _ in range(3):
        loss = adapted(TOKENS, labels=TOKENS).loss
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[2] < losses[0] and not torch.equal(logits(adapted), before)


def language(count: int, seed: int) -> torch.Tensor:
    """int64 [count, 64]: the two words before decide on four that may follow, with fixed chances; 32 words."""
    follow = torch.rand(32, 32, 32, generator=torch.Generator().manual_seed(0)).argsort(-1)[..., :4]
    chances, generator = torch.tensor([0.6, 0.25, 0.1, 0.05]), torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 32, (count, 2), generator=generator)
    while ids.shape[1] < 64:
        choice = torch.multinomial(chances, count, replacement=True, generator=generator)
        ids = torch.cat([ids, follow[ids[:, -2], ids[:, -1], choice][:, None]], 1)
    return ids + 4


@pytest.mark.slow
def test_a_trained_model_keeps_its_quality(tmp_path):
    """After a minute of training: the solver gives back at least a third of what rounding to nearest costs."""
    steps, model = 500, tiny_model("qwen3_moe").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, steps)
    for step in range(steps):
        batch = language(32, 1000 + step)
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(tmp_path)
    held_out = language(128, 1)

    @torch.no_grad()
    def loss_of(model: PreTrainedModel) -> float:
        return model(held_out, labels=held_out).loss.item()

    trained = loss_of(model)
    assert trained < 1.5  # the language has 1.03 and chance gives 3.47
    text = {"dataset": list(language(128, 2)), "num_samples": 128}
    for activations in ("fp4", "bf16"):
        fields = {"activations": activations, **text}
        rounded, calibrated = (loss_of(quantize(tmp_path, method=m, **fields)) for m in ("rtn", "mr-gptq"))
        print(
            f"loss {activations}: trained {trained:.4f}, rounded {rounded:.4f}, calibrated {calibrated:.4f}"
        )
        assert calibrated < rounded and calibrated - trained < (rounded - trained) * 2 / 3
