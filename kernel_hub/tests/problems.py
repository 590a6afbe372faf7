"""One list of problem shapes for tests and benchmarks."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    m: int  # tokens
    n: int  # out_features
    k: int  # in_features

    @property
    def id(self) -> str:
        return f"m{self.m}_n{self.n}_k{self.k}"


@dataclass(frozen=True)
class Mode:
    """What a linear does with its tokens."""

    format: str
    activations: str
    hadamard: int | None
    rule: str = "absmax"
    static: bool = True  # nvfp4 W4A4: input_global_scale given
    fp8: bool = True
    dtype: str = "bfloat16"

    @property
    def id(self) -> str:
        extra = ("" if self.static else "_pertoken") + ("" if self.fp8 else "_nofp8")
        return f"{self.format}_a{self.activations}_h{self.hadamard}_{self.rule}{extra}_{self.dtype}"


# Decode sizes, odd M, every token tile, tails of N (multiple of 16, not of 64 or 128) and of K.
SHAPES = [
    Shape(1, 256, 256),
    Shape(1, 4096, 4096),
    Shape(2, 528, 96),
    Shape(2, 17024, 640),
    Shape(3, 208, 384),
    Shape(7, 1040, 1152),
    Shape(8, 128, 14336),
    Shape(5, 16656, 512),
    Shape(13, 528, 640),
    Shape(14, 16656, 320),
    Shape(16, 6144, 4096),
    Shape(17, 80, 128),
    Shape(31, 272, 896),
    Shape(32, 4112, 1152),
    Shape(33, 208, 256),
    Shape(48, 17024, 384),
    Shape(63, 1024, 2048),
    Shape(64, 528, 640),
    Shape(65, 384, 1152),
    Shape(128, 2048, 1024),
    Shape(128, 17024, 320),  # more row blocks than multiprocessors: some take two
    Shape(129, 336, 512),
    Shape(257, 576, 1536),
    Shape(515, 1040, 2176),
    Shape(300, 17024, 320),
]


@dataclass(frozen=True)
class ExpertShape:
    """One matrix of all experts of a layer."""

    counts: tuple[int, ...]  # rows of each expert
    absent: int  # rows of no expert, after them
    tokens: int  # that the rows are gathered from
    n: int
    k: int

    @property
    def rows(self) -> int:
        return sum(self.counts) + self.absent

    @property
    def id(self) -> str:
        return f"e{len(self.counts)}_r{self.rows}_n{self.n}_k{self.k}"


# Experts without rows, with one, with less and more than every tile; none at all; more experts than a warp takes at once.
EXPERT_SHAPES = [
    ExpertShape((0, 1, 18, 0, 3), 2, 9, 80, 256),
    ExpertShape((0, 0, 0), 5, 3, 48, 128),
    ExpertShape((1,) * 8, 0, 1, 1536, 2048),
    ExpertShape((0, 2) * 70 + (1, 17, 8, 9, 16), 1, 16, 528, 640),
    ExpertShape((33, 0, 64, 65, 31, 32, 128, 129, 1), 0, 100, 336, 1152),
    ExpertShape((300, 7), 40, 150, 144, 96),
    ExpertShape((0,) * 260 + (5, 40), 0, 20, 272, 384),
]


# Values of grouped_linear's `tile`: rows of one expert that a block multiplies at a time.
EXPERT_TILES = [8, 16, 32, 96]


MODES = [
    Mode("nvfp4", "bf16", None),
    Mode("nvfp4", "bf16", 16, dtype="float16"),
    Mode("nvfp4", "fp4", 16, rule="mse"),
    Mode("nvfp4", "fp4", 128, rule="four_over_six"),
    Mode("nvfp4", "fp4", None, static=False, dtype="float16"),
    Mode("nvfp4", "fp4", 64, rule="mse", static=False),
    Mode("mxfp4", "bf16", None),
    Mode("mxfp4", "bf16", 64, dtype="float16"),
    Mode("mxfp4", "fp4", 32),
    Mode("mxfp4", "fp4", 128, rule="mse"),
    Mode("mxfp4", "fp4", 32, rule="mse", fp8=False),
    Mode("mxfp4", "fp4", None, dtype="float16"),
]

# On a CPU only.
FLOAT32_MODES = [
    Mode("nvfp4", "bf16", None, dtype="float32"),
    Mode("nvfp4", "fp4", 16, dtype="float32"),
    Mode("mxfp4", "bf16", 32, dtype="float32"),
    Mode("mxfp4", "fp4", 32, rule="mse", dtype="float32"),
]

# The four linears of one Llama-3.1-8B layer (q, k, v and gate, up fused).
# Layers of Llama-3.1-8B: rows of the linears that have the same input, and in_features.
LLAMA_8B_LINEARS = {"qkv": (4096, 1024, 1024), "o": (4096,), "gate_up": (14336, 14336), "down": (4096,)}
LLAMA_8B = {name: (sum(n), 14336 if name == "down" else 4096) for name, n in LLAMA_8B_LINEARS.items()}

# Error of a result against FP32 may be at most twice eager's plus this, relative to the norm of the result.
FLOORS = {"bfloat16": 1e-3, "float16": 2e-4, "float32": 1e-6}


# Values of prepared_gemm's `split` for more than 16 tokens, or E4M3 (see GemmProblem::split in fp4_kernels.h). 0, its own choice,
# is left out.
DIVISIONS = [1, 2, 3, 4, 8, 200]


def variants(m: int) -> list[int]:
    """The same for m tokens of 16 bit."""
    return [1, 2, 3, 4] if m <= 8 else [1, 2, 3] if m <= 16 else DIVISIONS


def choices(m: int, format: str) -> list[int]:
    """Ways to multiply m tokens, as 1000 * operand (OPERANDS in _cuda.py) + `split`."""
    if format == "nvfp4":
        return variants(m)
    e4m3 = [3000 + division for division in [0, *DIVISIONS]]
    library = [4000] if m >= 256 else []
    return e4m3 + library + variants(m)
