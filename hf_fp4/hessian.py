"""Second moments of a linear's inputs, and the factor of their inverse that the solver needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from .rotation import rotate

CACHED_ROWS = 512
"""Tokens that are converted and multiplied at a time on a CPU, so that they stay in its cache."""

MAX_DAMPING_ATTEMPTS = 6
"""A failed Cholesky is tried again with ten times the damping, at most this often in all."""

_SMALL_TRIANGLE = 1024
"""Rows of a triangular matrix that is inverted at once; a larger one is cut in four."""


class SecondMoments:
    """Streaming ``S = sum x x^T`` of quantized-stream inputs and ``C = sum x_original x^T`` against the original stream's.

    ``S`` is float32 ``[K, K]`` on the inputs' device, ``C`` likewise. Where a linear has fewer outputs than inputs, its outputs
    on the original stream may stand for ``x_original``: ``C`` is then ``sum y_original x^T`` ``[cross_rows, K]``.
    """

    def __init__(
        self,
        in_features: int,
        device: torch.device,
        *,
        cross: bool,
        cross_rows: int | None = None,
        kernel: Callable[..., bool] | None = None,
    ):
        self._kernel = kernel
        self._sum = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)
        self._cross = self._sum.new_zeros(cross_rows or in_features, in_features) if cross else None
        self.tokens = 0

    def add(self, x: torch.Tensor, original: torch.Tensor | None = None) -> None:
        """Add a batch.

        Args:
            x: [M, K], rotated and (W4A4) quantized.
            original: [M, K], rotated only; or outputs [M, cross_rows].

        Both float32, or bfloat16, whose products are exact in the float32 that they are added up in; quantized values lose
        nothing in bfloat16, and of the original stream's it keeps what the model's own activations have.
        """
        if self._cross is not None and original is None:
            raise ValueError("cross moments need the original stream's inputs beside the quantized stream's")
        self.tokens += x.shape[0]
        # The kernel takes cross moments of inputs with inputs only.
        square = self._cross is None or self._cross.shape == self._sum.shape
        cross = self._cross if square else None
        added = self._kernel is not None and self._kernel(
            self._sum, cross, x, None if cross is None else original, _panels(self._sum)[0][1]
        )
        if added and square:
            return
        size = CACHED_ROWS if x.device.type == "cpu" else max(len(x), 1)
        for start in range(0, len(x), size):
            rows = slice(start, start + size)
            part = _for_product(x[rows])
            if not added:
                _add_square(self._sum, part)
            if self._cross is not None and original is not None:
                _add_product(self._cross, _for_product(original[rows]), part)

    @property
    def has_cross(self) -> bool:
        """Whether ``C`` is collected."""
        return self._cross is not None

    def forget_cross(self) -> None:
        """Collect second moments only, from now on."""
        self._cross = None

    def sum_over(self, sum_: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Add what other processes collected, cross moments if all did; ``sum_`` adds up a tensor over them, in place."""
        counts = torch.tensor([self.tokens, not self.has_cross], dtype=torch.int64, device=self._sum.device)
        self.tokens, lacking = sum_(counts).tolist()
        if lacking:
            self.forget_cross()
        for start, stop in _panels(self._sum):
            sum_(self._sum[start:stop, :stop])
        if self._cross is not None:
            sum_(self._cross)

    def mean(self, divisor: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``S / tokens`` and ``C / tokens`` (None when not collected), in the memory of the sums: ask once.

        ``C`` has rows of the original stream and columns of the quantized stream. divisor: the power of two by which
        every ``x`` is still to be divided, [1].
        """
        tokens = max(self.tokens, 1)
        _mirror(self._sum)
        self._sum.div_(tokens if divisor is None else tokens * divisor**2)
        if self._cross is not None:
            self._cross.div_(tokens if divisor is None else tokens * divisor)
        return self._sum, self._cross


def _add_square(total: torch.Tensor, x: torch.Tensor) -> None:
    """``total += x^T x`` in float32, of each panel's rows up to the panel's end: the rest is for `_mirror`."""
    for start, stop in _panels(total):
        _add_product(total[start:stop, :stop], x[:, start:stop], x[:, :stop])


def _mirror(total: torch.Tensor) -> None:
    """Fill what `_add_square` left out of a symmetric matrix."""
    for start, stop in _panels(total):
        total[start:stop, stop:] = total[stop:, start:stop].T


def _panels(total: torch.Tensor) -> list[tuple[int, int]]:
    """First and last row of each: at most eight, none so small that its product would be slow."""
    features = len(total)
    size = max(1024 if total.is_cuda else 256, -(-features // 8))
    return [(start, min(start + size, features)) for start in range(0, features, size)]


def _for_product(x: torch.Tensor) -> torch.Tensor:
    """``x`` in what `_add_product` multiplies: bfloat16 stays so where its products are added up in float32."""
    return x if x.is_cuda and x.dtype == torch.bfloat16 else x.float()


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """``total += a^T b`` in float32."""
    if a.dtype == b.dtype == torch.bfloat16:
        total += torch.mm(a.T, b, out_dtype=torch.float32)
    else:
        total.addmm_(a.float().T, b.float())


def blended(
    own: SecondMoments,
    pooled: tuple[torch.Tensor, torch.Tensor | None] | None,
    divisor: torch.Tensor | None = None,
) -> tuple[float, torch.Tensor, torch.Tensor | None]:
    """Mean moments of an expert that may have seen few tokens: each that it lacks counts as an average one of its layer.

    With ``n`` tokens for ``K`` features, fewer of which leave second moments singular: ``share = min(1, n / K)`` and
    ``share * own + (1 - share) * pooled``, of second and cross moments alike, so that they still belong together.

    Args:
        own: of the tokens routed to it, maybe none; in whose memory the result is, see `SecondMoments.mean`.
        pooled: the means of the tokens of all experts; None when no expert lacks any.
        divisor: as for `SecondMoments.mean`.

    Returns:
        The share, second and cross moments [K, K] (None when not collected).
    """
    second, cross = own.mean(divisor)
    share = min(1.0, own.tokens / len(second))
    if share == 1.0 or pooled is None:
        return 1.0, second, cross
    second.lerp_(pooled[0], 1 - share)
    if cross is not None and pooled[1] is not None:
        cross.lerp_(pooled[1], 1 - share)
    return share, second, cross


def damping(second: torch.Tensor, damp_percent: float) -> torch.Tensor:
    """``damp_percent`` of the mean diagonal; 1 for moments that are zero everywhere. Of a stack, that of each."""
    mean = second.diagonal(dim1=-2, dim2=-1).mean(-1)
    return torch.where(mean > 0, damp_percent * mean, 1.0)


def damped_cholesky(second: torch.Tensor, damp_percent: float, name: str) -> tuple[torch.Tensor, float]:
    """Lower Cholesky factor of ``S + d I`` and the ``d`` that it took.

    Args:
        second: float32 [K, K], symmetric.
        damp_percent: share of the mean diagonal that is added to the diagonal at first.
        name: the layer, for the error.

    Raises:
        RuntimeError: not positive definite even after `MAX_DAMPING_ATTEMPTS`.
    """
    return _damped_cholesky(second, second.clone, damp_percent, name)


def _damped_cholesky(
    second: torch.Tensor, copy: Callable[[], torch.Tensor], damp_percent: float, name: str
) -> tuple[torch.Tensor, float]:
    """`damped_cholesky` of ``copy()``, in its memory; ``second`` with its columns in any order."""
    added = damping(second, damp_percent).item()
    for _ in range(MAX_DAMPING_ATTEMPTS):
        damped = copy().mT  # symmetric, and in the layout that is factored in place
        damped.diagonal().add_(added)
        failed = torch.empty((), dtype=torch.int32, device=damped.device)
        torch.linalg.cholesky_ex(damped, out=(damped, failed))
        # What is not finite in a row is not finite in its diagonal either.
        if not failed and torch.isfinite(damped.diagonal()).all():
            return damped, added
        del damped
        added *= 10
    raise RuntimeError(
        f"the second moments of {name} are not positive definite even with damping {added / 10:.3g}; "
        "use more calibration text, a larger damp_percent, or add the layer to modules_to_not_convert"
    )


@dataclass(frozen=True)
class DampedMoments:
    """Second moments, factored once for all that needs their inverse; make one with `of`.

    second: ``S`` float32 [K, K]; added: ``d``; inverse: ``(S + d I)^-1`` [K, K]; name: the layer, for errors.
    """

    second: torch.Tensor
    added: float
    inverse: torch.Tensor
    name: str

    @classmethod
    def of(cls, second: torch.Tensor, damp_percent: float, name: str) -> DampedMoments:
        """Arguments and errors as `damped_cholesky`."""
        lower, added = damped_cholesky(second, damp_percent, name)
        return cls(second, added, torch.cholesky_inverse(lower), name)

    def rotated(self, size: int | None) -> DampedMoments:
        """Those of inputs rotated by ``size``; no new factorization, since a rotation commutes with the damping."""
        second, inverse = (rotate(rotate(m, size).T, size) for m in (self.second, self.inverse))
        return replace(self, second=second, inverse=inverse)

    def upper(self, order: torch.Tensor | None = None, *, check: bool = True) -> torch.Tensor:
        """Upper ``U`` with ``U^T U = (S + d I)^-1`` [K, K], of the columns in the order ``order`` (int64 [K]).

        Without ``check`` a failure is not noticed, and nothing waits for the GPU.
        """
        inverse = self.inverse if order is None else self.inverse[order[:, None], order]
        lower, failed = torch.linalg.cholesky_ex(inverse)  # on a GPU this takes less time than the upper one
        if check and (failed or not torch.isfinite(lower).all()):
            raise RuntimeError(
                f"the inverse second moments of {self.name} could not be factored; use a larger damp_percent"
            )
        return lower.mT


class OrderedFactor:
    """The factor of damped second moments in the order of a solve, for its target and then its ``U``; make one with `of`.

    Of ``A = S + d I``, columns in the reverse order, ``A = L L^T``; then ``U`` is ``L^-1`` with rows and columns reversed. So one
    factorization and one inverse of a triangle, both in the memory of one matrix, give what `DampedMoments` takes three for.

    Or those of a stack of E: then all matrices have E in front, and ``added`` is float32 [E].
    """

    def __init__(self, lower: torch.Tensor, added: float | torch.Tensor, reverse: torch.Tensor):
        self._lower, self.added, self._reverse = lower, added, reverse

    @classmethod
    def of(
        cls, second: torch.Tensor, order: torch.Tensor | None, damp_percent: float, name: str
    ) -> OrderedFactor:
        """Arguments and errors as `damped_cholesky`; order: of the columns in the solve, int64 [K]; None: as they are."""
        reverse = _reverse(order, second)
        lower, added = _damped_cholesky(second, lambda: _permuted(second, reverse), damp_percent, name)
        return cls(lower, added, reverse)

    @classmethod
    def stack(
        cls, second: torch.Tensor, order: torch.Tensor | None, damp_percent: float, names: Sequence[str]
    ) -> OrderedFactor:
        """`of` for each of ``second`` [E, K, K] and ``order`` [E, K], factored as one batch.

        Those that need more damping get it one by one.
        """
        reverse = _reverse(order, second).expand(second.shape[:-1])
        added = damping(second, damp_percent)
        damped = second[
            torch.arange(len(second), device=second.device)[:, None, None],
            reverse[:, :, None],
            reverse[:, None],
        ]
        damped.diagonal(dim1=1, dim2=2).add_(added[:, None])
        lower, failed = torch.linalg.cholesky_ex(damped)
        fine = (failed == 0) & lower.diagonal(dim1=1, dim2=2).isfinite().all(1)
        for i in (~fine).nonzero().flatten().tolist():
            own = None if order is None else order[i]
            single = cls.of(second[i], own, damp_percent, names[i])
            lower[i], added[i] = single._lower, single.added
        return cls(lower, added, reverse)

    def part(self, rows: slice) -> OrderedFactor:
        """Some of a stack."""
        assert isinstance(self.added, torch.Tensor)
        return OrderedFactor(self._lower[rows], self.added[rows], self._reverse[rows])

    def correct_target(self, weight: torch.Tensor, wanted: torch.Tensor, strength: float) -> torch.Tensor:
        """The weight that, on the quantized stream's inputs, best gives what ``weight`` gives on the original stream's.

        ``(1 - a) W + a W (C + d I)(S + d I)^-1``: least squares, the idea of GPTAQ (arXiv 2504.02692) and Qronos
        (arXiv 2505.11695).

        Args:
            weight: float32 [N, K], rotated.
            wanted: ``W C`` [N, K], whose memory is used; ``C`` [K, K] has rows of the original stream, ``S`` is the quantized
                stream's.
            strength: ``a`` in [0, 1].

        Returns:
            float32 [N, K].
        """
        if isinstance(self.added, float):
            wanted.add_(weight, alpha=self.added)
        else:
            wanted.add_(weight * self.added[:, None, None])
        wanted = _columns_at(wanted, self._reverse)
        wanted = torch.linalg.solve_triangular(self._lower.mT, wanted, upper=True, left=False)
        wanted = torch.linalg.solve_triangular(self._lower, wanted, upper=False, left=False)
        return torch.lerp(weight, _columns_at(wanted, self._reverse.argsort()), strength)

    def upper(self) -> torch.Tensor:
        """As `DampedMoments.upper`, in the order that the factor was made for; the factor is lost, so ask last and once."""
        lower = self._lower
        del self._lower
        _invert_lower(lower)
        reversed_ = lower.flip(-2, -1)
        del lower
        return reversed_.contiguous()


def _reverse(order: torch.Tensor | None, second: torch.Tensor) -> torch.Tensor:
    order = torch.arange(second.shape[-1], device=second.device) if order is None else order
    return order.flip(-1)


def _permuted(matrix: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    return matrix[order[:, None], order]


def _columns_at(matrix: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Columns of a matrix in the order ``places`` [K]; each of a stack in its own, [E, K]."""
    if places.dim() == 1:
        return matrix[:, places]
    return matrix.gather(-1, places[:, None].expand_as(matrix))


def _invert_lower(lower: torch.Tensor) -> None:
    """Invert a lower triangular matrix, or each of a stack, in place, most of it in products of large matrices."""
    size = lower.shape[-1]
    if size <= _SMALL_TRIANGLE:
        eye = torch.eye(size, dtype=lower.dtype, device=lower.device)
        lower.copy_(torch.linalg.solve_triangular(lower, eye, upper=False))
        return
    half = size // 2
    first, below, last = lower[..., :half, :half], lower[..., half:, :half], lower[..., half:, half:]
    _invert_lower(first)
    _invert_lower(last)
    multiply = below.addmm_ if below.dim() == 2 else below.baddbmm_
    multiply(last @ below, first, beta=0, alpha=-1)
