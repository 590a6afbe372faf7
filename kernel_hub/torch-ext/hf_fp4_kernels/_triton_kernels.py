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
    """The bits where those of a float32 are: E4M3 is float32 2^120 times smaller, subnormals included."""
    return (byte << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120


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


# Of a word of 8 codes, and a scale twice: pairs of neighbouring values times the scale. A bf16 has E2M1's bits at 8 to 6, an fp16 at
# 11 to 9: a value is then 2^126 or 2^14 times smaller. By the instruction that multiplies and adds -0, since compute capability
# 8.0 has no other for pairs of bf16.
def _expand_asm(instruction: str, magnitude: int, mask: str) -> str:
    lines = ["{", ".reg .b32 odd, pair, m, s, zero;", "mov.b32 zero, 0x80008000;", "shr.u32 odd, $4, 4;"]
    for place in range(4):  # a byte of even codes' nibbles below one of odd ones'
        lines.append(f"prmt.b32 pair, $4, odd, 0x0{4 + place}0{place};")
        lines += [f"shl.b32 m, pair, {magnitude};", f"and.b32 m, m, {mask};"]
        lines += ["shl.b32 s, pair, 12;", "lop3.b32 m, s, 0x80008000, m, 0xEA;"]  # s & .. | m
        lines.append(f"{instruction} ${place}, m, $5, zero;")
    return "\n".join([*lines, "}"])


_EXPAND_BF16 = tl.constexpr(_expand_asm("fma.rn.bf16x2", 6, "0x01C001C0"))
_EXPAND_FP16 = tl.constexpr(_expand_asm("fma.rn.f16x2", 9, "0x0E000E00"))
_EXPAND_OPERANDS, _PAIRS = tl.constexpr("=r,=r,=r,=r,r,r"), tl.constexpr((tl.int32,) * 4)


@triton.jit
def _split_pairs(pairs, dtype: tl.constexpr):
    low, high = (pairs & 0xFFFF).to(tl.int16), (pairs >> 16).to(tl.int16)
    return low.to(dtype, bitcast=True), high.to(dtype, bitcast=True)


@triton.jit
def _twice(scale, dtype: tl.constexpr):
    """An int32 that holds a scale, which `dtype` has exactly, as `_expand_words` wants it."""
    if dtype == tl.float16:
        bits = (scale * 16384.0).to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) << 16
    else:
        bits = (scale * 8.507059173023462e37).to(tl.int32, bitcast=True)  # 2^126; the lower half is zero
    return bits | ((bits >> 16) & 0xFFFF)


@triton.jit
def _expand_words(words, twice, dtype: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """[BN, BK] of `dtype` from int32 words of 8 codes and the scale of each, both [BN, BK / 8]."""
    p, q, r, s = tl.inline_asm_elementwise(
        _EXPAND_FP16 if dtype == tl.float16 else _EXPAND_BF16, _EXPAND_OPERANDS, [words, twice], dtype=_PAIRS, is_pure=True,
        pack=1,
    )  # fmt: skip
    a, b = _split_pairs(p, dtype)
    c, d = _split_pairs(q, dtype)
    e, f = _split_pairs(r, dtype)
    g, h = _split_pairs(s, dtype)
    even = tl.join(tl.join(a, e), tl.join(c, g))
    odd = tl.join(tl.join(b, f), tl.join(d, h))
    return tl.reshape(tl.join(even, odd), [BN, BK])


@triton.jit
def _load_weight(
    w_row, col_mask, top, none, k0, K, codes,
    dtype: tl.constexpr, FORMAT: tl.constexpr, WORDS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """[BN, BK] of `dtype`, exactly: of nvfp4 values without the divisor, over 128; of mxfp4 relative to the row's largest exponent.

    none: from `_nothing`. codes: K / 8. WORDS: every row begins at a multiple of 4 bytes, and this is not Triton's interpreter,
    which knows no assembly.
    """
    GROUP: tl.constexpr = 16 if FORMAT == NVFP4 else 32
    if WORDS:
        row = w_row.to(tl.pointer_type(tl.int32))[:, None]
        fours = tl.multiple_of(k0 // (4 * GROUP), BK // (4 * GROUP)) + tl.arange(0, BK // (4 * GROUP))
        four = tl.load(
            row + (codes + fours)[None, :],
            mask=col_mask[:, None] & (fours[None, :] < K // (4 * GROUP)),
            other=0,
        )
        even, odd = tl.join(four & 255, (four >> 16) & 255), tl.join((four >> 8) & 255, (four >> 24) & 255)
        byte = tl.reshape(tl.join(even, odd), [BN, BK // GROUP]) | none[:, None]
    else:
        blocks = k0 // GROUP + tl.arange(0, BK // GROUP)
        byte = tl.load(
            w_row[:, None] + K // 2 + blocks[None, :],
            mask=col_mask[:, None] & (blocks[None, :] < K // GROUP),
            other=0,
        ).to(tl.int32)
    if FORMAT == NVFP4:
        scale = _decode_e4m3(byte) * 0.0078125
    else:
        scale = _exp2_int(tl.maximum(byte - top[:, None], -126))
    if WORDS:
        places = tl.multiple_of(k0 // 8, BK // 8) + tl.arange(0, BK // 8)
        words = tl.load(row + places[None, :], mask=col_mask[:, None] & (places[None, :] < codes), other=0)
        scale = tl.broadcast_to(_twice(scale, dtype)[:, :, None], [BN, BK // GROUP, GROUP // 8])
        w = _expand_words(words, tl.reshape(scale, [BN, BK // 8]), dtype, BN, BK)
    else:
        halves = k0 // 2 + tl.arange(0, BK // 2)
        packed = tl.load(
            w_row[:, None] + halves[None, :], mask=col_mask[:, None] & (halves[None, :] < K // 2), other=0
        ).to(tl.int32)
        value = tl.join(_value_of_code(packed & 15), _value_of_code(packed >> 4))
        value = tl.reshape(value, [BN, BK // GROUP, GROUP]) * scale[:, :, None]
        w = tl.reshape(value, [BN, BK]).to(dtype)
    return w


@triton.jit
def _nothing(w_row):
    """Zeros, loaded as bytes, one for each row. By the type of what is loaded first, Triton chooses how many neighbouring values of
    a product's operand a thread has: after bytes a word's, which is then expanded by the thread that needs it.
    """
    return tl.load(w_row, mask=w_row.to(tl.int64) == 0, other=0).to(tl.int32)


@triton.jit
def _load_row_scale(row_scale_ptr, rows, mask, FORMAT: tl.constexpr):
    """What results are multiplied by, and an mxfp4 row's largest exponent."""
    row_scale = tl.load(row_scale_ptr + rows, mask=mask, other=1.0)
    top = (row_scale.to(tl.int32, bitcast=True) >> 23) & 255
    if FORMAT == NVFP4:
        row_scale = row_scale * 128.0
    return row_scale, top


@triton.jit
def _accumulate(
    x_row, row_mask, w_row, col_mask, top, k_begin, k_end, K, codes,
    FORMAT: tl.constexpr, WORDS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """x w^T in FP32 [BM, BN], from pointers to the rows of both, without the scales of rows and tokens."""
    acc = tl.zeros([BM, BN], tl.float32)
    none = _nothing(w_row)
    for k0 in range(k_begin, k_end, BK):
        ks = k0 + tl.arange(0, BK)
        x = tl.load(x_row[:, None] + ks[None, :], mask=row_mask[:, None] & (ks[None, :] < K), other=0.0)
        w = _load_weight(
            w_row, col_mask, top, none, k0, K, codes, x_row.dtype.element_ty, FORMAT, WORDS, BN, BK
        )
        acc = tl.dot(x, tl.trans(w), acc)
    return acc


@triton.jit
def _write(
    acc, rows, row_mask, cols, row_scale, token_scale, bias, out_ptr, N,
    HAS_TOKEN_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Results from sums; token_scale, bias: pointers to those of the rows and columns."""
    acc = acc * row_scale[None, :]
    if HAS_TOKEN_SCALE:
        acc = acc * tl.load(token_scale, mask=row_mask, other=0.0)[:, None]
    if HAS_BIAS:
        acc += tl.load(bias, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    tl.store(
        out_ptr + rows[:, None].to(tl.int64) * N + cols[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=row_mask[:, None] & (cols[None, :] < N),
    )


@triton.jit
def gemm_kernel(
    x_ptr, w_ptr, row_scale_ptr, token_scale_ptr, bias_ptr, out_ptr, sums_ptr, M, N, K, pitch, codes, part, token_stride,
    FORMAT: tl.constexpr, WORDS: tl.constexpr, HAS_TOKEN_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr,
    PARTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out[M, N] = x[M, K] w[N, K]^T; w rows are K/2 bytes of codes, then K/16 or K/32 scale bytes, `pitch` together; codes: K/8.

    PARTS: each block takes `part` of K, the grid's third dimension says which; sums are for `add_kernel`.
    """
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    w_row = w_ptr + cols.to(tl.int64) * pitch
    row_scale, top = _load_row_scale(row_scale_ptr, cols, cols < N, FORMAT)
    k_begin = tl.program_id(2) * part
    k_end = tl.minimum(k_begin + part, K)
    acc = _accumulate(
        x_ptr + rows.to(tl.int64) * K, rows < M, w_row, cols < N, top, k_begin, k_end, K, codes, FORMAT, WORDS, BM, BN, BK
    )  # fmt: skip
    if PARTS:
        at = (tl.program_id(2) * M + rows[:, None]).to(tl.int64) * N + cols[None, :]
        tl.store(sums_ptr + at, acc, mask=(rows[:, None] < M) & (cols[None, :] < N))
    else:
        _write(
            acc, rows, rows < M, cols, row_scale, token_scale_ptr + rows * token_stride, bias_ptr + cols, out_ptr, N,
            HAS_TOKEN_SCALE, HAS_BIAS,
        )  # fmt: skip


@triton.jit
def add_kernel(
    sums_ptr, row_scale_ptr, token_scale_ptr, bias_ptr, out_ptr, M, N, parts, token_stride,
    FORMAT: tl.constexpr, HAS_TOKEN_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Results from the sums of parts of K [parts, M, N], always added up in the same order."""
    rows = tl.program_id(0) + tl.arange(0, 1)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    row_scale, _ = _load_row_scale(row_scale_ptr, cols, cols < N, FORMAT)
    acc = tl.zeros([1, BN], tl.float32)
    for i in range(parts):
        at = (i * M + rows[:, None]).to(tl.int64) * N + cols[None, :]
        acc += tl.load(sums_ptr + at, mask=cols[None, :] < N, other=0.0)
    _write(
        acc, rows, rows < M, cols, row_scale, token_scale_ptr + rows * token_stride, bias_ptr + cols, out_ptr, N,
        HAS_TOKEN_SCALE, HAS_BIAS,
    )  # fmt: skip


@triton.jit
def dequantize_kernel(
    w_ptr, row_scale_ptr, out_ptr, N, K, pitch, codes,
    FORMAT: tl.constexpr, WORDS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out[N, K] is what gemm_kernel multiplies with, in the dtype of out; sums are for `add_kernel`."""
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    _, top = _load_row_scale(row_scale_ptr, rows, rows < N, FORMAT)
    w_row = w_ptr + rows.to(tl.int64) * pitch
    k0 = tl.program_id(1) * BK
    ks = k0 + tl.arange(0, BK)
    tl.store(
        out_ptr + rows[:, None].to(tl.int64) * K + ks[None, :],
        _load_weight(w_row, rows < N, top, _nothing(w_row), k0, K, codes, out_ptr.dtype.element_ty, FORMAT, WORDS, BN, BK),
        mask=(rows[:, None] < N) & (ks[None, :] < K),
    )  # fmt: skip


@triton.jit
def grouped_gemm_kernel(
    x_ptr, index_ptr, offsets_ptr, w_ptr, row_scale_ptr, token_scale_ptr, bias_ptr, out_ptr, E, N, K, pitch, codes, token_stride,
    FORMAT: tl.constexpr, WORDS: tl.constexpr, GATHER: tl.constexpr, HAS_TOKEN_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr,
    EXPERTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """As `gemm_kernel`, rows offsets[e] to offsets[e + 1] with the weight of expert e; E <= EXPERTS, a power of two.

    The blocks of all experts are numbered one after the other. The grid has as many as there can be, whatever the routing;
    those beyond the last end at once.
    """
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
        w_row = w_ptr + weights * pitch
        row_scale, top = _load_row_scale(row_scale_ptr, weights, cols < N, FORMAT)
        acc = _accumulate(
            x_ptr + tokens * K, row_mask, w_row, cols < N, top, 0, K, K, codes, FORMAT, WORDS, BM, BN, BK
        )
        _write(
            acc, rows, row_mask, cols, row_scale, token_scale_ptr + tokens * token_stride, bias_ptr + weights, out_ptr, N,
            HAS_TOKEN_SCALE, HAS_BIAS,
        )  # fmt: skip
