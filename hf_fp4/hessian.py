"""Second moments of a linear's inputs, and the factor of their inverse that the solver needs."""

from __future__ import annotations

import torch

MAX_DAMPING_ATTEMPTS = 6
"""A failed Cholesky is tried again with ten times the damping, at most this often in all."""


class SecondMoments:
    """Streaming ``S = sum x x^T`` of quantized-stream inputs and ``C = sum x_original x^T`` against the original stream's.

    Both are float32 ``[K, K]`` on the inputs' device, divided by the number of tokens when read.
    """

    def __init__(self, in_features: int, device: torch.device, *, cross: bool):
        self._sum = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)
        self._cross = torch.zeros_like(self._sum) if cross else None
        self.tokens = 0

    def add(self, x: torch.Tensor, original: torch.Tensor | None = None) -> None:
        """Add a batch: ``x`` float32 [M, K], rotated and (W4A4) quantized; ``original`` float32 [M, K], rotated only."""
        self._sum.addmm_(x.T, x)
        if self._cross is not None:
            if original is None:
                raise ValueError(
                    "cross moments need the original stream's inputs beside the quantized stream's"
                )
            self._cross.addmm_(original.T, x)
        self.tokens += x.shape[0]

    @property
    def second(self) -> torch.Tensor:
        """``S / tokens``, [K, K]."""
        return self._sum / max(self.tokens, 1)

    @property
    def cross(self) -> torch.Tensor | None:
        """``C / tokens``, [K, K], rows: original stream, columns: quantized stream; None when not collected."""
        return None if self._cross is None else self._cross / max(self.tokens, 1)


def damping(second: torch.Tensor, damp_percent: float) -> float:
    """``damp_percent`` of the mean diagonal; 1 for moments that are zero everywhere."""
    mean = second.diagonal().mean().item()
    return damp_percent * mean if mean > 0 else 1.0


def damped_cholesky(second: torch.Tensor, damp_percent: float, name: str) -> tuple[torch.Tensor, float]:
    """Lower Cholesky factor of ``S + d I`` and the ``d`` that it took.

    Args:
        second: float32 [K, K], symmetric.
        damp_percent: share of the mean diagonal that is added to the diagonal at first.
        name: the layer, for the error.

    Raises:
        RuntimeError: not positive definite even after `MAX_DAMPING_ATTEMPTS`.
    """
    added = damping(second, damp_percent)
    for _ in range(MAX_DAMPING_ATTEMPTS):
        damped = second.clone()
        damped.diagonal().add_(added)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed and torch.isfinite(lower).all():
            return lower, added
        added *= 10
    raise RuntimeError(
        f"the second moments of {name} are not positive definite even with damping {added / 10:.3g}; "
        "use more calibration text, a larger damp_percent, or add the layer to modules_to_not_convert"
    )


def inverse_cholesky(second: torch.Tensor, damp_percent: float, name: str) -> tuple[torch.Tensor, float]:
    """Upper ``U`` with ``U^T U = (S + d I)^-1``, and ``d``; arguments and errors as `damped_cholesky`."""
    lower, added = damped_cholesky(second, damp_percent, name)
    upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    if failed or not torch.isfinite(upper).all():
        raise RuntimeError(
            f"the inverse second moments of {name} could not be factored; use a larger damp_percent"
        )
    return upper, added


def correct_target(
    weight: torch.Tensor,
    second: torch.Tensor,
    cross: torch.Tensor,
    strength: float,
    damp_percent: float,
    name: str,
) -> torch.Tensor:
    """The weight that, on the quantized stream's inputs, best gives what ``weight`` gives on the original stream's.

    ``(1 - a) W + a W (C + d I)(S + d I)^-1``: least squares, the idea of GPTAQ (arXiv 2504.02692) and Qronos
    (arXiv 2505.11695).

    Args:
        weight: float32 [N, K], rotated.
        second: ``S`` [K, K] of the quantized stream.
        cross: ``C`` [K, K], rows of the original stream.
        strength: ``a`` in [0, 1].
        damp_percent, name: as for `damped_cholesky`.

    Returns:
        float32 [N, K].
    """
    lower, added = damped_cholesky(second, damp_percent, name)
    cross = cross.clone()
    cross.diagonal().add_(added)
    return torch.lerp(weight, torch.cholesky_solve((weight @ cross).T, lower).T, strength)
