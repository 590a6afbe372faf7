"""Builds the Hub variant directories without Nix: nvcc, g++ and a torch wheel's headers are enough.

    python tools/build.py                       # build/torch-stable-abi211-{cu130,cpu}-x86_64-linux and build/torch-cuda
    python tools/build.py --variant cpu         # the CPU variant only; needs g++
    python tools/build.py --variant noarch      # the Triton variant only; needs no compiler
    python tools/build.py --variant available   # the compiled variants only where their tools are found; for test machines

The official kernel-builder takes the same source tree (build.toml). Nothing built here is run here.
"""

from __future__ import annotations

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
from dataclasses import dataclass
from pathlib import Path

if sys.version_info < (3, 11):
    raise SystemExit("build.py: needs Python 3.11 or newer to read build.toml; run make PYTHON=python3.11")
import tomllib

ROOT = Path(__file__).resolve().parent.parent
STABLE_ABI = (2, 11)
CUDA_MAJOR = 13
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


class Unavailable(Exception):
    """Something that compiling needs is not there; the message says what to do."""


@dataclass(frozen=True)
class Toolchain:
    compiler: str  # nvcc or g++
    cuda: tuple[int, int] | None  # None: for the CPU
    headers: Path  # torch's

    @property
    def backend(self) -> str:
        return "cpu" if self.cuda is None else "cuda"

    @property
    def target(self) -> str:
        """The loader's name of what is compiled for."""
        return "cpu" if self.cuda is None else "cu" + "".join(map(str, self.cuda))


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


def read_config() -> dict:
    return tomllib.loads((ROOT / "build.toml").read_text())


def package_of(config: dict) -> str:
    return config["general"]["name"].replace("-", "_")


def python_sources(package: str) -> list[Path]:
    return sorted((ROOT / "torch-ext" / package).glob("*.py"))


def kernels_of(config: dict, backend: str) -> dict[str, dict]:
    return {name: kernel for name, kernel in config["kernel"].items() if kernel["backend"] == backend}


def ops_name(config: dict, variant: str) -> str:
    """The name space of the ops, which is also the variant's id: its end changes with every source file.

    variant: "cuda" or "cpu" for what is compiled for that, "noarch" for what has no compiled part.
    """
    package = package_of(config)
    sources = python_sources(package)
    if variant == "noarch":
        return f"_{package}_cuda_noarch_{source_digest(sources)}"
    sources += [ROOT / s for k in kernels_of(config, variant).values() for s in k["src"]]
    sources += [ROOT / s for s in config["torch"]["src"]]
    return f"_{package}_{variant}_{source_digest(sources)}"


def choose_archs(config: dict, requested: str) -> list[str]:
    """The compute capabilities to compile for: some of those that build.toml lists, or "all" of them."""
    known = sorted({a for k in kernels_of(config, "cuda").values() for a in k["cuda-capabilities"]})
    archs = known if requested == "all" else [a.strip() for a in requested.split(",") if a.strip()]
    unknown = [a for a in archs if a not in known]
    if unknown or not archs:
        raise SystemExit(
            f"build.py: archs must be of {', '.join(known)} or 'all', got {', '.join(unknown) or 'none'}; the CUDA sources"
            " use instructions of that GPU alone, every other one runs the Triton files that each variant carries"
        )
    return archs


def find_nvcc() -> str | None:
    cuda_home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc") or shutil.which(str(Path(cuda_home) / "bin" / "nvcc"))


def cuda_version(nvcc: str) -> tuple[int, int]:
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    major, minor = re.search(r"release (\d+)\.(\d+)", text).groups()
    return int(major), int(minor)


def torch_headers() -> Path:
    wanted = ".".join(map(str, STABLE_ABI))
    try:
        import torch
    except ImportError:
        raise Unavailable(
            f"PyTorch is not installed for {sys.executable}, and its headers are needed; pip install 'torch>={wanted}'"
            " (a CPU build will do)"
        ) from None
    if tuple(map(int, torch.__version__.split(".")[:2])) < STABLE_ABI:
        raise Unavailable(
            f"PyTorch must be {wanted} or newer, {torch.__version__} is installed; pip install 'torch>={wanted}'"
        )
    headers = Path(torch.__file__).parent / "include"
    if not (headers / "torch/csrc/stable/library.h").is_file():
        raise Unavailable(
            f"PyTorch {torch.__version__} has no headers in {headers}; install one of PyTorch's own wheels"
        )
    return headers


def find_cuda_toolchain(nvcc: str | None) -> Toolchain:
    """Raises Unavailable, with the reason, where the CUDA variant cannot be built."""
    found = find_nvcc() if nvcc is None else shutil.which(nvcc)
    if found is None:
        raise Unavailable(
            f"{nvcc or 'nvcc'} was not found; install the CUDA {CUDA_MAJOR} toolkit, name its compiler with NVCC=..., or"
            " build the Triton variant alone with make noarch"
        )
    cuda = cuda_version(found)
    if cuda[0] != CUDA_MAJOR:
        raise Unavailable(
            f"{found} is of CUDA {cuda[0]}.{cuda[1]}, these sources are for CUDA {CUDA_MAJOR}; name another with NVCC=..."
        )
    find_host_toolchain()
    return Toolchain(found, cuda, torch_headers())


def find_host_toolchain() -> Toolchain:
    """Raises Unavailable, with the reason, where the CPU variant cannot be built."""
    if shutil.which("g++") is None:
        raise Unavailable("g++ was not found; install it (Debian, Ubuntu: the package g++)")
    python = Path(sysconfig.get_paths()["include"])
    if not (python / "Python.h").is_file():
        raise Unavailable(
            f"Python.h is not in {python}; install Python's headers (Debian, Ubuntu: python3-dev)"
        )
    return Toolchain("g++", None, torch_headers())


def torch_libraries(scratch: Path, tools: Toolchain) -> list[str]:
    """Empty stand-ins with torch's library names, to be named as needed. Python loads torch's libraries privately, so
    an extension finds their symbols only through such a name; and the build machine's torch may have no CUDA."""
    paths = []
    for name in ("libtorch_cpu.so", "libtorch_cuda.so")[: 1 if tools.cuda is None else 2]:
        run(["g++", "-shared", f"-Wl,-soname,{name}", "-o", str(scratch / name), "-x", "c++", "/dev/null"])
        paths.append(str(scratch / name))
    if tools.cuda is None:
        return ["-Wl,--no-as-needed", *paths]
    return ["-Xlinker", ",".join(["--no-as-needed", *paths])]


def sources_to_compile(config: dict, tools: Toolchain, archs: list[str]) -> dict[Path, list[str]]:
    """Every source file with the compiler flags that only it gets."""
    flags = {ROOT / s: [] for s in config["torch"]["src"] if s.endswith(".cpp")}
    flags[ROOT / "tools" / "manylinux.cpp"] = []
    for name, kernel in kernels_of(config, tools.backend).items():
        own = kernel.get("cxx-flags", [])
        if tools.cuda is not None:
            numbers = [a.replace(".", "") for a in archs if a in kernel["cuda-capabilities"]]
            if not numbers:
                raise SystemExit(
                    f"build.py: none of the archs {', '.join(archs)} is one of [kernel.{name}] in build.toml"
                )
            own = ["-Xptxas=-v", "--expt-relaxed-constexpr"]
            own += [f"-gencode=arch=compute_{n},code=sm_{n}" for n in numbers]
        flags.update({ROOT / s: own for s in kernel["src"] if s.endswith((".cu", ".cpp"))})
    return flags


def compile_extension(
    config: dict, ops_name: str, tools: Toolchain, archs: list[str], sanitize: str | None, out: Path
) -> None:
    target = (STABLE_ABI[0] << 56) | (STABLE_ABI[1] << 48)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        (scratch / "registration.h").write_text(REGISTRATION)
        host = ["-fPIC", "-fvisibility=hidden", "-fno-gnu-unique"]
        if tools.cuda is None:
            common = [*host, "-DCPU_KERNEL", "-Wall", "-Wno-psabi"]
        else:
            common = [f"-Xcompiler={','.join(host)}", "-DUSE_CUDA", "-DCUDA_KERNEL"]
        # A sanitizer's runtime belongs to the process: preload it. Its checks in code that -O3 unrolls take minutes to compile.
        sanitizer = [f"-fsanitize={sanitize}", "-fno-sanitize-recover=all", "-O1", "-g1"] if sanitize else []
        common += ["-O3", "-std=c++17"]
        common += [f"-I{path}" for path in (scratch, tools.headers, sysconfig.get_paths()["include"])]
        common += [f"-DTORCH_EXTENSION_NAME={ops_name}"]
        common += [f"-DTORCH_TARGET_VERSION=0x{target:016x}ULL", "-DPy_LIMITED_API=0x03090000"]

        def compile_one(item: tuple[Path, list[str]]) -> str:
            source, flags = item
            compiled = str(scratch / (source.name + ".o"))
            run([tools.compiler, *common, *flags, *sanitizer, "-c", str(source), "-o", compiled])
            return compiled

        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, sources_to_compile(config, tools, archs).items()))
        libraries = torch_libraries(scratch, tools)
        library = str(out / f"{ops_name}.abi3.so")
        # Linking adds a cubin of its own, an empty one, for a GPU that must be named too.
        gpu = [f"-arch=sm_{archs[0].replace('.', '')}", "-cudart", "shared"] if tools.cuda else []
        run([tools.compiler, *gpu, *sanitizer, "-shared", *objects, *libraries, "-o", library])


def write_variant(config: dict, ops_name: str, backend: dict, ops_source: str, out: Path) -> None:
    general = config["general"]
    package = package_of(config)
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
        "backend": backend,
        "digest": {"algorithm": "sha256", "files": digest},
    }
    (out / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")


def build(
    config: dict, archs: list[str], tools: Toolchain | None, destination: Path, sanitize: str | None = None
) -> Path:
    """Writes a compiled variant, or without tools the one that has no compiled part; returns its directory."""
    name = "torch-cuda"
    if tools is not None:
        abi = "".join(map(str, STABLE_ABI))
        name = f"torch-stable-abi{abi}-{tools.target}-{platform.machine()}-linux"
    ops = ops_name(config, "noarch" if tools is None else tools.backend)
    destination.mkdir(parents=True, exist_ok=True)
    # Next to where it goes, so that what is there stays until the new one is whole.
    with tempfile.TemporaryDirectory(dir=destination, prefix=".") as scratch:
        out = Path(scratch) / name
        out.mkdir()
        if tools is None:
            write_variant(config, ops, {"type": "cuda"}, OPS_NOARCH, out)
        else:
            compile_extension(config, ops, tools, archs, sanitize, out)
            backend = {"type": "cpu"} if tools.cuda is None else {"type": "cuda", "archs": archs}
            write_variant(config, ops, backend, OPS_COMPILED, out)
        shutil.rmtree(destination / name, ignore_errors=True)
        return out.rename(destination / name)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--variant",
        choices=["compiled", "cuda", "cpu", "noarch", "all", "available"],
        default="all",
        help="compiled: cuda and cpu; available: all whose tools are found",
    )
    parser.add_argument(
        "--archs",
        default="9.0a",
        help="compute capabilities of the CUDA variant, separated by commas: of those in build.toml, or 'all'",
    )
    parser.add_argument("--nvcc", help="the CUDA compiler; default: nvcc of PATH, then of CUDA_HOME")
    parser.add_argument("--sanitize", help="of the CPU variant: what g++ is told, such as address,undefined")
    parser.add_argument("--destination", type=Path, default=ROOT / "build")
    args = parser.parse_args()
    config = read_config()
    archs = choose_archs(config, args.archs)
    find = {"cuda": lambda: find_cuda_toolchain(args.nvcc), "cpu": find_host_toolchain}
    built = []
    for backend in find if args.variant in ("compiled", "all", "available") else [args.variant]:
        try:
            tools = None if backend == "noarch" else find[backend]()
            sanitize = args.sanitize if backend == "cpu" else None
            built.append(build(config, archs, tools, args.destination, sanitize))
        except Unavailable as reason:
            if args.variant != "available":
                raise SystemExit(f"build.py: {reason}") from None
            sys.stdout.write(f"{backend} not compiled: {reason}\n")
    if args.variant in ("all", "available"):
        built.append(build(config, archs, None, args.destination))
    for path in built:
        sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    main()
