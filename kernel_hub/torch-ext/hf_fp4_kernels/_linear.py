"""The public functions: checks in one place, then what the device's backend has for them."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from . import _blackwell, _cpu, _triton
from ._cuda import FORMATS, OPERANDS, RULES, TILE_BYTES, is_compiled
from ._ops import ops

_ALLOWED_RULES = {"nvfp4": ("absmax", "four_over_six", "mse"), "mxfp4": ("absmax", "mse")}
_GROUPS = {"nvfp4": 16, "mxfp4": 32}
# Torch 2.11 brings Triton 3.6, the first that the Blackwell kernel was compiled with.
_FP4_TENSOR_CORES = torch.__version__ >= (2, 11)


class PreparedWeight(NamedTuple):
    """A weight as the kernels read it. `packed` has two dimensions for the Triton kernels, three for all others, and one more
    in front for the experts of a layer, as `row_scale`."""

    packed: torch.Tensor  # uint8
    row_scale: torch.Tensor  # float32 [N], what a row's results are multiplied by


class PreparedTokens(NamedTuple):
    """Rotated (and quantized) tokens, to be shared by linears that have the same input and rotation."""

    tokens: torch.Tensor
    token_scale: torch.Tensor  # float32 [M], [1] or [0] (none), a multiplier
    shape: tuple[int, ...]  # of the input without its last dimension
    dtype: torch.dtype  # of the results
    operand: str  # what they are multiplied in: "bf16", "fp16", "fp32", "e4m3" or "fp4"
    backend: str  # whose they are
    block_scale: torch.Tensor | None = None  # "fp4": float8_e4m3fn [M, K/16] or uint8 [M, K/32]


class _Quantization(NamedTuple):
    """What becomes of tokens. Checked, and in the ops' integers."""

    global_scale: torch.Tensor | None
    format: int
    quantize: bool
    hadamard: int
    rule: int
    operand: str  # of the CUDA kernels


def backend_of(device: torch.device | int | None = None) -> str:
    """ "cuda", "blackwell" or "triton" on a GPU, "cpu" on a CPU: what runs there. RuntimeError if nothing does.

    "cpu" is the CPU build of the package alone; the environment variable HF_FP4_CPU_ISA may name its instruction set.
    "blackwell" (compute capability 10.x and 12.0) multiplies W4A4 on FP4 tensor cores, not run on such hardware so far; its
    weights, and W4A16, are those of "triton".
    """
    backend = _backend_on(device)
    if backend == "cpu":
        ops.cpu_isa()  # which refuses an HF_FP4_CPU_ISA that this processor has not
    return backend


def fast_dtype(device: torch.device) -> torch.dtype:
    """In what a large product of bf16 matrices takes least time in PyTorch: bf16, or float32 on a CPU that multiplies bf16 slowly.

    Intel's take as long for a product of bf16 pairs as for four of floats, unless they have AMX.
    """
    if device.type != "cpu" or torch.cpu._is_amx_tile_supported():
        return torch.bfloat16
    return torch.bfloat16 if ops.cpu_isa() == "avx512_bf16" else torch.float32


def _backend_on(device: torch.device | int | None) -> str:
    if isinstance(device, torch.device) and device.type == "cpu" and _cpu.is_compiled():
        return "cpu"
    capability = torch.cuda.get_device_capability(device)
    if capability == (9, 0) and is_compiled():
        return "cuda"
    # Not 12.1: Triton 3.6 multiplies mxfp4 in bf16 there, and does not compile nvfp4.
    if _FP4_TENSOR_CORES and (capability[0] == 10 or capability == (12, 0)):
        return "blackwell"
    if capability >= (8, 0):
        return "triton"
    raise RuntimeError(
        f"hf_fp4_kernels needs compute capability 8.0 or newer, this GPU has {capability[0]}.{capability[1]}"
    )


def _backend_of_weight(packed: torch.Tensor) -> str:
    """By its layout first: a weight in Triton's also runs where the CUDA kernels would have prepared another."""
    if packed.dim() == 3:
        return "cpu" if packed.shape[2] in _cpu.TILE_BYTES.values() else "cuda"
    return "blackwell" if _backend_on(packed.device) == "blackwell" else "triton"


def _cuda_tokens(x: torch.Tensor, q: _Quantization) -> PreparedTokens:
    tokens, token_scale = ops.prepare_activation(
        x, q.global_scale, q.format, OPERANDS[q.operand], q.quantize, q.hadamard, q.rule
    )
    return PreparedTokens(tokens, token_scale, tuple(x.shape[:-1]), x.dtype, q.operand, "cuda")


def _cuda_gemm(prepared, packed, row_scale, bias):
    m = 1
    for size in prepared.shape:
        m *= size
    return ops.prepared_gemm(
        prepared.tokens, prepared.token_scale, packed, row_scale, bias, m, OPERANDS[prepared.operand],
        prepared.dtype == torch.bfloat16, 0,
    )  # fmt: skip


def _cuda_linears(x, q, packed, row_scale, bias):
    results = ops.prepared_linears(
        x, packed, row_scale, bias, q.global_scale, OPERANDS[q.operand], q.quantize, q.hadamard, q.rule
    )
    if len(results) == len(packed):
        return results
    return results[0].split([scale.shape[0] for scale in row_scale], -1)  # one product for all of them


def _cuda_linear(x, q, packed, row_scale, bias):
    return _cuda_linears(x, q, [packed], [row_scale], [bias])[0]


def _cuda_grouped_linear(x, q, gated, index, offsets, packed, row_scale, bias):
    return ops.grouped_linear(
        x, offsets, index, packed, row_scale, bias, q.global_scale, OPERANDS[q.operand], q.quantize, q.hadamard,
        q.rule, gated, 0,
    )  # fmt: skip


def _triton_grouped_linear(x, q, gated, index, offsets, packed, row_scale, bias):
    if gated:
        gate, up = x.chunk(2, -1)
        x = torch.nn.functional.silu(gate) * up
    tokens, token_scale = _triton.ops_prepare_activation(
        x, q.global_scale, q.format, q.quantize, q.hadamard, q.rule
    )
    return _triton.ops_grouped_gemm(
        tokens, token_scale, index, offsets, packed, row_scale, bias, x.dtype == torch.bfloat16
    )


def _triton_tokens(x: torch.Tensor, q: _Quantization) -> PreparedTokens:
    tokens, token_scale = _triton.ops_prepare_activation(
        x, q.global_scale, q.format, q.quantize, q.hadamard, q.rule
    )
    operand = "bf16" if tokens.dtype == torch.bfloat16 else "fp16"
    return PreparedTokens(tokens, token_scale, tuple(x.shape[:-1]), x.dtype, operand, "triton")


def _triton_gemm(prepared, packed, row_scale, bias):
    return _triton.ops_gemm(
        prepared.tokens, prepared.token_scale, packed, row_scale, bias, prepared.dtype == torch.bfloat16
    )


def _triton_linear(x, q, packed, row_scale, bias):
    return _triton.ops_linear(
        x, packed, row_scale, bias, q.global_scale, q.format, q.quantize, q.hadamard, q.rule
    )


def _blackwell_tokens(x: torch.Tensor, q: _Quantization) -> PreparedTokens:
    if not q.quantize:
        return _triton_tokens(x, q)
    codes, block_scale, token_scale = _triton.ops_rotate_quantize(
        x, q.global_scale, q.format, q.hadamard, q.rule
    )
    return PreparedTokens(codes, token_scale, tuple(x.shape[:-1]), x.dtype, "fp4", "blackwell", block_scale)


def _blackwell_gemm(prepared, packed, row_scale, bias):
    return _blackwell.ops_gemm(
        prepared.tokens, prepared.block_scale, prepared.token_scale, packed, row_scale, bias,
        prepared.dtype == torch.bfloat16,
    )  # fmt: skip


def _blackwell_linear(x, q, packed, row_scale, bias):
    return gemm(_blackwell_tokens(x, q), packed, row_scale, bias)


def _cpu_input(x: torch.Tensor) -> torch.Tensor:
    return x.float() if x.dtype == torch.float16 else x


def _cpu_rotate_quantize(x, global_scale, format, hadamard, rule):
    return ops.cpu_rotate_quantize(_cpu_input(x), global_scale, format, hadamard, rule)


def _cpu_fake_quantize(x, global_scale, format, quantize, hadamard, rule):
    values, multiplier = ops.cpu_prepare_activation(
        _cpu_input(x), global_scale, format, quantize, hadamard, rule
    )
    return values[:, : x.shape[-1]].to(torch.bfloat16 if quantize else x.dtype).contiguous(), multiplier


def _cpu_tokens(x: torch.Tensor, q: _Quantization) -> PreparedTokens:
    tokens, token_scale = ops.cpu_prepare_activation(
        _cpu_input(x), q.global_scale, q.format, q.quantize, q.hadamard, q.rule
    )
    operand = "bf16" if tokens.dtype == torch.bfloat16 else "fp32"
    return PreparedTokens(tokens, token_scale, tuple(x.shape[:-1]), x.dtype, operand, "cpu")


def _cpu_gemm(prepared, packed, row_scale, bias):
    bias = None if bias is None else _cpu_input(bias)
    y = ops.cpu_gemm(
        prepared.tokens, prepared.token_scale, packed, row_scale, bias, prepared.dtype == torch.bfloat16
    )
    return y.to(prepared.dtype)


def _cpu_linear(x, q, packed, row_scale, bias):
    y = ops.cpu_linear(
        _cpu_input(x), packed, row_scale, None if bias is None else _cpu_input(bias), q.global_scale, q.quantize,
        q.hadamard, q.rule,
    )  # fmt: skip
    return y.to(x.dtype)


def _cpu_linears(x, q, packed, row_scale, biases):
    weights = zip(packed, row_scale, biases, strict=True)
    if len(packed) == 1 or not (q.quantize or q.hadamard):  # there is nothing to share
        return [_cpu_linear(x, q, *weight) for weight in weights]
    tokens = _cpu_tokens(x, q)
    return [_cpu_gemm(tokens, *weight) for weight in weights]


class _Backend(NamedTuple):
    """What a backend does once the arguments are checked."""

    prepare_weight: Callable  # weight, weight_scale, weight_global_scale -> packed, row_scale
    rotate_quantize: Callable  # x, global_scale, format, hadamard, rule -> codes, block scales, token_scale
    fake_quantize: Callable  # x, global_scale, format, quantize, hadamard, rule -> values, token_scale
    prepare_activation: Callable[[torch.Tensor, _Quantization], PreparedTokens]
    gemm: Callable  # PreparedTokens, packed, row_scale, bias -> [M, N]
    linear: Callable  # x, _Quantization, packed, row_scale, bias -> [M, N], or as x
    # weight, weight_scale, weight_global_scale of all experts -> packed, row_scale
    prepare_experts: Callable = _triton.prepare_experts
    linears: Callable | None = None  # as `linear`, of several weights in one call


_TRITON = _Backend(
    _triton.prepare_weight,
    _triton.ops_rotate_quantize,
    _triton.ops_prepare_activation,
    _triton_tokens,
    _triton_gemm,
    _triton_linear,
)
_BACKENDS = {
    # The compiled ops are looked up when called: a variant that has none still imports.
    "cuda": _Backend(
        lambda *arguments: ops.prepare_weight(*arguments),
        lambda *arguments: ops.rotate_quantize(*arguments),
        lambda *arguments: ops.fake_quantize(*arguments),
        _cuda_tokens,
        _cuda_gemm,
        _cuda_linear,
        lambda *arguments: ops.prepare_weight(*arguments),
        _cuda_linears,
    ),
    "triton": _TRITON,
    "blackwell": _TRITON._replace(
        prepare_activation=_blackwell_tokens, gemm=_blackwell_gemm, linear=_blackwell_linear
    ),
    "cpu": _Backend(
        lambda *arguments: ops.cpu_prepare_weight(*arguments),
        _cpu_rotate_quantize,
        _cpu_fake_quantize,
        _cpu_tokens,
        _cpu_gemm,
        _cpu_linear,
        linears=_cpu_linears,
    ),
}


def _format_of_scale(weight_scale: torch.Tensor) -> str:
    if weight_scale.dtype == torch.float8_e4m3fn:
        return "nvfp4"
    if weight_scale.dtype == torch.uint8:
        return "mxfp4"
    raise ValueError(f"weight_scale must be float8_e4m3fn (nvfp4) or uint8 (mxfp4), got {weight_scale.dtype}")


def _format_of_packed(packed: torch.Tensor, row_scale: torch.Tensor, in_features: int) -> str:
    if packed.dim() == row_scale.dim() + 2:
        return "nvfp4" if packed.shape[-1] in (TILE_BYTES["nvfp4"], _cpu.TILE_BYTES["nvfp4"]) else "mxfp4"
    return "nvfp4" if packed.shape[-1] == in_features // 2 + in_features // 16 else "mxfp4"


def _check_rule(format: str, rule: str) -> None:
    if format not in FORMATS:
        raise ValueError(f"format must be 'nvfp4' or 'mxfp4', got {format!r}")
    if rule not in _ALLOWED_RULES[format]:
        raise ValueError(f"rule must be one of {_ALLOWED_RULES[format]} for {format}, got {rule!r}")


def _check_activation(x: torch.Tensor, format: str, hadamard: int | None) -> None:
    if x.dtype not in (torch.bfloat16, torch.float16) and (x.dtype, x.device.type) != (torch.float32, "cpu"):
        raise ValueError(f"x must be bfloat16 or float16, or float32 on a CPU, got {x.dtype} on {x.device}")
    k = x.shape[-1]
    if k % _GROUPS[format]:
        raise ValueError(f"in_features must be a multiple of {_GROUPS[format]} for {format}, got {k}")
    if hadamard is not None and (hadamard not in (16, 32, 64, 128) or k % hadamard):
        raise ValueError(
            f"hadamard must be None or one of 16, 32, 64, 128 that divides in_features {k}, got {hadamard}"
        )


def _check_weight(weight, weight_scale, weight_global_scale):
    """Of a stored weight [N, K/2], or of one for each expert [E, N, K/2]."""
    format = _format_of_scale(weight_scale)
    n, k = weight.shape[-2], weight.shape[-1] * 2
    if n % 16 or k % _GROUPS[format]:
        experts = "E, " * (weight.dim() == 3)
        raise ValueError(
            f"weight must be [{experts}multiple of 16, multiple of {_GROUPS[format]}] for {format}, got {n} x {k}"
        )
    if format == "nvfp4" and weight_global_scale is None:
        raise ValueError("nvfp4 weights need weight_global_scale, got None")


def prepare_weight(
    weight: torch.Tensor, weight_scale: torch.Tensor, weight_global_scale: torch.Tensor | None = None
) -> PreparedWeight:
    """Re-lays out a stored weight for the kernels of its device. Once at load.

    weight: uint8 [N, K/2], low nibble = even k; N a multiple of 16.
    weight_scale: float8_e4m3fn [N, K/16] (nvfp4, not negative, finite) or uint8 E8M0 [N, K/32] (mxfp4).
    weight_global_scale: float32 [1], divisor (nvfp4) or None.
    """
    _check_weight(weight, weight_scale, weight_global_scale)
    backend = _BACKENDS[_backend_on(weight.device)]
    return PreparedWeight(
        *backend.prepare_weight(weight.contiguous(), weight_scale.contiguous(), weight_global_scale)
    )


def restore_weight(
    packed: torch.Tensor, row_scale: torch.Tensor, out_features: int, in_features: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse of `prepare_weight` and of `prepare_experts`: the stored `weight` and `weight_scale`, byte for byte."""
    if packed.dim() == row_scale.dim() + 1:
        return _triton.restore_weight(packed, in_features, _format_of_packed(packed, row_scale, in_features))
    if packed.shape[-1] in _cpu.TILE_BYTES.values():
        return ops.cpu_restore_weight(packed, out_features, in_features)
    return ops.restore_weight(packed, row_scale, out_features, in_features)


def fp8_exact(weight: torch.Tensor, weight_scale: torch.Tensor) -> bool:
    """Whether an mxfp4 weight expands to E4M3 without error: no block 2^15 or more below its row's largest.

    weight: uint8 [N, K/2]; weight_scale: uint8 [N, K/32]. Reads the result back, so call it at load, not in forward.
    """
    used = (weight.view(weight.shape[0], -1, 16) & 0x77).amax(-1) > 0
    below = weight_scale.amax(1, keepdim=True).int() - weight_scale.int()
    return not bool((used & (below > 14)).any())


def rotate_quantize(
    x: torch.Tensor,
    *,
    format: str,
    hadamard: int | None = None,
    rule: str = "absmax",
    input_global_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rotates and quantizes tokens to plain bytes: codes uint8 [M, K/2] (low nibble = even k), block scales
    float8_e4m3fn [M, K/16] or uint8 [M, K/32], and a multiplier float32 [1] or [M]: value = code * scale * multiplier.

    x: bf16, fp16 or (on a CPU) fp32 [..., K]. input_global_scale: float32 [1], divisor (nvfp4); None: per token.
    """
    _check_rule(format, rule)
    _check_activation(x, format, hadamard)
    return _BACKENDS[_backend_on(x.device)].rotate_quantize(
        x.contiguous(), input_global_scale, FORMATS[format], hadamard or 0, RULES[rule]
    )


def _quantization(
    x: torch.Tensor,
    format: str,
    activations: str,
    hadamard: int | None,
    rule: str,
    global_scale: torch.Tensor | None,
    fp8: bool,
) -> _Quantization:
    """The arguments of `prepare_activation`, checked."""
    _check_rule(format, rule)
    _check_activation(x, format, hadamard)
    if activations not in ("fp4", "bf16"):
        raise ValueError(f"activations must be 'fp4' or 'bf16', got {activations!r}")
    quantize = activations == "fp4"
    if x.dtype == torch.float32:
        operand = "fp32"
    elif not quantize:
        operand = "bf16" if x.dtype == torch.bfloat16 else "fp16"
    else:
        operand = "e4m3" if format == "mxfp4" and fp8 else "bf16"
    return _Quantization(global_scale, FORMATS[format], quantize, hadamard or 0, RULES[rule], operand)


def prepare_activation(
    x: torch.Tensor,
    *,
    format: str,
    activations: str = "fp4",
    hadamard: int | None = None,
    rule: str = "absmax",
    input_global_scale: torch.Tensor | None = None,
    fp8: bool = True,
) -> PreparedTokens:
    """Rotates (and for "fp4" quantizes) tokens once, for several linears with the same input: see `gemm`.

    x: bf16, fp16 or (on a CPU) fp32 [..., K]. activations: "fp4" or "bf16" (weight-only; the dtype of x).
    fp8: for mxfp4 W4A4, multiply in E4M3; the weight must be `fp8_exact`.
    """
    q = _quantization(x, format, activations, hadamard, rule, input_global_scale, fp8)
    return _BACKENDS[_backend_on(x.device)].prepare_activation(x.contiguous(), q)


def fake_quantize(
    x: torch.Tensor,
    *,
    format: str,
    activations: str = "fp4",
    hadamard: int | None = None,
    rule: str = "absmax",
    input_global_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotates (and for "fp4" quantizes) tokens and gives back what they stand for, to calibrate with.

    Returns code * block scale in bf16 [..., K], which is exact, and the multiplier that belongs to it: float32 [1], or [M]
    per token. For "bf16" the rotated values in the dtype of x, and an empty multiplier. Arguments: as `prepare_activation`.
    """
    q = _quantization(x, format, activations, hadamard, rule, input_global_scale, fp8=False)
    values, multiplier = _BACKENDS[_backend_on(x.device)].fake_quantize(
        x.contiguous(), q.global_scale, q.format, q.quantize, q.hadamard, q.rule
    )
    return values.view(x.shape), multiplier


def gemm(
    prepared: PreparedTokens, packed: torch.Tensor, row_scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """tokens x weight^T + bias: [..., N] in the dtype of the tokens' input. Same weight format as the tokens' `format`."""
    y = _BACKENDS[prepared.backend].gemm(prepared, packed, row_scale, bias)
    return y.view(*prepared.shape, row_scale.shape[0])


def linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    row_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activations: str = "fp4",
    hadamard: int | None = None,
    rule: str = "absmax",
    input_global_scale: torch.Tensor | None = None,
    fp8: bool = True,
) -> torch.Tensor:
    """y = quantize(rotate(x)) x weight^T + bias, [..., N] in the dtype of x, FP32 accumulation.

    x: bf16, fp16 or (on a CPU) fp32 [..., K]; packed, row_scale: from `prepare_weight`; bias: [N] in the dtype of x.
    activations: "fp4" (W4A4) or "bf16" (W4A16). hadamard: None, 16, 32, 64 or 128.
    rule: which block scales: "absmax"; "four_over_six" (nvfp4), the better of absmax/6 and absmax/4; "mse", the best of those
        and the E4M3 number under absmax/6 (nvfp4), or the better of two exponents (mxfp4).
    input_global_scale: float32 [1], divisor, nvfp4 W4A4; None: per token.
    fp8: False where `fp8_exact` said so (mxfp4 W4A4): multiply in bf16 instead of E4M3.
    """
    format = _format_of_packed(packed, row_scale, x.shape[-1])
    q = _quantization(x, format, activations, hadamard, rule, input_global_scale, fp8)
    y = _BACKENDS[_backend_of_weight(packed)].linear(x.contiguous(), q, packed, row_scale, bias)
    return y.view(*x.shape[:-1], row_scale.shape[0])


def linears(
    x: torch.Tensor,
    weights: Sequence[tuple[torch.Tensor, torch.Tensor]],
    biases: Sequence[torch.Tensor | None],
    *,
    activations: str = "fp4",
    hadamard: int | None = None,
    rule: str = "absmax",
    input_global_scale: torch.Tensor | None = None,
    fp8: bool = True,
) -> list[torch.Tensor]:
    """`linear` with one to three weights of one format and in_features: x is rotated and quantized once, and the CUDA kernels
    take one launch for all.

    weights: what `prepare_weight` gave for each; biases: one for each. Others: as `linear`. Sums may be added up in another
    order than `linear` has for one of the weights. Results may be parts of the columns of one tensor.
    """
    packed, row_scale = ([weight[i] for weight in weights] for i in (0, 1))
    format = _format_of_packed(packed[0], row_scale[0], x.shape[-1])
    q = _quantization(x, format, activations, hadamard, rule, input_global_scale, fp8)
    backend = _BACKENDS[_backend_of_weight(packed[0])]
    if backend.linears is not None:
        results = backend.linears(x.contiguous(), q, packed, row_scale, list(biases))
        return [y.view(*x.shape[:-1], y.shape[-1]) for y in results]
    tokens = backend.prepare_activation(x.contiguous(), q)
    return [gemm(tokens, *weight, bias) for weight, bias in zip(weights, biases, strict=True)]


def prepare_experts(
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_global_scale: torch.Tensor | None = None,
    *,
    by_row: bool = False,
) -> PreparedWeight:
    """Re-lays out one matrix of all experts for `grouped_linear`. Once at load.

    weight: uint8 [E, N, K/2], low nibble = even k; N a multiple of 16.
    weight_scale: float8_e4m3fn [E, N, K/16] (nvfp4, not negative, finite) or uint8 E8M0 [E, N, K/32] (mxfp4).
    weight_global_scale: float32 [E], divisors (nvfp4) or None.
    by_row: one row after the other, its scales behind its codes, as the Triton kernels have them on every GPU: for callers
        that need views of any rows. The CUDA kernels' tiles are faster.

    Returns packed uint8 [E, ...], for each expert what `prepare_weight` gives, and row_scale float32 [E, N].
    """
    _check_weight(weight, weight_scale, weight_global_scale)
    prepare = _triton.prepare_experts if by_row else _BACKENDS[_backend_on(weight.device)].prepare_experts
    if weight_global_scale is not None:
        weight_global_scale = weight_global_scale.float().contiguous()
    return PreparedWeight(*prepare(weight.contiguous(), weight_scale.contiguous(), weight_global_scale))


def grouped_linear(
    x: torch.Tensor,
    offsets: torch.Tensor,
    packed: torch.Tensor,
    row_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    index: torch.Tensor | None = None,
    activations: str = "fp4",
    hadamard: int | None = None,
    rule: str = "absmax",
    input_global_scale: torch.Tensor | None = None,
    gated: bool = False,
) -> torch.Tensor:
    """One linear of all experts of a layer, each on its rows: [S, N] in the dtype of x, FP32 accumulation.

    x: bf16 or fp16 [T, K]; rotated and quantized once per token, however many experts it goes to.
    index: int64 or int32 [S], the token that each row is, rows sorted by expert; None: S = T, the tokens as they are.
    offsets: int64 or int32 [E + 1], where each expert's rows start; rows after the last are zeros in the result.
    packed, row_scale: from `prepare_experts`; bias: [E, N] in the dtype of x. Others: as `linear`.
    gated: x is [T, 2 K], gate and up of an MLP, and the tokens are silu(x[:, :K]) * x[:, K:], as PyTorch rounds them.

    The launches depend on shapes only, so a CUDA graph of it takes any routing.
    """
    k = x.shape[-1] // 2 if gated else x.shape[-1]
    format = _format_of_packed(packed, row_scale, k)
    q = _quantization(x[..., :k], format, activations, hadamard, rule, input_global_scale, fp8=False)
    if offsets.shape[0] != packed.shape[0] + 1:
        raise ValueError(
            f"offsets must be [{packed.shape[0] + 1}] for {packed.shape[0]} experts, got {list(offsets.shape)}"
        )
    run = _cuda_grouped_linear if packed.dim() == 4 else _triton_grouped_linear
    return run(x.contiguous(), q, gated, index, offsets, packed, row_scale, bias)
