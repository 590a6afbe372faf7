"""`hf-fp4 doctor` without a GPU, and on GPUs that are only pretended: what it says, and what it notices."""

from __future__ import annotations

import contextlib
import warnings
from types import SimpleNamespace

import kernels
import pytest
import torch
from torch import nn

from hf_fp4 import backends, cli, doctor, ops
from hf_fp4.backends import Kernels, KernelSource, hub
from hf_fp4.formats import FP4Format
from hf_fp4.layers import linear

pytestmark = pytest.mark.once

HOPPER = {"name": "NVIDIA H100 80GB HBM3", "major": 9, "minor": 0, "total_memory": 85_000_000_000}
AMPERE = {"name": "NVIDIA A100", "major": 8, "minor": 0, "total_memory": 42_000_000_000}
BLACKWELL = {"name": "NVIDIA B200", "major": 10, "minor": 0, "total_memory": 190_000_000_000}
CHECKS = ["nvfp4 W4A4, Hadamard 32", "nvfp4 W4A16", "mxfp4 W4A4, Hadamard 32", "mxfp4 W4A16"]


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("LOCAL_KERNELS", raising=False)
    hub._select.cache_clear()
    yield
    hub._select.cache_clear()


class FakeKernels:
    """A kernel package that computes with the reference, and `spoil`s the result."""

    __file__ = "somewhere/hf_fp4_kernels/__init__.py"

    def __init__(self, backend="cuda", spoil=lambda y: y):
        self._backend, self._spoil, self._divisors = backend, spoil, {}
        self.calls = []

    def backend_of(self, index):
        return self._backend

    def fp8_exact(self, weight, scale):
        return True

    def prepare_weight(self, weight, scale, divisor):
        prepared = weight.clone()
        self._divisors[prepared.data_ptr()] = divisor
        return prepared, scale

    def restore_weight(self, packed, row_scale, out_features, in_features):
        return packed, row_scale

    def linear(self, x, packed, row_scale, bias, *, activations, rule, hadamard, input_global_scale, fp8):
        fmt = "nvfp4" if row_scale.dtype == torch.float8_e4m3fn else "mxfp4"
        self.calls.append((fmt, activations, hadamard, tuple(x.shape), x.dtype))
        divisor = self._divisors[packed.data_ptr()]
        used = rule if activations == "fp4" else None
        y = ops.linear(x, packed, row_scale, divisor, input_global_scale, bias, fmt, used, hadamard or 0)
        return self._spoil(y)


@pytest.fixture
def pretend(monkeypatch):
    """``pretend(load, *gpus)``: these GPUs are there, ``load`` is called for the kernels, and their memory is the CPU's."""

    def pretend(load, *gpus):
        index = lambda device: device if isinstance(device, int) else device.index
        properties = lambda device: SimpleNamespace(**gpus[index(device)])
        cuda = {
            "is_available": lambda: True,
            "device_count": lambda: len(gpus),
            "get_device_properties": properties,
            "get_device_name": lambda device: properties(device).name,
            "get_device_capability": lambda device: (properties(device).major, properties(device).minor),
            "device": lambda device: contextlib.nullcontext(),
        }
        for name, function in cuda.items():
            monkeypatch.setattr(torch.cuda, name, function)
        monkeypatch.setattr(hub, "_load", lambda source, device_type: load(source))
        for owner in (nn.Module, torch.Tensor):
            monkeypatch.setattr(owner, "to", _ignoring_cuda(owner.to))
        monkeypatch.setattr(
            linear, "select", lambda source, device: hub.select(source, torch.device("cuda", 0))
        )

    return pretend


def _ignoring_cuda(move):
    def to(self, *args, **kwargs):
        if isinstance(args[0], torch.device) and args[0].type == "cuda":
            return self
        return move(self, *args, **kwargs)

    return to


def verdict(printed: str, backend: str) -> str:
    lines = printed.partition("\nBackends on ")[2].splitlines()
    return next(line for line in lines if line.startswith(f"  {backend} ")).split(maxsplit=1)[1]


# --- without a GPU


def test_cpu_runs_the_reference_and_is_checked(capsys):
    assert cli.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert torch.__version__ in printed and kernels.__version__ in printed
    assert "no GPU: " in printed
    assert verdict(printed, "reference") == "taken"
    for backend in ("blackwell", "cuda", "triton"):
        assert verdict(printed, backend) == "no: it runs on NVIDIA GPUs"
    assert verdict(printed, "cpu").startswith("no: ")
    assert printed.count("what to do: ") == 2, "for the CPU's kernels, and for a GPU"
    for name in CHECKS:
        line = next(line for line in printed.splitlines() if line.startswith(f"  {name} "))
        assert " OK " in line and "on reference" in line
    assert printed.endswith("all 4 checks OK\n")


def test_pytorch_without_cuda_is_the_reason(monkeypatch, capsys):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert cli.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert "is built without CUDA" in printed
    assert "install PyTorch with CUDA" in printed


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_hidden_gpus_are_the_reason(monkeypatch, capsys, hidden):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert cli.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert f"no GPU: CUDA_VISIBLE_DEVICES={hidden!r} hides every GPU" in printed
    assert "what to do: unset CUDA_VISIBLE_DEVICES" in printed


def test_a_driver_that_warns_is_the_reason(monkeypatch, capsys):
    def too_old():
        warnings.warn("The NVIDIA driver on your system\nis too old", stacklevel=2)
        return False

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(torch.cuda, "is_available", too_old)
    assert cli.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert "no GPU: The NVIDIA driver on your system is too old" in printed
    assert "nvidia-smi" in printed


def test_a_driver_that_fails_is_the_reason(monkeypatch, capsys):
    def broken():
        raise RuntimeError("CUDA driver initialization failed")

    monkeypatch.setattr(torch.cuda, "is_available", broken)
    assert cli.main(["doctor"]) == 0
    captured = capsys.readouterr()
    assert "no GPU: RuntimeError: CUDA driver initialization failed" in captured.out
    assert "Traceback" not in captured.out + captured.err


def test_a_missing_package_has_no_version(monkeypatch):
    def nothing(name):
        raise doctor.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.metadata, "version", nothing)
    monkeypatch.setattr(doctor, "__version__", "1.2.3")
    found = doctor.versions()
    assert found["kernels"] == found["triton"] == "not installed"
    assert found["hf-fp4"] == "1.2.3" and found["torch"] == torch.__version__


# --- which backend a GPU takes


def test_every_gpu_is_reported_and_checked(pretend, capsys):
    fake = FakeKernels()
    pretend(lambda source: fake, HOPPER, HOPPER)
    assert cli.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    for i in range(2):
        assert f"cuda:{i}: NVIDIA H100 80GB HBM3, compute capability 9.0, 85.0 GB" in printed
        assert f"Backends on cuda:{i}, kernels of hf-fp4/hf-fp4-kernels (version 1)" in printed
    assert verdict(printed, "cuda") == "taken"
    assert verdict(printed, "triton") == verdict(printed, "reference") == "not needed: cuda is faster"
    assert "needs FP4 tensor cores" in verdict(printed, "blackwell") and "has 9.0" in verdict(
        printed, "blackwell"
    )
    assert "what to do" not in printed
    assert printed.count(" on cuda\n") == 8 and "all 8 checks OK" in printed
    assert "somewhere/hf_fp4_kernels" in printed


def test_checks_reach_the_kernels(pretend):
    fake = FakeKernels()
    pretend(lambda source: fake, HOPPER)
    assert doctor.examine(KernelSource())
    expected = [
        (fmt, activations, hadamard, (tokens, 512), torch.bfloat16)
        for fmt in ("nvfp4", "mxfp4")
        for activations, hadamard in (("fp4", 32), ("bf16", None))
        for tokens in (1, 48)
    ]
    assert fake.calls == expected


def test_triton_where_the_cuda_kernels_are_for_another_gpu(pretend, capsys):
    pretend(lambda source: FakeKernels("triton"), AMPERE)
    assert cli.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert verdict(printed, "triton") == "taken"
    assert (
        "needs compute capability 9.0 and the compiled build of the package, NVIDIA A100 has 8.0"
        in verdict(printed, "cuda")
    )
    assert "what to do" not in printed, "that is the GPU's best"


def test_triton_where_the_cuda_kernels_would_run(pretend, capsys):
    pretend(lambda source: FakeKernels("triton"), HOPPER)
    assert cli.main(["doctor"]) == 0
    assert "what to do: upgrade PyTorch to a version" in capsys.readouterr().out


def test_blackwell_with_kernels_for_it(pretend, capsys):
    pretend(lambda source: FakeKernels("blackwell"), BLACKWELL)
    assert cli.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert verdict(printed, "blackwell") == "taken"
    assert verdict(printed, "triton") == "not needed: blackwell is faster"
    assert printed.count(" on blackwell\n") == 4


def test_blackwell_without_kernels_for_it(pretend, capsys):
    pretend(lambda source: FakeKernels("triton"), BLACKWELL)
    assert cli.main(["doctor"]) == 0
    assert "and kernels for them, NVIDIA B200 has 10.0" in verdict(capsys.readouterr().out, "blackwell")


def test_a_reason_for_blackwell_is_passed_on():
    found = Kernels("cuda", turned_down={"blackwell": "needs\n  CUDA 13"})
    verdicts = doctor.explain(found, torch.device("cuda", 0))
    assert verdicts["blackwell"] == "no: needs CUDA 13"
    assert list(verdicts) == list(doctor.BACKENDS)


def test_a_gpu_that_cannot_be_queried(pretend, monkeypatch, capsys):
    pretend(lambda source: FakeKernels("triton"), AMPERE)

    def lost(device):
        raise RuntimeError("CUDA error: device is lost")

    for name in ("get_device_properties", "get_device_capability", "get_device_name"):
        monkeypatch.setattr(torch.cuda, name, lost)
    cli.main(["doctor"])
    captured = capsys.readouterr()
    assert "cuda:0: cannot be queried (RuntimeError: CUDA error: device is lost)" in captured.out
    assert verdict(captured.out, "triton") == "no: RuntimeError: CUDA error: device is lost"
    assert "what to do: nvidia-smi must list the GPU" in captured.out
    assert "Traceback" not in captured.out + captured.err


# --- kernels that cannot be loaded


def _refuse(error):
    def load(source):
        raise error

    return load


def test_kernels_that_cannot_be_loaded(pretend, capsys):
    pretend(_refuse(ModuleNotFoundError("No module named 'kernels'")), HOPPER)
    assert cli.main(["doctor"]) == 0, "the reference is right, and it says why nothing better runs"
    printed = capsys.readouterr().out
    for backend in ("cuda", "triton"):
        assert verdict(printed, backend) == "no: ModuleNotFoundError: No module named 'kernels'"
    assert verdict(printed, "reference") == "taken"
    assert printed.count("what to do: ") == 1 and "what to do: pip install kernels\n" in printed
    assert printed.count(" on reference\n") == 4


def test_flags_choose_the_kernels(pretend):
    asked = []
    pretend(lambda source: asked.append(source) or FakeKernels(), HOPPER)
    command = ["doctor", "--kernel-repo", "you/yours", "--kernel-version", "7", "--trust-kernel-repo"]
    assert cli.main(command) == 0
    assert asked == [KernelSource("you/yours", 7, True)]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--kernel-repo", "kernels"], 'kernel_repo must be "owner/name"'),
        (["--kernel-version", "0"], "kernel_version must be a positive integer, got 0"),
    ],
)
def test_refuses_flags_that_cannot_be_right(capsys, flags, message):
    assert cli.main(["doctor", *flags]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("reason", "advice"),
    [
        ("ModuleNotFoundError: No module named 'triton'", "pip install triton"),
        ("ImportError: `x` requires `einops`. Please install with: pip install einops", "pip install einops"),
        ("requires kernels>=9. Upgrade with: pip install --upgrade kernels", "pip install --upgrade kernels"),
        ("ConnectError: [Errno -2] Name or service not known", "connect to the Hub once"),
        ("ValueError: Version 9 not found, available versions: 1, 2", "--kernel-version"),
        ("RepositoryNotFoundError: 404 Client Error. Repository Not Found", "hf auth login"),
        ("RuntimeError: hf_fp4_kernels needs compute capability 8.0 or newer", "need a newer one"),
        ("SyntaxError: something else", "check that a/b is a kernel package"),
    ],
)
def test_advice(reason, advice):
    assert advice in doctor.advise(reason, KernelSource("a/b"))


def real_reason(**kwargs) -> str:
    """What the kernels package says today when it does not load a kernel, which no test may fetch."""
    with pytest.raises(Exception) as caught:
        kernels.get_kernel("a/b", version=1, check_arch=False, **kwargs)
    return f"{caught.type.__name__}: {caught.value}"


def test_advice_on_what_kernels_says_offline():
    assert "connect to the Hub once" in doctor.advise(real_reason(), KernelSource("a/b"))
    assert "LOCAL_KERNELS=a/b=DIRECTORY" in doctor.advise(real_reason(), KernelSource("a/b"))


@pytest.mark.parametrize(
    ("local", "advice"),
    [
        ("somewhere", "set LOCAL_KERNELS=a/b=DIRECTORY, the directory of a kernel package"),
        ("a/b=nowhere", "if that is set already, check the directory"),
    ],
)
def test_advice_on_what_kernels_says_to_local_kernels(monkeypatch, local, advice):
    monkeypatch.setenv("LOCAL_KERNELS", local)
    assert advice in doctor.advise(real_reason(), KernelSource("a/b"))


@pytest.mark.parametrize("known", [True, False])
def test_advice_on_what_kernels_says_of_a_stranger(monkeypatch, known):
    def overview(publisher):
        if not known:
            raise OSError
        return SimpleNamespace(trustedKernelPublisher=False)

    from kernels import hf_hub

    monkeypatch.setattr(
        hf_hub, "_get_hf_api", lambda *a, **k: SimpleNamespace(get_organization_overview=overview)
    )
    with pytest.raises(ValueError, match="trust") as caught:
        hf_hub._check_trust_remote_code("a/b", local_files_only=False, trust_remote_code=False)
    advice = doctor.advise(f"ValueError: {caught.value}", KernelSource("a/b"))
    assert "--trust-kernel-repo" in advice and "if you trust a/b" in advice
    assert ("without a network" in advice) is not known


# --- results


def _spoil_one_token(y):
    return y * 1.05 if len(y) == 1 else y


@pytest.mark.parametrize(
    "spoil",
    [torch.zeros_like, lambda y: y * 1.02, lambda y: y.roll(1, -1), _spoil_one_token, lambda y: y / 0],
    ids=["zeros", "two percent", "shifted", "one token only", "infinite"],
)
def test_a_wrong_result_fails(pretend, capsys, spoil):
    pretend(lambda source: FakeKernels(spoil=spoil), HOPPER)
    assert cli.main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert printed.count("FAILED  relative error ") == 4
    assert "4 of 4 checks FAILED" in printed


def test_one_wrong_format_is_enough(pretend, capsys):
    fake = FakeKernels()
    fake._spoil = lambda y: y * 2 if fake.calls[-1][:2] == ("mxfp4", "bf16") else y
    pretend(lambda source: fake, HOPPER)
    assert cli.main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert "1 of 4 checks FAILED" in printed
    assert "FAILED" in next(line for line in printed.splitlines() if line.startswith("  mxfp4 W4A16 "))


def test_a_kernel_that_raises_fails(pretend, capsys):
    def spoil(y):
        raise RuntimeError("CUDA error:\nillegal memory access")

    pretend(lambda source: FakeKernels(spoil=spoil), HOPPER)
    assert cli.main(["doctor"]) == 1
    captured = capsys.readouterr()
    assert captured.out.count("FAILED  RuntimeError: CUDA error: illegal memory access") == 4
    assert "Traceback" not in captured.out + captured.err


def test_a_kernel_that_lacks_triton_says_what_to_do(pretend, capsys):
    def spoil(y):
        raise ModuleNotFoundError("No module named 'triton'")

    pretend(lambda source: FakeKernels(spoil=spoil), HOPPER)
    assert cli.main(["doctor"]) == 1
    assert "No module named 'triton'; pip install triton" in capsys.readouterr().out


def test_a_wrong_cpu_fails(monkeypatch, capsys):
    right = backends.reference.matmul

    def wrong_in_bfloat16(x, *args):
        y = right(x, *args)
        return y * 1.02 if x.dtype == torch.bfloat16 else y

    monkeypatch.setattr(backends.reference, "matmul", wrong_in_bfloat16)
    assert cli.main(["doctor"]) == 1
    assert "4 of 4 checks FAILED" in capsys.readouterr().out


@pytest.mark.parametrize("fmt", list(FP4Format))
@pytest.mark.parametrize("quantizes", [True, False])
@torch.no_grad()
def test_the_problem_shows_what_is_checked(fmt, quantizes):
    """A kernel that forgets the rotation, the bias or the quantization of its input gives something else."""
    layer, x = doctor._problem(fmt, quantizes)
    expected = layer(x.float())
    assert bool((x != 0).all()) and len(layer.weight_scale.view(torch.uint8).unique()) > 2
    changes = [("bias", None)]
    if quantizes:
        changes += [("hadamard_size", None), ("activation_scale_rule", None)]
    for name, value in changes:
        changed, _ = doctor._problem(fmt, quantizes)
        setattr(changed, name, value)
        assert doctor._relative_error(changed(x), expected) > 5 * doctor._LIMIT, name
