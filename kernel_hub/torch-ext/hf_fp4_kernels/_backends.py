"""What runs on a device, and what it does once `_linear.py` has checked the arguments."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from . import _blackwell, _cpu, _triton
from ._cuda import OPERANDS, is_compiled
from ._ops import ops

# Torch 2.11 brings Triton 3.6, the first that the Blackwell kernel was compiled with.
_FP4_TENSOR_CORES = torch.__version__ >= (2, 11)


class PreparedTokens(NamedTuple):
    """Rotated (and quantized) tokens, to be shared by linears that have the same input and rotation."""

    tokens: torch.Tensor
    token_scale: torch.Tensor  # float32 [M], [1] or [0] (none), a multiplier
    shape: tuple[int, ...]  # of the input without its last dimension
    dtype: torch.dtype  # of the results
    operand: str  # what they are multiplied in: "bf16", "fp16", "fp32", "e4m3" or "fp4"
    backend: str  # whose they are
    block_scale: torch.Tensor | None = None  # "fp4": float8_e4m3fn [M, K/16] or uint8 [M, K/32]


class Quantization(NamedTuple):
    """What becomes of tokens. Checked, and in the ops' integers."""

    global_scale: torch.Tensor | None
    format: int
    quantize: bool
    hadamard: int
    rule: int
    operand: str  # of the CUDA kernels


def backend_of(device: torch.device | int | None = None) -> str:
    """ "cuda", "blackwell" or "triton" on a GPU, "cpu" on a CPU: what runs there. RuntimeError if nothing does.

    "cpu" is the CPU build of the package alone; the environment variable HF_FP4_CPU_ISA may name its instruction set.
    "blackwell" (compute capability 10.x and 12.0) multiplies W4A4 on FP4 tensor cores, not run on such hardware so far; its
    weights, and W4A16, are those of "triton".
    """
    backend = backend_on(device)
    if backend == "cpu":
        ops.cpu_isa()  # which refuses an HF_FP4_CPU_ISA that this processor has not
    return backend


def fast_dtype(device: torch.device) -> torch.dtype:
    """In what a large product of bf16 matrices takes least time in PyTorch: bf16, or float32 on a CPU that multiplies bf16 slowly.

    Intel's take as long for a product of bf16 pairs as for four of floats, unless they have AMX.
    """
    if device.type != "cpu" or torch.cpu._is_amx_tile_supported():
        return torch.bfloat16
    return torch.bfloat16 if ops.cpu_isa() == "avx512_bf16" else torch.float32


def backend_on(device: torch.device | int | None) -> str:
    if isinstance(device, torch.device) and device.type == "cpu" and _cpu.is_compiled():
        return "cpu"
    capability = torch.cuda.get_device_capability(device)
    if capability == (9, 0) and is_compiled():
        return "cuda"
    # Not 12.1: Triton 3.6 multiplies mxfp4 in bf16 there, and does not compile nvfp4.
    if _FP4_TENSOR_CORES and (capability[0] == 10 or capability == (12, 0)):
        return "blackwell"
    if capability >= (8, 0):
        return "triton"
    raise RuntimeError(
        f"hf_fp4_kernels needs compute capability 8.0 or newer, this GPU has {capability[0]}.{capability[1]}"
    )


def backend_of_weight(packed: torch.Tensor) -> str:
    """By its layout first: a weight in Triton's also runs where the CUDA kernels would have prepared another."""
    if packed.dim() == 3:
        return "cpu" if packed.shape[2] in _cpu.TILE_BYTES.values() else "cuda"
    return "blackwell" if backend_on(packed.device) == "blackwell" else "triton"


def _cuda_tokens(x: torch.Tensor, q: Quantization) -> PreparedTokens:
    tokens, token_scale = ops.prepare_activation(
        x, None, q.global_scale, q.format, OPERANDS[q.operand], q.quantize, q.hadamard, q.rule
    )
    return PreparedTokens(tokens, token_scale, tuple(x.shape[:-1]), x.dtype, q.operand, "cuda")


def _cuda_gemm(prepared, packed, row_scale, bias):
    m = 1
    for size in prepared.shape:
        m *= size
    return ops.prepared_gemm(
        prepared.tokens, prepared.token_scale, packed, row_scale, bias, m, OPERANDS[prepared.operand],
        prepared.dtype == torch.bfloat16, 0,
    )  # fmt: skip


def _cuda_linears(x, q, packed, row_scale, bias, up=None):
    results = ops.prepared_linears(
        x, up, packed, row_scale, bias, q.global_scale, OPERANDS[q.operand], q.quantize, q.hadamard, q.rule
    )
    if len(results) == len(packed):
        return results
    return results[0].split([scale.shape[0] for scale in row_scale], -1)  # one product for all of them


def _cuda_linear(x, q, packed, row_scale, bias):
    return _cuda_linears(x, q, [packed], [row_scale], [bias])[0]


def input_of(x: torch.Tensor, up: torch.Tensor | None) -> torch.Tensor:
    """What is rotated and quantized, where kernels do not make that of x and up themselves."""
    return x.contiguous() if up is None else torch.nn.functional.silu(x) * up


def _with_one_stride(gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As they are if they are tensors of their own; as [M, K], and in place if they are columns of one tensor."""
    if gate.is_contiguous() and up.is_contiguous():
        return gate, up
    gate, up = (x.reshape(-1, x.shape[-1]) for x in (gate, up))
    if gate.stride() == up.stride() and gate.stride(1) == 1 and gate.stride(0) % 8 == 0:
        return gate, up
    return gate.contiguous(), up.contiguous()


def _cuda_gated_linear(gate, up, q, packed, row_scale, bias):
    gate, up = _with_one_stride(gate, up)
    return _cuda_linears(gate, q, [packed], [row_scale], [bias], up)[0]


def cuda_grouped_linear(x, up, q, index, offsets, packed, row_scale, bias):
    x, up = (x.contiguous(), None) if up is None else _with_one_stride(x, up)
    return ops.grouped_linear(
        x, up, offsets, index, packed, row_scale, bias, q.global_scale, OPERANDS[q.operand], q.quantize, q.hadamard,
        q.rule, 0,
    )  # fmt: skip


def triton_grouped_linear(x, up, q, index, offsets, packed, row_scale, bias):
    x = input_of(x, up)
    tokens, token_scale = _triton.ops_prepare_activation(
        x, q.global_scale, q.format, q.quantize, q.hadamard, q.rule
    )
    return _triton.ops_grouped_gemm(
        tokens, token_scale, index, offsets, packed, row_scale, bias, x.dtype == torch.bfloat16
    )


def _triton_tokens(x: torch.Tensor, q: Quantization) -> PreparedTokens:
    tokens, token_scale = _triton.ops_prepare_activation(
        x, q.global_scale, q.format, q.quantize, q.hadamard, q.rule
    )
    operand = "bf16" if tokens.dtype == torch.bfloat16 else "fp16"
    return PreparedTokens(tokens, token_scale, tuple(x.shape[:-1]), x.dtype, operand, "triton")


def _triton_gemm(prepared, packed, row_scale, bias):
    return _triton.ops_gemm(
        prepared.tokens, prepared.token_scale, packed, row_scale, bias, prepared.dtype == torch.bfloat16
    )


def _triton_linear(x, q, packed, row_scale, bias):
    return _triton.ops_linear(
        x, packed, row_scale, bias, q.global_scale, q.format, q.quantize, q.hadamard, q.rule
    )


def _blackwell_tokens(x: torch.Tensor, q: Quantization) -> PreparedTokens:
    if not q.quantize:
        return _triton_tokens(x, q)
    codes, block_scale, token_scale = _triton.ops_rotate_quantize(
        x, q.global_scale, q.format, q.hadamard, q.rule
    )
    return PreparedTokens(codes, token_scale, tuple(x.shape[:-1]), x.dtype, "fp4", "blackwell", block_scale)


def _blackwell_gemm(prepared, packed, row_scale, bias):
    return _blackwell.ops_gemm(
        prepared.tokens, prepared.block_scale, prepared.token_scale, packed, row_scale, bias,
        prepared.dtype == torch.bfloat16,
    )  # fmt: skip


def _blackwell_linear(x, q, packed, row_scale, bias):
    tokens = _blackwell_tokens(x, q)
    return BACKENDS[tokens.backend].gemm(tokens, packed, row_scale, bias)


def _cpu_input(x: torch.Tensor) -> torch.Tensor:
    return x.float() if x.dtype == torch.float16 else x


def _cpu_rotate_quantize(x, global_scale, format, hadamard, rule):
    return ops.cpu_rotate_quantize(_cpu_input(x), global_scale, format, hadamard, rule)


def _cpu_fake_quantize(x, global_scale, format, quantize, hadamard, rule):
    values, multiplier = ops.cpu_prepare_activation(
        _cpu_input(x), global_scale, format, quantize, hadamard, rule
    )
    return values[:, : x.shape[-1]].to(torch.bfloat16 if quantize else x.dtype).contiguous(), multiplier


def _cpu_tokens(x: torch.Tensor, q: Quantization) -> PreparedTokens:
    tokens, token_scale = ops.cpu_prepare_activation(
        _cpu_input(x), q.global_scale, q.format, q.quantize, q.hadamard, q.rule
    )
    operand = "bf16" if tokens.dtype == torch.bfloat16 else "fp32"
    return PreparedTokens(tokens, token_scale, tuple(x.shape[:-1]), x.dtype, operand, "cpu")


def _cpu_gemm(prepared, packed, row_scale, bias):
    bias = None if bias is None else _cpu_input(bias)
    y = ops.cpu_gemm(
        prepared.tokens, prepared.token_scale, packed, row_scale, bias, prepared.dtype == torch.bfloat16
    )
    return y.to(prepared.dtype)


def _cpu_linear(x, q, packed, row_scale, bias):
    y = ops.cpu_linear(
        _cpu_input(x), packed, row_scale, None if bias is None else _cpu_input(bias), q.global_scale, q.quantize,
        q.hadamard, q.rule,
    )  # fmt: skip
    return y.to(x.dtype)


def _cpu_linears(x, q, packed, row_scale, biases):
    weights = zip(packed, row_scale, biases, strict=True)
    if len(packed) == 1 or not (q.quantize or q.hadamard):  # there is nothing to share
        return [_cpu_linear(x, q, *weight) for weight in weights]
    tokens = _cpu_tokens(x, q)
    return [_cpu_gemm(tokens, *weight) for weight in weights]


class Backend(NamedTuple):
    """What a backend does once the arguments are checked."""

    prepare_weight: Callable  # weight, weight_scale, weight_global_scale -> packed, row_scale
    rotate_quantize: Callable  # x, global_scale, format, hadamard, rule -> codes, block scales, token_scale
    fake_quantize: Callable  # x, global_scale, format, quantize, hadamard, rule -> values, token_scale
    prepare_activation: Callable[[torch.Tensor, Quantization], PreparedTokens]
    gemm: Callable  # PreparedTokens, packed, row_scale, bias -> [M, N]
    linear: Callable  # x, Quantization, packed, row_scale, bias -> [M, N], or as x
    # weight, weight_scale, weight_global_scale of all experts -> packed, row_scale
    prepare_experts: Callable = _triton.prepare_experts
    linears: Callable | None = None  # as `linear`, of several weights in one call
    gated_linear: Callable | None = None  # as `linear` of silu(gate) * up, which are its first arguments


_TRITON = Backend(
    _triton.prepare_weight,
    _triton.ops_rotate_quantize,
    _triton.ops_prepare_activation,
    _triton_tokens,
    _triton_gemm,
    _triton_linear,
)
BACKENDS = {
    # The compiled ops are looked up when called: a variant that has none still imports.
    "cuda": Backend(
        lambda *arguments: ops.prepare_weight(*arguments),
        lambda *arguments: ops.rotate_quantize(*arguments),
        lambda *arguments: ops.fake_quantize(*arguments),
        _cuda_tokens,
        _cuda_gemm,
        _cuda_linear,
        lambda *arguments: ops.prepare_weight(*arguments),
        _cuda_linears,
        _cuda_gated_linear,
    ),
    "triton": _TRITON,
    "blackwell": _TRITON._replace(
        prepare_activation=_blackwell_tokens, gemm=_blackwell_gemm, linear=_blackwell_linear
    ),
    "cpu": Backend(
        lambda *arguments: ops.cpu_prepare_weight(*arguments),
        _cpu_rotate_quantize,
        _cpu_fake_quantize,
        _cpu_tokens,
        _cpu_gemm,
        _cpu_linear,
        linears=_cpu_linears,
    ),
}
