"""Compiles the Blackwell product for a GPU that need not be there: `python blackwell_compile.py 100`.

Prints, as JSON, what each problem's tile became: its tensor core instructions in PTX and in SASS, registers spilled to memory,
and bytes of shared memory. A process of its own, because Triton's interpreter, once on, is on for good.
"""

import importlib.util
import json
import re
import subprocess
import sys
import tempfile
import types
from pathlib import Path

SOURCE = Path(__file__).resolve().parent.parent / "torch-ext" / "hf_fp4_kernels"
NAME = "hf_fp4_kernels_source_blackwell"
TOKENS = (1, 16, 17, 64, 65, 4096)
FEATURES_IN = (4096, 1152, 320)  # row strides that 16, 4 and (mxfp4) 2 divide


def load_source():
    """A package of the source files, with the `_ops.py` that a build without compiled ops would write."""
    import torch

    if NAME not in sys.modules:
        ops = sys.modules[f"{NAME}._ops"] = types.ModuleType(f"{NAME}._ops")
        ops.ops = getattr(torch.ops, NAME)
        ops.add_op_namespace_prefix = lambda name: f"{NAME}::{name}"
        spec = importlib.util.spec_from_file_location(NAME, SOURCE / "__init__.py")
        package = sys.modules[NAME] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(package)
    return sys.modules[NAME]


def _compile(kernel, tile, arch, format, k):
    """The compiled kernel for aligned tensors and the strides of k, specialised as a launch specialises them."""
    import math

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    scale_bytes = k // (16 if format == 0 else 32)
    align = math.gcd(scale_bytes, 16)
    pointers = {name: "*u8" for name in ("code_ptr", "scale_ptr", "w_code_ptr", "w_scale_ptr")}
    pointers |= {
        "row_scale_ptr": "*fp32",
        "token_scale_ptr": "*fp32",
        "bias_ptr": "*bf16",
        "out_ptr": "*bf16",
    }
    sizes = {
        "M": 1000, "N": 4096, "code_bytes": k // 2, "scale_units": scale_bytes // align,
        "w_stride_units": (k // 2 + scale_bytes) // align, "token_stride": 0,
    }  # fmt: skip
    constants = {
        "FORMAT": format, "HAS_BIAS": True, "ALIGN": align, "BM": tile.tokens, "BN": tile.features, "BK": tile.k,
    }  # fmt: skip
    aligned = {name: True for name in pointers} | {name: size % 16 == 0 for name, size in sizes.items()}
    if (k // 2) % 16:  # the view of the weight's scales starts behind its codes
        aligned["w_scale_ptr"] = False
    types_ = pointers | dict.fromkeys(sizes, "i32") | dict.fromkeys(constants, "constexpr")
    signature = {name: types_[name] for name in kernel.arg_names}
    attributes = {
        (kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name, yes in aligned.items() if yes
    }
    return triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": tile.warps, "num_stages": tile.stages},
    )


def _sass(cubin: bytes) -> str:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run(
            [tools / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True
        ).stdout


def main(arch: int) -> None:
    load_source()
    tile_of = importlib.import_module(f"{NAME}._blackwell").tile_of
    kernel = importlib.import_module(f"{NAME}._blackwell_kernels").gemm_kernel
    found = []
    tiles = sorted({tile_of(m, arch // 10) for m in TOKENS})
    for tile in tiles:
        for format in ("nvfp4", "mxfp4"):
            # Strides change how scales are read: each of them with the largest tile, which has the fewest registers to spare.
            for k in FEATURES_IN if tile == tiles[-1] else FEATURES_IN[:1]:
                compiled = _compile(kernel, tile, arch, 0 if format == "nvfp4" else 1, k)
                ptx, sass = compiled.asm["ptx"], _sass(compiled.asm["cubin"])
                found.append(
                    {
                        "case": f"{format} k={k} tile={tuple(tile)}",
                        "format": format,
                        "tokens": tile.tokens,
                        "ptx": sorted(set(re.findall(r"\b(?:tcgen05\.mma|mma\.sync|wgmma)\S*\.\S+", ptx))),
                        "sass": sorted(set(re.findall(r"\b(?:UTC\w*MMA|\wMMA|WARPGROUP)[.\w]*", sass))),
                        "copies": bool(re.search(r"\bcp\.async\.c[ag]\b", ptx)),
                        "spills": bool(re.search(r"\b(?:STL|LDL)\b", sass)),
                        "shared": compiled.metadata.shared,
                    }
                )
    sys.stdout.write(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(int(sys.argv[1]))
