"""The GPTQ solver on an FP4 grid: weight and second moments in, FP4 weight out. Tensors only, no modules, no hooks.

`solve` goes over the columns once and never looks back (GPTQ, arXiv 2210.17323, with the scales fixed beforehand and the
static activation order of MR-GPTQ, arXiv 2509.23202, section 4). `descend` then goes over them again and moves each code
and each block scale to the best one given all others (coordinate descent, as QuantEase, arXiv 2309.01885, does for codes).
`tests/test_gptq.py` holds float64 transcriptions of both definitions as their oracles.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .backends import REFERENCE, Kernels
from .formats import FP4Format, decode_e2m1, encode_e2m1, pack, round_to_e2m1, unpack
from .scales import inverse_step, step

BLOCK = 128
"""Columns that are solved before their errors are propagated to the rest in one matrix product."""

_AT_A_TIME = 1 << 22
"""Values of a weight that are encoded or decoded at a time, so that what is between does not take its memory many times."""


@dataclass(frozen=True)
class FP4Weight:
    """A quantized weight as it is stored, or a stack of them.

    packed: uint8 [N, K/2]; scale: [N, K/group_size]; global_scale: float32 [1] or None (MXFP4). A stack of E has [E, ...], and
    global_scale [E].
    """

    packed: torch.Tensor
    scale: torch.Tensor
    global_scale: torch.Tensor | None
    format: FP4Format

    def dequantize(self) -> torch.Tensor:
        """float32 [N, K]."""
        divisor = _over(self.scale, self.global_scale)
        *rows, half = self.packed.shape
        result = torch.empty(*rows, 2 * half, dtype=torch.float32, device=self.packed.device)
        for values, packed, scale in _some_rows(result, self.packed, self.scale):
            blocks = decode_e2m1(unpack(packed)).unflatten(-1, (-1, self.format.group_size))
            values.copy_(blocks.mul_(step(scale, self.format, divisor)[..., None]).flatten(-2))
        return result

    def split(self, rows: list[int]) -> list[FP4Weight]:
        """Cut stacked output rows back into the weights they were stacked from."""
        parts = zip(self.packed.split(rows), self.scale.split(rows), strict=True)
        clone = self.global_scale.clone if self.global_scale is not None else lambda: None
        return [FP4Weight(p.clone(), s.clone(), clone(), self.format) for p, s in parts]


def round_weight(
    weight: torch.Tensor, scale: torch.Tensor, fmt: FP4Format, global_scale: torch.Tensor | None
) -> FP4Weight:
    """Round every value to nearest under given scales (RTN). ``weight`` float32 [N, K], ``scale`` [N, K/group_size].

    Or a stack, [E, N, K] and [E, N, K/group_size], with ``global_scale`` [E].
    """
    inverse = inverse_step(scale, fmt, _over(scale, global_scale))
    *rows, features = weight.shape
    packed = torch.empty(*rows, features // 2, dtype=torch.uint8, device=weight.device)
    for codes, values, factors in _some_rows(packed, weight, inverse):
        blocks = values.unflatten(-1, (-1, fmt.group_size)) * factors[..., None]
        codes.copy_(pack(encode_e2m1(blocks.flatten(-2))))
    return FP4Weight(packed, scale, global_scale, fmt)


def _some_rows(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Tensors [..., N, *] in parts of about `_AT_A_TIME` values of the first."""
    first = tensors[0]
    size = max(1, _AT_A_TIME * first.shape[-2] // max(1, first.numel()))
    return zip(*(tensor.split(size, -2) for tensor in tensors), strict=True)


def _over(scale: torch.Tensor, global_scale: torch.Tensor | None) -> torch.Tensor | None:
    """Global scales, [1], or [E] of a stack, so that they broadcast to ``scale`` [..., N, K/group_size]."""
    return global_scale if global_scale is None or scale.dim() == 2 else global_scale.view(-1, 1, 1)


def solve(
    weight: torch.Tensor,
    scale: torch.Tensor,
    fmt: FP4Format,
    global_scale: torch.Tensor | None,
    upper: torch.Tensor,
    order: torch.Tensor | None = None,
    kernels: Kernels = REFERENCE,
) -> FP4Weight:
    """Quantize column by column, each column's error moved onto the columns that are still to come.

    Rows are independent, so layers that share an input are stacked along N and solved at once. Layers of the same shape that
    don't, such as the experts of a layer, may be stacked in front: [E, N, K] and the others likewise, global_scale [E]; kernels
    then solve them in the same launches.

    Args:
        weight: float32 [N, K], rotated.
        scale: stored block scales [N, K/group_size], fixed beforehand, in the weight's own column order.
        fmt: the format.
        global_scale: the NVFP4 divisor, float32 [1]; None for MXFP4.
        upper: ``U`` of `hessian.OrderedFactor.upper` [K, K], in the order ``order``.
        order: int64 [K], the columns in the order in which they are solved (activation order); None: as they are.
        kernels: what runs the loop over the columns on the weight's device.

    Returns:
        The codes under the given scales, columns in the weight's own order.
    """
    (columns,) = _columns(order, weight)
    steps, inverse = _steps(order, scale, fmt, global_scale)
    if kernels.module is not None:
        quantized = kernels.module.gptq_solve(columns, steps, inverse, upper)
    elif columns.dim() == 3:
        each = zip(columns, steps, inverse, upper, strict=True)
        quantized = torch.stack([_solve_columns(*tensors) for tensors in each])
    else:
        quantized = _solve_columns(columns, steps, inverse, upper)
    del columns, steps, inverse
    rows = _rows(order, quantized)
    del quantized
    return round_weight(rows, scale, fmt, global_scale)


def _solve_columns(
    columns: torch.Tensor, steps: torch.Tensor, inverse: torch.Tensor, upper: torch.Tensor
) -> torch.Tensor:
    """The values [K, N] that the loop over the columns gives; ``columns`` is overwritten."""
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
    return quantized


def descend(
    weight: torch.Tensor,
    quantized: FP4Weight,
    second: torch.Tensor,
    added: float | torch.Tensor,
    passes: int = 1,
    kernels: Kernels = REFERENCE,
) -> FP4Weight:
    """Lower the damped output error ``tr((W - Q) (S + d I) (W - Q)^T)`` by coordinate descent over codes and block scales.

    Group by group, every code is set to what leaves the least error while everything else stays as it is; then the group's
    scale moves to a neighbour on its grid if the error is lower with it. No step raises it. Rows are independent. Stacks as for
    `solve`, with ``added`` [E].

    Args:
        weight: float32 [N, K], rotated: the target of the solve.
        quantized: what `solve` made of it.
        second: ``S`` [K, K]; damped in place meanwhile.
        added: ``d``, as `hessian.OrderedFactor` has it.
        passes: how often all groups are visited.
        kernels: what does it on the weight's device.
    """
    fmt, global_scale = quantized.format, quantized.global_scale
    target, scale = _columns(None, weight, quantized.scale)
    (current,) = _columns(None, quantized.dequantize())
    matrix, diagonal = second, second.diagonal(dim1=-2, dim2=-1)
    undamped = diagonal.clone()
    diagonal.add_(added if isinstance(added, float) else added[:, None])
    if kernels.module is not None:
        kernels.module.gptq_descend(target, current, scale, matrix, passes, fmt.value, global_scale)
    elif target.dim() == 3:
        for i, tensors in enumerate(zip(target, current, scale, matrix, strict=True)):
            divisor = None if global_scale is None else global_scale[i : i + 1]
            _descend_columns(*tensors, passes, fmt, divisor)
    else:
        _descend_columns(target, current, scale, matrix, passes, fmt, global_scale)
    diagonal.copy_(undamped)
    del target
    return round_weight(current.mT.contiguous(), scale.mT.contiguous(), fmt, global_scale)


def _descend_columns(
    target: torch.Tensor,
    current: torch.Tensor,
    scale: torch.Tensor,
    matrix: torch.Tensor,
    passes: int,
    fmt: FP4Format,
    global_scale: torch.Tensor | None,
) -> None:
    """Change ``current`` [K, N] and ``scale`` [K/group_size, N] for the better; ``matrix`` [K, K] is damped already."""
    size = fmt.group_size
    diagonal = matrix.diagonal().tolist()
    for _ in range(passes):
        gradient = matrix @ (target - current)
        for start in range(0, len(current), BLOCK):
            stop = min(start + BLOCK, len(current))
            before, block = current[start:stop].clone(), gradient[start:stop]
            for first in range(start, stop, size):
                group = slice(first, first + size)
                units, inverse = (f(scale[first // size], fmt, global_scale) for f in (step, inverse_step))
                for i in range(first, first + size):
                    best = torch.add(current[i], block[i - start], alpha=1 / diagonal[i])
                    best = round_to_e2m1(best.mul_(inverse)).mul_(units)
                    block[first - start :].addr_(matrix[i, first:stop], current[i] - best)
                    current[i] = best
                moved = _rescale(
                    scale[first // size],
                    current[group],
                    block[first - start :][:size],
                    matrix[group, group],
                    fmt,
                    global_scale,
                )
                block[first - start :].addmm_(matrix[first:stop, group], moved, alpha=-1)
                current[group] += moved
            gradient[stop:].addmm_(matrix[stop:, start:stop], before.sub_(current[start:stop]))


def _rescale(
    scale: torch.Tensor,
    values: torch.Tensor,
    gradient: torch.Tensor,
    matrix: torch.Tensor,
    fmt: FP4Format,
    global_scale: torch.Tensor | None,
) -> torch.Tensor:
    """Move each row's stored ``scale`` [N], in place, by one step of its grid where that lowers the error.

    values, gradient: [group_size, N], the dequantized group and ``matrix @ (target - values)``. Under another scale, each
    value is rounded from what would be best for it alone. Returns by how much the values change.
    """
    stored = scale.view(torch.uint8)
    wanted = values + gradient / matrix.diagonal()[:, None]
    least, change, chosen = torch.zeros_like(values[0]), torch.zeros_like(values), stored.clone()
    for move in (-1, 1):
        byte = (stored.short() + move).clamp(*fmt.scale_bytes).to(torch.uint8)
        candidate = byte.view(fmt.scale_dtype)
        rounded = round_to_e2m1(wanted * inverse_step(candidate, fmt, global_scale))
        difference = rounded.mul_(step(candidate, fmt, global_scale)).sub_(values)
        error = (difference * (matrix @ difference - 2 * gradient)).sum(0)
        better = error < least
        least, chosen = torch.where(better, error, least), torch.where(better, byte, chosen)
        change = torch.where(better, difference, change)
    stored.copy_(chosen)
    return change


def _steps(
    order: torch.Tensor | None, scale: torch.Tensor, fmt: FP4Format, global_scale: torch.Tensor | None
) -> list[torch.Tensor]:
    """What one unit of E2M1 is worth in every place of the weight, and its inverse, as `_columns` has them."""
    divisor, size = _over(scale, global_scale), fmt.group_size
    each = (f(scale, fmt, divisor) for f in (step, inverse_step))
    if order is None:
        return [steps.mT.repeat_interleave(size, -2) for steps in each]
    return [steps for values in each for steps in _columns(order // size, values)]


def _columns(order: torch.Tensor | None, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """Each [N, K] as a new [K, N], where one column of the weight is contiguous, in the given order; stacks likewise."""
    if order is None:
        return [tensor.mT.clone(memory_format=torch.contiguous_format) for tensor in tensors]
    if order.dim() == 1:
        return [tensor.T[order] for tensor in tensors]
    return [torch.stack([each.T[own] for each, own in zip(t, order, strict=True)]) for t in tensors]


def _rows(order: torch.Tensor | None, columns: torch.Tensor) -> torch.Tensor:
    """The inverse of `_columns`."""
    if order is None:
        rows = columns
    elif order.dim() == 1:
        rows = torch.empty_like(columns).index_copy_(0, order, columns)
    else:
        rows = torch.empty_like(columns).scatter_(1, order[..., None].expand_as(columns), columns)
    return rows.mT.contiguous()


def activation_order(second: torch.Tensor) -> torch.Tensor:
    """Columns by descending second moment of their input, int64 [K], or [E, K] of a stack; equal ones keep their order."""
    return second.diagonal(dim1=-2, dim2=-1).argsort(stable=True, descending=True)


def output_power(weight: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """``tr(W S W^T)``, the mean squared output of ``W`` [N, K] on inputs whose second moments are ``S`` [K, K]; float32 [].
    Of a stack, [E, N, K] and [E, K, K], that of each: [E].

    On a GPU the product is one of bfloat16 operands: it is for reports, and its rounding errors average out.
    """
    if weight.is_cuda:
        multiply = torch.mm if weight.dim() == 2 else torch.bmm
        product = multiply(weight.bfloat16(), second.bfloat16(), out_dtype=torch.float32)
    else:
        product = weight @ second
    return product.mul_(weight).sum((-2, -1))
