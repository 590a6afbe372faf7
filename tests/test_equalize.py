"""Equalization: the model computes the same, and what FP4 loses falls."""

from __future__ import annotations

import pytest
import torch
from model_zoo import tiny_model, tiny_tokens
from torch import nn

from hf_fp4.calibration.capture import capture_block_inputs, find_blocks, probe, run_block
from hf_fp4.calibration.equalize import LARGEST_EXPONENT, equalize, set_parameters
from hf_fp4.calibration.team import Team
from hf_fp4.formats import FP4Format
from hf_fp4.rotation import rotate
from hf_fp4.scales import fake_quantize_activations

TOKENS = tiny_tokens(4, 24)


class Case:
    """The first block of a model whose norms and v and up rows have channels of very different sizes."""

    def __init__(self, family: str, dtype: torch.dtype = torch.float32):
        self.model = tiny_model(family, dtype)
        torch.manual_seed(1)
        for name, parameter in self.model.named_parameters():
            if ".layers.0." in name and (parameter.dim() == 1 or "v_proj" in name or "up_proj" in name):
                spread = torch.exp(torch.randn(len(parameter))).to(dtype)
                if family == "gemma3" and "norm" in name:
                    parameter.data = spread - 1
                else:
                    parameter.data *= spread.view(-1, *(1,) * (parameter.dim() - 1))
        blocks = find_blocks(self.model)
        plans = probe(self.model, blocks, TOKENS)
        inputs = next(iter(capture_block_inputs(self.model, blocks, plans, [TOKENS])))
        self.block, self.hidden, self.call = blocks.modules[0], inputs.hidden, inputs.calls[0]
        self.groups = plans[0].groups
        self.before = {name: p.data.clone() for name, p in self.block.named_parameters()}
        self.output = self.run()

    def run(self) -> torch.Tensor:
        return run_block(self.block, self.hidden, self.call)

    def equalize(self, groups: list[list[str]] | None = None) -> dict[str, torch.Tensor]:
        return equalize(self.block, self.hidden, self.call, groups or self.groups, Team())

    def changed(self) -> set[str]:
        return {n for n, p in self.block.named_parameters() if not torch.equal(p.data, self.before[n])}

    def ratio(self, name: str) -> torch.Tensor:
        return self.block.get_parameter(name).data / self.before[name]

    def inputs(self) -> dict[str, torch.Tensor]:
        """What each linear is called on."""
        seen, handles = {}, []
        for name, module in self.block.named_modules():
            if isinstance(module, nn.Linear):

                def hook(module, args, name=name):
                    seen[name] = args[0].detach().flatten(0, -2).float()

                handles.append(module.register_forward_pre_hook(hook))
        self.run()
        for handle in handles:
            handle.remove()
        return seen


def activation_error(x: torch.Tensor, weight: torch.Tensor, size: int = 16) -> float:
    """Of the output, relative, when rotated inputs are rounded to NVFP4."""
    rotated = rotate(x, size)
    values, _ = fake_quantize_activations(rotated, FP4Format.NVFP4, "mse", torch.tensor([64.0]))
    miss = (values / 64 - rotated) @ rotate(weight, size).T
    return float(miss.norm() / (x @ weight.T).norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_the_block_computes_the_same_bits(family, dtype):
    case = Case(family, dtype)
    kept = case.equalize()
    assert torch.equal(case.run(), case.output)
    assert set(kept) == {"input_layernorm.weight", "post_attention_layernorm.weight"}
    weights = {f"self_attn.{n}_proj.weight" for n in "qkvo"} | {
        f"mlp.{n}_proj.weight" for n in ("gate", "up", "down")
    }
    assert case.changed() >= weights | set(kept)
    for name in kept:
        factors = case.ratio(name).float()
        assert torch.equal(factors.log2(), factors.log2().round()) and factors.unique().numel() > 2
        assert factors.log2().abs().max() <= LARGEST_EXPONENT


def test_biases_go_with_their_rows():
    case = Case("qwen2")
    case.equalize()
    rows = case.ratio("self_attn.v_proj.weight")[:, 0]
    assert torch.equal(case.ratio("self_attn.v_proj.bias"), rows) and rows.unique().numel() > 1
    assert "self_attn.q_proj.bias" not in case.changed()


def test_heads_that_share_a_value_head_share_its_factors():
    case = Case("mistral")
    case.equalize()
    columns = 1 / case.ratio("self_attn.o_proj.weight")[0]
    rows = case.ratio("self_attn.v_proj.weight")[:, 0]
    heads = columns.view(2, 2, 16)  # value heads, heads that share each, channels
    assert torch.equal(heads[:, 0], heads[:, 1]) and torch.equal(heads[:, 0].flatten(), rows)


@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_rounding_inputs_costs_less(family):
    case = Case(family)
    before, weights = case.inputs(), {n: p for n, p in case.before.items() if n.endswith("_proj.weight")}
    case.equalize()
    after = case.inputs()
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"):
        old = activation_error(before[name], weights[f"{name}.weight"])
        new = activation_error(after[name], case.block.get_submodule(name).weight.data)
        assert new < 0.95 * old, (name, old, new)


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str)
def test_norms_that_multiply_by_one_more_than_their_weight(dtype, most):
    case = Case("gemma3", dtype)
    kept = case.equalize()
    assert set(kept) == {"input_layernorm.weight", "pre_feedforward_layernorm.weight"}
    added = (case.output - case.hidden).float()
    assert (case.run() - case.output).float().norm() < most * added.norm()


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_a_norm_that_a_router_reads_too_stays(family):
    case = Case(family)
    kept = case.equalize()
    assert set(kept) == {"input_layernorm.weight"}
    assert "post_attention_layernorm.weight" not in case.changed()
    assert torch.equal(case.run(), case.output)


def test_what_is_not_quantized_is_not_changed():
    case = Case("llama")
    groups = [[n for n in names if n not in ("self_attn.k_proj", "mlp.up_proj")] for names in case.groups]
    kept = case.equalize([names for names in groups if names])
    assert not kept  # each norm has a reader that stays
    assert case.changed() == {"self_attn.v_proj.weight", "self_attn.o_proj.weight"}
    assert torch.equal(case.run(), case.output)


def test_channels_that_are_always_zero_keep_their_size():
    case = Case("llama")
    case.block.mlp.up_proj.weight.data[3] = 0
    case.block.self_attn.o_proj.weight.data[:, 5] = 0
    case.equalize()
    assert torch.isfinite(case.run()).all()
    assert case.ratio("mlp.down_proj.weight")[:, 3].unique().tolist() == [1.0]


def test_clamped_products_are_left_alone():
    case = Case("llama")
    case.block.mlp.limit = 7.0
    case.equalize()
    assert "mlp.down_proj.weight" not in case.changed()


def test_set_parameters_gives_a_block_what_another_kept():
    case = Case("llama")
    kept = {name: value.double() for name, value in case.equalize().items()}
    other = Case("llama")
    set_parameters(other.block, kept)
    assert torch.equal(other.block.input_layernorm.weight.double(), kept["input_layernorm.weight"])
