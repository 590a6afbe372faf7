"""`MRGPTQHfQuantizer`: the hook into `from_pretrained`. Policy only; the work is done by `calibration` and `layers`."""

from __future__ import annotations

import copy
import json
import os
import re
import types
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import auto
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging

from .backends import describe, select
from .calibration.capture import find_blocks, require_finite
from .calibration.checkpoint import WorkDir, recipe, weights_fingerprint
from .calibration.data import calibration_batches
from .calibration.driver import LayerReport, quantize_model
from .calibration.experts import describe_coverage
from .calibration.group import new_layer
from .calibration.offload import bring_to_memory, return_freed_memory
from .checkpoint_files import check_shards, staged, stored_names
from .config import QUANT_METHOD, MRGPTQConfig
from .gptq import round_weight
from .layers.experts import FP4Experts, conversions_of_linears, experts_in, put_back, take_apart, use_kernels
from .layers.linear import FP4Linear
from .layers.lora import refuse_merging
from .layers.replace import (
    describe_skipped,
    find_saved,
    linear_at,
    replace_linears,
    require_converted,
    select_linears,
    take_experts_apart,
    text_experts,
)
from .model_card import CARD_NAME, card_on_hub, write_card
from .other_layouts import quantization_of
from .rotation import largest_size, require_divisor, rotate
from .scales import fused_partners, weight_global_scale, weight_scales

logger = logging.get_logger(__name__)

_ROUNDED_AT_ONCE = {"cpu": 1 << 16}
"""Values of a weight that are rounded together; on a CPU few, which keeps them in its cache and its heap in one piece."""

_ROUNDED_AT_ONCE_ELSEWHERE = 1 << 24

register_quantization_config(QUANT_METHOD)(MRGPTQConfig)
# There is no way to register that a config has loading attributes.
auto.LOADING_ATTRIBUTES_CONFIG_TYPES += (MRGPTQConfig,)  # type: ignore[assignment]


@register_quantizer(QUANT_METHOD)
class MRGPTQHfQuantizer(HfQuantizer):
    """Quantizes a model to FP4 while `from_pretrained` loads it, or loads one that was quantized before.

    After a run, ``report`` holds one `LayerReport` per converted linear and ``skipped`` the reason for each other one.
    ``loaded_from`` is the directory, in full, or the name on the Hub that the model came from.
    """

    requires_calibration = False
    quantization_config: MRGPTQConfig

    def __init__(self, quantization_config: MRGPTQConfig, **kwargs: Any):
        # A copy: what a run chose is written into it, and the caller may quantize another model with the same config.
        super().__init__(copy.copy(quantization_config), **kwargs)
        self.report: list[LayerReport] = []
        self.skipped: dict[str, str] = {}
        self.loaded_from = ""
        self._on_load: _QuantizeOnLoad | None = None
        self._stored: set[str] = set()
        self._reads_linears = False
        self._streams = False
        if self.pre_quantized and quantization_config.modules is None:
            raise ValueError(
                "the checkpoint's quantization_config does not list its quantized modules; it is damaged or was saved "
                "by something else: quantize the original model again"
            )
        if not self.pre_quantized:
            self.quantization_config.modules = self.quantization_config.calibration = None

    # --- before the weights are read

    def validate_environment(self, device_map: Any = None, **kwargs: Any) -> None:
        places = set(device_map.values()) if isinstance(device_map, dict) else {device_map}
        if any(str(place) == "meta" for place in places):
            raise ValueError(
                'a model on the meta device has no weights to quantize; load it with device_map=None, "cpu" or "cuda"'
            )
        calibrates = not self.pre_quantized and self.quantization_config.needs_calibration
        self._streams = calibrates and places == {"disk"}
        if calibrates and "disk" in map(str, places) and not self._streams:
            raise ValueError(
                "calibration needs the weights in memory, and device_map puts some on disk; use device_map=None, or "
                'device_map={"": "disk"}, which reads one block at a time'
            )

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        for file in checkpoint_files or []:
            if not str(file).endswith(".safetensors"):
                raise ValueError(
                    f"hf-fp4 reads safetensors only, got {Path(file).name}, which can run code when it is read; load the "
                    "model once without quantization_config and save_pretrained() it"
                )
        config = self.quantization_config
        stored = stored_names(checkpoint_files or [])
        if self.pre_quantized:
            check_shards(stored)
            self._stored = {name for name, _ in stored}
            self._insert_layers(model)
            _refuse_strangers(model, stored)
            return
        _refuse_quantized(checkpoint_files or [])
        entries = config.modules_to_not_convert or []
        take_experts_apart(model, config.fp4_format, entries)
        selection = select_linears(model, config.fp4_format, entries)
        if not config.allow_unconverted:
            require_converted(model, config.fp4_format, entries, selection)
        if config.needs_calibration:
            put_back(model, experts_in(model))
            find_blocks(model)  # what cannot be calibrated is refused before weights and text are read
        else:
            self.skipped = selection.skipped
            self._on_load = _QuantizeOnLoad(model, selection.selected, config)
            config.modules = dict(self._on_load.sizes)

    def _insert_layers(self, model: PreTrainedModel) -> None:
        config = self.quantization_config
        experts = text_experts(model)
        if any(find_saved(experts, saved.rsplit(".", 2)[0], model) for saved in config.modules or {}):
            take_apart(model, experts)
            self._reads_linears = True
        linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        sizes, missing = {}, []
        for saved, size in (config.modules or {}).items():
            found = find_saved(linears, saved, model)
            if found is None:
                missing.append(saved)
            else:
                sizes[found] = size
        if missing:
            raise ValueError(
                f"{type(model).__name__} has no linear {missing[0]} (and {len(missing) - 1} more) that the checkpoint "
                "quantized; load it with the class that it was saved from"
            )

        def factory(name: str, linear: nn.Linear) -> FP4Linear:
            return new_layer(linear, config, sizes[name], static_input_scale=config.static_input_scale)

        replace_linears(model, factory, sizes)
        config.modules = sizes

    def update_weight_conversions(  # 5.17 does not pass the model
        self, weight_conversions: list, model: PreTrainedModel | None = None
    ) -> list:
        return conversions_of_linears(weight_conversions) if self._reads_linears else weight_conversions

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        return self._on_load is not None and self._on_load.takes(param_name)

    def get_quantize_ops(self) -> ConversionOps:
        if self._on_load is None:
            raise RuntimeError("only a data-free run quantizes while weights are read")
        return self._on_load

    # --- after the weights are read

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        self._explain_backends(model)
        if self.pre_quantized:
            _check_layers(model)
            _refuse_random(model, self._stored)
        elif self._on_load is not None:
            self._on_load.finish(model)
            self.report = [LayerReport(n, size, None, None, 0.0) for n, size in self._on_load.sizes.items()]
            self._on_load = None
            _check_layers(model)
        else:
            _refuse_random_decoder(model)
            self._calibrate(model)
            self._end_streaming(model)
        if not self.pre_quantized and experts_in(model):
            loaded: Any = model  # with the conversions of its own checkpoint, which saving reverses
            loaded._weight_conversions = conversions_of_linears(loaded._weight_conversions)
        if self.skipped:
            logger.warning(f"not converted to FP4: {describe_skipped(self.skipped)}")
        use_kernels(model, self.quantization_config.kernel_source)
        refuse_merging()
        model.save_pretrained = types.MethodType(_save_in_one_step, model)  # type: ignore[method-assign]
        name = model.config.name_or_path or model.name_or_path
        self.loaded_from = str(Path(name).resolve()) if name and Path(name).is_dir() else name or ""
        model._upload_modified_files = types.MethodType(_upload_with_card, model)  # type: ignore[method-assign]
        return model

    def _end_streaming(self, model: PreTrainedModel) -> None:
        """Make of a model with weights on the disk an ordinary one on the CPU."""
        if self._streams:
            bring_to_memory(model)
            model.tie_weights()
            del model.hf_device_map

    def _explain_backends(self, model: PreTrainedModel) -> None:
        """Say once why a GPU runs the reference; before a calibration, which takes longer as well."""
        source = self.quantization_config.kernel_source
        for device in {
            tensor.device for tensor in (*model.parameters(), *model.buffers()) if not tensor.is_meta
        }:
            found = select(source, device)
            if found.module is None and found.turned_down:
                logger.warning_once(f"{describe(found, source)}. `hf-fp4 doctor` says more.")

    def _calibrate(self, model: PreTrainedModel) -> None:
        config = self.quantization_config
        text_config = model.config.get_text_config(decoder=True)
        data = calibration_batches(
            config.dataset,
            _tokenizer(config.tokenizer, model, config.dataset),
            num_samples=config.num_samples,
            sequence_length=config.sequence_length,
            batch_size=config.batch_size,
            seed=config.seed,
            vocab_size=text_config.vocab_size,
            max_length=getattr(text_config, "max_position_embeddings", None),
            model=model,
        )
        run = quantize_model(model, config, data)
        self.report, self.skipped = run.reports, run.skipped
        if few := describe_coverage(run.reports):
            logger.warning(
                "experts that got fewer calibration tokens than their input has features (the tokens in brackets), so that the "
                f"other experts' tokens make up for the rest: {few}; use more samples"
            )
        config.modules = {row.name: row.hadamard_size for row in run.reports}
        config.calibration = {
            "dataset": data.description,
            "fingerprint": data.fingerprint,
            "tokens": sum(batch.numel() for batch in data.batches),
        }

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        for name, layer in list(model.named_modules()):
            if isinstance(layer, FP4Linear):
                linear = nn.Linear(
                    layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta"
                )
                linear.weight = nn.Parameter(layer.dequantize(dtype or model.dtype))
                if layer.bias is not None:
                    linear.bias = nn.Parameter(layer.bias.detach().to(dtype or model.dtype))
                model.set_submodule(name, linear.train(layer.training))
        for name, experts in experts_in(model).items():
            model.set_submodule(name, experts.fused())
            model.__dict__["_weight_conversions"] = None  # those of the model's class
        del model.save_pretrained, model._upload_modified_files
        return model

    def is_serializable(self, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


class _QuantizeOnLoad(ConversionOps):
    """Rounds each weight as transformers reads it, so that the unquantized model is never in memory.

    Linears that share a global scale are held until all of them have been read. With a work directory what is finished is
    mapped from there, so that the quantized model is not in memory either.
    """

    def __init__(self, model: PreTrainedModel, names: list[str], config: MRGPTQConfig):
        self._config = config
        self._waiting: dict[tuple[str, ...], dict[str, torch.Tensor]] = {}
        self._failure: Exception | None = None
        self._work = None if config.work_dir is None else WorkDir(config.work_dir, {"config": recipe(config)})
        targets = set(names)
        self._partners = {name: tuple(n for n in fused_partners(name) if n in targets) for name in names}
        self._numbers = {group: number for number, group in enumerate(dict.fromkeys(self._partners.values()))}
        self.sizes = {name: self._size(name, linear_at(model, name).in_features) for name in names}

        def factory(name: str, linear: nn.Linear) -> FP4Linear:
            layer = new_layer(linear, config, self.sizes[name], static_input_scale=False)
            layer.weight = torch.empty_like(linear.weight, device="meta", requires_grad=False).detach()
            return layer

        replace_linears(model, factory, names)
        self._experts = experts_in(model)
        for experts in self._experts.values():  # transformers reads what the model's own module has
            for parameter in experts.layout.parameters:
                experts.register_parameter(parameter, getattr(experts.own, parameter))

    def takes(self, parameter: str) -> bool:
        """Whether `convert` is for this tensor, by its full name."""
        module, _, leaf = parameter.rpartition(".")
        experts = self._experts.get(module)
        return (
            leaf == "weight"
            and module in self.sizes
            or (experts is not None and leaf in experts.layout.parameters)
        )

    def _size(self, name: str, in_features: int) -> int | None:
        size = self._config.hadamard_group_size
        if size == "auto":
            return largest_size(in_features) if self._config.rotates_without_data else None
        if isinstance(size, int):
            require_divisor(size, in_features, name)
            return size
        return None

    def convert(  # type: ignore[override]  # like transformers' own, it returns one tensor per name
        self, input_dict: dict[str, Any], **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        ((key, value),) = input_dict.items()
        value = value[0] if isinstance(value, list) else value
        module, _, leaf = key.rpartition(".")
        if module not in self._experts:
            return self._convert_one(key, value)
        experts = self._experts[module]
        delattr(experts, leaf)
        kwargs["missing_keys"].discard(key)
        parts = experts.layout.split(leaf, value).items()
        return {name: t for n, part in parts for name, t in self._convert_one(f"{module}.{n}", part).items()}

    def _convert_one(self, key: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
        name = key.removesuffix(".weight")
        if name not in self.sizes:  # an expert's bias, or a linear that stays as it is
            return {key: value.clone()}
        group = self._partners[name]
        waiting = self._waiting.setdefault(group, {})
        waiting[name] = value
        if len(waiting) < len(group):
            return {}
        try:
            return self._finished(self._numbers[group], self._waiting.pop(group))
        except (ValueError, OSError) as error:  # transformers would bury it in its loading report
            self._failure = self._failure or error
            return {}

    def _finished(self, number: int, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The group's quantized tensors, which an earlier run may have left in the work directory."""
        if self._work is None:
            return self._quantize(weights)
        source = {"weights": weights_fingerprint(weights.items())}
        if self._work.load(number) is None:
            self._work.save(number, self._quantize(weights), source)
            return_freed_memory()
        tensors, found = self._work.load(number) or ({}, {})
        if found != source:
            raise ValueError(
                f"work_dir {self._config.work_dir} belongs to another run: the weights of {', '.join(weights)} differ; give "
                "this run a directory of its own, or delete that one to start over"
            )
        device = next(iter(weights.values())).device
        return {name: tensor.to(device) for name, tensor in tensors.items()}

    def _quantize(self, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        fmt, rule = self._config.fp4_format, self._config.weight_rule
        for name, weight in weights.items():
            require_finite(weight, f"the weight of {name}")
        global_scale = None
        if fmt.has_global_scale:
            absmax = [
                part.abs().amax().cpu() for name in weights for part in self._rotated(name, weights[name])
            ]
            global_scale = weight_global_scale(torch.stack(absmax).amax().view(1))
        tensors = {}
        for name, weight in weights.items():
            divisor = None if global_scale is None else global_scale.to(weight.device, copy=True)
            search = select(self._config.kernel_source, weight.device).search_scales
            parts = [
                round_weight(part, weight_scales(part, fmt, rule, divisor, search=search), fmt, divisor)
                for part in self._rotated(name, weight)
            ]
            tensors[f"{name}.weight"] = torch.cat([part.packed for part in parts])
            tensors[f"{name}.weight_scale"] = torch.cat([part.scale for part in parts])
            if divisor is not None:
                tensors[f"{name}.weight_global_scale"] = divisor
        return tensors

    def _rotated(self, name: str, weight: torch.Tensor) -> Iterator[torch.Tensor]:
        """The rotated weight in float32, some rows at a time."""
        values = _ROUNDED_AT_ONCE.get(weight.device.type, _ROUNDED_AT_ONCE_ELSEWHERE)
        for rows in weight.split(max(1, values // weight.shape[1])):
            yield rotate(rows, self.sizes[name])

    def finish(self, model: PreTrainedModel) -> None:
        """Raise what went wrong; a weight that never came is an error, not a random layer."""
        if self._failure is not None:
            raise self._failure
        weights = {name: model.get_buffer(f"{name}.weight") for name in self.sizes}
        absent = [n for group, got in self._waiting.items() for n in group if n not in got] or [
            name
            for name, weight in weights.items()
            if not (weight.is_meta or getattr(weight, "_is_hf_initialized", False))
        ]
        if absent:
            raise ValueError(
                f"the checkpoint has no weight for {absent[0]} (and {len(absent) - 1} more); if the model is to have random "
                "weights there, as a new pooler has, name them in modules_to_not_convert"
            )
        offloaded = next((name for name, weight in weights.items() if weight.is_meta), None)
        if offloaded is not None:
            raise ValueError(
                f"a weight cannot be quantized and offloaded in one step, got offload_buffers=True and {offloaded} on "
                "disk; load with offload_buffers=False, or save the quantized model and load that"
            )


def _refuse_quantized(checkpoint_files: list[str]) -> None:
    """Refuse a checkpoint that a method unknown to transformers quantized: transformers would read it as if it were not."""
    for directory in {Path(file).parent for file in checkpoint_files}:
        file = directory / "config.json"
        found = quantization_of(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}
        if found:
            raise ValueError(
                f"the checkpoint is quantized already (quant_method {found.get('quant_method')!r} in its config.json); "
                "quantize the original model, or load this one without quantization_config"
            )


def _check_layers(model: PreTrainedModel) -> None:
    """Refuse a model in which a tensor of an FP4 layer was never read, or holds what no quantizer writes."""
    for name, module in model.named_modules():
        if not isinstance(module, FP4Linear) or module.weight.is_meta:
            continue  # offloaded: accelerate brings it to memory when it runs
        for key, tensor in (*module.named_buffers(recurse=False), *module.named_parameters(recurse=False)):
            if not getattr(tensor, "_is_hf_initialized", False):
                raise ValueError(
                    f"the checkpoint has no tensor {name}.{key}; it is damaged or incomplete: download or quantize it again"
                )
        # transformers does not compare all shapes and dtypes of a quantized model with what the layer expects.
        expected = {"weight": (torch.uint8, [module.out_features, module.in_features // 2])}
        if module.bias is not None:
            expected["bias"] = (module.bias.dtype, [module.out_features])
            require_finite(module.bias, f"the bias of {name}")
        for key, (dtype, shape) in expected.items():
            tensor = getattr(module, key)
            if (tensor.dtype, list(tensor.shape)) != (dtype, shape):
                raise ValueError(
                    f"{name}.{key} must be {dtype} {shape}, got {tensor.dtype} {list(tensor.shape)}; the checkpoint is "
                    "damaged or incomplete: download or quantize it again"
                )
        module.check(name)


def _refuse_strangers(model: PreTrainedModel, stored: list[tuple[str, Path]]) -> None:
    """Refuse tensors of an FP4 layer that it has no use for: they are of another format, or the config was changed."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, FP4Linear)}
    for key, file in stored:
        saved, _, leaf = key.rpartition(".")
        name = find_saved(layers, saved, model)
        if name is None:
            continue
        layer = layers[name]
        tensors = (*layer.named_buffers(recurse=False), *layer.named_parameters(recurse=False))
        if leaf not in dict(tensors):
            raise ValueError(
                f"a linear of this checkpoint has {', '.join(dict(tensors))}, got {key} in {file}; files of two checkpoints "
                "are mixed up, or config.json was changed: download or quantize it again"
            )


def _refuse_random(model: PreTrainedModel, stored: set[str]) -> None:
    """Refuse a parameter that no file has, which transformers fills with random numbers; but a new head gets those."""
    if type(model).__name__ not in (model.config.architectures or []):
        return
    # In `stored` are those of another shape too, when the caller said that shapes may differ.
    absent = [name for name in _never_read(model) if name not in stored]
    if absent:
        raise ValueError(
            f"the checkpoint has no tensor {absent[0]} (and {len(absent) - 1} more); it is damaged or incomplete: download or "
            "quantize it again"
        )


def _refuse_random_decoder(model: PreTrainedModel) -> None:
    """Refuse to calibrate on random numbers, which transformers puts where no file has a parameter; a head may be new."""
    decoder = {id(parameter) for parameter in model.get_decoder().parameters()}
    absent = [name for name, parameter in _never_read(model).items() if id(parameter) in decoder]
    if absent:
        raise ValueError(
            f"calibration needs a trained model, and the checkpoint has no weight for {absent[0]} (and {len(absent) - 1} more), "
            "which would be random; it is damaged or incomplete: download it again"
        )


def _never_read(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """The parameters that no file has, and should have."""
    ignored = model._keys_to_ignore_on_load_missing or ()
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if not (parameter.is_meta or getattr(parameter, "_is_hf_initialized", False))
        and not any(re.search(pattern, name) for pattern in ignored)
    }


def _tokenizer(tokenizer: Any, model: PreTrainedModel, dataset: Any) -> Any:
    """The tokenizer that was given, or the one beside the model; None when there is none (token ids need none)."""
    if tokenizer is not None and not isinstance(tokenizer, (str, os.PathLike)):
        return tokenizer
    source = tokenizer or model.config.name_or_path or model.name_or_path
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        if tokenizer is not None:
            raise ValueError(f"tokenizer={str(tokenizer)!r} could not be loaded: {error}") from error
        return None


def _save_in_one_step(
    model: PreTrainedModel, save_directory: str | os.PathLike, *args: Any, **kwargs: Any
) -> None:
    """`save_pretrained` that changes nothing in ``save_directory`` unless it succeeds."""
    layers = [module for module in model.modules() if isinstance(module, (FP4Linear, FP4Experts))]
    with staged(save_directory) as staging, ExitStack() as stored:
        for layer in layers:  # one by one: a state dict of restored weights would hold all of them twice
            stored.enter_context(layer.stored_layout())
        if kwargs.get("push_to_hub"):
            kwargs.setdefault("repo_id", Path(save_directory).name)
        type(model).save_pretrained(model, staging, *args, **kwargs)
        there = Path(save_directory) / CARD_NAME
        write_card(model, staging, there if there.is_file() else staging / CARD_NAME)


def _upload_with_card(
    model: PreTrainedModel, working_dir: str | os.PathLike, repo_id: str, *args: Any, **kwargs: Any
) -> Any:
    """What transformers calls when files to push are saved, and the card in the repository was put beside them."""
    directory, token, revision = Path(working_dir), kwargs.get("token"), kwargs.get("revision")
    existing = card_on_hub(repo_id, revision, token) if revision else None  # transformers looks at main only
    write_card(
        model, directory, existing or directory / CARD_NAME, model_id=repo_id, token=token, online=True
    )
    return type(model)._upload_modified_files(model, working_dir, repo_id, *args, **kwargs)
