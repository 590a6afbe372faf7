"""`MRGPTQConfig`: what to do, validated when it is made; after a run, also what was chosen."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from transformers.utils.quantization_config import QuantizationConfigMixin

from .backends import KernelSource
from .formats import FP4Format
from .rotation import HADAMARD_SIZES
from .scales import ACTIVATION_SCALE_RULES, WEIGHT_SCALE_RULES

QUANT_METHOD = "mr_gptq"
DEFAULT_DATASET = "HuggingFaceFW/fineweb-edu:sample-10BT"

_HOW_TO_LOAD = "pip install hf-fp4, then `import hf_fp4` before AutoModelForCausalLM.from_pretrained(...)"
LOADING_ATTRIBUTES = ("kernel_repo", "kernel_version", "trust_kernel_repo")
"""A checkpoint does not have these: whoever loads it says which kernels run."""

_DESCENT_PASSES = {FP4Format.NVFP4: 3, FP4Format.MXFP4: 12}
_NOT_SAVED = (
    "tokenizer",
    "batch_size",
    "calibration_device",
    "allow_unconverted",
    "work_dir",
    *LOADING_ATTRIBUTES,
)


_OF_EXPERT = re.compile(r"(.*experts)\.(\d+)\.(\w+)")
_OF_EXPERTS = re.compile(r"(.*experts)\.0-(\d{1,6})\.(\w+)")


@dataclass(repr=False)
class MRGPTQConfig(QuantizationConfigMixin):
    """How `from_pretrained` quantizes a model to FP4, and what a saved checkpoint remembers of it.

    Args:
        format: ``"nvfp4"`` (groups of 16, E4M3 scales, an FP32 global scale) or ``"mxfp4"`` (groups of 32, E8M0 scales).
        activations: ``"fp4"`` (W4A4: activations are quantized at run time) or ``"bf16"`` (W4A16: weights only).
        method: ``"mr-gptq"``, or ``"rtn"``: rounding to nearest, which needs no data unless ``scale_rule="hessian"`` and
            quantizes each weight as it is read.
        hadamard_group_size: size of the block Hadamard rotation: 16, 32, 64, 128, ``None`` for no rotation, or ``"auto"``:
            per group of linears that share an input, the size (or none) with the least output error on a sample of the
            calibration data. Without data: the largest size that divides in_features for mxfp4 W4A4,
            none otherwise.
        scale_rule: block scales of weights: ``"absmax"``, ``"mse"``, ``"four_over_six"`` (nvfp4 only), ``"hessian"``
            (MSE weighted by the second moments of the inputs), or ``"auto"``: ``"hessian"`` with the solver, ``"mse"``
            for ``method="rtn"``.
        activation_scale_rule: block scales of activations: ``"absmax"``, ``"four_over_six"`` (nvfp4 only) or ``"mse"``, the
            default: the best of absmax/6, absmax/4 and the E4M3 number under absmax/6 (nvfp4), the better of two exponents (mxfp4).
        act_order: quantize columns by descending second moment of their input; costs nothing at run time.
        descent_passes: how often coordinate descent goes over all codes and block scales after the solve, which visits each
            code only once; 0: not. The default is 3 for nvfp4 and 12 for mxfp4, whose scales are coarser.
        error_correction: share, 0 to 1, of the asymmetric correction that makes a layer aim at what the original model
            gives on its own inputs rather than on the quantized model's; 0 turns it off.
        equalize: scale the channels of inputs by powers of two so that FP4 loses least, which the weights of norms and the rows
            of v_proj and up_proj take: the model computes the same before it is quantized, and nothing at run time. The
            default is to do so for W4A4; W4A16 loses by it.
        damp_percent: added to the diagonal of the second moments, as a share of its mean.
        dataset: calibration text: a Hub dataset ``"name"`` or ``"name:config"``, a `datasets.Dataset`, a list of strings
            or of token tensors, a local .txt, .jsonl or .parquet file, or ``"builtin"``, which needs no network.
        tokenizer: the tokenizer for ``dataset``, or where to load it from; ``None``: the model's own.
        num_samples, sequence_length: how many calibration sequences of how many tokens.
        batch_size: sequences per forward pass while calibrating.
        calibration_device: where blocks are calibrated, one at a time, such as ``"cuda:0"``; ``None``: where they are, and
            for a model in CPU memory on the GPU if there is one.
        seed: which part of the dataset is used.
        modules_to_not_convert: names of modules that stay as they are, beside the output head, embeddings and routers.
        allow_unconverted: go on although more than half of the parameters, embeddings and output head not counted, would
            stay as they are, because they are held in a way that is not understood.
        work_dir: a directory that keeps each finished block, so that a killed run resumes, and one that streams the model from
            the disk need not hold it; ``None``: nothing is kept.
        kernel_repo, kernel_version: the repository on the Hugging Face kernels hub that GPU kernels are loaded from, and the
            version of its API. They are not saved: pass them again when you load a checkpoint. ``LOCAL_KERNELS`` works as
            for every kernel.
        trust_kernel_repo: load kernels from a publisher that the kernels hub does not know as trusted. That runs its code.
        modules: set by a run, not by you: the converted modules and the Hadamard size of each.
        calibration: set by a run, not by you: the fingerprint and description of the calibration data.

    Raises:
        ValueError: a field has a value that it can't have; the message lists those it can.
    """

    format: str = "nvfp4"
    activations: str = "fp4"
    method: str = "mr-gptq"
    hadamard_group_size: int | str | None = "auto"
    scale_rule: str = "auto"
    activation_scale_rule: str | None = None
    act_order: bool = True
    descent_passes: int | None = None
    error_correction: float = 0.35
    equalize: bool | None = None
    damp_percent: float = 0.1
    dataset: Any = DEFAULT_DATASET
    tokenizer: Any = None
    num_samples: int = 128
    sequence_length: int = 2048
    batch_size: int = 8
    calibration_device: str | None = None
    seed: int = 0
    modules_to_not_convert: list[str] | None = None
    allow_unconverted: bool = False
    work_dir: str | os.PathLike | None = None
    kernel_repo: str = KernelSource.repo
    kernel_version: int = KernelSource.version
    trust_kernel_repo: bool = KernelSource.trust
    modules: dict[str, int | None] | None = None
    calibration: dict[str, Any] | None = None
    quant_method: str = field(default=QUANT_METHOD, init=False)  # type: ignore[assignment]

    def __post_init__(self):
        _one_of("format", self.format, tuple(f.value for f in FP4Format))
        _one_of("activations", self.activations, ("fp4", "bf16"))
        _one_of("method", self.method, ("mr-gptq", "rtn"))
        _one_of("hadamard_group_size", self.hadamard_group_size, ("auto", None, *HADAMARD_SIZES))
        _one_of("scale_rule", self.scale_rule, ("auto", *WEIGHT_SCALE_RULES))
        if self.scale_rule == "four_over_six" and self.fp4_format is not FP4Format.NVFP4:
            raise ValueError(
                'scale_rule="four_over_six" is for nvfp4; for mxfp4 use "mse", which searches exponents'
            )
        rules = ACTIVATION_SCALE_RULES[self.fp4_format]
        if self.activation_scale_rule is None:
            self.activation_scale_rule = rules[-1]
        _one_of(f"activation_scale_rule for {self.format}", self.activation_scale_rule, rules)
        if self.descent_passes is None:
            self.descent_passes = _DESCENT_PASSES[self.fp4_format]
        _one_of("act_order", self.act_order, (True, False))
        if self.equalize is None:
            self.equalize = self.activations == "fp4"
        _one_of("equalize", self.equalize, (True, False))
        _one_of("allow_unconverted", self.allow_unconverted, (True, False))
        _one_of("trust_kernel_repo", self.trust_kernel_repo, (True, False))
        if not isinstance(self.kernel_repo, str) or self.kernel_repo.count("/") != 1:
            raise ValueError(f'kernel_repo must be "owner/name" on the kernels hub, got {self.kernel_repo!r}')
        for name in ("num_samples", "sequence_length", "batch_size", "kernel_version"):
            value = getattr(self, name)
            if not _is_number(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if not _is_number(self.descent_passes, int) or self.descent_passes < 0:
            raise ValueError(f"descent_passes must be an integer of at least 0, got {self.descent_passes!r}")
        if not _is_number(self.seed, int):
            raise ValueError(f"seed must be an integer, got {self.seed!r}")
        if not _is_number(self.error_correction) or not 0 <= self.error_correction <= 1:
            raise ValueError(f"error_correction must be between 0 and 1, got {self.error_correction!r}")
        if not _is_number(self.damp_percent) or not 0 < self.damp_percent < 1:
            raise ValueError(
                f"damp_percent must be between 0 and 1 (0.01 to 0.1 is usual), got {self.damp_percent!r}"
            )
        if self.calibration_device is not None:
            try:
                if not isinstance(self.calibration_device, str):
                    raise TypeError
                torch.device(self.calibration_device)
            except (RuntimeError, TypeError) as error:
                raise ValueError(
                    f'calibration_device must be a device such as "cuda:0" or "cpu", got {self.calibration_device!r}'
                ) from error
        if self.modules_to_not_convert is not None:
            self.modules_to_not_convert = _names("modules_to_not_convert", self.modules_to_not_convert)
        if self.work_dir is not None and not isinstance(self.work_dir, (str, os.PathLike)):
            raise ValueError(f"work_dir must be a directory's path, got {self.work_dir!r}")
        for name in ("modules", "calibration"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, dict):
                raise ValueError(f"{name} must be what a run wrote, a dictionary, got {value!r}")
        if self.modules is not None:
            self.modules = _unfolded(self.modules)
        for module, size in (self.modules or {}).items():
            _one_of(f"the Hadamard size of {module}", size, (None, *HADAMARD_SIZES))

    @classmethod
    def paper(cls, format: str = "nvfp4", **overrides: Any) -> MRGPTQConfig:
        """The recipe of arXiv 2509.23202: H16 (nvfp4) or H32 (mxfp4), MSE scales, static activation order, no correction, no
        equalization."""
        recipe = {
            "hadamard_group_size": 16 if format == "nvfp4" else 32,
            "scale_rule": "mse",
            "activation_scale_rule": "absmax",
            "act_order": True,
            "descent_passes": 0,
            "error_correction": 0.0,
            "equalize": False,
            "damp_percent": 0.01,
        }
        return cls(format=format, **{**recipe, **overrides})

    @property
    def kernel_source(self) -> KernelSource:
        """Where GPU kernels come from."""
        return KernelSource(self.kernel_repo, self.kernel_version, self.trust_kernel_repo)

    def get_loading_attributes(self) -> dict[str, Any]:
        """What transformers takes from a config that is passed to `from_pretrained` of a quantized checkpoint."""
        return {name: getattr(self, name) for name in LOADING_ATTRIBUTES}

    @property
    def fp4_format(self) -> FP4Format:
        """`format` as the enum."""
        return FP4Format(self.format)

    @property
    def linear_activation_rule(self) -> str | None:
        """The activation rule that a layer runs with; None for W4A16."""
        return self.activation_scale_rule if self.activations == "fp4" else None

    @property
    def weight_rule(self) -> str:
        """`scale_rule` with ``"auto"`` resolved."""
        if self.scale_rule != "auto":
            return self.scale_rule
        return "mse" if self.method == "rtn" else "hessian"

    @property
    def rotates_without_data(self) -> bool:
        """What ``hadamard_group_size="auto"`` means when there is no calibration data to choose by.

        Rounding alone gets worse with rotation, by a quarter to a half of its KL on SmolLM2-135M, except mxfp4 W4A4.
        """
        return self.fp4_format is FP4Format.MXFP4 and self.activations == "fp4"

    @property
    def uses_original_stream(self) -> bool:
        """Whether calibration also runs the original model, for the asymmetric correction."""
        return self.method != "rtn" and self.error_correction > 0

    @property
    def needs_calibration(self) -> bool:
        """Whether quantizing needs data."""
        return self.method != "rtn" or self.scale_rule == "hessian"

    @property
    def static_input_scale(self) -> bool:
        """Whether the layers of a finished run have an ``input_global_scale``."""
        return self.fp4_format.has_global_scale and self.activations == "fp4" and self.calibration is not None

    def to_dict(self) -> dict[str, Any]:
        """What is written to config.json: JSON values only, without what only the run itself needs."""
        saved = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _NOT_SAVED}
        if self.modules is not None:
            saved["modules"] = _folded(self.modules)
        if not isinstance(self.dataset, str) or os.path.exists(self.dataset):  # no objects, no local paths
            saved["dataset"] = (self.calibration or {}).get("dataset", type(self.dataset).__name__)
        return {**saved, "how_to_load": _HOW_TO_LOAD}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any):
        """Rebuild a config from `to_dict`'s output; unknown keys are refused, they may change what the bytes mean."""
        method = config_dict.get("quant_method", QUANT_METHOD)
        if method != QUANT_METHOD:
            raise ValueError(
                f"expected quant_method {QUANT_METHOD!r} in the quantization config, got {method!r}; load the checkpoint with "
                "the tool that wrote it"
            )
        values = {k: v for k, v in config_dict.items() if k not in ("quant_method", "how_to_load")}
        known = {f.name for f in fields(cls) if f.init}
        named = sorted(set(values) & set(LOADING_ATTRIBUTES))
        if named:
            raise ValueError(
                f"a checkpoint may not choose what code runs, got {named} in its quantization config; remove them, and pass "
                "quantization_config=MRGPTQConfig(kernel_repo=...) to from_pretrained if you trust that repository"
            )
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(
                f"the quantization config has unknown fields {unknown}: it was written by a newer hf-fp4 or edited; "
                "upgrade with `pip install -U hf-fp4`"
            )
        config = cls(**{**values, **{k: kwargs.pop(k) for k in list(kwargs) if k in known}})
        return (config, kwargs) if return_unused_kwargs else config


def _folded(modules: dict[str, int | None]) -> dict[str, int | None]:
    """Linears of all experts of a layer as one, ``experts.0-127.up_proj``, if they have the same size; there are thousands."""
    found: dict[str, dict[int, int | None]] = {}
    for name, size in modules.items():
        if match := _OF_EXPERT.fullmatch(name):
            found.setdefault(f"{match[1]}.{{}}.{match[3]}", {})[int(match[2])] = size
    alike = {
        pattern: sizes
        for pattern, sizes in found.items()
        if len(sizes) > 1 and set(sizes) == set(range(len(sizes))) and len(set(sizes.values())) == 1
    }
    folded = {}
    for name, size in modules.items():
        match = _OF_EXPERT.fullmatch(name)
        pattern = f"{match[1]}.{{}}.{match[3]}" if match else ""
        folded[pattern.format(f"0-{len(alike[pattern]) - 1}") if pattern in alike else name] = size
    return folded


def _unfolded(modules: dict[str, int | None]) -> dict[str, int | None]:
    """The inverse of `_folded`, but for the order."""
    names = {}
    for name, size in modules.items():
        match = _OF_EXPERTS.fullmatch(name)
        if match is None:
            names[name] = size
            continue
        names |= {f"{match[1]}.{expert}.{match[3]}": size for expert in range(int(match[2]) + 1)}
    return names


def _one_of(name: str, value: Any, allowed: tuple) -> None:
    if not any(isinstance(value, type(choice)) and value == choice for choice in allowed):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def _is_number(value: Any, kind: type | tuple[type, ...] = (int, float)) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _names(field_name: str, value: Any) -> list[str]:
    """A list of names as a list: JSON knows no tuple; one name alone would be read as a list of letters."""
    if not isinstance(value, (list, tuple)) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"{field_name} must be a list of module names, got {value!r}")
    return list(value)
