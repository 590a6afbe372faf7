"""The solver against GPTQ's definition, written down in float64 without any of its shortcuts."""

import numpy as np
import pytest
import spec
import torch
from tolerances import NEAR_TIE

from hf_fp4.formats import FP4Format
from hf_fp4.gptq import (
    BLOCK,
    FP4Weight,
    activation_order,
    descend,
    output_power,
    round_weight,
    solve,
)
from hf_fp4.hessian import DampedMoments
from hf_fp4.scales import weight_global_scale, weight_scales

pytestmark = pytest.mark.once

FORMATS = list(FP4Format)
WIDTHS = (64, 96, BLOCK, BLOCK + 32, 2 * BLOCK + 64)
DAMP = 0.01


def correlated_inputs(tokens, features, seed=0):
    """Inputs as a transformer has them: a few directions carry most of the energy, some channels are outliers."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(features, features, generator=generator) / features**0.5
    x = (torch.randn(tokens, features, generator=generator) * torch.logspace(0, -1.5, features)) @ mixing
    x[:, :: features // 4] *= 5
    return x


class Problem:
    """A weight, its scales and the second moments of its inputs."""

    def __init__(self, fmt, features, rows=24, seed=0, ordered=False):
        generator = torch.Generator().manual_seed(seed)
        self.fmt = fmt
        self.weight = torch.randn(rows, features, generator=generator) * 0.05
        x = correlated_inputs(4 * features, features, seed)
        self.second = x.T @ x / len(x)
        self.global_scale = (
            weight_global_scale(self.weight.abs().amax().view(1)) if fmt.has_global_scale else None
        )
        self.scale = weight_scales(self.weight, fmt, "mse", self.global_scale)
        self.order = activation_order(self.second) if ordered else None

    @property
    def upper(self):
        second = self.second if self.order is None else self.second[self.order][:, self.order]
        return DampedMoments.of(second, DAMP, "layer").upper()

    @property
    def steps(self):
        """float64 [N, K], what one unit of E2M1 is worth, from the stored bytes."""
        scale = spec.decode_scales(self.fmt.value, self.scale.view(torch.uint8).numpy())
        scale = scale / (1.0 if self.global_scale is None else self.global_scale.item())
        return np.repeat(scale, spec.GROUP[self.fmt.value], axis=1)

    def solve(self, rows=slice(None)):
        return solve(self.weight[rows], self.scale[rows], self.fmt, self.global_scale, self.upper, self.order)

    def output_error(self, quantized):
        error = output_power(self.weight - quantized.dequantize(), self.second)
        return (error / output_power(self.weight, self.second)).item()


def codes_of(weight):
    return spec.unpack(weight.packed.numpy())


def gptq_by_definition(problem, forced_codes=None):
    """Optimal brain quantization, one column after the other, in float64.

    After column i is fixed, the remaining weights take the least-squares optimal update, ``w_j -= (w_i - q_i)
    [H^-1]_ij / [H^-1]_ii``, and column i is eliminated from H^-1 (its Schur complement). With ``forced_codes`` the
    columns are fixed to those instead of to the nearest.

    Returns:
        ``(codes, values)``: what was chosen, and what each column had come to in units of E2M1 just before.
    """
    weight, steps = problem.weight.double().numpy().copy(), problem.steps
    second = problem.second.double().numpy()
    features = len(second)
    inverse = np.linalg.inv(second + DAMP * np.trace(second) / features * np.eye(features))
    order = np.arange(features) if problem.order is None else np.argsort(-np.diag(second), kind="stable")
    values = np.empty_like(weight)
    codes = np.empty(weight.shape, np.int64)
    for position, i in enumerate(order):
        values[:, i] = weight[:, i] / steps[:, i]
        codes[:, i] = spec.e2m1_codes(values[:, i]) if forced_codes is None else forced_codes[:, i]
        error = weight[:, i] - spec.E2M1[codes[:, i]] * steps[:, i]
        rest = order[position + 1 :]
        weight[:, rest] -= np.outer(error / inverse[i, i], inverse[i, rest])
        inverse -= np.outer(inverse[:, i], inverse[i, :]) / inverse[i, i]
    return codes, values


@pytest.mark.parametrize("ordered", [False, True], ids=["as is", "act order"])
@pytest.mark.parametrize("features", WIDTHS)
@pytest.mark.parametrize("fmt", FORMATS)
def test_every_code_is_the_rounding_of_the_exact_value(fmt, features, ordered):
    """Given the codes before it, each code is float64's, unless the value is next to a rounding boundary."""
    problem = Problem(fmt, features, ordered=ordered)
    codes = codes_of(problem.solve())
    _, values = gptq_by_definition(problem, forced_codes=codes)
    differs = spec.E2M1[codes] != spec.round_e2m1(values)
    assert (spec.distance_to_tie(values)[differs] < NEAR_TIE).all()
    assert differs.mean() < 1e-4


@pytest.mark.parametrize("ordered", [False, True], ids=["as is", "act order"])
@pytest.mark.parametrize("features", WIDTHS)
@pytest.mark.parametrize("fmt", FORMATS)
def test_rows_equal_the_definition(fmt, features, ordered):
    """Left alone, a row can part from float64's only at a near-tie; few do."""
    problem = Problem(fmt, features, rows=40, ordered=ordered)
    actual = spec.E2M1[codes_of(problem.solve())]
    codes, values = gptq_by_definition(problem)
    order = np.arange(features) if problem.order is None else problem.order.numpy()
    differs = (actual != spec.E2M1[codes])[:, order]
    parted = differs.any(1).nonzero()[0]
    assert len(parted) <= 0.05 * len(actual)
    for row in parted:
        first = order[differs[row].argmax()]
        assert spec.distance_to_tie(values[row, first]) < NEAR_TIE


@pytest.mark.parametrize("ordered", [False, True], ids=["as is", "act order"])
@pytest.mark.parametrize("fmt", FORMATS)
def test_the_output_error_is_well_below_rounding(fmt, ordered):
    for seed in range(5):
        problem = Problem(fmt, 192, rows=16, seed=seed, ordered=ordered)
        rounded = round_weight(problem.weight, problem.scale, fmt, problem.global_scale)
        assert problem.output_error(problem.solve()) < 0.5 * problem.output_error(rounded)


@pytest.mark.parametrize("fmt", FORMATS)
def test_activation_order_helps(fmt):
    errors = {
        ordered: sum(
            problem.output_error(problem.solve())
            for problem in (Problem(fmt, 192, rows=16, seed=seed, ordered=ordered) for seed in range(5))
        )
        for ordered in (False, True)
    }
    assert errors[True] < errors[False]


@pytest.mark.parametrize("fmt", FORMATS)
def test_uncorrelated_inputs_leave_plain_rounding(fmt):
    """With a diagonal S there is nothing to compensate, however the columns are ordered."""
    problem = Problem(fmt, 160)
    problem.second = torch.diag(torch.rand(160) + 0.1)
    problem.order = activation_order(problem.second)
    rounded = round_weight(problem.weight, problem.scale, fmt, problem.global_scale)
    np.testing.assert_array_equal(spec.E2M1[codes_of(problem.solve())], spec.E2M1[codes_of(rounded)])


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_weight_on_the_grid_stays(fmt):
    problem = Problem(fmt, 160)
    codes = torch.randint(0, 16, problem.weight.shape).numpy()
    problem.weight = torch.from_numpy((spec.E2M1[codes] * problem.steps).astype(np.float32))
    np.testing.assert_array_equal(spec.E2M1[codes_of(problem.solve())], spec.E2M1[codes])


@pytest.mark.parametrize("ordered", [False, True], ids=["as is", "act order"])
@pytest.mark.parametrize("fmt", FORMATS)
def test_stacked_rows_are_solved_as_if_alone(fmt, ordered):
    problem = Problem(fmt, 2 * BLOCK + 32, rows=96, ordered=ordered)
    parts = problem.solve().split([64, 16, 16])
    for part, rows in zip(parts, (slice(0, 64), slice(64, 80), slice(80, 96)), strict=True):
        alone = problem.solve(rows)
        assert torch.equal(part.packed, alone.packed)
        assert torch.equal(part.scale.view(torch.uint8), alone.scale.view(torch.uint8))


@pytest.mark.parametrize("fmt", FORMATS)
def test_one_row(fmt):
    problem = Problem(fmt, 192, rows=1, ordered=True)
    codes = codes_of(problem.solve())
    np.testing.assert_array_equal(spec.E2M1[codes], spec.E2M1[gptq_by_definition(problem)[0]])


@pytest.mark.parametrize("ordered", [False, True], ids=["as is", "act order"])
def test_the_arguments_are_not_changed_and_the_scales_are_kept(ordered):
    problem = Problem(FP4Format.NVFP4, 160, ordered=ordered)
    weight, scale, upper = problem.weight.clone(), problem.scale.clone(), problem.upper
    before = upper.clone()
    result = solve(problem.weight, problem.scale, problem.fmt, problem.global_scale, upper, problem.order)
    assert torch.equal(problem.weight, weight) and torch.equal(upper, before)
    assert torch.equal(result.scale.view(torch.uint8), scale.view(torch.uint8))
    assert torch.equal(result.global_scale, problem.global_scale)
    assert (
        result.packed.dtype == torch.uint8
        and result.packed.shape == (24, 80)
        and result.packed.is_contiguous()
    )


def test_the_default_dtype_does_not_matter():
    problem = Problem(FP4Format.NVFP4, 160, ordered=True)
    expected = problem.solve()
    torch.set_default_dtype(torch.bfloat16)
    try:
        actual = problem.solve()
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(actual.packed, expected.packed)


# FP4Weight


@pytest.mark.parametrize("fmt", FORMATS)
def test_round_weight_is_nearest(fmt):
    problem = Problem(fmt, 96)
    rounded = round_weight(problem.weight, problem.scale, fmt, problem.global_scale)
    exact = problem.weight.double().numpy() / problem.steps
    assert spec.distance_to_tie(exact).min() > 1e-6, "the comparison needs a weight without ties"
    np.testing.assert_array_equal(codes_of(rounded), spec.e2m1_codes(exact))


@pytest.mark.parametrize("fmt", FORMATS)
def test_dequantize(fmt):
    problem = Problem(fmt, 96)
    result = problem.solve()
    values = result.dequantize()
    assert values.dtype == torch.float32
    divisor = 1.0 if result.global_scale is None else result.global_scale.item()
    expected = spec.dequantize(
        fmt.value, result.packed.numpy(), result.scale.view(torch.uint8).numpy(), divisor
    )
    np.testing.assert_array_equal(values.double().numpy(), expected)


@pytest.mark.parametrize("fmt", FORMATS)
def test_split(fmt):
    stacked = Problem(fmt, 96).solve()
    parts = stacked.split([3, 20, 1])
    assert [len(part.packed) for part in parts] == [len(part.scale) for part in parts] == [3, 20, 1]
    assert torch.equal(torch.cat([part.dequantize() for part in parts]), stacked.dequantize())
    assert all(part.format is fmt for part in parts)


def test_split_parts_share_no_memory():
    """safetensors refuses tensors that share memory, and a view would keep the whole stack alive."""
    stacked = Problem(FP4Format.NVFP4, 96).solve()
    parts = [stacked, *stacked.split([12, 12])]
    for name in ("packed", "scale", "global_scale"):
        pointers = {getattr(part, name).untyped_storage().data_ptr() for part in parts}
        assert len(pointers) == len(parts), name


def test_split_must_cover_all_rows():
    with pytest.raises(RuntimeError):
        Problem(FP4Format.NVFP4, 96).solve().split([3, 4])


# Order and error


def test_activation_order_is_descending_and_stable():
    second = torch.diag(torch.tensor([1.0, 5.0, 0.0, 5.0, 2.0, 0.0]))
    assert activation_order(second).tolist() == [1, 3, 4, 0, 2, 5]
    many = torch.diag(torch.arange(400.0) // 100)
    expected = [*range(300, 400), *range(200, 300), *range(100, 200), *range(100)]
    assert activation_order(many).tolist() == expected


def test_output_power_is_that_of_the_outputs():
    x, weight = correlated_inputs(500, 64), torch.randn(10, 64)
    expected = (x.double() @ weight.double().T).square().sum().item() / 500
    assert output_power(weight, x.T @ x / 500).item() == pytest.approx(expected, rel=1e-4)


def test_weights_are_immutable():
    weight = Problem(FP4Format.NVFP4, 64).solve()
    assert isinstance(weight, FP4Weight)
    with pytest.raises(AttributeError):
        weight.packed = weight.packed


# Descent


def descended(problem, start, passes=1, rows=slice(None)):
    added = DAMP * problem.second.diagonal().mean().item()
    return descend(problem.weight[rows], start, problem.second, added, passes)


def damped(problem):
    """``S + d I`` in float64."""
    second = problem.second.double()
    return second + DAMP * second.diagonal().mean() * torch.eye(len(second))


def damped_error(problem, quantized):
    difference = problem.weight.double() - quantized.dequantize().double()
    return ((difference @ damped(problem)) * difference).sum(1)


def scale_bytes(quantized):
    return quantized.scale.view(torch.uint8).numpy().astype(int)


def follow(problem, start, end):
    """Go through one pass in float64, taking the choices of ``end``, and say how well each was made.

    Returns:
        ``(values, regret)``: what each code was to be the rounding of, in units of E2M1 under the scale it had then; and per
        group by how much, relative to the row's error, the scale taken is worse than the best of it and its neighbours.
    """
    matrix, name, size = damped(problem).numpy(), problem.fmt.value, spec.GROUP[problem.fmt.value]
    divisor = 1.0 if problem.global_scale is None else problem.global_scale.item()
    weight, current = problem.weight.double().numpy(), start.dequantize().double().numpy()
    codes, before, after = codes_of(end), scale_bytes(start), scale_bytes(end)
    values, regret = np.empty_like(weight), np.empty(before.shape)

    def steps(stored):
        return spec.decode_scales(name, stored) / divisor

    def errors(candidate):
        difference = weight - candidate
        return ((difference @ matrix) * difference).sum(1)

    for group in range(before.shape[1]):
        columns = slice(group * size, (group + 1) * size)
        unit, moved = steps(before[:, group]), before[:, group] != after[:, group]
        for i in range(columns.start, columns.stop):
            best = current[:, i] + (weight - current) @ matrix[:, i] / matrix[i, i]
            values[:, i] = best / unit
            current[:, i] = np.where(moved, spec.round_e2m1(values[:, i]), spec.E2M1[codes[:, i]]) * unit
        wanted = current[:, columns] + ((weight - current) @ matrix)[:, columns] / np.diag(matrix)[columns]
        found = [errors(current)]
        low, high = (1, 0x7E) if name == "nvfp4" else (0, 254)
        for move in (-1, 1):
            candidate, other = current.copy(), steps(np.clip(before[:, group] + move, low, high))[:, None]
            candidate[:, columns] = spec.round_e2m1(wanted / other) * other
            found.append(errors(candidate))
        current[:, columns] = spec.E2M1[codes[:, columns]] * steps(after[:, group])[:, None]
        regret[:, group] = (errors(current) - np.min(found, 0)) / found[0]
        values[moved, columns] = spec.E2M1[
            codes[moved, columns]
        ]  # only codes that the scale's move left can be compared
    return values, regret


@pytest.mark.parametrize("features", WIDTHS)
@pytest.mark.parametrize("fmt", FORMATS)
def test_descent_chooses_every_code_and_every_scale_best_given_the_others(fmt, features):
    problem = Problem(fmt, features)
    start = problem.solve()
    end = descended(problem, start)
    values, regret = follow(problem, start, end)
    differs = spec.E2M1[codes_of(end)] != spec.round_e2m1(values)
    assert (spec.distance_to_tie(values)[differs] < NEAR_TIE).all()
    assert differs.mean() < 1e-3
    assert regret.max() < 1e-5
    assert 0 < (scale_bytes(end) != scale_bytes(start)).mean() < 0.5


@pytest.mark.parametrize("fmt", FORMATS)
def test_descent_lowers_the_error_of_every_row_and_comes_to_rest(fmt):
    problem = Problem(fmt, 320, ordered=True)
    start = problem.solve()
    errors = [damped_error(problem, start)]
    for passes in (1, 2, 60, 61):
        errors.append(damped_error(problem, descended(problem, start, passes)))
        assert (errors[-1] <= errors[-2] * (1 + 1e-6)).all()
    assert errors[1].sum() < 0.97 * errors[0].sum()
    assert torch.equal(errors[-1], errors[-2])


@pytest.mark.parametrize("groups", [1, 5])  # the transpose of one group's scales is contiguous already
@pytest.mark.parametrize("fmt", FORMATS)
def test_descent_keeps_its_arguments(fmt, groups):
    problem = Problem(fmt, groups * fmt.group_size, rows=64)
    start = problem.solve()
    kept = [start.packed, start.scale.view(torch.uint8), problem.weight, problem.second]
    copies = [tensor.clone() for tensor in kept]
    result = descended(problem, start)
    assert all(map(torch.equal, kept, copies))
    assert not torch.equal(result.packed, start.packed)
    assert result.global_scale is start.global_scale
    unchanged = descended(problem, start, 0)
    assert torch.equal(unchanged.packed, start.packed)
    np.testing.assert_array_equal(scale_bytes(unchanged), scale_bytes(start))


def test_descent_of_stacked_rows_is_that_of_each():
    problem = Problem(FP4Format.NVFP4, 2 * BLOCK + 32, rows=96, ordered=True)
    start = problem.solve()
    parts = zip(start.split([64, 32]), descended(problem, start).split([64, 32]), strict=True)
    for (part, whole), rows in zip(parts, (slice(0, 64), slice(64, 96)), strict=True):
        alone = descended(problem, part, rows=rows)
        assert torch.equal(alone.packed, whole.packed)
        np.testing.assert_array_equal(scale_bytes(alone), scale_bytes(whole))
