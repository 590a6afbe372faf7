"""Export to the compressed-tensors layout that stock transformers, vLLM and SGLang load; import of it and its relatives."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.utils import logging

from .checkpoint_files import Checkpoint, staged, write_json
from .config import QUANT_METHOD, MRGPTQConfig
from .formats import FP4Format
from .layers.experts import conversions_of_linears, take_apart
from .layers.replace import find_saved, text_experts
from .ops import BROKEN
from .other_layouts import (
    IMPORTED,
    KV_CACHE,
    OWN_NAMES,
    OtherLayout,
    check_tensors,
    layout_of,
    quantization_of,
)
from .scales import fused_partners

logger = logging.get_logger(__name__)

_OWN_CONFIG = "mr_gptq_config.json"
"""What an export replaces in config.json, kept beside it so that an import is the exact inverse."""

_FLOATS = ("BF16", "F16", "F32")


def export_compressed_tensors(
    checkpoint: str | os.PathLike,
    output_directory: str | os.PathLike,
    *,
    activations: str | None = None,
    revision: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a quantized checkpoint in the compressed-tensors layout, ``nvfp4-pack-quantized`` or ``mxfp4-pack-quantized``.

    Stock transformers (with compressed-tensors installed), vLLM and SGLang load the result without hf-fp4. Tensors keep their
    bytes, ``weight`` is called ``weight_packed``. One weight file is in memory at a time. Tokenizer, generation config and
    other files of the model are copied; the model card is not, since it says how to load the original.

    These runtimes choose the block scales of activations by the largest magnitude, whatever ``activation_scale_rule`` the
    checkpoint has. W4A16 gives the same logits there as here up to rounding. W4A4 gives others, as one code that rounds the
    other way moves all that follow, and for mxfp4 somewhat worse ones. Weights become bfloat16 in stock transformers, so
    config.json says bfloat16, whatever it said before.

    Args:
        checkpoint: a directory that `save_pretrained` wrote, or a repository on the Hub.
        output_directory: where to write. Either all of it is written or nothing is changed.
        activations: ``None``: as in the checkpoint; ``"bf16"``: weights only (W4A16), from a W4A4 checkpoint as well.
        revision: branch, tag or commit of a repository on the Hub.
        overwrite: write into a directory although there are files in it that are no earlier export.

    Returns:
        ``output_directory``.

    Raises:
        ValueError: the checkpoint is not one of this package, it is damaged, layers are rotated (no loader of this layout
            rotates the input), or W4A4 nvfp4 was not calibrated (these loaders need an input scale).
    """
    source = Checkpoint.open(checkpoint, revision)
    target = _check_target(source, output_directory, overwrite, _is_export)
    config = _own_config(source)
    if activations not in (None, "bf16", config.activations):
        raise ValueError(
            f'activations must be None, "bf16" or what the checkpoint has ({config.activations!r}), got {activations!r}'
        )
    linears = _own_linears(source, config)
    _refuse_rotated(config)
    config.activations = activations or config.activations
    _refuse_uncalibrated(source, config, linears)
    model = _skeleton(source)
    _check_linears(model, source, {name: f"{name}.weight" for name in linears})
    ignored = _not_converted(source, model, linears | set(config.modules or {}))
    _warn_of_fused(source, linears, ignored)
    dropped = {"input_global_scale"} if config.activations == "bf16" else set()

    @lru_cache(maxsize=1)
    def load(module: str) -> dict[str, torch.Tensor]:
        present = [leaf for leaf in OWN_NAMES if f"{module}.{leaf}" in source.tensors]
        tensors = {leaf: source.tensor(f"{module}.{leaf}") for leaf in present}
        check_tensors(module, tensors, config.fp4_format, None)
        return tensors

    def convert(name: str) -> dict[str, torch.Tensor]:
        module, _, leaf = name.rpartition(".")
        if module not in linears:
            return {name: source.tensor(name)}
        if leaf in dropped:
            return {}
        return {f"{module}.weight_packed" if leaf == "weight" else name: load(module)[leaf]}

    new = _with_dtype(source.config, "bfloat16")
    new["quantization_config"] = _exported_config(config, ignored)
    with staged(target) as staging:
        source.rewrite(staging, convert, new, (_OWN_CONFIG,), f"Exporting {config.format}")
        own = {"quantization_config": config.to_dict(), "dtype": source.config.get("dtype")}
        write_json(staging / _OWN_CONFIG, own)
    return target


def import_compressed_tensors(
    checkpoint: str | os.PathLike,
    output_directory: str | os.PathLike,
    *,
    activation_scale_rule: str | None = None,
    revision: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Make a checkpoint that another tool quantized to FP4 one that this package loads and runs on its kernels.

    Reads llm-compressor's NVFP4 and MXFP4 (compressed-tensors), ModelOpt's NVFP4 and FP-Quant's NVFP4 and MXFP4. Weights
    stand for the same values afterwards (ModelOpt's multipliers become divisors, which is exact to the last place of a
    float32). FP-Quant's MXFP4 has a factor of 1/3 that MXFP4 cannot hold; it becomes NVFP4, whose weights are exactly
    the same and whose activations are closer. Scales of a quantized KV cache are left out. One weight file is in memory
    at a time.

    Args:
        checkpoint: a directory or a repository on the Hub.
        output_directory: where to write. Either all of it is written or nothing is changed.
        activation_scale_rule: block scales of activations (see `MRGPTQConfig`); ``None``: what is closest to other runtimes,
            ``"absmax"`` for nvfp4 and ``"mse"`` for mxfp4. A checkpoint that `export_compressed_tensors` wrote gets its own
            back.
        revision: branch, tag or commit of a repository on the Hub.
        overwrite: write into a directory although there are files in it that are no earlier import.

    Returns:
        ``output_directory``.

    Raises:
        ValueError: the checkpoint has another format, is damaged, or has something that this package does not run: the
            message says what.
    """
    source = Checkpoint.open(checkpoint, revision)
    target = _check_target(source, output_directory, overwrite, _is_import)
    layout = layout_of(source)
    if not layout.modules:
        raise ValueError(
            f"expected linears quantized by {layout.tool}, got a checkpoint where no tensor is called "
            f"{layout.packed}; {BROKEN}"
        )
    weights = {module: f"{module}.{layout.weight}" for module in layout.modules}
    model = _skeleton(source)
    _check_linears(model, source, weights)
    own = _restored(source, layout) or {
        "quantization_config": layout.new_config(activation_scale_rule, _own_names(model, source)).to_dict()
    }
    load, quantized = lru_cache(maxsize=1)(layout.load), set(layout.modules)

    def convert(name: str) -> dict[str, torch.Tensor]:
        module, _, leaf = name.rpartition(".")
        if leaf in KV_CACHE:
            logger.warning_once("the scales of the checkpoint's quantized KV cache are not imported")
            return {}
        if module not in quantized:
            return {name: source.tensor(name)}
        new = layout.names[leaf]
        tensors = load(module)
        return {f"{module}.{new}": tensors[new]} if new in tensors else {}

    new = _with_dtype(source.config, own["dtype"]) if own.get("dtype") else dict(source.config)
    new["quantization_config"] = own["quantization_config"]
    for key, part in new.items():  # a multimodal model may have it with its text model
        if isinstance(part, dict) and key != "quantization_config":
            new[key] = {k: v for k, v in part.items() if k != "quantization_config"}
    with staged(target) as staging:
        source.rewrite(
            staging, convert, new, (_OWN_CONFIG, "hf_quant_config.json"), f"Importing {layout.tool}"
        )
    return target


# --- both ways


def _is_export(target: Checkpoint) -> bool:
    return (target.directory / _OWN_CONFIG).is_file()


def _is_import(target: Checkpoint) -> bool:
    return str(quantization_of(target.config).get("dataset")).startswith(IMPORTED)


def _check_target(source: Checkpoint, directory: str | os.PathLike, overwrite: bool, is_ours: Any) -> Path:
    target = Path(directory)
    if target.is_dir() and target.resolve() == source.directory.resolve():
        raise ValueError(f"the output must not be the checkpoint itself, got {target} for both")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        try:
            earlier = is_ours(Checkpoint(target))
        except ValueError:
            earlier = False
        if not earlier:
            raise ValueError(
                f"{target} has files in it that this command did not write; choose another directory, or pass "
                "overwrite=True (--overwrite)"
            )
    return target


def _with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """``config`` with ``dtype`` wherever one is named (once ``torch_dtype``)."""
    names = ("dtype", "torch_dtype")
    changed = {k: _with_dtype(v, dtype) if isinstance(v, dict) else v for k, v in config.items()}
    return {k: dtype if k in names and v is not None else v for k, v in changed.items()}


def _skeleton(source: Checkpoint) -> PreTrainedModel | None:
    """The model without weights; None when its code is not part of transformers."""
    name = (source.config.get("architectures") or [""])[0]
    model_class = getattr(transformers, name, None)
    if not isinstance(model_class, type) or not issubclass(model_class, PreTrainedModel):
        return None
    values = {key: value for key, value in source.config.items() if key != "quantization_config"}
    config_class: Any = model_class.config_class
    with torch.device("meta"):
        model = model_class(config_class.from_dict(values))
    take_apart(model, text_experts(model))
    return model


def _own_names(model: PreTrainedModel | None, source: Checkpoint) -> dict[str, str]:
    """Name of a module in the files -> in the model, as transformers renames it, for those that have another one there."""
    if model is None:
        return {}
    conversions = conversions_of_linears(get_model_conversion_mapping(model))
    renamings = [conversion for conversion in conversions if isinstance(conversion, WeightRenaming)]
    names = {}
    for stored in source.tensors:
        name = stored
        for renaming in renamings:
            name, _ = renaming.rename_source_key(name)
        names[stored.rpartition(".")[0]] = name.rpartition(".")[0]
    return {stored: name for stored, name in names.items() if stored != name}


def _check_linears(model: PreTrainedModel | None, source: Checkpoint, weights: dict[str, str]) -> None:
    """Refuse packed weights that belong to no linear of the model, or to one of another shape."""
    if model is None:
        return
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    missing, own_names = [], _own_names(model, source)
    for module, name in weights.items():
        own_name = find_saved(linears, own_names.get(module, module), model)
        if own_name is None:
            missing.append(module)
            continue
        linear = linears[own_name]
        if name not in source.tensors:
            raise ValueError(f"the checkpoint has no tensor {name}; {BROKEN}")
        stored = source.tensors[name]
        expected = (linear.out_features, linear.in_features // 2)
        if (stored.dtype, stored.shape) != ("U8", expected):
            raise ValueError(
                f"{name} must be uint8 {list(expected)}, got {stored.dtype} {list(stored.shape)}; {BROKEN}"
            )
    if missing:
        raise ValueError(
            f"{type(model).__name__} has no linear {missing[0]} (and {len(missing) - 1} more) that the checkpoint "
            "quantized"
        )


# --- export


def _own_config(source: Checkpoint) -> MRGPTQConfig:
    found = quantization_of(source.config)
    method = found.get("quant_method")
    if method != QUANT_METHOD:
        what = f"one of quant_method {method!r}" if method else "an unquantized one"
        raise ValueError(
            f"expected a checkpoint that hf-fp4 quantized, got {what} in {source.directory}; quantize a model with "
            "MRGPTQConfig and save_pretrained() it first"
        )
    return MRGPTQConfig.from_dict(found)


def _own_linears(source: Checkpoint, config: MRGPTQConfig) -> set[str]:
    """Names, as in the files, of the quantized linears."""
    found = {
        name.removesuffix(".weight")
        for name, stored in source.tensors.items()
        if name.endswith(".weight") and stored.dtype == "U8"
    }
    expected = set(config.modules or {})
    if len(found) != len(expected):  # not the names: transformers may save another one than the module's
        wrong = sorted(expected ^ found) or ["none"]
        raise ValueError(
            f"config.json lists {len(expected)} quantized linears, the files have {len(found)} (the first that differs: "
            f"{wrong[0]}); {BROKEN}"
        )
    return found


def _refuse_rotated(config: MRGPTQConfig) -> None:
    rotated = [name for name, size in (config.modules or {}).items() if size]
    if rotated:
        shown = ", ".join(rotated[:3]) + (f" and {len(rotated) - 3} more" if len(rotated) > 3 else "")
        raise ValueError(
            f"expected a model without rotations, got {len(rotated)} rotated linears: {shown}. Loaders of compressed-tensors "
            "do not rotate the input; quantize with hadamard_group_size=None to export"
        )


def _refuse_uncalibrated(source: Checkpoint, config: MRGPTQConfig, linears: set[str]) -> None:
    if not config.fp4_format.has_global_scale or config.activations != "fp4":
        return
    absent = sorted(name for name in linears if f"{name}.input_global_scale" not in source.tensors)
    if absent:
        raise ValueError(
            f"loaders of compressed-tensors need an input_global_scale for nvfp4 W4A4, {absent[0]} (and {len(absent) - 1} "
            'more) has none; quantize with calibration, or export weights only with activations="bf16" (--activations bf16)'
        )


def _not_converted(source: Checkpoint, model: PreTrainedModel | None, converted: set[str]) -> list[str]:
    """Modules that "Linear" in the exported config would match, in transformers or as vLLM names its classes."""
    names = {
        name.removesuffix(".weight")
        for name, stored in source.tensors.items()
        if name.endswith(".weight") and len(stored.shape) == 2 and stored.dtype in _FLOATS
    }
    if model is None:
        names.add("lm_head")  # not in the files when it is tied to the embeddings
    else:
        modules = dict(model.named_modules())
        names = {name for name in names if not isinstance(modules.get(name), nn.Embedding)}
        names |= {name for name, module in modules.items() if isinstance(module, nn.Linear)}
    return sorted(names - converted)


def _warn_of_fused(source: Checkpoint, linears: set[str], ignored: list[str]) -> None:
    for name in sorted(linears):
        partners = [partner for partner in fused_partners(name) if partner in linears]
        if any(partner in ignored for partner in fused_partners(name)):
            logger.warning(
                f"only some of {', '.join(fused_partners(name))} are quantized; vLLM runs them as one and refuses that"
            )
            return
        for leaf in ("weight_global_scale", "input_global_scale"):
            values = {
                source.tensor(f"{partner}.{leaf}").item()
                for partner in partners
                if f"{partner}.{leaf}" in source.tensors
            }
            if len(values) > 1:
                logger.warning(
                    f"{', '.join(partners)} have different {leaf}s; vLLM runs them as one with the largest, which is wrong "
                    "for the others"
                )
                return


def _exported_config(config: MRGPTQConfig, ignored: list[str]) -> dict[str, Any]:
    nvfp4 = config.fp4_format is FP4Format.NVFP4
    layout = f"{config.format}-pack-quantized"
    args = {
        "num_bits": 4,
        "type": "float",
        "symmetric": True,
        "strategy": "tensor_group" if nvfp4 else "group",
        "group_size": config.fp4_format.group_size,
        "scale_dtype": str(config.fp4_format.scale_dtype),
    }
    inputs = {**args, "dynamic": "local" if nvfp4 else True}  # local: only the block scales are dynamic
    group = {
        "targets": ["Linear"],
        "weights": {**args, "dynamic": False},
        "input_activations": inputs if config.activations == "fp4" else None,
        "output_activations": None,
        "format": layout,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ignored,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


# --- import


def _restored(source: Checkpoint, layout: OtherLayout) -> dict[str, Any] | None:
    """What `export_compressed_tensors` took out of config.json."""
    saved = source.json(_OWN_CONFIG)
    if not saved:
        return None
    config = MRGPTQConfig.from_dict(saved["quantization_config"])
    kept = (config.fp4_format, config.activations, len(config.modules or {}))
    if kept != (layout.format, layout.activations, len(layout.modules)):
        raise ValueError(
            f"{_OWN_CONFIG} does not fit the checkpoint beside it, which was changed since its export; delete "
            f"{_OWN_CONFIG} to import it as one of llm-compressor"
        )
    return saved
