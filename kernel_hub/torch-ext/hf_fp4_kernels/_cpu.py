"""Fake implementations of the compiled CPU ops (their schemas are in torch_binding_cpu.cpp).

A prepared weight is uint8 [N/16, K/64, tile]: tiles of 16 rows and 64 k, the last one filled with zeros. Tokens are
[M, K rounded up to 64], bf16 or float32. Float16 is computed in float32.
"""

import torch

from ._ops import add_op_namespace_prefix, ops

NVFP4 = 0
ROWS, TILE = 16, 64
TILE_BYTES = {"nvfp4": 576, "mxfp4": 544}


def is_compiled() -> bool:
    return hasattr(ops, "cpu_linear")


def _group(format):
    return 16 if format == NVFP4 else 32


def _padded(k):
    return (k + TILE - 1) // TILE * TILE


def _scale_dtype(format):
    return torch.float8_e4m3fn if format == NVFP4 else torch.uint8


def _token_scale(x, m, format, global_scale):
    return x.new_empty((m if format == NVFP4 and global_scale is None else 1,), dtype=torch.float32)


def _register_fakes() -> None:
    @torch.library.register_fake(add_op_namespace_prefix("cpu_isa"))
    def _():
        return ""

    @torch.library.register_fake(add_op_namespace_prefix("cpu_prepare_weight"))
    def _(weight, scale, global_scale):
        n, k = weight.shape[0], weight.shape[1] * 2
        tile = TILE_BYTES["nvfp4" if scale.dtype == torch.float8_e4m3fn else "mxfp4"]
        packed = weight.new_empty((n // ROWS, _padded(k) // TILE, tile))
        return packed, weight.new_empty((n,), dtype=torch.float32)

    @torch.library.register_fake(add_op_namespace_prefix("cpu_restore_weight"))
    def _(packed, n, k):
        format = 0 if packed.shape[2] == TILE_BYTES["nvfp4"] else 1
        scale = packed.new_empty((n, k // _group(format)), dtype=_scale_dtype(format))
        return packed.new_empty((n, k // 2)), scale

    @torch.library.register_fake(add_op_namespace_prefix("cpu_rotate_quantize"))
    def _(x, global_scale, format, hadamard, rule):
        k = x.shape[-1]
        m = x.numel() // k
        codes = x.new_empty((m, k // 2), dtype=torch.uint8)
        scales = x.new_empty((m, k // _group(format)), dtype=_scale_dtype(format))
        return codes, scales, _token_scale(x, m, format, global_scale)

    @torch.library.register_fake(add_op_namespace_prefix("cpu_prepare_activation"))
    def _(x, global_scale, format, quantize, hadamard, rule):
        k = x.shape[-1]
        m = x.numel() // k
        tokens = x.new_empty((m, _padded(k)), dtype=torch.bfloat16 if quantize else x.dtype)
        scale = _token_scale(x, m, format, global_scale)
        return tokens, scale if quantize else x.new_empty((0,), dtype=torch.float32)

    @torch.library.register_fake(add_op_namespace_prefix("cpu_gemm"))
    def _(tokens, token_scale, packed, row_scale, bias, out_is_bf16):
        dtype = torch.bfloat16 if out_is_bf16 else torch.float32
        return tokens.new_empty((tokens.shape[0], row_scale.shape[0]), dtype=dtype)

    @torch.library.register_fake(add_op_namespace_prefix("cpu_linear"))
    def _(x, packed, row_scale, bias, global_scale, quantize, hadamard, rule):
        return x.new_empty((x.numel() // x.shape[-1], row_scale.shape[0]))

    @torch.library.register_fake(add_op_namespace_prefix("cpu_solve_block"))
    def _(columns, steps, inverse, upper, quantized, errors):
        pass

    @torch.library.register_fake(add_op_namespace_prefix("cpu_descend_block"))
    def _(current, gradient, scale, matrix, global_scale, group, moved):
        pass

    @torch.library.register_fake(add_op_namespace_prefix("cpu_add_moments"))
    def _(second, cross, x, original, panel):
        pass

    @torch.library.register_fake(add_op_namespace_prefix("cpu_search"))
    def _(weight, base, steps, global_scale, importance, group, scale):
        pass


if is_compiled():
    _register_fakes()
