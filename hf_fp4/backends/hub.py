"""Kernels from the Hugging Face kernels hub: which repository, and whether a device can use it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch

from ..formats import FP4Format
from ..scales import fake_quantize_activations
from . import reference

BACKENDS = ("blackwell", "cuda", "triton", "cpu", "reference")
"""The best first. All but the last are the kernel package's, whose choice it is which one a GPU takes."""

DEVICE_BACKENDS = {"cuda": ("blackwell", "cuda", "triton"), "cpu": ("cpu",)}
"""Those of the kernel package that run on a type of device."""


@dataclass(frozen=True)
class KernelSource:
    """A repository of kernels, and the version of its API. With ``trust`` its publisher need not be known as trusted."""

    repo: str = "hf-fp4/hf-fp4-kernels"
    version: int = 1
    trust: bool = False

    def __str__(self) -> str:
        return f"{self.repo} (version {self.version})"


@dataclass(frozen=True)
class Kernels:
    """What `select` found: the functions of a loaded kernel package, or none, which means the reference backend.

    Attributes:
        backend: one of `BACKENDS`.
        module: the package, whose functions its own docstrings describe; None for the reference.
        turned_down: the reason for each better backend that cannot run, by its name.
    """

    backend: str
    module: ModuleType | None = field(default=None, compare=False)
    turned_down: dict[str, str] = field(default_factory=dict, compare=False)

    def take(self, dtype: torch.dtype) -> bool:
        """Whether the package's functions take inputs of ``dtype``; the reference takes what they do not."""
        fits = dtype in (torch.bfloat16, torch.float16) or (dtype == torch.float32 and self.backend == "cpu")
        return self.module is not None and fits

    @property
    def search_scales(self) -> Callable[..., torch.Tensor] | None:
        """The package's search of block scales; None without one."""
        return None if self.module is None else self.module.search_scales

    @property
    def add_moments(self) -> Callable[..., bool] | None:
        """The package's sums of products of tokens on a CPU; None without one."""
        return self.module.add_moments if self.module is not None and self.backend == "cpu" else None

    def product_dtype(self, dtype: torch.dtype, device: torch.device) -> torch.dtype:
        """In what a product of two large matrices of ``dtype`` takes least time; float32 adds up the same products."""
        return self.module.fast_dtype(device) if self.module and dtype == torch.bfloat16 else dtype

    def __deepcopy__(self, memo: dict[int, Any]) -> Kernels:
        return self  # a layer's copy runs the same code


REFERENCE = Kernels("reference")


def select(source: KernelSource, device: torch.device) -> Kernels:
    """The best backend for ``device``, with the reason for each better one that cannot run there.

    Loads the kernel package at its first use; nothing else is ever loaded. Does not raise: what went wrong is a reason.
    """
    if device.type not in DEVICE_BACKENDS:
        return REFERENCE
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return _select(source, device)


@functools.cache
def _select(source: KernelSource, device: torch.device) -> Kernels:
    try:
        module = _load(source, device.type)
        backend = module.backend_of(device)
        turned_down = _why_not_better(backend, device.index) if device.type == "cuda" else {}
    except Exception as error:  # noqa: BLE001 - whatever keeps a kernel from loading is a reason to go on without it
        reason = f"{type(error).__name__}: {error}".strip()
        return Kernels("reference", turned_down=dict.fromkeys(DEVICE_BACKENDS[device.type], reason))
    return Kernels(backend, module, turned_down)


def _why_not_better(backend: str, index: int) -> dict[str, str]:
    needs = {
        "blackwell": "FP4 tensor cores (compute capability 10.x or 12.0) and kernels for them",
        "cuda": "compute capability 9.0 and the compiled build of the package",
    }
    capability = ".".join(map(str, torch.cuda.get_device_capability(index)))
    has = f"{torch.cuda.get_device_name(index)} has {capability}"
    return {name: f"it needs {needs[name]}, {has}" for name in BACKENDS[: BACKENDS.index(backend)]}


@functools.cache
def _load(source: KernelSource, device_type: str) -> ModuleType:
    import kernels  # takes a while

    # A package that holds compiled kernels for one GPU also holds the Triton files for the others.
    return kernels.get_kernel(
        source.repo,
        version=source.version,
        backend="cpu" if device_type == "cpu" else None,
        trust_remote_code=source.trust,
        check_arch=False,
    )


def device_context(device: torch.device) -> AbstractContextManager:
    """Context in which ``device``, if it is a GPU, is the current one: for what does not ask where its tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def describe(found: Kernels, source: KernelSource) -> str:
    """One sentence for a person: what runs, and why nothing better does."""
    reasons = {
        reason: [n for n, r in found.turned_down.items() if r == reason]
        for reason in found.turned_down.values()
    }
    text = "; ".join(f"{' and '.join(names)}: {reason}" for reason, names in reasons.items())
    return f"FP4 linears run on the {found.backend} backend" + (
        f", kernels of {source}: {text}" if text else ""
    )


def input_arguments(
    activation_scale_rule: str | None, hadamard_size: int | None, input_global_scale: torch.Tensor | None
) -> dict[str, Any]:
    """What becomes of a linear's input, as the functions of a kernel package are told; rule None: W4A16."""
    return {
        "activations": "bf16" if activation_scale_rule is None else "fp4",
        "rule": activation_scale_rule or "absmax",
        "hadamard": hadamard_size,
        "input_global_scale": input_global_scale,
    }


def fake_quantize(
    kernels: Kernels, x: torch.Tensor, fmt: FP4Format, rule: str, global_scale: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`fake_quantize_activations` of float32 ``x`` [M, K], rotated already, with a static scale; by kernels that take float32."""
    if not kernels.take(x.dtype):
        return fake_quantize_activations(x, fmt, rule, global_scale)
    module: Any = kernels.module
    arguments = input_arguments(rule, None, global_scale)
    values, _ = module.fake_quantize(x, format=fmt.value, **arguments)
    return values.float(), global_scale


def fake_quantizes(kernels: Kernels, x: torch.Tensor) -> bool:
    """Whether `quantize_input` of ``x`` runs on kernels, which give back bfloat16."""
    return kernels.take(x.dtype) and x.dtype == torch.bfloat16


def quantize_input(
    kernels: Kernels,
    x: torch.Tensor,
    fmt: FP4Format,
    activation_scale_rule: str | None,
    hadamard_size: int | None,
    input_global_scale: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`reference.quantize_input`, by kernels for bfloat16; its values are bfloat16 then, which holds quantized ones exactly."""
    if not fake_quantizes(kernels, x):
        return reference.quantize_input(x, fmt, activation_scale_rule, hadamard_size, input_global_scale)
    module: Any = kernels.module
    arguments = input_arguments(activation_scale_rule, hadamard_size, input_global_scale)
    values, multiplier = module.fake_quantize(x, format=fmt.value, **arguments)
    if activation_scale_rule is None or not fmt.has_global_scale:
        return values, None
    per_token = input_global_scale is None
    divisor = multiplier.reciprocal()
    return values, divisor.view(*x.shape[:-1], 1) if per_token else divisor
