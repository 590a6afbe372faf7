"""Triton kernels of `_gptq`: one block of columns at a time.

A program takes a few rows of the weight and BLOCK of its columns. Columns are done in groups: what a column does to the
rest of its group is applied at once, to the rest of the block when the group is done; what the block does to later columns is
the caller's work. Tensors are [K, N], one column of the weight contiguous, for each of E experts in the same launch.
"""

import torch
import triton
import triton.language as tl

from ._triton_kernels import _decode_e4m3, _exp2_int, _round_e2m1

BLOCK = 128
ROWS = 8
"""Rows per program: 32 bytes of each column, the least that a GPU reads at once."""

SOLVE_GROUP = 16
"""Columns of a group in the solve."""


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
    current_ptr, gradient_ptr, scale_ptr, matrix_ptr, global_ptr, moved_ptr, N, K, gradient_stride, moved_stride,
    NVFP4: tl.constexpr, COUNT: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Visit COUNT columns. Every pointer is at the block's first column, that of ``matrix`` [K, K] at its diagonal."""
    expert = tl.program_id(1).to(tl.int64)
    current_ptr += expert * K * N
    gradient_ptr += expert * gradient_stride
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
        diagonal = tl.load(square_ptr + within * K + within)
        reciprocal = tl.math.div_rn(tl.full([SIZE], 1.0, tl.float32), diagonal)
        # Codes, one after the other.
        values = before
        for i in range(SIZE):
            hit = (within == i)[:, None]
            factor = tl.load(square_ptr + i * K + within)
            best = values + gradient * reciprocal[:, None]
            best = _round(best * inverse[None, :]) * unit[None, :]
            gradient += factor[:, None] * _pick(values - best, hit)[None, :]
            values = tl.where(hit, best, values)
        # The scale: each value is rounded from what would be best for it alone.
        wanted = values + tl.math.div_rn(gradient, diagonal[:, None] + tl.zeros_like(gradient))
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


def search(weight, base, steps, global_scale, importance, group, scale):
    """Write each group's best scale byte to ``scale``, of the shape of ``base``."""
    groups = 64
    with torch.cuda.device_of(weight):
        search_kernel[(triton.cdiv(scale.numel(), groups),)](
            weight, base, steps, weight if importance is None else importance,
            weight if global_scale is None else global_scale, scale, scale.numel(), scale.shape[1],
            NVFP4=global_scale is not None, WEIGHTED=importance is not None, STEPS=len(steps), SIZE=group, GROUPS=groups,
        )  # fmt: skip


def solve_block(columns, steps, inverse, upper, quantized, errors):
    """Solve the columns [E, count, N], of which every tensor starts at the first; ``upper`` [E, ., .] at its diagonal."""
    experts, count, n = columns.shape
    with torch.cuda.device_of(columns):
        solve_kernel[(triton.cdiv(n, ROWS), experts)](
            columns, steps, inverse, upper, quantized, errors, n, upper.stride(1), errors.stride(0),
            COUNT=count, SIZE=SOLVE_GROUP, BLOCK=BLOCK, ROWS=ROWS, num_warps=1,
        )  # fmt: skip


def descend_block(current, gradient, scale, matrix, global_scale, group, moved):
    """Visit the columns [E, count, N], of which every tensor starts at the first; ``matrix`` [E, ., .] at its diagonal."""
    experts, count, n = current.shape
    with torch.cuda.device_of(current):
        descend_kernel[(triton.cdiv(n, ROWS), experts)](
            current, gradient, scale, matrix, matrix if global_scale is None else global_scale, moved, n,
            matrix.stride(1), gradient.stride(0), moved.stride(0),
            NVFP4=global_scale is not None, COUNT=count, SIZE=group, BLOCK=BLOCK, ROWS=ROWS, num_warps=1,
        )  # fmt: skip
