from dataclasses import replace

import numpy as np
import pytest
import torch
from peak_memory import LiveTensors

from hf_fp4.formats import FP4Format
from hf_fp4.hessian import (
    MAX_DAMPING_ATTEMPTS,
    DampedMoments,
    OrderedFactor,
    SecondMoments,
    damped_cholesky,
    damping,
)
from hf_fp4.rotation import rotate
from hf_fp4.scales import ACTIVATION_SCALE_RULES, fake_quantize_activations, input_global_scale

pytestmark = pytest.mark.once

K = 48


def correlated_inputs(tokens, features=K, seed=0):
    """Inputs as a transformer has them: a few directions carry most of the energy, some channels are outliers."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(features, features, generator=generator) / features**0.5
    x = torch.randn(tokens, features, generator=generator) * torch.logspace(0, -2, features)
    x = x @ mixing
    x[:, 3] *= 30
    return x


def moments_of(x, damp=0.0):
    x = x.double()
    second = x.T @ x / len(x)
    return second + damp * second.diagonal().mean() * torch.eye(x.shape[1], dtype=torch.float64)


# Moments


@pytest.mark.parametrize("batches", [[300], [100, 100, 100], [1, 299], [7, 0, 293]])
def test_moments_do_not_depend_on_how_tokens_are_batched(batches):
    x, original = correlated_inputs(300), correlated_inputs(300, seed=1)
    moments = SecondMoments(K, torch.device("cpu"), cross=True)
    for part, part_of_original in zip(x.split(batches), original.split(batches), strict=True):
        moments.add(part, part_of_original)
    assert moments.tokens == 300
    second, cross = moments.mean()
    assert second.dtype == cross.dtype == torch.float32
    torch.testing.assert_close(second.double(), moments_of(x), rtol=1e-5, atol=1e-7)
    expected = original.double().T @ x.double() / 300  # rows: original, columns: quantized
    torch.testing.assert_close(cross.double(), expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(cross, cross.T, rtol=0.1)


def test_moments_of_many_tokens_at_once():
    """They are added up some tokens at a time, and squares in panels."""
    x, original = torch.randn(2, 1300, 600).bfloat16()
    moments = SecondMoments(600, torch.device("cpu"), cross=True)
    moments.add(x, original)
    second, cross = moments.mean()
    torch.testing.assert_close(second.double(), moments_of(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cross.double(), original.double().T @ x.double() / 1300, rtol=1e-5, atol=1e-5)


def test_moments_of_many_features_are_symmetric():
    """Their square is added up in panels, of which one triangle is computed."""
    x = torch.randn(64, 2100)
    moments = SecondMoments(2100, torch.device("cpu"), cross=False)
    for part in x.split(32):
        moments.add(part)
    second, _ = moments.mean()
    torch.testing.assert_close(second.double(), x.double().T @ x.double() / 64, rtol=1e-5, atol=1e-6)
    assert torch.equal(second[:1024, 1024:], second[1024:, :1024].T)


def test_inputs_that_are_still_to_be_divided():
    x, original = correlated_inputs(300), correlated_inputs(300, seed=1)
    plain, times_eight = (SecondMoments(K, torch.device("cpu"), cross=True) for _ in range(2))
    plain.add(x, original)
    times_eight.add(8 * x, original)
    for expected, actual in zip(plain.mean(), times_eight.mean(torch.tensor([8.0])), strict=True):
        assert torch.equal(actual, expected)


def test_moments_do_not_depend_on_the_default_dtype():
    x = correlated_inputs(50)
    torch.set_default_dtype(torch.bfloat16)
    try:
        moments = SecondMoments(K, torch.device("cpu"), cross=False)
        moments.add(x)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(moments.mean()[0].double(), moments_of(x), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("fmt", FP4Format)
def test_quantized_inputs_lose_nothing_in_bfloat16(fmt):
    """So their moments may be taken on tensor cores: the products are exact in float32."""
    x = correlated_inputs(200, 64)
    scale = input_global_scale(x.abs().amax().view(1)) if fmt.has_global_scale else None
    for rule in ACTIVATION_SCALE_RULES[fmt]:
        values, divisor = fake_quantize_activations(x, fmt, rule, scale)
        seen = values if divisor is None else values / divisor
        assert torch.equal(seen.bfloat16().float(), seen)
        exact, rounded = (SecondMoments(64, torch.device("cpu"), cross=False) for _ in range(2))
        exact.add(seen)
        rounded.add(seen.bfloat16())
        assert torch.equal(exact.mean()[0], rounded.mean()[0])


def test_no_tokens_and_no_cross():
    moments = SecondMoments(K, torch.device("cpu"), cross=False)
    second, cross = moments.mean()
    assert moments.tokens == 0 and cross is None
    assert torch.equal(second, torch.zeros(K, K))


def test_cross_moments_need_the_original_inputs():
    moments = SecondMoments(K, torch.device("cpu"), cross=True)
    with pytest.raises(ValueError, match="need the original stream's inputs"):
        moments.add(correlated_inputs(5))


# Damping and factors


def test_damping_is_a_share_of_the_mean_diagonal():
    second = torch.diag(torch.arange(1.0, 5.0))
    assert damping(second, 0.01) == pytest.approx(0.025)
    assert damping(torch.zeros(4, 4), 0.01) == 1.0


def test_damped_cholesky():
    second = moments_of(correlated_inputs(500)).float()
    lower, added = damped_cholesky(second, 0.01, "layer")
    assert added == pytest.approx(0.01 * second.diagonal().mean().item())
    assert torch.equal(lower, lower.tril())
    expected = moments_of(correlated_inputs(500), 0.01)
    torch.testing.assert_close(lower.double() @ lower.double().T, expected, rtol=1e-4, atol=1e-6)


def test_the_moments_are_not_changed():
    second = moments_of(correlated_inputs(500)).float()
    before = second.clone()
    damped_cholesky(second, 0.01, "layer")
    DampedMoments.of(second, 0.01, "layer").upper()
    assert torch.equal(second, before)


@pytest.mark.parametrize("smallest, factor", [(0.5, 1), (-0.05, 10), (-0.5, 100), (-500.0, 100_000)])
def test_a_failed_cholesky_is_damped_ten_times_more(smallest, factor):
    """An eigenvalue that the first damping does not make positive; the mean diagonal is 1."""
    eigenvalues = torch.ones(K, dtype=torch.float64)
    eigenvalues[0], eigenvalues[1] = smallest, 2 - smallest
    basis = torch.linalg.qr(torch.randn(K, K, dtype=torch.float64))[0]
    second = (basis * eigenvalues @ basis.T).float()
    _, added = damped_cholesky(second, 0.01, "layer")
    assert added == pytest.approx(0.01 * factor, rel=1e-4)


def test_moments_that_stay_indefinite_name_the_layer():
    second = torch.eye(K)
    second[0, 0], second[1, 1] = -1e5, 1e5  # the mean stays 1, and the last damping is 1000
    message = (
        "second moments of model.layers.3.mlp.down_proj are not positive definite .* modules_to_not_convert"
    )
    for factor in (damped_cholesky, DampedMoments.of):
        with pytest.raises(RuntimeError, match=message):
            factor(second, 0.01, "model.layers.3.mlp.down_proj")
    assert MAX_DAMPING_ATTEMPTS == 6


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_moments_that_are_not_finite_name_the_layer(value):
    second = torch.eye(K)
    second[5, 5] = value
    with pytest.raises(RuntimeError, match="model.layers.1.self_attn.o_proj"):
        DampedMoments.of(second, 0.01, "model.layers.1.self_attn.o_proj")


@pytest.mark.parametrize("damp_percent", [0.1, 0.01, 0.001])
@pytest.mark.parametrize(
    "features, tokens", [(48, 1000), (160, 2000), (160, 40)], ids=["small", "large", "few tokens"]
)
def test_upper(features, tokens, damp_percent):
    x = correlated_inputs(tokens, features)
    upper = DampedMoments.of(moments_of(x).float(), damp_percent, "layer").upper()
    assert upper.dtype == torch.float32 and torch.equal(upper, upper.triu()) and (upper.diagonal() > 0).all()
    expected = torch.linalg.cholesky(torch.linalg.inv(moments_of(x, damp_percent)), upper=True)
    assert (upper - expected).norm() <= 1e-3 * expected.norm()
    product = upper.double().T @ upper.double() @ moments_of(x, damp_percent)
    assert (product - torch.eye(features)).norm() <= 1e-3 * features


def test_unused_inputs_are_harmless():
    x = correlated_inputs(500)
    x[:, 10:20] = 0
    assert torch.isfinite(DampedMoments.of(moments_of(x).float(), 0.01, "layer").upper()).all()
    torch.testing.assert_close(DampedMoments.of(torch.zeros(K, K), 0.01, "layer").upper(), torch.eye(K))


def test_upper_in_another_order_of_the_columns():
    x = correlated_inputs(500)
    order = torch.randperm(K)
    upper = DampedMoments.of(moments_of(x).float(), 0.01, "layer").upper(order)
    expected = DampedMoments.of(moments_of(x[:, order]).float(), 0.01, "layer").upper()
    assert torch.equal(upper, upper.triu()) and (upper - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize("size", [None, 16])
def test_rotated(size):
    x = correlated_inputs(500)
    rotated = DampedMoments.of(moments_of(x).float(), 0.01, "layer").rotated(size)
    expected = DampedMoments.of(moments_of(rotate(x, size)).float(), 0.01, "layer")
    assert rotated.added == pytest.approx(expected.added, rel=1e-4)
    for name in ("second", "inverse"):
        actual, wanted = getattr(rotated, name), getattr(expected, name)
        assert (actual - wanted).norm() <= 1e-4 * wanted.norm()


def test_an_inverse_that_cannot_be_factored_names_the_layer():
    moments = replace(
        DampedMoments.of(torch.eye(K), 0.01, "model.layers.2.mlp.up_proj"), inverse=-torch.eye(K)
    )
    with pytest.raises(RuntimeError, match="inverse second moments of model.layers.2.mlp.up_proj"):
        moments.upper()


@pytest.mark.parametrize(
    "features", [48, 1100]
)  # the inverse of a large triangle is put together of smaller ones
@pytest.mark.parametrize("ordered", [False, True])
def test_one_factorization_gives_target_and_factor(features, ordered):
    second = moments_of(correlated_inputs(2 * features, features))
    order = second.diagonal().argsort(descending=True) if ordered else torch.arange(features)
    before = second.float()
    factor = OrderedFactor.of(before, order if ordered else None, 0.01, "layer")
    assert torch.equal(before, second.float())
    ridge = factor.added * torch.eye(features, dtype=torch.float64)
    weight, cross = torch.randn(20, features), second + 0.1 * torch.randn(features, features)
    solved = weight.double() @ (cross + ridge) @ torch.linalg.inv(second + ridge)
    wanted = (weight.double() @ cross).float()
    actual = factor.correct_target(weight, wanted, 0.5)
    assert (actual - (0.5 * weight + 0.5 * solved)).norm() <= 1e-4 * solved.norm()
    upper = factor.upper()
    assert upper.is_contiguous() and torch.equal(upper, upper.triu()) and (upper.diagonal() > 0).all()
    damped = (second + ridge)[order[:, None], order]
    expected = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    assert (upper - expected).norm() <= 1e-3 * expected.norm()


def test_a_factor_in_order_takes_little_memory():
    """Beside the moments, which views of them make seen here: one matrix, and another while its triangle is turned around."""
    features = 1100
    second = moments_of(correlated_inputs(2 * features, features)).float()
    order = second.diagonal().argsort()
    with LiveTensors() as seen:
        factor = OrderedFactor.of(second, order, 0.1, "layer")
        factor.correct_target(torch.zeros(10, features), torch.ones(10, features), 0.5)
        factor.upper()
    assert 2 * second.nbytes < seen.peak < 3.2 * second.nbytes
    with LiveTensors() as seen:
        DampedMoments.of(second, 0.1, "layer").upper(order)
    assert seen.peak > 3.5 * second.nbytes


def test_a_factor_in_order_is_damped_more_or_names_the_layer():
    second = torch.eye(K)
    second[0, 1] = second[1, 0] = 1.05  # indefinite by 0.05
    order = torch.randperm(K)
    assert OrderedFactor.of(second, order, 0.01, "layer").added == pytest.approx(0.1)
    second[3, 3] = float("nan")
    with pytest.raises(RuntimeError, match="second moments of the.layer are not positive definite"):
        OrderedFactor.of(second, order, 0.01, "the.layer")


def test_cross_moments_of_outputs():
    """They are what the weight makes of those of the inputs."""
    x, original, weight = correlated_inputs(300), correlated_inputs(300, seed=1), torch.randn(7, K)
    inputs = SecondMoments(K, torch.device("cpu"), cross=True)
    outputs = SecondMoments(K, torch.device("cpu"), cross=True, cross_rows=7)
    inputs.add(x, original)
    outputs.add(x, original @ weight.T)
    (second, cross), (same, aimed) = inputs.mean(), outputs.mean()
    assert torch.equal(second, same)
    torch.testing.assert_close(aimed, weight @ cross, rtol=1e-4, atol=1e-4)


# The asymmetric correction


def streams(tokens=600):
    original = correlated_inputs(tokens)
    return original, original + 0.1 * original.std(0) * torch.randn(tokens, K)


def corrected(weight, second, cross, strength, damp_percent):
    return OrderedFactor.of(second, None, damp_percent, "layer").correct_target(
        weight, weight @ cross, strength
    )


@pytest.mark.parametrize("strength", [0.0, 0.25, 0.5, 1.0])
def test_correct_target(strength):
    original, quantized = streams()
    second, cross = moments_of(quantized), original.double().T @ quantized.double() / 600
    weight = torch.randn(20, K)
    ridge = 0.01 * second.diagonal().mean() * torch.eye(K, dtype=torch.float64)
    solved = weight.double() @ (cross + ridge) @ torch.linalg.inv(second + ridge)
    expected = (1 - strength) * weight.double() + strength * solved
    actual = corrected(weight, second.float(), cross.float(), strength, 0.01)
    assert actual.dtype == torch.float32
    assert (actual - expected).norm() <= 1e-4 * expected.norm()
    if strength:
        assert (actual - weight).norm() > 0.01 * strength * weight.norm()


def test_the_correction_brings_the_outputs_closer():
    original, quantized = streams()
    second = moments_of(quantized).float()
    cross = (original.double().T @ quantized.double() / 600).float()
    weight = torch.randn(20, K)
    wanted = original @ weight.T
    errors = [
        (quantized @ corrected(weight, second, cross, strength, 1e-4).T - wanted).norm().item()
        for strength in (0.0, 0.5, 1.0)
    ]
    assert errors[0] > errors[1] > errors[2]
    best = np.linalg.lstsq(quantized.double().numpy(), wanted.double().numpy(), rcond=None)[0]
    least = np.linalg.norm(quantized.double().numpy() @ best - wanted.double().numpy())
    assert errors[2] == pytest.approx(least, rel=0.01)


def test_equal_streams_need_no_correction():
    second = moments_of(correlated_inputs(600)).float()
    weight = torch.randn(20, K)
    torch.testing.assert_close(corrected(weight, second, second, 1.0, 0.01), weight, rtol=1e-3, atol=1e-4)
