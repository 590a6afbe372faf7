"""Which modules of a model become FP4, decided once for loading with RTN, for calibration and for reloading.

The decision reads only names, classes and shapes, so it is the same on a meta-device skeleton and on a loaded model.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..formats import FP4Format
from .experts import experts_in, layout_of_experts, put_back, take_apart

OUTPUT_EMBEDDINGS = "output embeddings are never converted"
ROUTER = "an MoE router or gate is never converted"
FUSED_EXPERTS = "experts in a form that is not understood"
NOT_TEXT = "it is not part of the text model"
TASK_HEAD = "a task head is never converted"
KEPT_IN_FLOAT32 = "the model keeps it in float32"
CAST_TO_ITS_DTYPE = "the model casts the input to its weight's dtype, and packed weights are uint8"

# A pattern ends where a module name ends: "layers.1" must not exclude layers.11.
_BOUNDARY = r"(?:(?<=\.)|(?=\.|$))"
# For projectors that a multimodal model keeps within its text model.
_NOT_TEXT = re.compile(r"(?:^|[._])(?:vision|visual|image|img|audio|speech|video|projector)(?:[._]|$)")
_LONGEST_LIST = 5


@dataclass(frozen=True)
class Selection:
    """`selected`: full names of the linears to convert, in module order; `skipped`: full name -> why it is not."""

    selected: list[str]
    skipped: dict[str, str]


def select_linears(
    model: PreTrainedModel,
    fmt: FP4Format,
    modules_to_not_convert: list[str] | None = None,
    *,
    require_match: bool = True,
) -> Selection:
    """Decide which linears of `model` (also on the meta device) become FP4 linears.

    Converted are modules whose class is exactly `nn.Linear`: a subclass may compute something else, or its owner may
    read `weight` directly (`nn.MultiheadAttention` does). Any out_features is accepted.

    `modules_to_not_convert`: as in transformers; an entry excludes a module when it matches the module's full name
    from the start up to a dot or the end (as a regular expression), or is a suffix of it. `require_match=False` is for
    reloading a checkpoint, where a model with another head need not have every module of the first one.

    Raises ValueError when an entry matches no module of the model, or when no linear converts.
    """
    entries = list(modules_to_not_convert or [])
    _check_entries(model, entries, require_match)
    rules = _Rules(model, fmt, entries)
    selected: list[str] = []
    skipped: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            reason = rules.reason_to_skip(name, module)
            if reason is None:
                selected.append(name)
            else:
                skipped[name] = reason
        elif isinstance(module, Conv1D):
            skipped[name] = "transformers' Conv1D is not supported"
        else:
            skipped.update(rules.fused_experts(name, module))
    if not selected:
        found = describe_skipped(skipped) or "it has none"
        raise ValueError(
            f"expected a model with linears that {fmt.value} can hold, got {type(model).__name__} where none "
            f"converts ({found}); choose another model or format, or shorten modules_to_not_convert"
        )
    return Selection(selected, skipped)


def text_experts(model: PreTrainedModel) -> list[str]:
    """Full names of the modules of the text model that hold experts in 3-D parameters and are understood."""
    rules = _Rules(model, FP4Format.NVFP4, [])  # whichever: only what is text is asked
    understood = [n for n, module in model.named_modules() if layout_of_experts(module) is not None]
    return [name for name in understood if not rules.outside_text_model(name)]


def take_experts_apart(model: PreTrainedModel, fmt: FP4Format, modules_to_not_convert: list[str]) -> None:
    """Make linears of all experts of the text model that transformers keeps in 3-D parameters, if any of them converts."""
    taken = take_apart(model, text_experts(model))
    rules = _Rules(model, fmt, modules_to_not_convert)
    linears = (
        (f"{name}.{child}", linear)
        for name, experts in taken.items()
        for child, linear in experts.named_modules()
        if isinstance(linear, nn.Linear)
    )
    converts = any(rules.reason_to_skip(name, linear) is None for name, linear in linears)
    if not converts:
        put_back(model, taken)
        return
    for experts in taken.values():
        experts.release()


def require_converted(
    model: PreTrainedModel, fmt: FP4Format, modules_to_not_convert: list[str], selection: Selection
) -> None:
    """Raise ValueError if less than half of what a user expects to be converted is.

    That is every parameter of the text model but its embeddings, its output head, linears that the format does not fit, and
    what ``modules_to_not_convert`` names.
    """
    rules = _Rules(model, fmt, modules_to_not_convert)
    expected = sum(
        parameter.numel()
        for name, module in model.named_modules()
        if rules.is_expected(name, module)
        for parameter in module.parameters(recurse=False)
    )
    converted = sum(linear_at(model, name).weight.numel() for name in selection.selected)
    if 2 * converted < expected:
        raise ValueError(
            f"expected to convert most of {type(model).__name__}, got {1 - converted / expected:.0%} of its parameters that "
            f"would stay as they are, embeddings and output head not counted ({describe_skipped(selection.skipped)}); name "
            "what is to stay in modules_to_not_convert, or pass allow_unconverted=True to MRGPTQConfig"
        )


def linear_at(model: nn.Module, name: str) -> nn.Linear:
    """The linear with this full name; ValueError if there is something else."""
    linear = model.get_submodule(name)
    if not isinstance(linear, nn.Linear):
        raise ValueError(
            f"expected an nn.Linear at {name}, got {type(linear).__name__}; was it converted before?"
        )
    return linear


def replace_linears(
    model: nn.Module, factory: Callable[[str, nn.Linear], nn.Module], names: Iterable[str]
) -> None:
    """Set `factory(name, linear)` in the place of each named linear; it inherits the linear's training flag."""
    for name in names:
        linear = linear_at(model, name)
        model.set_submodule(name, factory(name, linear).train(linear.training))


def describe_skipped(skipped: Mapping[str, str]) -> str:
    """One line for a log: equal reasons together, layer numbers as `*`, long lists as their common parent.

    `in_features must be a multiple of 16 for nvfp4, got 200: model.layers.*.mlp.down_proj (x32)`
    """
    by_reason: dict[str, Counter[str]] = {}
    for name, reason in skipped.items():
        pattern = re.sub(r"(?<![^.])\d+(?![^.])", "*", name)
        by_reason.setdefault(reason, Counter())[pattern] += 1
    return "; ".join(f"{reason}: {_describe_names(patterns)}" for reason, patterns in by_reason.items())


def tower_names(model: PreTrainedModel) -> list[str]:
    """Full names of the parts that read images, audio or video instead of text.

    These are submodels that declare no text among their `input_modalities`, and what `get_encoder(modality)` names.
    """
    bodies = (model.base_model, model.get_decoder())
    encoders = [model.get_encoder(modality=modality) for modality in ("image", "audio")]
    return [
        name
        for name, module in model.named_modules()
        if any(module is encoder for encoder in encoders)
        or (isinstance(module, PreTrainedModel) and "text" not in _modalities(module))
        # A speech model's own body need not declare text either, although the decoder in it does the reading.
        if not any(body is part for part in module.modules() for body in bodies)
    ]


@dataclass(frozen=True)
class _Submodel:
    """A PreTrainedModel within the model: a linear in it, but in none of its `bodies`, belongs to a head.

    `text_roots`: the parts outside which nothing converts.
    """

    name: str
    bodies: list[str]
    text_roots: list[str]


class _Rules:
    """The reasons for which a module of one model is skipped; everything that needs the whole model is found once."""

    def __init__(self, model: PreTrainedModel, fmt: FP4Format, entries: list[str]) -> None:
        submodels = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
        self.model = model
        self.fmt = fmt
        self.entries = entries
        self.towers = tower_names(model)
        self.is_multimodal = _is_multimodal(model, self.towers)
        self.submodels = _describe_submodels(model, submodels, self.towers)
        self.heads = {id(submodel.get_output_embeddings()) for submodel in submodels}
        self.tied = _tied_weights(model)
        self.aliases = _aliases(model)
        self.expert_counts = _expert_counts(model)
        self.experts = list(experts_in(model))
        self.parameters = model.num_parameters()
        kept = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
        self.kept_in_float32 = [re.compile(rf"(?:^|\.){pattern}(?:\.|$)") for pattern in sorted(kept)]

    def reason_to_skip(self, name: str, linear: nn.Linear) -> str | None:
        if id(linear) in self.heads:
            return OUTPUT_EMBEDDINGS
        if outside := self.outside_text_model(name):
            return outside
        if not all(_inside_any(name, part.bodies) for part in self.submodels if _inside(name, part.name)):
            return TASK_HEAD
        if type(linear) is not nn.Linear:
            return f"{type(linear).__name__} is a subclass of nn.Linear that may compute something else"
        if f"{name}.weight" in self.tied:
            return "its weight is tied to another module's"
        if name in self.aliases:
            return f"it is the same module as {self.aliases[name]}"
        if self._is_router(name, linear):
            return ROUTER
        if any(pattern.search(name) for pattern in self.kept_in_float32):
            return KEPT_IN_FLOAT32
        if self._casts_to_dtype_of(name):
            return CAST_TO_ITS_DTYPE
        if listed := self._listed(name):
            return listed
        if linear.in_features % self.fmt.group_size:
            expected = f"in_features must be a multiple of {self.fmt.group_size} for {self.fmt.value}"
            return f"{expected}, got {linear.in_features}"
        return None

    def fused_experts(self, name: str, module: nn.Module) -> dict[str, str]:
        """Weights of several experts that `module` itself holds in one parameter."""
        if self.outside_text_model(name) or isinstance(module, (nn.modules.conv._ConvNd, nn.Embedding)):
            return {}
        found = {}
        for key, parameter in module.named_parameters(recurse=False):
            full_name = f"{name}.{key}" if name else key
            stacked = parameter.dim() == 3 and (
                "expert" in full_name or parameter.shape[0] in self.expert_counts
            )
            flat = parameter.dim() == 2 and "experts" in full_name.split(".") and "bias" not in key
            if stacked or flat:
                share = parameter.numel() / self.parameters
                found[full_name] = self._listed(name) or f"{FUSED_EXPERTS} ({share:.1%} of the parameters)"
        return found

    def is_expected(self, name: str, module: nn.Module) -> bool:
        """Whether a user expects the parameters that `module` itself holds to be converted."""
        return not (
            isinstance(module, nn.Embedding)
            or (isinstance(module, nn.Linear) and module.in_features % self.fmt.group_size)
            or id(module) in self.heads
            or self.outside_text_model(name)
            or self._listed(name)
        )

    def _listed(self, name: str) -> str | None:
        """The entry of modules_to_not_convert that names a module, or the experts that it is part of, as a reason."""
        names = [name, *(experts for experts in self.experts if _inside(name, experts))]
        entry = next((entry for entry in self.entries for n in names if _matches(n, entry)), None)
        return entry and f'"{entry}" is in modules_to_not_convert'

    def outside_text_model(self, name: str) -> str | None:
        for tower in self.towers:
            if _inside(name, tower):
                return f"{tower} is not part of the text model"
        parts = [part.text_roots for part in self.submodels if _inside(name, part.name)]
        in_text = all(_inside_any(name, roots) for roots in parts)
        if not in_text or (self.is_multimodal and _NOT_TEXT.search(name)):
            return NOT_TEXT
        return None

    def _casts_to_dtype_of(self, name: str) -> bool:
        """Whether the owner's forward holds `x.to(self.wo.weight.dtype)`, and does not spare uint8 weights."""
        owner, _, child = name.rpartition(".")
        source = _source(type(self.model.get_submodule(owner)).forward)
        cast = rf"\.to\((?:dtype=)?self\.{child}\.weight\.dtype\)"
        return re.search(cast, source) is not None and "torch.uint8" not in source

    def _is_router(self, name: str, linear: nn.Linear) -> bool:
        last_two = name.split(".")[-2:]
        if any("router" in part.split("_") for part in last_two):
            return True
        is_gate = any(part == "gate" or part.endswith("_gate") for part in last_two)
        return is_gate and linear.out_features in self.expert_counts | {1}


def _check_entries(model: nn.Module, entries: list[str], require_match: bool) -> None:
    names = [name for name, _ in model.named_modules() if name]
    unmatched = []
    for entry in entries:
        if not isinstance(entry, str) or not entry:
            raise ValueError(f"modules_to_not_convert: expected module names, got {entry!r}; remove it")
        try:
            matched = any(_matches(name, entry) for name in names)
        except re.error as error:
            raise ValueError(
                f"modules_to_not_convert: expected module names or regular expressions, got {entry!r} ({error}); "
                'write ".*" for any characters'
            ) from error
        if not matched:
            unmatched.append(entry)
    if unmatched and require_match:
        raise ValueError(
            f"modules_to_not_convert: expected names of modules of {type(model).__name__}, got {unmatched} which match "
            f"none; they look like {', '.join(names[-3:])}"
        )


def find_saved(modules: Container[str], saved: str, model: PreTrainedModel) -> str | None:
    """The name in ``modules`` of what a checkpoint calls ``saved``; None if it is not there.

    A model with a head holds under its ``base_model_prefix`` what the bare model holds by itself.
    """
    prefix = f"{model.base_model_prefix}."
    return next((n for n in (saved, saved.removeprefix(prefix), prefix + saved) if n in modules), None)


def _matches(name: str, entry: str) -> bool:
    """The meaning of `should_convert_module` in transformers 5.23, negated.

    It is not called because in 5.17 "layers.1" also excludes layers.11: a checkpoint must select the same linears
    whichever version reloads it.
    """
    return name.endswith(entry) or re.match(rf"(?:{entry}){_BOUNDARY}", name) is not None


@functools.cache
def _source(function: Callable) -> str:
    try:
        return inspect.getsource(inspect.unwrap(function))
    except OSError:  # typed into an interpreter
        return ""


def _modalities(model: PreTrainedModel) -> set[str]:
    declared = model.input_modalities
    return {declared} if isinstance(declared, str) else set(declared)


def _is_multimodal(model: PreTrainedModel, towers: list[str]) -> bool:
    modalities = _modalities(model)
    return "text" in modalities and (len(modalities) > 1 or bool(towers))


def _describe_submodels(
    model: PreTrainedModel, submodels: list[PreTrainedModel], towers: list[str]
) -> list[_Submodel]:
    names = {id(module): name for name, module in model.named_modules()}
    described = []
    for part in submodels:
        name, base, decoder = (names[id(module)] for module in (part, part.base_model, part.get_decoder()))
        roots = [name]
        if _is_multimodal(part, [tower for tower in towers if _inside(tower, name)]):
            roots = [decoder]
            if getattr(part.config, "is_encoder_decoder", False):
                roots.append(names[id(part.get_encoder())])
        described.append(_Submodel(name, [base, decoder], roots))
    return described


def _tied_weights(model: PreTrainedModel) -> set[str]:
    """Full names of weights that are, or once loaded will be, the same tensor as another weight."""
    names: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    # named_modules leaves out aliases: a module with two names is not tied to itself.
    weights = {f"{name}.weight" for name, _ in model.named_modules()}
    shared = (group & weights for group in names.values())
    tied = {name for group in shared if len(group) > 1 for name in group}
    return tied.union(model.all_tied_weights_keys.keys(), model.all_tied_weights_keys.values())


def _aliases(model: nn.Module) -> dict[str, str]:
    """First name of each module that is registered more than once -> another of its names."""
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if first.setdefault(id(module), name) != name:
            aliases[first[id(module)]] = name
    return aliases


def _expert_counts(model: PreTrainedModel) -> set[int]:
    """Every number of experts in the config and its sub-configs (num_local_experts, n_routed_experts, ...)."""
    counts: set[int] = set()
    configs = [model.config.to_dict()]
    while configs:
        for key, value in configs.pop().items():
            if isinstance(value, dict):
                configs.append(value)
            elif str(key).endswith("experts"):
                values = value if isinstance(value, (list, tuple)) else [value]
                counts.update(item for item in values if isinstance(item, int))
    return counts


def _inside(name: str, parent: str) -> bool:
    return not parent or name == parent or name.startswith(f"{parent}.")


def _inside_any(name: str, parents: Iterable[str]) -> bool:
    return any(_inside(name, parent) for parent in parents)


def _describe_names(patterns: Counter[str]) -> str:
    if len(patterns) > _LONGEST_LIST and (parent := _common_parent(list(patterns))):
        return f"{parent}.* (x{patterns.total()})"
    shown = [name if count == 1 else f"{name} (x{count})" for name, count in patterns.items()]
    rest = len(shown) - _LONGEST_LIST
    return ", ".join(shown[:_LONGEST_LIST]) + (f" and {rest} more" if rest > 0 else "")


def _common_parent(names: list[str]) -> str:
    parts = [name.split(".") for name in names]
    shared = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    return ".".join(shared)
