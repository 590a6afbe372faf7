"""Loads a built variant the way the `kernels` package does, and poisons uninitialised memory."""

import functools
import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(Path(__file__).resolve().parent))
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported, which nothing has done yet


def pytest_addoption(parser):
    parser.addoption(
        "--slow", action="store_true", help="without a GPU, run what takes long in Triton's interpreter"
    )


def pytest_collection_modifyitems(config, items):
    if torch.cuda.is_available() or config.getoption("--slow"):
        return
    for item in items:
        backend = getattr(item, "callspec", None) and item.callspec.params.get("kernels", "triton")
        if item.get_closest_marker("slow") and backend == "triton":
            item.add_marker(
                pytest.mark.skip(reason="takes long in Triton's interpreter; --slow runs it, and a GPU does")
            )


needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@functools.cache
def load_variant(path: Path):
    """Imports a variant directory under the module name its metadata gives it."""
    name = json.loads((path / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, path / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def variant_paths() -> dict[str, Path]:
    build = Path(os.environ.get("HF_FP4_KERNELS_BUILD", ROOT / "build"))
    found = {"triton": build / "torch-cuda"}
    for path in sorted(build.glob("torch-stable-abi*")):
        found["cpu" if "-cpu-" in path.name else "cuda"] = path
    return {k: v for k, v in found.items() if v.is_dir()}


def device_of(kernels) -> str:
    """Where a variant's kernels run."""
    return "cpu" if kernels._cpu.is_compiled() else "cuda"


@pytest.fixture(params=["cuda", "triton", "cpu"], scope="session")
def kernels(request):
    """The module under test, once per backend."""
    paths = variant_paths()
    if request.param != "cpu" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    if request.param not in paths:
        pytest.skip(f"no {request.param} variant built; run make in kernel_hub")
    if request.param == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the compiled variant is for compute capability 9.0")
    return load_variant(paths[request.param])


@pytest.fixture(autouse=True)
def poison():
    """torch.empty returns NaN (0xFF for bytes): what a kernel forgets to write shows."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
