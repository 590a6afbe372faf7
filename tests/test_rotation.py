import numpy as np
import pytest
import spec
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolerances import ROTATION

from hf_fp4 import rotation
from hf_fp4.rotation import HADAMARD_SIZES, largest_size, rotate

pytestmark = pytest.mark.once

SIZES = (16, 32, 64, 128)


@pytest.fixture
def empty_cache():
    rotation._hadamard.cache_clear()
    yield
    rotation._hadamard.cache_clear()


def assert_rotated(actual, x, size):
    expected = spec.rotate(x.double().numpy(), size)
    scale = np.linalg.norm(expected, axis=-1, keepdims=True)
    assert actual.dtype == torch.float32 and actual.shape == x.shape
    assert (np.abs(actual.double().numpy() - expected) <= ROTATION * scale).all()


def test_supported_sizes():
    assert HADAMARD_SIZES == SIZES


@pytest.mark.parametrize("size", SIZES)
def test_the_matrix_is_sylvesters(size):
    h = rotate(torch.eye(size), size).double().numpy()
    np.testing.assert_allclose(h, spec.hadamard(size), rtol=1e-7)
    np.testing.assert_array_equal(np.sign(h), np.sign(spec.hadamard(size)))


@pytest.mark.parametrize("size", SIZES)
def test_the_matrix_is_symmetric_and_orthonormal(size):
    h = rotate(torch.eye(size), size)
    assert torch.equal(h, h.T)
    torch.testing.assert_close(h @ h, torch.eye(size))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("size", SIZES)
def test_rotates_each_block_of_the_last_dimension(size, dtype):
    x = torch.randn(2, 3, 3 * size).to(dtype)
    assert_rotated(rotate(x, size), x, size)


def test_one_dimension_and_no_rows():
    x = torch.randn(64)
    assert_rotated(rotate(x, 16), x, 16)
    assert rotate(torch.empty(0, 64), 16).shape == (0, 64)


def test_a_transposed_input():
    x = torch.randn(48, 5).T
    assert_rotated(rotate(x, 16), x, 16)


@pytest.mark.parametrize("size", [None, 0])
def test_no_size_leaves_the_values(size):
    x = torch.randn(3, 24).to(torch.bfloat16)
    assert rotate(x, size).dtype == torch.float32
    assert torch.equal(rotate(x, size), x.float())


@pytest.mark.parametrize("rows, columns", [(2, 24), (3, 40)])
def test_a_size_that_does_not_divide_the_columns_is_an_error(rows, columns):
    """Also when it divides the number of elements, where a reshape would mix rows."""
    with pytest.raises((RuntimeError, ValueError)):
        rotate(torch.randn(rows, columns), 16)


@given(
    size=st.sampled_from(SIZES),
    blocks=st.integers(1, 3),
    rows=st.integers(1, 4),
    exponent=st.integers(-60, 60),
    seed=st.integers(0, 2**31),
)
def test_properties(size, blocks, rows, exponent, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, blocks * size, generator=generator) * 2.0**exponent
    weight = torch.randn(rows, blocks * size, generator=generator)
    rotated = rotate(x, size)
    assert_rotated(rotated, x, size)
    norm = x.double().norm(dim=-1)
    torch.testing.assert_close(rotated.double().norm(dim=-1), norm, rtol=1e-5, atol=0)
    assert ((rotate(rotated, size) - x).abs() <= 4 * ROTATION * norm[:, None]).all(), "not an involution"
    product = rotate(weight, size).double() @ rotated.double().T
    expected = weight.double() @ x.double().T
    limit = 4 * ROTATION * weight.double().norm(dim=-1)[:, None] * norm
    assert ((product - expected).abs() <= limit).all(), "(W H)(H x) is not W x"


@pytest.mark.parametrize("size", SIZES)
def test_a_row_does_not_depend_on_the_others(size):
    x = torch.randn(37, 8 * size)
    together = rotate(x, size)
    for count in (1, 2, 3, 8, 36):
        assert torch.equal(rotate(x[:count], size), together[:count])
    assert torch.equal(rotate(x[5], size), together[5])


def test_the_default_dtype_does_not_matter(empty_cache):
    x = torch.randn(4, 64)
    torch.set_default_dtype(torch.bfloat16)
    try:
        actual = rotate(x, 64)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_rotated(actual, x, 64)


def test_inference_mode_first_and_gradients_later(empty_cache):
    with torch.inference_mode():
        rotate(torch.randn(2, 16), 16)
    x = torch.randn(2, 16, requires_grad=True)
    weight = torch.randn(2, 16)
    rotate(x, 16).backward(weight)
    assert_rotated(x.grad, weight, 16)  # the matrix is symmetric, so the gradient is rotated as well


@pytest.mark.parametrize(
    "in_features, expected",
    [(576, 64), (1536, 128), (80, 16), (2048, 128), (96, 32), (24, None), (8, None), (16, 16), (128, 128)],
)
def test_largest_size(in_features, expected):
    assert largest_size(in_features) == expected
