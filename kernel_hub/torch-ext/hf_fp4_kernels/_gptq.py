"""The parts of GPTQ on an FP4 grid that are not matrix products: the search of block scales, the loop over columns, and the
coordinate descent over codes and scales after it.

In the last two a kernel takes some rows of the weight and BLOCK of its columns. Columns are done in groups: what a column does
to the rest of its group is applied at once, to the rest of the block when the group is done, to the rest of the panel when the
block is done, by a matrix product of torch (in the precision that torch is set to; this file needs real float32). What all
earlier columns do to a panel is one product, before the panel is begun. Tensors are [K, N], one column of the weight
contiguous, or [E, K, N] for several experts at once.
"""

import functools

import torch

from . import _cpu

BLOCK = 128

PANEL = 512
"""Columns, a multiple of BLOCK: enough rows for a product to be fast, and few for the slower products within a panel."""

_SOLVE_GROUP = 16
_GROUPS = {"nvfp4": 16, "mxfp4": 32}


def _kernels_for(device: torch.device):
    """search, solve_block and descend_block: compiled on a CPU that has them, Triton's elsewhere."""
    if device.type == "cpu" and _cpu.is_compiled():
        return _cpu.ops.cpu_search, _cpu_solve_block, _cpu_descend_block
    from . import _gptq_kernels  # importing Triton takes a while

    return _gptq_kernels.search, _gptq_kernels.solve_block, _gptq_kernels.descend_block


def _cpu_solve_block(*stacks):
    for tensors in zip(*stacks, strict=True):
        _cpu.ops.cpu_solve_block(*tensors)


def _cpu_descend_block(current, gradient, scale, matrix, global_scale, group, moved):
    for e in range(len(current)):
        divisor = None if global_scale is None else global_scale[e : e + 1]
        _cpu.ops.cpu_descend_block(current[e], gradient[e], scale[e], matrix[e], divisor, group, moved[e])


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


class _Multiplicand:
    """Rows [E, K, N] that are multiplied by matrices, in the memory of float32 [E, K, N].

    On a GPU each number is the sum of two bfloat16 numbers. Of the four products of two such sums the three largest are added
    up in float32 by tensor cores: each term is off by about 2^-16 of itself, which is what sums over as many tokens as
    calibration takes are off by, in a fraction of the time that float32 takes.
    """

    def __init__(self, memory):
        self._rows, n = memory, memory.shape[-1]
        pairs = memory.view(torch.bfloat16) if memory.is_cuda else None
        self._parts = None if pairs is None else (pairs[..., :n], pairs[..., n:])

    def put(self, start, rows):
        """Set the rows from ``start`` on."""
        place = slice(start, start + rows.shape[1])
        if self._parts is None:
            self._rows[:, place] = rows
            return
        for part, values in zip(self._parts, _two_parts(rows), strict=True):
            part[:, place] = values

    def add_product(self, total, factor, alpha=1):
        """``total += alpha * factor @ rows``, of the first rows, as many as ``factor`` [E, M, .] has columns."""
        first = slice(factor.shape[-1])
        if self._parts is None:
            _add_product(total, factor, self._rows[:, first], alpha)
            return
        factor_high, factor_low = _two_parts(factor)
        high, low = (part[:, first] for part in self._parts)
        for a, b in ((factor_low, high), (factor_high, low), (factor_high, high)):
            if len(total) == 1:
                total[0].add_(torch.mm(a[0], b[0], out_dtype=torch.float32), alpha=alpha)
            else:
                total.add_(torch.bmm(a, b, out_dtype=torch.float32), alpha=alpha)


def _two_parts(x):
    """The bfloat16 numbers next to ``x``, and next to what is left."""
    high = x.bfloat16()
    return high, (x - high).bfloat16()


@functools.cache
def _steps_on(device, steps):
    """Made once: a copy to a GPU waits for all that runs there."""
    with torch.inference_mode(False):
        return torch.tensor(steps, dtype=torch.int32, device=device)


def add_moments(
    second: torch.Tensor,
    cross: torch.Tensor | None,
    x: torch.Tensor,
    original: torch.Tensor | None,
    panel: int,
) -> bool:
    """``second += x^T x`` and ``cross += original^T x``, where that takes less time here than in PyTorch.

    Args:
        second: contiguous float32 [K, K]. Of each row only the columns up to the end of its panel are needed: the matrix is
            symmetric.
        cross: contiguous float32 [K, K], or None with ``original`` None.
        x, original: [M, K].
        panel: into how many rows each ``second`` is divided.

    Returns:
        Whether it was done: with AMX or `vdpbf16ps`, for contiguous bfloat16 tokens with K a multiple of 16. Products are exact, and added
        up in float32.
    """
    tokens = [x] if original is None else [x, original]
    fit = all(t.dtype == torch.bfloat16 and t.device.type == "cpu" and t.is_contiguous() for t in tokens)
    if not fit or x.shape[1] % 16 or not _cpu.is_compiled():
        return False
    if _cpu.ops.cpu_isa() not in ("amx", "avx512_bf16"):
        return False
    _cpu.ops.cpu_add_moments(second, cross, x, original, panel)
    return True


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
    scale = torch.empty_like(base, memory_format=torch.contiguous_format)
    search, _, _ = _kernels_for(weight.device)
    if n:
        search(
            weight.contiguous(), base.contiguous().view(torch.uint8),
            _steps_on(weight.device, tuple(steps)), global_scale,
            None if importance is None else importance.contiguous(), group, scale.view(torch.uint8),
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
    solved = _Multiplicand(columns)  # errors, in the place of columns that are not read again
    _, solve_block, _ = _kernels_for(columns.device)
    for first in range(0, k if n else 0, PANEL):
        last = min(first + PANEL, k)
        if first:
            solved.add_product(columns[:, first:last], upper[:, :first, first:last].mT, alpha=-1)
        for start in range(first, last, BLOCK):
            stop = min(start + BLOCK, last)
            block = slice(start, stop)
            solve_block(
                columns[:, block],
                steps[:, block],
                inverse[:, block],
                upper[:, start:, start:],
                quantized[:, block],
                errors,
            )
            these = errors[:, : stop - start]
            if stop < last:
                _add_product(columns[:, stop:last], upper[:, block, stop:last].mT, these, alpha=-1)
            solved.put(start, these)
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
    difference = _Multiplicand(torch.empty_like(current))
    _, _, descend_block = _kernels_for(current.device)
    panels = [(first, min(first + PANEL, k)) for first in range(0, k if n else 0, PANEL)]
    for first, last in panels:
        difference.put(first, target[:, first:last] - current[:, first:last])
    for _ in range(passes):
        for first, last in panels:
            gradient = current.new_zeros((experts, last - first, n))
            difference.add_product(gradient, matrix[:, first:last])
            for start in range(first, last, BLOCK):
                stop = min(start + BLOCK, last)
                block, scales = slice(start, stop), stored[:, start // group : stop // group]
                square = matrix[:, start:, start:]
                here = gradient[:, start - first : stop - first]
                descend_block(current[:, block], here, scales, square, global_scale, group, moved)
                if stop < last:
                    these = moved[:, : stop - start]
                    _add_product(gradient[:, stop - first :], matrix[:, stop:last, block], these)
            difference.put(first, target[:, first:last] - current[:, first:last])
