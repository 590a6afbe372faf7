"""The GPTQ kernels against `hf_fp4.gptq`, the same in PyTorch: the CPU's, and Triton's, elsewhere than on a GPU interpreted."""

import importlib

import pytest
import torch
from blackwell_compile import load_source
from conftest import load_variant, variant_paths

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

gptq = pytest.importorskip("hf_fp4.gptq", reason="needs hf_fp4, the reference")

from hf_fp4.backends import REFERENCE, Kernels
from hf_fp4.formats import FP4Format
from hf_fp4.hessian import DampedMoments
from hf_fp4.scales import step, weight_global_scale, weight_scales

pytestmark = pytest.mark.filterwarnings("ignore")

FORMATS = list(FP4Format)
# One program or two, one block of columns to three; the interpreter sees both numbers grow, not both at once.
SIZES = [
    pytest.param(
        rows, features, marks=[pytest.mark.slow] if rows * features > 40 * 64 or features > 160 else []
    )
    for rows in (5, 40)
    for features in (64, 160, 320)
]
DAMP = 0.01


@pytest.fixture(scope="module", params=["triton", "cpu", "cpu portable"])
def kernels(request):
    """Triton's source files, as a build's other files need a GPU to be of use; the CPU build. A panel is two blocks."""
    with pytest.MonkeyPatch.context() as patch:
        for module in loaded(request.param):
            patch.setattr(importlib.import_module("._gptq", module.__package__), "PANEL", 256)
            yield module


def loaded(backend):
    backend, _, isa = backend.partition(" ")
    if backend == "cpu":
        if DEVICE != "cpu" or "cpu" not in variant_paths():
            pytest.skip("needs the cpu variant, and no GPU")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("HF_FP4_CPU_ISA", isa)
            yield load_variant(variant_paths()["cpu"])
        return
    pytest.importorskip("triton", reason="needs triton")
    name = load_source().__name__
    if DEVICE == "cpu":
        # The interpreter's time goes by programs; 40 rows still take two of them.
        importlib.import_module(f"{name}._gptq_kernels").ROWS = 32
    yield importlib.import_module(f"{name}._gptq")


def correlated_inputs(tokens, features, generator):
    """A few directions carry most of the energy, some channels are outliers."""
    mixing = torch.randn(features, features, generator=generator) / features**0.5
    x = (torch.randn(tokens, features, generator=generator) * torch.logspace(0, -1.5, features)) @ mixing
    x[:, :: features // 4] *= 5
    return x


class Problem:
    """A weight, its scales and the second moments of its inputs; made on the CPU, so that every device has the same.

    shift: by how many powers of two the global scale is off, which takes the block scales to an end of their grid.
    """

    def __init__(self, fmt, rows, features, ordered=False, shift=0):
        generator = torch.Generator().manual_seed(1000 * rows + features)
        weight = torch.randn(rows, features, generator=generator) * 0.05
        x = correlated_inputs(4 * features, features, generator)
        second = x.T @ x / len(x)
        global_scale = (
            weight_global_scale(weight.abs().amax().view(1)) * 2.0**shift if fmt.has_global_scale else None
        )
        scale = weight_scales(weight, fmt, "mse", global_scale)
        order = gptq.activation_order(second) if ordered else None
        upper = DampedMoments.of(second, DAMP, "layer").upper(order)
        self.fmt, self.rows = fmt, rows
        self.added = DAMP * second.diagonal().mean().item()
        self.weight, self.second, self.scale, self.upper = (
            tensor.to(DEVICE) for tensor in (weight, second, scale, upper)
        )
        self.global_scale, self.order = (None if t is None else t.to(DEVICE) for t in (global_scale, order))

    def solved(self, backend=REFERENCE):
        return gptq.solve(
            self.weight, self.scale, self.fmt, self.global_scale, self.upper, self.order, backend
        )

    @property
    def damped(self):
        return self.second + self.added * torch.eye(len(self.second), device=DEVICE)

    def errors(self, values):
        """Damped output error of each row, in float64."""
        difference = self.weight.double() - values.double()
        return ((difference @ self.damped.double()) * difference).sum(1)


def descend(kernels, problem, start, passes):
    """Values [N, K] and scales [N, K/group] after the passes."""
    after = gptq.descend(
        problem.weight, start, problem.second, problem.added, passes, Kernels("triton", kernels)
    )
    return after.dequantize(), after.scale


def agreement(a, b):
    return (a == b).float().mean().item()


def check_values(problem, values, expected):
    """Equal but for rounding ties, whose sides the order of additions decides."""
    assert agreement(values, expected) >= 0.999
    torch.testing.assert_close(
        problem.errors(values).sum(), problem.errors(expected).sum(), rtol=1e-4, atol=0
    )


def check_descent(kernels, problem, passes):
    """Compare values with the reference's; returns them, and the bytes of the scales: the kernel's, the reference's, before."""
    start = problem.solved()
    expected = gptq.descend(problem.weight, start, problem.second, problem.added, passes)
    values, scale = descend(kernels, problem, start, passes)
    check_values(problem, values, expected.dequantize())
    return values, *(each.view(torch.uint8) for each in (scale, expected.scale, start.scale))


@pytest.mark.parametrize("rule", ["mse", "hessian"])
@pytest.mark.parametrize(("rows", "features"), [(5, 64), (40, 160), (1, 320)])
@pytest.mark.parametrize("fmt", FORMATS)
def test_search_scales(kernels, fmt, rows, features, rule):
    """The reference's choice, but where the order of additions decides between two that are as good."""
    problem = Problem(fmt, rows, features)
    arguments = problem.weight, fmt, rule, problem.global_scale, problem.second.diagonal()
    expected = weight_scales(*arguments)
    scale = weight_scales(*arguments, kernels.search_scales)
    assert scale.dtype == expected.dtype and scale.shape == expected.shape
    assert agreement(scale.view(torch.uint8), expected.view(torch.uint8)) >= 0.998
    absmax = weight_scales(problem.weight, fmt, "absmax", problem.global_scale)
    assert agreement(scale.view(torch.uint8), absmax.view(torch.uint8)) < 0.9


@pytest.mark.parametrize("shift", [-16, 5])
def test_search_at_the_ends_of_the_scales(kernels, shift):
    problem = Problem(FP4Format.NVFP4, 5, 64, shift=shift)
    arguments = problem.weight, problem.fmt, "mse", problem.global_scale
    scale = weight_scales(*arguments, None, kernels.search_scales)
    assert torch.equal(scale.view(torch.uint8), weight_scales(*arguments).view(torch.uint8))


@pytest.mark.parametrize("ordered", [False, True], ids=["as is", "act order"])
@pytest.mark.parametrize(("rows", "features"), SIZES)
@pytest.mark.parametrize("fmt", FORMATS)
def test_solve(kernels, fmt, rows, features, ordered):
    problem = Problem(fmt, rows, features, ordered)
    values = problem.solved(Kernels("triton", kernels)).dequantize()
    check_values(problem, values, problem.solved().dequantize())
    assert not torch.signbit(values[values == 0]).any()


@pytest.mark.parametrize(("rows", "features"), SIZES)
@pytest.mark.parametrize("fmt", FORMATS)
def test_descend(kernels, fmt, rows, features):
    problem = Problem(fmt, rows, features)
    _, scale, expected, before = check_descent(kernels, problem, 2)
    assert agreement(scale, expected) >= 0.999
    assert agreement(scale, before) < 1


@pytest.mark.parametrize("shift", [-16, 5])
def test_descend_at_the_ends_of_the_scales(kernels, shift):
    """Scales that are subnormal or the largest, which have no neighbour on one side."""
    problem = Problem(FP4Format.NVFP4, 5, 64, shift=shift)
    stored = problem.scale.view(torch.uint8)
    assert stored.min() == 1 if shift < 0 else stored.max() == 0x7E
    _, scale, expected, _ = check_descent(kernels, problem, 2)
    assert torch.equal(scale, expected)


@pytest.mark.parametrize("fmt", FORMATS)
def test_descend_takes_the_better_neighbour(kernels, fmt):
    """Two groups in many rows, under scales that are off: often both neighbours are better than the one at hand."""
    problem = Problem(fmt, 160, 2 * fmt.group_size)
    offset = torch.randint(-1, 2, problem.scale.shape, generator=torch.Generator().manual_seed(0))
    stored = problem.scale.view(torch.uint8) + (3 * offset if fmt.has_global_scale else offset).to(DEVICE)
    problem.scale = stored.to(torch.uint8).view(fmt.scale_dtype)
    _, scale, expected, _ = check_descent(kernels, problem, 1)
    assert torch.equal(scale, expected)


@pytest.mark.parametrize("fmt", FORMATS)
def test_every_stored_scale_is_read_exactly(kernels, fmt):
    """Values on the grid are at their best already, so they stay only if their scale is taken for what it is."""
    low, high = fmt.scale_bytes
    stored = torch.arange(low, high + 1, dtype=torch.uint8, device=DEVICE)[None, :]
    scale = stored.clone().view(fmt.scale_dtype)
    units = torch.tensor([0.5, -1.0, 1.5, 0.0], device=DEVICE).repeat(fmt.group_size // 4)[:, None]
    divisor = torch.tensor([2.0**20], device=DEVICE) if fmt.has_global_scale else None
    target = (units * step(scale, fmt, divisor)).contiguous()
    current = target.clone()
    identity = torch.eye(fmt.group_size, device=DEVICE)
    kernels.gptq_descend(target, current, scale, identity, 1, fmt.value, divisor)
    assert torch.equal(current, target)
    assert torch.equal(scale.view(torch.uint8), stored)


@pytest.mark.parametrize("experts", [1, 3])
def test_a_product_with_rows_is_exact_to_the_last_bits(kernels, experts):
    """On a GPU, where the rows are sums of two bfloat16 numbers, every term is off by less than 2^-14 of itself."""
    module = importlib.import_module("._gptq", kernels.__package__)
    generator = torch.Generator().manual_seed(0)
    rows, factor, total = (
        torch.randn(experts, *shape, generator=generator).to(DEVICE)
        for shape in ((96, 40), (24, 64), (24, 40))
    )
    multiplicand, before = module._Multiplicand(torch.full_like(rows, torch.nan)), total.clone()
    multiplicand.put(0, rows[:, :32])
    multiplicand.put(32, rows[:, 32:64])  # what is behind stays NaN, and is not read
    multiplicand.add_product(total, factor, alpha=-2)
    exact = before.double() - 2 * factor.double() @ rows[:, :64].double()
    terms = 2 * factor.double().abs() @ rows[:, :64].double().abs()
    assert ((total - exact).abs() <= 2**-14 * terms + 1e-6).all()


@pytest.mark.slow
@pytest.mark.parametrize("fmt", FORMATS)
def test_descend_never_raises_the_error_of_a_row(kernels, fmt):
    problem = Problem(fmt, 24, 160, ordered=True)
    start = problem.solved()
    errors = [problem.errors(start.dequantize())]
    for passes in (1, 3):
        values, _ = descend(kernels, problem, start, passes)
        errors.append(problem.errors(values))
        assert (errors[-1] <= errors[-2] * (1 + 1e-6)).all()
    assert errors[1].sum() < 0.97 * errors[0].sum()


@pytest.mark.parametrize("fmt", FORMATS)
def test_no_pass_and_no_row_change_nothing(kernels, fmt):
    problem = Problem(fmt, 5, 64)
    start = problem.solved()
    values, scale = descend(kernels, problem, start, 0)
    assert torch.equal(values, start.dequantize())
    assert torch.equal(scale.view(torch.uint8), start.scale.view(torch.uint8))
    empty = problem.weight.new_empty((64, 0))
    assert kernels.gptq_solve(empty, empty, empty, problem.upper).shape == (64, 0)
    nothing = problem.scale[:0]
    assert (
        kernels.search_scales(problem.weight[:0], nothing, (0, 1), fmt.value, problem.global_scale).shape
        == nothing.shape
    )
    no_scale = problem.scale.T[:, :0].contiguous()
    kernels.gptq_descend(empty, empty, no_scale, problem.damped, 1, fmt.value, problem.global_scale)


def test_wrong_arguments_are_refused(kernels):
    problem = Problem(FP4Format.NVFP4, 5, 64)
    target, scale, matrix = problem.weight.T.contiguous(), problem.scale.T.contiguous(), problem.damped
    with pytest.raises(ValueError, match="contiguous"):
        kernels.gptq_solve(problem.weight.T, target, target, problem.upper)
    with pytest.raises(ValueError, match="multiple of 16"):
        kernels.gptq_solve(target[:60], target[:60], target[:60], problem.upper)
    with pytest.raises(ValueError, match="matrix"):
        kernels.gptq_solve(target, target, target, problem.upper[:32])
    for changed, message in (
        ({"format": "mxfp4"}, "global_scale"),
        ({"weight": problem.weight[:, :60]}, "multiple of 16"),
        ({"base": problem.scale[1:]}, "base"),
        ({"importance": problem.second}, "importance"),
    ):
        arguments = {"weight": problem.weight, "base": problem.scale, "steps": (0,), "format": "nvfp4"}
        with pytest.raises(ValueError, match=message):
            kernels.search_scales(**{**arguments, "global_scale": problem.global_scale, **changed})
    for arguments, message in (
        ((scale, matrix, 1, "int4", problem.global_scale), "format"),
        ((scale, matrix, 1, "nvfp4", None), "global_scale"),
        ((scale.view(torch.uint8), matrix, 1, "nvfp4", problem.global_scale), "scale must be"),
        ((scale, matrix, 1, "mxfp4", None), "scale must be"),
        ((scale, matrix.double(), 1, "nvfp4", problem.global_scale), "matrix"),
    ):
        with pytest.raises(ValueError, match=message):
            kernels.gptq_descend(target, target.clone(), *arguments)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.value)
def test_experts_are_solved_in_the_same_launches(kernels, fmt):
    """A stack of two, of two blocks of columns, gives what each gives by itself."""
    problems = [Problem(fmt, 5, 160, ordered=True) for _ in range(2)]
    for i, problem in enumerate(problems):
        problem.weight *= i + 1.5
        if problem.global_scale is not None:
            problem.global_scale /= 2.0**i
    backend = Kernels("triton", kernels)
    single = [problem.solved(backend) for problem in problems]

    def stack(name):
        return torch.stack([getattr(problem, name) for problem in problems])

    scales = None if fmt is FP4Format.MXFP4 else stack("global_scale")
    upper, order = stack("upper"), stack("order")
    together = gptq.solve(stack("weight"), stack("scale"), fmt, scales, upper, order, backend)
    added = torch.tensor([problem.added for problem in problems], device=DEVICE)
    descended = gptq.descend(stack("weight"), together, stack("second"), added, 1, backend)
    on_reference = gptq.solve(stack("weight"), stack("scale"), fmt, scales, upper, order)
    for i, problem in enumerate(problems):
        check_values(problem, together.dequantize()[i], single[i].dequantize())
        check_values(problem, on_reference.dequantize()[i], problem.solved().dequantize())
        values, scale = descend(kernels, problem, single[i], 1)
        assert agreement(descended.dequantize()[i], values) >= 0.99
        assert agreement(descended.scale[i].view(torch.uint8), scale.view(torch.uint8)) >= 0.99


@pytest.mark.parametrize("crosses", [True, False], ids=["cross", "second"])
@pytest.mark.parametrize("m, k, panel", [(1, 16, 256), (37, 48, 256), (700, 272, 256), (513, 592, 74)])
def test_moments(kernels, m, k, panel, crosses):
    generator = torch.Generator().manual_seed(m)
    x, original = (torch.randn(m, k, generator=generator).bfloat16() for _ in range(2))
    start = torch.randn(k, k, generator=generator)
    second, cross = start.clone(), start.clone() if crosses else None
    done = kernels.add_moments(second, cross, x, original if crosses else None, panel)
    assert done == (kernels._cpu.is_compiled() and kernels._cpu.ops.cpu_isa() in ("amx", "avx512_bf16"))
    if not done:
        assert torch.equal(second, start)
        return
    of_panel = torch.arange(k)[None] < (torch.arange(k)[:, None] // panel + 1) * panel
    exact = start.double() + x.double().T @ x.double()
    torch.testing.assert_close(second[of_panel], exact.float()[of_panel], rtol=1e-5, atol=2e-4)
    if cross is not None:
        exact = start.double() + original.double().T @ x.double()
        torch.testing.assert_close(cross, exact.float(), rtol=1e-5, atol=2e-4)


def test_moments_of_others_are_left_to_pytorch(kernels):
    sums = torch.zeros(32, 32)
    for x in (torch.ones(8, 32), torch.ones(32, 8).bfloat16().T):
        assert not kernels.add_moments(sums, None, x, None, 256)
    assert not kernels.add_moments(torch.zeros(40, 40), None, torch.ones(8, 40).bfloat16(), None, 256)
    assert not sums.any()
