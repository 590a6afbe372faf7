"""The GPTQ solver on an FP4 grid: weight and second moments in, FP4 weight out. Tensors only, no modules, no hooks.

Source: GPTQ (arXiv 2210.17323) with the scales fixed before the solve and the static activation order of MR-GPTQ
(arXiv 2509.23202, section 4). `tests/test_gptq.py` holds a float64 transcription of the definition as its oracle.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .formats import FP4Format, decode_e2m1, encode_e2m1, pack, round_to_e2m1, unpack
from .scales import inverse_step, step

BLOCK = 128
"""Columns that are solved before their errors are propagated to the rest in one matrix product."""


@dataclass(frozen=True)
class FP4Weight:
    """A quantized weight as it is stored.

    packed: uint8 [N, K/2]; scale: [N, K/group_size]; global_scale: float32 [1] or None (MXFP4).
    """

    packed: torch.Tensor
    scale: torch.Tensor
    global_scale: torch.Tensor | None
    format: FP4Format

    def dequantize(self) -> torch.Tensor:
        """float32 [N, K]."""
        values = decode_e2m1(unpack(self.packed)).unflatten(-1, (-1, self.format.group_size))
        return (values * step(self.scale, self.format, self.global_scale)[..., None]).flatten(-2)

    def split(self, rows: list[int]) -> list[FP4Weight]:
        """Cut stacked output rows back into the weights they were stacked from."""
        parts = zip(self.packed.split(rows), self.scale.split(rows), strict=True)
        clone = self.global_scale.clone if self.global_scale is not None else lambda: None
        return [FP4Weight(p.clone(), s.clone(), clone(), self.format) for p, s in parts]


def round_weight(
    weight: torch.Tensor, scale: torch.Tensor, fmt: FP4Format, global_scale: torch.Tensor | None
) -> FP4Weight:
    """Round every value to nearest under given scales (RTN). ``weight`` float32 [N, K], ``scale`` [N, K/group_size]."""
    blocks = weight.unflatten(-1, (-1, fmt.group_size)) * inverse_step(scale, fmt, global_scale)[..., None]
    return FP4Weight(pack(encode_e2m1(blocks.flatten(-2))), scale, global_scale, fmt)


def solve(
    weight: torch.Tensor,
    scale: torch.Tensor,
    fmt: FP4Format,
    global_scale: torch.Tensor | None,
    upper: torch.Tensor,
    order: torch.Tensor | None = None,
) -> FP4Weight:
    """Quantize column by column, each column's error moved onto the columns that are still to come.

    Rows are independent, so layers that share an input are stacked along N and solved at once.

    Args:
        weight: float32 [N, K], rotated.
        scale: stored block scales [N, K/group_size], fixed beforehand, in the weight's own column order.
        fmt: the format.
        global_scale: the NVFP4 divisor, float32 [1]; None for MXFP4.
        upper: ``U`` of `hessian.inverse_cholesky` [K, K], of the second moments in the order ``order``.
        order: int64 [K], the columns in the order in which they are solved (activation order); None: as they are.

    Returns:
        The codes under the given scales, columns in the weight's own order.
    """
    steps = step(scale, fmt, global_scale).repeat_interleave(fmt.group_size, dim=1).T
    inverse = inverse_step(scale, fmt, global_scale).repeat_interleave(fmt.group_size, dim=1).T
    columns = weight.T  # [K, N]: one column of the weight is contiguous
    if order is not None:
        columns, steps, inverse = columns[order], steps[order], inverse[order]
    columns, steps, inverse = (
        columns.clone(memory_format=torch.contiguous_format),
        steps.contiguous(),
        inverse.contiguous(),
    )
    errors = torch.empty(
        min(BLOCK, len(columns)), columns.shape[1], dtype=columns.dtype, device=columns.device
    )
    quantized = torch.empty_like(columns)
    for start in range(0, len(columns), BLOCK):
        stop = min(start + BLOCK, len(columns))
        block, factor = columns[start:stop], upper[start:stop, start:stop]
        pivots = factor.diagonal().tolist()
        for i in range(stop - start):
            torch.mul(
                round_to_e2m1(block[i] * inverse[start + i]), steps[start + i], out=quantized[start + i]
            )
            torch.sub(block[i], quantized[start + i], out=errors[i]).div_(pivots[i])
            block[i + 1 :].addr_(factor[i, i + 1 :], errors[i], alpha=-1)
        columns[stop:].addmm_(upper[start:stop, stop:].T, errors[: stop - start], alpha=-1)
    if order is not None:
        quantized = torch.empty_like(quantized).index_copy_(0, order, quantized)
    return round_weight(quantized.T.contiguous(), scale, fmt, global_scale)


def activation_order(second: torch.Tensor) -> torch.Tensor:
    """Columns by descending second moment of their input, int64 [K]; equal ones keep their order."""
    return second.diagonal().argsort(descending=True, stable=True)


def relative_output_error(weight: torch.Tensor, quantized: torch.Tensor, second: torch.Tensor) -> float:
    """``tr((W - Q) S (W - Q)^T) / tr(W S W^T)``: squared output error over squared output, for ``S`` [K, K]."""
    difference = weight - quantized
    error = ((difference @ second) * difference).sum()
    return (error / ((weight @ second) * weight).sum().clamp_min(1e-30)).item()
