"""`FP4Linear`: the module that takes the place of `nn.Linear`."""

from __future__ import annotations

import torch
from torch import nn

from .. import ops
from ..formats import FP4Format, dequantize_blocks
from ..gptq import FP4Weight
from ..rotation import rotate


class FP4Linear(nn.Module):
    """A linear layer on a packed FP4 weight; ``forward`` is one call of `ops.linear`.

    Buffers (the bytes on disk):
        weight: uint8 [out_features, in_features/2], low nibble = even k, code = sign << 3 | e2m1.
        weight_scale: float8_e4m3fn [out_features, in_features/16] (nvfp4) or uint8 E8M0 [.., in_features/32] (mxfp4).
        weight_global_scale: float32 [1], a divisor (nvfp4).
        input_global_scale: float32 [1], a divisor of the activations (calibrated nvfp4 W4A4).
        bias: [out_features], if the linear has one (a frozen parameter in the model's dtype).

    Args:
        in_features, out_features: as in `nn.Linear`; in_features a multiple of the format's group size.
        format: the FP4 format.
        bias: whether there is a bias.
        hadamard_size: size of the block Hadamard rotation of the input, which the stored weight holds already; None: none.
        activation_scale_rule: how activations are quantized (`scales.ACTIVATION_SCALE_RULES`); None: W4A16.
        static_input_scale: whether there is an ``input_global_scale``; without it the scale is per token.
        dtype: dtype of the bias, and of `dequantize`.
    """

    weight: torch.Tensor
    weight_scale: torch.Tensor
    weight_global_scale: torch.Tensor | None
    input_global_scale: torch.Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        format: FP4Format,
        *,
        bias: bool = False,
        hadamard_size: int | None = None,
        activation_scale_rule: str | None = None,
        static_input_scale: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.in_features, self.out_features, self.format = in_features, out_features, format
        self.hadamard_size, self.activation_scale_rule = hadamard_size, activation_scale_rule
        if in_features % format.group_size:
            raise ValueError(
                f"in_features must be a multiple of {format.group_size} for {format.value}, got {in_features}"
            )
        groups = in_features // format.group_size

        def empty(*shape: int, dtype: torch.dtype | None) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        def divisor(present: bool) -> torch.Tensor | None:
            return empty(1, dtype=torch.float32) if present else None

        self.register_buffer("weight", empty(out_features, in_features // 2, dtype=torch.uint8))
        self.register_buffer("weight_scale", empty(out_features, groups, dtype=format.scale_dtype))
        self.register_buffer("weight_global_scale", divisor(format.has_global_scale))
        self.register_buffer("input_global_scale", divisor(static_input_scale))
        self.bias = nn.Parameter(empty(out_features, dtype=dtype), requires_grad=False) if bias else None

    @property
    def global_scales(self) -> dict[str, torch.Tensor]:
        """The global scales that this layer has, by buffer name."""
        names = ("weight_global_scale", "input_global_scale")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def set_weight(
        self, weight: FP4Weight, bias: torch.Tensor | None, input_global_scale: torch.Tensor | None
    ) -> None:
        """Take over a solved weight, and the bias and input scale that go with it."""
        self.weight, self.weight_scale = weight.packed, weight.scale
        self.weight_global_scale = weight.global_scale
        self.input_global_scale = input_global_scale
        if bias is not None:
            self.bias = nn.Parameter(bias.detach(), requires_grad=False)

    def check(self, name: str) -> None:
        """Raise ValueError if a scale is misshapen, zero, negative or non-finite; ``name`` is used in the message."""
        ops.check_linear(
            name, self.weight, self.weight_scale, self.global_scales, self.format, self.hadamard_size
        )

    def _apply(self, fn, recurse: bool = True):
        """`model.to(dtype)` and `.half()` move the packed weight and its scales, and cast only the bias."""
        kept = {id(buffer) for buffer in self.buffers(recurse=False)}

        def apply(tensor: torch.Tensor) -> torch.Tensor:
            changed = fn(tensor)
            return (
                tensor.to(changed.device) if id(tensor) in kept and changed.dtype != tensor.dtype else changed
            )

        return super()._apply(apply, recurse)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ops.linear(
            x,
            self.weight,
            self.weight_scale,
            self.weight_global_scale,
            self.input_global_scale,
            self.bias,
            self.format.value,
            self.activation_scale_rule,
            self.hadamard_size or 0,
        )

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight that this layer stands for, rotated back, [out_features, in_features] in ``dtype``."""
        values = dequantize_blocks(self.weight, self.weight_scale, self.format, torch.float32)
        if self.weight_global_scale is not None:
            values /= self.weight_global_scale
        return rotate(values, self.hadamard_size).to(dtype)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self.format.value}, {'W4A16' if self.activation_scale_rule is None else 'W4A4'}, "
            f"hadamard={self.hadamard_size}"
        )
