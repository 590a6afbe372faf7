"""What only the CPU build has: instruction sets, float32, threads. Its ops on the test list: test_linear.py."""

import sys

import pytest
import reference as ref
import torch
from conftest import load_variant, variant_paths
from problems import FLOAT32_MODES, FLOORS, MODES, Shape
from test_linear import call, check, make

pytestmark = pytest.mark.filterwarnings("ignore")

ISAS = ["amx", "avx512_bf16", "avx512", "avx2", "portable"]
# Few tokens and many, with tails of tokens, of K (not a multiple of 64) and of pairs of row blocks.
SHAPES = [Shape(1, 256, 256), Shape(3, 208, 384), Shape(8, 48, 96), Shape(17, 272, 896), Shape(300, 48, 480)]


@pytest.fixture(scope="module")
def kernels():
    if "cpu" not in variant_paths():
        pytest.skip("no cpu variant built; run make in kernel_hub")
    return load_variant(variant_paths()["cpu"])


@pytest.fixture(params=ISAS)
def isa(kernels, request, monkeypatch):
    return use(kernels, request.param, monkeypatch)


def use(kernels, isa, monkeypatch):
    monkeypatch.setenv("HF_FP4_CPU_ISA", isa)
    try:
        kernels.backend_of(torch.device("cpu"))
    except RuntimeError:
        pytest.skip(f"this processor has no {isa}")
    return isa


@pytest.mark.parametrize("mode", MODES + FLOAT32_MODES, ids=lambda m: m.id)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.id)
def test_linear(kernels, isa, shape, mode):
    if shape.k % (mode.hadamard or 32):
        pytest.skip("the rotation does not divide K")
    x, weight, bias, g = make(shape, mode)
    prepared = kernels.prepare_weight(*weight)
    y = call(kernels, x, prepared, bias, mode, g)
    assert y.shape == (shape.m, shape.n) and y.dtype == x.dtype
    check(y, x, weight, bias, mode, g)


@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
@pytest.mark.parametrize("tokens", [1, 16])
def test_every_code_times_every_scale(kernels, isa, format, tokens):
    """Exactly, each by a token that is one in one place: bf16 holds all of them."""
    n, k = 32, 64
    codes = torch.arange(k, dtype=torch.uint8) % 16
    weight = (codes[0::2] | codes[1::2] << 4).repeat(n, 1)
    if format == "nvfp4":
        scale = (torch.arange(n * 4) % 127).to(torch.uint8).view(n, 4).view(torch.float8_e4m3fn)
        stored = weight, scale, torch.ones(1)
    else:
        below = torch.arange(n) * 3  # under the row's largest
        stored = weight, torch.stack([torch.full((n,), 127), 127 - below], 1).to(torch.uint8), None
    exact, prepared = ref.weight_values(*stored), kernels.prepare_weight(*stored)
    ones = torch.eye(k, dtype=torch.bfloat16).split(tokens)
    y = torch.cat([kernels.linear(x, *prepared, activations="bf16") for x in ones])
    assert torch.equal(y.double(), exact.T)


@pytest.mark.parametrize("mode", FLOAT32_MODES, ids=lambda m: m.id)
@pytest.mark.parametrize("m", [1, 40])
def test_float32_is_not_rounded_on_the_way(kernels, isa, mode, m):
    """To the quantized tokens' exact result, where a 16-bit operand would be off by 1e-3."""
    x, weight, bias, g = make(Shape(m, 64, 640), mode)
    y = call(kernels, x, kernels.prepare_weight(*weight), bias, mode, g)
    exact = ref.activation_values(x, mode, g) @ ref.weight_values(*weight).T + bias.double()
    assert ref.relative_error(y, exact) < 2 * FLOORS["float32"]


@pytest.mark.parametrize("mode", MODES + FLOAT32_MODES, ids=lambda m: m.id)
@pytest.mark.parametrize("m", [2, 70])
def test_instruction_sets_agree(kernels, mode, m, monkeypatch):
    """Tokens to the bit; products too where each is one rounding in float32 (AVX2 and AVX-512), else to its last bits."""
    shape = Shape(m, 80, 640)
    x, weight, bias, g = make(shape, mode)
    x, bias = x.float(), bias.float()  # so that the results keep their last bits
    prepared = kernels.prepare_weight(*weight)
    tokens, results = {}, {}
    options = {"hadamard": mode.hadamard, "rule": mode.rule, "input_global_scale": g}
    for isa in ISAS:
        with monkeypatch.context() as patch:
            patch.setenv("HF_FP4_CPU_ISA", isa)
            try:
                tokens[isa] = kernels.fake_quantize(
                    x, format=mode.format, activations=mode.activations, **options
                )
            except RuntimeError:
                continue  # this processor has none
            results[isa] = call(kernels, x, prepared, bias, mode, g)
    for found in tokens.values():
        assert torch.equal(found[0], tokens["portable"][0]) and torch.equal(found[1], tokens["portable"][1])
    for found in results.values():
        assert ref.relative_error(found, results["portable"].double()) < FLOORS["float32"]
    if (
        mode.activations == "bf16" and "avx512" in results
    ):  # the float tokens of this test are not multiplied in bf16
        assert torch.equal(
            results["avx512"], results["avx512_bf16" if "avx512_bf16" in results else "avx512"]
        )


@pytest.mark.parametrize("m", [1, 5, 100])
def test_threads_do_not_change_the_result(kernels, m):
    x, weight, bias, g = make(Shape(m, 1040, 1152), MODES[2])
    prepared = kernels.prepare_weight(*weight)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(call(kernels, x, prepared, bias, MODES[2], g))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
@pytest.mark.parametrize("activations", ["fp4", "bf16"])
def test_nan_stays_in_its_token(kernels, isa, format, activations):
    mode = next(m for m in MODES if (m.format, m.activations) == (format, activations))
    x, weight, bias, g = make(Shape(3, 64, 128), mode)
    x[1, 7] = float("nan")
    y = call(kernels, x, kernels.prepare_weight(*weight), bias, mode, g)
    assert y[1].isnan().all() and torch.isfinite(y[[0, 2]]).all()


def test_fast_dtype_is_bf16_where_a_processor_multiplies_it(kernels, isa):
    fast = isa == "avx512_bf16" or torch.cpu._is_amx_tile_supported()
    assert kernels.fast_dtype(torch.device("cpu")) == (torch.bfloat16 if fast else torch.float32)


def test_an_instruction_set_that_is_not_there_is_refused(kernels, monkeypatch):
    monkeypatch.setenv("HF_FP4_CPU_ISA", "neon")
    with pytest.raises(
        RuntimeError, match="HF_FP4_CPU_ISA must name an instruction set .* which has .*portable"
    ):
        kernels.backend_of(torch.device("cpu"))


def test_misfits_are_refused(kernels):
    x, weight, bias, g = make(Shape(2, 64, 128), MODES[2])
    packed, row_scale = kernels.prepare_weight(*weight)
    for arguments, message in [
        ((x[:, :64], packed, row_scale, bias), "the tokens have 64 features .padded., the weight has 128"),
        ((x, packed, row_scale[:32], bias), "row_scale does not belong"),
        ((x, packed, row_scale, bias.float()), "bias must be contiguous"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            kernels.linear(*arguments, input_global_scale=g)
    with pytest.raises(RuntimeError, match="is not the shape of this prepared weight"):
        kernels.restore_weight(packed, row_scale, 64, 256)


@pytest.mark.parametrize("rule", ["mse", "hessian"])
@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
def test_search_scales(kernels, isa, format, rule):
    """hf-fp4's own search; sums in another order may take the other of two scales that are as good."""
    scales = pytest.importorskip("hf_fp4.scales", reason="needs hf_fp4, the reference")
    formats = pytest.importorskip("hf_fp4.formats")
    torch.manual_seed(0)
    fmt = formats.FP4Format(format)
    weight = torch.randn(45, 320) * torch.logspace(-3, 0, 320)
    weight[3, :32] = 0
    divisor = scales.weight_global_scale(weight.abs().amax().view(1)) if fmt.has_global_scale else None
    importance = torch.rand(320) ** 3
    arguments = (weight, fmt, rule, divisor, importance)
    found, expected = (
        scales.weight_scales(*arguments, kernels.search_scales),
        scales.weight_scales(*arguments),
    )
    assert found.dtype == expected.dtype and found.shape == expected.shape
    assert (found.view(torch.uint8) == expected.view(torch.uint8)).float().mean() > 0.998


@pytest.fixture
def source(kernels, monkeypatch):
    """What hf-fp4 takes the build as, and loads from LOCAL_KERNELS."""
    hub = pytest.importorskip("hf_fp4.backends.hub", reason="needs hf_fp4")
    monkeypatch.setitem(sys.modules, kernels.__name__, kernels)  # the loader's copy has the same name
    monkeypatch.setenv("LOCAL_KERNELS", f"hf-fp4/hf-fp4-kernels={variant_paths()['cpu'].parent}")
    for cached in (hub._select, hub._load):
        cached.cache_clear()
    yield hub.KernelSource()
    for cached in (hub._select, hub._load):
        cached.cache_clear()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("quantizes", [True, False], ids=["W4A4", "W4A16"])
@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
def test_layer_of_hf_fp4(source, format, quantizes, dtype):
    """FP4Linear on these kernels: as on the reference, saved as the same bytes, and differentiable."""
    linear = pytest.importorskip("hf_fp4.layers.linear")
    formats, gptq, scales = (pytest.importorskip(f"hf_fp4.{name}") for name in ("formats", "gptq", "scales"))
    torch.manual_seed(0)
    fmt = formats.FP4Format(format)
    weight = torch.randn(48, 96) / 10
    divisor = scales.weight_global_scale(weight.abs().amax().view(1)) if fmt.has_global_scale else None
    layer = linear.FP4Linear(
        96, 48, fmt, bias=True, hadamard_size=32, activation_scale_rule="absmax" if quantizes else None, dtype=dtype
    )  # fmt: skip
    stored = gptq.round_weight(weight, scales.weight_scales(weight, fmt, "mse", divisor), fmt, divisor)
    layer.set_weight(stored, torch.randn(48).to(dtype), None)
    x = torch.randn(2, 5, 96).to(dtype).requires_grad_()
    before, expected = layer.state_dict(), layer(x)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), x)
    assert layer.use_kernels(source).backend == "cpu" and layer.kernels.backend == "cpu"
    y = layer(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert y.dtype == dtype and ref.relative_error(y, expected.double()) < 5e-3
    assert torch.equal(gradient, expected_gradient)
    after = layer.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k].view(torch.uint8), after[k].view(torch.uint8)) for k in before)
