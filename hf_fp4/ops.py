"""The operators, declared once: schema, argument checks, fake implementation. Backends implement them, unchecked.

`hf_fp4::linear` is what `FP4Linear.forward` calls. `check_linear` runs once per layer when its buffers are set, not at
every call.
"""

from __future__ import annotations

import torch

from .formats import FP4Format
from .rotation import HADAMARD_SIZES

BROKEN = "the checkpoint is damaged or incomplete: download or quantize it again"
"""How refusals of a stored linear end."""

LIBRARY = torch.library.Library("hf_fp4", "DEF")
LIBRARY.define(
    "linear(Tensor x, Tensor weight, Tensor weight_scale, Tensor? weight_global_scale, Tensor? input_global_scale, "
    "Tensor? bias, str format, str? activation_scale_rule, int hadamard_size) -> Tensor"
)
LIBRARY.define(  # straight through the quantization of x: a linear with the dequantized weight
    "linear_input_gradient(Tensor gradient, Tensor weight, Tensor weight_scale, Tensor? weight_global_scale, "
    "str format, int hadamard_size) -> Tensor"
)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_global_scale: torch.Tensor | None,
    input_global_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    format: str,
    activation_scale_rule: str | None,
    hadamard_size: int,
) -> torch.Tensor:
    """``rotate(x) -> quantize (W4A4) -> x W^T + bias`` on a packed FP4 weight.

    Args:
        x: float [..., K], float32, bfloat16 or float16; the result has its dtype.
        weight: uint8 [N, K/2], low nibble = even k.
        weight_scale: [N, K/group_size], float8_e4m3fn (nvfp4) or uint8 E8M0 (mxfp4).
        weight_global_scale: float32 [1], divisor, nvfp4 only.
        input_global_scale: float32 [1], divisor of the activations, nvfp4 W4A4 only; None: one per token.
        bias: [N] or None.
        format: ``"nvfp4"`` or ``"mxfp4"``.
        activation_scale_rule: one of `scales.ACTIVATION_SCALE_RULES`; None: activations stay as they are (W4A16).
        hadamard_size: size of the block Hadamard rotation of x, 0 for none.

    Returns:
        [..., N] in the dtype of ``x``.
    """
    return torch.ops.hf_fp4.linear(
        x,
        weight,
        weight_scale,
        weight_global_scale,
        input_global_scale,
        bias,
        format,
        activation_scale_rule,
        hadamard_size,
    )


@torch.library.register_fake("hf_fp4::linear", lib=LIBRARY)
def _linear_fake(
    x,
    weight,
    weight_scale,
    weight_global_scale,
    input_global_scale,
    bias,
    format,
    activation_scale_rule,
    hadamard_size,
):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.register_fake("hf_fp4::linear_input_gradient", lib=LIBRARY)
def _linear_input_gradient_fake(gradient, weight, weight_scale, weight_global_scale, format, hadamard_size):
    return gradient.new_empty((*gradient.shape[:-1], 2 * weight.shape[1]))


def _save_for_backward(ctx, inputs, output):
    _, weight, weight_scale, weight_global_scale, _, _, format, _, hadamard_size = inputs
    ctx.save_for_backward(weight, weight_scale, weight_global_scale)
    ctx.format, ctx.hadamard_size = format, hadamard_size


def _linear_backward(ctx, gradient):
    x = torch.ops.hf_fp4.linear_input_gradient(gradient, *ctx.saved_tensors, ctx.format, ctx.hadamard_size)
    bias = gradient.reshape(-1, gradient.shape[-1]).sum(0) if ctx.needs_input_grad[5] else None
    return x, None, None, None, None, bias, None, None, None


torch.library.register_autograd(
    "hf_fp4::linear", _linear_backward, setup_context=_save_for_backward, lib=LIBRARY
)


def check_linear(
    name: str,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    global_scales: dict[str, torch.Tensor],
    format: FP4Format,
    hadamard_size: int | None,
) -> None:
    """Refuse a linear that cannot be right: misshapen, missing, zero, negative or non-finite scales.

    Args:
        name: the module's full name, for the error.
        weight: uint8 [N, K/2].
        weight_scale: [N, K/group_size].
        global_scales: buffer name -> float32 [1].
        format: the format.
        hadamard_size: None, 16, 32, 64 or 128.

    Raises:
        ValueError: names the tensor, what was expected and what came.
    """
    rows, in_features = weight.shape[0], weight.shape[1] * 2
    expected = (rows, in_features // format.group_size)
    if tuple(weight_scale.shape) != expected or weight_scale.dtype != format.scale_dtype:
        raise ValueError(
            f"{name}.weight_scale must be {format.scale_dtype} {list(expected)} for a {format.value} weight of "
            f"[{rows}, {in_features}], got {weight_scale.dtype} {list(weight_scale.shape)}; {BROKEN}"
        )
    if hadamard_size and (hadamard_size not in HADAMARD_SIZES or in_features % hadamard_size):
        raise ValueError(
            f"the Hadamard size of {name} must be one of {HADAMARD_SIZES} and divide in_features {in_features}, "
            f"got {hadamard_size}; {BROKEN}"
        )
    codes = weight_scale.view(torch.uint8)
    if format is FP4Format.NVFP4:
        bad = (codes == 0) | (codes >= 0x7F)  # zero, NaN and everything with a sign bit
    else:
        bad = codes == 255
    if bad.any():
        where = bad.nonzero()[0].tolist()
        raise ValueError(
            f"{name}.weight_scale holds {int(bad.sum())} zero, negative or NaN scales, the first at {where}; {BROKEN}"
        )
    if format.has_global_scale and "weight_global_scale" not in global_scales:
        raise ValueError(f"{name}.weight_global_scale is missing, {format.value} needs it; {BROKEN}")
    for buffer, value in global_scales.items():
        if value.numel() != 1 or value.dtype != torch.float32:
            raise ValueError(
                f"{name}.{buffer} must be float32 [1], got {value.dtype} {list(value.shape)}; {BROKEN}"
            )
        if not (torch.isfinite(value).all() and (value > 0).all()):
            raise ValueError(
                f"{name}.{buffer} must be a positive finite number, got {value.item()}; {BROKEN}"
            )
