"""The FP4 number formats: the E2M1 grid, block scale types, rounding, packing.

Every other file takes its grid, its rounding and its byte layout from here. Sources: OCP Microscaling Formats (MX)
specification 1.0 for E2M1, E8M0 and MXFP4; NVIDIA's PTX ISA (`cvt.rn.satfinite.e2m1x2`) for the rounding and NVFP4.
"""

from __future__ import annotations

import enum
from functools import cache

import torch

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes of the codes 0..7; bit 3 of a code is its sign."""

E2M1_MAX = 6.0
E4M3_MAX = 448.0
E4M3_MIN = 2.0**-9
"""Smallest positive E4M3 number, a subnormal; a stored block scale is never below it."""


class FP4Format(str, enum.Enum):
    """A block-scaled FP4 format.

    * ``NVFP4``: groups of 16, scale E4M3, one FP32 divisor per tensor: ``w = e2m1 * scale / global_scale``.
    * ``MXFP4``: groups of 32, scale E8M0 (a byte ``b`` means ``2**(b - 127)``): ``w = e2m1 * 2**(b - 127)``.
    """

    NVFP4 = "nvfp4"
    MXFP4 = "mxfp4"

    @property
    def group_size(self) -> int:
        """Values along ``in_features`` that share one scale."""
        return 16 if self is FP4Format.NVFP4 else 32

    @property
    def scale_dtype(self) -> torch.dtype:
        """Dtype of the stored block scales."""
        return torch.float8_e4m3fn if self is FP4Format.NVFP4 else torch.uint8

    @property
    def scale_bytes(self) -> tuple[int, int]:
        """The smallest and the largest byte that stores a positive, finite scale; larger bytes are larger scales."""
        return (1, 0x7E) if self is FP4Format.NVFP4 else (0, 254)

    @property
    def has_global_scale(self) -> bool:
        """Whether a tensor has an FP32 divisor beside its block scales."""
        return self is FP4Format.NVFP4

    def encode_scale(self, scale: torch.Tensor) -> torch.Tensor:
        """Round positive scales (any float dtype) to the nearest stored scale, saturating, never to zero.

        E8M0 rounds down to a power of two, as the MX specification derives it; E4M3 rounds to nearest, ties to even.
        """
        if self is FP4Format.NVFP4:
            return scale.float().clamp(E4M3_MIN, E4M3_MAX).to(torch.float8_e4m3fn)
        bits = scale.float().clamp(2.0**-127, 2.0**127).view(torch.int32)
        return (bits >> 23).to(torch.uint8)  # a float32's exponent is stored as E8M0's

    def decode_scale(self, scale: torch.Tensor) -> torch.Tensor:
        """Stored scales -> float32, exactly. E8M0 byte 255 and the E4M3 NaN codes become NaN."""
        if self is FP4Format.NVFP4:
            return scale.float()
        return _scale_table(self, torch.float32, scale.device)[scale.int()]


def round_to_e2m1(x: torch.Tensor) -> torch.Tensor:
    """Nearest E2M1 value, ties to even on the code (0.25->0, 0.75->1, 1.25->1, 1.75->2, 2.5->2, 3.5->4, 5->4), saturating.

    Args:
        x: float tensor of any shape, taken as float32; NaN stays NaN, a value that rounds to zero loses its sign.

    Returns:
        float32 of the same shape.
    """
    # In [2**22, 2**23) a float32 has no bits below 0.5, the spacing of the grid under 2, so adding 1.5 * 2**22 and taking
    # it away again rounds to that spacing. Above, the spacing doubles with the power of two that the magnitude reaches.
    rounded = x.float().clamp(-E2M1_MAX, E2M1_MAX)
    octave = (rounded.view(torch.int32) & 0x7F800000).view(torch.float32).clamp_min_(1)
    return rounded.add_(octave, alpha=1.5 * 2**22).sub_(octave, alpha=1.5 * 2**22)


def encode_e2m1(x: torch.Tensor) -> torch.Tensor:
    """Float tensor -> uint8 codes ``sign << 3 | e2m1`` of the same shape, rounded as `round_to_e2m1` does.

    The sign of a value that rounds to zero is kept (code 8), as the hardware conversion keeps it.
    """
    doubled = round_to_e2m1(x).abs_().mul_(2)
    magnitude = torch.where(doubled <= 4, doubled, (doubled * 0.5 + 2).clamp_max_(7))
    return magnitude.to(torch.uint8) | (torch.signbit(x).to(torch.uint8) << 3)


def decode_e2m1(codes: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """uint8 codes (0..15) -> values in ``dtype`` (exact in every float dtype of 16 bits or more)."""
    return _value_table(dtype, codes.device)[codes.int()]


def pack(codes: torch.Tensor) -> torch.Tensor:
    """uint8 codes ``[..., K]`` -> uint8 ``[..., K/2]``, the low nibble is the even k. K must be even."""
    if codes.shape[-1] % 2:
        raise ValueError(
            f"the last dimension of FP4 codes must be even to pack two in a byte, got {codes.shape[-1]}"
        )
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """uint8 ``[..., K/2]`` -> uint8 codes ``[..., K]``; the inverse of `pack`."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def dequantize_blocks(
    packed: torch.Tensor, scale: torch.Tensor, fmt: FP4Format, dtype: torch.dtype
) -> torch.Tensor:
    """``e2m1 * block scale`` without the global scale, which the caller divides by.

    The result is exact in bfloat16 and wider (at most 6 significant bits); float16 holds NVFP4 only.

    Args:
        packed: uint8 ``[N, K/2]``, low nibble = even k.
        scale: stored scales ``[N, K/group_size]`` of `FP4Format.scale_dtype`.
        fmt: the format.
        dtype: dtype of the result.

    Returns:
        ``[N, K]`` in ``dtype``.
    """
    rows, half = packed.shape
    pairs = torch.index_select(_pair_table(dtype, packed.device), 0, packed.reshape(-1).int())
    spread = _scale_table(fmt, dtype, packed.device)[:, None].expand(256, fmt.group_size).contiguous()
    scales = torch.nn.functional.embedding(scale.view(torch.uint8).int(), spread)
    return pairs.view(dtype).view(rows, 2 * half).mul_(scales.view(rows, 2 * half))


@cache
@torch.inference_mode(False)  # cached, so it may meet autograd later
def _value_table(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The values of the codes 0..15; cached, since a copy to a GPU waits for all that runs there."""
    return torch.tensor(E2M1_VALUES + tuple(-v for v in E2M1_VALUES), dtype=dtype, device=device)


@cache
def _pair_table(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """For each byte its two values, low nibble first, as one integer of twice the width, so one lookup gives both."""
    values = torch.tensor(E2M1_VALUES + tuple(-v for v in E2M1_VALUES), dtype=dtype)
    pairs = torch.stack((values.repeat(16), values.repeat_interleave(16)), dim=-1).contiguous()
    return pairs.view({2: torch.int32, 4: torch.int64}[dtype.itemsize]).squeeze(1).to(device)


@cache
def _scale_table(fmt: FP4Format, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The value of every scale byte, [256]."""
    if fmt is FP4Format.NVFP4:
        return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(dtype).to(device)
    values = torch.ldexp(torch.ones(256, dtype=torch.float64), torch.arange(256) - 127)
    values[255] = float("nan")
    return values.to(dtype).to(device)
