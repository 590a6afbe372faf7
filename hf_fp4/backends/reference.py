"""The reference backend: plain PyTorch, runs on every device, and is the oracle of every other backend.

Weights stay packed; one layer's weight is unpacked for the duration of a call.
"""

from __future__ import annotations

import torch

from ..formats import FP4Format, dequantize_blocks
from ..ops import LIBRARY
from ..rotation import rotate
from ..scales import fake_quantize_activations


def quantize_input(
    x: torch.Tensor,
    fmt: FP4Format,
    activation_scale_rule: str | None,
    hadamard_size: int | None,
    input_global_scale: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The activation side of a linear: rotate, and for W4A4 quantize.

    Returns:
        ``(values in `compute_dtype`, divisor)``: the inputs that the matrix product sees are ``values / divisor``.
    """
    rotated, dtype = rotate(x, hadamard_size), compute_dtype(x.dtype)
    if activation_scale_rule is None:
        return rotated.to(dtype), None
    values, divisor = fake_quantize_activations(rotated, fmt, activation_scale_rule, input_global_scale)
    return values.to(dtype), divisor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of the matrix product for inputs of ``dtype``: float16 cannot hold a product without its global scales."""
    return torch.float32 if dtype == torch.float16 else dtype


def matmul(
    x: torch.Tensor,
    input_divisor: torch.Tensor | None,
    weight: torch.Tensor,
    weight_divisor: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """``x W^T / (divisors) + bias`` on operands that carry their block scales but not their global scales.

    Both operands are exact in bfloat16, and dividing by a power of two is exact, so the product is rounded once.
    """
    y = torch.nn.functional.linear(x, weight)
    divisor = weight_divisor if input_divisor is None else input_divisor
    if weight_divisor is not None and input_divisor is not None:
        divisor = weight_divisor * input_divisor
    if divisor is not None:
        y = (y * divisor.reciprocal()).to(x.dtype)
    return y if bias is None else y + bias.to(x.dtype)


def _linear(
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
    fmt = FP4Format(format)
    values, divisor = quantize_input(x, fmt, activation_scale_rule, hadamard_size, input_global_scale)
    dequantized = dequantize_blocks(weight, weight_scale, fmt, values.dtype)
    return matmul(values, divisor, dequantized, weight_global_scale, bias).to(x.dtype)


LIBRARY.impl("linear", _linear, "CompositeExplicitAutograd")


def _linear_input_gradient(gradient, weight, weight_scale, weight_global_scale, format, hadamard_size):
    dtype = compute_dtype(gradient.dtype)
    x = matmul(
        gradient.to(dtype),
        None,
        dequantize_blocks(weight, weight_scale, FP4Format(format), dtype).T,
        weight_global_scale,
        None,
    )
    return rotate(x, hadamard_size).to(gradient.dtype)


LIBRARY.impl("linear_input_gradient", _linear_input_gradient, "CompositeExplicitAutograd")
