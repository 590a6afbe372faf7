"""Compiles the Triton kernels for a GPU that need not be there: `python triton_compile.py 80`.

Prints, as JSON, bytes of shared memory by case. A process of its own, because Triton's interpreter, once on, is on for good.
"""

import importlib
import json
import sys

from blackwell_compile import NAME, load_source

POINTERS = {
    "x_ptr": "*bf16", "value_ptr": "*bf16", "bias_ptr": "*bf16", "out_ptr": "*bf16",
    "w_ptr": "*u8", "code_ptr": "*u8", "scale_ptr": "*u8", "amax_ptr": "*i32",
    "index_ptr": "*i64", "offsets_ptr": "*i64",
}  # fmt: skip


def cases(linear, launch, gptq):
    """(name, kernel, constants, options) as the launches in _triton.py and _gptq_kernels.py have them."""
    rotation = {"HADAMARD": 128, "BM": 4}
    yield "token_amax", linear.token_amax_kernel, rotation, {}
    for format, rule in ((0, 1), (1, 2)):
        scales = {"HAS_TOKEN_SCALE": True, "HAS_BIAS": True}
        for words in (True, False):
            weight = {"FORMAT": format, "WORDS": words}
            for m in (16, 32, 64, 128):
                tokens, rows, k, warps, stages, _ = launch._tile(m)
                gemm = {**weight, **scales, "PARTS": words, "BM": tokens, "BN": rows, "BK": k}
                options = {"num_warps": warps, "num_stages": stages}
                yield f"gemm {format} {words} {m}", linear.gemm_kernel, gemm, options
            yield (
                f"dequantize {format} {words}",
                linear.dequantize_kernel,
                {**weight, "BN": 16, "BK": 256},
                {},
            )
        yield f"add {format}", linear.add_kernel, {"FORMAT": format, **scales, "BN": 1024}, {}
        for average in (0.25, 16, 32, 64):
            tokens, rows, k, warps, stages = launch._grouped_tile(average)
            grouped = {"FORMAT": format, "WORDS": True, **scales, "GATHER": True, "EXPERTS": 128}
            options = {"num_warps": warps, "num_stages": stages}
            constants = {**grouped, "BM": tokens, "BN": rows, "BK": k}
            yield f"grouped gemm {format} {average}", linear.grouped_gemm_kernel, constants, options
        packed = {"QUANTIZE": True, "PACKED": True, "PER_TOKEN": format == 0}
        activation = {**rotation, **packed, "FORMAT": format, "RULE": rule}
        yield f"activation {format}", linear.activation_kernel, activation, {}
        block = {"COUNT": gptq.BLOCK, "SIZE": 32 if format else 16, "BLOCK": gptq.BLOCK, "ROWS": gptq.ROWS}
        yield f"descend {format}", gptq.descend_kernel, {**block, "NVFP4": format == 0}, {"num_warps": 1}
    yield "solve", gptq.solve_kernel, {**block, "SIZE": 16}, {"num_warps": 1}


def main(arch: int) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    load_source()
    linear = importlib.import_module(f"{NAME}._triton_kernels")
    launch = importlib.import_module(f"{NAME}._triton")
    gptq = importlib.import_module(f"{NAME}._gptq_kernels")
    shared = {}
    for name, kernel, constants, options in cases(linear, launch, gptq):
        signature = {
            argument: "constexpr"
            if argument in constants
            else POINTERS.get(argument, "*fp32" if argument.endswith("_ptr") else "i32")
            for argument in kernel.arg_names
        }
        aligned = ("N", "K", "pitch", "codes", "part")  # numbers of real models, which are multiples of 16
        hints = {
            (i,): [["tt.divisibility", 16]]
            for i, argument in enumerate(kernel.arg_names)
            if argument.endswith("_ptr") or argument in aligned
        }
        compiled = triton.compile(
            ASTSource(kernel, signature, constants, hints),
            target=GPUTarget("cuda", arch, 32),
            options=options,
        )
        shared[name] = compiled.metadata.shared
    sys.stdout.write(json.dumps(shared))


if __name__ == "__main__":
    main(int(sys.argv[1]))
