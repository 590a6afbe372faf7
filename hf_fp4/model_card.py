"""The model card: README.md of a saved or pushed checkpoint, rendered from ``model_cards/template.md``.

A card that is there already keeps its text: only the section between our markers and our metadata are replaced.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
import yaml
from huggingface_hub import CardData, EvalResult, ModelCard, ModelCardData, RepoCard, hf_hub_download
from huggingface_hub.repocard_data import eval_results_to_model_index
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .checkpoint_files import staged
from .config import MRGPTQConfig
from .layers.linear import FP4Linear
from .layers.replace import describe_skipped
from .other_layouts import IMPORTED

logger = logging.get_logger(__name__)

CARD_NAME = "README.md"

_BEGIN = "<!-- hf-fp4: begin. hf-fp4 writes this section anew on every save; write your own text outside of it. -->"
_END = "<!-- hf-fp4: end -->"
_SECTION = re.compile(r"<!-- hf-fp4: begin\b.*?<!-- hf-fp4: end -->", re.DOTALL)

_INHERITED = ("base_model", "base_model_relation", "license", "license_name", "license_link", "language")
_TAGS = ("hf-fp4", "fp4", "nvfp4", "mxfp4", "w4a4", "w4a16", "mr-gptq", "rtn")
"""Tags that are ours to set and to remove."""

_MEASURED_BY = "hf-fp4 evaluate"
_METRICS = {
    "kl_divergence": "KL divergence to the original model, nats per token",
    "top1_agreement": "Share of positions with the original model's most likely token",
    "perplexity": "Perplexity",
    "reference_perplexity": "Perplexity of the original model",
}

_FORMATS = {
    "nvfp4": "NVFP4: E2M1 values; 16 share an E4M3 scale, and a tensor an FP32 scale",
    "mxfp4": "MXFP4: E2M1 values; 32 share a power of two (E8M0)",
}
_METHODS = {
    "mr-gptq": "MR-GPTQ ([arXiv 2509.23202](https://arxiv.org/abs/2509.23202)) as hf-fp4 extends it",
    "rtn": "rounding to nearest",
}
_DEFAULT_NAME = "path/to/this/model"
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_CACHED = re.compile(r"models--([\w.-]+?)(?:--([\w.-]+?))?/snapshots/[^/]+/?$")
_UNREADABLE = (OSError, ValueError, yaml.YAMLError)


@dataclass(frozen=True)
class Measurement:
    """What `evaluate` found on a text, for the card. ``text`` is the name of the text, not its path."""

    text: str
    result: Mapping[str, float | int | None]


@dataclass(frozen=True)
class Origin:
    """What is known of the model that was quantized: metadata to inherit, and what was measured before."""

    metadata: dict[str, Any]
    results: list[dict[str, Any]]


# --- writing (metadata as `CardData`: `ModelCardData` would merge results of different data sets)


def write_card(
    model: PreTrainedModel,
    directory: Path,
    existing: Path,
    *,
    model_id: str = _DEFAULT_NAME,
    token: str | bool | None = None,
    online: bool = False,
) -> None:
    """Write README.md of a quantized model into ``directory``, where its weights are.

    Args:
        model: a model with FP4 layers.
        directory: where the card is written, and the size of the weights is read.
        existing: a card whose text and metadata are kept, if there is one; it may be the one that is written.
        model_id: the Hub repository that the card is for.
        token: for the original model's repository.
        online: whether to ask the Hub for the original model's card, for its license.
    """
    card = _read(existing)
    if (
        card is None or not (directory / "config.json").is_file()
    ):  # an adapter alone, or another process saves it
        return
    origin = _origin(model, card, token, online)
    _write(card, _render(model, directory, origin, origin.results, model_id), directory)


def add_measurement(model: PreTrainedModel, directory: Path, measurement: Measurement) -> None:
    """Put what was measured into the card of the checkpoint in ``directory``, from which ``model`` was loaded.

    A measurement on a text of the same name is replaced.
    """
    card = _read(directory / CARD_NAME)
    if card is None:
        raise ValueError(f"{directory / CARD_NAME} cannot be changed; correct its metadata, or remove it")
    origin = _origin(model, card, None, online=False)
    others = [r for r in origin.results if r["dataset"].get("config") != measurement.text]
    with staged(directory) as staging:
        rendered = _render(model, directory, origin, [*others, _model_index(measurement)], _DEFAULT_NAME)
        _write(card, rendered, staging)


def _read(file: Path) -> RepoCard | None:
    """The card in a file; an empty one if there is no file or only what transformers puts there; None if it is broken."""
    if not file.is_file():
        return RepoCard("---\n\n---\n")
    try:
        card = RepoCard.load(file)
    except _UNREADABLE as error:
        logger.warning(f"the model card stays as it is, since its metadata cannot be read: {error}")
        return None
    if _is_placeholder(card.text):
        card.text = ""
    return card


def _is_placeholder(text: str) -> bool:
    """Whether this is the empty form that transformers puts into a new repository, as yet not filled in."""
    sentence = re.search(r"^This is the model card of a .* automatically generated\.$", text, re.MULTILINE)
    if sentence is None:
        return False
    return (
        text.split() == ModelCard.from_template(ModelCardData(), model_description=sentence[0]).text.split()
    )


def _write(card: RepoCard, rendered: RepoCard, directory: Path) -> None:
    new = rendered.data.to_dict()
    for key, value in new.items():
        if key == "tags":
            own = card.data.get("tags") or []
            kept = [tag for tag in ([own] if isinstance(own, str) else own) if tag not in _TAGS]
            card.data["tags"] = [*kept, *value]
        elif key == "pipeline_tag":
            card.data["pipeline_tag"] = card.data.get("pipeline_tag", value)
        elif key != "model-index":
            card.data[key] = value
    index = _merged_index(card.data.pop("model-index"), new.get("model-index") or [])
    if index:
        card.data["model-index"] = index
    if not card.text.strip():
        card.text = rendered.text
    else:
        newline = "\r\n" if "\r\n" in card.text else "\n"
        section = rendered.text[rendered.text.index(_BEGIN) :].strip().replace("\n", newline)
        if _SECTION.search(card.text):
            card.text = _SECTION.sub(lambda _: section, card.text, count=1)
        else:
            card.text = f"{card.text.rstrip()}{newline}{newline}{section}{newline}"
    card.save(directory / CARD_NAME)


def card_on_hub(repo_id: str, revision: str, token: str | bool | None) -> Path | None:
    """A copy of the card that a branch has, if the branch and the card exist."""
    try:
        return Path(hf_hub_download(repo_id, CARD_NAME, revision=revision, token=token))
    except (OSError, ValueError):
        return None


# --- where the model comes from


def _origin(model: PreTrainedModel, existing: RepoCard, token: str | bool | None, online: bool) -> Origin:
    """Metadata of the card beside what the model was loaded from; before them those of the card that is there."""
    quantizer: Any = model.hf_quantizer
    name = quantizer.loaded_from
    metadata = _metadata_of(name, getattr(model.config, "_commit_hash", None), token, online)
    inherited = {key: found for key in _INHERITED if (found := metadata.get(key) or existing.data.get(key))}
    if quantizer.pre_quantized:
        results = [r for entry in _index_of(metadata) for r in entry["results"] if _is_ours(r)]
        return Origin(inherited, results)
    hub_id = _hub_id(name)
    if hub_id is not None:
        inherited |= {"base_model": hub_id, "base_model_relation": "quantized"}
    return Origin(inherited, [])


def _hub_id(name: str) -> str | None:
    """The Hub's name of a model that was loaded from there, also by the path of a snapshot in the cache."""
    cached = _CACHED.search(Path(name).as_posix())
    if cached is not None:
        return "/".join(part for part in cached.groups() if part)
    return name if _HUB_ID.fullmatch(name) and not Path(name).exists() else None


def _metadata_of(name: str, revision: str | None, token: str | bool | None, online: bool) -> dict[str, Any]:
    """Metadata of a model's card, if there is one in its directory or in the cache, or ``online`` on the Hub."""
    file = Path(name) / CARD_NAME
    try:
        if _HUB_ID.fullmatch(name) and not os.path.isdir(name):
            found = hf_hub_download(
                name, CARD_NAME, revision=revision, token=token, local_files_only=not online
            )
            file = Path(found)
        return RepoCard.load(file).data.to_dict() if name and file.is_file() else {}
    except _UNREADABLE as error:
        logger.info(f"no model card of {name}: {error}")
        return {}


# --- what was measured


def _model_index(measurement: Measurement) -> dict[str, Any]:
    """One entry of a model index."""
    result = measurement.result
    metrics = [
        EvalResult(
            task_type="text-generation",
            dataset_type="text",
            dataset_name=measurement.text,
            dataset_config=measurement.text,
            dataset_args={
                "measured_by": _MEASURED_BY,
                "tokens": result["num_tokens"],
                "window": result["sequence_length"],
            },
            metric_type=name,
            metric_value=round(value, 6),
            metric_name=text,
        )
        for name, text in _METRICS.items()
        if (value := result.get(name)) is not None
    ]
    return eval_results_to_model_index("", metrics)[0]["results"][0]


def _index_of(metadata: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The entries of a model index that have the form that one should have."""
    index = metadata.get("model-index")
    entries = index if isinstance(index, list) else []
    return [e for e in entries if isinstance(e, dict) and isinstance(e.get("results"), list)]


def _is_ours(result: Any) -> bool:
    try:
        return result["dataset"]["args"]["measured_by"] == _MEASURED_BY
    except (KeyError, TypeError):
        return False


def _merged_index(index: Any, new: list[dict[str, Any]]) -> list[Any]:
    """Another card's model index with our results taken out and the new ones put in."""
    merged: list[Any] = []
    for entry in index if isinstance(index, list) else []:
        if entry in _index_of({"model-index": [entry]}):
            results = [result for result in entry["results"] if not _is_ours(result)]
            if not results:
                continue
            entry = {**entry, "results": results}
        merged.append(entry)
    return merged + new


# --- the text


def _render(
    model: PreTrainedModel, directory: Path, origin: Origin, results: list[dict[str, Any]], model_id: str
) -> RepoCard:
    """A new card."""
    quantizer: Any = model.hf_quantizer
    config: MRGPTQConfig = quantizer.quantization_config
    base = origin.metadata.get("base_model")
    base = base if isinstance(base, str) else None
    short = base.rpartition("/")[2] if base else type(model).__name__
    title = f"{short}-{config.format.upper()}"
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, FP4Linear)}
    generates = type(model).__name__.endswith("ForCausalLM")
    metadata: dict[str, Any] = {
        **origin.metadata,
        "library_name": "transformers",
        "pipeline_tag": "text-generation" if generates else None,
        "tags": _tags(config),
        "model-index": [{"name": title, "results": results}] if results else None,
    }
    link = f"[{base}](https://huggingface.co/{base})" if base else ""
    per_token = config.fp4_format.has_global_scale and config.activations == "fp4" and not config.calibration
    values: dict[str, Any] = {
        "title": title,
        "begin": _BEGIN,
        "end": _END,
        "source": link or "A model from a local directory",
        "base_link": f": {link}" if link else "",
        "format_name": config.format.upper(),
        "format_text": _FORMATS[config.format],
        "activations": _activations(config),
        **_how(config),
        "quantized": _quantized(layers),
        "rotated": sum(layer.hadamard_size is not None for layer in layers.values()),
        "kept": _kept(model, layers),
        "size": _sizes(model, directory),
        "measured": [_row(result) for result in results],
        "auto_class": _auto_class(model),
        "generates": generates,
        "model_id": model_id,
        "export_flags": "--activations bf16 " if per_token else "",
        "tensors": _tensors(config, layers),
    }
    return RepoCard.from_template(CardData(**metadata), template_path=str(_template()), **values)


def _template() -> Path:
    """In an installed package its own copy, in a checkout the repository's."""
    inside = Path(__file__).parent / "model_cards" / "template.md"
    return inside if inside.is_file() else Path(__file__).parents[1] / "model_cards" / "template.md"


def _tags(config: MRGPTQConfig) -> list[str]:
    bits = "w4a4" if config.activations == "fp4" else "w4a16"
    return ["hf-fp4", "fp4", config.format, bits, config.method]


def _cell(text: str) -> str:
    """Text from elsewhere as one cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _activations(config: MRGPTQConfig) -> str:
    if config.activations == "bf16":
        return "W4A16: weights only"
    return (
        f"W4A4: activations are quantized when the model runs, by block scales of the rule "
        f"`{config.activation_scale_rule}`"
    )


def _recipe(config: MRGPTQConfig) -> str:
    """The fields that a user would pass, other than the data."""
    default = MRGPTQConfig(format=config.format, activations=config.activations)
    always = ["format"] if config.activations == "fp4" else ["format", "activations"]
    left_out = ("dataset", "modules", "calibration", "quant_method", "how_to_load")
    given = {
        name: value
        for name, value in config.to_dict().items()
        if name not in left_out and (name in always or value != getattr(default, name))
    }
    return f"MRGPTQConfig({', '.join(f'{name}={value!r}' for name, value in given.items())})"


def _how(config: MRGPTQConfig) -> dict[str, Any]:
    """Who quantized the model, in what way, and what limits that sets."""
    if str(config.dataset).startswith(IMPORTED):
        tool = _cell(str(config.dataset).removeprefix(IMPORTED))
        limit = "How it was calibrated, if at all, is not known here."
        return {"tool": f"another tool ({tool}), and imported by hf-fp4", "how": [], "data_limit": limit}
    how = [("method", _METHODS[config.method]), ("recipe", f"`{_cell(_recipe(config))}`")]
    data = config.calibration
    if data:
        if config.equalize:
            taken = (
                "what makes them (norms, rows of linears) took powers of two, which changes nothing by itself"
            )
            how.append(("equalized", "channels of inputs; " + taken))
        text = _cell(str(data.get("dataset")))
        tokens, digest = data.get("tokens"), str(data.get("fingerprint", ""))[:12]
        how.append(("calibration data", f"{text} ({tokens} tokens, SHA-256 {digest}...)"))
        limit = "It was calibrated on the data above; on other kinds of text, or in other languages, it may lose more."
    else:
        how.append(("calibration data", "none"))
        limit = "No calibration data was used; with it, less is usually lost."
    return {"tool": "hf-fp4", "how": how, "data_limit": limit}


def _quantized(layers: Mapping[str, FP4Linear]) -> str:
    sizes = Counter(layer.hadamard_size for layer in layers.values())
    parts = [f"{n} by blocks of {size}" for size, n in sorted(sizes.items(), key=lambda s: s[0] or 0) if size]
    return f"{len(layers)} linear layers, of which rotated: {', '.join(parts) or 'none'}"


def _kept(model: PreTrainedModel, layers: Mapping[str, FP4Linear]) -> str:
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in layers]
    names = describe_skipped(dict.fromkeys(linears, "linears")).partition(": ")[2]
    dtype = str(model.dtype).removeprefix("torch.")
    return f"{f'the linear layers {names}; ' if names else ''}everything that is no linear layer ({dtype})"


def unquantized_bytes(model: PreTrainedModel) -> int:
    """What the weights would take in the model's dtype if no linear were quantized."""
    packed = (m.in_features * m.out_features for m in model.modules() if isinstance(m, FP4Linear))
    others = (p.numel() * p.element_size() for p in model.parameters())  # an FP4Linear's weight is a buffer
    return sum(packed) * model.dtype.itemsize + sum(others)


def size_text(count: float) -> str:
    """Bytes for a person."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _sizes(model: PreTrainedModel, directory: Path) -> str:
    saved = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    dtype = str(model.dtype).removeprefix("torch.")
    return f"{size_text(saved)}; unquantized {size_text(unquantized_bytes(model))} in {dtype}"


def _row(result: Mapping[str, Any]) -> list[str]:
    values = {metric["type"]: metric["value"] for metric in result["metrics"]}

    def number(name: str, form: str) -> str:
        return format(values[name], form) if name in values else "-"

    args = result["dataset"]["args"]
    return [
        _cell(str(result["dataset"]["name"])),
        str(args["tokens"]),
        str(args["window"]),
        number("kl_divergence", ".4f"),
        number("top1_agreement", ".1%"),
        number("perplexity", ".2f"),
        number("reference_perplexity", ".2f"),
    ]


def _auto_class(model: PreTrainedModel) -> str:
    name = type(model).__name__
    auto = f"AutoModelFor{name.partition('For')[2]}"
    return next((n for n in (auto, name) if hasattr(transformers, n)), "AutoModel")


def _tensors(config: MRGPTQConfig, layers: Mapping[str, FP4Linear]) -> list[tuple[str, str]]:
    group = config.fp4_format.group_size
    rows = [("weight", "uint8 [out, in/2]: two E2M1 codes, the low nibble is the even column")]
    if config.fp4_format.has_global_scale:
        rows += [
            ("weight_scale", f"float8_e4m3fn [out, in/{group}]: block scales"),
            ("weight_global_scale", "float32 [1], a divisor: w = e2m1 * weight_scale / weight_global_scale"),
        ]
    else:
        rows += [("weight_scale", f"uint8 [out, in/{group}]: E8M0 block scales, w = e2m1 * 2^(scale - 127)")]
    if any(layer.input_global_scale is not None for layer in layers.values()):
        rows.append(("input_global_scale", "float32 [1], a divisor of the input's block scales"))
    if any(layer.bias is not None for layer in layers.values()):
        rows.append(("bias", "[out]: as in the original model"))
    return rows
