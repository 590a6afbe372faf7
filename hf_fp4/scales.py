"""Block scales and global scales of weights and activations.

A rule picks, per block, one scale out of a short list of stored scales by the squared error it leaves. Global scales are
powers of two: multiplying by them is exact, so the calibrated and the final scale of an input give the same rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from .formats import E2M1_MAX, E4M3_MAX, FP4Format, round_to_e2m1

WEIGHT_SCALE_RULES = ("absmax", "mse", "four_over_six", "hessian")
ACTIVATION_SCALE_RULES = {
    FP4Format.NVFP4: ("absmax", "four_over_six", "mse"),
    FP4Format.MXFP4: ("absmax", "mse"),
}
"""Of each format, the default last."""

FUSED_LINEARS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)
"""Sibling linears that serving engines run as one matrix, and which therefore share their global scales."""

INPUT_HEADROOM = 2.0
"""A static input scale leaves at least this factor over the calibrated maximum before values saturate."""

_WEIGHT_RANGE = 256.0 * E2M1_MAX
"""A weight tensor's maximum maps to at most this, so that a block may still take a scale 1.75 times as large."""

_E4M3_STEPS = range(-8, 7)
"""Neighbours of absmax/6 on the E4M3 grid, in bytes: 8 bytes are one octave, so factors of about 0.5 to 1.7."""

_E8M0_STEPS = range(-1, 3)

_CACHED_ROWS = 256
"""Rows of activations that are quantized at a time on a CPU, so that intermediate results stay in its cache."""


def fused_partners(name: str) -> tuple[str, ...]:
    """Full names of the linears that share ``name``'s global scales, itself included, whether or not they exist."""
    parent, _, child = name.rpartition(".")
    for group in FUSED_LINEARS:
        if child in group:
            return tuple(f"{parent}.{c}" if parent else c for c in group)
    return (name,)


def weight_global_scale(absmax: torch.Tensor) -> torch.Tensor:
    """NVFP4 divisor, float32 [1], for weights (of all fused partners) whose largest magnitude is ``absmax``."""
    return _power_of_two_below(_WEIGHT_RANGE, absmax)


def input_global_scale(absmax: torch.Tensor) -> torch.Tensor:
    """NVFP4 divisor, float32 [1], for inputs whose calibrated maximum is ``absmax``, with `INPUT_HEADROOM`."""
    return _power_of_two_below(E4M3_MAX * E2M1_MAX / INPUT_HEADROOM, absmax)


def weight_scales(
    weight: torch.Tensor,
    fmt: FP4Format,
    rule: str,
    global_scale: torch.Tensor | None = None,
    importance: torch.Tensor | None = None,
    search: Callable[..., torch.Tensor] | None = None,
) -> torch.Tensor:
    """Block scales of a weight.

    Args:
        weight: float32 ``[N, K]``, already rotated.
        fmt: the format.
        rule: ``"absmax"``, ``"mse"`` (search of the scale grid), ``"four_over_six"`` (NVFP4: absmax maps to 6 or to 4) or
            ``"hessian"`` (the same search, errors weighted by ``importance``).
        global_scale: float32 [1], the NVFP4 divisor; ``None`` for MXFP4.
        importance: float32 ``[K]``, the diagonal of the second moments of the inputs, for ``"hessian"``.
        search: a kernel that searches the grid, ``search_scales`` of a kernel package; ``None``: done here.

    Returns:
        Stored scales ``[N, K/group_size]`` of `FP4Format.scale_dtype`; never zero.
    """
    blocks = weight.unflatten(-1, (-1, fmt.group_size))
    if rule != "hessian":
        importance = None
    elif importance is None:
        raise ValueError(
            'scale_rule="hessian" needs the second moments of the inputs; give it calibration data'
        )
    if search is not None and rule in ("mse", "hessian"):
        (base,) = _candidates(blocks, fmt, "absmax", global_scale, activations=False)
        return search(weight, base, _steps_of(fmt), fmt.value, global_scale, importance)
    weights = None if importance is None else importance.view(-1, fmt.group_size)
    candidates = _candidates(blocks, fmt, rule, global_scale, activations=False)
    return candidates[0] if len(candidates) == 1 else _best(blocks, candidates, fmt, global_scale, weights)[0]


def fake_quantize_activations(
    x: torch.Tensor, fmt: FP4Format, rule: str, global_scale: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Quantize rotated activations with dynamic block scales; the one definition that every backend follows.

    Args:
        x: float32 ``[..., K]``, already rotated.
        fmt: the format.
        rule: one of `ACTIVATION_SCALE_RULES`: ``"absmax"``; ``"four_over_six"`` (NVFP4: absmax maps to 6 or to 4);
            ``"mse"`` (NVFP4: those, and the E4M3 number under absmax/6; MXFP4: two neighbouring exponents).
        global_scale: float32 ``[1]``, the static NVFP4 divisor; ``None`` takes one per token. Ignored for MXFP4.

    Returns:
        ``(e2m1 * block scale, float32 [..., K]; the divisor, [1] or [..., 1], None for MXFP4)``.
    """
    if not fmt.has_global_scale:
        global_scale = None
    elif global_scale is None:
        global_scale = _power_of_two_below(_WEIGHT_RANGE, x.abs().amax(-1, keepdim=True))
    rows = x.reshape(-1, x.shape[-1])
    parts = rows.split(_CACHED_ROWS if x.device.type == "cpu" else max(len(rows), 1))
    divisors: Sequence[torch.Tensor | None] = [global_scale] * len(parts)
    if global_scale is not None and global_scale.numel() == len(rows) > 1:  # one per token
        divisors = global_scale.reshape(-1, 1).split(len(parts[0]))
    values = [_fake_quantize(part, fmt, rule, divisor) for part, divisor in zip(parts, divisors, strict=True)]
    return torch.cat(values).view(x.shape), global_scale


def _fake_quantize(
    x: torch.Tensor, fmt: FP4Format, rule: str, global_scale: torch.Tensor | None
) -> torch.Tensor:
    blocks = x.unflatten(-1, (-1, fmt.group_size))
    scale, codes = _best(
        blocks, _candidates(blocks, fmt, rule, global_scale, activations=True), fmt, global_scale, None
    )
    return codes.mul_(fmt.decode_scale(scale)[..., None]).flatten(-2)


def step(scale: torch.Tensor, fmt: FP4Format, global_scale: torch.Tensor | None) -> torch.Tensor:
    """What one unit of E2M1 is worth, float32: ``scale / global_scale``."""
    decoded = fmt.decode_scale(scale)
    return decoded if global_scale is None else decoded / global_scale


def inverse_step(scale: torch.Tensor, fmt: FP4Format, global_scale: torch.Tensor | None) -> torch.Tensor:
    """What a value is multiplied by before it is rounded to E2M1, float32: ``global_scale / scale``."""
    decoded = fmt.decode_scale(scale)
    return decoded.reciprocal() if global_scale is None else global_scale / decoded


def _power_of_two_below(target: float, absmax: torch.Tensor) -> torch.Tensor:
    """The largest power of two, from 2**-100 to 2**100, that is not over ``target / absmax``.

    By its bits: on a GPU that is not the current one PyTorch 2.11's `torch.ldexp` gives what was in memory.
    """
    quotient = target / absmax.float().clamp_min(2.0**-100)
    exponent_bits = quotient.view(torch.int32) & 0x7F800000
    return exponent_bits.view(torch.float32).clamp(2.0**-100, 2.0**100)


def _steps_of(fmt: FP4Format) -> tuple[int, ...]:
    """Distances of the candidates of a search from absmax's scale on its grid, the preferred one first."""
    return tuple(sorted(_E4M3_STEPS if fmt.has_global_scale else _E8M0_STEPS, key=abs))


def _candidates(
    blocks: torch.Tensor, fmt: FP4Format, rule: str, global_scale: torch.Tensor | None, *, activations: bool
) -> list[torch.Tensor]:
    """Stored scales to choose from, the preferred one first (it wins ties)."""
    absmax = blocks.abs().amax(-1)
    if global_scale is not None:
        base = fmt.encode_scale(absmax / E2M1_MAX * global_scale)
        if rule == "absmax":
            return [base]

        def moved(scale: torch.Tensor, bytes: int) -> torch.Tensor:
            code = scale.view(torch.uint8).short() + bytes
            return code.clamp(*fmt.scale_bytes).to(torch.uint8).view(torch.float8_e4m3fn)

        if rule == "four_over_six" or activations:
            four = fmt.encode_scale(absmax / 4 * global_scale)
            return [base, four] if rule == "four_over_six" else [base, four, moved(base, -1)]
        return [moved(base, s) for s in _steps_of(fmt)]
    base = fmt.encode_scale(
        absmax / 4
    )  # floor(log2(absmax)) - 2: 2 is the exponent of 6, the largest E2M1 value
    if rule == "absmax":
        return [base]
    steps = (0, 1) if activations else _steps_of(fmt)
    return [(base.short() + s).clamp(*fmt.scale_bytes).to(torch.uint8) for s in steps]


def _best(
    blocks: torch.Tensor,
    candidates: list[torch.Tensor],
    fmt: FP4Format,
    global_scale: torch.Tensor | None,
    weights: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Per block the candidate with the least (weighted) squared error, the earlier one on a tie, and its E2M1 values."""

    def codes_of(candidate: torch.Tensor) -> torch.Tensor:
        return round_to_e2m1(blocks * inverse_step(candidate, fmt, global_scale)[..., None])

    def error_of(candidate: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        error = (codes * step(candidate, fmt, global_scale)[..., None]).sub_(blocks).square_()
        return (error if weights is None else error.mul_(weights)).sum(-1)

    best, *others = candidates
    best_codes = codes_of(best)
    if not others:
        return best, best_codes
    best_error = error_of(best, best_codes)
    for candidate in others:
        codes = codes_of(candidate)
        error = error_of(candidate, codes)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_codes = torch.where(better[..., None], codes, best_codes)
        best = torch.where(better, candidate.view(torch.uint8), best.view(torch.uint8)).view(fmt.scale_dtype)
    return best, best_codes
