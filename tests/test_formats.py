"""Everything is checked against the tables of `spec`, which come from the specifications."""

import numpy as np
import pytest
import spec
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_fp4.formats import (
    E2M1_MAX,
    E2M1_VALUES,
    E4M3_MAX,
    E4M3_MIN,
    FP4Format,
    decode_e2m1,
    dequantize_blocks,
    encode_e2m1,
    pack,
    round_to_e2m1,
    unpack,
)
from hf_fp4.gptq import round_weight
from hf_fp4.scales import weight_global_scale, weight_scales

pytestmark = pytest.mark.once

FORMATS = list(FP4Format)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ALL_BYTES = torch.arange(256, dtype=torch.uint8)


def all_16_bit_values(dtype):
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    return values[~values.isnan()]


def to_bytes(tensor):
    return tensor.view(torch.uint8).numpy()


# E2M1


def test_constants():
    assert E2M1_VALUES == (0, 0.5, 1, 1.5, 2, 3, 4, 6)
    assert (E2M1_MAX, E4M3_MAX, E4M3_MIN) == (6, 448, 2**-9)


def test_formats():
    nvfp4, mxfp4 = FP4Format("nvfp4"), FP4Format("mxfp4")
    assert len(FP4Format) == 2
    assert (nvfp4.group_size, nvfp4.scale_dtype, nvfp4.has_global_scale) == (16, torch.float8_e4m3fn, True)
    assert (mxfp4.group_size, mxfp4.scale_dtype, mxfp4.has_global_scale) == (32, torch.uint8, False)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_every_code(dtype):
    codes = torch.arange(16, dtype=torch.uint8)
    values = decode_e2m1(codes, dtype)
    assert values.dtype == dtype
    np.testing.assert_array_equal(values.double().numpy(), spec.E2M1)
    np.testing.assert_array_equal(torch.signbit(values).numpy(), np.signbit(spec.E2M1))
    assert torch.equal(encode_e2m1(values), codes)
    assert torch.equal(round_to_e2m1(values), values)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tie, expected", spec.TIES.items())
def test_ties_go_to_the_even_code(tie, expected, dtype):
    x = torch.tensor([tie, -tie], dtype=dtype)
    assert round_to_e2m1(x).tolist() == [expected, -expected]
    code = spec.E2M1.tolist().index(expected)
    assert code % 2 == 0 and encode_e2m1(x).tolist() == [code, code + 8]


@pytest.mark.parametrize("tie", spec.TIES)
def test_the_neighbours_of_ties_go_to_the_nearer_code(tie):
    x = torch.tensor([tie], dtype=torch.float32)
    below, above = torch.nextafter(x, torch.zeros(1)), torch.nextafter(x, torch.full((1,), 9.0))
    lower = max(v for v in spec.E2M1 if v < tie)
    upper = min(v for v in spec.E2M1 if v > tie)
    assert (round_to_e2m1(below).item(), round_to_e2m1(above).item()) == (lower, upper)


def test_saturation_and_infinity():
    x = torch.tensor([6.0, 6.5, 7.0, 1e4, 3e38, float("inf")])
    assert round_to_e2m1(x).tolist() == [6.0] * 6 and round_to_e2m1(-x).tolist() == [-6.0] * 6
    assert encode_e2m1(x).tolist() == [7] * 6 and encode_e2m1(-x).tolist() == [15] * 6


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_nan(dtype):
    x = torch.tensor([float("nan"), 1.0], dtype=dtype)
    assert round_to_e2m1(x).isnan().tolist() == [True, False]


@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_keep_the_sign_of_zero(dtype):
    x = torch.tensor([0.0, -0.0, 0.1, -0.1, 0.25, -0.25], dtype=dtype)
    assert encode_e2m1(x).tolist() == [0, 8, 0, 8, 0, 8]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_number(dtype):
    x = all_16_bit_values(dtype)
    expected = spec.e2m1_codes(x.double().numpy())
    np.testing.assert_array_equal(encode_e2m1(x).numpy(), expected)
    np.testing.assert_array_equal(round_to_e2m1(x).double().numpy(), spec.E2M1[expected])


def test_the_argument_is_not_changed():
    x = torch.randn(4, 8) * 3
    before = x.clone()
    round_to_e2m1(x), encode_e2m1(x)
    assert torch.equal(x, before)


@given(st.lists(st.floats(-8, 8, width=32) | st.floats(width=32, allow_nan=False), min_size=1, max_size=64))
def test_rounding_properties(values):
    x = torch.tensor(values, dtype=torch.float32)
    rounded, codes = round_to_e2m1(x), encode_e2m1(x)
    finite = np.clip(x.double().numpy(), -1e30, 1e30)
    distances = np.abs(finite[:, None] - spec.E2M1)
    chosen = np.abs(finite - rounded.double().numpy())
    assert (chosen == distances.min(1)).all(), "not a nearest value"
    np.testing.assert_array_equal(codes.numpy(), spec.e2m1_codes(finite))
    assert torch.equal(decode_e2m1(codes), rounded)
    assert torch.equal(round_to_e2m1(rounded), rounded)
    assert torch.equal(round_to_e2m1(-x), -rounded)
    ascending = round_to_e2m1(x.sort().values)
    assert (ascending[1:] >= ascending[:-1]).all()


# Packing


def test_every_byte():
    codes = unpack(ALL_BYTES[None])
    assert codes.dtype == torch.uint8 and codes.shape == (1, 512)
    assert codes[0, 0::2].tolist() == [b % 16 for b in range(256)]
    assert codes[0, 1::2].tolist() == [b // 16 for b in range(256)]
    assert torch.equal(pack(codes), ALL_BYTES[None])


@given(st.lists(st.integers(0, 15), min_size=1, max_size=30), st.integers(1, 3))
def test_pack_is_the_inverse_of_unpack(half, rows):
    codes = torch.tensor([half + half[::-1]] * rows, dtype=torch.uint8)
    packed = pack(codes)
    assert packed.dtype == torch.uint8 and packed.shape == (rows, len(half))
    assert torch.equal(unpack(packed), codes)
    assert torch.equal(unpack(packed[:, None]), codes[:, None])


def test_pack_refuses_an_odd_length():
    with pytest.raises(ValueError, match="last dimension of FP4 codes must be even .* got 5"):
        pack(torch.zeros(2, 5, dtype=torch.uint8))


# Block scales


@pytest.mark.parametrize("fmt", FORMATS)
def test_every_scale_byte(fmt):
    decoded = fmt.decode_scale(ALL_BYTES.view(fmt.scale_dtype))
    assert decoded.dtype == torch.float32
    np.testing.assert_array_equal(decoded.double().numpy(), spec.decode_scales(fmt.value, np.arange(256)))


@pytest.mark.parametrize("fmt, last", [(FP4Format.NVFP4, 0x7E), (FP4Format.MXFP4, 254)])
def test_every_positive_scale_encodes_to_itself(fmt, last):
    first = 1 if fmt is FP4Format.NVFP4 else 0
    codes = ALL_BYTES[first : last + 1].view(fmt.scale_dtype)
    encoded = fmt.encode_scale(fmt.decode_scale(codes))
    assert encoded.dtype == fmt.scale_dtype
    np.testing.assert_array_equal(to_bytes(encoded), to_bytes(codes))


def test_e4m3_rounds_to_nearest_even():
    grid = spec.E4M3[: 0x7E + 1]
    middles = (grid[1:-1] + grid[2:]) / 2
    middles = np.float32(middles)
    generator = np.random.default_rng(0)
    inputs = np.concatenate(
        [
            middles,
            np.nextafter(middles, np.float32(0)),
            np.nextafter(middles, np.float32(1e9)),
            np.exp(generator.uniform(np.log(2**-9), np.log(448), 20000)).astype(np.float32),
        ]
    )
    expected = spec.nearest_codes(inputs, grid)
    np.testing.assert_array_equal(to_bytes(FP4Format.NVFP4.encode_scale(torch.from_numpy(inputs))), expected)
    assert (expected[: len(middles)] % 2 == 0).all()


def test_e4m3_saturates_and_is_never_zero():
    scales = torch.tensor([0.0, 1e-30, 2**-11, 2**-10, 449.0, 464.0, 480.0, 1e30, float("inf")])
    assert to_bytes(FP4Format.NVFP4.encode_scale(scales)).tolist() == [
        1,
        1,
        1,
        1,
        0x7E,
        0x7E,
        0x7E,
        0x7E,
        0x7E,
    ]


def test_e8m0_rounds_down_to_a_power_of_two():
    powers = torch.from_numpy(spec.E8M0[:255].astype(np.float32))
    bytes_ = torch.arange(255)
    for factor in (1.0, 1.25, 1.5, 1.75):
        assert torch.equal(FP4Format.MXFP4.encode_scale(powers * factor).int(), bytes_)
    next_below = torch.nextafter(powers[1:], torch.zeros(1))
    assert torch.equal(FP4Format.MXFP4.encode_scale(next_below).int(), bytes_[:-1])


def test_e8m0_saturates():
    scales = torch.tensor([0.0, 1e-45, 3e38, float("inf")])
    assert FP4Format.MXFP4.encode_scale(scales).tolist() == [0, 0, 254, 254]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fmt", FORMATS)
def test_scales_of_any_float_dtype(fmt, dtype):
    scales = torch.tensor([0.5, 1.0, 1.0625, 3.25, 100.0]).to(dtype)
    np.testing.assert_array_equal(
        to_bytes(fmt.encode_scale(scales)), to_bytes(fmt.encode_scale(scales.float()))
    )


# Whole blocks


def every_code_under_every_scale(fmt):
    """One row for each positive scale byte; 253 and 254 of E8M0 overflow float32 under the code of 6."""
    last = 0x7E if fmt is FP4Format.NVFP4 else 252
    scale_bytes = ALL_BYTES[1 if fmt is FP4Format.NVFP4 else 0 : last + 1, None]
    codes = torch.arange(fmt.group_size, dtype=torch.uint8) % 16
    return pack(codes).repeat(len(scale_bytes), 1), scale_bytes.contiguous()


@pytest.mark.parametrize(
    "fmt, dtype",
    [  # float16 cannot hold the range of E8M0 scales
        (FP4Format.NVFP4, torch.float32),
        (FP4Format.NVFP4, torch.bfloat16),
        (FP4Format.NVFP4, torch.float16),
        (FP4Format.MXFP4, torch.float32),
        (FP4Format.MXFP4, torch.bfloat16),
    ],
)
def test_dequantize_every_code_under_every_scale_exactly(fmt, dtype):
    packed, scale = every_code_under_every_scale(fmt)
    actual = dequantize_blocks(packed, scale.view(fmt.scale_dtype), fmt, dtype)
    assert actual.dtype == dtype
    expected = spec.dequantize(fmt.value, packed.numpy(), scale.numpy())
    np.testing.assert_array_equal(actual.double().numpy(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("rows, groups", [(1, 1), (5, 3), (16, 4)])
def test_dequantize_places_values_and_scales(fmt, dtype, rows, groups):
    """The slow way, one value at a time."""
    packed = torch.randint(0, 256, (rows, groups * fmt.group_size // 2), dtype=torch.uint8)
    low, high = (0x20, 0x60) if fmt is FP4Format.NVFP4 else (120, 135)
    scale = torch.randint(low, high, (rows, groups), dtype=torch.uint8)
    actual = dequantize_blocks(packed, scale.view(fmt.scale_dtype), fmt, dtype)
    assert actual.shape == (rows, groups * fmt.group_size)
    for n, k in np.ndindex(*actual.shape):
        byte = int(packed[n, k // 2])
        code = byte >> 4 if k % 2 else byte & 15
        decoded = spec.decode_scales(fmt.value, int(scale[n, k // fmt.group_size]))
        assert actual[n, k].item() == spec.E2M1[code] * decoded


@pytest.mark.parametrize(
    "fmt, nan", [(FP4Format.NVFP4, 0x7F), (FP4Format.NVFP4, 0xFF), (FP4Format.MXFP4, 0xFF)]
)
def test_a_nan_scale_gives_nan(fmt, nan):
    packed = torch.full((1, fmt.group_size), 0x11, dtype=torch.uint8)
    scale = torch.tensor([[0x38, nan]], dtype=torch.uint8).view(fmt.scale_dtype)
    values = dequantize_blocks(packed, scale, fmt, torch.float32)
    assert values.isnan().any(0).tolist() == [False] * fmt.group_size + [True] * fmt.group_size


# Golden bytes: what is stored must never change.

GOLDEN_ROWS = [
    [3.0, -3.0, 2.0, -2.0, 1.5, -1.5, 1.0, -1.0, 0.75, -0.75, 0.5, -0.5, 0.25, -0.25, 0.0, -0.0] * 2,
    [0.03 * k - 0.45 for k in range(16)] + [0.01 * k * k - 0.7 for k in range(16)],
]
GOLDEN = {
    FP4Format.NVFP4: {
        "packed": "f7e6d5c4b3a29180f7e6d5c4b3a29180ffeeeeddcdbcaa89ddcdccab18426577",
        "scale": "78786270",
        "global_scale": 512.0,
    },
    FP4Format.MXFP4: {
        "packed": "f7e6d5c4b3a29180f7e6d5c4b3a29180bcbbabaa9a998988ddcdccab18426577",
        "scale": "7e7d",
        "global_scale": None,
    },
}


@pytest.mark.parametrize("fmt", FORMATS)
def test_golden_bytes(fmt):
    weight = torch.tensor(GOLDEN_ROWS)
    golden = GOLDEN[fmt]
    global_scale = weight_global_scale(weight.abs().amax().view(1)) if fmt.has_global_scale else None
    assert (None if global_scale is None else global_scale.item()) == golden["global_scale"]
    scale = weight_scales(weight, fmt, "absmax", global_scale)
    stored = round_weight(weight, scale, fmt, global_scale)
    assert to_bytes(stored.packed).tobytes().hex() == golden["packed"]
    assert to_bytes(stored.scale).tobytes().hex() == golden["scale"]
    expected = spec.dequantize(
        fmt.value,
        np.frombuffer(bytes.fromhex(golden["packed"]), np.uint8).reshape(2, 16),
        np.frombuffer(bytes.fromhex(golden["scale"]), np.uint8).reshape(2, -1),
        golden["global_scale"] or 1.0,
    )
    np.testing.assert_array_equal(stored.dequantize().double().numpy(), expected)
    np.testing.assert_array_equal(stored.dequantize()[0].numpy(), np.float32(GOLDEN_ROWS[0]))
