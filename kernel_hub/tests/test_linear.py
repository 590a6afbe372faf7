"""Every op against reference.py: results, independence of rows, repeatability, graphs, streams, compile."""

import pytest
import reference as ref
import torch
from conftest import device_of, needs_two_gpus
from problems import DIVISIONS, FLOORS, MODES, SHAPES, Mode, Shape, variants

pytestmark = pytest.mark.filterwarnings("ignore")


# Of either format both kinds of tokens.
ON_LARGE_WEIGHTS = [MODES[0], MODES[2], MODES[6], MODES[8]]


@pytest.fixture(autouse=True)
def device(kernels):
    """Tensors are made where the kernels run."""
    with torch.device(device_of(kernels)) as device:
        yield device


def make(shape, mode, seed=0, x=None):
    torch.manual_seed(seed + shape.m * 7 + shape.k)
    dtype = getattr(torch, mode.dtype)
    if x is None:
        x = torch.randn(shape.m, shape.k) * torch.rand(shape.m, 1).mul(3).exp2()
    x = x.to(dtype)
    weight = ref.random_weight(shape.n, shape.k, mode.format)
    bias = torch.randn(shape.n, dtype=dtype)
    static = mode.format == "nvfp4" and mode.activations == "fp4" and mode.static
    g = torch.tensor([64.0]) if static else None
    return x, weight, bias, g


def call(kernels, x, prepared, bias, mode, g):
    return kernels.linear(
        x, *prepared, bias, activations=mode.activations, hadamard=mode.hadamard, rule=mode.rule,
        input_global_scale=g, fp8=mode.fp8,
    )  # fmt: skip


def check(y, x, weight, bias, mode, g):
    exact, limit = ref.expected(x, weight, bias, mode, g, FLOORS[mode.dtype])
    error = ref.relative_error(y, exact)
    assert torch.isfinite(y).all()
    assert error <= limit, f"error {error:.2e}, limit {limit:.2e}"
    if (
        mode.activations == "fp4"
    ):  # must be nearer to the quantized tokens' result than to the unquantized one's
        plain = ref.rotate(x, mode.hadamard).double() @ ref.weight_values(*weight).T
        assert error < ref.relative_error(y, plain + (0 if bias is None else bias.double()))


@pytest.mark.parametrize("mode", MODES, ids=lambda m: m.id)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.id)
def test_linear(kernels, shape, mode, device):
    if shape.k % (mode.hadamard or 32):
        pytest.skip("the rotation does not divide K")
    if device.type == "cpu" and shape.n * shape.k > 2**22 and mode not in ON_LARGE_WEIGHTS:
        pytest.skip("so large a weight divides the work of a GPU, not a CPU's")
    x, weight, bias, g = make(shape, mode)
    prepared = kernels.prepare_weight(*weight)
    if shape.m % 2:
        bias = None
    y = call(kernels, x, prepared, bias, mode, g)
    assert y.shape == (shape.m, shape.n) and y.dtype == x.dtype
    check(y, x, weight, bias, mode, g)
    assert torch.equal(y, call(kernels, x, prepared, bias, mode, g)), "two runs differ"


@needs_two_gpus
@pytest.mark.parametrize("mode", MODES, ids=lambda m: m.id)
@pytest.mark.parametrize("m", [1, 20, 100, 300])
def test_a_gpu_that_is_not_the_current_one(kernels, mode, m, device):
    if device.type == "cpu":
        pytest.skip("GPUs only")
    x, weight, bias, g = make(Shape(m, 144, 640), mode)
    y = call(kernels, x, kernels.prepare_weight(*weight), bias, mode, g)
    x, bias, g, *weight = (None if t is None else t.to("cuda:1") for t in (x, bias, g, *weight))
    assert torch.cuda.current_device() == 0
    assert torch.equal(call(kernels, x, kernels.prepare_weight(*weight), bias, mode, g).to(y.device), y)


@pytest.mark.parametrize("mode", MODES, ids=lambda m: m.id)
@pytest.mark.parametrize("m", [24, 100, 300])
def test_all_positive(kernels, mode, m):
    """Nothing cancels: a short accumulator would lose the small addends."""
    shape = Shape(m, 128, 14336)
    x, weight, _, g = make(shape, mode, x=torch.rand(m, 14336) + 0.5)
    weight = (weight[0] & 0x77, *weight[1:])
    if mode.hadamard is not None:  # undo the rotation, so that rotated tokens are all positive
        x = ref.rotate(x, mode.hadamard).to(x.dtype)
    check(call(kernels, x, kernels.prepare_weight(*weight), None, mode, g), x, weight, None, mode, g)


@pytest.mark.parametrize("mode", MODES, ids=lambda m: m.id)
def test_long_rows(kernels, mode):
    """A range per token is sought in more values than threads keep."""
    x, weight, bias, g = make(Shape(70, 32, 16896), mode)
    check(call(kernels, x, kernels.prepare_weight(*weight), bias, mode, g), x, weight, bias, mode, g)


@pytest.mark.parametrize("mode", MODES, ids=lambda m: m.id)
@pytest.mark.parametrize("exponent", [-20, -6, 6, 12])
def test_extreme_scales(kernels, mode, exponent):
    shape = Shape(17, 80, 512)
    x, weight, _, g = make(shape, mode)
    if mode.dtype == "float16" and abs(exponent) > 6:
        pytest.skip("outside float16")
    x = (torch.randn(17, 512) * 2.0**exponent).to(x.dtype)
    if g is not None:
        g = torch.tensor([2.0 ** (6 - exponent)])
    if mode.format == "mxfp4":
        scales = torch.randint(100, 112, (80, 16), dtype=torch.uint8)
        scales[::3, ::2] = 0
        weight = (weight[0], scales, None)
    else:
        scales = torch.randint(0, 0x7F, (80, 32), dtype=torch.uint8)
        weight = (weight[0], scales.view(torch.float8_e4m3fn), torch.tensor([1e5]))
    check(call(kernels, x, kernels.prepare_weight(*weight), None, mode, g), x, weight, None, mode, g)


@pytest.mark.parametrize("mode", MODES, ids=lambda m: m.id)
@pytest.mark.parametrize("m", [5, 20])
def test_zero_tokens_and_zero_input(kernels, mode, m):
    x, weight, bias, g = make(Shape(m, 64, 256), mode)
    prepared = kernels.prepare_weight(*weight)
    assert call(kernels, x[:0], prepared, bias, mode, g).shape == (0, 64)
    y = call(kernels, torch.zeros_like(x), prepared, bias, mode, g)
    assert torch.equal(y, bias.expand(m, -1))


@pytest.mark.parametrize("mode", MODES, ids=lambda m: m.id)
@pytest.mark.parametrize("m", [3, 8, 17, 31, 33, 64, 65, 200, 300])
def test_rows_are_independent(kernels, mode, m):
    """A token's bits do not depend on the other tokens' contents, not even on NaN."""
    shape = Shape(m, 144, 640)
    x, weight, bias, g = make(shape, mode)
    prepared = kernels.prepare_weight(*weight)
    y = call(kernels, x, prepared, bias, mode, g)
    other = torch.randn_like(x) * 100
    other[1] = x[1]
    other[2] = float("nan")
    assert torch.equal(call(kernels, other, prepared, bias, mode, g)[1], y[1])


@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
@pytest.mark.parametrize("n, k", [(16, 32), (80, 96), (64, 64), (1040, 1184), (256, 4096)])
def test_restore_gives_the_stored_bytes(kernels, format, n, k):
    weight, scale, global_scale = ref.random_weight(n, k, format)
    if format == "nvfp4":  # every E4M3 byte that is not negative and not NaN
        scale = torch.randint(0, 0x7F, scale.shape, dtype=torch.uint8).view(torch.float8_e4m3fn)
    else:
        scale = torch.randint(1, 250, scale.shape, dtype=torch.uint8)
    prepared = kernels.prepare_weight(weight, scale, global_scale)
    w, s = kernels.restore_weight(*prepared, n, k)
    assert torch.equal(w, weight)
    assert s.dtype == scale.dtype and torch.equal(s.view(torch.uint8), scale.view(torch.uint8))


@pytest.mark.parametrize("hadamard", [None, 16, 32, 64, 128])
@pytest.mark.parametrize(
    "format, rule",
    [
        ("nvfp4", "absmax"),
        ("nvfp4", "four_over_six"),
        ("nvfp4", "mse"),
        ("mxfp4", "absmax"),
        ("mxfp4", "mse"),
    ],
)
@pytest.mark.parametrize("static", [True, False])
def test_rotate_quantize(kernels, hadamard, format, rule, static):
    torch.manual_seed(0)
    x = torch.randn(37, 1152, dtype=torch.bfloat16)
    g = torch.tensor([128.0]) if static and format == "nvfp4" else None
    codes, scales, token_scale = kernels.rotate_quantize(
        x, format=format, hadamard=hadamard, rule=rule, input_global_scale=g
    )
    rotated = ref.rotate(x, hadamard)
    if format == "nvfp4":
        divisor = ref.dynamic_global(rotated) if g is None else g
        want, s = ref.quantize_nvfp4(rotated, divisor, rule)
        same_scale = scales.float() == s
        torch.testing.assert_close(token_scale.view(-1), (1 / divisor).view(-1), rtol=1e-6, atol=0)
    else:
        want, e = ref.quantize_mxfp4(rotated, rule)
        same_scale = scales.int() - 127 == e
    same = ref.unpack(codes) == want
    # FP32 butterflies and the FP64 reference may fall on two sides of a tie; unrotated values may not.
    allowed = 0 if hadamard is None and (static or format == "mxfp4") else 1e-3
    assert (~same).double().mean().item() <= allowed
    assert (~same_scale).double().mean().item() <= allowed


def check_fake_quantize(kernels, x, mode, g):
    """What the tokens stand for, exactly but where FP32 butterflies and the FP64 reference fall on two sides of a tie."""
    values, multiplier = kernels.fake_quantize(
        x, format=mode.format, activations=mode.activations, hadamard=mode.hadamard, rule=mode.rule,
        input_global_scale=g,
    )  # fmt: skip
    want = ref.activation_values(x, mode, g)
    assert values.shape == x.shape and values.dtype == (
        x.dtype if mode.activations == "bf16" else torch.bfloat16
    )
    if mode.activations == "bf16":
        assert multiplier.numel() == 0
        torch.testing.assert_close(values.double(), want, rtol=2**-8, atol=1e-6)
        return
    got = values.double() * multiplier.double().view(-1, 1)
    assert (got != want).double().mean().item() <= (0 if mode.hadamard is None and mode.static else 2e-3)


@pytest.mark.parametrize("mode", MODES, ids=lambda m: m.id)
def test_fake_quantize(kernels, mode):
    torch.manual_seed(0)
    x = torch.randn(37, 1152).to(getattr(torch, mode.dtype))
    static = mode.format == "nvfp4" and mode.activations == "fp4" and mode.static
    check_fake_quantize(kernels, x, mode, torch.tensor([128.0]) if static else None)


def test_ties_round_to_even(kernels):
    ties = torch.tensor(
        [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, 0.2495, 0.2505, 5.01, 4.99, 0.0, -0.25, -1.75, -6.0]
    )
    want = torch.tensor([0, 2, 2, 4, 4, 6, 6, 7, 0, 1, 7, 6, 0, 8, 12, 15])
    x = ties.to(torch.float16).repeat(4).view(1, 64)
    for format in ("nvfp4", "mxfp4"):
        g = torch.ones(1) if format == "nvfp4" else None
        codes, _, _ = kernels.rotate_quantize(x, format=format, input_global_scale=g)
        assert torch.equal(ref.unpack(codes).view(4, 16).long(), want.to(codes.device).expand(4, -1))


def product(kernels, tokens, prepared, bias, m, dtype, split, operand=None):
    """tokens: the operand's bytes and their multiplier."""
    if operand is None:
        operand = "bf16" if dtype == torch.bfloat16 else "fp16"
    return kernels._ops.ops.prepared_gemm(
        *tokens[:2], *prepared, bias, m, kernels._cuda.OPERANDS[operand], dtype == torch.bfloat16, split
    )


def failures(run, tokens, others, exact, limit, splits):
    """run(tokens, split) -> result. What is wrong: its values, two runs differ, or the last token, which `others` have
    too, depends on the rest."""
    failed = []
    for split in splits:
        y = run(tokens, split)
        error = ref.relative_error(y, exact)
        if not error <= limit:
            failed.append(f"{split}: error {error:.2e}, limit {limit:.2e}")
        elif not torch.equal(y, run(tokens, split)):
            failed.append(f"{split}: two runs differ")
        elif not torch.equal(y[-1], run(others, split)[-1]):
            failed.append(f"{split}: the last token depends on the others")
    return failed


@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    "m, n, k",
    [
        (1, 28672, 4096),
        (7, 16656, 320),
        (16, 16640, 1152),
        (17, 80, 64),
        (17, 17024, 384),
        (31, 1040, 704),
        (32, 272, 4096),
        (33, 528, 96),
        (64, 656, 1856),
        (64, 4096, 14336),
        (65, 640, 4096),
        (128, 1168, 576),
        (200, 384, 4096),
        (515, 336, 1024),
    ],
)
def test_every_variant_gives_the_result(kernels, format, dtype, m, n, k):
    """Every variant and division of the work, also those that are not chosen for this shape: right, the same bits twice,
    and a token's bits do not depend on the other tokens."""
    if kernels.backend_of(torch.get_default_device()) != "cuda":
        pytest.skip("CUDA kernels only")
    mode = Mode(format, "bf16", None, dtype=dtype)
    x, weight, bias, g = make(Shape(m, n, k), mode)
    prepared = kernels.prepare_weight(*weight)
    exact, limit = ref.expected(x, weight, bias, mode, g, FLOORS[dtype])
    other = torch.full_like(x, float("nan"))
    other[-1] = x[-1]
    tokens, others = (
        kernels.prepare_activation(v, format=format, activations="bf16") for v in (x, other)
    )  # fmt: skip

    def run(tokens, split):
        return product(kernels, tokens, prepared, bias, m, x.dtype, split)

    assert not failures(run, tokens, others, exact, limit, variants(m))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    "m, n, k",
    [
        (1, 28672, 1088),
        (7, 80, 192),
        (8, 16656, 320),
        (9, 272, 4096),
        (16, 6160, 704),
        (17, 16, 64),
        (17, 80, 192),
        (31, 17024, 384),
        (32, 272, 4096),
        (33, 528, 96),
        (64, 4096, 14336),
        (65, 384, 1152),
        (128, 1168, 2048),
        (129, 336, 512),
        (257, 17024, 448),
        (700, 1040, 2176),
        (2100, 272, 1024),
    ],
)
def test_every_division_in_e4m3(kernels, dtype, m, n, k):
    """As above, for tokens and weights in E4M3, also where another route is chosen for so many tokens."""
    if kernels.backend_of(torch.get_default_device()) != "cuda":
        pytest.skip("CUDA kernels only")
    mode = Mode("mxfp4", "fp4", 32, dtype=dtype)
    x, weight, bias, g = make(Shape(m, n, k), mode)
    prepared = kernels.prepare_weight(*weight)
    exact, limit = ref.expected(x, weight, bias, mode, g, FLOORS[dtype])
    other = torch.full_like(x, float("nan"))
    other[-1] = x[-1]
    numbers = kernels._cuda
    tokens, others = (
        kernels._ops.ops.prepare_activation(
            v, None, None, numbers.FORMATS["mxfp4"], numbers.OPERANDS["e4m3_tiles"], True, mode.hadamard, 0
        )
        for v in (x, other)
    )

    def run(tokens, split):
        return product(kernels, tokens, prepared, bias, m, x.dtype, split, "e4m3_tiles")

    assert not failures(run, tokens, others, exact, limit, [0, *DIVISIONS])


def test_shared_activation_equals_linear(kernels):
    mode = Mode("nvfp4", "fp4", 16)
    x, weight, bias, g = make(Shape(20, 320, 512), mode)
    prepared = kernels.prepare_weight(*weight)
    tokens = kernels.prepare_activation(x.view(4, 5, 512), format="nvfp4", hadamard=16, input_global_scale=g)
    y = kernels.gemm(tokens, *prepared, bias)
    assert y.shape == (4, 5, 320)
    assert torch.equal(y.view(20, 320), call(kernels, x, prepared, bias, mode, g))


@pytest.mark.parametrize("mode", MODES, ids=lambda m: m.id)
@pytest.mark.parametrize(
    "m, rows, k",
    [
        (1, [48, 64, 16], 1152),
        (2, [4096, 1024, 1024], 384),
        (2, [12000, 12000], 128),
        (3, [14336, 14336], 256),
        (12, [4096, 272], 384),
        (13, [80, 272, 48], 1152),
        (40, [336], 1152),
        (64, [16, 4096, 64], 384),
        (130, [272, 80, 144], 1152),
        (300, [17024, 80], 384),
        (2100, [144, 272], 128),
    ],
)
def test_linears(kernels, mode, m, rows, k, device):
    """Several linears in one call, whose blocks of rows end anywhere: each as by itself, the same bits twice, and a token's
    bits do not depend on the other tokens."""
    if k % (mode.hadamard or 32):
        pytest.skip("the rotation does not divide K")
    if device.type == "cpu" and (m > 64 or sum(rows) > 6000 or mode not in ON_LARGE_WEIGHTS):
        pytest.skip("on a CPU it is one linear after the other")
    parts = [make(Shape(m, n, k), mode, seed=n) for n in rows]
    x, g = parts[0][0], parts[0][3]
    weights = [kernels.prepare_weight(*weight) for _, weight, _, _ in parts]
    biases = [bias if i != 1 else None for i, (_, _, bias, _) in enumerate(parts)]

    def run(x):
        return kernels.linears(
            x, weights, biases, activations=mode.activations, hadamard=mode.hadamard, rule=mode.rule,
            input_global_scale=g, fp8=mode.fp8,
        )  # fmt: skip

    results, again = run(x), run(x)
    other = torch.full_like(x, float("nan"))
    other[-1] = x[-1]
    for i, y in enumerate(results):
        check(y, x, parts[i][1], biases[i], mode, g)
        assert torch.equal(y, again[i]) and torch.equal(y[-1], run(other)[i][-1])


@pytest.mark.parametrize("mode", MODES, ids=lambda m: m.id)
@pytest.mark.parametrize(
    "m, k",
    [
        (1, 1152),
        (7, 14336),
        (12, 384),
        (20, 96),
        (64, 14336),
        (70, 16896),
        (130, 640),
        (300, 14336),
        (2100, 128),
    ],
)
def test_up_is_what_pytorch_makes_of_silu_and_a_product(kernels, mode, m, k, device):
    """Columns of one tensor, as a fused gate and up have them, and tensors of their own, of any leading dimensions."""
    if k % (mode.hadamard or 32):
        pytest.skip("the rotation does not divide K")
    if device.type == "cpu" and m > 64:
        pytest.skip("on a CPU PyTorch makes it")
    _, weight, bias, g = make(Shape(m, 80, k), mode)
    prepared = kernels.prepare_weight(*weight)
    both = (torch.randn(m, 2 * k) * torch.rand(m, 1).mul(4).exp2()).to(bias.dtype)
    both[0, :8], both[-1, :4] = -60, 120
    gate, up = both.chunk(2, -1)
    want = call(kernels, torch.nn.functional.silu(gate) * up, prepared, bias, mode, g)
    arguments = {
        "activations": mode.activations, "hadamard": mode.hadamard, "rule": mode.rule, "input_global_scale": g,
        "fp8": mode.fp8,
    }  # fmt: skip
    own = [x.contiguous().view(1, m, k) for x in (gate, up)]
    unlike = [gate, up.contiguous()]  # each with a stride of its own
    for x, other in ((gate, up), own, unlike):
        y = kernels.linear(x, *prepared, bias, up=other, **arguments)
        assert y.shape == (*x.shape[:-1], 80) and torch.equal(y.view(m, 80), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_silu_of_every_value(kernels, dtype):
    """Times a weight that is 1 on the diagonal and 0 elsewhere: its results are the tokens themselves."""
    gate = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).view(128, 512)
    gate = torch.where(gate.isfinite(), gate, 0)
    codes = 2 * torch.eye(512, dtype=torch.uint8)  # of 1.0
    scale = torch.ones(512, 32).to(torch.float8_e4m3fn)
    prepared = kernels.prepare_weight(codes[:, ::2] | codes[:, 1::2] << 4, scale, torch.ones(1))
    y = kernels.linear(gate, *prepared, up=torch.ones_like(gate), activations="bf16")
    assert torch.equal(y, torch.nn.functional.silu(gate))


def test_up_unlike_x_is_refused(kernels):
    x = torch.randn(3, 512, dtype=torch.bfloat16)
    prepared = kernels.prepare_weight(*ref.random_weight(64, 512, "nvfp4"))
    for up in (x[:2], x.half()):
        with pytest.raises(ValueError, match="up must be as x"):
            kernels.linear(x, *prepared, up=up)


def test_linears_that_cannot_be_one_call_are_refused(kernels):
    if kernels.backend_of(torch.get_default_device()) != "cuda":
        pytest.skip("CUDA kernels only")
    x = torch.randn(3, 512, dtype=torch.bfloat16)
    weights = [
        kernels.prepare_weight(*ref.random_weight(64, k, f))
        for k, f in ((512, "nvfp4"), (512, "mxfp4"), (256, "nvfp4"))
    ]
    for other in weights[1:]:
        with pytest.raises(RuntimeError, match="one format, in_features and device"):
            kernels.linears(x, [weights[0], other], [None, None])
    with pytest.raises(RuntimeError, match="1 to 3 linears"):
        kernels.linears(x, weights[:1] * 4, [None] * 4)


@pytest.mark.parametrize("mode", [MODES[2], MODES[8], MODES[0]], ids=lambda m: m.id)
@pytest.mark.parametrize("m", [1, 16, 20, 64, 200])
def test_graph_and_streams(kernels, mode, m):
    if device_of(kernels) == "cpu":
        pytest.skip("needs a GPU")
    x, weight, bias, g = make(Shape(m, 512, 1024), mode)
    prepared = kernels.prepare_weight(*weight)
    y = call(kernels, x, prepared, bias, mode, g)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(kernels, x, prepared, bias, mode, g)
        again = call(kernels, x, prepared, bias, mode, g)
    graph.replay()
    assert torch.equal(captured, y) and torch.equal(again, y)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(4)]
    outs = []
    for i in range(32):
        with torch.cuda.stream(streams[i % 4]):
            outs.append(call(kernels, x, prepared, bias, mode, g))
    torch.cuda.synchronize()
    assert all(torch.equal(o, y) for o in outs)


@pytest.mark.parametrize(
    "m, n, k", [(20, 640, 4096), (64, 4096, 4096), (100, 640, 4096), (100, 17024, 320), (300, 17024, 448)]
)
def test_streamed_sums_in_graphs_and_on_streams(kernels, m, n, k):
    """Blocks that hand sums on: a replayed graph, and products at the same time, which have sums of their own."""
    if kernels.backend_of(torch.get_default_device()) != "cuda":
        pytest.skip("CUDA kernels only")
    mode = Mode("nvfp4", "bf16", None)
    x, weight, bias, _ = make(Shape(m, n, k), mode)
    prepared = kernels.prepare_weight(*weight)
    tokens = kernels.prepare_activation(x, format="nvfp4", activations="bf16")

    def streamed():
        return product(kernels, tokens, prepared, bias, m, x.dtype, 200)

    y = streamed()
    check(y, x, weight, bias, mode, None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [streamed(), streamed()]
    for _ in range(5):
        for out in captured:
            out.fill_(float("nan"))
        graph.replay()
        assert all(torch.equal(out, y) for out in captured)
    torch.cuda.synchronize()
    streams, outs = [torch.cuda.Stream() for _ in range(4)], []
    for i in range(32):
        with torch.cuda.stream(streams[i % 4]):
            outs.append(streamed())
    torch.cuda.synchronize()
    assert all(torch.equal(out, y) for out in outs)


@pytest.mark.parametrize("mode", [MODES[2], MODES[8]], ids=lambda m: m.id)
def test_compile_fullgraph(kernels, mode):
    x, weight, bias, g = make(Shape(9, 256, 512), mode)
    prepared = kernels.prepare_weight(*weight)

    def two(x):
        return call(kernels, x, prepared, bias, mode, g) * 2

    assert torch.equal(torch.compile(two, fullgraph=True, backend="aot_eager")(x), two(x))


def test_compile_linears_of_many_tokens(kernels):
    """Where one product is made for all of them, of whose columns results are parts."""
    mode = Mode("mxfp4", "fp4", 32)
    x, weight, bias, _ = make(Shape(2100, 144, 128), mode)
    prepared = kernels.prepare_weight(*weight)

    def both(x):
        gate, up = kernels.linears(x, [prepared] * 2, [bias, None], activations="fp4", hadamard=32)
        return gate * up

    assert torch.equal(torch.compile(both, fullgraph=True, backend="aot_eager")(x), both(x))


def test_errors_say_what_to_do(kernels):
    x = torch.randn(2, 64, dtype=torch.bfloat16)
    weight = ref.random_weight(64, 64, "nvfp4")
    with pytest.raises(ValueError, match="nvfp4 weights need weight_global_scale"):
        kernels.prepare_weight(*weight[:2])
    with pytest.raises(ValueError, match="must be one of .* for nvfp4"):
        kernels.rotate_quantize(x, format="nvfp4", rule="hessian")
    with pytest.raises(ValueError, match="divides in_features 64"):
        kernels.rotate_quantize(x, format="nvfp4", hadamard=128)


def test_fp8_exact_finds_far_blocks(kernels):
    weight, scale, _ = ref.random_weight(64, 256, "mxfp4")
    assert kernels.fp8_exact(weight, scale)
    scale[5, 3] = 118 - 15
    scale[5, 0] = 118
    assert not kernels.fp8_exact(weight, scale)
    weight[5, 3 * 16 : 4 * 16] = 0x80
    assert kernels.fp8_exact(weight, scale)
