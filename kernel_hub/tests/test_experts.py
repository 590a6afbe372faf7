"""`grouped_linear` against reference.py: every expert empty, with one row, with many; both formats; graphs, other routings."""

from itertools import pairwise

import pytest
import reference as ref
import torch
from conftest import device_of, needs_two_gpus
from problems import EXPERT_SHAPES, EXPERT_TILES, FLOORS, MODES, ExpertShape, Mode
from test_linear import check

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def device(kernels):
    if device_of(kernels) == "cpu":
        pytest.skip("experts run on GPUs")
    with torch.device("cuda") as device:
        yield device


def routing(shape: ExpertShape) -> tuple[torch.Tensor, torch.Tensor]:
    """The token of each row, and offsets. Tokens are in no order, some come often, some not at all."""
    offsets = torch.tensor([0, *shape.counts]).cumsum(0)
    return torch.randint(0, shape.tokens, (shape.rows,)), offsets


def make(shape: ExpertShape, mode: Mode, gather: bool):
    torch.manual_seed(shape.rows + shape.k)
    dtype = getattr(torch, mode.dtype)
    index, offsets = routing(shape)
    tokens = shape.tokens if gather else shape.rows
    x = (torch.randn(tokens, shape.k) * torch.rand(tokens, 1).mul(3).exp2()).to(dtype)
    weights = [ref.random_weight(shape.n, shape.k, mode.format) for _ in shape.counts]
    weights = [
        (w, s, None if g is None else g * (1 + i / 8)) for i, (w, s, g) in enumerate(weights)
    ]  # a divisor each
    bias = torch.randn(len(shape.counts), shape.n, dtype=dtype)
    static = mode.format == "nvfp4" and mode.activations == "fp4" and mode.static
    return x, index if gather else None, offsets, weights, bias, torch.tensor([64.0]) if static else None


def prepare(kernels, weights, format):
    stacked = [torch.stack([weight[i] for weight in weights]) for i in range(2)]
    return kernels.prepare_experts(
        *stacked, torch.cat([weight[2] for weight in weights]) if format == "nvfp4" else None
    )


def call(kernels, x, index, offsets, prepared, bias, mode, g):
    return kernels.grouped_linear(
        x, offsets, *prepared, bias, index=index, activations=mode.activations, hadamard=mode.hadamard,
        rule=mode.rule, input_global_scale=g,
    )  # fmt: skip


def check_all(y, x, index, offsets, weights, bias, mode, g):
    assert y[int(offsets[-1]) :].eq(0).all()
    rows = x if index is None else x[index]
    for expert, (start, stop) in enumerate(pairwise(offsets.tolist())):
        if start < stop:
            own_bias = None if bias is None else bias[expert]
            check(y[start:stop], rows[start:stop], weights[expert], own_bias, mode, g)


def expected_of_all(x, index, offsets, weights, bias, mode, g):
    """The exact result [S, N], and how far from it it may be."""
    rows = x if index is None else x[index]
    exact, limit = torch.zeros(len(rows), bias.shape[1], dtype=torch.float64), 0.0
    for expert, (start, stop) in enumerate(pairwise(offsets.tolist())):
        if start < stop:
            own = ref.expected(rows[start:stop], weights[expert], bias[expert], mode, g, FLOORS[mode.dtype])
            exact[start:stop], limit = own[0], max(limit, own[1])
    return exact, limit


@pytest.mark.parametrize("gather", [True, False])
@pytest.mark.parametrize("mode", MODES, ids=lambda m: m.id)
@pytest.mark.parametrize("shape", EXPERT_SHAPES, ids=lambda s: s.id)
def test_grouped_linear(kernels, shape, mode, gather):
    if shape.k % (mode.hadamard or 32):
        pytest.skip("the rotation does not divide K")
    x, index, offsets, weights, bias, g = make(shape, mode, gather)
    if shape.rows % 2:
        bias = None
    prepared = prepare(kernels, weights, mode.format)
    y = call(kernels, x, index, offsets, prepared, bias, mode, g)
    assert y.shape == (shape.rows, shape.n) and y.dtype == x.dtype
    check_all(y, x, index, offsets, weights, bias, mode, g)
    assert torch.equal(y, call(kernels, x, index, offsets, prepared, bias, mode, g)), "two runs differ"


@needs_two_gpus
@pytest.mark.parametrize("mode", MODES, ids=lambda m: m.id)
@pytest.mark.parametrize("shape", [EXPERT_SHAPES[0], EXPERT_SHAPES[-1]], ids=lambda s: s.id)
def test_a_gpu_that_is_not_the_current_one(kernels, shape, mode):
    if shape.k % (mode.hadamard or 32):
        pytest.skip("the rotation does not divide K")
    x, index, offsets, weights, bias, g = make(shape, mode, True)
    y = call(kernels, x, index, offsets, prepare(kernels, weights, mode.format), bias, mode, g)
    weights = [[None if t is None else t.to("cuda:1") for t in weight] for weight in weights]
    x, index, offsets, bias, g = (None if t is None else t.to("cuda:1") for t in (x, index, offsets, bias, g))
    prepared = prepare(kernels, weights, mode.format)
    assert torch.equal(call(kernels, x, index, offsets, prepared, bias, mode, g).to(y.device), y)


@pytest.mark.parametrize("gather", [True, False])
@pytest.mark.parametrize("mode", [MODES[1], MODES[2], MODES[4], MODES[6]], ids=lambda m: m.id)
@pytest.mark.parametrize("shape", EXPERT_SHAPES, ids=lambda s: s.id)
def test_every_tile_gives_the_result(kernels, shape, mode, gather):
    """Every tile, also those that are not chosen for this shape; indices of 32 bits."""
    if kernels.backend_of(torch.get_default_device()) != "cuda":
        pytest.skip("CUDA kernels only")
    if shape.k % (mode.hadamard or 32):
        pytest.skip("the rotation does not divide K")
    x, index, offsets, weights, bias, g = make(shape, mode, gather)
    prepared = prepare(kernels, weights, mode.format)
    numbers = kernels._cuda
    operand = "fp16" if mode.activations == "bf16" and x.dtype == torch.float16 else "bf16"
    exact, limit = expected_of_all(x, index, offsets, weights, bias, mode, g)

    def run(tile):
        return kernels._ops.ops.grouped_linear(
            x, None, offsets.int(), None if index is None else index.int(), *prepared, bias, g, numbers.OPERANDS[operand],
            mode.activations == "fp4", mode.hadamard or 0, numbers.RULES[mode.rule], tile,
        )  # fmt: skip

    failed = []
    for tile in EXPERT_TILES:
        y = run(tile)
        error = ref.relative_error(y, exact)
        if not error <= limit:
            failed.append(f"{tile}: error {error:.2e}, limit {limit:.2e}")
        elif not torch.equal(y, run(tile)):
            failed.append(f"{tile}: two runs differ")
    assert not failed


@pytest.mark.parametrize("gather", [True, False])
@pytest.mark.parametrize("mode", [MODES[0], MODES[1], MODES[2], MODES[4], MODES[9]], ids=lambda m: m.id)
@pytest.mark.parametrize("shape", EXPERT_SHAPES, ids=lambda s: s.id)
def test_gated_is_what_pytorch_makes_of_gate_and_up(kernels, shape, mode, gather):
    if shape.k % (mode.hadamard or 32):
        pytest.skip("the rotation does not divide K")
    x, index, offsets, weights, bias, g = make(shape, mode, gather)
    prepared = prepare(kernels, weights, mode.format)
    gate_up = torch.cat([x, torch.randn_like(x)], -1)
    gate, up = gate_up.chunk(2, -1)
    inner = torch.nn.functional.silu(gate) * up
    y, want = (
        kernels.grouped_linear(
            tokens, offsets, *prepared, bias, index=index, activations=mode.activations, hadamard=mode.hadamard,
            rule=mode.rule, input_global_scale=g, up=other,
        )
        for tokens, other in ((gate, up), (inner, None))
    )  # fmt: skip
    assert torch.equal(y, want)


@pytest.mark.parametrize("mode", [MODES[0], MODES[2], MODES[4], MODES[9]], ids=lambda m: m.id)
@pytest.mark.parametrize("shape", EXPERT_SHAPES, ids=lambda s: s.id)
def test_rows_are_independent(kernels, shape, mode):
    """A row's bits do not depend on the contents of the others, not even on NaN."""
    if shape.k % (mode.hadamard or 32):
        pytest.skip("the rotation does not divide K")
    x, _, offsets, weights, bias, g = make(shape, mode, gather=False)
    prepared = prepare(kernels, weights, mode.format)
    other = torch.full_like(x, float("nan"))
    other[::3] = x[::3]
    y, z = (call(kernels, v, None, offsets, prepared, bias, mode, g) for v in (x, other))
    assert torch.equal(y[::3], z[::3])


@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
@pytest.mark.parametrize("experts, n, k", [(1, 16, 32), (5, 80, 96), (3, 128, 1184)])
def test_restore_gives_the_stored_bytes(kernels, format, experts, n, k):
    weights = [ref.random_weight(n, k, format) for _ in range(experts)]
    prepared = prepare(kernels, weights, format)
    restored = kernels.restore_weight(*prepared, n, k)
    for found, wanted in zip(restored, zip(*(weight[:2] for weight in weights), strict=True), strict=True):
        assert torch.equal(found.view(torch.uint8), torch.stack(wanted).view(torch.uint8))
        assert found.dtype == wanted[0].dtype
    if kernels.backend_of(torch.get_default_device()) == "cuda":  # an expert's part is a weight of its own
        single = kernels.prepare_weight(*weights[-1])
        assert torch.equal(prepared.packed[-1], single.packed)
        assert torch.equal(prepared.row_scale[-1], single.row_scale)


@pytest.mark.parametrize("mode", [MODES[2], MODES[4], MODES[6]], ids=lambda m: m.id)
@pytest.mark.parametrize("tokens", [1, 16, 300])
def test_a_graph_takes_any_routing(kernels, mode, tokens):
    experts, top, n, k = 32, 4, 272, 512
    shape = ExpertShape((tokens * top, *[0] * (experts - 1)), 0, tokens, n, k)
    x, _, _, weights, bias, g = make(shape, mode, gather=True)
    prepared = prepare(kernels, weights, mode.format)
    index, offsets = torch.zeros(shape.rows, dtype=torch.int64), torch.zeros(experts + 1, dtype=torch.int64)
    offsets[1:] = shape.rows

    def route():
        chosen = torch.rand(tokens, experts).topk(top).indices.flatten()
        by_expert, order = chosen.sort(stable=True)
        return order // top, torch.searchsorted(by_expert, torch.arange(experts + 1))

    call(kernels, x, index, offsets, prepared, bias, mode, g)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call(kernels, x, index, offsets, prepared, bias, mode, g)
    for _ in range(4):
        new_index, new_offsets = route()
        index.copy_(new_index)
        offsets.copy_(new_offsets)
        graph.replay()
        check_all(y, x, index, offsets, weights, bias, mode, g)
        assert torch.equal(y, call(kernels, x, index, offsets, prepared, bias, mode, g))


@pytest.mark.parametrize("gather", [True, False])
def test_compile_fullgraph(kernels, gather):
    x, index, offsets, weights, bias, g = make(EXPERT_SHAPES[0], MODES[2], gather)
    prepared = prepare(kernels, weights, "nvfp4")

    def two(x):
        return call(kernels, x, index, offsets, prepared, bias, MODES[2], g) * 2

    assert torch.equal(torch.compile(two, fullgraph=True, backend="aot_eager")(x), two(x))
