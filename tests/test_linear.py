"""`FP4Linear` on the reference backend against float64 and against eager PyTorch on the same operands."""

import copy
import gc
import itertools
from dataclasses import dataclass

import pytest
import spec
import torch
from tolerances import FLOOR, assert_as_good_as_eager, relative_error
from torch.nn.functional import linear

from hf_fp4 import ops
from hf_fp4.formats import FP4Format
from hf_fp4.gptq import round_weight
from hf_fp4.layers.linear import FP4Linear
from hf_fp4.rotation import rotate
from hf_fp4.scales import fake_quantize_activations, input_global_scale, weight_global_scale, weight_scales

pytestmark = pytest.mark.once

NVFP4, MXFP4 = FP4Format
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@dataclass(frozen=True)
class Case:
    """A layer; ``rule`` None is W4A16, ``static`` False takes the input's global scale per token."""

    fmt: FP4Format
    rule: str | None
    static: bool = False
    size: int | None = 16
    in_features: int = 384
    out_features: int = 75

    def __str__(self):
        kind = "w4a16" if self.rule is None else f"w4a4-{self.rule}{'-static' if self.static else ''}"
        return f"{self.fmt.value}-{kind}-h{self.size or 0}"


KINDS = [
    Case(NVFP4, None),
    Case(NVFP4, "absmax", static=True),
    Case(NVFP4, "absmax"),
    Case(NVFP4, "four_over_six", static=True),
    Case(NVFP4, "four_over_six"),
    Case(MXFP4, None),
    Case(MXFP4, "absmax"),
    Case(MXFP4, "mse"),
]
CASES = [
    Case(kind.fmt, kind.rule, kind.static, size)
    for kind, size in itertools.product(KINDS, (None, 16, 32, 64, 128))
]
W4A4 = [case for case in CASES if case.rule]


class Made:
    """An `FP4Linear`, inputs for it, and its weight in float64 (rotated, as stored)."""

    def __init__(self, case, *, bias=False, dtype=torch.float32, shape=(6,), magnitude=1.0):
        self.case, self.dtype = case, dtype
        original = torch.randn(case.out_features, case.in_features) * 0.05
        weight = rotate(original, case.size)
        global_scale = weight_global_scale(weight.abs().amax().view(1)) if case.fmt is NVFP4 else None
        scale = weight_scales(weight, case.fmt, "mse", global_scale)
        stored = round_weight(weight, scale, case.fmt, global_scale)
        self.x = torch.randn(*shape, case.in_features) * magnitude
        self.x[..., 7] *= 20
        self.x = self.x.to(dtype)
        self.bias = torch.randn(case.out_features).to(dtype) * magnitude if bias else None
        rotated = rotate(self.x, case.size)
        self.input_global_scale = input_global_scale(rotated.abs().amax().view(1)) if case.static else None
        self.layer = FP4Linear(
            case.in_features,
            case.out_features,
            case.fmt,
            bias=bias,
            hadamard_size=case.size,
            activation_scale_rule=case.rule,
            static_input_scale=case.static,
            dtype=dtype,
        )
        self.layer.set_weight(stored, self.bias, self.input_global_scale)
        divisor = 1.0 if global_scale is None else global_scale.item()
        values = spec.dequantize(
            case.fmt.value, stored.packed.numpy(), scale.view(torch.uint8).numpy(), divisor
        )
        self.weight = torch.from_numpy(values)

    def inputs(self, *, quantized):
        """What the matrix product sees, in float64: rotated, and quantized."""
        if not quantized:
            return torch.from_numpy(spec.rotate(self.x.double().numpy(), self.case.size))
        rotated = rotate(self.x, self.case.size)
        values, divisor = fake_quantize_activations(
            rotated, self.case.fmt, self.case.rule, self.input_global_scale
        )
        return values.double() / (1.0 if divisor is None else divisor.double())

    def expected(self, *, quantized):
        bias = None if self.bias is None else self.bias.double()
        return linear(self.inputs(quantized=quantized), self.weight, bias)

    def eager(self):
        """What PyTorch gets in the tested dtype, from operands that stand for the same numbers."""
        if self.case.rule is None:
            return linear(self.x, self.layer.dequantize(self.dtype), self.bias)
        return linear(self.inputs(quantized=True).to(self.dtype), self.weight.to(self.dtype), self.bias)


# Values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(case, dtype):
    for bias, shape in ((False, (6,)), (True, (2, 5)), (False, (1,)), (True, ())):
        made = Made(case, bias=bias, dtype=dtype, shape=shape)
        actual = made.layer(made.x)
        assert actual.shape == (*shape, case.out_features)
        assert_as_good_as_eager(actual, made.eager(), made.expected(quantized=case.rule is not None))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", W4A4, ids=str)
def test_the_activations_are_quantized(case, dtype):
    """Otherwise a W4A4 layer that never quantizes its input would pass within a loose tolerance."""
    made = Made(case, dtype=dtype, shape=(16,))
    actual = made.layer(made.x)
    to_quantized = relative_error(actual, made.expected(quantized=True))
    to_unquantized = relative_error(actual, made.expected(quantized=False))
    assert to_quantized < 0.1 * to_unquantized


@pytest.mark.parametrize("case", KINDS, ids=str)
def test_outputs_that_float16_can_hold_do_not_overflow(case):
    made = Made(case, dtype=torch.float16, magnitude=1500.0, bias=True)
    expected = made.expected(quantized=case.rule is not None)
    assert 4000 < expected.abs().max() < 60000
    assert_as_good_as_eager(made.layer(made.x), made.eager(), expected)


@pytest.mark.parametrize("case", KINDS, ids=str)
def test_a_token_does_not_depend_on_the_others(case):
    made = Made(case, shape=(9,))
    made.x[4] *= 100
    together = made.layer(made.x)
    for i in range(9):
        assert relative_error(made.layer(made.x[i : i + 1])[0], together[i]) <= FLOOR[torch.float32]


@pytest.mark.parametrize("case", KINDS, ids=str)
def test_no_tokens(case):
    made = Made(case)
    assert made.layer(made.x[:0]).shape == (0, case.out_features)


@pytest.mark.parametrize("case", KINDS, ids=str)
def test_zeros_give_the_bias(case):
    made = Made(case, bias=True)
    made.x[1] = 0
    actual = made.layer(made.x)
    assert torch.equal(actual[1], made.bias) and actual.isfinite().all()


def test_a_global_scale_that_is_no_power_of_two():
    """Other quantizers write such divisors."""
    for dtype in DTYPES:
        made = Made(Case(NVFP4, "absmax", static=True), dtype=dtype)
        before = made.layer.weight_global_scale
        made.layer.weight_global_scale = before * 0.77
        made.weight = made.weight * (before.double() / made.layer.weight_global_scale.double())
        made.layer.input_global_scale = made.input_global_scale = made.input_global_scale * 0.9
        assert_as_good_as_eager(made.layer(made.x), made.eager(), made.expected(quantized=True))


@pytest.mark.parametrize(
    "case", [Case(fmt, None, size=size) for fmt in FP4Format for size in (None, 16, 128)], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantize_rotates_back(case, dtype):
    made = Made(case)
    actual = made.layer.dequantize(dtype)
    expected = spec.rotate(made.weight.numpy(), case.size)
    assert actual.dtype == dtype
    assert relative_error(actual, torch.from_numpy(expected)) <= FLOOR[dtype] + torch.finfo(dtype).eps


# What is stored


@pytest.mark.parametrize("case", KINDS, ids=str)
def test_buffers_and_their_bytes(case):
    made = Made(case, bias=True, dtype=torch.bfloat16)
    made.layer(made.x)
    rows, columns, group = case.out_features, case.in_features, case.fmt.group_size
    expected = {
        "weight": (torch.uint8, (rows, columns // 2)),
        "weight_scale": (case.fmt.scale_dtype, (rows, columns // group)),
        "bias": (torch.bfloat16, (rows,)),
    }
    if case.fmt is NVFP4:
        expected["weight_global_scale"] = (torch.float32, (1,))
    if case.static:
        expected["input_global_scale"] = (torch.float32, (1,))
    state = made.layer.state_dict()
    assert {name: (t.dtype, tuple(t.shape)) for name, t in state.items()} == expected
    assert set(made.layer.global_scales) == {name for name in expected if "global" in name}
    assert [name for name, _ in made.layer.named_parameters()] == ["bias"]


@pytest.mark.parametrize("case", KINDS, ids=str)
def test_a_new_layer_takes_the_state(case):
    made = Made(case, bias=True)
    fresh = FP4Linear(
        case.in_features,
        case.out_features,
        case.fmt,
        bias=True,
        hadamard_size=case.size,
        activation_scale_rule=case.rule,
        static_input_scale=case.static,
    )
    fresh.load_state_dict(made.layer.state_dict())
    fresh.check("layer")
    assert torch.equal(fresh(made.x), made.layer(made.x))


def test_the_state_is_not_cast():
    """`model.to(torch.bfloat16)` moves the bias to bfloat16; scales are stored numbers and stay what they are."""
    made = Made(Case(NVFP4, "absmax", static=True), bias=True)
    before = made.layer.state_dict()
    expected = made.layer(made.x)
    for cast in (made.layer.to(torch.bfloat16), made.layer.half(), made.layer.float()):
        for name, tensor in cast.state_dict().items():
            if name != "bias":
                assert tensor.dtype == before[name].dtype, name
                assert torch.equal(tensor.view(torch.uint8), before[name].view(torch.uint8)), name
    made.layer.bias = torch.nn.Parameter(made.bias, requires_grad=False)
    assert torch.equal(made.layer(made.x), expected)


@pytest.mark.parametrize("gradients", [False, True])
def test_the_weight_stays_packed(gradients):
    """A forward leaves nothing of the unpacked weight's size, neither in the layer nor in the autograd graph."""
    case = Case(NVFP4, None, size=None, in_features=416, out_features=1031)
    made = Made(case, bias=True)
    x = made.x.requires_grad_(gradients)
    elements = case.in_features * case.out_features
    before = {id(t) for t in gc.get_objects() if type(t) is torch.Tensor}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        y = made.layer(x)
    gc.collect()
    new = [t for t in gc.get_objects() if type(t) is torch.Tensor and id(t) not in before]
    assert y.isfinite().all() and max(t.numel() for t in new) < elements
    assert max(saved, default=0) < elements
    stored = [*made.layer.parameters(), *made.layer.buffers()]
    assert sum(t.nbytes for t in stored) == elements // 2 + elements // 16 + 4 + 4 * case.out_features
    attributes = [value for value in vars(made.layer).values() if isinstance(value, torch.Tensor)]
    assert not attributes


@pytest.mark.parametrize("case", KINDS, ids=str)
def test_deepcopy(case):
    made = Made(case, bias=True)
    expected = made.layer(made.x)
    twin = copy.deepcopy(made.layer)
    assert torch.equal(twin(made.x), expected)
    twin.weight.zero_()
    assert torch.equal(made.layer(made.x), expected)


def test_repr_says_what_it_is():
    text = repr(Made(Case(NVFP4, "absmax", size=32), bias=True).layer)
    for part in ("in_features=384", "out_features=75", "bias=True", "nvfp4", "W4A4", "hadamard=32"):
        assert part in text
    assert "mxfp4, W4A16, hadamard=None" in repr(Made(Case(MXFP4, None, size=None)).layer)


# Refusals


@pytest.mark.parametrize("fmt, group", [(NVFP4, 16), (MXFP4, 32)])
def test_in_features_must_be_whole_groups(fmt, group):
    message = f"in_features must be a multiple of {group} for {fmt.value}, got 1000"
    with pytest.raises(ValueError, match=message):
        FP4Linear(1000, 8, fmt)


def test_uninitialised_scales_are_refused():
    """The suite's poisoned `torch.empty` at work: a buffer that nothing loaded must not look like a scale."""
    for fmt in FP4Format:
        layer = FP4Linear(64, 8, fmt)
        assert fmt.decode_scale(layer.weight_scale).isnan().all() and (layer.weight == 255).all()
        with pytest.raises(ValueError, match="model.fc.weight_scale holds .* zero, negative or NaN scales"):
            layer.check("model.fc")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_good_layer_passes(case):
    Made(case, bias=True).layer.check("model.fc")


@pytest.mark.parametrize("fmt, byte", [(NVFP4, 0), (NVFP4, 0x7F), (NVFP4, 0xFF), (NVFP4, 0xB8), (MXFP4, 255)])
def test_bad_block_scales_are_refused(fmt, byte):
    layer = Made(Case(fmt, None)).layer
    layer.weight_scale.view(torch.uint8)[3, 5] = byte
    message = (
        r"model.fc.weight_scale holds 1 zero, negative or NaN scales, the first at \[3, 5\]; the checkpoint"
    )
    with pytest.raises(ValueError, match=message):
        layer.check("model.fc")


def test_every_positive_finite_block_scale_is_accepted():
    for fmt, codes in ((NVFP4, torch.arange(1, 0x7F)), (MXFP4, torch.arange(0, 255))):
        layer = Made(Case(fmt, None, in_features=32 * 255, out_features=1)).layer
        layer.weight_scale.view(torch.uint8)[0, : len(codes)] = codes.to(torch.uint8)
        layer.check("model.fc")


@pytest.mark.parametrize("fmt", FP4Format)
def test_misshapen_block_scales_are_refused(fmt):
    layer = Made(Case(fmt, None)).layer
    good = layer.weight_scale
    groups = 384 // fmt.group_size
    wrong = [good[:, :-1], good[:-1], good.flatten(), good.view(torch.int8)]
    for scale in wrong:
        layer.weight_scale = scale
        expected = rf"model.fc.weight_scale must be {fmt.scale_dtype} \[75, {groups}\] .* got {scale.dtype}"
        with pytest.raises(ValueError, match=expected):
            layer.check("model.fc")


@pytest.mark.parametrize("buffer", ["weight_global_scale", "input_global_scale"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_global_scales_are_refused(buffer, value):
    layer = Made(Case(NVFP4, "absmax", static=True)).layer
    setattr(layer, buffer, torch.tensor([value]))
    with pytest.raises(ValueError, match=f"model.fc.{buffer} must be a positive finite number, got {value}"):
        layer.check("model.fc")


@pytest.mark.parametrize("buffer", ["weight_global_scale", "input_global_scale"])
@pytest.mark.parametrize(
    "value", [torch.ones(2), torch.ones(1, dtype=torch.bfloat16), torch.ones(0)], ids=str
)
def test_misshapen_global_scales_are_refused(buffer, value):
    layer = Made(Case(NVFP4, "absmax", static=True)).layer
    setattr(layer, buffer, value)
    with pytest.raises(ValueError, match=rf"model.fc.{buffer} must be float32 \[1\], got {value.dtype}"):
        layer.check("model.fc")


def test_a_missing_weight_global_scale_is_refused():
    layer = Made(Case(NVFP4, None)).layer
    layer.weight_global_scale = None
    with pytest.raises(ValueError, match="model.fc.weight_global_scale"):
        layer.check("model.fc")


@pytest.mark.parametrize("size", [8, 24, 48, 128, 256])
def test_bad_hadamard_sizes_are_refused(size):
    layer = Made(Case(NVFP4, None, size=None, in_features=192)).layer
    layer.hadamard_size = size
    with pytest.raises(
        ValueError, match=f"Hadamard size of model.fc must be one of .* in_features 192, got {size}"
    ):
        layer.check("model.fc")


# The operator


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", KINDS, ids=str)
def test_gradients_go_straight_through_the_quantization(case, dtype):
    """The gradient of the input is that of a linear with the dequantized weight, so adapters can be trained."""
    made = Made(case, dtype=dtype, shape=(2, 3))
    x = made.x.requires_grad_()
    output = made.layer(x)
    gradient = torch.randn_like(output)
    output.backward(gradient)
    expected = gradient.double() @ torch.from_numpy(spec.rotate(made.weight.numpy(), case.size))
    assert x.grad.dtype == dtype
    assert relative_error(x.grad, expected) <= FLOOR[dtype] + 2 * torch.finfo(dtype).eps


def test_gradients_after_inference_mode():
    """Tables cached in inference mode must not be inference tensors."""
    made = Made(KINDS[1])
    with torch.inference_mode():
        expected = made.layer(made.x)
    made.x.requires_grad_()
    assert torch.equal(made.layer(made.x), expected)


@pytest.mark.parametrize("case", KINDS, ids=str)
def test_compile_without_graph_breaks(case):
    made = Made(case, bias=True)
    compiled = torch.compile(made.layer, fullgraph=True, backend="aot_eager")
    try:
        for count in (6, 1, 3):
            assert torch.equal(compiled(made.x[:count]), made.layer(made.x[:count]))
    finally:
        torch.compiler.reset()


@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "gradients"])
@pytest.mark.parametrize("case", [KINDS[0], KINDS[1], KINDS[7]], ids=str)
def test_opcheck(case, gradients):
    made = Made(case, bias=True, shape=(2, 3))
    layer = made.layer
    arguments = (
        made.x.requires_grad_(gradients),
        layer.weight,
        layer.weight_scale,
        layer.weight_global_scale,
        layer.input_global_scale,
        layer.bias,
        case.fmt.value,
        case.rule,
        case.size or 0,
    )
    checks = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if case.fmt is MXFP4:
        checks.append("test_schema")  # cannot compare float8 tensors
    torch.library.opcheck(torch.ops.hf_fp4.linear.default, arguments, test_utils=checks)


def test_the_fake_implementation_knows_shape_and_dtype():
    for dtype in DTYPES:
        made = Made(KINDS[1], dtype=dtype, shape=(2, 3))
        layer = copy.deepcopy(made.layer).to("meta")
        result = layer(made.x.to("meta"))
        assert result.device.type == "meta" and result.dtype == dtype and result.shape == (2, 3, 75)


def test_the_wrapper_and_the_operator_agree():
    made = Made(KINDS[3], bias=True)
    layer = made.layer
    arguments = (
        made.x,
        layer.weight,
        layer.weight_scale,
        layer.weight_global_scale,
        layer.input_global_scale,
        layer.bias,
        "nvfp4",
        "four_over_six",
        16,
    )
    assert torch.equal(ops.linear(*arguments), layer(made.x))
    assert torch.equal(torch.ops.hf_fp4.linear(*arguments), layer(made.x))
