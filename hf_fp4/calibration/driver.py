"""The calibration loop: block by block, and within a block group by group, on what the quantized part really computes.

Two streams of hidden states run through the blocks: the quantized one, whose inputs the solver sees, and, for the
asymmetric correction, the original model's.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel
from transformers.utils import logging

from ..backends import device_context
from ..config import MRGPTQConfig
from ..layers.linear import FP4Linear
from ..layers.replace import (
    linear_at,
    replace_linears,
    select_linears,
    take_experts_apart,
    text_experts,
)
from ..rotation import require_divisor
from .capture import (
    BlockCall,
    BlockPlan,
    Blocks,
    Outlet,
    block_device,
    capture_block_inputs,
    find_blocks,
    probe,
    require_finite,
    run_block,
)
from .checkpoint import WorkDir, recipe, weights_fingerprint
from .data import CalibrationData
from .equalize import equalize, set_parameters
from .experts import group_of, weights_together
from .forwards import Known, paused_forwards
from .group import new_layer
from .offload import bring_to_memory, named_parameters, return_freed_memory, waits_on_disk
from .team import Team

PROBE_TOKENS = 16

_HELD = 4
"""A forward that waits holds its group's input and what else its block has computed by then, about so much in all."""

_MOST_HELD = 1 << 30
"""Bytes that forwards of a stream may hold on a GPU while they wait, however much is free: else they run again."""

_MOST_KNOWN = 5 << 29
"""Bytes of inputs of linears that forwards may keep of a block, so that what led there is not computed again."""

_ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Not cuDNN's: it plans its attention anew in every thread, which takes long, and there are two threads per batch."""


@dataclass(frozen=True)
class LayerReport:
    """What became of one linear.

    error: squared output error over squared output on the calibration data, against the target of the solve;
    rounded_error: the same if the weight were rounded to nearest under the scales that the solve starts from; None without
    data. seconds: time of its group's statistics and solve. tokens: how many of the calibration tokens were routed to it,
    own_share: share of its second moments that comes from them and not from the layer's other experts; None if it is not an
    expert's.
    """

    name: str
    hadamard_size: int | None
    rounded_error: float | None
    error: float | None
    seconds: float
    tokens: int | None = None
    own_share: float | None = None


@dataclass(frozen=True)
class Run:
    """What `quantize_model` did: one report per converted linear, and the reason for each that was not."""

    reports: list[LayerReport]
    skipped: dict[str, str]


@dataclass
class _Batch:
    """One batch on its way through the blocks; `original` is None when there is no correction.

    Between blocks the original stream waits on `resting`, so that a GPU need not hold both streams.
    """

    quantized: torch.Tensor
    original: torch.Tensor | None
    calls: list[BlockCall]
    resting: torch.device

    def rest(self, original: torch.Tensor) -> None:
        """Take the original stream's next hidden states."""
        self.original = original.to(self.resting)


def quantize_model(model: PreTrainedModel, config: MRGPTQConfig, data: CalibrationData) -> Run:
    """Calibrate and quantize ``model`` in place.

    Args:
        model: an unquantized causal LM in evaluation mode, its blocks in memory.
        config: what to do; it is not changed.
        data: the calibration tokens.

    Returns:
        A `Run`: per-layer reports and the linears that stayed as they were, with the reason.

    Raises:
        ValueError: no linear converts, the model's structure is not understood, or weights or activations are not
            finite (the message names the layer).
    """
    for name in text_experts(model):
        if waits_on_disk(model.get_submodule(name)):
            raise ValueError(
                f"{name} holds all its experts in one tensor, and those are taken apart in memory: load the model with "
                'device_map="cpu", without --streaming'
            )
    take_experts_apart(model, config.fp4_format, config.modules_to_not_convert or [])
    blocks = find_blocks(model)
    selection = select_linears(model, config.fp4_format, config.modules_to_not_convert)
    if isinstance(config.hadamard_group_size, int):
        for name in selection.selected:
            require_divisor(config.hadamard_group_size, linear_at(model, name).in_features, name)
    fingerprint = _check_weights(model, selection.selected, fingerprint=config.work_dir is not None)
    team = Team()
    team.require_same(data.fingerprint, "calibration data")
    plans = probe(model, blocks, data.batches[0][:1, :PROBE_TOKENS])
    if any(plan.skipped for plan in plans):  # maybe experts that none of so few tokens reached
        plans = probe(model, blocks, data.batches[0][:1])
    groups, skipped = _plan_groups(blocks, plans, selection.selected, selection.skipped)
    work = _open_work_dir(fingerprint, config, data) if team.rank == 0 else None
    first = data.batches[0]
    shared, *captured = capture_block_inputs(
        model, blocks, plans, [first[team.samples(len(first))], *team.share(data.batches)]
    )
    shared_calls = shared.calls
    streams = waits_on_disk(blocks.modules[0])
    device = _calibration_device(config, blocks.modules)
    resting = _resting_device([inputs.hidden for inputs in captured], device or captured[0].hidden.device)
    batches = [
        _Batch(inputs.hidden, inputs.hidden if config.uses_original_stream else None, inputs.calls, resting)
        for inputs in captured
    ]
    del captured, shared
    reports: list[LayerReport] = []
    start = time.perf_counter()
    bar = logging.tqdm(
        total=len(blocks.modules),
        desc=f"MR-GPTQ {config.format}",
        unit="block",
        disable=team.rank > 0 or None,
    )
    with bar, sdpa_kernel(_ATTENTION), ThreadPoolExecutor(2 * len(batches), "calibration") as threads:
        for index, name in enumerate(blocks.names):
            with _moved(blocks.modules[index], device), device_context(block_device(blocks.modules[index])):
                outlets = plans[index].outlets
                block = _Block(
                    blocks.modules[index], name, index, groups[index], outlets, config, threads, team
                )
                advance = index < len(blocks.modules) - 1
                reports += block.quantize(batches, shared_calls[index], work, advance=advance)
                block.replace(model, work if streams else None)
                kept = block.kept
                del block
            set_parameters(blocks.modules[index], kept)
            return_freed_memory()
            bar.set_postfix(_progress(batches, index + 1, time.perf_counter() - start, device), refresh=False)
            bar.update()
    return Run(reports, skipped)


class _Block:
    """One decoder block while it is being quantized."""

    def __init__(
        self,
        module: nn.Module,
        name: str,
        index: int,
        groups: list[list[str]],
        outlets: dict[str, Outlet],
        config: MRGPTQConfig,
        threads: Executor,
        team: Team,
    ):
        self._module, self._name, self._index, self._config = module, name, index, config
        self._outlets = _last_outlets(groups, outlets)
        self._threads, self._team = threads, team
        self._groups = [group_of(module, name, names, config, team) for names in groups]
        self._device = block_device(module)
        self.kept: dict[str, torch.Tensor] = {}
        """Parameters that changed and are none of a quantized linear, by name."""

    def quantize(
        self, batches: list[_Batch], shared: BlockCall, work: WorkDir | None, *, advance: bool
    ) -> list[LayerReport]:
        """Solve every group, or take the block from the work directory when an earlier run finished it.

        ``shared``: the call for this process's samples of the batch on which all equalize.

        With ``advance`` both streams are moved to the next block's input.
        """
        finished = self._team.decide(work is not None, lambda: work.load(self._index) if work else None)
        if finished is None and self._groups:
            return self._solve(batches, shared, work, advance=advance)
        reports = self._restore(*finished) if finished else []
        if advance:
            self._advance(batches)
        return reports

    def _solve(
        self, batches: list[_Batch], shared: BlockCall, work: WorkDir | None, *, advance: bool
    ) -> list[LayerReport]:
        reports: list[LayerReport] = []
        solved: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {}
        last = len(self._groups) - 1
        unsolved = self._original()
        tokens = [batch.quantized.shape[:-1].numel() for batch in batches]
        if self._config.equalize:
            names = [group.names for group in self._groups]
            self.kept = equalize(self._module, batches[0].quantized, shared, names, self._team)
        entries = [group.entries for group in self._groups]
        together = weights_together(self._groups)
        with together, paused_forwards(self._module, entries, self._threads, self._outlets) as begin:
            quantized, original = [], []
            known: list[tuple[dict[str, Known], dict[str, Known]]] = [({}, {}) for _ in batches]
            kept = 0
            for batch in batches:
                call = batch.calls[self._index]
                quantized.append(begin(batch.quantized, call, solved))
                original.append(None if batch.original is None else begin(batch.original, call, unsolved))
            for index, group in enumerate(self._groups):
                start = time.perf_counter()
                held = _HELD * group.bytes_per_token * sum(tokens)
                wait = _fits(held, self._device) and (self._device.type != "cuda" or held <= _MOST_HELD)
                group.start(forward.input_of(index) for forward in quantized)
                for i, (batch, other) in enumerate(zip(batches, original, strict=True)):
                    call = batch.calls[self._index]
                    inputs = quantized[i].input_of(index), other.input_of(index) if other else None
                    group.observe(*inputs, tokens[i])
                    if not wait and index != last:
                        kept += self._keep(group.names[0], inputs, known[i], kept)
                    del inputs
                    if other and index == last:  # it waits for no solve
                        if advance:
                            batch.rest(other.output())
                        other.abandon()
                        known[i][1].clear()
                    elif other and batch.original is not None and not wait:
                        other.abandon()
                        original[i] = begin(batch.original, call, unsolved, known[i][1])
                    if not wait:  # what is needed of it later is computed again
                        quantized[i].abandon()
                        quantized[i] = begin(batch.quantized, call, solved, known[i][0])
                outcomes = group.solve()
                return_freed_memory()
                solved |= group.simulated()
                seconds = time.perf_counter() - start
                reports += [
                    LayerReport(f"{self._name}.{n}", group.hadamard_size, seconds=seconds, **asdict(outcome))
                    for n, outcome in outcomes.items()
                ]
            if work:
                tensors = {
                    f"{n}.{k}": t for n, layer in self._layers() for k, t in layer.state_dict().items()
                }
                rows = [asdict(r) for r in reports]
                work.save(self._index, tensors | self.kept, {"reports": rows, "kept": list(self.kept)})
            if advance:
                for batch, forward in zip(batches, quantized, strict=True):
                    batch.quantized = forward.output()
        return reports

    def _keep(
        self,
        name: str,
        inputs: tuple[torch.Tensor, torch.Tensor | None],
        known: tuple[dict[str, Known], dict[str, Known]],
        kept: int,
    ) -> int:
        """Add the inputs of the linear ``name`` to what both streams know, if that is wanted and fits; how many bytes those are.

        kept: how many bytes the batches before take.
        """
        if name not in self._outlets:
            return 0
        size = sum(x.nbytes for x in inputs if x is not None)
        if kept + size > _MOST_KNOWN or not _fits(kept + size, self._device):
            return 0
        for each, x in zip(known, inputs, strict=True):
            if x is not None:
                each[name] = Known(x)
        return size

    def _original(self) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
        return {name: f for group in self._groups for name, f in group.original().items()}

    def _advance(self, batches: list[_Batch]) -> None:
        solved = {name: f for group in self._groups for name, f in group.simulated().items()}
        unsolved = self._original()
        for batch in batches:
            if batch.original is not None:
                batch.rest(run_block(self._module, batch.original, batch.calls[self._index], unsolved))
        set_parameters(self._module, self.kept)
        for batch in batches:
            batch.quantized = run_block(self._module, batch.quantized, batch.calls[self._index], solved)

    def replace(self, model: nn.Module, work: WorkDir | None) -> None:
        """Put the FP4 linears in the place of the originals, which are freed.

        With ``work`` their tensors are mapped from there, and take no memory of their own.
        """
        layers = dict(self._layers())
        finished = work.load(self._index) if work else None
        if finished is not None:
            layers = self._read(*finished, torch.device("cpu"))
        layers = {f"{self._name}.{name}": layer for name, layer in layers.items()}
        replace_linears(model, lambda name, _: layers[name], layers)

    def _layers(self) -> Iterator[tuple[str, FP4Linear]]:
        for group in self._groups:
            yield from group.solved.items()

    def _restore(self, tensors: dict[str, torch.Tensor], metadata: dict) -> list[LayerReport]:
        layers = self._read(tensors, metadata, self._device)
        for group in self._groups:
            group.restore({name: layers[name] for name in group.names})
        self.kept = {name: tensors[name].to(self._device) for name in metadata["kept"]}
        return [LayerReport(**row) for row in metadata["reports"]]

    def _read(
        self, tensors: dict[str, torch.Tensor], metadata: dict, device: torch.device
    ) -> dict[str, FP4Linear]:
        sizes = {row["name"]: row["hadamard_size"] for row in metadata["reports"]}
        layers = {}
        for name in (name for group in self._groups for name in group.names):
            own = {k.removeprefix(f"{name}."): t for k, t in tensors.items() if k.startswith(f"{name}.")}
            layers[name] = new_layer(
                linear_at(self._module, name),
                self._config,
                sizes[f"{self._name}.{name}"],
                static_input_scale="input_global_scale" in own,
            )
            layers[name].load_state_dict({k: t.to(device) for k, t in own.items()}, assign=True)
            layers[name].check(f"{self._name}.{name}")
        return layers


def _last_outlets(groups: list[list[str]], outlets: dict[str, Outlet]) -> dict[str, Outlet]:
    """Outlets of a linear that is a group by itself, and of whose part no later group is."""
    found = {}
    for index, names in enumerate(groups):
        outlet = outlets.get(names[0]) if len(names) == 1 else None
        later = (name for group in groups[index + 1 :] for name in group)
        if outlet and not any(name.startswith(f"{outlet.module}.") for name in later):
            found[names[0]] = outlet
    return found


def _progress(
    batches: list[_Batch], blocks: int, seconds: float, device: torch.device | None
) -> dict[str, str]:
    """What the progress bar shows beside time: calibration tokens through one block per second, and the GPU's peak memory."""
    tokens = sum(batch.quantized.shape[0] * batch.quantized.shape[1] for batch in batches)
    shown = {"tokens/s": f"{tokens * blocks / seconds:,.0f}"}
    device = device or batches[0].quantized.device
    if device.type == "cuda":
        shown["GPU"] = f"{torch.cuda.max_memory_allocated(device) / 1e9:.1f} GB"
    return shown


def _calibration_device(config: MRGPTQConfig, blocks: list[nn.Module]) -> torch.device | None:
    """Where every block is moved to be calibrated; None: nowhere."""
    if config.calibration_device is not None:
        return torch.device(config.calibration_device)
    on_cpu = all(block_device(block).type == "cpu" or waits_on_disk(block) for block in blocks)
    return torch.device("cuda") if on_cpu and torch.cuda.is_available() else None


@contextmanager
def _moved(block: nn.Module, device: torch.device | None) -> Iterator[None]:
    """Context in which ``block`` is on ``device``; afterwards it and what replaced its linears are where it was.

    A block that waits on the disk is brought to CPU memory.
    """
    bring_to_memory(block)
    home = block_device(block)
    if device is None or device == home:
        yield
        return
    if any(hasattr(module, "_hf_hook") for module in block.modules()):
        raise ValueError(
            "calibration_device is for models that device_map does not spread, got one with accelerate's hooks; load it "
            'with device_map=None or "cpu", or leave calibration_device out'
        )
    there = [
        (module, key, parameter, parameter.data)
        for module in block.modules()
        for key, parameter in module.named_parameters(recurse=False)
    ]
    block.to(device)
    try:
        yield
    finally:
        for (
            module,
            key,
            parameter,
            data,
        ) in there:  # nothing wrote to it, and what is mapped from a file stays so
            parameter.data = data
            setattr(module, key, parameter)
        block.to(home)


def _resting_device(hidden: list[torch.Tensor], device: torch.device) -> torch.device:
    """Where a stream of this size waits: on ``device`` if it fits, else in CPU memory."""
    return device if _fits(sum(tensor.nbytes for tensor in hidden), device) else torch.device("cpu")


def _fits(size: int, device: torch.device) -> bool:
    """Whether ``size`` bytes may wait on ``device``: on a GPU at most a tenth of what is free there, in CPU memory always."""
    if device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return 10 * size <= free + unused


def _plan_groups(
    blocks: Blocks, plans: list[BlockPlan], selected: list[str], skipped: dict[str, str]
) -> tuple[list[list[list[str]]], dict[str, str]]:
    """Per block the groups of selected linears; and every other linear with its reason."""
    wanted, skipped = set(selected), dict(skipped)
    groups = []
    for name, plan in zip(blocks.names, plans, strict=True):
        kept = [[n for n in group if f"{name}.{n}" in wanted] for group in plan.groups]
        groups.append([group for group in kept if group])
        wanted -= {f"{name}.{n}" for group in kept for n in group}
        for n, reason in plan.skipped.items():
            if f"{name}.{n}" in wanted:
                skipped[f"{name}.{n}"] = reason
                wanted.discard(f"{name}.{n}")
    skipped |= dict.fromkeys(wanted, "it is outside the decoder blocks, so it is not calibrated")
    if not any(groups):
        reasons = "; ".join(sorted(set(skipped.values())))
        raise ValueError(
            f'none of the decoder blocks\' linears can be calibrated ({reasons}); use method="rtn"'
        )
    return groups, skipped


def _check_weights(model: PreTrainedModel, selected: list[str], *, fingerprint: bool) -> str:
    """Refuse weights of ``selected`` linears that are not finite; `weights_fingerprint` of all, if it is wanted."""
    wanted = set(selected)
    extremes: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}

    def checked() -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in named_parameters(model):
            if name.rpartition(".")[0] in wanted and parameter.numel():
                found = extremes.setdefault((parameter.device, parameter.dtype), [])
                found += torch.aminmax(parameter.detach())
            yield name, parameter

    result = ""
    if fingerprint:
        result = weights_fingerprint(checked())
    else:
        deque(checked(), maxlen=0)
    # One question for all of them: each waits for a GPU.
    if not all(torch.stack(found).isfinite().all() for found in extremes.values()):
        for name, parameter in named_parameters(model):
            owner, _, key = name.rpartition(".")
            if owner in wanted:
                require_finite(parameter, f"the {key} of {owner}")
    return result


def _open_work_dir(fingerprint: str, config: MRGPTQConfig, data: CalibrationData) -> WorkDir | None:
    if config.work_dir is None:
        return None
    identity: dict[str, object] = {
        "model": fingerprint,
        "config": recipe(config),
        "dataset": data.fingerprint,
    }
    return WorkDir(config.work_dir, identity)
