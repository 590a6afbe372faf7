"""Every numeric tolerance floor of the test suite.

A result is judged against float64 and against what eager PyTorch gets on the same operands: its error may be at most
`EAGER_FACTOR` times eager's, plus a floor for the cases in which eager happens to be exact.
"""

from __future__ import annotations

import torch

EAGER_FACTOR = 2.0

FLOOR = {torch.float32: 1e-6, torch.bfloat16: 2e-3, torch.float16: 2.5e-4}
"""Relative error (Frobenius norm) always granted to a linear: about half a unit in the last place of the dtype."""

NEAR_TIE = 1e-3
"""A GPTQ code may differ from float64's only if the value is this close to a rounding boundary, in units of E2M1."""

ROTATION = 2e-6
"""Relative to the norm of the row, float32 Hadamard against float64."""


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of ``expected``, in float64; infinite if anything is not finite."""
    actual, expected = actual.double(), expected.double()
    if not torch.isfinite(actual).all():
        return float("inf")
    return ((actual - expected).norm() / expected.norm().clamp_min(1e-300)).item()


def assert_as_good_as_eager(actual: torch.Tensor, eager: torch.Tensor, expected: torch.Tensor) -> None:
    """``expected`` float64; ``actual`` and ``eager`` in the dtype that is tested."""
    assert actual.dtype == eager.dtype and actual.shape == expected.shape
    error, allowed = relative_error(actual, expected), relative_error(eager, expected)
    limit = EAGER_FACTOR * allowed + FLOOR[actual.dtype]
    assert error <= limit, (
        f"relative error {error:.3g}, eager {actual.dtype} has {allowed:.3g}, limit {limit:.3g}"
    )
