"""The calibration loop: block by block, and within a block group by group, on what the quantized part really computes.

Two streams of hidden states run through the blocks: the quantized one, whose inputs the solver sees, and, for the
asymmetric correction, the original model's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel
from transformers.utils import logging

from ..backends import select
from ..backends.reference import compute_dtype, matmul, quantize_input
from ..config import MRGPTQConfig
from ..formats import dequantize_blocks
from ..gptq import FP4Weight, activation_order, descend, relative_output_error, round_weight, solve
from ..hessian import DampedMoments, SecondMoments
from ..layers.linear import FP4Linear
from ..layers.replace import linear_at, replace_linears, select_linears
from ..rotation import HADAMARD_SIZES, require_divisor, rotate
from ..scales import (
    fake_quantize_activations,
    input_global_scale,
    weight_global_scale,
    weight_scales,
)
from .capture import (
    BlockCall,
    BlockPlan,
    Blocks,
    block_device,
    capture_block_inputs,
    find_blocks,
    probe,
    require_finite,
    run_block,
)
from .checkpoint import WorkDir, weights_fingerprint
from .data import CalibrationData
from .forwards import paused_forwards

PROBE_TOKENS = 16
ROTATION_TOKENS, ROTATION_ROWS, ROTATION_COLUMNS = 4096, 256, 2048
"""Tokens, output rows and input features on which the Hadamard size of a group is chosen."""

_ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Not cuDNN's: it plans its attention anew in every thread, 0.06 s each on an H100, and there are two per batch."""

_PROVISIONAL_HEADROOM = 8.0
"""Over the first batch's maximum, until the maximum of all batches is known; a power of two, so rounding agrees."""


@dataclass(frozen=True)
class LayerReport:
    """What became of one linear.

    error: squared output error over squared output on the calibration data, against the target of the solve; None
    without data. seconds: time of its group's statistics and solve.
    """

    name: str
    hadamard_size: int | None
    error: float | None
    seconds: float


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


class _Group:
    """Linears of one block that share an input: statistics, solve, and the simulated forward afterwards."""

    def __init__(self, block: nn.Module, prefix: str, names: list[str], config: MRGPTQConfig):
        self.names, self.prefix = names, prefix
        self._config, self._format, self._rule = config, config.fp4_format, config.linear_activation_rule
        self._linears = {name: linear_at(block, name) for name in names}
        first = self._linears[names[0]].weight
        self._kernels = select(config.kernel_source, first.device)
        self.hadamard_size: int | None = None
        self._moments: SecondMoments | None = None
        self._input_scale: torch.Tensor | None = None
        self._absmax = torch.zeros(1, device=first.device)
        self._dtype = compute_dtype(first.dtype)
        self._memo: tuple[torch.Tensor, tuple] | None = None
        self._dequantized: dict[str, torch.Tensor] = {}
        self.solved: dict[str, FP4Linear] = {}

    @property
    def _title(self) -> str:
        return f"{self.prefix}.{self.names[0]}" + (
            "" if len(self.names) == 1 else f" (+{len(self.names) - 1})"
        )

    def observe(self, x: torch.Tensor, original: torch.Tensor | None) -> None:
        """Add one batch of inputs: of the quantized stream, and of the original one for the correction."""
        require_finite(x, f"the input of {self._title}")
        x = x.flatten(0, -2)
        if len(x) == 0:
            return  # an expert that none of these tokens was routed to
        if self._moments is None:
            self._moments = self._start(x)
        rotated = rotate(x, self.hadamard_size)
        self._absmax = torch.maximum(self._absmax, rotated.abs().amax())
        if self._rule is not None:
            values, divisor = fake_quantize_activations(rotated, self._format, self._rule, self._input_scale)
            rotated = values if divisor is None else values / divisor
        if original is not None:
            original = rotate(original.flatten(0, -2), self.hadamard_size)
            if original.shape != rotated.shape:  # the two streams route different tokens to this expert
                raise ValueError(
                    f"{self._title} gets other tokens in the quantized model than in the original one, so its target cannot "
                    "be corrected; use error_correction=0"
                )
        self._moments.add(rotated, original)

    def _start(self, first: torch.Tensor) -> SecondMoments:
        size = self._config.hadamard_group_size
        if isinstance(size, str):  # "auto"
            size = self._best_size(_spread(first, ROTATION_TOKENS))
        self.hadamard_size = size
        if self._format.has_global_scale:
            absmax = rotate(first, self.hadamard_size).abs().amax().view(1)
            self._input_scale = input_global_scale(absmax * _PROVISIONAL_HEADROOM / 2)
        return SecondMoments(first.shape[-1], first.device, cross=self._config.uses_original_stream)

    def _best_size(self, sample: torch.Tensor) -> int | None:
        """The size, or none, whose solve leaves the least output error on the half of the sample it did not see."""
        sizes = [None, *(k for k in HADAMARD_SIZES if sample.shape[-1] % k == 0)]
        columns = _spread_columns(sample.shape[-1], sample.device)
        sample, weight = sample[:, columns], _spread(self._stacked(), ROTATION_ROWS)[:, columns]
        seen, unseen = sample[0::2].float(), sample[1::2].float()
        moments = DampedMoments.of(seen.T @ seen / len(seen), self._config.damp_percent, self._title)
        return min(sizes, key=lambda size: self._rotation_error(size, weight, moments, unseen))

    def _rotation_error(
        self, size: int | None, weight: torch.Tensor, moments: DampedMoments, x: torch.Tensor
    ) -> float:
        weight, x = rotate(weight, size), rotate(x, size)
        quantized = self._solve(weight, moments.rotated(size)).dequantize()
        seen = x
        if self._rule is not None:
            scale = input_global_scale(x.abs().amax().view(1)) if self._format.has_global_scale else None
            values, divisor = fake_quantize_activations(x, self._format, self._rule, scale)
            seen = values if divisor is None else values / divisor
        return (seen @ quantized.T - x @ weight.T).square().sum().item()

    def _stacked(self) -> torch.Tensor:
        return torch.cat([linear.weight.detach().float() for linear in self._linears.values()])

    def _solve(self, weight: torch.Tensor, moments: DampedMoments, passes: int = 0) -> FP4Weight:
        """Scales, then codes, of a rotated weight [N, K] under the second moments [K, K] of its inputs."""
        config = self._config
        global_scale = (
            weight_global_scale(weight.abs().amax().view(1)) if self._format.has_global_scale else None
        )
        importance = moments.second.diagonal()
        scale = weight_scales(weight, self._format, config.weight_rule, global_scale, importance)
        if config.method == "rtn":
            return round_weight(weight, scale, self._format, global_scale)
        order = activation_order(moments.second) if config.act_order else None
        solved = solve(weight, scale, self._format, global_scale, moments.upper(order), order, self._kernels)
        if not passes:
            return solved
        return descend(weight, solved, moments.second, moments.added, passes, self._kernels)

    def solve(self) -> float:
        """Quantize the group's weights from what was observed; returns the relative output error."""
        config = self._config
        if self._moments is None:
            raise ValueError(
                f"no calibration token reached {self._title}; use more samples, or add it to modules_to_not_convert"
            )
        second, cross = self._moments.second, self._moments.cross
        self._moments = None
        if self._input_scale is not None:
            self._input_scale = input_global_scale(self._absmax)
        weight = rotate(self._stacked(), self.hadamard_size)
        moments = DampedMoments.of(second, config.damp_percent, self._title)
        if cross is not None:
            weight = moments.correct_target(weight, cross, config.error_correction)
        quantized = self._solve(weight, moments, config.descent_passes)
        error = relative_output_error(weight, quantized.dequantize(), second)
        rows = [linear.out_features for linear in self._linears.values()]
        for name, part in zip(self.names, quantized.split(rows), strict=True):
            self._take(name, part)
        return error

    def _take(self, name: str, weight: FP4Weight) -> None:
        linear = self._linears[name]
        input_scale = None
        if self._input_scale is not None and self._rule is not None:
            input_scale = self._input_scale.clone()
        static = input_scale is not None
        layer = new_layer(linear, self._config, self.hadamard_size, static_input_scale=static)
        layer.set_weight(weight, linear.bias, input_scale)
        self._install(name, layer)

    def restore(self, layers: dict[str, FP4Linear]) -> None:
        """Take over layers that an earlier run solved."""
        for name in self.names:
            self._install(name, layers[name])
        self.hadamard_size = layers[self.names[0]].hadamard_size
        self._input_scale = layers[self.names[0]].input_global_scale

    def _install(self, name: str, layer: FP4Linear) -> None:
        self._dequantized[name] = dequantize_blocks(*layer.stored(), self._format, self._dtype)
        self.solved[name] = layer

    def simulated(self) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
        """Per linear a function that computes what its FP4Linear will, on weights that are unpacked once per block."""
        return {name: partial(self._forward, name) for name in self.names}

    def _forward(self, name: str, x: torch.Tensor) -> torch.Tensor:
        layer = self.solved[name]
        if self._memo is None or self._memo[0] is not x:
            self._memo = (
                x,
                quantize_input(x, self._format, self._rule, self.hadamard_size, layer.input_global_scale),
            )
        values, divisor = self._memo[1]
        y = matmul(values, divisor, self._dequantized[name], layer.weight_global_scale, layer.bias)
        return y.to(x.dtype)


def _spread(rows: torch.Tensor, count: int) -> torch.Tensor:
    """At most ``count`` rows, evenly spread."""
    return rows[:: max(1, -(-len(rows) // count))]


def _spread_columns(features: int, device: torch.device) -> torch.Tensor:
    """At most `ROTATION_COLUMNS` columns, in whole blocks of the largest rotation, evenly spread; all if they are few."""
    columns, block = torch.arange(features, device=device), max(HADAMARD_SIZES)
    if features <= ROTATION_COLUMNS or features % block:
        return columns
    return _spread(columns.view(-1, block), ROTATION_COLUMNS // block).flatten()


def new_layer(
    linear: nn.Linear, config: MRGPTQConfig, hadamard_size: int | None, *, static_input_scale: bool
) -> FP4Linear:
    """An empty FP4Linear for ``linear``, on the meta device."""
    return FP4Linear(
        linear.in_features,
        linear.out_features,
        config.fp4_format,
        bias=linear.bias is not None,
        hadamard_size=hadamard_size,
        activation_scale_rule=config.linear_activation_rule,
        static_input_scale=static_input_scale,
        dtype=linear.weight.dtype if linear.weight.is_floating_point() else None,
        device="meta",
    )


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
    blocks = find_blocks(model)
    selection = select_linears(model, config.fp4_format, config.modules_to_not_convert)
    for name in selection.selected:
        linear = linear_at(model, name)
        if isinstance(config.hadamard_group_size, int):
            require_divisor(config.hadamard_group_size, linear.in_features, name)
        require_finite(linear.weight, f"the weight of {name}")
        if linear.bias is not None:
            require_finite(linear.bias, f"the bias of {name}")
    plans = probe(model, blocks, data.batches[0][:1, :PROBE_TOKENS])
    groups, skipped = _plan_groups(blocks, plans, selection.selected, selection.skipped)
    work = _open_work_dir(model, config, data)
    captured = list(capture_block_inputs(model, blocks, plans, data.batches))
    resting = _resting_device([inputs.hidden for inputs in captured])
    batches = [
        _Batch(inputs.hidden, inputs.hidden if config.uses_original_stream else None, inputs.calls, resting)
        for inputs in captured
    ]
    del captured
    reports: list[LayerReport] = []
    bar = logging.tqdm(total=len(blocks.modules), desc=f"MR-GPTQ {config.format}", unit="block")
    with bar, sdpa_kernel(_ATTENTION), ThreadPoolExecutor(2 * len(batches), "calibration") as threads:
        for index, name in enumerate(blocks.names):
            block = _Block(blocks.modules[index], name, index, groups[index], config, threads)
            reports += block.quantize(batches, work, advance=index < len(blocks.modules) - 1)
            block.replace(model)
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
        config: MRGPTQConfig,
        threads: Executor,
    ):
        self._module, self._name, self._index, self._config = module, name, index, config
        self._threads = threads
        self._groups = [_Group(module, name, names, config) for names in groups]
        self._device = block_device(module)

    def quantize(self, batches: list[_Batch], work: WorkDir | None, *, advance: bool) -> list[LayerReport]:
        """Solve every group, or take the block from the work directory when an earlier run finished it.

        With ``advance`` both streams are moved to the next block's input.
        """
        finished = work.load(self._index) if work else None
        if finished is None and self._groups:
            return self._solve(batches, work, advance=advance)
        reports = self._restore(*finished) if finished else []
        if advance:
            self._advance(batches)
        return reports

    def _solve(self, batches: list[_Batch], work: WorkDir | None, *, advance: bool) -> list[LayerReport]:
        reports: list[LayerReport] = []
        solved: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {}
        last = len(self._groups) - 1
        with paused_forwards(self._module, [g.names for g in self._groups], self._threads) as begin:
            quantized, original = [], []
            for batch in batches:
                call = batch.calls[self._index]
                quantized.append(begin(batch.quantized, call, solved))
                original.append(None if batch.original is None else begin(batch.original, call, {}))
            for index, group in enumerate(self._groups):
                start = time.perf_counter()
                for batch, forward, other in zip(batches, quantized, original, strict=True):
                    group.observe(forward.input_of(index), None if other is None else other.input_of(index))
                    if other is not None and advance and index == last:
                        batch.rest(other.output())  # it waits for no solve, and its memory is free sooner
                error = group.solve()
                solved |= group.simulated()
                seconds = time.perf_counter() - start
                reports += [
                    LayerReport(f"{self._name}.{n}", group.hadamard_size, error, seconds) for n in group.names
                ]
            if work:
                tensors = {
                    f"{n}.{k}": t for n, layer in self._layers() for k, t in layer.state_dict().items()
                }
                work.save(self._index, tensors, {"reports": [asdict(r) for r in reports]})
            if advance:
                for batch, forward in zip(batches, quantized, strict=True):
                    batch.quantized = forward.output()
        return reports

    def _advance(self, batches: list[_Batch]) -> None:
        solved = {name: f for group in self._groups for name, f in group.simulated().items()}
        for batch in batches:
            call = batch.calls[self._index]
            if batch.original is not None:
                batch.rest(run_block(self._module, batch.original, call))
            batch.quantized = run_block(self._module, batch.quantized, call, solved)

    def replace(self, model: nn.Module) -> None:
        """Put the FP4 linears in the place of the originals, which are freed."""
        layers = {f"{self._name}.{name}": layer for name, layer in self._layers()}
        replace_linears(model, lambda name, _: layers[name], layers)

    def _layers(self) -> Iterator[tuple[str, FP4Linear]]:
        for group in self._groups:
            yield from group.solved.items()

    def _restore(self, tensors: dict[str, torch.Tensor], metadata: dict) -> list[LayerReport]:
        reports = [LayerReport(**row) for row in metadata["reports"]]
        sizes = {row.name: row.hadamard_size for row in reports}
        for group in self._groups:
            layers = {}
            for name in group.names:
                own = {k.removeprefix(f"{name}."): t for k, t in tensors.items() if k.startswith(f"{name}.")}
                layer = new_layer(
                    linear_at(self._module, name),
                    self._config,
                    sizes[f"{self._name}.{name}"],
                    static_input_scale="input_global_scale" in own,
                )
                layer.load_state_dict({k: t.to(self._device) for k, t in own.items()}, assign=True)
                layer.check(f"{self._name}.{name}")
                layers[name] = layer
            group.restore(layers)
        return reports


def _resting_device(hidden: list[torch.Tensor]) -> torch.device:
    """Where a stream of this size waits: on its GPU if it takes at most a tenth of what is free there, else in CPU memory."""
    device = hidden[0].device
    if device.type != "cuda":
        return device
    free, _ = torch.cuda.mem_get_info(device)
    return device if 10 * sum(tensor.nbytes for tensor in hidden) <= free else torch.device("cpu")


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


def _open_work_dir(model: PreTrainedModel, config: MRGPTQConfig, data: CalibrationData) -> WorkDir | None:
    if config.work_dir is None:
        return None
    recipe = {k: v for k, v in config.to_dict().items() if k not in ("dataset", "modules", "calibration")}
    recipe["batch_size"] = config.batch_size  # sums are rounded in its order
    identity: dict[str, object] = {
        "model": weights_fingerprint(model.named_parameters()),
        "config": recipe,
        "dataset": data.fingerprint,
    }
    return WorkDir(config.work_dir, identity)
