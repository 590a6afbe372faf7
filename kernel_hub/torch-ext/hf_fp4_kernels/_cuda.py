"""Fake implementations of the compiled ops (their schemas are in torch_binding.cpp), and what integers mean in them."""

import torch

from ._ops import add_op_namespace_prefix, ops

FORMATS = {"nvfp4": 0, "mxfp4": 1}
RULES = {"absmax": 0, "four_over_six": 1, "mse": 2}
# "e4m3" is what `_operand_for` makes of it; the last two say it for measuring and for tests.
OPERANDS = {"bf16": 0, "fp16": 1, "e4m3": 2, "e4m3_tiles": 3, "e4m3_rows": 4}
TILE_BYTES = {"nvfp4": 2304, "mxfp4": 2176}  # a prepared tile: 64 rows x 64 k


def is_compiled() -> bool:
    return hasattr(ops, "prepared_linears")


def _div_up(a, b):
    return (a + b - 1) // b


_GEMV_TOKENS, _LIBRARY_TOKENS = 16, 2048  # of torch_binding.cpp


def _operand_for(m, operand, dtype):
    """What m tokens are made into: operand_for in torch_binding.cpp. Rows are for the library's product; else tiles."""
    if operand != OPERANDS["e4m3"]:
        return operand
    if m <= _GEMV_TOKENS:
        return OPERANDS["bf16"]
    return OPERANDS["e4m3_rows" if m >= _LIBRARY_TOKENS and dtype == torch.bfloat16 else "e4m3_tiles"]


def _token_tile(m):
    for tile in (8, 16, 32, 64, 128):
        if m <= tile:
            return tile
    return 256


def _register_fakes() -> None:
    @torch.library.register_fake(add_op_namespace_prefix("prepare_weight"))
    def _(weight, scale, global_scale):
        *experts, n, half = weight.shape
        tile = TILE_BYTES["nvfp4" if scale.dtype == torch.float8_e4m3fn else "mxfp4"]
        packed = weight.new_empty((*experts, _div_up(n, 64), _div_up(half, 32), tile))
        return packed, weight.new_empty((*experts, n), dtype=torch.float32)

    @torch.library.register_fake(add_op_namespace_prefix("restore_weight"))
    def _(packed, row_scale, n, k):
        experts = packed.shape[:-3]
        if packed.shape[-1] == TILE_BYTES["nvfp4"]:
            scale = packed.new_empty((*experts, n, k // 16), dtype=torch.float8_e4m3fn)
        else:
            scale = packed.new_empty((*experts, n, k // 32))
        return packed.new_empty((*experts, n, k // 2)), scale

    @torch.library.register_fake(add_op_namespace_prefix("rotate_quantize"))
    def _(x, global_scale, format, hadamard, rule):
        k = x.shape[-1]
        m = x.numel() // k
        codes = x.new_empty((m, k // 2), dtype=torch.uint8)
        if format == FORMATS["nvfp4"]:
            scales = x.new_empty((m, k // 16), dtype=torch.float8_e4m3fn)
        else:
            scales = x.new_empty((m, k // 32), dtype=torch.uint8)
        per_token = format == FORMATS["nvfp4"] and global_scale is None
        return codes, scales, x.new_empty((m if per_token else 1,), dtype=torch.float32)

    @torch.library.register_fake(add_op_namespace_prefix("fake_quantize"))
    def _(x, global_scale, format, quantize, hadamard, rule):
        k = x.shape[-1]
        m = x.numel() // k
        rows = (m if format == FORMATS["nvfp4"] and global_scale is None else 1) if quantize else 0
        values = x.new_empty((m, k), dtype=torch.bfloat16 if quantize else x.dtype)
        return values, x.new_empty((rows,), dtype=torch.float32)

    @torch.library.register_fake(add_op_namespace_prefix("prepare_activation"))
    def _(x, up, global_scale, format, operand, quantize, hadamard, rule):
        k = x.shape[-1]
        m = x.numel() // k
        operand = _operand_for(m, operand, x.dtype)
        if operand == OPERANDS["e4m3_rows"]:
            return x.new_empty((m * k,), dtype=torch.float8_e4m3fn), x.new_empty((m,), dtype=torch.float32)
        tile, e4m3 = _token_tile(m), operand == OPERANDS["e4m3_tiles"]
        tokens = x.new_empty(
            (_div_up(m, tile) * tile * _div_up(k, 64) * (64 if e4m3 else 128),), dtype=torch.uint8
        )
        per_token = e4m3 or format == FORMATS["nvfp4"] and global_scale is None
        return tokens, x.new_empty(((m if per_token else 1) if quantize else 0,), dtype=torch.float32)

    @torch.library.register_fake(add_op_namespace_prefix("prepared_gemm"))
    def _(tokens, token_scale, packed, row_scale, bias, m, operand, out_is_bf16, split):
        dtype = torch.bfloat16 if out_is_bf16 else torch.float16
        return tokens.new_empty((m, row_scale.shape[0]), dtype=dtype)

    @torch.library.register_fake(add_op_namespace_prefix("prepared_linears"))
    def _(x, up, packed, row_scale, bias, global_scale, operand, quantize, hadamard, rule):
        m, rows = x.numel() // x.shape[-1], [scale.shape[0] for scale in row_scale]
        if _operand_for(m, operand, x.dtype) == OPERANDS["e4m3_rows"]:
            rows = [sum(rows)]
        return [x.new_empty((*x.shape[:-1], n)) for n in rows]

    @torch.library.register_fake(add_op_namespace_prefix("grouped_linear"))
    def _(
        x, up, offsets, index, packed, row_scale, bias, global_scale, operand, quantize, hadamard, rule, tile
    ):  # fmt: skip
        rows = x.numel() // x.shape[-1] if index is None else index.shape[0]
        return x.new_empty((rows, row_scale.shape[1]))


if is_compiled():
    _register_fakes()
