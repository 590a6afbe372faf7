"""The Blackwell route. Its kernel compiled for capability 10 and 12; run in Triton's interpreter, or on a GPU that is there.

On another GPU than a Blackwell one Triton multiplies mxfp4 in bf16. Its interpreter has no `dot_scaled`, or one that takes
every scale for E8M0: `dequantized_dot` stands in.
"""

import contextlib
import importlib
import json
import os
import subprocess
import sys

import pytest
import reference as ref
import torch
from problems import MODES, Mode, Shape

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

tl = pytest.importorskip("triton.language", reason="needs triton")

from blackwell_compile import load_source
from test_linear import check

pytestmark = pytest.mark.filterwarnings("ignore")

FP4_MODES = [mode for mode in MODES if mode.activations == "fp4"]
# Every token tile and its tails; tails of N and K; rows of scales that 16, 8, 4, 2 and 1 divide.
SMALL_SHAPES = [
    Shape(1, 256, 256),
    Shape(3, 208, 384),
    Shape(5, 16, 32),
    Shape(16, 144, 640),
    Shape(17, 80, 96),
    Shape(65, 144, 1152),
    Shape(129, 272, 512),
]
MMA = {
    (100, "nvfp4"): ("tcgen05.mma.cta_group::1.kind::mxf4nvf4.block_scale.scale_vec::4X", "UTCOMMA.4X"),
    (100, "mxfp4"): ("tcgen05.mma.cta_group::1.kind::mxf4.block_scale.scale_vec::2X", "UTCOMMA"),
    (120, "nvfp4"): (
        "mma.sync.aligned.m16n8k64.row.col.kind::mxf4nvf4.block_scale.scale_vec::4X.f32.e2m1.e2m1.f32.ue4m3",
        "OMMA.SF.16864.F32.E2M1.E2M1.UE4M3.4X",
    ),
    (120, "mxfp4"): (
        "mma.sync.aligned.m16n8k64.row.col.kind::mxf4nvf4.block_scale.scale_vec::2X.f32.e2m1.e2m1.f32.ue8m0",
        "OMMA.SF.16864.F32.E2M1.E2M1.E8",
    ),
}
SHARED_MEMORY = {100: 227 * 1024, 120: 99 * 1024}  # bytes a block may have


@pytest.mark.parametrize("arch", [100, 120])
def test_compiles_to_fp4_instructions(arch, tmp_path):
    """Every tile, the largest also under strides that are no multiple of 16: one kind of product, on packed FP4."""
    import blackwell_compile

    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, blackwell_compile.__file__, str(arch)],
        capture_output=True,
        text=True,
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    cases = json.loads(result.stdout)
    tiles = {(case["tokens"], case["format"]) for case in cases}
    assert len(tiles) == (4 if arch == 100 else 6)
    for case in cases:
        ptx, sass = MMA[arch, case["format"]]
        assert case["ptx"] == [ptx], case
        assert case["sass"] == [sass], case
        assert case["copies"] and not case["spills"], case
        assert case["shared"] <= SHARED_MEMORY[arch], case


def dequantized_dot(lhs, lhs_scale, lhs_format, rhs, rhs_scale, rhs_format, acc):
    """`tl.dot_scaled` by its documentation, for interpreted tensors: lhs [M, K/2], rhs [K/2, N], scales [M or N, K/group]."""
    assert lhs_format == rhs_format == "e2m1"

    def values(codes, scale):
        codes, bytes_ = (torch.from_numpy(each.copy()) for each in (codes, scale.handle.data))
        assert codes.dtype == bytes_.dtype == torch.uint8
        if scale.dtype == tl.float8e4nv:
            return ref.weight_values(codes, bytes_.view(torch.float8_e4m3fn), torch.ones(1))
        assert scale.dtype == tl.uint8
        return ref.weight_values(codes, bytes_, None)

    product = values(lhs.handle.data, lhs_scale) @ values(rhs.handle.data.T, rhs_scale).T
    total = acc.handle.data + product.float().numpy()
    return tl.tensor(type(acc.handle)(total, acc.handle.dtype), acc.type)


def interpret_loop_bounds(monkeypatch):
    """Triton 3.6's interpreter makes a loop bound by int() of an array of one element, which NumPy 2.4 refuses."""
    interpreter = importlib.import_module("triton.runtime.interpreter")
    patch = interpreter._patch_lang_tensor

    def patch_and_mend(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_and_mend)


class Route:
    """The package as it runs on a GPU of some compute capability."""

    def __init__(self, monkeypatch):
        self._monkeypatch = monkeypatch
        if DEVICE == "cpu":
            monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
            monkeypatch.setattr(tl, "dot_scaled", dequantized_dot)
            interpret_loop_bounds(monkeypatch)

    def on(self, major, minor=0):
        self._monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (major, minor))
        return load_source()


@pytest.fixture
def route(monkeypatch):
    return Route(monkeypatch)


def native_or_skip(format):
    if DEVICE == "cuda" and format == "nvfp4" and torch.cuda.get_device_capability()[0] < 10:
        pytest.skip("Triton has no product of nvfp4 for this GPU")


def make(shape, mode, spread=3):
    torch.manual_seed(shape.m * 7 + shape.k)
    dtype = getattr(torch, mode.dtype)
    x = torch.randn(shape.m, shape.k) * torch.rand(shape.m, 1).mul(3).exp2()
    weight = [
        None if t is None else t.to(DEVICE)
        for t in ref.random_weight(shape.n, shape.k, mode.format, "cpu", spread)
    ]
    bias = torch.randn(shape.n).to(DEVICE, dtype)
    g = torch.tensor([64.0], device=DEVICE) if mode.format == "nvfp4" and mode.static else None
    return x.to(DEVICE, dtype), weight, bias, g


def call(kernels, x, prepared, bias, mode, g):
    return kernels.linear(
        x, *prepared, bias, activations=mode.activations, hadamard=mode.hadamard, rule=mode.rule,
        input_global_scale=g, fp8=mode.fp8,
    )  # fmt: skip


@pytest.mark.parametrize("major", [10, 12])
@pytest.mark.parametrize("mode", FP4_MODES, ids=lambda m: m.id)
@pytest.mark.parametrize("shape", SMALL_SHAPES, ids=lambda s: s.id)
def test_linear(route, shape, mode, major):
    native_or_skip(mode.format)
    if shape.k % (mode.hadamard or 32):
        pytest.skip("the rotation does not divide K")
    if major == 12 and shape.m > 16:
        pytest.skip("the tile of capability 10")
    kernels = route.on(major)
    x, weight, bias, g = make(shape, mode)
    if shape.m % 2:
        bias = None
    y = call(kernels, x, kernels.prepare_weight(*weight), bias, mode, g)
    assert y.shape == (shape.m, shape.n) and y.dtype == x.dtype
    check(y, x, weight, bias, mode, g)


def test_k_of_one_nvfp4_group(route):
    """K a multiple of 16 alone: rows of codes that 8 divides, one scale a row."""
    native_or_skip("nvfp4")
    kernels = route.on(10)
    mode = Mode("nvfp4", "fp4", 16)
    for k in (16, 48, 272):
        x, weight, bias, g = make(Shape(3, 32, k), mode)
        check(call(kernels, x, kernels.prepare_weight(*weight), bias, mode, g), x, weight, bias, mode, g)


@pytest.mark.skipif(DEVICE != "cpu", reason="looks at the interpreter's loads")
@pytest.mark.parametrize("mode", [FP4_MODES[2], FP4_MODES[4]], ids=lambda m: m.id)
@pytest.mark.parametrize(
    "shape", [Shape(1, 16, 32), Shape(5, 80, 320), Shape(66, 144, 96)], ids=lambda s: s.id
)
def test_loads_stay_inside(route, monkeypatch, shape, mode):
    """Of the values behind an end nothing would show: they are multiplied by zero, or not stored."""
    kernels = route.on(10)
    x, weight, bias, g = make(shape, mode)
    prepared = kernels.prepare_weight(*weight)
    codes, scales, token_scale = kernels.rotate_quantize(
        x, format=mode.format, rule=mode.rule, input_global_scale=g
    )
    builder = importlib.import_module("triton.runtime.interpreter").InterpreterBuilder
    load = builder.create_masked_load
    loaded = set()

    def recording_load(self, pointers, mask, *rest):
        loaded.update(pointers.data[mask.data].tolist())
        return load(self, pointers, mask, *rest)

    monkeypatch.setattr(builder, "create_masked_load", recording_load)
    tensors = (codes, scales, token_scale, *prepared, bias)
    kernels._blackwell.ops_gemm(*tensors, True)
    inside = set()
    for tensor in tensors:
        start, size = tensor.data_ptr(), tensor.element_size()
        inside.update(range(start, start + tensor.numel() * size, size))
    unread = {*range(prepared[1].data_ptr(), prepared[1].data_ptr() + 4 * shape.n, 4), token_scale.data_ptr()}
    assert loaded == (inside if mode.format == "nvfp4" else inside - unread)


@pytest.mark.parametrize("mode", [FP4_MODES[1], FP4_MODES[4]], ids=lambda m: m.id)
def test_every_weight_scale(route, mode):
    """Zero, subnormal and largest E4M3; E8M0 from 2^-127 up, where a row's largest is nothing like its others."""
    native_or_skip(mode.format)
    kernels = route.on(10)
    x, weight, _, g = make(Shape(6, 128, 512), mode)
    if mode.format == "nvfp4":
        scales = torch.arange(128 * 32, dtype=torch.int32).remainder(0x7F).view(128, 32).to(torch.uint8)
        weight[1] = scales.to(DEVICE).view(torch.float8_e4m3fn)
    else:
        weight[1] = torch.randint(0, 130, (128, 16), dtype=torch.uint8).to(DEVICE)
    check(call(kernels, x, kernels.prepare_weight(*weight), None, mode, g), x, weight, None, mode, g)


@pytest.mark.parametrize("mode", [FP4_MODES[3], FP4_MODES[4]], ids=lambda m: m.id)
def test_rows_are_independent(route, mode):
    native_or_skip(mode.format)
    kernels = route.on(10)
    x, weight, bias, g = make(Shape(5, 48, 128), mode)
    prepared = kernels.prepare_weight(*weight)
    y = call(kernels, x, prepared, bias, mode, g)
    other = torch.randn_like(x) * 100
    other[1] = x[1]
    assert torch.equal(call(kernels, other, prepared, bias, mode, g)[1], y[1])
    assert call(kernels, x[:0], prepared, bias, mode, g).shape == (0, 48)
    assert torch.equal(call(kernels, torch.zeros_like(x), prepared, bias, mode, g), bias.expand(5, -1))


@pytest.mark.parametrize("mode", [FP4_MODES[0], FP4_MODES[4]], ids=lambda m: m.id)
def test_shared_and_traced_activation(route, mode):
    """Prepared once for several linears, and through the ops' fakes: what `linear` gives."""
    native_or_skip(mode.format)
    kernels = route.on(10)
    x, weight, bias, g = make(Shape(6, 80, 256), mode)
    prepared = kernels.prepare_weight(*weight)
    y = call(kernels, x, prepared, bias, mode, g)
    tokens = kernels.prepare_activation(
        x.view(2, 3, 256), format=mode.format, hadamard=mode.hadamard, rule=mode.rule, input_global_scale=g
    )
    assert (tokens.backend, tokens.operand) == ("blackwell", "fp4")
    assert torch.equal(kernels.gemm(tokens, *prepared, bias), y.view(2, 3, 80))
    torch.library.opcheck(
        kernels._blackwell.ops_gemm,
        (tokens.tokens, tokens.block_scale, tokens.token_scale, *prepared, bias, True),
        test_utils="test_faketensor",
    )
    traced = torch.compile(
        lambda x: call(kernels, x, prepared, bias, mode, g), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(traced(x), y)


@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
def test_weight_is_shared_with_triton(route, format):
    """The stored bytes come back; W4A16 is the Triton kernels' to the bit."""
    mode = Mode(format, "bf16", 32, dtype="float16")  # the interpreter takes bf16's bits for integers
    x, weight, bias, _ = make(Shape(3, 48, 128), mode)
    kernels = route.on(10)
    prepared = kernels.prepare_weight(*weight)
    codes, scales = kernels.restore_weight(*prepared, 48, 128)
    assert torch.equal(codes, weight[0]) and torch.equal(
        scales.view(torch.uint8), weight[1].view(torch.uint8)
    )
    y = call(kernels, x, prepared, bias, mode, None)
    check(y, x, weight, bias, mode, None)
    kernels = route.on(8)
    assert all(torch.equal(a, b) for a, b in zip(kernels.prepare_weight(*weight), prepared, strict=True))
    assert torch.equal(call(kernels, x, prepared, bias, mode, None), y)


@pytest.mark.parametrize(
    "capability, backend",
    [
        ((8, 0), "triton"), ((8, 6), "triton"), ((8, 9), "triton"), ((9, 0), "cuda"), ((10, 0), "blackwell"),
        ((10, 3), "blackwell"), ((11, 0), "triton"), ((12, 0), "blackwell"), ((12, 1), "triton"), ((13, 0), "triton"),
    ],
)  # fmt: skip
def test_selection(route, monkeypatch, capability, backend):
    kernels = route.on(*capability)
    monkeypatch.setattr(kernels._backends, "_FP4_TENSOR_CORES", True)
    for compiled in (True, False):
        monkeypatch.setattr(kernels._backends, "is_compiled", lambda compiled=compiled: compiled)
        assert kernels.backend_of() == (backend if compiled or backend != "cuda" else "triton")
    monkeypatch.setattr(kernels._backends, "_FP4_TENSOR_CORES", False)  # an older torch
    assert kernels.backend_of() == "triton"


def test_too_old_a_gpu_is_refused(route):
    with pytest.raises(RuntimeError, match=r"needs compute capability 8.0 or newer, this GPU has 7.5"):
        route.on(7, 5).backend_of()
