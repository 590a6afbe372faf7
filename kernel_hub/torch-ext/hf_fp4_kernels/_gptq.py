"""The parts of GPTQ on an FP4 grid that are not matrix products: the search of block scales, the loop over columns, and the
coordinate descent over codes and scales after it.

In the last two a program takes a few rows of the weight and BLOCK of its columns. Columns are done in groups: what a column
does to the rest of its group is applied at once, to the rest of the block when the group is done, to all later columns when the
block is done, by one matrix product of torch (in the precision that torch is set to; this file needs real float32). Tensors are
[K, N], one column of the weight contiguous, or [E, K, N] for several experts in the same launches.
"""

import torch
import triton
import triton.language as tl

from ._triton_kernels import _decode_e4m3, _exp2_int, _round_e2m1

BLOCK = 128
ROWS = 8
"""Rows per program: 32 bytes of each column, the least that a GPU reads at once."""

_SOLVE_GROUP = 16
_GROUPS = {"nvfp4": 16, "mxfp4": 32}


@triton.jit
def _round(x):
    """To the nearest E2M1 value; zero has no sign (-0 + 0 is 0), so that its code is 0."""
    return _round_e2m1(x) + 0.0


@triton.jit
def _pick(tile, hit):
    """The row of ``tile`` [*, ROWS] where ``hit`` [*, 1] is true."""
    return tl.sum(tl.where(hit, tile, 0.0), 0)


@triton.jit
def _group_of(tile, group, BLOCK: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr):
    """Rows ``group * SIZE`` and on of ``tile`` [BLOCK, ROWS], [SIZE, ROWS]."""
    parts = tl.reshape(tile, [BLOCK // SIZE, SIZE, ROWS])
    return _pick(parts, (tl.arange(0, BLOCK // SIZE) == group)[:, None, None])


@triton.jit
def _subtract_products(tile, factors_ptr, stride, change, keep, BLOCK: tl.constexpr, SIZE: tl.constexpr):
    """``tile - factors.T @ change``: ``factors`` [SIZE, BLOCK] are read where ``keep`` [BLOCK] and zero elsewhere."""
    places = tl.arange(0, BLOCK)
    for i in range(SIZE):
        factor = tl.load(factors_ptr + i * stride + places, mask=keep, other=0.0)
        tile -= factor[:, None] * _pick(change, (tl.arange(0, SIZE) == i)[:, None])[None, :]
    return tile


@triton.jit
def solve_kernel(
    columns_ptr, steps_ptr, inverse_ptr, upper_ptr, quantized_ptr, errors_ptr, N, K, errors_stride,
    COUNT: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Solve COUNT columns. Every pointer is at the block's first column, that of ``upper`` [K, K] at its diagonal."""
    expert = tl.program_id(1).to(tl.int64)
    columns_ptr += expert * K * N
    steps_ptr += expert * K * N
    inverse_ptr += expert * K * N
    quantized_ptr += expert * K * N
    upper_ptr += expert * K * K
    errors_ptr += expert * errors_stride
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = (rows < N)[None, :]
    places = tl.arange(0, BLOCK)
    within = tl.arange(0, SIZE)
    block = places[:, None] * N + rows[None, :]
    tile = tl.load(columns_ptr + block, mask=(places < COUNT)[:, None] & valid, other=0.0)
    for group in range(COUNT // SIZE):
        first = group * SIZE
        offsets = (first + within)[:, None] * N + rows[None, :]
        steps = tl.load(steps_ptr + offsets, mask=valid, other=0.0)
        inverse = tl.load(inverse_ptr + offsets, mask=valid, other=0.0)
        part = _group_of(tile, group, BLOCK, SIZE, ROWS)
        quantized = tl.zeros([SIZE, ROWS], tl.float32)
        errors = tl.zeros([SIZE, ROWS], tl.float32)
        for i in range(SIZE):
            hit = (within == i)[:, None]
            factor = tl.load(upper_ptr + (first + i) * K + first + within, mask=within > i, other=0.0)
            pivot = tl.load(upper_ptr + (first + i) * K + first + i)
            rounded = _round(part * inverse) * steps
            missed = _pick(part - rounded, hit)
            error = tl.math.div_rn(missed, tl.zeros_like(missed) + pivot)
            part -= factor[:, None] * error[None, :]
            quantized = tl.where(hit, rounded, quantized)
            errors = tl.where(hit, error[None, :], errors)
        tl.store(quantized_ptr + offsets, quantized, mask=valid)
        tl.store(errors_ptr + offsets, errors, mask=valid)
        keep = (places >= first + SIZE) & (places < COUNT)
        tile = _subtract_products(tile, upper_ptr + first * K, K, errors, keep, BLOCK, SIZE)


@triton.jit
def _step(byte, divisor, NVFP4: tl.constexpr):
    """What one unit of E2M1 is worth under a stored scale, and its inverse."""
    if NVFP4:
        scale = _decode_e4m3(byte)
        divisor = tl.zeros_like(scale) + divisor
        unit = tl.math.div_rn(scale, divisor)
        inverse = tl.math.div_rn(divisor, scale)
    else:
        unit = _exp2_int(byte - 127)
        inverse = _exp2_int(127 - byte)
    return unit, inverse


@triton.jit
def descend_kernel(
    current_ptr, gradient_ptr, scale_ptr, matrix_ptr, global_ptr, moved_ptr, N, K, moved_stride,
    NVFP4: tl.constexpr, COUNT: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Visit COUNT columns. Every pointer is at the block's first column, that of ``matrix`` [K, K] at its diagonal."""
    expert = tl.program_id(1).to(tl.int64)
    current_ptr += expert * K * N
    gradient_ptr += expert * K * N
    scale_ptr += expert * (K // SIZE) * N
    matrix_ptr += expert * K * K
    moved_ptr += expert * moved_stride
    global_ptr += expert
    LOW: tl.constexpr = 1 if NVFP4 else 0
    HIGH: tl.constexpr = 0x7E if NVFP4 else 254
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = (rows < N)[None, :]
    places = tl.arange(0, BLOCK)
    within = tl.arange(0, SIZE)
    divisor = tl.load(global_ptr)
    block = places[:, None] * N + rows[None, :]
    tile = tl.load(gradient_ptr + block, mask=(places < COUNT)[:, None] & valid, other=0.0)
    for group in range(COUNT // SIZE):
        first = group * SIZE
        square_ptr = matrix_ptr + first * K + first
        offsets = (first + within)[:, None] * N + rows[None, :]
        before = tl.load(current_ptr + offsets, mask=valid, other=0.0)
        stored = tl.load(scale_ptr + group * N + rows, mask=rows < N, other=127).to(tl.int32)
        unit, inverse = _step(stored, divisor, NVFP4)
        gradient = _group_of(tile, group, BLOCK, SIZE, ROWS)
        # Codes, one after the other.
        values = before
        for i in range(SIZE):
            hit = (within == i)[:, None]
            factor = tl.load(square_ptr + i * K + within)
            pivot = tl.zeros_like(gradient) + tl.load(square_ptr + i * K + i)
            best = values + gradient * tl.math.div_rn(tl.zeros_like(pivot) + 1.0, pivot)
            best = _round(best * inverse[None, :]) * unit[None, :]
            gradient += factor[:, None] * _pick(values - best, hit)[None, :]
            values = tl.where(hit, best, values)
        # The scale: each value is rounded from what would be best for it alone.
        diagonal = tl.load(square_ptr + within * K + within)[:, None] + tl.zeros_like(gradient)
        wanted = values + tl.math.div_rn(gradient, diagonal)
        less = tl.maximum(stored - 1, LOW)
        more = tl.minimum(stored + 1, HIGH)
        less_unit, less_inverse = _step(less, divisor, NVFP4)
        more_unit, more_inverse = _step(more, divisor, NVFP4)
        less_values = _round(wanted * less_inverse[None, :]) * less_unit[None, :]
        more_values = _round(wanted * more_inverse[None, :]) * more_unit[None, :]
        less_change = less_values - values
        more_change = more_values - values
        less_product = tl.zeros_like(gradient)
        more_product = tl.zeros_like(gradient)
        for i in range(SIZE):
            hit = (within == i)[:, None]
            factor = tl.load(square_ptr + i * K + within)
            less_product += factor[:, None] * _pick(less_change, hit)[None, :]
            more_product += factor[:, None] * _pick(more_change, hit)[None, :]
        less_error = tl.sum(less_change * (less_product - 2.0 * gradient), 0)
        more_error = tl.sum(more_change * (more_product - 2.0 * gradient), 0)
        take_less = less_error < 0.0
        values = tl.where(take_less[None, :], less_values, values)
        chosen = tl.where(take_less, less, stored)
        take_more = more_error < tl.where(take_less, less_error, 0.0)
        values = tl.where(take_more[None, :], more_values, values)
        chosen = tl.where(take_more, more, chosen)
        tl.debug_barrier()  # several threads may have read what one overwrites
        tl.store(current_ptr + offsets, values, mask=valid)
        tl.store(scale_ptr + group * N + rows, chosen.to(tl.uint8), mask=rows < N)
        tl.store(moved_ptr + offsets, before - values, mask=valid)
        keep = (places >= first + SIZE) & (places < COUNT)
        tile = _subtract_products(tile, matrix_ptr + first * K, K, values - before, keep, BLOCK, SIZE)


@triton.jit
def search_kernel(
    weight_ptr, base_ptr, steps_ptr, importance_ptr, global_ptr, scale_ptr, COUNT, PER_ROW,
    NVFP4: tl.constexpr, WEIGHTED: tl.constexpr, STEPS: tl.constexpr, SIZE: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """GROUPS groups of SIZE values each; COUNT groups in all, PER_ROW in a row of the weight."""
    LOW: tl.constexpr = 1 if NVFP4 else 0
    HIGH: tl.constexpr = 0x7E if NVFP4 else 254
    groups = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    valid = groups < COUNT
    within = tl.arange(0, SIZE)[None, :]
    x = tl.load(weight_ptr + groups[:, None] * SIZE + within, mask=valid[:, None], other=0.0)
    base = tl.load(base_ptr + groups, mask=valid, other=127).to(tl.int32)
    divisor = tl.load(global_ptr)
    importance = tl.zeros_like(x) + 1.0
    if WEIGHTED:
        importance = tl.load(importance_ptr + (groups % PER_ROW)[:, None] * SIZE + within)
    best = base
    least = tl.full([GROUPS], float("inf"), tl.float32)
    for i in range(STEPS):
        byte = tl.minimum(tl.maximum(base + tl.load(steps_ptr + i), LOW), HIGH)
        unit, inverse = _step(byte, divisor, NVFP4)
        missed = _round(x * inverse[:, None]) * unit[:, None] - x
        error = tl.sum(missed * missed * importance, 1)
        best = tl.where(error < least, byte, best)
        least = tl.minimum(error, least)
    tl.store(scale_ptr + groups, best.to(tl.uint8), mask=valid)


def _group_and_dtype(format, global_scale):
    """Group size and dtype of the stored scales."""
    if format not in _GROUPS:
        raise ValueError(f"format must be 'nvfp4' or 'mxfp4', got {format!r}")
    if (format == "nvfp4") != (global_scale is not None):
        raise ValueError("global_scale must be given for nvfp4, and only for it")
    return _GROUPS[format], torch.float8_e4m3fn if format == "nvfp4" else torch.uint8


def _check(group, square, **tensors):
    (name, first), *_ = tensors.items()
    for key, tensor in tensors.items():
        if tensor.dtype != torch.float32 or not tensor.is_contiguous() or tensor.shape != first.shape:
            raise ValueError(f"{key} must be contiguous float32 of the shape of {name}, {tuple(first.shape)}")
    *stack, k, _ = first.shape
    if k % group:
        raise ValueError(f"the first dimension of {name} must be a multiple of {group}, got {k}")
    if square.dtype != torch.float32 or square.shape != (*stack, k, k):
        raise ValueError(
            f"the matrix must be float32 {[*stack, k, k]}, got {square.dtype} {tuple(square.shape)}"
        )
    return square.contiguous()  # a factorization returns its columns contiguous


def _stacked(*tensors):
    """Views with a dimension for experts in front, of one if there was none."""
    return [tensor if tensor.dim() == 3 else tensor[None] for tensor in tensors]


def _add_product(total, a, b, alpha=1):
    """``total += alpha * a @ b`` for each of a stack."""
    if len(total) == 1:
        total[0].addmm_(a[0], b[0], alpha=alpha)
    else:
        total.baddbmm_(a, b, alpha=alpha)


def search_scales(
    weight: torch.Tensor,
    base: torch.Tensor,
    steps: tuple[int, ...],
    format: str,
    global_scale: torch.Tensor | None = None,
    importance: torch.Tensor | None = None,
) -> torch.Tensor:
    """Of the stored scales some steps from ``base`` on their grid, each group's with the least squared error.

    Args:
        weight: float32 [N, K], rotated; K a multiple of the format's group size.
        base: stored scales [N, K/16] float8_e4m3fn ("nvfp4") or [N, K/32] uint8 E8M0 ("mxfp4").
        steps: how far, in bytes, each candidate is from the base; an earlier one wins a tie. Bytes stay on the grid.
        format: "nvfp4" or "mxfp4".
        global_scale: the NVFP4 divisor, float32 [1]; None for MXFP4.
        importance: float32 [K], what a squared error in each column counts; None: 1.

    Returns:
        Stored scales, of the shape and dtype of ``base``.
    """
    group, dtype = _group_and_dtype(format, global_scale)
    n, k = weight.shape
    if weight.dtype != torch.float32 or k % group:
        raise ValueError(
            f"weight must be float32 [N, K] with K a multiple of {group}, got {weight.dtype} {n} x {k}"
        )
    if base.dtype != dtype or base.shape != (n, k // group):
        raise ValueError(f"base must be {dtype} [{n}, {k // group}], got {base.dtype} {tuple(base.shape)}")
    if importance is not None and (importance.dtype != torch.float32 or importance.shape != (k,)):
        raise ValueError(
            f"importance must be float32 [{k}], got {importance.dtype} {tuple(importance.shape)}"
        )
    weight, base = weight.contiguous(), base.contiguous()
    offsets = torch.tensor(steps, dtype=torch.int32, device=weight.device)
    scale, groups = torch.empty_like(base), 64
    if n:
        with torch.cuda.device_of(weight):
            search_kernel[(triton.cdiv(n * k // group, groups),)](
                weight, base.view(torch.uint8), offsets, weight if importance is None else importance.contiguous(),
                weight if global_scale is None else global_scale, scale.view(torch.uint8), n * k // group, k // group,
                NVFP4=format == "nvfp4", WEIGHTED=importance is not None, STEPS=len(steps), SIZE=group, GROUPS=groups,
            )  # fmt: skip
    return scale


def gptq_solve(
    columns: torch.Tensor, steps: torch.Tensor, inverse: torch.Tensor, upper: torch.Tensor
) -> torch.Tensor:
    """Quantizes column by column, each column's error moved onto the columns that are still to come (GPTQ).

    Args:
        columns: float32 [K, N], the weight's columns in the order in which they are solved; K a multiple of 16. It is used
            as working memory: its contents are lost. [E, K, N], and the others likewise: of E experts, in the same launches.
        steps: float32 [K, N], what one unit of E2M1 is worth in every place.
        inverse: float32 [K, N], its inverse.
        upper: float32 [K, K], the upper Cholesky factor of the inverse of the damped second moments, in the same order.

    Returns:
        float32 [K, N], the dequantized values.
    """
    upper = _check(_SOLVE_GROUP, upper, columns=columns, steps=steps, inverse=inverse)
    result = torch.empty_like(columns)
    columns, steps, inverse, upper, quantized = _stacked(columns, steps, inverse, upper, result)
    experts, k, n = columns.shape
    errors = columns.new_empty((experts, min(BLOCK, k), n))
    with torch.cuda.device_of(columns):
        for start in range(0, k if n else 0, BLOCK):
            stop = min(start + BLOCK, k)
            solve_kernel[(triton.cdiv(n, ROWS), experts)](
                columns[:, start:], steps[:, start:], inverse[:, start:], upper[:, start:, start:],
                quantized[:, start:], errors, n, k, errors.stride(0),
                COUNT=stop - start, SIZE=_SOLVE_GROUP, BLOCK=BLOCK, ROWS=ROWS, num_warps=1,
            )  # fmt: skip
            if stop < k:
                _add_product(columns[:, stop:], upper[:, start:stop, stop:].mT, errors, alpha=-1)
    return result


def gptq_descend(
    target: torch.Tensor,
    current: torch.Tensor,
    scale: torch.Tensor,
    matrix: torch.Tensor,
    passes: int,
    format: str,
    global_scale: torch.Tensor | None = None,
) -> None:
    """Lowers each row's error ``(target - current)^T matrix (target - current)``, in place, by coordinate descent.

    Group by group, every code is set to what leaves the least error while everything else stays as it is; then the group's
    scale moves to a neighbour on its grid if the error is lower with it.

    Args:
        target: float32 [K, N], the weight's columns, in its own order; K a multiple of the format's group size. [E, K, N],
            and the others likewise: of E experts, in the same launches.
        current: float32 [K, N], the dequantized values; overwritten with the better ones.
        scale: stored scales [K/16, N] float8_e4m3fn ("nvfp4") or [K/32, N] uint8 E8M0 ("mxfp4"); overwritten likewise.
        matrix: float32 [K, K], the damped second moments (symmetric).
        passes: how often all groups are visited.
        format: "nvfp4" or "mxfp4".
        global_scale: the NVFP4 divisor, float32 [1] or [E]; None for MXFP4.
    """
    group, dtype = _group_and_dtype(format, global_scale)
    matrix = _check(group, matrix, target=target, current=current)
    *stack, k, n = current.shape
    if scale.dtype != dtype or scale.shape != (*stack, k // group, n) or not scale.is_contiguous():
        raise ValueError(
            f"scale must be contiguous {dtype} {[*stack, k // group, n]}, got {scale.dtype} {tuple(scale.shape)}"
        )
    target, current, stored, matrix = _stacked(target, current, scale.view(torch.uint8), matrix)
    experts = len(current)
    moved = current.new_empty((experts, min(BLOCK, k), n))
    with torch.cuda.device_of(current):
        for _ in range(passes if n else 0):
            gradient = torch.zeros_like(current)
            _add_product(gradient, matrix, target - current)
            for start in range(0, k, BLOCK):
                stop = min(start + BLOCK, k)
                descend_kernel[(triton.cdiv(n, ROWS), experts)](
                    current[:, start:], gradient[:, start:], stored[:, start // group :], matrix[:, start:, start:],
                    matrix if global_scale is None else global_scale, moved, n, k, moved.stride(0),
                    NVFP4=format == "nvfp4", COUNT=stop - start, SIZE=group, BLOCK=BLOCK, ROWS=ROWS, num_warps=1,
                )  # fmt: skip
                if stop < k:
                    _add_product(gradient[:, stop:], matrix[:, stop:, start:stop], moved)
