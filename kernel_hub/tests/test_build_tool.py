"""tools/build.py says in one line what is missing and what to do; what needs no compiler is built."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from build_tool import PATH, build_tool


@pytest.fixture
def tool():
    return build_tool()


@pytest.fixture
def no_nvcc(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nothing"))


def fake_program(path, text=""):
    path.write_text(f"#!/bin/sh\necho '{text}'\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def tools_of(monkeypatch, tmp_path):
    """PATH with a g++ and an nvcc of the given release."""

    def make(release):
        fake_program(tmp_path / "g++")
        monkeypatch.setenv("PATH", str(tmp_path))
        return str(
            fake_program(tmp_path / "nvcc", f"Cuda compilation tools, release {release}, V{release}.1")
        )

    return make


def test_only_the_capabilities_of_build_toml(tool):
    config = tool.read_config()
    assert tool.choose_archs(config, "9.0a") == tool.choose_archs(config, "all") == ["9.0a"]
    for archs in ("10.0a", "9.0a,12.0a", "9.0", ""):
        with pytest.raises(SystemExit, match=r"archs must be of 9.0a or 'all', got .*Triton"):
            tool.choose_archs(config, archs)


def test_no_nvcc(tool, no_nvcc):
    with pytest.raises(
        tool.Unavailable, match="nvcc was not found; install the CUDA 13 toolkit.*make noarch"
    ):
        tool.find_cuda_toolchain(None)
    with pytest.raises(tool.Unavailable, match="/no/nvcc was not found"):
        tool.find_cuda_toolchain("/no/nvcc")


def test_other_cuda(tool, tools_of):
    nvcc = tools_of("12.8")
    with pytest.raises(
        tool.Unavailable, match="is of CUDA 12.8, these sources are for CUDA 13; name another"
    ):
        tool.find_cuda_toolchain(nvcc)


@pytest.mark.parametrize(
    ("torch", "message"),
    [
        (None, "PyTorch is not installed for .*pip install 'torch>=2.11'"),
        (SimpleNamespace(__version__="2.10.1+cu128", __file__="/x/torch/__init__.py"), "must be 2.11 or newer, 2.10.1"),
        (SimpleNamespace(__version__="2.13.0", __file__="/x/torch/__init__.py"), "has no headers in /x/torch/include"),
    ],
    ids=["missing", "too old", "no headers"],
)  # fmt: skip
def test_no_torch(tool, monkeypatch, torch, message):
    monkeypatch.setitem(sys.modules, "torch", torch)
    with pytest.raises(tool.Unavailable, match=message):
        tool.torch_headers()


def test_no_host_compiler(tool, tools_of, tmp_path):
    nvcc = tools_of("13.0")
    (tmp_path / "g++").unlink()
    with pytest.raises(tool.Unavailable, match=r"g\+\+ was not found"):
        tool.find_cuda_toolchain(nvcc)


def run_tool(*arguments):
    return subprocess.run(
        [sys.executable, PATH, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=dict(os.environ),
    )


def test_refusal_is_one_line(no_nvcc, tmp_path):
    result = run_tool("--variant", "compiled", "--destination", tmp_path / "build")
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.startswith("build.py: nvcc was not found") and result.stderr.count("\n") == 1


def test_what_is_available_is_built(no_nvcc, tmp_path):
    """And what was there is replaced as a whole."""
    old = tmp_path / "build" / "torch-cuda" / "old.py"
    old.parent.mkdir(parents=True)
    old.touch()
    result = run_tool("--variant", "available", "--destination", tmp_path / "build")
    assert result.returncode == 0, result.stderr
    assert "cuda not compiled: nvcc was not found" in result.stdout
    assert "cpu not compiled: g++ was not found" in result.stdout
    assert [p.name for p in (tmp_path / "build").iterdir()] == ["torch-cuda"] and not old.exists()
    metadata = json.loads((tmp_path / "build" / "torch-cuda" / "metadata.json").read_text())
    required = {"id", "name", "version", "license", "python-depends", "backend"}
    assert required <= set(metadata) and metadata["backend"] == {"type": "cuda"}
