"""FP4 (NVFP4 and MXFP4) linear layers: rotation, quantization, and matrix products with 4-bit weights.

A weight is re-laid out once (`prepare_weight`); `linear` then runs any number of tokens. On compute capability 9.0 the
compiled variant runs CUDA kernels, everywhere else (8.0 and newer) Triton ones, which on 10.x and 12.0 multiply W4A4 on FP4
tensor cores (not run on Blackwell hardware). On a CPU the CPU build runs compiled code. `search_scales`, `gptq_solve` and
`gptq_descend` choose the block scales and codes of a weight by GPTQ, for which `add_moments` sums products of its inputs.
`grouped_linear` runs one matrix of all experts of a layer, on GPUs. See the functions for shapes.
"""

from ._backends import PreparedTokens, backend_of, fast_dtype
from ._gptq import add_moments, gptq_descend, gptq_solve, search_scales
from ._linear import (
    PreparedWeight,
    fake_quantize,
    fp8_exact,
    gemm,
    grouped_linear,
    linear,
    linears,
    prepare_activation,
    prepare_experts,
    prepare_weight,
    restore_weight,
    rotate_quantize,
)

__all__ = [
    "PreparedTokens",
    "PreparedWeight",
    "add_moments",
    "backend_of",
    "fake_quantize",
    "fast_dtype",
    "fp8_exact",
    "gemm",
    "gptq_descend",
    "gptq_solve",
    "grouped_linear",
    "linear",
    "linears",
    "prepare_activation",
    "prepare_experts",
    "prepare_weight",
    "restore_weight",
    "rotate_quantize",
    "search_scales",
]
