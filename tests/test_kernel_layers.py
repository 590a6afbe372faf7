"""Layers on kernels: the same numbers, the same bytes on disk, shared inputs; shown with `fake_kernels` on a CPU."""

import copy
from dataclasses import replace
from pathlib import Path

import fake_kernels
import pytest
import torch
from model_zoo import save_with_tokenizer, tiny_tokens
from test_linear import KINDS, Case, Made
from transformers import AutoModelForCausalLM

from hf_fp4 import MRGPTQConfig
from hf_fp4.backends import KernelSource
from hf_fp4.calibration import group as group_module
from hf_fp4.formats import FP4Format
from hf_fp4.layers import linear as linear_module
from hf_fp4.layers.linear import FP4Linear, use_kernels

SOURCE = KernelSource("me/kernels", 3)
IDS = {"ids": str}


@pytest.fixture(autouse=True)
def kernels_on_the_cpu(monkeypatch):
    found, asked = fake_kernels.found(), []

    def select(source, device):
        asked.append((source, device.type))
        return found

    monkeypatch.setattr(linear_module, "select", select)
    for seen in (fake_kernels.prepared, fake_kernels.fake_quantized, fake_kernels.solved):
        seen.clear()
    return asked


def made(case: Case, bias: bool = True, out_features: int = 48) -> FP4Linear:
    """A layer in bfloat16, still on the reference."""
    return Made(replace(case, out_features=out_features), bias=bias, dtype=torch.bfloat16).layer


def inputs(layer: FP4Linear, *shape: int) -> torch.Tensor:
    return torch.randn(*(shape or (5,)), layer.in_features, dtype=torch.bfloat16)


def state(layer: FP4Linear) -> dict[str, bytes]:
    return {
        k: t.detach().reshape(-1).view(torch.uint8).numpy().tobytes() for k, t in layer.state_dict().items()
    }


@pytest.mark.parametrize("case", KINDS, **IDS)
def test_the_layer_computes_what_the_reference_does(case):
    layer = made(case)
    x, before = inputs(layer, 2, 3), state(layer)
    expected = layer(x)
    assert layer.use_kernels(SOURCE).backend == "fake"
    assert layer.weight_scale is None and layer.weight.shape[1] > layer.in_features // 2
    assert torch.equal(layer(x), expected)
    assert len(fake_kernels.prepared) == 1
    assert fake_kernels.prepared[0]["quantize"] == (case.rule is not None)
    assert fake_kernels.prepared[0]["hadamard"] == (case.size or 0)
    if case.rule is not None:
        assert fake_kernels.prepared[0]["rule"] == case.rule
    assert state(layer) == before
    layer.check("layer")
    layer.use_kernels(None)
    assert state(layer) == before and layer.row_scale is None
    assert torch.equal(layer(x), expected) and len(fake_kernels.prepared) == 1


def test_float32_inputs_take_the_reference():
    layer = made(KINDS[1], bias=False)
    x = inputs(layer).float()
    expected = layer(x)
    layer.use_kernels(SOURCE)
    assert torch.equal(layer(x), expected) and not fake_kernels.prepared


def test_outputs_that_kernels_cannot_take_stay_on_the_reference():
    layer = made(KINDS[1], out_features=40)
    assert layer.use_kernels(SOURCE).backend == "fake"
    assert layer.kernels.backend == "reference" and layer.weight_scale is not None
    layer(inputs(layer))
    assert not fake_kernels.prepared


@pytest.mark.parametrize("case", [KINDS[3], KINDS[7]], **IDS)
def test_moving_casting_and_copying(case, kernels_on_the_cpu):
    layer = made(case)
    before, x = state(layer), inputs(layer)
    layer.use_kernels(SOURCE)
    expected = layer(x)
    layer.to("cpu").to(torch.bfloat16)
    assert layer.kernels.backend == "fake" and torch.equal(layer(x), expected) and state(layer) == before
    layer.half()
    assert (
        layer.bias.dtype == torch.float16
        and layer.weight_global_scale is None
        or layer.weight_global_scale.dtype == torch.float32
    )
    assert layer(x).dtype == torch.bfloat16, "the bias follows the input"
    other = copy.deepcopy(layer)
    assert other.kernels is layer.kernels and torch.equal(other(x), layer(x))
    other.weight.zero_()
    assert not torch.equal(other(x), layer(x))
    assert set(kernels_on_the_cpu) == {(SOURCE, "cpu")}


def test_a_meta_layer_asks_for_no_kernels(kernels_on_the_cpu):
    layer = made(KINDS[1]).to("meta")
    layer.use_kernels(SOURCE)
    assert layer.weight_scale is not None and not kernels_on_the_cpu


@pytest.mark.parametrize("assign", [False, True])
def test_loading_a_state(assign):
    layer, other = made(KINDS[3]), made(KINDS[3])
    other.weight.random_(0, 256)
    x = inputs(layer)
    expected = other(x)
    layer.use_kernels(SOURCE)
    layer.load_state_dict(other.state_dict(), assign=assign)
    assert layer.kernels.backend == "fake" and torch.equal(layer(x), expected)


@pytest.mark.parametrize("case", [KINDS[0], KINDS[3], KINDS[7]], **IDS)
def test_gradients(case):
    layer = made(case)
    layer.bias.requires_grad_(True)
    x = inputs(layer, 2, 3).requires_grad_(True)
    gradient = torch.randn(2, 3, layer.out_features, dtype=torch.bfloat16)
    expected = torch.autograd.grad(layer(x), (x, layer.bias), gradient)
    layer.use_kernels(SOURCE)
    for actual, wanted in zip(
        torch.autograd.grad(layer(x), (x, layer.bias), gradient), expected, strict=True
    ):
        assert torch.equal(actual, wanted)
    assert len(fake_kernels.prepared) == 1
    with torch.no_grad():
        assert not layer(x).requires_grad


class Attention(torch.nn.Module):
    """q, k and v on one input, and a linear that has another."""

    def __init__(self, case: Case = KINDS[3]):
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            self.add_module(name, made(case, bias=False))

    def forward(self, x):
        return self.o_proj(torch.cat([self.q_proj(x) + self.k_proj(x) * self.v_proj(x)] * 8, dim=-1))


@pytest.mark.parametrize("case", [KINDS[0], KINDS[3], KINDS[4], KINDS[7]], **IDS)
def test_layers_on_one_input_prepare_it_once(case):
    block = Attention(case)
    x = inputs(block.q_proj)
    expected = block(x)
    use_kernels(block, SOURCE)
    for _ in range(2):
        fake_kernels.prepared.clear()
        assert torch.equal(block(x), expected)
        assert len(fake_kernels.prepared) == 2
    assert block.q_proj._shared._held is None, "an input is kept after its last use"
    again = copy.deepcopy(block)
    assert torch.equal(again(x), expected)


def test_an_input_that_changed_is_prepared_again():
    block = Attention()
    use_kernels(block, SOURCE)
    x = inputs(block.q_proj)
    block.q_proj(x)
    x.mul_(2)
    assert torch.equal(block.k_proj(x), fake_kernels.reference(block.k_proj, x))
    assert torch.equal(block.k_proj(x), fake_kernels.reference(block.k_proj, x))
    assert len(fake_kernels.prepared) == 3, "the second call of one layer is another forward"
    with torch.inference_mode():
        y = x.clone()
        assert torch.equal(block.v_proj(y), fake_kernels.reference(block.v_proj, y))


def test_layers_on_different_inputs_are_computed_one_by_one():
    """Cross-attention has the names of self-attention."""
    block = Attention()
    use_kernels(block, SOURCE)
    x, other = inputs(block.q_proj), inputs(block.q_proj) * 2
    for _ in range(2):
        fake_kernels.prepared.clear()
        for layer, its in ((block.q_proj, x), (block.k_proj, other), (block.v_proj, other)):
            assert torch.equal(layer(its), fake_kernels.reference(layer, its))
        assert len(fake_kernels.prepared) == 3
    assert block.q_proj._shared._held is None


def test_an_interrupted_call_does_not_part_the_layers():
    block = Attention()
    use_kernels(block, SOURCE)
    x = inputs(block.q_proj)
    expected = block(x)
    block.q_proj(inputs(block.q_proj) * 2)  # and then, say, no memory was left
    fake_kernels.prepared.clear()
    assert torch.equal(block(x), expected) and len(fake_kernels.prepared) == 2


def test_a_layer_that_is_never_called_is_not_computed_for_long():
    """Blocks that take keys and values from another one have layers for them all the same."""
    block = Attention()
    use_kernels(block, SOURCE)
    x = inputs(block.q_proj)
    for _ in range(4):
        assert torch.equal(block.q_proj(x), fake_kernels.reference(block.q_proj, x))
    assert block.q_proj._shared._held is None and not block.q_proj._shared._together


def test_a_layer_that_moved_away_is_left_to_itself():
    block = Attention()
    use_kernels(block, SOURCE)
    x = inputs(block.q_proj)
    expected = block(x)
    block.k_proj.use_kernels(None)
    assert torch.equal(block(x), expected)
    block.k_proj.use_kernels(SOURCE)
    fake_kernels.prepared.clear()
    assert torch.equal(block(x), expected) and len(fake_kernels.prepared) == 2


@pytest.mark.parametrize("change", ["input_global_scale", "hadamard_size", "activation_scale_rule"])
def test_layers_that_differ_share_nothing(change):
    block = Attention()
    other = {
        "input_global_scale": block.k_proj.input_global_scale * 2,
        "hadamard_size": 32,
        "activation_scale_rule": "absmax",
    }
    setattr(block.k_proj, change, other[change])
    x = inputs(block.q_proj)
    expected = block(x)
    use_kernels(block, SOURCE)
    assert torch.equal(block(x), expected)
    assert len(fake_kernels.prepared) == 3
    assert block.k_proj._shared is None and block.q_proj._shared is block.v_proj._shared is not None


def test_compiled_without_a_graph_break_it_still_prepares_once():
    block = Attention()
    use_kernels(block, SOURCE)
    x = inputs(block.q_proj)
    with torch.no_grad():
        expected = block(x)
        torch._dynamo.reset()
        compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
        compiled(x)
        fake_kernels.prepared.clear()
        assert torch.equal(compiled(x), expected)
        assert len(fake_kernels.prepared) == 2


# --- models


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A tiny quantized model, saved without kernels."""
    directory = tmp_path_factory.mktemp("kernels")
    save_with_tokenizer(directory / "original")
    model = AutoModelForCausalLM.from_pretrained(
        directory / "original", dtype=torch.bfloat16, quantization_config=MRGPTQConfig(method="rtn")
    )
    for layer in model.modules():
        if isinstance(layer, FP4Linear):
            layer.use_kernels(None)
    model.save_pretrained(directory / "quantized")
    return directory / "quantized"


def tensors(directory: Path) -> bytes:
    return (directory / "model.safetensors").read_bytes()


def test_a_checkpoint_runs_on_the_kernels_and_is_saved_as_it_was(checkpoint, tmp_path, kernels_on_the_cpu):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    layers = [m for m in model.modules() if isinstance(m, FP4Linear)]
    assert {layer.kernels.backend for layer in layers} == {"fake"}
    assert kernels_on_the_cpu[0][0] == KernelSource()
    ids = tiny_tokens(seed=0)
    expected = model(ids).logits
    assert {row["hadamard"] for row in fake_kernels.prepared} == {0}
    assert len(fake_kernels.prepared) == 4 * len(model.model.layers), "qkv, o, gate and up, down"
    model.save_pretrained(tmp_path / "again")
    assert tensors(tmp_path / "again") == tensors(checkpoint)
    assert {layer.kernels.backend for layer in layers} == {"fake"}, "a save leaves the layers as they were"
    assert torch.equal(model(ids).logits, expected)


def test_whoever_loads_chooses_the_kernels(checkpoint, kernels_on_the_cpu):
    mine = MRGPTQConfig(kernel_repo="me/mine", kernel_version=2, trust_kernel_repo=True)
    with pytest.warns(UserWarning, match="loading attributes"):
        model = AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=mine)
    assert kernels_on_the_cpu[0][0] == KernelSource("me/mine", 2, True)
    assert model.config.quantization_config.format == "nvfp4"
    assert not {"kernel_repo", "kernel_version", "trust_kernel_repo"} & set(
        model.config.quantization_config.to_dict()
    )


def test_one_format_decides_between_fp8_and_bf16(monkeypatch):
    """MXFP4 weights that E4M3 cannot hold are multiplied in bf16; the layer finds out when it lays out the weight."""
    seen = []
    monkeypatch.setattr(fake_kernels, "linear", lambda x, *args, **arguments: seen.append(arguments["fp8"]))
    for case, exact in ((KINDS[7], True), (KINDS[7], False), (KINDS[5], True), (KINDS[3], True)):
        monkeypatch.setattr(fake_kernels, "fp8_exact", lambda *weight, exact=exact: exact)
        layer = made(case)
        layer.use_kernels(SOURCE)
        layer(inputs(layer))
    assert seen == [True, False, False, False]
    assert KINDS[7].fmt is FP4Format.MXFP4


@pytest.mark.parametrize("activations", ["fp4", "bf16"])
@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
def test_calibration_on_kernels(format, activations, checkpoint, monkeypatch):
    """Kernels rotate, quantize and solve; what differs is that moments are of bfloat16 inputs."""
    original = checkpoint.parent / "original"
    config = MRGPTQConfig(
        format=format,
        activations=activations,
        dataset=list(tiny_tokens(8, 48, seed=3)),
        num_samples=8,
        sequence_length=48,
        batch_size=2,
        hadamard_group_size=None if format == "nvfp4" else "auto",
    )

    def quantized(dtype=torch.bfloat16):
        model = AutoModelForCausalLM.from_pretrained(original, dtype=dtype, quantization_config=config)
        return sum(row.error for row in model.hf_quantizer.report), model

    expected, _ = quantized()
    assert not fake_kernels.fake_quantized and not fake_kernels.solved
    monkeypatch.setattr(group_module, "select", lambda source, device: fake_kernels.found())
    error, model = quantized()
    assert error == pytest.approx(expected, rel=0.03)
    assert set(fake_kernels.fake_quantized) == {activations, "bf16"}
    assert fake_kernels.solved[-3:] == ["search", "solve", "descend"]
    assert model.config.quantization_config.static_input_scale == (format == "nvfp4" and activations == "fp4")
    monkeypatch.setattr(fake_kernels, "fast_dtype", lambda device: torch.float32)
    error, in_float32 = quantized()
    assert error == pytest.approx(expected, rel=0.03), "the same products, added up in another order"
    assert in_float32.dtype == torch.bfloat16
    fake_kernels.fake_quantized.clear()
    quantized(torch.float32)
    assert not fake_kernels.fake_quantized, "kernels take bfloat16; a float32 model is measured in float32"
