"""Decoder blocks of any causal LM: find them, record what enters them, run them one at a time.

Nothing here knows a model by name. `probe` runs the model once and verifies everything the block-by-block loop relies
on: each block is called once and in order, its output is the next block's input, and nothing else passes between blocks.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..layers.experts import FP4Experts
from ..layers.replace import tower_names
from .offload import tensors_on_disk

_FINGERPRINT_VALUES = 64


class _StopForward(Exception):
    """Ends a forward early, on purpose."""


@dataclass(frozen=True)
class Blocks:
    """The decoder blocks: the ModuleList's full name, its modules, their full names ("model.layers.0")."""

    name: str
    modules: list[nn.Module]
    names: list[str]


@dataclass(frozen=True)
class Outlet:
    """A part of a block (a name relative to it) that returns what its last linear gives, and nothing else.

    `length`: of the tuple that it returns, of which the rest is None; None when it returns the tensor.
    """

    module: str
    length: int | None

    def wrap(self, y: Tensor) -> Tensor | tuple[Tensor | None, ...]:
        """What the module returns when its last linear gives `y`."""
        return y if self.length is None else (y, *[None] * (self.length - 1))


@dataclass(frozen=True)
class BlockPlan:
    """What one forward of a block showed.

    `groups`: linears (names relative to the block) by shared input, in the order in which they are first called.
    `output_length`: length of the tuple that the block returns, None when it returns a tensor.
    `skipped`: linears that cannot be calibrated, with the reason.
    `outlets`: of the linears that are the last of a part of the block, that part.
    """

    groups: list[list[str]]
    output_length: int | None
    skipped: dict[str, str]
    outlets: dict[str, Outlet] = field(default_factory=dict)

    @property
    def output_is_tuple(self) -> bool:
        """Whether the block returns a tuple, whose first element is the hidden states."""
        return self.output_length is not None


@dataclass(frozen=True)
class BlockCall:
    """Everything a block is called with besides the hidden states (`hidden_name`: their keyword, if they have one)."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    hidden_name: str | None = None


@dataclass(frozen=True)
class BlockInputs:
    """One batch: `hidden` [B, T, hidden_size] enters block 0; `calls[i]` is the rest of the call of block i."""

    hidden: Tensor
    calls: list[BlockCall]


def find_blocks(model: PreTrainedModel) -> Blocks:
    """The outermost `nn.ModuleList` of the text decoder that holds most weights of `nn.Linear`s.

    Vision and audio towers are ignored. Raises ValueError for encoder-decoder models, and when there is no such list.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(
            f'expected a decoder-only model to calibrate, got the encoder-decoder {type(model).__name__}; use method="rtn"'
        )
    towers = {id(model.get_submodule(name)) for name in tower_names(model)}
    # A few models call their output head "decoder": then look in the whole model.
    roots = (model.get_decoder(), model)
    lists = next((found for root in roots if (found := list(_outermost_lists(root, towers)))), [])
    best = max(lists, key=_linear_elements, default=None)
    if best is None or _linear_elements(best) == 0:
        raise ValueError(
            f"expected an nn.ModuleList of decoder blocks with nn.Linear modules, got {type(model).__name__} with "
            f'{len(lists)} module lists and no linear in them; use method="rtn"'
        )
    name = next(name for name, module in model.named_modules() if module is best)
    return Blocks(name, list(best), [f"{name}.{index}" for index in range(len(best))])


@torch.no_grad()
def probe(model: PreTrainedModel, blocks: Blocks, input_ids: Tensor) -> list[BlockPlan]:
    """Run the unquantized model once on a short batch and return one plan per block.

    Args:
        input_ids: int64 [B, T] without padding. Experts that get none of these tokens end in `skipped`.

    Raises ValueError when the model cannot be calibrated block by block, saying which block and why.
    """
    if model.training:
        raise ValueError("expected a model in evaluation mode, got one in training mode; call model.eval()")
    require_resident(blocks)
    recorder = _ProbeRecorder(blocks)
    with recorder.hooks():
        _run_model(model, blocks, input_ids)
    recorder.check_order()
    plans = [recorder.plan(index) for index in range(len(blocks.modules))]
    hidden, calls = _record_calls(model, blocks, plans, input_ids)
    require_finite(hidden, f"the input of {blocks.names[0]}")
    for name, real, recorded in zip(blocks.names, recorder.calls, calls, strict=True):
        if not _same(real.args, recorded.args) or not _same(real.kwargs, recorded.kwargs):
            raise ValueError(
                f"{name}: expected arguments that do not depend on what other blocks compute, got shared state (such "
                'as keys and values reused by later blocks); the model cannot be calibrated, use method="rtn"'
            )
    return plans


def capture_block_inputs(
    model: PreTrainedModel, blocks: Blocks, plans: list[BlockPlan], batches: Iterable[Tensor]
) -> Iterator[BlockInputs]:
    """Yield what enters the blocks for each batch of tokens (int64 [B, T], no padding), computing no block.

    Arguments that are equal, between blocks or between batches, are one tensor in everything that is yielded.
    """
    require_resident(blocks)
    interner = _Interner()
    for batch in batches:
        hidden, calls = _record_calls(model, blocks, plans, batch)
        require_finite(hidden, f"the input of {blocks.names[0]}")
        yield BlockInputs(hidden, interner.intern(calls))


@torch.no_grad()
def run_block(
    block: nn.Module,
    hidden: Tensor,
    call: BlockCall,
    redirects: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
) -> Tensor:
    """The block's hidden states [B, T, hidden_size], computed on the block's device under `redirects`."""
    with redirect(block, redirects or {}):
        return call_block(block, hidden, call)


@contextmanager
def redirect(block: nn.Module, functions: Mapping[str, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Call `functions[name](x)` in the place of the forward of the block's submodule `name`, until the exit."""
    with ExitStack() as stack:
        for name, function in functions.items():
            stack.enter_context(_replaced_forward(block.get_submodule(name), function))
        yield


def block_device(block: nn.Module) -> torch.device:
    """Where the block computes: the device of its first parameter (CPU if it has none)."""
    parameter = next(block.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def require_resident(blocks: Blocks) -> None:
    """Raise ValueError if weights of a block are neither in memory nor on the disk, from where accelerate brings them."""
    for name, block in zip(blocks.names, blocks.modules, strict=True):
        missing = next(
            (key for key, parameter in block.named_parameters() if _is_nowhere(block, key, parameter)), None
        )
        if missing is not None:
            raise ValueError(
                f"expected every decoder block in memory to calibrate, got {name}.{missing} on the meta device (not "
                'loaded, or offloaded by device_map); load with device_map=None, "cpu" or "cuda", with {"": "disk"}, which '
                'reads one block at a time, or use method="rtn"'
            )


def _is_nowhere(block: nn.Module, name: str, parameter: Tensor) -> bool:
    owner, _, _ = name.rpartition(".")
    return parameter.is_meta and tensors_on_disk(block.get_submodule(owner)) is None


def require_finite(tensor: Tensor, what: str) -> None:
    """Raise ValueError if `tensor` holds NaN or infinity; `what` names it, with its module."""
    if (
        tensor.numel() == 0 or torch.stack(torch.aminmax(tensor.detach())).isfinite().all()
    ):  # reads it once, copies nothing
        return
    nans, infinite = int(tensor.isnan().sum()), int(tensor.isinf().sum())
    raise ValueError(
        f"expected finite values in {what}, got {nans} NaN and {infinite} infinite of {tensor.numel()} "
        f"({tensor.dtype}); check the checkpoint's weights, or load the model with dtype=torch.bfloat16"
    )


@dataclass(frozen=True)
class _LinearCall:
    """`x` stays referenced while the probe lasts, so that its memory is not reused for another input."""

    block: int | None
    x: Tensor
    version: int


class _ProbeRecorder:
    """Hooks for one forward: which blocks and linears are called, in which order, with what."""

    def __init__(self, blocks: Blocks) -> None:
        self.blocks = blocks
        self.order: list[int] = []
        self.calls: list[BlockCall] = []
        self.inputs: list[Tensor] = []
        self.outputs: list[Any] = []
        self.running: int | None = None
        self.linear_calls: dict[int, list[_LinearCall]] = {}
        self.owners: dict[int, list[tuple[int, str]]] = {}
        self.linears: dict[int, nn.Linear | FP4Experts] = {}
        self.given: dict[int, tuple[int, Tensor, int]] = {}
        """By what a linear of the running block gave: the linear, the tensor, its version."""
        self.returned: dict[tuple[int, str], list[tuple[int, int | None] | None]] = {}
        """By block and name of a part of it, for each call: the linear whose result it returned, and its tuple's length."""
        for index, block in enumerate(blocks.modules):
            experts = ""
            for name, module in block.named_modules(remove_duplicate=False):
                if isinstance(module, FP4Experts):
                    experts = f"{name}."
                elif type(module) is not nn.Linear or (experts and name.startswith(experts)):
                    continue
                self.owners.setdefault(id(module), []).append((index, name))
                self.linears[id(module)] = module

    @contextmanager
    def hooks(self) -> Iterator[None]:
        handles = []
        try:
            for index, block in enumerate(self.blocks.modules):
                handles.append(block.register_forward_pre_hook(self._enter(index), with_kwargs=True))
                handles.append(block.register_forward_hook(self._leave))
                for name, child in block.named_children():
                    handles.append(child.register_forward_hook(self._part(index, name)))
            for linear in self.linears.values():
                handles.append(linear.register_forward_pre_hook(self._linear, with_kwargs=True))
                # Before the hook of a part that is a linear itself.
                handles.append(linear.register_forward_hook(self._give, prepend=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden, call = _split_call(args, kwargs, self.blocks.names[index])
            self.order.append(index)
            self.inputs.append(hidden)
            self.calls.append(call)
            self.running = index

        return hook

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.outputs.append(output)
        self.running = None
        self.given.clear()

    def _linear(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["input"]
        call = _LinearCall(self.running, x, x._version)
        self.linear_calls.setdefault(id(module), []).append(call)

    def _give(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor):
            self.given[id(output)] = (id(module), output, output._version)

    def _part(self, index: int, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            length = len(output) if isinstance(output, tuple) else None
            first, *rest = output if isinstance(output, tuple) and output else (output,)
            found = self.given.get(id(first))
            fits = found is not None and found[2] == first._version and all(each is None for each in rest)
            self.returned.setdefault((index, name), []).append((found[0], length) if found and fits else None)

        return hook

    def _outlets(self, index: int, names: dict[int, str]) -> dict[str, Outlet]:
        found = {}
        for (block, part), calls in self.returned.items():
            if block == index and len(calls) == 1 and calls[0] is not None:
                linear, length = calls[0]
                if names.get(linear, "").startswith(f"{part}."):
                    found[names[linear]] = Outlet(part, length)
        return found

    def check_order(self) -> None:
        names = self.blocks.names
        if self.order != list(range(len(names))):
            raise ValueError(
                f"expected each block of {self.blocks.name} to be called once and in order, got the calls "
                f'{self.order}; the model cannot be calibrated block by block, use method="rtn"'
            )
        outputs = [_hidden_of(output, name) for output, name in zip(self.outputs, names, strict=True)]
        for index, (output, following) in enumerate(zip(outputs, self.inputs[1:], strict=False)):
            if output is not following and not _same(output.to(following.device), following):
                raise ValueError(
                    f"expected the output of {names[index]} to be the input of {names[index + 1]}, got other values: "
                    'the model computes something between them; it cannot be calibrated, use method="rtn"'
                )

    def plan(self, index: int) -> BlockPlan:
        mine = [
            (key, name) for key, owners in self.owners.items() for owner, name in owners if owner == index
        ]
        reasons = {key: self._reason_to_skip(key, index) for key, _ in mine}
        skipped = {
            n: reason for key, name in mine if (reason := reasons[key]) for n in self._linears_of(key, name)
        }
        names = {key: name for key, name in mine if not reasons[key]}
        groups: dict[tuple[Any, ...], list[str]] = {}
        for key, calls in self.linear_calls.items():  # in the order of first calls
            module = self.linears[key]
            if key not in names:
                continue
            if isinstance(module, FP4Experts):
                for projection in module.layout.projections:
                    groups[key, projection] = self._linears_of(key, names[key], projection)
            else:
                groups.setdefault(_identity_of(calls[0]), []).append(names[key])
        output = self.outputs[index]
        length = None if isinstance(output, Tensor) else len(output)
        return BlockPlan(list(groups.values()), length, skipped, self._outlets(index, names))

    def _linears_of(self, key: int, name: str, projection: str | None = None) -> list[str]:
        """Names of the linears of experts, of one projection or of all; of a linear its own."""
        module = self.linears[key]
        if not isinstance(module, FP4Experts):
            return [name]
        chosen = [projection] if projection else list(module.layout.projections)
        linears = [linear for each in chosen for linear in module.layout.projections[each][1]]
        return [f"{name}.{expert}.{linear}" for expert in range(module.num_experts) for linear in linears]

    def _reason_to_skip(self, key: int, index: int) -> str | None:
        calls = self.linear_calls.get(key, [])
        if len(self.owners[key]) > 1:
            return "it is shared between modules"
        if not any(call.x.numel() for call in calls):
            return "it is not called in the probe (its owner reads the weight, or it is an expert without tokens)"
        if len(calls) > 1:
            return f"it is called {len(calls)} times in one forward"
        return None if calls[0].block == index else "it is called outside its block"


class _Interner:
    """Keeps one copy of equal tensors, so that masks and position embeddings do not grow with the number of batches."""

    def __init__(self) -> None:
        self._stored: dict[tuple[Any, ...], list[Tensor]] = {}

    def intern(self, calls: list[BlockCall]) -> list[BlockCall]:
        seen: dict[int, Tensor] = {}  # valid while `calls` keeps its tensors alive

        def one(tensor: Tensor) -> Tensor:
            if id(tensor) not in seen:
                seen[id(tensor)] = self._find(tensor)
            return seen[id(tensor)]

        return [BlockCall(_map(call.args, one), _map(call.kwargs, one), call.hidden_name) for call in calls]

    def _find(self, tensor: Tensor) -> Tensor:
        sample = tensor.reshape(-1)[:: max(1, tensor.numel() // _FINGERPRINT_VALUES)]
        key = (tensor.dtype, tensor.device, tensor.shape, tuple(sample.tolist()))
        candidates = self._stored.setdefault(key, [])
        found = next((candidate for candidate in candidates if torch.equal(candidate, tensor)), None)
        if found is None:
            candidates.append(tensor)
        return tensor if found is None else found


@torch.no_grad()
def _record_calls(
    model: PreTrainedModel, blocks: Blocks, plans: list[BlockPlan], input_ids: Tensor
) -> tuple[Tensor, list[BlockCall]]:
    """Run the model with every block replaced by the identity, and stop after the last block."""
    first: list[Tensor] = []
    calls: list[BlockCall] = []

    def recorder(index: int) -> Callable[..., Any]:
        length = plans[index].output_length

        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden, call = _split_call(args, kwargs, blocks.names[index])
            calls.append(call)
            if index == 0:
                first.append(hidden)
            if index == len(plans) - 1:
                raise _StopForward
            return hidden if length is None else (hidden, *[None] * (length - 1))

        return forward

    with suppress(_StopForward), ExitStack() as stack:
        for index, block in enumerate(blocks.modules):
            stack.enter_context(_replaced_forward(block, recorder(index)))
        _run_model(model, blocks, input_ids)
    return first[0], calls


def _outermost_lists(module: nn.Module, ignored: set[int]) -> Iterator[nn.ModuleList]:
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield child
        elif id(child) not in ignored:
            yield from _outermost_lists(child, ignored)


def _linear_elements(modules: nn.Module) -> int:
    return sum(module.weight.numel() for module in modules.modules() if isinstance(module, nn.Linear))


def _run_model(model: PreTrainedModel, blocks: Blocks, input_ids: Tensor) -> None:
    parameters = inspect.signature(model.forward).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    kwargs = {"use_cache": False} if takes_any or "use_cache" in parameters else {}
    embeddings = model.get_input_embeddings()
    device = block_device(embeddings)
    if device.type == "meta":  # offloaded: accelerate's hook takes the ids to where it computes
        device = block_device(blocks.modules[0])
    if device.type == "meta":  # on the disk, and computed on the CPU
        device = torch.device("cpu")
    model(input_ids=input_ids.to(device), **kwargs)


def call_block(block: nn.Module, hidden: Tensor, call: BlockCall) -> Tensor:
    """The block's hidden states [B, T, hidden_size], on its device, without any context of its own."""
    device = block_device(block)
    # New containers each time: what a block writes into a dict argument must not reach its next call.
    args = _map(call.args, lambda tensor: tensor.to(device))
    kwargs = _map(call.kwargs, lambda tensor: tensor.to(device))
    hidden = hidden.to(device)
    if call.hidden_name is None:
        output = block(hidden, *args, **kwargs)
    else:
        output = block(*args, **{call.hidden_name: hidden}, **kwargs)
    return _hidden_of(output, type(block).__name__)


def _split_call(args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> tuple[Tensor, BlockCall]:
    """Hidden states and the rest; containers are copied as they are now, tensors are not."""
    args, kwargs = _map(args, lambda tensor: tensor), _map(kwargs, lambda tensor: tensor)
    cache = next((key for key in ("cache", "past_key_values") if kwargs.get(key) is not None), None)
    if cache is not None:
        raise ValueError(f'{name}: expected no cache, got {cache} despite use_cache=False; use method="rtn"')
    if args and isinstance(args[0], Tensor):
        return args[0], BlockCall(args[1:], kwargs)
    if isinstance(hidden := kwargs.pop("hidden_states", None), Tensor):
        return hidden, BlockCall(args, kwargs, "hidden_states")
    raise ValueError(f'{name}: expected hidden states as the first argument, got none; use method="rtn"')


def _hidden_of(output: Any, name: str) -> Tensor:
    hidden = output[0] if isinstance(output, (tuple, list)) and output else output
    if not isinstance(hidden, Tensor):
        raise ValueError(
            f'{name}: expected a tensor, or a tuple that starts with one, got {type(output).__name__}; use method="rtn"'
        )
    return hidden


@contextmanager
def _replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    # In __dict__, because setattr would register an nn.Module; accelerate keeps its wrapper there too.
    had, previous = "forward" in module.__dict__, module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if had:
            module.__dict__["forward"] = previous
        else:
            del module.__dict__["forward"]


def _identity_of(call: _LinearCall) -> tuple[Any, ...]:
    """Equal for two calls only if they read the same rows of the same memory, not written to in between."""
    x = call.x
    layout = (x.numel(), x.shape[-1:]) if x.is_contiguous() else (x.shape, x.stride())
    return (x.device, x.dtype, x.data_ptr(), layout, call.version)


def _map(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Copy nested containers with `function` applied to their tensors; anything else is kept as it is."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        result: Any = copy.copy(value)
        for key in value:
            result[key] = _map(value[key], function)
        return result
    if type(value) in (list, tuple):
        return type(value)(_map(item, function) for item in value)
    return value


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if type(a) in (list, tuple) and type(b) is type(a):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return a is b or (type(a) is type(b) and bool(a == b))
