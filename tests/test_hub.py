"""Which kernels are loaded, and what is said when they cannot be."""

import subprocess
import sys
import types

import kernels
import pytest
import torch

from hf_fp4 import MRGPTQConfig
from hf_fp4.backends import REFERENCE, KernelSource, describe, hub, select

pytestmark = pytest.mark.once

CUDA = torch.device("cuda", 0)
SOURCE = KernelSource("me/kernels", 3)


@pytest.fixture(autouse=True)
def one_gpu(monkeypatch):
    """A GPU that is only talked about."""
    for cached in (hub._select, hub._load):
        cached.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "GPU 80GB")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 9))
    yield
    for cached in (hub._select, hub._load):
        cached.cache_clear()


def package(backend):
    return types.SimpleNamespace(backend_of=lambda index: backend)


def test_other_devices_run_the_reference_and_load_nothing(monkeypatch):
    monkeypatch.setattr(kernels, "get_kernel", lambda *a, **k: pytest.fail("a kernel was loaded"))
    assert select(SOURCE, torch.device("mps")) is REFERENCE
    assert describe(REFERENCE, SOURCE) == "FP4 linears run on the reference backend"


def test_a_cpu_loads_the_cpu_build(monkeypatch):
    """Also where PyTorch is one for GPUs, whose build of the package the loader would choose by itself."""
    loaded = []

    def get_kernel(repo, **arguments):
        loaded.append(arguments["backend"])
        return package("cpu")

    monkeypatch.setattr(kernels, "get_kernel", get_kernel)
    found = select(SOURCE, torch.device("cpu"))
    assert found.backend == "cpu" and loaded == ["cpu"] and not found.turned_down
    assert describe(found, SOURCE) == "FP4 linears run on the cpu backend"
    assert found.take(torch.float32) and found.take(torch.bfloat16) and not found.take(torch.float64)
    assert not REFERENCE.take(torch.bfloat16) and not hub.Kernels("triton", found.module).take(torch.float32)


def test_a_cpu_without_kernels_runs_the_reference(monkeypatch):
    def fail(*args, **kwargs):
        raise FileNotFoundError("no build variant")

    monkeypatch.setattr(kernels, "get_kernel", fail)
    found = select(SOURCE, torch.device("cpu"))
    assert found.backend == "reference" and list(found.turned_down) == ["cpu"]
    assert "reference backend, kernels of me/kernels (version 3): cpu: " in describe(found, SOURCE)


@pytest.mark.parametrize("trust", [False, True])
def test_only_what_the_config_names_is_loaded(trust, monkeypatch):
    loaded = []

    def get_kernel(repo, **arguments):
        loaded.append((repo, arguments))
        return package("cuda")

    monkeypatch.setattr(kernels, "get_kernel", get_kernel)
    config = MRGPTQConfig(kernel_repo="me/kernels", kernel_version=3, trust_kernel_repo=trust)
    found = select(config.kernel_source, CUDA)
    assert found.backend == "cuda" and found.module is not None and set(found.turned_down) == {"blackwell"}
    assert select(config.kernel_source, CUDA) is found
    expected = {"version": 3, "backend": None, "trust_remote_code": trust, "check_arch": False}
    assert loaded == [("me/kernels", expected)], "loaded once, and as the config says"


def test_publishers_are_not_trusted_by_default():
    assert MRGPTQConfig().kernel_source == KernelSource("hf-fp4/hf-fp4-kernels", 1, trust=False)


def test_triton_is_taken_with_the_reason_why_cuda_is_not(monkeypatch):
    monkeypatch.setattr(kernels, "get_kernel", lambda *a, **k: package("triton"))
    found = select(SOURCE, CUDA)
    assert found.backend == "triton" and set(found.turned_down) == {"blackwell", "cuda"}
    text = describe(found, SOURCE)
    assert (
        "triton backend" in text
        and "compute capability 9.0 and the compiled build of the package, GPU 80GB has 8.9" in text
    )
    assert "FP4 tensor cores" in text


def test_a_gpu_that_was_lost_is_a_reason(monkeypatch):
    def fail(index):
        raise RuntimeError("device lost")

    monkeypatch.setattr(kernels, "get_kernel", lambda *a, **k: package("triton"))
    monkeypatch.setattr(torch.cuda, "get_device_name", fail)
    assert "device lost" in describe(select(SOURCE, CUDA), SOURCE)


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError("no build variant"),
        ValueError("not from a trusted publisher"),
        OSError("offline"),
        ImportError("x"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_kernels_that_cannot_be_loaded_are_a_reason(error, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(kernels, "get_kernel", fail)
    found = select(SOURCE, CUDA)
    assert found.backend == "reference" and found.module is None
    assert str(error) in describe(found, SOURCE) and "me/kernels (version 3)" in describe(found, SOURCE)


def test_a_gpu_that_is_too_old(monkeypatch):
    def backend_of(index):
        raise RuntimeError("needs compute capability 8.0")

    monkeypatch.setattr(kernels, "get_kernel", lambda *a, **k: types.SimpleNamespace(backend_of=backend_of))
    assert "needs compute capability 8.0" in describe(select(SOURCE, CUDA), SOURCE)


def test_importing_the_package_imports_no_kernels():
    code = "import sys, hf_fp4; print('kernels' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
