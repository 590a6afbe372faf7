"""Builds the Hub variant directories without Nix: nvcc, g++ and a torch wheel's headers are enough.

    python tools/build.py                      # build/torch-stable-abi211-cu130-x86_64-linux (9.0a) and build/torch-cuda
    python tools/build.py --variant noarch     # the Triton variant only; needs no compiler

The official kernel-builder takes the same source tree (build.toml). Nothing built here is run here.
"""

import argparse
import base64
import concurrent.futures
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import tomllib

ROOT = Path(__file__).resolve().parent.parent
STABLE_ABI = (2, 11)
REGISTRATION = """#pragma once
#include <Python.h>
#define _CONCAT(A, B) A##B
#define CONCAT(A, B) _CONCAT(A, B)
#define _STRINGIFY(A) #A
#define STRINGIFY(A) _STRINGIFY(A)
#define STABLE_TORCH_LIBRARY_EXPAND(NAME, MODULE) STABLE_TORCH_LIBRARY(NAME, MODULE)
#define STABLE_TORCH_LIBRARY_IMPL_EXPAND(NAME, DEVICE, MODULE) STABLE_TORCH_LIBRARY_IMPL(NAME, DEVICE, MODULE)
#define REGISTER_EXTENSION(NAME) \\
  PyMODINIT_FUNC CONCAT(PyInit_, NAME)() { \\
    static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, STRINGIFY(NAME), nullptr, 0, nullptr}; \\
    return PyModule_Create(&module); \\
  }
"""
OPS_COMPILED = """import torch
from . import {ops}
ops = torch.ops.{ops}


def add_op_namespace_prefix(op_name: str):
    \"\"\"
    Prefix op by namespace.
    \"\"\"
    return f"{ops}::{{op_name}}"
"""
OPS_NOARCH = """import torch

ops = torch.ops.{ops}


def add_op_namespace_prefix(op_name: str):
    \"\"\"
    Prefix op by namespace.
    \"\"\"
    return f"{ops}::{{op_name}}"
"""


def run(command: list[str]) -> None:
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    if result.returncode != 0:
        raise SystemExit(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
    # Serialized wgmma or registers spilled to memory cost more than any tuning gains: show what ptxas says about them.
    for line in (result.stdout + result.stderr).splitlines():
        if "Potential Performance Loss" in line or re.search(r"[1-9]\d* bytes spill", line):
            sys.stderr.write(line + "\n")


def source_digest(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:7]


def python_sources(package: str) -> list[Path]:
    return sorted((ROOT / "torch-ext" / package).glob("*.py"))


def cuda_version(nvcc: str) -> str:
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    major, minor = re.search(r"release (\d+)\.(\d+)", text).groups()
    return f"cu{major}{minor}"


def torch_libraries(scratch: Path) -> list[str]:
    """Empty stand-ins with torch's library names, to be named as needed. Python loads torch's libraries privately, so
    an extension finds their symbols only through such a name; and the build machine's torch may have no CUDA."""
    paths = []
    for name in ("libtorch_cpu.so", "libtorch_cuda.so"):
        run(["g++", "-shared", f"-Wl,-soname,{name}", "-o", str(scratch / name), "-x", "c++", "/dev/null"])
        paths.append(str(scratch / name))
    return ["-Xlinker", ",".join(["--no-as-needed", *paths])]


def compile_extension(config: dict, ops_name: str, nvcc: str, archs: list[str], out: Path) -> None:
    import torch

    include = Path(torch.__file__).parent / "include"
    target = (STABLE_ABI[0] << 56) | (STABLE_ABI[1] << 48)
    sources = [ROOT / s for k in config["kernel"].values() for s in k["src"] if s.endswith(".cu")]
    sources += [ROOT / s for s in config["torch"]["src"] if s.endswith(".cpp")]
    gencode = [f"-gencode=arch=compute_{a.replace('.', '')},code=sm_{a.replace('.', '')}" for a in archs]
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "registration.h").write_text(REGISTRATION)
        common = [
            "-O3",
            "-std=c++17",
            "-Xcompiler=-fPIC,-fvisibility=hidden,-fno-gnu-unique",
            f"-I{scratch}",
            f"-I{include}",
        ]
        common += [
            f"-I{sysconfig.get_paths()['include']}",
            f"-DTORCH_EXTENSION_NAME={ops_name}",
            "-DUSE_CUDA",
        ]
        common += [
            f"-DTORCH_TARGET_VERSION=0x{target:016x}ULL",
            "-DCUDA_KERNEL",
            "-DPy_LIMITED_API=0x03090000",
        ]

        def compile_one(source: Path) -> str:
            obj = str(Path(scratch) / (source.name + ".o"))
            extra = ["-Xptxas=-v", "--expt-relaxed-constexpr", *gencode] if source.suffix == ".cu" else []
            run([nvcc, *common, *extra, "-c", str(source), "-o", obj])
            return obj

        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, sources))
        library = out / f"{ops_name}.abi3.so"
        run(
            [
                nvcc,
                "-shared",
                "-cudart",
                "shared",
                *objects,
                *torch_libraries(Path(scratch)),
                "-o",
                str(library),
            ]
        )


def write_variant(config: dict, ops_name: str, archs: list[str] | None, ops_source: str, out: Path) -> None:
    general = config["general"]
    package = general["name"].replace("-", "_")
    for source in python_sources(package):
        shutil.copy(source, out / source.name)
    (out / "_ops.py").write_text(ops_source.format(ops=ops_name))
    compat = out / package
    compat.mkdir()
    # Old loaders look for a package of the kernel's name inside the variant.
    (compat / "__init__.py").write_text(
        "import ctypes\nimport importlib.util\nimport sys\nfrom pathlib import Path\nfrom types import ModuleType\n\n\n"
        "def _import_from_path(file_path: Path) -> ModuleType:\n"
        '    path_hash = "{:x}".format(ctypes.c_size_t(hash(file_path.absolute())).value)\n'
        "    spec = importlib.util.spec_from_file_location(path_hash, file_path)\n"
        "    module = importlib.util.module_from_spec(spec)\n    sys.modules[path_hash] = module\n"
        "    spec.loader.exec_module(module)\n    return module\n\n\n"
        'globals().update(vars(_import_from_path(Path(__file__).parent.parent / "__init__.py")))\n'
    )
    files = sorted(p for p in out.rglob("*") if p.is_file())
    digest = {
        str(p.relative_to(out)): base64.b64encode(hashlib.sha256(p.read_bytes()).digest()).decode()
        for p in files
    }
    metadata = {
        "name": general["name"],
        "id": ops_name,
        "version": general["version"],
        "license": general["license"],
        "python-depends": [],
        "backend": {"type": "cuda", **({"archs": archs} if archs else {})},
        "digest": {"algorithm": "sha256", "files": digest},
    }
    (out / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")


def build(variant: str, config: dict, nvcc: str, archs: list[str], destination: Path) -> Path:
    package = config["general"]["name"].replace("-", "_")
    sources = python_sources(package)
    if variant == "noarch":
        name, ops_name = "torch-cuda", f"_{package}_cuda_noarch_{source_digest(sources)}"
    else:
        sources += [ROOT / s for k in config["kernel"].values() for s in k["src"]]
        sources += [ROOT / s for s in config["torch"]["src"]]
        abi = "".join(map(str, STABLE_ABI))
        name = f"torch-stable-abi{abi}-{cuda_version(nvcc)}-{platform.machine()}-linux"
        ops_name = f"_{package}_cuda_{source_digest(sources)}"
    out = destination / name
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    if variant == "noarch":
        write_variant(config, ops_name, None, OPS_NOARCH, out)
    else:
        compile_extension(config, ops_name, nvcc, archs, out)
        write_variant(config, ops_name, archs, OPS_COMPILED, out)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variant", choices=["compiled", "noarch", "all"], default="all")
    parser.add_argument(
        "--archs", default="9.0a", help="comma-separated compute capabilities of the compiled variant"
    )
    parser.add_argument("--nvcc", default=shutil.which("nvcc") or "nvcc")
    parser.add_argument("--destination", type=Path, default=ROOT / "build")
    args = parser.parse_args()
    config = tomllib.loads((ROOT / "build.toml").read_text())
    for variant in ("compiled", "noarch") if args.variant == "all" else (args.variant,):
        sys.stdout.write(f"{build(variant, config, args.nvcc, args.archs.split(','), args.destination)}\n")


if __name__ == "__main__":
    main()
