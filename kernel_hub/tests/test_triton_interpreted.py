"""The Triton kernels of the linears in Triton's interpreter. On a GPU `test_linear.py` runs them compiled."""

import contextlib
import importlib

import pytest
import reference as ref
import torch
from problems import MODES, Shape

if torch.cuda.is_available():
    pytest.skip("a GPU runs these compiled: test_linear.py", allow_module_level=True)
tl = pytest.importorskip("triton.language", reason="needs triton")

from blackwell_compile import load_source
from test_blackwell import interpret_loop_bounds
from test_linear import check, check_fake_quantize

pytestmark = pytest.mark.filterwarnings("ignore")

# One token and few; a tail of N; two steps over K with a tail.
SHAPES = [Shape(1, 64, 128), Shape(5, 80, 384)]
QUANTIZE = [
    ("nvfp4", "absmax"),
    ("nvfp4", "four_over_six"),
    ("nvfp4", "mse"),
    ("mxfp4", "absmax"),
    ("mxfp4", "mse"),
]


def interpret_bf16_products(monkeypatch):
    """Triton 3.6's interpreter keeps bf16 as 16-bit integers, and multiplies those. Here their values are multiplied."""
    interpreter = importlib.import_module("triton.runtime.interpreter")
    builder = interpreter.InterpreterBuilder
    create_dot = builder.create_dot

    def value(operand):
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        bits = torch.from_numpy(operand.data.view("int16").copy())
        return interpreter.TensorHandle(bits.view(torch.bfloat16).float().numpy(), tl.float32)

    monkeypatch.setattr(
        builder, "create_dot", lambda self, a, b, *rest: create_dot(self, value(a), value(b), *rest)
    )


@pytest.fixture
def kernels(monkeypatch):
    """The public functions, as on a GPU of compute capability 8.0."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    interpret_loop_bounds(monkeypatch)
    interpret_bf16_products(monkeypatch)
    return load_source()


def tokens_for(m, k, dtype):
    torch.manual_seed(m + k)
    return (torch.randn(m, k) * torch.rand(m, 1).mul(3).exp2()).to(dtype)


@pytest.mark.parametrize("mode", MODES, ids=lambda m: m.id)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.id)
def test_linear(kernels, shape, mode):
    dtype = getattr(torch, mode.dtype)
    x = tokens_for(shape.m, shape.k, dtype)
    weight = ref.random_weight(shape.n, shape.k, mode.format, "cpu")
    bias = torch.randn(shape.n).to(dtype) if shape.m > 1 else None
    static = mode.format == "nvfp4" and mode.activations == "fp4" and mode.static
    g = torch.tensor([64.0]) if static else None
    prepared = kernels.prepare_weight(*weight)
    y = kernels.linear(
        x, *prepared, bias, activations=mode.activations, hadamard=mode.hadamard, rule=mode.rule,
        input_global_scale=g, fp8=mode.fp8,
    )  # fmt: skip
    assert y.shape == (shape.m, shape.n) and y.dtype == dtype
    check(y, x, weight, bias, mode, g)


@pytest.mark.parametrize("mode", MODES, ids=lambda m: m.id)
def test_linear_of_many_tokens(kernels, mode, monkeypatch):
    """A product of floats stands in for the library's, which exists on GPUs only."""
    monkeypatch.setattr(kernels._triton, "_LIBRARY_TOKENS", 1)
    monkeypatch.setattr(torch, "mm", lambda a, b, out_dtype: a.to(out_dtype) @ b.to(out_dtype))
    test_linear(kernels, SHAPES[1], mode)


@pytest.mark.parametrize("hadamard", [None, 32])
@pytest.mark.parametrize(("format", "rule"), QUANTIZE)
def test_rotate_quantize(kernels, format, rule, hadamard):
    x = tokens_for(3, 256, torch.bfloat16)
    g = torch.tensor([128.0]) if format == "nvfp4" else None
    codes, scales, _ = kernels.rotate_quantize(
        x, format=format, hadamard=hadamard, rule=rule, input_global_scale=g
    )
    rotated = ref.rotate(x, hadamard)
    if format == "nvfp4":
        want, scale = ref.quantize_nvfp4(rotated, g, rule)
        same_scale = scales.float() == scale
    else:
        want, exponent = ref.quantize_mxfp4(rotated, rule)
        same_scale = scales.int() - 127 == exponent
    # FP32 butterflies and the FP64 reference may fall on two sides of a tie; unrotated values may not.
    allowed = 0 if hadamard is None else 1e-3
    assert (ref.unpack(codes) != want).double().mean().item() <= allowed
    assert (~same_scale).double().mean().item() <= allowed


@pytest.mark.parametrize("mode", MODES, ids=lambda m: m.id)
def test_fake_quantize(kernels, mode):
    x = tokens_for(3, 256, getattr(torch, mode.dtype))
    static = mode.format == "nvfp4" and mode.activations == "fp4" and mode.static
    check_fake_quantize(kernels, x, mode, torch.tensor([64.0]) if static else None)


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
def test_fakes_agree_with_the_kernels(kernels, format, static):
    """Shapes and dtypes that torch.compile goes by, per op."""
    triton_ops = kernels._triton
    x = tokens_for(3, 128, torch.bfloat16)
    g = torch.tensor([64.0]) if format == "nvfp4" and static else None
    number = kernels._cuda.FORMATS[format]
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(triton_ops.ops_rotate_quantize, (x, g, number, 16, 0), test_utils=tests)
    for quantize in (True, False):
        arguments = (x, g, number, quantize, 16, 0)
        torch.library.opcheck(triton_ops.ops_prepare_activation, arguments, test_utils=tests)
        tokens, token_scale = triton_ops.ops_prepare_activation(*arguments)
        prepared = kernels.prepare_weight(*ref.random_weight(32, 128, format, "cpu"))
        torch.library.opcheck(
            triton_ops.ops_gemm, (tokens, token_scale, *prepared, None, True), test_utils=tests
        )


@pytest.mark.parametrize("gather", [True, False])
@pytest.mark.parametrize("mode", MODES, ids=lambda m: m.id)
def test_grouped_linear(kernels, mode, gather):
    """Experts without rows, with one, with more than a block; tokens that several experts get; rows of none."""
    dtype = getattr(torch, mode.dtype)
    counts, k, n = [0, 1, 18, 0, 3], 256, 80
    offsets = torch.tensor([0, *counts]).cumsum(0)
    total = int(offsets[-1]) + 2
    index = torch.arange(total) % 9 if gather else None
    x = tokens_for(9 if gather else total, k, dtype)
    weights = [ref.random_weight(n, k, mode.format, "cpu") for _ in counts]
    bias = torch.randn(len(counts), n).to(dtype)
    static = mode.format == "nvfp4" and mode.activations == "fp4" and mode.static
    g = torch.tensor([64.0]) if static else None
    stacked = [torch.stack([weight[i] for weight in weights]) for i in range(2)]
    scales = torch.cat([weight[2] for weight in weights]) if mode.format == "nvfp4" else None
    prepared = kernels.prepare_experts(*stacked, scales)
    y = kernels.grouped_linear(
        x, offsets, *prepared, bias, index=index, activations=mode.activations, hadamard=mode.hadamard,
        rule=mode.rule, input_global_scale=g,
    )  # fmt: skip
    assert y.shape == (total, n) and y.dtype == dtype and y[-2:].eq(0).all()
    rows = x if index is None else x[index]
    for expert, (start, count) in enumerate(zip(offsets.tolist(), counts, strict=False)):
        if count:
            mine = slice(start, start + count)
            check(y[mine], rows[mine], weights[expert], bias[expert], mode, g)


def test_grouped_linear_of_no_rows(kernels):
    weights = [ref.random_weight(32, 128, "mxfp4", "cpu") for _ in range(2)]
    prepared = kernels.prepare_experts(*(torch.stack([weight[i] for weight in weights]) for i in range(2)))
    x, none = torch.zeros(0, 128, dtype=torch.bfloat16), torch.zeros(3, dtype=torch.int64)
    assert kernels.grouped_linear(x, none, *prepared).shape == (0, 32)
    with pytest.raises(ValueError, match=r"offsets must be \[3\] for 2 experts, got \[2\]"):
        kernels.grouped_linear(x, none[:2], *prepared)
