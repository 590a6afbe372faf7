"""The layouts in which other tools store FP4 linears, and their tensors in the layout of this package.

One value is ``e2m1 * block scale``, divided or multiplied by a scale of the whole tensor:

* compressed-tensors, which llm-compressor writes: the bytes of this package, with the weight under ``weight_packed``.
* ModelOpt's NVFP4: ``weight``, ``weight_scale``, and the multipliers ``weight_scale_2`` and ``input_scale``.
* FP-Quant's: ``qweight``, ``scales``, the divisors ``weight_global_scale`` and ``act_global_scale``, rotated weights.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any, ClassVar

import torch

from .checkpoint_files import Checkpoint
from .config import QUANT_METHOD, MRGPTQConfig
from .formats import FP4Format
from .ops import BROKEN, check_linear
from .rotation import HADAMARD_SIZES, rotate

IMPORTED = "unknown: imported from "
"""How the ``dataset`` of an imported checkpoint starts; the tool's name follows."""

OWN_NAMES = ("weight", "weight_scale", "weight_global_scale", "input_global_scale", "bias")
KV_CACHE = ("k_scale", "v_scale", "q_scale", "k_zero_point", "v_zero_point", "q_zero_point")
"""Last parts of names of the scales of a quantized KV cache."""

_CLOSEST_RULES = {FP4Format.NVFP4: "absmax", FP4Format.MXFP4: "mse"}
"""What is closest to compressed-tensors, whose MXFP4 takes the larger exponent from 7/8 of the next power of two on."""

_OCTAVES = 17
"""E4M3 has the powers of two from 2**-9 to 2**8."""


def quantization_of(config: dict[str, Any]) -> dict[str, Any]:
    """The quantization config in a config.json, wherever in it; empty when there is none."""
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    return next((part["quantization_config"] for part in parts if part.get("quantization_config")), {})


def check_tensors(
    module: str, tensors: dict[str, torch.Tensor], fmt: FP4Format, hadamard_size: int | None
) -> None:
    """`ops.check_linear` for tensors by name, some of which may be missing."""
    weight = tensors["weight"]
    if weight.dtype != torch.uint8 or weight.dim() != 2:
        raise ValueError(
            f"the packed weight of {module} must be uint8 [out, in/2], got {weight.dtype} {list(weight.shape)}; {BROKEN}"
        )
    if "weight_scale" not in tensors:
        raise ValueError(f"the checkpoint has no block scales for {module}; {BROKEN}")
    scales = {name: tensor for name, tensor in tensors.items() if name.endswith("global_scale")}
    check_linear(module, weight, tensors["weight_scale"], scales, fmt, hadamard_size)


def layout_of(source: Checkpoint) -> OtherLayout:
    """The layout of a checkpoint that another tool quantized; ValueError when none of those known here fits."""
    config = quantization_of(source.config)
    other = source.json("hf_quant_config.json")
    method = config.get("quant_method") or ("modelopt" if other else None)
    if method == QUANT_METHOD:
        raise ValueError(
            f"expected a checkpoint of another tool, got one of hf-fp4; load {source.directory} as it is"
        )
    if method == "compressed-tensors":
        return CompressedTensorsLayout(source, config)
    if str(method).startswith("modelopt"):
        return ModelOptLayout(source, {**other.get("quantization", {}), **config})
    if method == "fp_quant":
        return FPQuantLayout(source, config)
    raise ValueError(
        "expected quant_method compressed-tensors, modelopt or fp_quant in config.json, got "
        f"{method!r}; quantize the original model with hf-fp4 instead"
    )


class OtherLayout:
    """How another tool stores quantized linears."""

    tool: str
    packed: str
    """Last part of the name of the tensor that every quantized linear has, and only those."""

    names: ClassVar[dict[str, str | None]]
    """Last part of a tensor's name there -> here; None: left out."""

    required: tuple[str, ...]
    """Last parts of the names that every quantized linear has beside `packed`."""

    format: FP4Format
    activations: str

    def __init__(self, source: Checkpoint, config: dict[str, Any]):
        self.source, self.config = source, config

    @cached_property
    def modules(self) -> list[str]:
        """Names of the quantized linears."""
        ending = f".{self.packed}"
        modules = dict.fromkeys(
            sorted(n.removesuffix(ending) for n in self.source.tensors if n.endswith(ending))
        )
        own = {leaf for leaf in self.names if leaf not in ("weight", "bias")}
        for name in self.source.tensors:
            module, _, leaf = name.rpartition(".")
            if module not in modules and leaf in own:
                raise ValueError(
                    f"{module} has {leaf} and no {self.packed}: {self.tool} quantized it otherwise than to FP4, or {BROKEN}"
                )
            if module in modules and leaf not in self.names and leaf not in KV_CACHE:
                raise ValueError(
                    f"expected {', '.join(self.names)} in a linear of {self.tool}, got {name}, which hf-fp4 does not run"
                )
        return list(modules)

    @property
    def weight(self) -> str:
        """Last part of the name of the packed weight."""
        return next(leaf for leaf, new in self.names.items() if new == "weight")

    @property
    def static_input_scale(self) -> bool:
        """Whether the linears have a scale of their input."""
        return self.format.has_global_scale and self.activations == "fp4"

    def hadamard_size(self, module: str) -> int | None:
        """Size of the block Hadamard rotation of a linear's input; None: none."""
        return None

    def load(self, module: str) -> dict[str, torch.Tensor]:
        """The tensors of one linear under this package's names, checked."""
        for leaf in self.required:
            self._require(f"{module}.{leaf}")
        tensors = self._convert(
            module,
            {
                leaf: self.source.tensor(f"{module}.{leaf}")
                for leaf in self.names
                if f"{module}.{leaf}" in self.source.tensors
            },
        )
        tensors = _without_zero_scales(tensors, self.format)
        check_tensors(module, tensors, self.format, self.hadamard_size(module))
        return tensors

    def _require(self, name: str) -> str:
        """``name``, of a tensor that the checkpoint must have."""
        if name not in self.source.tensors:
            raise ValueError(f"the checkpoint has no tensor {name}; {BROKEN}")
        return name

    def _convert(self, module: str, stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {new: stored[leaf] for leaf, new in self.names.items() if new and leaf in stored}

    def new_config(self, activation_scale_rule: str | None, own_names: dict[str, str]) -> MRGPTQConfig:
        """The config with which this package loads the linears; ``own_names``: what the model calls them, if otherwise."""
        sizes = {own_names.get(module, module): self.hadamard_size(module) for module in self.modules}
        came_from = IMPORTED + self.tool
        return MRGPTQConfig(
            format=self.format.value,
            activations=self.activations,
            method="rtn",  # what was really done is not known here
            hadamard_group_size=next(iter(sizes.values())) if len(set(sizes.values())) == 1 else "auto",
            scale_rule="absmax",
            activation_scale_rule=activation_scale_rule or _CLOSEST_RULES[self.format],
            act_order=False,
            descent_passes=0,
            error_correction=0.0,
            equalize=False,
            dataset=came_from,
            modules=sizes,
            calibration={"dataset": came_from} if self.static_input_scale else None,
        )


class CompressedTensorsLayout(OtherLayout):
    """``weight_packed`` and the names of this package, divisors."""

    tool = "compressed-tensors"
    packed = "weight_packed"
    names: ClassVar[dict[str, str | None]] = {
        "weight_packed": "weight",
        **{name: name for name in OWN_NAMES[1:]},
    }

    def __init__(self, source: Checkpoint, config: dict[str, Any]):
        super().__init__(source, config)
        if (config.get("transform_config") or {}).get("config_groups"):
            raise ValueError(
                "the checkpoint has a transform_config: its inputs are transformed at run time, which hf-fp4 cannot do; "
                "quantize the original model with MRGPTQConfig, whose hadamard_group_size rotates"
            )
        if (config.get("sparsity_config") or {}).get("format", "dense") != "dense":
            raise ValueError(
                "the checkpoint is sparse (sparsity_config), which hf-fp4 does not run; use a dense one"
            )
        groups = list((config.get("config_groups") or {}).values())
        schemes = {self._scheme(group, config.get("format")) for group in groups}
        if len(schemes) != 1:
            raise ValueError(
                "expected one scheme for all quantized linears in config_groups, got "
                f"{sorted((fmt.value, act) for fmt, act in schemes) or 'none'}; hf-fp4 runs one format per model"
            )
        ((self.format, self.activations),) = schemes
        self.required = (
            "weight_scale",
            *(["weight_global_scale"] if self.format.has_global_scale else []),
            *(["input_global_scale"] if self.static_input_scale else []),
        )

    @staticmethod
    def _scheme(group: dict[str, Any], layout: str | None) -> tuple[FP4Format, str]:
        layout = group.get("format") or layout
        formats = {f"{fmt.value}-pack-quantized": fmt for fmt in FP4Format}
        if layout not in formats:
            raise ValueError(f"expected format {' or '.join(formats)}, got {layout!r}")
        fmt = formats[layout]
        weights, inputs = group.get("weights") or {}, group.get("input_activations")
        for what, args in (("weights", weights), ("input_activations", inputs)):
            wanted = {"num_bits": 4, "type": "float", "group_size": fmt.group_size}
            found = args and {key: args.get(key) for key in wanted}
            if args is not None and found != wanted:
                raise ValueError(f"expected {wanted} for the {what} of {layout}, got {found}")
            if args and not args.get("symmetric", True):
                raise ValueError(f"expected symmetric {what} of {layout}, got asymmetric ones")
        return fmt, "bf16" if inputs is None else "fp4"

    def _convert(self, module: str, stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors = super()._convert(module, stored)
        if self.activations == "bf16":
            tensors.pop("input_global_scale", None)
        for name in ("weight_global_scale", "input_global_scale"):
            if name in tensors and tensors[name].numel() == 1:
                tensors[name] = tensors[name].reshape(1)
        scale = tensors["weight_scale"]
        if not self.format.has_global_scale and scale.dtype == torch.float8_e8m0fnu:
            tensors["weight_scale"] = scale.view(torch.uint8)
        return tensors


class ModelOptLayout(OtherLayout):
    """NVFP4 with multipliers: ``w = e2m1 * weight_scale * weight_scale_2``."""

    tool = "ModelOpt"
    packed = "weight_scale_2"
    names: ClassVar[dict[str, str | None]] = {
        "weight": "weight",
        "weight_scale": "weight_scale",
        "weight_scale_2": "weight_global_scale",
        "input_scale": "input_global_scale",
        "bias": "bias",
    }
    format = FP4Format.NVFP4

    def __init__(self, source: Checkpoint, config: dict[str, Any]):
        super().__init__(source, config)
        algorithm = str(config.get("quant_algo")).upper()
        activations = {"NVFP4": "fp4", "W4A16_NVFP4": "bf16"}
        if algorithm not in activations:
            raise ValueError(
                f"expected quant_algo {' or '.join(activations)} of ModelOpt, got {config.get('quant_algo')!r}"
            )
        self.activations = activations[algorithm]
        if config.get("group_size", 16) != 16:
            raise ValueError(f"expected group_size 16 for NVFP4, got {config['group_size']}")
        self.required = (
            "weight",
            "weight_scale",
            *(["input_scale"] if self.static_input_scale else []),
        )

    def _convert(self, module: str, stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if self.activations == "bf16":
            stored.pop("input_scale", None)
        for leaf in ("weight_scale_2", "input_scale"):
            if leaf in stored:
                multiplier = _positive(stored[leaf], f"{module}.{leaf}")
                stored[leaf] = multiplier.double().reciprocal().float().reshape(1)
        return super()._convert(module, stored)


class FPQuantLayout(OtherLayout):
    """``w = e2m1 * scales / weight_global_scale``, rotated by ``forward_hadamard_matrix``; for MXFP4 the divisor is 3."""

    tool = "FP-Quant"
    packed = "qweight"
    names: ClassVar[dict[str, str | None]] = {
        "qweight": "weight",
        "scales": "weight_scale",
        "weight_global_scale": "weight_global_scale",
        "act_global_scale": "input_global_scale",
        "bias": "bias",
        "forward_hadamard_matrix": None,
        "backward_hadamard_matrix": None,
        "weight": None,  # empty
        "dqweight": None,
    }
    activations = "fp4"

    def __init__(self, source: Checkpoint, config: dict[str, Any]):
        super().__init__(source, config)
        known = {fmt.value: fmt for fmt in FP4Format}
        if config.get("forward_dtype") not in known:
            raise ValueError(
                f"expected forward_dtype {' or '.join(known)} of FP-Quant, got {config.get('forward_dtype')!r}"
            )
        if config.get("pseudoquantization") or config.get("store_master_weights"):
            raise ValueError(
                "the checkpoint of FP-Quant has weights that are not packed (pseudoquantization or store_master_weights); "
                "export it with real quantization"
            )
        self._stored_format = known[config["forward_dtype"]]
        self.format = self._stored_format
        if self.format is FP4Format.MXFP4 and not all(
            _is_power_of_two(self._factor(m)) for m in self.modules
        ):
            self.format = FP4Format.NVFP4
        self.required = (
            "scales",
            "weight_global_scale",
            *(["act_global_scale"] if self.static_input_scale else []),
        )

    @property
    def static_input_scale(self) -> bool:
        """Whether the linears have a scale of their input; those made NVFP4 here have one per token."""
        return self._stored_format is FP4Format.NVFP4

    def _factor(self, module: str) -> float:
        """The divisor of a weight."""
        name = self._require(f"{module}.weight_global_scale")
        return _positive(self.source.tensor(name), name).item()

    def hadamard_size(self, module: str) -> int | None:
        """Size of the block Hadamard rotation of a linear's input; ValueError for another rotation."""
        name = self._require(f"{module}.forward_hadamard_matrix")
        matrix = self.source.tensor(name).float()
        size = len(matrix)
        if matrix.shape == (size, size):
            if torch.equal(matrix, torch.eye(size)):
                return None
            # It is stored in bfloat16.
            if size in HADAMARD_SIZES and torch.allclose(matrix, rotate(torch.eye(size), size), rtol=2**-7):
                return size
        raise ValueError(
            f"{name} must be a normalized Sylvester Hadamard matrix of {HADAMARD_SIZES} or the identity, got another matrix "
            f"{list(matrix.shape)}; hf-fp4 cannot run that rotation"
        )

    def _convert(self, module: str, stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if any(stored[leaf].numel() for leaf in ("weight", "dqweight") if leaf in stored):
            raise ValueError(f"{module} has both packed and unpacked weights; {BROKEN}")
        tensors = super()._convert(module, stored)
        rows, half = tensors["weight"].shape
        groups = 2 * half // self._stored_format.group_size
        scales = tensors["weight_scale"].view(torch.uint8)
        padded = (-(-rows // 128) * 128, -(-groups // 4) * 4)  # as its kernels write them
        if tuple(scales.shape) not in ((rows, groups), padded):
            raise ValueError(
                f"{module}.scales must be uint8 {[rows, groups]} or padded to {list(padded)}, got {list(scales.shape)}; "
                f"{BROKEN}"
            )
        scales = scales[:rows, :groups].contiguous()
        if self._stored_format is FP4Format.NVFP4:
            tensors["weight_scale"] = scales.view(torch.float8_e4m3fn)
            for name in ("weight_global_scale", "input_global_scale"):
                tensors[name] = tensors[name].float().reshape(1)
            return tensors
        tensors.pop("input_global_scale", None)
        factor = self._factor(module)
        if self.format is FP4Format.MXFP4:
            del tensors["weight_global_scale"]
            tensors["weight_scale"] = _shifted(module, scales, int(math.log2(factor)))
        else:
            tensors["weight_scale"], tensors["weight_global_scale"] = _as_nvfp4(
                module, tensors["weight"], scales, factor
            )
        return tensors


def _positive(value: torch.Tensor, name: str) -> torch.Tensor:
    """``value``, which must be one positive finite number."""
    if value.numel() != 1 or not (value > 0).all() or not value.isfinite().all():
        raise ValueError(f"{name} must be one positive finite number, got {value.tolist()}; {BROKEN}")
    return value


def _is_power_of_two(value: float) -> bool:
    return math.frexp(value)[0] == 0.5


def _shifted(module: str, scales: torch.Tensor, octaves: int) -> torch.Tensor:
    """E8M0 bytes divided by 2**octaves."""
    moved = scales.short() - octaves
    if (moved < 0).any() or (moved > 254).any() or (scales == 255).any():
        raise ValueError(f"the block scales of {module} leave the range of E8M0 or hold NaN; {BROKEN}")
    return moved.to(torch.uint8)


def _as_nvfp4(
    module: str, weight: torch.Tensor, scales: torch.Tensor, factor: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Block scales and divisor of NVFP4 for ``e2m1 * 2**(scales - 127) / factor``.

    A block of 32 becomes two of 16, powers of two are E4M3 numbers, and the divisor takes the rest.
    """
    zero = (weight & 0x77).view(len(weight), -1, 16).eq(0).all(-1)
    used = scales[~zero]
    high = int(used.max()) if used.numel() else 127
    low = int(used.min()) if used.numel() else 127
    if high == 255 or high - low > _OCTAVES:
        raise ValueError(
            f"the block scales of {module} are NaN or span {high - low} powers of two, more than the {_OCTAVES} of "
            "NVFP4, which is needed for a weight_global_scale that is no power of two; quantize the original model instead"
        )
    exponents = torch.where(zero, 8, scales.short() - high + 8)
    values = torch.ldexp(torch.ones(exponents.shape), exponents).to(torch.float8_e4m3fn)
    divisor = torch.tensor([math.ldexp(factor, 127 + 8 - high)], dtype=torch.float32)
    return values.view(torch.uint8).repeat_interleave(2, dim=1).view(torch.float8_e4m3fn), divisor


def _without_zero_scales(tensors: dict[str, torch.Tensor], fmt: FP4Format) -> dict[str, torch.Tensor]:
    """Zero block scales, which other tools write for blocks of zeros, as zero codes with the smallest scale."""
    scale = tensors.get("weight_scale")
    if fmt is not FP4Format.NVFP4 or scale is None or scale.dtype != fmt.scale_dtype:
        return tensors
    zero = (scale.view(torch.uint8) & 0x7F) == 0
    weight = tensors["weight"]
    if not zero.any() or scale.numel() * fmt.group_size != 2 * weight.numel():
        return tensors
    bytes_per_block = fmt.group_size // 2
    codes = weight.unflatten(1, (-1, bytes_per_block)).masked_fill(zero[..., None], 0).flatten(1)
    scales = scale.view(torch.uint8).masked_fill(zero, 1).view(fmt.scale_dtype)
    return {**tensors, "weight": codes, "weight_scale": scales}
