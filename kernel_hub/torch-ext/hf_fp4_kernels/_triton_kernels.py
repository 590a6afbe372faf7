"""Triton kernels for compute capability 8.0 and newer: the fallback where no CUDA kernel was compiled.

Same numerics as the CUDA files: FP32 rotation, one rounding rule, FP32 accumulation.
"""

import triton
import triton.language as tl

NVFP4 = tl.constexpr(0)
ABSMAX = tl.constexpr(0)
FOUR_OVER_SIX = tl.constexpr(1)
MSE = tl.constexpr(2)


@triton.jit
def _exp2_int(e):
    """2^e for integer e in -127..127."""
    normal = ((e + 127) << 23).to(tl.float32, bitcast=True)
    return tl.where(e <= -127, 5.877471754111438e-39, normal)


@triton.jit
def _decode_e4m3(byte):
    e = (byte >> 3) & 15
    m = byte & 7
    return tl.where(e == 0, m.to(tl.float32) * 0.001953125, (8 + m).to(tl.float32) * _exp2_int(e - 10))


@triton.jit
def _encode_block_scale(v):
    """E4M3 byte: nearest even, saturating, at least 2^-9. By hand: E4M3 conversions need compute capability 8.9."""
    v = tl.minimum(v, 448.0)
    bits = v.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    subnormal = ((v * 512.0 + 12582912.0) - 12582912.0).to(tl.int32)
    return tl.maximum(tl.where(v < 0.015625, subnormal, normal), 1)


@triton.jit
def _round_e2m1(x):
    a = tl.abs(x)
    c = tl.where(a < 2.0, 4194304.0, tl.where(a < 4.0, 8388608.0, 16777216.0))
    v = tl.minimum((a + c) - c, 6.0)
    return tl.where(x < 0, -v, v)


@triton.jit
def _code_of_e2m1(v, x):
    """4-bit code of grid value v; the sign bit is x's, so that a negative value that rounds to zero keeps it."""
    bits = tl.abs(v).to(tl.int32, bitcast=True)
    code = tl.where(bits >= 0x3F800000, (bits >> 22) - 0xFC, tl.where(bits != 0, 1, 0))
    return code | tl.where(x.to(tl.int32, bitcast=True) < 0, 8, 0)


@triton.jit
def _value_of_code(code):
    """The exponent and mantissa bits, where those of a float32 are: E2M1 is float32 2^126 times smaller, subnormals included."""
    bits = ((code & 7) << 22) | ((code & 8) << 28)
    return bits.to(tl.float32, bitcast=True) * 8.507059173023462e37  # 2^126


@triton.jit
def _butterfly(x, h: tl.constexpr, rows: tl.constexpr, cols: tl.constexpr):
    y = tl.permute(tl.reshape(x, [rows * cols // (2 * h), 2, h]), (0, 2, 1))
    a, b = tl.split(y)
    return tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 2, 1)), [rows, cols])


@triton.jit
def _load_rotated(x_ptr, rows, cols, M, K, HADAMARD: tl.constexpr, BM: tl.constexpr):
    mask = (rows[:, None] < M) & (cols[None, :] < K)
    x = tl.load(x_ptr + rows[:, None].to(tl.int64) * K + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    if HADAMARD >= 16:
        x = _butterfly(x, 1, BM, 128)
        x = _butterfly(x, 2, BM, 128)
        x = _butterfly(x, 4, BM, 128)
        x = _butterfly(x, 8, BM, 128)
    if HADAMARD >= 32:
        x = _butterfly(x, 16, BM, 128)
    if HADAMARD >= 64:
        x = _butterfly(x, 32, BM, 128)
    if HADAMARD >= 128:
        x = _butterfly(x, 64, BM, 128)
    if HADAMARD == 16:
        x = x * 0.25
    elif HADAMARD == 32:
        x = x * 0.17677669529663687
    elif HADAMARD == 64:
        x = x * 0.125
    elif HADAMARD == 128:
        x = x * 0.08838834764831845
    return x


@triton.jit
def token_amax_kernel(x_ptr, amax_ptr, M, K, HADAMARD: tl.constexpr, BM: tl.constexpr):
    """Largest rotated magnitude of each token, as int32 bits (which order like the floats) starting from zero."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    cols = tl.program_id(1) * 128 + tl.arange(0, 128)
    x = _load_rotated(x_ptr, rows, cols, M, K, HADAMARD, BM)
    amax = tl.max(tl.abs(x), 1).to(tl.int32, bitcast=True)
    tl.atomic_max(amax_ptr + rows, amax, mask=rows < M)


@triton.jit
def _under(xb, byte, gb):
    """nvfp4 blocks [.., .., 16] under scale bytes: decoded scales, grid values, squared errors."""
    s = _decode_e4m3(byte)
    q = _round_e2m1(xb * tl.math.div_rn(gb, s)[:, :, None])
    d = xb - q * tl.math.div_rn(s, gb)[:, :, None]
    return s, q, tl.sum(d * d, 2)


@triton.jit
def activation_kernel(
    x_ptr, global_ptr, amax_ptr, value_ptr, code_ptr, scale_ptr, token_scale_ptr, M, K,
    HADAMARD: tl.constexpr, FORMAT: tl.constexpr, RULE: tl.constexpr, QUANTIZE: tl.constexpr, PACKED: tl.constexpr,
    PER_TOKEN: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Rotate, then one of: store; quantize and store code * scale in bf16; quantize and store codes and scales."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    k_block = tl.program_id(1)
    cols = k_block * 128 + tl.arange(0, 128)
    x = _load_rotated(x_ptr, rows, cols, M, K, HADAMARD, BM)
    mask = (rows[:, None] < M) & (cols[None, :] < K)
    offsets = rows[:, None].to(tl.int64) * K + cols[None, :]
    if not QUANTIZE:
        tl.store(value_ptr + offsets, x.to(value_ptr.dtype.element_ty), mask=mask)
    else:
        GROUP: tl.constexpr = 16 if FORMAT == NVFP4 else 32
        BLOCKS: tl.constexpr = 128 // GROUP
        xb = tl.reshape(x, [BM, BLOCKS, GROUP])
        amax = tl.max(tl.abs(xb), 2)
        if FORMAT == NVFP4:
            if PER_TOKEN:
                top = tl.load(amax_ptr + rows, mask=rows < M, other=0).to(tl.float32, bitcast=True)
                # The power of two that takes the largest value to at most 256 * 6, so that multiplying by it is exact.
                ratio = tl.math.div_rn(top * 0 + 1536.0, tl.maximum(top, 7.888609052210118e-31))  # 2**-100
                g = _exp2_int(
                    tl.minimum(tl.maximum((ratio.to(tl.int32, bitcast=True) >> 23) - 127, -100), 100)
                )
            else:
                g = tl.load(global_ptr) + tl.zeros([BM], tl.float32)
            if k_block == 0:
                scale_rows = rows if PER_TOKEN else rows * 0
                keep = rows < M if PER_TOKEN else rows == 0
                tl.store(token_scale_ptr + scale_rows, tl.math.div_rn(g * 0 + 1.0, g), mask=keep)
            gb = tl.broadcast_to(g[:, None], [BM, BLOCKS])
            byte = _encode_block_scale(tl.math.div_rn(amax, amax * 0 + 6.0) * gb)
            s, q, error = _under(xb, byte, gb)
            if RULE != ABSMAX:
                byte6 = byte
                byte4 = _encode_block_scale(tl.math.div_rn(amax, amax * 0 + 4.0) * gb)
                for i in tl.static_range(0, 1 if RULE == FOUR_OVER_SIX else 2):
                    other = byte4 if i == 0 else tl.maximum(byte6 - 1, 1)
                    s_other, q_other, error_other = _under(xb, other, gb)
                    better = error_other < error
                    byte = tl.where(better, other, byte)
                    s = tl.where(better, s_other, s)
                    q = tl.where(better[:, :, None], q_other, q)
                    error = tl.where(better, error_other, error)
        else:
            if k_block == 0:
                tl.store(token_scale_ptr + rows * 0, rows * 0 + 1.0, mask=rows == 0)
            e = tl.maximum((amax.to(tl.int32, bitcast=True) >> 23) - 129, -127)
            s = _exp2_int(e)
            q = _round_e2m1(xb * _exp2_int(-e)[:, :, None])
            if RULE == MSE:
                s1 = _exp2_int(e + 1)
                q1 = _round_e2m1(xb * _exp2_int(-e - 1)[:, :, None])
                d0 = xb - q * s[:, :, None]
                d1 = xb - q1 * s1[:, :, None]
                up = tl.sum(d1 * d1, 2) < tl.sum(d0 * d0, 2)
                e = tl.where(up, e + 1, e)
                s = tl.where(up, s1, s)
                q = tl.where(up[:, :, None], q1, q)
            byte = e + 127
        if PACKED:
            code = tl.reshape(_code_of_e2m1(q, xb), [BM, 64, 2])
            lo, hi = tl.split(code)
            half = k_block * 64 + tl.arange(0, 64)
            tl.store(
                code_ptr + rows[:, None].to(tl.int64) * (K // 2) + half[None, :],
                (lo | (hi << 4)).to(tl.uint8),
                mask=(rows[:, None] < M) & (half[None, :] < K // 2),
            )
            block = k_block * BLOCKS + tl.arange(0, BLOCKS)
            tl.store(
                scale_ptr + rows[:, None].to(tl.int64) * (K // GROUP) + block[None, :],
                byte.to(tl.uint8),
                mask=(rows[:, None] < M) & (block[None, :] < K // GROUP),
            )
        else:
            value = tl.reshape(q * s[:, :, None], [BM, 128])
            tl.store(value_ptr + offsets, value.to(value_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _accumulate(
    x_row, row_mask, w_row, col_mask, top, K,
    FORMAT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """x w^T in FP32 [BM, BN], from pointers to the rows of both, without the scales of rows and tokens."""
    GROUP: tl.constexpr = 16 if FORMAT == NVFP4 else 32
    acc = tl.zeros([BM, BN], tl.float32)
    for k0 in range(0, K, BK):
        ks = k0 + tl.arange(0, BK)
        halves = k0 // 2 + tl.arange(0, BK // 2)
        blocks = k0 // GROUP + tl.arange(0, BK // GROUP)
        x = tl.load(x_row[:, None] + ks[None, :], mask=row_mask[:, None] & (ks[None, :] < K), other=0.0)
        packed = tl.load(
            w_row[:, None] + halves[None, :], mask=col_mask[:, None] & (halves[None, :] < K // 2), other=0
        ).to(tl.int32)
        byte = tl.load(
            w_row[:, None] + K // 2 + blocks[None, :],
            mask=col_mask[:, None] & (blocks[None, :] < K // GROUP),
            other=0,
        ).to(tl.int32)
        if FORMAT == NVFP4:
            s = _decode_e4m3(byte)
        else:  # relative to the row's largest exponent, which is in row_scale
            s = _exp2_int(tl.maximum(byte - top[:, None], -126))
        value = tl.reshape(
            tl.join(_value_of_code(packed & 15), _value_of_code(packed >> 4)), [BN, BK // GROUP, GROUP]
        )
        w = tl.reshape(value * s[:, :, None], [BN, BK]).to(x_row.dtype.element_ty)
        acc = tl.dot(x, tl.trans(w), acc)
    return acc


@triton.jit
def gemm_kernel(
    x_ptr, w_ptr, row_scale_ptr, token_scale_ptr, bias_ptr, out_ptr, M, N, K, token_stride,
    FORMAT: tl.constexpr, HAS_TOKEN_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out[M, N] = x[M, K] w[N, K]^T; w rows are K/2 bytes of codes, then K/16 or K/32 scale bytes."""
    GROUP: tl.constexpr = 16 if FORMAT == NVFP4 else 32
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    w_row = w_ptr + cols.to(tl.int64) * (K // 2 + K // GROUP)
    row_scale = tl.load(row_scale_ptr + cols, mask=cols < N, other=1.0)
    top = (row_scale.to(tl.int32, bitcast=True) >> 23) & 255
    acc = _accumulate(x_ptr + rows.to(tl.int64) * K, rows < M, w_row, cols < N, top, K, FORMAT, BM, BN, BK)
    acc = acc * row_scale[None, :]
    if HAS_TOKEN_SCALE:
        acc = acc * tl.load(token_scale_ptr + rows * token_stride, mask=rows < M, other=0.0)[:, None]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    tl.store(
        out_ptr + rows[:, None].to(tl.int64) * N + cols[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=(rows[:, None] < M) & (cols[None, :] < N),
    )


@triton.jit
def grouped_gemm_kernel(
    x_ptr, index_ptr, offsets_ptr, w_ptr, row_scale_ptr, token_scale_ptr, bias_ptr, out_ptr, E, N, K, token_stride,
    FORMAT: tl.constexpr, GATHER: tl.constexpr, HAS_TOKEN_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr,
    EXPERTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """As `gemm_kernel`, rows offsets[e] to offsets[e + 1] with the weight of expert e; E <= EXPERTS, a power of two.

    The blocks of all experts are numbered one after the other. The grid has as many as there can be, whatever the routing;
    those beyond the last end at once.
    """
    GROUP: tl.constexpr = 16 if FORMAT == NVFP4 else 32
    block = tl.program_id(0)
    experts = tl.arange(0, EXPERTS)
    starts = tl.load(offsets_ptr + experts, mask=experts < E, other=0).to(tl.int32)
    stops = tl.load(offsets_ptr + experts + 1, mask=experts < E, other=0).to(tl.int32)
    blocks = (stops - starts + BM - 1) // BM
    ends = tl.cumsum(blocks, 0)
    expert = tl.sum((ends <= block).to(tl.int32), 0)
    if expert < E:
        mine = experts == expert
        first = tl.sum(tl.where(mine, starts, 0), 0)
        stop = tl.sum(tl.where(mine, stops, 0), 0)
        before = tl.sum(tl.where(mine, ends - blocks, 0), 0)
        rows = first + (block - before) * BM + tl.arange(0, BM)
        row_mask = rows < stop
        tokens = rows.to(tl.int64)
        if GATHER:
            tokens = tl.load(index_ptr + rows, mask=row_mask, other=0).to(tl.int64)
        cols = tl.program_id(1) * BN + tl.arange(0, BN)
        weights = expert.to(tl.int64) * N + cols
        w_row = w_ptr + weights * (K // 2 + K // GROUP)
        row_scale = tl.load(row_scale_ptr + weights, mask=cols < N, other=1.0)
        top = (row_scale.to(tl.int32, bitcast=True) >> 23) & 255
        acc = _accumulate(x_ptr + tokens * K, row_mask, w_row, cols < N, top, K, FORMAT, BM, BN, BK)
        acc = acc * row_scale[None, :]
        if HAS_TOKEN_SCALE:
            acc = acc * tl.load(token_scale_ptr + tokens * token_stride, mask=row_mask, other=0.0)[:, None]
        if HAS_BIAS:
            acc += tl.load(bias_ptr + weights, mask=cols < N, other=0.0).to(tl.float32)[None, :]
        tl.store(
            out_ptr + rows[:, None].to(tl.int64) * N + cols[None, :],
            acc.to(out_ptr.dtype.element_ty),
            mask=row_mask[:, None] & (cols[None, :] < N),
        )
