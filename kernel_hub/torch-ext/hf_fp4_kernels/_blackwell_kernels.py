"""The FP4 tensor core product, for compute capability 10 and 12. Compiled and interpreted; not run on Blackwell hardware.

`tl.dot_scaled` with two E2M1 operands becomes, in Triton 3.6, `tcgen05.mma` of kind mxf4nvf4 or mxf4 on capability 10 and
`mma.sync` with block scales on 12. Where it does not like a tile it computes in bf16 without a word, or for nvfp4 does not
compile; on capability 10 that is operand A with fewer than 128 rows. Tokens may be few, features are not: the weight is
operand A, and the product is computed transposed.
"""

import triton
import triton.language as tl

NVFP4 = tl.constexpr(0)


@triton.jit
def gemm_kernel(
    code_ptr, scale_ptr, w_code_ptr, w_scale_ptr, row_scale_ptr, token_scale_ptr, bias_ptr, out_ptr,
    M, N, code_bytes, scale_units, w_stride_units, token_stride,
    FORMAT: tl.constexpr, HAS_BIAS: tl.constexpr, ALIGN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out[M, N] = tokens[M, K] weight[N, K]^T; a row of K is code_bytes = K/2 of codes and scale_bytes of block scales.

    The tokens' codes and scales are two arrays, the weight's lie in one with w_stride bytes between rows. scale_bytes and
    w_stride come in units of ALIGN bytes: Triton sees by itself only what 16 divides, and copies the rest byte by byte.
    """
    GROUP: tl.constexpr = 16 if FORMAT == NVFP4 else 32
    scale_bytes = scale_units * ALIGN
    w_stride = w_stride_units * ALIGN
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    in_m, in_n = rows < M, cols < N
    code_row = code_ptr + rows.to(tl.int64) * code_bytes
    scale_row = scale_ptr + rows.to(tl.int64) * scale_bytes
    w_code_row = w_code_ptr + cols.to(tl.int64) * w_stride
    w_scale_row = w_scale_ptr + cols.to(tl.int64) * w_stride
    acc = tl.zeros([BN, BM], tl.float32)
    for step in range(tl.cdiv(code_bytes, BK // 2)):
        half = step * (BK // 2) + tl.arange(0, BK // 2)
        block = step * (BK // GROUP) + tl.arange(0, BK // GROUP)
        in_half, in_block = (half < code_bytes)[None, :], (block < scale_bytes)[None, :]
        # Past an end: codes 0 under scale byte 0, which is a number in both formats (0 and 2^-127).
        x = tl.load(code_row[:, None] + half[None, :], mask=in_m[:, None] & in_half, other=0)
        x_scale = tl.load(scale_row[:, None] + block[None, :], mask=in_m[:, None] & in_block, other=0)
        w = tl.load(w_code_row[:, None] + half[None, :], mask=in_n[:, None] & in_half, other=0)
        w_scale = tl.load(w_scale_row[:, None] + block[None, :], mask=in_n[:, None] & in_block, other=0)
        if FORMAT == NVFP4:
            x_scale = x_scale.to(tl.float8e4nv, bitcast=True)
            w_scale = w_scale.to(tl.float8e4nv, bitcast=True)
        acc = tl.dot_scaled(w, w_scale, "e2m1", tl.trans(x), x_scale, "e2m1", acc)
    if FORMAT == NVFP4:  # E8M0 scales are the whole scale
        acc = acc * tl.load(row_scale_ptr + cols, mask=in_n, other=0.0)[:, None]
        acc = acc * tl.load(token_scale_ptr + rows * token_stride, mask=in_m, other=0.0)[None, :]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + cols, mask=in_n, other=0.0).to(tl.float32)[:, None]
    tl.store(
        out_ptr + rows[None, :].to(tl.int64) * N + cols[:, None],
        acc.to(out_ptr.dtype.element_ty),
        mask=in_m[None, :] & in_n[:, None],
    )
