"""A kernel package for the CPU with the functions of kernel_hub's: a layout of its own, the reference's numerics.

It shows what a layer asks of kernels and when, on a machine that none of the real ones run on.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch

from hf_fp4 import gptq, ops, scales
from hf_fp4.backends import Kernels
from hf_fp4.backends.reference import matmul, quantize_input
from hf_fp4.formats import FP4Format, dequantize_blocks

prepared: list[dict[str, Any]] = []
"""The arguments of every preparation of tokens that ran, also inside a compiled graph."""

fake_quantized: list[str] = []
grouped: list[int] = []
gates: list[int] = []
solved: list[str] = []
tiles: list[bool] = []
"""Not empty: weights of experts are laid out in tiles."""


class PreparedTokens(NamedTuple):
    values: torch.Tensor
    divisor: torch.Tensor
    dtype: torch.dtype


def prepare_weight(weight, weight_scale, weight_global_scale):
    """Codes and scales side by side, their bytes inverted: nothing that the reference could read by accident."""
    packed = torch.cat([weight, weight_scale.view(torch.uint8)], dim=1) ^ 255
    rows = (
        torch.ones(len(weight))
        if weight_global_scale is None
        else 1 / weight_global_scale.expand(len(weight))
    )
    return packed, rows.contiguous()


def restore_weight(packed, row_scale, out_features, in_features):
    if packed.dim() == 3:
        assert packed.is_contiguous()
        packed = packed.flatten(0, 1)[:out_features]
    assert packed.shape[0] == out_features == len(row_scale)
    codes, scale = (packed ^ 255).split([in_features // 2, packed.shape[1] - in_features // 2], dim=1)
    nvfp4 = scale.shape[1] * 16 == in_features
    return codes.contiguous(), scale.contiguous().view(torch.float8_e4m3fn if nvfp4 else torch.uint8)


def fp8_exact(weight, weight_scale):
    return bool((weight_scale > 0).all())


@torch.library.custom_op("hf_fp4_tests::prepare", mutates_args=())
def _prepare(
    x: torch.Tensor, scale: torch.Tensor | None, format: str, quantize: bool, hadamard: int, rule: str
) -> tuple[torch.Tensor, torch.Tensor]:
    prepared.append({"format": format, "quantize": quantize, "hadamard": hadamard, "rule": rule})
    values, divisor = quantize_input(
        x, FP4Format(format), rule if quantize else None, hadamard or None, scale
    )
    return values.clone(), torch.ones(1) if divisor is None else divisor.clone()


@_prepare.register_fake
def _(x, scale, format, quantize, hadamard, rule):
    per_token = quantize and format == "nvfp4" and scale is None
    dtype = torch.float32 if x.dtype == torch.float16 else x.dtype
    return torch.empty_like(x, dtype=dtype), x.new_empty(
        (*x.shape[:-1], 1) if per_token else (1,), dtype=torch.float32
    )


def prepare_activation(x, *, format, activations, hadamard, rule, input_global_scale, fp8):
    values, divisor = _prepare(x, input_global_scale, format, activations == "fp4", hadamard or 0, rule)
    return PreparedTokens(values, divisor, x.dtype)


@torch.library.custom_op("hf_fp4_tests::gemm", mutates_args=())
def _gemm(
    values: torch.Tensor,
    divisor: torch.Tensor,
    packed: torch.Tensor,
    row_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    weight, scale = restore_weight(packed, row_scale, len(row_scale), values.shape[-1])
    format = FP4Format.NVFP4 if scale.dtype == torch.float8_e4m3fn else FP4Format.MXFP4
    weight_divisor = None if format is FP4Format.MXFP4 else row_scale[:1].reciprocal()
    dequantized = dequantize_blocks(weight, scale, format, values.dtype)
    return matmul(values, divisor, dequantized, weight_divisor, bias).to(dtype)


@_gemm.register_fake
def _(values, divisor, packed, row_scale, bias, dtype):
    return values.new_empty((*values.shape[:-1], len(row_scale)), dtype=dtype)


def gemm(tokens, packed, row_scale, bias=None):
    return _gemm(tokens.values, tokens.divisor, packed, row_scale, bias, tokens.dtype)


def fake_quantize(x, *, format, activations, rule, hadamard, input_global_scale):
    """Values in bfloat16 and a multiplier, as a GPU would compute them: rotated in float32."""
    fake_quantized.append(activations)
    values, divisor = quantize_input(
        x, FP4Format(format), rule if activations == "fp4" else None, hadamard, input_global_scale
    )
    return values.bfloat16(), torch.ones(1) if divisor is None else divisor.reciprocal()


def fast_dtype(device):
    return torch.bfloat16


def search_scales(weight, base, steps, format, global_scale=None, importance=None):
    solved.append("search")
    fmt = FP4Format(format)
    assert steps == scales._steps_of(fmt)
    rule = "mse" if importance is None else "hessian"
    found = scales.weight_scales(weight, fmt, rule, global_scale, importance)
    assert found.dtype == base.dtype and found.shape == base.shape
    return found


def gptq_solve(columns, steps, inverse, upper):
    solved.append("solve")
    stacked = columns.dim() == 3
    stack = (
        zip(columns, steps, inverse, upper, strict=True) if stacked else [(columns, steps, inverse, upper)]
    )
    solutions = [gptq._solve_columns(*each) for each in stack]
    return torch.stack(solutions) if stacked else solutions[0]


def gptq_descend(target, current, scale, matrix, passes, format, global_scale=None):
    solved.append("descend")
    gptq._descend_columns(target, current, scale, matrix, passes, FP4Format(format), global_scale)


def linear(x, packed, row_scale, bias=None, *, up=None, **arguments):
    if up is not None:
        gates.append(len(x))
        x = torch.nn.functional.silu(x) * up
    format = "nvfp4" if packed.shape[-1] == x.shape[-1] // 2 + x.shape[-1] // 16 else "mxfp4"
    return gemm(prepare_activation(x, format=format, **arguments), packed, row_scale, bias)


def linears(x, weights, biases, **arguments):
    packed = weights[0][0]
    format = "nvfp4" if packed.shape[-1] == x.shape[-1] // 2 + x.shape[-1] // 16 else "mxfp4"
    tokens = prepare_activation(x, format=format, **arguments)
    return [gemm(tokens, *weight, bias) for weight, bias in zip(weights, biases, strict=True)]


def prepare_experts(weight, weight_scale, weight_global_scale, by_row=False):
    """As the real one: a row's scales behind its codes, since layers read them from there; or in tiles of 64 rows."""
    rows = torch.ones(weight.shape[:2])
    if weight_global_scale is not None:
        rows = (1 / weight_global_scale)[:, None].expand(weight.shape[:2])
    packed = torch.cat([weight, weight_scale.view(torch.uint8)], dim=2)
    if tiles and not by_row:
        padding = -packed.shape[1] % 64
        packed = torch.nn.functional.pad(packed ^ 255, (0, 0, 0, padding)).unflatten(1, (-1, 64))
    return packed, rows.contiguous()


def grouped_linear(x, offsets, packed, row_scale, bias=None, *, up=None, index=None, **arguments):
    """Row by row block of `linear`."""
    grouped.append(len(x))
    if up is not None:
        gates.append(len(x))
        x = torch.nn.functional.silu(x) * up
    if packed.dim() == 4:
        packed = packed.flatten(1, 2)[:, : row_scale.shape[1]] ^ 255
    format = "nvfp4" if packed.shape[2] == x.shape[-1] // 2 + x.shape[-1] // 16 else "mxfp4"
    tokens = prepare_activation(x, format=format, fp8=False, **arguments)
    rows = torch.arange(len(x)) if index is None else index
    result = x.new_zeros(len(rows), packed.shape[1])
    for expert, (start, stop) in enumerate(itertools.pairwise(offsets.tolist())):
        own = rows[start:stop]
        divisor = tokens.divisor if tokens.divisor.numel() == 1 else tokens.divisor[own]
        result[start:stop] = gemm(
            PreparedTokens(tokens.values[own], divisor, tokens.dtype),
            packed[expert] ^ 255,
            row_scale[expert],
            None if bias is None else bias[expert],
        )
    return result


def reference(layer, x):
    """What the layer computes without kernels."""
    return ops.linear(
        x, *layer.stored(), layer.weight_global_scale, layer.input_global_scale, layer.bias, layer.format.value,
        layer.activation_scale_rule, layer.hadamard_size or 0,
    )  # fmt: skip


def found() -> Kernels:
    """What `select` returns when this package is loaded."""
    import fake_kernels

    return Kernels("fake", fake_kernels)
