"""MLPs that gate by SiLU: kernels make it, with the same bits, unless somebody could tell; shown with `fake_kernels` on a CPU."""

import copy

import fake_kernels
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from model_zoo import tiny_model, tiny_tokens
from torch import nn

from hf_fp4 import MRGPTQConfig
from hf_fp4.backends import KernelSource
from hf_fp4.layers.experts import use_kernels
from hf_fp4.layers.gated_mlp import gate_in_kernels
from hf_fp4.layers.linear import FP4Linear

SOURCE = KernelSource("me/kernels", 3)


@pytest.fixture(autouse=True)
def kernels_on_the_cpu(monkeypatch):
    monkeypatch.setattr("hf_fp4.layers.linear.select", lambda *_: fake_kernels.found())
    fake_kernels.gates.clear()


@pytest.fixture
def make(tmp_path):
    """A tiny model of a family, rounded to FP4, on the kernels."""

    def make(family: str = "llama"):
        tiny_model(family, torch.bfloat16).save_pretrained(tmp_path / family)
        config = MRGPTQConfig(method="rtn")
        kind = type(tiny_model(family))
        return kind.from_pretrained(
            tmp_path / family, dtype=torch.bfloat16, quantization_config=config
        ).eval()

    return make


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    fake_kernels.gates.clear()
    return model(tiny_tokens()).logits


def gated() -> int:
    return len(fake_kernels.gates)


def mlps(model: nn.Module) -> list[nn.Module]:
    return [layer.mlp for layer in model.model.layers]


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
def test_the_same_bits_in_the_kernels(make, family):
    model = make(family)
    result = logits(model)
    assert gated() == len(mlps(model)) == 2
    again = copy.deepcopy(model)
    assert torch.equal(logits(again), result) and gated() == 2
    for mlp in mlps(again):
        assert mlp.forward.__self__ is mlp
        mlp.down_proj.weight.zero_()
    assert torch.equal(logits(model), result)
    for mlp in mlps(model):
        del mlp.forward
    assert torch.equal(logits(model), result) and gated() == 0


@pytest.mark.parametrize("family", ["gemma3", "olmoe"])
def test_other_activations_and_other_modules_are_left_to_the_model(make, family):
    result = logits(make(family))
    assert result.isfinite().all() and gated() == 0


def test_whoever_looks_sees_what_the_model_says(make):
    model, seen = make(), []
    result = logits(model)
    first, second = mlps(model)

    def look(_, inputs, *output):
        seen.append(inputs[0].shape[-1])

    handle = first.down_proj.register_forward_pre_hook(look)
    assert torch.equal(logits(model), result) and gated() == 1
    second.act_fn.register_forward_hook(look)
    assert torch.equal(logits(model), result) and gated() == 0
    assert seen == 3 * [first.down_proj.in_features]
    handle.remove()
    assert torch.equal(logits(model), result) and gated() == 1


def test_what_a_user_changes_counts(make):
    model = make()
    result = logits(model)
    first, second = mlps(model)
    first.act_fn = nn.GELU()
    changed = logits(model)
    assert gated() == 1 and not torch.equal(changed, result)
    first.act_fn = second.act_fn
    second.down_proj = nn.Sequential(second.down_proj)
    assert torch.equal(logits(model), result) and gated() == 1


def test_gradients_and_the_reference_take_the_model_s_way(make):
    model = make()
    loss = model(tiny_tokens()).logits.float().square().mean()
    loss.backward()
    assert gated() == 0 and model.model.embed_tokens.weight.grad.abs().sum() > 0
    result = logits(model)
    assert gated() == 2
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.isfinite(logits(model)).all() and gated() == 0
    for module in model.modules():
        if isinstance(module, FP4Linear):
            module.use_kernels(None)
    torch.testing.assert_close(logits(model), result)
    assert gated() == 0


def test_any_call_of_the_module(make):
    mlp = mlps(make())[0]
    x = torch.randn(2, 3, mlp.gate_proj.in_features, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(mlp(x=x), mlp(x)) and gated() == 2
        torch._dynamo.reset()
        compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), mlp(x))


def test_a_forward_of_its_own_stays():
    """As one that accelerate hooked before, or that is not what it looks like."""
    model = tiny_model("llama", torch.bfloat16)
    first, second = mlps(model)
    for mlp in (first, second):
        mlp.down_proj = FP4Linear(128, 64, MRGPTQConfig().fp4_format)
    add_hook_to_module(first, ModelHook())
    hooked = first.forward

    class Halved(type(second)):
        def forward(self, x):
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) * 0.5

    second.__class__ = Halved
    gate_in_kernels(model)
    assert first.forward is hooked and "forward" not in second.__dict__


def test_a_second_layout_changes_nothing(make):
    model = make()
    result = logits(model)
    use_kernels(model, SOURCE)
    assert torch.equal(logits(model), result) and gated() == 2
