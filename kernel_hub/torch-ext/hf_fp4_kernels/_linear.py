"""The public functions: checks in one place, then what the device's backend has for them."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from . import _cpu, _triton
from ._backends import (
    BACKENDS,
    PreparedTokens,
    Quantization,
    backend_of_weight,
    backend_on,
    cuda_grouped_linear,
    input_of,
    triton_grouped_linear,
)
from ._cuda import FORMATS, RULES, TILE_BYTES
from ._ops import ops

_ALLOWED_RULES = {"nvfp4": ("absmax", "four_over_six", "mse"), "mxfp4": ("absmax", "mse")}
_GROUPS = {"nvfp4": 16, "mxfp4": 32}


class PreparedWeight(NamedTuple):
    """A weight as the kernels read it. `packed` has two dimensions for the Triton kernels, three for all others, and one more
    in front for the experts of a layer, as `row_scale`."""

    packed: torch.Tensor  # uint8
    row_scale: torch.Tensor  # float32 [N], what a row's results are multiplied by


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


def _shaped(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A result [M, N], or of the shape already that x leads to."""
    return y if y.dim() == x.dim() else y.view(*x.shape[:-1], y.shape[-1])


def _check_up(x: torch.Tensor, up: torch.Tensor | None) -> None:
    if up is not None and (up.shape, up.dtype, up.device) != (x.shape, x.dtype, x.device):
        expected, got = (f"{t.dtype} {list(t.shape)} on {t.device}" for t in (x, up))
        raise ValueError(f"up must be as x, {expected}, got {got}")


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
    backend = BACKENDS[backend_on(weight.device)]
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
    return BACKENDS[backend_on(x.device)].rotate_quantize(
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
) -> Quantization:
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
    return Quantization(global_scale, FORMATS[format], quantize, hadamard or 0, RULES[rule], operand)


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
    return BACKENDS[backend_on(x.device)].prepare_activation(x.contiguous(), q)


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
    values, multiplier = BACKENDS[backend_on(x.device)].fake_quantize(
        x.contiguous(), q.global_scale, q.format, q.quantize, q.hadamard, q.rule
    )
    return values.view(x.shape), multiplier


def gemm(
    prepared: PreparedTokens, packed: torch.Tensor, row_scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """tokens x weight^T + bias: [..., N] in the dtype of the tokens' input. Same weight format as the tokens' `format`."""
    y = BACKENDS[prepared.backend].gemm(prepared, packed, row_scale, bias)
    return y.view(*prepared.shape, row_scale.shape[0])


def linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    row_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    up: torch.Tensor | None = None,
    activations: str = "fp4",
    hadamard: int | None = None,
    rule: str = "absmax",
    input_global_scale: torch.Tensor | None = None,
    fp8: bool = True,
) -> torch.Tensor:
    """y = quantize(rotate(x)) x weight^T + bias, [..., N] in the dtype of x, FP32 accumulation.

    x: bf16, fp16 or (on a CPU) fp32 [..., K]; packed, row_scale: from `prepare_weight`; bias: [N] in the dtype of x.
    up: as x, which is then the gate of an MLP: silu(x) * up, as PyTorch rounds it, takes its place. The CUDA kernels read both
        once, and also where they are columns of one tensor.
    activations: "fp4" (W4A4) or "bf16" (W4A16). hadamard: None, 16, 32, 64 or 128.
    rule: which block scales: "absmax"; "four_over_six" (nvfp4), the better of absmax/6 and absmax/4; "mse", the best of those
        and the E4M3 number under absmax/6 (nvfp4), or the better of two exponents (mxfp4).
    input_global_scale: float32 [1], divisor, nvfp4 W4A4; None: per token.
    fp8: False where `fp8_exact` said so (mxfp4 W4A4): multiply in bf16 instead of E4M3.
    """
    format = _format_of_packed(packed, row_scale, x.shape[-1])
    q = _quantization(x, format, activations, hadamard, rule, input_global_scale, fp8)
    _check_up(x, up)
    backend = BACKENDS[backend_of_weight(packed)]
    if up is None or backend.gated_linear is None:
        y = backend.linear(input_of(x, up), q, packed, row_scale, bias)
    else:
        y = backend.gated_linear(x, up, q, packed, row_scale, bias)
    return _shaped(y, x)


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
    backend = BACKENDS[backend_of_weight(packed[0])]
    if backend.linears is not None:
        results = backend.linears(x.contiguous(), q, packed, row_scale, list(biases))
        return [_shaped(y, x) for y in results]
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
    prepare = _triton.prepare_experts if by_row else BACKENDS[backend_on(weight.device)].prepare_experts
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
    up: torch.Tensor | None = None,
    index: torch.Tensor | None = None,
    activations: str = "fp4",
    hadamard: int | None = None,
    rule: str = "absmax",
    input_global_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """One linear of all experts of a layer, each on its rows: [S, N] in the dtype of x, FP32 accumulation.

    x: bf16 or fp16 [T, K]; rotated and quantized once per token, however many experts it goes to.
    index: int64 or int32 [S], the token that each row is, rows sorted by expert; None: S = T, the tokens as they are.
    offsets: int64 or int32 [E + 1], where each expert's rows start; rows after the last are zeros in the result.
    packed, row_scale: from `prepare_experts`; bias: [E, N] in the dtype of x. Others: as `linear`.

    The launches depend on shapes only, so a CUDA graph of it takes any routing.
    """
    format = _format_of_packed(packed, row_scale, x.shape[-1])
    q = _quantization(x, format, activations, hadamard, rule, input_global_scale, fp8=False)
    _check_up(x, up)
    if offsets.shape[0] != packed.shape[0] + 1:
        raise ValueError(
            f"offsets must be [{packed.shape[0] + 1}] for {packed.shape[0]} experts, got {list(offsets.shape)}"
        )
    run = cuda_grouped_linear if packed.dim() == 4 else triton_grouped_linear
    return run(x, up, q, index, offsets, packed, row_scale, bias)
