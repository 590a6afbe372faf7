"""Ops of the Triton kernels. A prepared weight is the stored bytes, a row's scales behind its codes."""

import torch

from ._ops import add_op_namespace_prefix

NVFP4 = 0
# So many are left to the library's product of 16-bit matrices, after the weight was expanded.
_LIBRARY_TOKENS = 129


def prepare_weight(weight, weight_scale, weight_global_scale):
    """packed uint8 [N, K/2 + K/16 or K/32]; row_scale float32 [N]: 1/global, or 2^(largest exponent of the row)."""
    packed = torch.cat([weight, weight_scale.view(torch.uint8)], dim=1)
    if weight_scale.dtype == torch.float8_e4m3fn:
        row_scale = (1.0 / weight_global_scale.float()).expand(weight.shape[0]).contiguous()
    else:
        top = weight_scale.amax(1).int()  # a float32's exponent, where it is not subnormal
        row_scale = torch.where(top > 0, top << 23, 1 << 22).view(torch.float32)
    return packed, row_scale


def restore_weight(packed, in_features, format):
    codes, scales = packed[..., : in_features // 2].contiguous(), packed[..., in_features // 2 :].contiguous()
    return codes, scales.view(torch.float8_e4m3fn) if format == "nvfp4" else scales


def _run_activation(x, global_scale, format, quantize, packed, hadamard, rule):
    from . import _triton_kernels as kernels

    k = x.shape[-1]
    m = x.numel() // k
    group = 16 if format == NVFP4 else 32
    per_token = quantize and format == NVFP4 and global_scale is None
    value = code = scale = x
    token_scale = x.new_empty((m if per_token else 1 if quantize else 0,), dtype=torch.float32)
    if packed:
        code = x.new_empty((m, k // 2), dtype=torch.uint8)
        scale = x.new_empty((m, k // group), dtype=torch.uint8)
    else:
        value = x.new_empty((m, k), dtype=torch.bfloat16 if quantize else x.dtype)
    rows = 4 if m <= 64 else 16
    grid = ((m + rows - 1) // rows, (k + 127) // 128)
    amax = x
    if m > 0:
        if per_token:
            amax = torch.zeros((m,), dtype=torch.int32, device=x.device)
            kernels.token_amax_kernel[grid](x, amax, m, k, HADAMARD=hadamard, BM=rows)
        kernels.activation_kernel[grid](
            x, x if global_scale is None else global_scale, amax, value, code, scale, token_scale, m, k,
            HADAMARD=hadamard, FORMAT=format, RULE=rule, QUANTIZE=quantize, PACKED=packed, PER_TOKEN=per_token, BM=rows,
        )  # fmt: skip
    return value, code, scale, token_scale


def _of_weight(packed, k):
    """What the kernels are told of a weight, or of those of experts; WORDS: see `_load_weight`."""
    pitch = packed.shape[-1]
    format = NVFP4 if pitch == k // 2 + k // 16 else 1
    return {"pitch": pitch, "codes": k // 8, "FORMAT": format, "WORDS": packed.is_cuda and pitch % 4 == 0}


def _of_scales(token_scale, bias):
    """What they are told of what results are multiplied by and added to."""
    stride = 1 if token_scale.shape[0] > 1 else 0
    return {"token_stride": stride, "HAS_TOKEN_SCALE": token_scale.shape[0] > 0, "HAS_BIAS": bias is not None}


def _tile(m):
    """Tokens, output features, input features, warps and stages of a block, and how many blocks a multiprocessor is to have."""
    if m <= 16:
        return 16, 64, 128, 4, 4, 2
    if m <= 32:
        return 32, 32, 128, 2, 4, 4
    return (64, 64, 128, 4, 3, 2) if m <= 64 else (128, 64, 128, 4, 2, 2)


def _part_of_k(device, blocks, wanted, k, block_k):
    """How much of K a block takes where `blocks` could take all of it and each multiprocessor is to have `wanted`."""
    multiprocessors = 4  # of Triton's interpreter
    if device.type == "cuda":
        multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    parts = max(1, min(round(multiprocessors * wanted / blocks), k // block_k))
    return -(-k // (parts * block_k)) * block_k


def _run_gemm(tokens, token_scale, packed, row_scale, bias, out_dtype):
    from . import _triton_kernels as kernels

    m, k = tokens.shape
    n = row_scale.shape[0]
    out = tokens.new_empty((m, n), dtype=out_dtype)
    if m == 0:
        return out
    weight, scales = _of_weight(packed, k), _of_scales(token_scale, bias)
    bias = row_scale if bias is None else bias
    if m < _LIBRARY_TOKENS:
        block_m, block_n, block_k, warps, stages, wanted = _tile(m)
        blocks = (-(-m // block_m), -(-n // block_n))
        part = _part_of_k(packed.device, blocks[0] * blocks[1], wanted, k, block_k)
        parts = -(-k // part)
        sums = tokens.new_empty((parts, m, n), dtype=torch.float32) if parts > 1 else row_scale
        kernels.gemm_kernel[(*blocks, parts)](
            tokens, packed, row_scale, token_scale, bias, out, sums, m, n, k, part=part, **weight, **scales,
            PARTS=parts > 1, BM=block_m, BN=block_n, BK=block_k, num_warps=warps, num_stages=stages,
        )  # fmt: skip
        if parts == 1:
            return out
    else:
        parts, expanded = 1, tokens.new_empty((n, k))
        grid = (-(-n // 16), -(-k // 256))
        kernels.dequantize_kernel[grid](packed, row_scale, expanded, n, k, **weight, BN=16, BK=256)
        sums = torch.mm(tokens, expanded.T, out_dtype=torch.float32)
    kernels.add_kernel[(m, -(-n // 1024))](
        sums, row_scale, token_scale, bias, out, m, n, parts, FORMAT=weight["FORMAT"], **scales, BN=1024
    )
    return out


@torch.library.custom_op(add_op_namespace_prefix("triton_rotate_quantize"), mutates_args=())
def ops_rotate_quantize(
    x: torch.Tensor, global_scale: torch.Tensor | None, format: int, hadamard: int, rule: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    with torch.cuda.device(x.device):
        _, code, scale, token_scale = _run_activation(x, global_scale, format, True, True, hadamard, rule)
    return code, scale.view(torch.float8_e4m3fn) if format == NVFP4 else scale, token_scale


@ops_rotate_quantize.register_fake
def _(x, global_scale, format, hadamard, rule):
    k = x.shape[-1]
    m = x.numel() // k
    nvfp4 = format == NVFP4
    scale = x.new_empty((m, k // (16 if nvfp4 else 32)), dtype=torch.float8_e4m3fn if nvfp4 else torch.uint8)
    rows = m if nvfp4 and global_scale is None else 1
    return x.new_empty((m, k // 2), dtype=torch.uint8), scale, x.new_empty((rows,), dtype=torch.float32)


@torch.library.custom_op(add_op_namespace_prefix("triton_prepare_activation"), mutates_args=())
def ops_prepare_activation(
    x: torch.Tensor, global_scale: torch.Tensor | None, format: int, quantize: bool, hadamard: int, rule: int
) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.cuda.device(x.device):
        value, _, _, token_scale = _run_activation(x, global_scale, format, quantize, False, hadamard, rule)
    return value, token_scale


@ops_prepare_activation.register_fake
def _(x, global_scale, format, quantize, hadamard, rule):
    k = x.shape[-1]
    m = x.numel() // k
    rows = (m if format == NVFP4 and global_scale is None else 1) if quantize else 0
    value = x.new_empty((m, k), dtype=torch.bfloat16 if quantize else x.dtype)
    return value, x.new_empty((rows,), dtype=torch.float32)


@torch.library.custom_op(add_op_namespace_prefix("triton_gemm"), mutates_args=())
def ops_gemm(
    tokens: torch.Tensor,
    token_scale: torch.Tensor,
    packed: torch.Tensor,
    row_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_is_bf16: bool,
) -> torch.Tensor:
    with torch.cuda.device(tokens.device):
        return _run_gemm(
            tokens, token_scale, packed, row_scale, bias, torch.bfloat16 if out_is_bf16 else torch.float16
        )


@ops_gemm.register_fake
def _(tokens, token_scale, packed, row_scale, bias, out_is_bf16):
    return tokens.new_empty(
        (tokens.shape[0], row_scale.shape[0]), dtype=torch.bfloat16 if out_is_bf16 else torch.float16
    )


def ops_linear(x, packed, row_scale, bias, global_scale, format, quantize, hadamard, rule):
    tokens, token_scale = ops_prepare_activation(x, global_scale, format, quantize, hadamard, rule)
    return ops_gemm(tokens, token_scale, packed, row_scale, bias, x.dtype == torch.bfloat16)


def prepare_experts(weight, weight_scale, weight_global_scale):
    """packed uint8 [E, N, K/2 + K/16 or K/32] and row_scale float32 [E, N], as `prepare_weight` for each expert."""
    experts, rows = weight.shape[:2]
    scale = None
    if weight_global_scale is not None:
        scale = weight_global_scale.view(experts, 1).expand(experts, rows).reshape(-1)
    packed, row_scale = prepare_weight(weight.flatten(0, 1), weight_scale.flatten(0, 1), scale)
    return packed.view(experts, rows, -1), row_scale.view(experts, rows)


@torch.library.custom_op(add_op_namespace_prefix("triton_grouped_gemm"), mutates_args=())
def ops_grouped_gemm(
    tokens: torch.Tensor,
    token_scale: torch.Tensor,
    index: torch.Tensor | None,
    offsets: torch.Tensor,
    packed: torch.Tensor,
    row_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_is_bf16: bool,
) -> torch.Tensor:
    with torch.cuda.device(tokens.device):
        return _run_grouped_gemm(
            tokens, token_scale, index, offsets, packed, row_scale, bias,
            torch.bfloat16 if out_is_bf16 else torch.float16,
        )  # fmt: skip


@ops_grouped_gemm.register_fake
def _(tokens, token_scale, index, offsets, packed, row_scale, bias, out_is_bf16):
    count = tokens.shape[0] if index is None else index.shape[0]
    return tokens.new_empty(
        (count, row_scale.shape[1]), dtype=torch.bfloat16 if out_is_bf16 else torch.float16
    )


def _run_grouped_gemm(tokens, token_scale, index, offsets, packed, row_scale, bias, out_dtype):
    from . import _triton_kernels as kernels

    k = tokens.shape[1]
    count = tokens.shape[0] if index is None else index.shape[0]
    experts, n = row_scale.shape
    out = tokens.new_zeros((count, n), dtype=out_dtype)  # rows of no expert
    if count > 0:
        block_m, block_n, block_k, warps, stages = _grouped_tile(count / experts)
        # Every expert with rows has at most one block that is not full.
        grid = (count // block_m + min(experts, count), -(-n // block_n))
        kernels.grouped_gemm_kernel[grid](
            tokens, offsets if index is None else index, offsets, packed, row_scale, token_scale,
            row_scale if bias is None else bias, out, experts, n, k, **_of_weight(packed, k),
            **_of_scales(token_scale, bias), GATHER=index is not None, EXPERTS=max(2, 1 << (experts - 1).bit_length()),
            BM=block_m, BN=block_n, BK=block_k, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return out


def _grouped_tile(rows):
    """Rows, output features, input features, warps and stages of a block, by rows per expert on average."""
    if rows <= 0.25:
        return 16, 32, 128, 4, 4
    if rows <= 16:
        return 16, 64, 128, 4, 4
    return (32, 64, 128, 4, 2) if rows <= 32 else (64, 64, 128, 4, 2)
