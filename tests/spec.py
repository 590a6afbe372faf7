"""The FP4 formats transcribed from their specifications, in float64. Nothing here comes from the code under test.

Sources: OCP Microscaling Formats (MX) specification 1.0, sections 5.3.3 (E2M1) and 5.4 (E8M0); OCP 8-bit Floating Point
Specification, table 1 (E4M3); NVIDIA PTX ISA, `cvt.rn.satfinite.e2m1x2`.
"""

from __future__ import annotations

import math

import numpy as np


def minifloat(code: int, exponent_bits: int, mantissa_bits: int, bias: int) -> float:
    """Value of sign | exponent | mantissa, without the special codes."""
    sign = -1.0 if code >> (exponent_bits + mantissa_bits) & 1 else 1.0
    exponent = code >> mantissa_bits & (1 << exponent_bits) - 1
    mantissa = code & (1 << mantissa_bits) - 1
    if exponent == 0:
        return sign * mantissa * 2.0 ** (1 - bias - mantissa_bits)
    return sign * (1 + mantissa / 2**mantissa_bits) * 2.0 ** (exponent - bias)


# fmt: off
E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
# fmt: on
"""The 16 codes, sign << 3 | magnitude."""

E4M3 = np.array([math.nan if code & 0x7F == 0x7F else minifloat(code, 4, 3, 7) for code in range(256)])
"""All 256 bytes; S.1111.111 is NaN, there is no infinity."""

E8M0 = np.array([math.nan if code == 255 else 2.0 ** (code - 127) for code in range(256)])
"""All 256 bytes."""

TIES = {0.25: 0.0, 0.75: 1.0, 1.25: 1.0, 1.75: 2.0, 2.5: 2.0, 3.5: 4.0, 5.0: 4.0}
"""The seven midpoints of neighbouring magnitudes -> the neighbour whose code is even."""

GROUP = {"nvfp4": 16, "mxfp4": 32}


def nearest_codes(values: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Index of the nearest element of the ascending ``grid``, the even index on a tie, by search; saturates."""
    values = np.asarray(values, np.float64)
    above = np.clip(np.searchsorted(grid, values), 1, len(grid) - 1)
    below = above - 1
    with np.errstate(invalid="ignore"):
        to_below, to_above = values - grid[below], grid[above] - values
    even = np.where(below % 2 == 0, below, above)
    return np.where(to_below < to_above, below, np.where(to_above < to_below, above, even))


def e2m1_codes(values: np.ndarray) -> np.ndarray:
    """Nearest E2M1 code, ties to the even code, the sign of zero kept; saturates."""
    values = np.asarray(values, np.float64)
    return nearest_codes(np.abs(values), E2M1[:8]) | np.signbit(values).astype(np.int64) << 3


def round_e2m1(values: np.ndarray) -> np.ndarray:
    """Nearest E2M1 value."""
    return E2M1[e2m1_codes(values)]


def distance_to_tie(values: np.ndarray) -> np.ndarray:
    """How far each value is from the nearest of the 14 rounding boundaries, in units of E2M1."""
    return np.abs(np.abs(np.asarray(values, np.float64))[..., None] - np.array(list(TIES))).min(-1)


def decode_scales(format: str, scales: np.ndarray) -> np.ndarray:
    """Scale bytes -> float64."""
    return (E4M3 if format == "nvfp4" else E8M0)[scales]


def unpack(packed: np.ndarray) -> np.ndarray:
    """Bytes [N, K/2] -> codes [N, K]; the low nibble comes first."""
    return np.stack((packed % 16, packed // 16), -1).reshape(len(packed), -1)


def dequantize(format: str, packed: np.ndarray, scales: np.ndarray, global_scale: float = 1.0) -> np.ndarray:
    """Packed codes [N, K/2] and scale bytes [N, K/group] -> float64 [N, K]."""
    return E2M1[unpack(packed)] * np.repeat(decode_scales(format, scales), GROUP[format], 1) / global_scale


def hadamard(size: int) -> np.ndarray:
    """Sylvester's Hadamard matrix over sqrt(size): entry (i, j) has the sign of the parity of the bits of i & j."""
    signs = [[(-1) ** (i & j).bit_count() for j in range(size)] for i in range(size)]
    return np.array(signs, np.float64) / math.sqrt(size)


def rotate(values: np.ndarray, size: int | None) -> np.ndarray:
    """float64 blocks of the last dimension times `hadamard`."""
    if size is None:
        return np.asarray(values, np.float64)
    blocks = np.asarray(values, np.float64).reshape(*values.shape[:-1], -1, size)
    return (blocks @ hadamard(size)).reshape(values.shape)
