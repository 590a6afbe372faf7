"""Scale rules against float64 searches that share nothing with the code but the definitions in `spec`."""

import math

import numpy as np
import pytest
import spec
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_fp4.formats import FP4Format
from hf_fp4.scales import (
    ACTIVATION_SCALE_RULES,
    INPUT_HEADROOM,
    WEIGHT_SCALE_RULES,
    fake_quantize_activations,
    fused_partners,
    input_global_scale,
    inverse_step,
    step,
    weight_global_scale,
    weight_scales,
)

pytestmark = pytest.mark.once

NVFP4, MXFP4 = FP4Format
E4M3_POSITIVE = range(1, 0x7E + 1)
WEIGHT_CASES = [(NVFP4, rule) for rule in ("absmax", "mse", "four_over_six", "hessian")] + [
    (MXFP4, rule) for rule in ("absmax", "mse", "hessian")
]
ACTIVATION_CASES = [
    (NVFP4, "absmax"),
    (NVFP4, "four_over_six"),
    (NVFP4, "mse"),
    (MXFP4, "absmax"),
    (MXFP4, "mse"),
]


def blocks_of(x, fmt):
    return np.asarray(x, np.float64).reshape(*x.shape[:-1], -1, spec.GROUP[fmt.value])


def error_of(blocks, scale_bytes, fmt, global_scale, importance=1.0):
    """Squared error [N, G] in float64 of blocks [N, G, g] under scale bytes [N, G]."""
    steps = (spec.decode_scales(fmt.value, scale_bytes) / global_scale)[..., None]
    return (importance * (spec.round_e2m1(blocks / steps) * steps - blocks) ** 2).sum(-1)


def candidates_of(blocks, fmt, rule, global_scale, activations=False):
    """All scale bytes a rule may choose from, [candidates, N, G]."""
    absmax = np.abs(blocks).max(-1)
    if fmt is NVFP4:
        maps_to_6, maps_to_4 = (
            np.maximum(spec.nearest_codes(absmax / v * global_scale, spec.E4M3[: 0x7E + 1]), 1)
            for v in (6, 4)
        )
        if rule == "absmax":
            return maps_to_6[None]
        if rule == "four_over_six":
            return np.stack((maps_to_6, maps_to_4))
        if activations:
            return np.stack((maps_to_6, maps_to_4, np.maximum(maps_to_6 - 1, 1)))
        return np.stack([np.clip(maps_to_6 + s, 1, 0x7E) for s in range(-8, 7)])
    with np.errstate(divide="ignore"):
        base = np.clip(np.floor(np.log2(absmax)) - 2 + 127, 0, 254).astype(np.int64)
    steps = (0,) if rule == "absmax" else (0, 1) if activations else (-1, 0, 1, 2)
    return np.stack([np.clip(base + s, 0, 254) for s in steps])


def assert_best(chosen, blocks, fmt, rule, global_scale, importance=1.0, activations=False):
    candidates = candidates_of(blocks, fmt, rule, global_scale, activations)
    assert (candidates == chosen).any(0).all(), "a scale that the rule does not allow"
    errors = np.stack([error_of(blocks, c, fmt, global_scale, importance) for c in candidates])
    actual = error_of(blocks, chosen, fmt, global_scale, importance)
    assert (actual <= errors.min(0) * (1 + 1e-5) + 1e-30).all(), "not the scale of least error"


def make_weight(fmt, rows=24, groups=6):
    """Gaussian, with the spread of real weights: rows and single values of other magnitudes, and a block of zeros."""
    weight = torch.randn(rows, groups * fmt.group_size) * torch.logspace(-3, 0, rows)[:, None]
    weight[torch.rand_like(weight) < 0.02] *= 8
    weight[3, : fmt.group_size] = 0
    return weight


def global_scale_of(weight, fmt):
    return weight_global_scale(weight.abs().amax().view(1)) if fmt is NVFP4 else None


def number(global_scale):
    return 1.0 if global_scale is None else global_scale.item()


# Global scales


@pytest.mark.parametrize("absmax", [1e-6, 0.01, 0.375, 0.3750001, 0.7, 1.0, 1.5, 6.0, 123.0, 1e5])
def test_global_scales_are_the_largest_powers_of_two_that_fit(absmax):
    absmax = torch.tensor([absmax])
    for scale, largest in (
        (weight_global_scale(absmax), 256),  # leaves room for block scales 1.75 times as large
        (input_global_scale(absmax), 448 / INPUT_HEADROOM),
    ):
        assert scale.shape == (1,) and scale.dtype == torch.float32
        assert math.log2(scale.item()) == int(math.log2(scale.item()))
        block_scale = absmax.double().item() / 6 * scale.item()
        assert block_scale <= largest < 2 * block_scale


def test_the_global_scale_of_zeros_is_positive_and_finite():
    for rule in (weight_global_scale, input_global_scale):
        scale = rule(torch.zeros(1))
        assert scale.isfinite() and scale > 0


def test_input_headroom_is_at_least_two():
    """A static input scale must not clip what is twice as large as anything in the calibration data."""
    x = torch.randn(64, 64)
    scale = input_global_scale(x.abs().amax().view(1))
    values, _ = fake_quantize_activations(2 * x, NVFP4, "absmax", scale)
    assert INPUT_HEADROOM >= 2
    assert values.abs().amax() / scale >= 2 * x.abs().amax() * (1 - 2**-4)  # half a step of E4M3


# Weight scales


def test_the_cases_cover_every_rule():
    assert {rule for _, rule in WEIGHT_CASES} == set(WEIGHT_SCALE_RULES)
    assert ACTIVATION_SCALE_RULES == {
        fmt: tuple(rule for f, rule in ACTIVATION_CASES if f is fmt) for fmt in (NVFP4, MXFP4)
    }


@pytest.mark.parametrize("fmt, rule", WEIGHT_CASES)
def test_weight_scales_are_the_best_allowed(fmt, rule):
    weight = make_weight(fmt)
    global_scale = global_scale_of(weight, fmt)
    importance = torch.rand(weight.shape[1]) ** 4 if rule == "hessian" else None
    scale = weight_scales(weight, fmt, rule, global_scale, importance)
    assert scale.dtype == fmt.scale_dtype and scale.shape == (24, 6)
    blocks, chosen = blocks_of(weight, fmt), scale.view(torch.uint8).numpy()
    weights = 1.0 if importance is None else blocks_of(importance, fmt)
    assert_best(chosen, blocks, fmt, rule, number(global_scale), weights)
    if fmt is NVFP4:
        assert (chosen > 0).all() and (chosen < 0x7F).all()


@pytest.mark.parametrize("fmt, rule", [case for case in WEIGHT_CASES if case[1] != "absmax"])
def test_a_search_is_never_worse_than_absmax_and_mostly_better(fmt, rule):
    weight = make_weight(fmt)
    global_scale = global_scale_of(weight, fmt)
    importance = torch.rand(weight.shape[1]) ** 4
    blocks, weights = blocks_of(weight, fmt), blocks_of(importance, fmt) if rule == "hessian" else 1.0
    errors = {}
    for name in ("absmax", rule):
        scale = weight_scales(weight, fmt, name, global_scale, importance).view(torch.uint8).numpy()
        errors[name] = error_of(blocks, scale, fmt, number(global_scale), weights)
    assert (errors[rule] <= errors["absmax"] * (1 + 1e-5)).all()
    assert errors[rule].sum() < 0.97 * errors["absmax"].sum()


def test_the_nvfp4_search_loses_nothing_against_all_of_e4m3():
    weight = make_weight(NVFP4)
    global_scale = global_scale_of(weight, NVFP4)
    blocks = blocks_of(weight, NVFP4)
    scale = weight_scales(weight, NVFP4, "mse", global_scale).view(torch.uint8).numpy()
    chosen = error_of(blocks, scale, NVFP4, global_scale.item())
    everywhere = np.stack(
        [error_of(blocks, np.full(scale.shape, code), NVFP4, global_scale.item()) for code in E4M3_POSITIVE]
    )
    assert chosen.sum() <= everywhere.min(0).sum() * 1.001


@pytest.mark.parametrize("fmt", FP4Format)
def test_uniform_importance_is_the_plain_search(fmt):
    weight = make_weight(fmt)
    global_scale = global_scale_of(weight, fmt)
    plain = weight_scales(weight, fmt, "mse", global_scale)
    weighted = weight_scales(weight, fmt, "hessian", global_scale, torch.full((weight.shape[1],), 4.0))
    assert torch.equal(plain.view(torch.uint8), weighted.view(torch.uint8))


def test_importance_moves_the_choice():
    """Only the columns that matter are fitted: 0.8, which E2M1 has under a scale of 0.2 but not under one of 1/6."""
    weight = torch.full((1, 16), 0.8)
    weight[0, 0] = 1.0
    importance = torch.ones(16)
    importance[0] = 0
    scale = weight_scales(weight, NVFP4, "hessian", torch.tensor([64.0]), importance)
    quantized = spec.round_e2m1(0.8 / (scale.double().numpy() / 64)) * scale.double().numpy() / 64
    assert abs(quantized - 0.8) < 0.02
    plain = weight_scales(weight, NVFP4, "hessian", torch.tensor([64.0]), 1 - importance)
    assert scale.float() != plain.float()


def test_hessian_needs_importance():
    with pytest.raises(ValueError, match='scale_rule="hessian" needs the second moments'):
        weight_scales(torch.randn(2, 16), NVFP4, "hessian", torch.ones(1))


@pytest.mark.parametrize(
    "rule, exponent",
    [("absmax", e) for e in (-140, -126, -125, -124, -1, 0, 1, 126)]
    + [("mse", e) for e in (-50, -1, 0, 1, 50)],
)
@pytest.mark.parametrize("largest, expected", [(1.0, -2), (1.9, -2), (2.0, -1)])
def test_mxfp4_exponents_follow_the_blocks(rule, exponent, largest, expected):
    """floor(log2(absmax)) - 2, until E8M0 ends at 2**-127; the search starts there and moves with the block too."""
    block = torch.linspace(-0.9, largest, 32)[None]
    base = int(weight_scales(block, MXFP4, rule)) - 127
    assert base == expected if rule == "absmax" else -1 <= base - expected <= 2
    scale = int(weight_scales(block * 2.0**exponent, MXFP4, rule)) - 127
    assert scale == max(-127, base + exponent)


@pytest.mark.parametrize("fmt, rule", WEIGHT_CASES)
def test_zeros_have_a_stored_scale_and_stay_zero(fmt, rule):
    weight = torch.zeros(2, 64)
    global_scale = global_scale_of(weight, fmt)
    scale = weight_scales(weight, fmt, rule, global_scale, torch.ones(64))
    steps = step(scale, fmt, global_scale)
    assert steps.isfinite().all() and (steps > 0).all()
    assert (scale.view(torch.uint8) == 1 if fmt is NVFP4 else scale <= 1).all()


@given(st.lists(st.floats(-1, 1, width=32), min_size=32, max_size=32), st.sampled_from(WEIGHT_CASES))
def test_any_block_gets_the_best_allowed_scale(values, case):
    fmt, rule = case
    weight = torch.tensor([values], dtype=torch.float32)
    weight[weight.abs() < 1e-12] = 0
    global_scale = torch.tensor([1024.0]) if fmt is NVFP4 else None
    importance = torch.linspace(0.5, 2, 32)
    scale = weight_scales(weight, fmt, rule, global_scale, importance).view(torch.uint8).numpy()
    weights = blocks_of(importance, fmt) if rule == "hessian" else 1.0
    blocks, divisor = blocks_of(weight, fmt), number(global_scale)
    candidates = candidates_of(blocks, fmt, rule, divisor)
    errors = np.stack([error_of(blocks, c, fmt, divisor, weights) for c in candidates])
    chosen = error_of(blocks, scale, fmt, divisor, weights)
    assert (chosen <= errors.min(0) * (1 + 1e-4) + 1e-12 * (blocks**2).sum(-1)).all()


@pytest.mark.parametrize("fmt", FP4Format)
def test_steps_are_scale_over_global_scale(fmt):
    codes = torch.arange(1, 0x7F, dtype=torch.uint8)
    scale = codes.view(fmt.scale_dtype)
    divisor = torch.tensor([2.0**9]) if fmt is NVFP4 else None
    expected = spec.decode_scales(fmt.value, codes.numpy()) / number(divisor)
    np.testing.assert_array_equal(step(scale, fmt, divisor).double().numpy(), expected)
    inverse = inverse_step(scale, fmt, divisor).double().numpy()
    np.testing.assert_allclose(inverse, 1 / expected, rtol=2**-24)


# Activations


def assert_fake_quantized(actual, x, scale_bytes, fmt, divisor):
    """``actual`` is the nearest under the given scales; another neighbour only where float32 cannot tell."""
    blocks = blocks_of(x, fmt)
    decoded = spec.decode_scales(fmt.value, scale_bytes)[..., None]
    exact = blocks * divisor[..., None] / decoded
    expected = (spec.round_e2m1(exact) * decoded).reshape(x.shape)
    wrong = actual.double().numpy() != expected
    near_tie = (spec.distance_to_tie(exact) < 1e-5).reshape(x.shape)
    assert not (wrong & ~near_tie).any()
    assert wrong.mean() < 1e-3


def chosen_scales(actual, x, fmt, rule, divisor):
    """The scale bytes that a correct implementation may have taken, by float64 search, [N, G]."""
    blocks = blocks_of(x, fmt)
    candidates = candidates_of(blocks, fmt, rule, divisor, activations=True)
    errors = np.stack([error_of(blocks, c, fmt, divisor) for c in candidates])
    got = (blocks_of(actual, fmt) / divisor[..., None] - blocks) ** 2
    assert (got.sum(-1) <= errors.min(0) * (1 + 1e-4) + 1e-30).all(), "not the scale of least error"
    return np.take_along_axis(candidates, errors.argmin(0)[None], 0)[0]


def make_inputs(fmt, tokens=40, groups=8):
    x = torch.randn(tokens, groups * fmt.group_size)
    x[:, 5] *= 20  # an outlier channel
    x[2] = 0
    x[3, : fmt.group_size] = 0
    x[4] *= 1e-3  # E4M3 scales below 2**-6, where they are subnormal
    x[5] *= 1e-9
    return x


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("fmt, rule", ACTIVATION_CASES)
def test_activations(fmt, rule, per_token):
    x = make_inputs(fmt)
    static = input_global_scale(x.abs().amax().view(1)) if fmt is NVFP4 and not per_token else None
    values, divisor = fake_quantize_activations(x, fmt, rule, static)
    assert values.dtype == torch.float32 and values.shape == x.shape
    if fmt is MXFP4:
        assert divisor is None
        divisors = np.ones((40, 1))
    elif per_token:
        assert divisor.shape == (40, 1)
        expected = torch.cat([weight_global_scale(row.abs().amax().view(1)) for row in x])
        assert torch.equal(divisor[:, 0], expected)
        divisors = divisor.double().numpy()
    else:
        assert torch.equal(divisor, static)
        divisors = np.full((40, 1), static.item())
    scales = chosen_scales(values, x, fmt, rule, divisors)
    if fmt is NVFP4 and not per_token:
        assert (spec.E4M3[scales[4]] < 2**-6).any(), "the test has no subnormal scale"
    assert_fake_quantized(values, x, scales, fmt, divisors)
    assert (values[2] == 0).all() and (values[3, : fmt.group_size] == 0).all()


@pytest.mark.parametrize("fmt, rule", ACTIVATION_CASES)
def test_leading_dimensions_make_no_difference(fmt, rule):
    x = make_inputs(fmt, tokens=12)
    flat, divisor = fake_quantize_activations(x, fmt, rule, None)
    for shape in ((3, 4, -1), (2, 1, 6, -1)):
        values, divisors = fake_quantize_activations(x.view(shape), fmt, rule, None)
        assert torch.equal(values.view(flat.shape), flat)
        assert divisor is None or torch.equal(divisors.view(-1, 1), divisor)
    values, divisors = fake_quantize_activations(x[7], fmt, rule, None)
    assert torch.equal(values, flat[7])
    assert divisor is None or torch.equal(divisors, divisor[7])


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("fmt, rule", ACTIVATION_CASES)
def test_a_token_does_not_depend_on_the_others(fmt, rule, per_token):
    x = make_inputs(fmt)
    x[9] *= 1000
    static = torch.tensor([64.0]) if fmt is NVFP4 and not per_token else None
    together, _ = fake_quantize_activations(x, fmt, rule, static)
    for i in range(len(x)):
        alone, _ = fake_quantize_activations(x[i : i + 1], fmt, rule, static)
        assert torch.equal(alone[0], together[i])


@pytest.mark.parametrize("rule", ACTIVATION_SCALE_RULES[NVFP4])
@pytest.mark.parametrize("factor", [10.0, 1e6, 1e30])
def test_inputs_far_beyond_the_calibrated_range_are_clipped(rule, factor):
    x = torch.randn(4, 64)
    static = input_global_scale(x.abs().amax().view(1))
    values, _ = fake_quantize_activations(factor * x, NVFP4, rule, static)
    assert values.isfinite().all()
    assert values.abs().amax() == 448 * 6
    clipped = factor * x.double() * static > 448 * 6
    assert clipped.any() and (values[clipped] == 448 * 6).all()
    assert (values * x >= 0).all()


@pytest.mark.parametrize("rule", ACTIVATION_SCALE_RULES[NVFP4])
@pytest.mark.parametrize("exponent", [-5, -1, 1, 4])
def test_a_power_of_two_more_in_the_global_scale_changes_nothing(rule, exponent):
    """While no block scale saturates or is subnormal; so an input scale may be widened after calibration."""
    x = torch.randn(32, 64)
    divisor = torch.tensor([32.0])
    expected = fake_quantize_activations(x, NVFP4, rule, divisor)[0] / divisor
    other = divisor * 2.0**exponent
    assert torch.equal(fake_quantize_activations(x, NVFP4, rule, other)[0] / other, expected)


@pytest.mark.parametrize("fmt, rule", ACTIVATION_CASES)
def test_a_nan_stays_visible(fmt, rule):
    x = torch.randn(2, 32)
    x[1, 7] = float("nan")
    values, divisor = fake_quantize_activations(x, fmt, rule, None)
    values = values if divisor is None else values / divisor
    assert values[0].isfinite().all() and values[1, 7].isnan()


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=32, max_size=32), st.sampled_from(ACTIVATION_CASES))
def test_quantizing_twice_is_quantizing_once(values, case):
    fmt, rule = case
    x = torch.tensor([values], dtype=torch.float32)
    x[0, ::16] = 100  # keeps E4M3 scales normal: a subnormal one may round by so much that 6 becomes 4
    divisor = torch.tensor([0.25]) if fmt is NVFP4 else None
    once = fake_quantize_activations(x, fmt, rule, divisor)[0] / number(divisor)
    twice = fake_quantize_activations(once, fmt, rule, divisor)[0] / number(divisor)
    assert torch.equal(once, twice)


# Fused siblings


@pytest.mark.parametrize(
    "name, expected",
    [
        ("model.layers.0.self_attn.k_proj", ["q_proj", "k_proj", "v_proj"]),
        ("model.layers.0.mlp.up_proj", ["gate_proj", "up_proj"]),
        ("model.layers.3.block_sparse_moe.experts.7.w3", ["w1", "w3"]),
        ("model.layers.0.self_attn.q_a_proj", ["q_a_proj", "kv_a_proj_with_mqa"]),
        ("encoder.layer.1.attention.self.query", ["query", "key", "value"]),
    ],
)
def test_fused_partners(name, expected):
    parent = name.rpartition(".")[0]
    assert fused_partners(name) == tuple(f"{parent}.{child}" for child in expected)


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj", "lm_head"]
)
def test_a_linear_of_its_own(name):
    assert fused_partners(name) == (name,)


def test_fused_partners_without_a_parent():
    assert fused_partners("v_proj") == ("q_proj", "k_proj", "v_proj")


@pytest.mark.parametrize("name", ["a.q_proj", "a.up_proj", "a.value", "a.w1", "a.o_proj"])
def test_partners_agree_on_who_they_are(name):
    for partner in fused_partners(name):
        assert fused_partners(partner) == fused_partners(name)
