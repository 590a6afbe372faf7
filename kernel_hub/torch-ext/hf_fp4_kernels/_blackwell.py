"""W4A4 on FP4 tensor cores (compute capability 10 and 12). Not run on Blackwell hardware.

Weights are prepared, tokens rotated and quantized as for the Triton kernels; only the product differs, and W4A16 is theirs
altogether.
"""

import math
from typing import NamedTuple

import torch

from ._ops import add_op_namespace_prefix

NVFP4 = 0


class Tile(NamedTuple):
    """What one program of the product computes, and with how many warps and stages of copies."""

    tokens: int
    features: int
    k: int
    warps: int
    stages: int


def tile_of(m: int, major: int) -> Tile:
    """The tile for m tokens on compute capability major (10 or 12).

    128 features is what tcgen05's block-scaled product takes as operand A, from 4 or 8 warps; 256 k are 16 (nvfp4) or 8
    scales a row, one copy. On capability 10 no fewer than 64 tokens, the smallest tile of Triton's own FP4 tests there: for
    fewer, the time goes to the weight's bytes anyway. With 4 warps, 64 tokens would spill registers on capability 12, whose
    99 KiB of shared memory hold the buffers of stages - 1 steps.
    """
    if m <= 16 and major == 12:
        return Tile(16, 128, 256, warps=4, stages=4)
    if m <= 64:
        return Tile(64, 128, 256, warps=8, stages=4)
    return Tile(128, 128, 256, warps=8, stages=3)


@torch.library.custom_op(add_op_namespace_prefix("blackwell_gemm"), mutates_args=())
def ops_gemm(
    codes: torch.Tensor,
    scales: torch.Tensor,
    token_scale: torch.Tensor,
    packed: torch.Tensor,
    row_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_is_bf16: bool,
) -> torch.Tensor:
    from . import _blackwell_kernels as kernels

    m, code_bytes = codes.shape
    n, scale_bytes = row_scale.shape[0], scales.shape[1]
    out = codes.new_empty((m, n), dtype=torch.bfloat16 if out_is_bf16 else torch.float16)
    if m == 0:
        return out
    align = math.gcd(
        scale_bytes, 16
    )  # divides the weight's row too: K/2 is a multiple of 8, or of 16 where that counts
    tile = tile_of(m, torch.cuda.get_device_capability(codes.device)[0])
    grid = (math.ceil(m / tile.tokens), math.ceil(n / tile.features))
    with torch.cuda.device(codes.device):
        kernels.gemm_kernel[grid](
            codes, scales.view(torch.uint8), packed, packed[:, code_bytes:], row_scale, token_scale,
            row_scale if bias is None else bias, out, m, n, code_bytes, scale_bytes // align, packed.shape[1] // align,
            1 if token_scale.shape[0] > 1 else 0,
            FORMAT=NVFP4 if scales.dtype == torch.float8_e4m3fn else 1, HAS_BIAS=bias is not None,
            ALIGN=align, BM=tile.tokens, BN=tile.features, BK=tile.k,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return out


@ops_gemm.register_fake
def _(codes, scales, token_scale, packed, row_scale, bias, out_is_bf16):
    return codes.new_empty(
        (codes.shape[0], row_scale.shape[0]), dtype=torch.bfloat16 if out_is_bf16 else torch.float16
    )
