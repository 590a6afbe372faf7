"""Block Hadamard rotation of weights and activations.

Section 4 of arXiv 2509.23202: ``y = (W H)(H x)`` with ``H`` block-diagonal, each block a Sylvester Hadamard matrix divided
by ``sqrt(k)``, which is symmetric and orthonormal. The weight side is folded into the stored weight, the activation
side runs before the activation is quantized.
"""

from __future__ import annotations

from functools import cache

import torch

HADAMARD_SIZES = (16, 32, 64, 128)


def rotate(x: torch.Tensor, size: int | None) -> torch.Tensor:
    """Multiply the last dimension by ``blockdiag(H_size) / sqrt(size)``, in float32.

    Args:
        x: float ``[..., K]``; K must be a multiple of ``size``.
        size: 16, 32, 64 or 128; ``None`` or 0 leaves the values as they are.

    Returns:
        float32 ``[..., K]``.
    """
    if not size:
        return x.float()
    # Contiguous, since a transposed matrix would be multiplied in one small product per row.
    return (x.float().contiguous().unflatten(-1, (-1, size)) @ _hadamard(size, x.device)).flatten(-2)


def require_divisor(size: int, in_features: int, name: str) -> None:
    """Raise ValueError if a Hadamard size does not divide the in_features of the linear ``name``."""
    if in_features % size:
        fitting = [k for k in HADAMARD_SIZES if in_features % k == 0]
        raise ValueError(
            f"hadamard_group_size must divide in_features, got {size} for the {in_features} of {name}; use "
            f'{", ".join(map(str, fitting + [None]))} or "auto", or add it to modules_to_not_convert'
        )


def largest_size(in_features: int) -> int | None:
    """The largest supported Hadamard size that divides ``in_features``, or ``None`` when none does."""
    return next((k for k in reversed(HADAMARD_SIZES) if in_features % k == 0), None)


@cache
@torch.inference_mode(False)  # cached, so it may meet autograd later
def _hadamard(size: int, device: torch.device) -> torch.Tensor:
    h = torch.ones(1, 1, dtype=torch.float32)
    while h.shape[0] < size:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
    return (h / size**0.5).to(device)
