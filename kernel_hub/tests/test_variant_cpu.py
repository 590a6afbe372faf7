"""What can be checked of a built variant without a GPU: the loader's own validation, digests, loading it through the loader
and tracing every function, what the library needs, and facts about the SASS."""

import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from build_tool import build_tool
from conftest import variant_paths
from load_kernels import REPO

PATHS = variant_paths()


def path_of(variant):
    if variant not in PATHS:
        pytest.skip(f"no {variant} variant built; run make in kernel_hub, which says what is missing")
    return PATHS[variant]


@pytest.fixture(params=["cuda", "triton", "cpu"])
def variant(request):
    return path_of(request.param)


def library_of(kind):
    return next(path_of(kind).glob("*.abi3.so"))


@pytest.fixture(scope="module")
def library():
    return library_of("cuda")


def kind_of(variant):
    """As tools/build.py calls it."""
    return "noarch" if variant.name == "torch-cuda" else "cpu" if "-cpu-" in variant.name else "cuda"


def test_variant_was_built_from_these_sources(variant):
    tool = build_tool()
    found = json.loads((variant / "metadata.json").read_text())["id"]
    assert found == tool.ops_name(tool.read_config(), kind_of(variant)), (
        "the sources changed: run make in kernel_hub"
    )


def test_loader_takes_the_metadata(variant):
    pytest.importorskip("kernels", reason="needs kernels, the loader")
    from kernels._rust import Metadata
    from kernels.validate import default_metadata_validators

    metadata = Metadata.read_from_file(variant / "metadata.json")
    assert metadata.name.python_name == "hf_fp4_kernels" and metadata.version == 1
    for validator in default_metadata_validators():
        validator.validate_metadata(metadata=metadata, variant=variant.name)


@pytest.mark.parametrize(
    "torch_version, backend, preferred",
    [
        ("2.10", "cuda", "triton"),
        ("2.11", "cuda", "cuda"),
        ("2.13", "cuda", "cuda"),
        ("2.11", "cpu", "cpu"),
        ("2.13", "cpu", "cpu"),
    ],
)
def test_loader_prefers_the_compiled_variant(torch_version, backend, preferred):
    pytest.importorskip("kernels", reason="needs kernels, the loader")
    from kernels.backends import CPU, CUDA
    from kernels.variants import _resolve_variant_for_system, parse_variant
    from packaging.version import Version

    path_of("triton")
    path_of(preferred)
    if backend == "cuda":
        path_of("cuda")
    variants, _ = _resolve_variant_for_system(
        [parse_variant(p.name) for p in PATHS.values()], CPU() if backend == "cpu" else CUDA(Version("13.0")),
        platform.machine(), "linux", Version(torch_version), True, None,
    )  # fmt: skip
    assert variants[0].variant_str == PATHS[preferred].name


def test_digests_are_what_the_loader_computes(variant, tmp_path):
    pytest.importorskip("kernels", reason="needs kernels, the loader")
    from kernels._rust import Digest, DigestAlgorithm, DigestValidationError, Metadata

    copy = shutil.copytree(variant, tmp_path / variant.name, ignore=shutil.ignore_patterns("__pycache__"))
    stated = Metadata.read_from_file(copy / "metadata.json").digest
    stated.validate(Digest.hash_variant(DigestAlgorithm.SHA256, copy))
    with (copy / "_ops.py").open("a") as file:
        file.write("# changed\n")
    with pytest.raises(DigestValidationError):
        stated.validate(Digest.hash_variant(DigestAlgorithm.SHA256, copy))


def tool_or_skip(name):
    """A program of PATH, or of those that Triton brings along."""
    triton = importlib.util.find_spec("triton")
    places = [] if triton is None else [str(Path(triton.origin).parent / "backends" / "nvidia" / "bin")]
    path = os.pathsep.join([os.environ["PATH"], *places])
    if shutil.which(name, path=path) is None:
        pytest.skip(f"needs {name}")

    def run(*arguments):
        return subprocess.run(
            [shutil.which(name, path=path), *map(str, arguments)],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PATH": path},
        ).stdout

    return run


def stand_ins(library, directory):
    """Libraries with the CUDA functions that ``library`` needs. All but those that register its kernels end the process."""
    gxx, nm = tool_or_skip("g++"), tool_or_skip("nm")
    names = {"libcudart.so.13": set(), "libtorch_cuda.so": set()}
    for line in nm("-D", "--undefined-only", library).splitlines():
        symbol, _, version = line.split()[-1].partition("@")
        if "cuda" in symbol and (version or not symbol.startswith("aoti_torch_device_type")):
            names[version or "libtorch_cuda.so"].add(symbol)
    paths = []
    for name, symbols in names.items():
        bodies = {
            s: "return 0;" if s.startswith("__cuda") and "egister" in s else "abort();" for s in symbols
        }
        source = directory / f"{name}.cpp"
        source.write_text(
            "#include <stdlib.h>\n"
            + "".join(f'extern "C" void* {s}() {{ {b} }}\n' for s, b in bodies.items())
        )
        versions = directory / f"{name}.versions"
        versions.write_text(f"{name} {{ *; }};\n")
        flags = [f"-Wl,--version-script,{versions}"] if name.startswith("libcudart") else []
        gxx("-shared", "-fPIC", f"-Wl,-soname,{name}", *flags, "-o", directory / name, source)
        paths.append(directory / name)
    return paths


def load(variant, *libraries):
    """What load_kernels.py, in a process of its own, prints."""
    script = Path(__file__).with_name("load_kernels.py")
    result = subprocess.run(
        [sys.executable, script, *libraries],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "LOCAL_KERNELS": f"{REPO}={variant}", "HF_HUB_OFFLINE": "1"},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout)


@pytest.mark.parametrize("kind", ["cuda", "triton", "cpu"])
def test_loads_without_cuda_and_traces(kind, tmp_path):
    """get_kernel imports it, which starts nothing on a GPU; the ops' schemas and fakes take what the functions pass."""
    pytest.importorskip("kernels", reason="needs kernels, the loader")
    path = path_of(kind)
    without_cuda = kind == "cuda" and torch.version.cuda is None
    libraries = stand_ins(next(path.glob("*.abi3.so")), tmp_path) if without_cuda else []
    found = load(path, *libraries)
    assert Path(found["file"]) == path / "__init__.py"
    assert found["backends"] == {
        "8.0": "triton",
        "9.0": "cuda" if kind == "cuda" else "triton",
        "10.0": "blackwell",
    }


@pytest.mark.parametrize(("kind", "device"), [("triton", "cuda"), ("cpu", "cpu")])
def test_hf_fp4_loads_what_local_kernels_names(kind, device, monkeypatch):
    hub = pytest.importorskip("hf_fp4.backends.hub", reason="needs hf_fp4")
    path = path_of(kind)
    monkeypatch.setenv("LOCAL_KERNELS", f"{REPO}={path}")
    hub._load.cache_clear()
    assert Path(hub._load(hub.KernelSource(), device).__file__) == path / "__init__.py"


def test_a_cpu_takes_its_variant_from_a_build(monkeypatch):
    """Out of the directory of all variants, as the loader finds them on the Hub."""
    hub = pytest.importorskip("hf_fp4.backends.hub", reason="needs hf_fp4")
    path = path_of("cpu")
    monkeypatch.setenv("LOCAL_KERNELS", f"{REPO}={path.parent}")
    for cached in (hub._select, hub._load):
        cached.cache_clear()
    found = hub.select(hub.KernelSource(), torch.device("cpu"))
    assert found.backend == "cpu" and Path(found.module.__file__) == path / "__init__.py", found.turned_down


def version_of(text):
    return tuple(map(int, text.split(".")))


@pytest.mark.parametrize(
    ("kind", "others"),
    [("cuda", {"libtorch_cpu.so", "libtorch_cuda.so", "libcudart.so.13"}), ("cpu", {"libtorch_cpu.so"})],
    ids=["cuda", "cpu"],
)
def test_library_needs_no_newer_system_than_manylinux_2_28(kind, others):
    """The limits of the kernel requirements, and no dependency but PyTorch's, CUDA's and the system's."""
    objdump, library = tool_or_skip("objdump"), library_of(kind)
    limits = {"GLIBC": "2.28", "GLIBCXX": "3.4.24", "CXXABI": "1.3.11", "GCC": "7.0.0"}
    needed = set(re.findall(r"\((GLIBC|GLIBCXX|CXXABI|GCC)_([\d.]+)\)", objdump("-T", library)))
    assert needed
    too_new = [f"{n}_{v}" for n, v in needed if version_of(v) > version_of(limits[n])]
    assert not too_new
    libraries = re.findall(r"NEEDED\s+(\S+)", objdump("-p", library))
    system = {"libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6", "ld-linux-x86-64.so.2"}
    assert set(libraries) - system == others


@pytest.fixture(scope="module")
def sass(library):
    return tool_or_skip("cuobjdump")("--dump-sass", library)


def test_library_is_for_the_gpus_of_the_metadata(library, sass):
    """And holds no PTX, which would be compiled for a newer GPU and fail there."""
    archs = json.loads((library.parent / "metadata.json").read_text())["backend"]["archs"]
    assert set(re.findall(r"^arch = (\S+)", sass, re.MULTILINE)) == {
        f"sm_{arch.replace('.', '')}" for arch in archs
    }
    assert ".ptx" not in tool_or_skip("cuobjdump")("--list-ptx", library)


def functions(sass: str) -> dict[str, str]:
    parts = re.split(r"Function : (\S+)", sass)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_tensor_core_instructions(sass):
    """Many tokens through HGMMA, or QGMMA for E4M3, a few through HMMA; tiles come by bulk copies, and nothing is spilled."""
    found = functions(sass)
    gemm = {name: body for name, body in found.items() if re.search("(gemm|experts)_w4_kernel", name)}
    few = {name: body for name, body in found.items() if "gemv_w4_kernel" in name}
    assert gemm and all(re.search("[HQ]GMMA", body) for body in gemm.values())
    assert few and all("HMMA" in body for body in few.values())
    e4m3 = [body for body in gemm.values() if "QGMMA" in body]
    assert len(e4m3) == 6 and all(re.search(r"QGMMA\.64x\d+x32\.F32\.E4M3\.E4M3", body) for body in e4m3)
    for name, body in {**gemm, **few}.items():
        assert "UBLKCP" in body, f"{name} does not copy in bulk"
        assert not re.search(r"\b(LDL|STL)\b", body), f"{name} uses local memory"
