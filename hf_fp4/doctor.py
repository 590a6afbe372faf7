"""What runs FP4 linears on this machine, why nothing better does, and whether its results are right."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import warnings
from dataclasses import dataclass
from importlib import metadata

import torch

from .backends import BACKENDS, DEVICE_BACKENDS, Kernels, KernelSource, device_context, select
from .formats import FP4Format
from .gptq import round_weight
from .layers.linear import FP4Linear
from .rotation import rotate
from .scales import ACTIVATION_SCALE_RULES, input_global_scale, weight_global_scale, weight_scales
from .version import __version__

_TOKENS, _OUT_FEATURES, _IN_FEATURES, _HADAMARD = 48, 256, 512, 32

_LIMIT = 1e-2
"""Relative error that a right result may have: bfloat16 rounds by up to 4e-3, twice if a rotated input is rounded too."""

_TRUST = "pass --trust-kernel-repo, in Python MRGPTQConfig(trust_kernel_repo=True), if you trust {repo}"
_LOCAL_COPY = "set LOCAL_KERNELS={repo}=DIRECTORY of a copy that was downloaded elsewhere"
_NO_NETWORK = "offline mode|OfflineMode|LocalEntryNotFound|local snapshot|Connect(ion)?Error|(Connect|Read)Timeout|Name or service"
_ADVICE = {
    "No module named '?kernels": "pip install kernels",
    "No module named '?triton": "pip install triton",
    "(?:with|install with): (pip install .*)": "{0}",
    "Invalid LOCAL_KERNELS": "set LOCAL_KERNELS={repo}=DIRECTORY, the directory of a kernel package",
    "not from a trusted publisher": f"{_TRUST}; its code runs on this machine",
    "could not verify publisher trust": f"{_TRUST}; without a network, {_LOCAL_COPY}",
    _NO_NETWORK: f"connect to the Hub once, without HF_HUB_OFFLINE, and the kernels are kept; or {_LOCAL_COPY}",
    "build variant for this system": "the package has no build for this PyTorch, CUDA and system: upgrade PyTorch, or "
    "build the package and set LOCAL_KERNELS={repo}=DIRECTORY; if that is set already, check the directory",
    "Version .* not found": "choose one of these versions with --kernel-version",
    "RepositoryNotFound|40[14] |Invalid username": "check --kernel-repo; for a private repository: hf auth login",
    "needs compute capability 9.0 and .* has 9.0": "upgrade PyTorch to a version that the package is compiled for",
    "needs compute capability 9.0 and|needs FP4 tensor cores": "",
    "CUDA error|CUDA driver|NVML": "nvidia-smi must list the GPU without an error; restart what uses it, or the machine",
    "needs compute capability": "nothing with this GPU, the kernels need a newer one",
}
"""What a reason looks like -> what to do about it, "" for nothing; the first that matches counts."""

_OTHER_ADVICE = (
    "check that {repo} is a kernel package (--kernel-repo), or set LOCAL_KERNELS={repo}=DIRECTORY of a copy"
)


@dataclass(frozen=True)
class Check:
    """One linear on one device, against the reference backend in float32 on the CPU.

    error: relative (Frobenius norm), infinite if a value is not finite; problem: what kept it from running.
    """

    name: str
    backend: str = ""
    error: float = float("inf")
    problem: str = ""

    @property
    def ok(self) -> bool:
        """Whether it ran and the result is right."""
        return not self.problem and self.error <= _LIMIT

    def __str__(self) -> str:
        what = self.problem or f"relative error {self.error:.2g} (at most {_LIMIT:g}) on {self.backend}"
        return f"{self.name:24}  {'OK' if self.ok else 'FAILED':6}  {what}"


def examine(source: KernelSource) -> bool:
    """Print what this machine has, which backend each GPU (or the CPU) takes and why, and check that it is right.

    Args:
        source: where GPU kernels come from.

    Returns:
        Whether every check passed. A GPU that is not used, or kernels that cannot be loaded, are reported, not a failure.
    """
    _print("Versions")
    for name, version in versions().items():
        _print(f"  {name:13} {version}")
    gpus, why_none = find_gpus()
    _print("\nDevices")
    for device in gpus:
        _print(f"  {device}: {describe_device(device)}")
    if not gpus:
        _print(f"  no GPU: {why_none}")
        _print(f"  cpu: {describe_device(torch.device('cpu'))}")
    checks = [check for device in gpus or [torch.device("cpu")] for check in _examine(source, device)]
    failed = sum(not check.ok for check in checks)
    _print(f"\n{failed} of {len(checks)} checks FAILED" if failed else f"\nall {len(checks)} checks OK")
    return not failed


def _print(line: str) -> None:
    print(line, flush=True)  # loading and compiling kernels takes a while: what is known is shown before it


def _examine(source: KernelSource, device: torch.device) -> list[Check]:
    _print(f"\nBackends on {device}, kernels of {source}")
    found = _select(source, device)
    for name, verdict in explain(found, device).items():
        _print(f"  {name:10} {verdict}")
    advice = [advise(reason, source) for reason in found.turned_down.values()]
    if device.type != "cuda":
        advice.append(_advise_on_gpu())
    for text in dict.fromkeys(filter(None, advice)):
        _print(f"  what to do: {text}")
    if found.module is not None and hasattr(found.module, "__file__"):
        _print(f"  loaded from {found.module.__file__}")
    _print(f"\nChecks on {device}, {_OUT_FEATURES} x {_IN_FEATURES} weight, 1 and {_TOKENS} tokens, bfloat16")
    checks = []
    for fmt in FP4Format:
        for quantizes in (True, False):
            checks.append(check_linear(source, device, fmt, quantizes))
            _print(f"  {checks[-1]}")
    return checks


def _select(source: KernelSource, device: torch.device) -> Kernels:
    try:
        return select(source, device)
    except Exception as error:  # noqa: BLE001 - a driver may fail in any way, and this is the report about it
        reason = _describe(error)
        return Kernels("reference", turned_down=dict.fromkeys(DEVICE_BACKENDS.get(device.type, ()), reason))


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(": ")


# --- the machine


def versions() -> dict[str, str]:
    """Name -> version of what decides over speed and results; "not installed" where it is missing."""
    rocm = f"none, but ROCm {torch.version.hip}" if torch.version.hip else "none"
    return {
        "hf-fp4": __version__,
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "CUDA": torch.version.cuda or rocm,
        "triton": _version_of("triton", "pytorch-triton", "triton-windows"),
        "transformers": _version_of("transformers"),
        "kernels": _version_of("kernels"),
    }


def _version_of(*distributions: str) -> str:
    for name in distributions:
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    return "not installed"


def find_gpus() -> tuple[list[torch.device], str]:
    """The visible GPUs; where there are none, the reason."""
    with warnings.catch_warnings(record=True) as caught:  # a driver that is too old is a warning
        warnings.simplefilter("always")
        try:
            if torch.cuda.is_available():
                return [torch.device("cuda", i) for i in range(torch.cuda.device_count())], ""
        except Exception as error:  # noqa: BLE001 - whatever is wrong with the driver is the reason
            return [], _describe(error)
    if torch.version.cuda is None and torch.version.hip is None:
        return [], f"PyTorch {torch.__version__} is built without CUDA"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and not re.match(r"\s*(\d|GPU|MIG)", hidden):
        return [], f"CUDA_VISIBLE_DEVICES={hidden!r} hides every GPU"
    return [], " ".join(str(caught[0].message).split()) if caught else "PyTorch finds none"


def _advise_on_gpu() -> str:
    _, reason = find_gpus()
    if "built without CUDA" in reason:
        return "if this machine has an NVIDIA GPU, install PyTorch with CUDA, see https://pytorch.org/get-started"
    if "CUDA_VISIBLE_DEVICES" in reason:
        return "unset CUDA_VISIBLE_DEVICES"
    return "if this machine has an NVIDIA GPU, `nvidia-smi` must list it; then update its driver or reinstall PyTorch"


def describe_device(device: torch.device) -> str:
    """Name, compute capability and memory of a GPU; threads of a CPU."""
    if device.type != "cuda":
        return f"{platform.machine()} {device.type}, {torch.get_num_threads()} of {os.cpu_count()} cores used"
    try:
        properties = torch.cuda.get_device_properties(device)
        capability = f"{properties.major}.{properties.minor}"
        return f"{properties.name}, compute capability {capability}, {properties.total_memory / 1e9:.1f} GB"
    except Exception as error:  # noqa: BLE001 - as in `find_gpus`
        return f"cannot be queried ({_describe(error)})"


# --- the choice


def explain(found: Kernels, device: torch.device) -> dict[str, str]:
    """For each of `BACKENDS`, whether it is taken on ``device``, and why not."""
    verdicts = {}
    for name in BACKENDS:
        if name == found.backend:
            verdicts[name] = "taken"
        elif name in found.turned_down:
            verdicts[name] = f"no: {' '.join(found.turned_down[name].split())}"
        elif name in DEVICE_BACKENDS["cuda"] and device.type != "cuda":
            verdicts[name] = "no: it runs on NVIDIA GPUs"
        elif name in DEVICE_BACKENDS["cpu"] and device.type != "cpu":
            verdicts[name] = "no: it runs on a CPU"
        elif BACKENDS.index(name) > BACKENDS.index(found.backend):
            verdicts[name] = f"not needed: {found.backend} is faster"
        else:
            verdicts[name] = "no"
    return verdicts


def advise(reason: str, source: KernelSource) -> str:
    """What a person can do about the reason for which a backend was turned down; "" for nothing."""
    text = " ".join(reason.split())
    for pattern, advice in _ADVICE.items():
        if match := re.search(pattern, text):
            return advice.format(*match.groups(), repo=source.repo)
    return _OTHER_ADVICE.format(repo=source.repo)


# --- the checks


def check_linear(source: KernelSource, device: torch.device, fmt: FP4Format, quantizes: bool) -> Check:
    """Run a random linear on ``device``, W4A4 with a rotation if it ``quantizes`` its input, else W4A16, and compare."""
    name = f"{fmt.value} " + (f"W4A4, Hadamard {_HADAMARD}" if quantizes else "W4A16")
    try:
        with torch.no_grad():
            layer, x = _problem(fmt, quantizes)
            expected = layer(x.float())
            with device_context(device):
                layer.to(device)
                layer.use_kernels(source)
                results = [layer(part.to(device)).to("cpu") for part in (x[:1], x)]
        errors = [_relative_error(y, expected[: len(y)]) for y in results]
        return Check(name, layer.kernels.backend, max(errors))
    except Exception as error:  # noqa: BLE001 - compilers, drivers and memory fail in many ways; each is a failed check
        reason = _describe(error)
        return Check(name, problem=f"{reason}; {advise(reason, source)}" if "No module" in reason else reason)


def _problem(fmt: FP4Format, quantizes: bool) -> tuple[FP4Linear, torch.Tensor]:
    """A random layer on the CPU, and bfloat16 tokens for it; never zeros, which every wrong kernel gets right."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    size = _HADAMARD if quantizes else None
    x = random(_TOKENS, _IN_FEATURES).to(torch.bfloat16)
    # So that the product is about as large as the bias, and neither hides the other.
    weight = rotate(random(_OUT_FEATURES, _IN_FEATURES) * _IN_FEATURES**-0.5, size)
    bias = random(_OUT_FEATURES).to(torch.bfloat16)
    weight_divisor = weight_global_scale(weight.abs().amax().view(1)) if fmt.has_global_scale else None
    static = fmt.has_global_scale and quantizes
    input_divisor = input_global_scale(rotate(x, size).abs().amax().view(1)) if static else None
    layer = FP4Linear(
        _IN_FEATURES,
        _OUT_FEATURES,
        fmt,
        bias=True,
        hadamard_size=size,
        activation_scale_rule=ACTIVATION_SCALE_RULES[fmt][-1] if quantizes else None,
        static_input_scale=static,
    )
    scales = weight_scales(weight, fmt, "mse", weight_divisor)
    layer.set_weight(round_weight(weight, scales, fmt, weight_divisor), bias, input_divisor)
    return layer, x


def _relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    if not bool(torch.isfinite(actual).all()):
        return float("inf")
    return float((actual.double() - expected.double()).norm() / expected.double().norm())
