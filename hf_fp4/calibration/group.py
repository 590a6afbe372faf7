"""Linears of one block that share an input: their statistics, their solve, and what they compute from then on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, TypeVar

import torch
from torch import nn

from ..backends import fake_quantize, fake_quantizes, quantize_input, select
from ..backends.reference import compute_dtype
from ..config import MRGPTQConfig
from ..formats import dequantize_blocks
from ..gptq import FP4Weight, activation_order, descend, output_power, round_weight, solve
from ..hessian import CACHED_ROWS, DampedMoments, OrderedFactor, SecondMoments
from ..layers.linear import FP4Linear
from ..layers.replace import linear_at
from ..rotation import HADAMARD_SIZES, rotate
from ..scales import input_global_scale, weight_global_scale, weight_scales
from .capture import require_finite
from .team import Team

ROTATION_TOKENS, ROTATION_ROWS, ROTATION_COLUMNS = 4096, 256, 2048
"""Tokens, output rows and input features on which the Hadamard size of a group is chosen."""

_T = TypeVar("_T")

_PROVISIONAL_HEADROOM = 8.0
"""Over the first batch's maximum, until the maximum of all batches is known; a power of two, so rounding agrees."""


@dataclass(frozen=True)
class Outcome:
    """What the solve of one linear left.

    rounded_error, error: squared output error over squared output, of rounding to nearest under the scales that the solve
    starts from and of the solve; tokens: how many reached an expert; own_share: of its second moments, see `hessian.blended`.
    """

    rounded_error: float
    error: float
    tokens: int | None = None
    own_share: float | None = None

    @classmethod
    def of(cls, power: list[float], tokens: int | None = None, own_share: float | None = None) -> Outcome:
        """From the output power of the weight and of the two errors."""
        whole = max(power[0], 1e-30)
        return cls(power[1] / whole, power[2] / whole, tokens, own_share)


@dataclass(frozen=True)
class _Trial:
    """One rotation tried out: what `solve` needs of a weight [N, K], rotated inputs [M, K], and what the layer sees of them."""

    weight: torch.Tensor
    scale: torch.Tensor
    global_scale: torch.Tensor | None
    order: torch.Tensor | None
    upper: torch.Tensor | None
    inputs: torch.Tensor
    seen: torch.Tensor

    def error(self, quantized: torch.Tensor) -> torch.Tensor:
        """Squared error of the outputs, summed up."""
        return (self.seen @ quantized.T - self.inputs @ self.weight.T).square().sum()


class Group:
    """Linears of one block that share an input: statistics, solve, and the simulated forward afterwards."""

    def __init__(self, block: nn.Module, prefix: str, names: list[str], config: MRGPTQConfig, team: Team):
        self.names, self.prefix, self._team = names, prefix, team
        self._config, self._format, self._rule = config, config.fp4_format, config.linear_activation_rule
        self._linears = {name: linear_at(block, name) for name in names}
        first = self._linears[names[0]].weight
        self._kernels = select(config.kernel_source, first.device)
        self.hadamard_size: int | None = None
        self._moments: SecondMoments | None = None
        self._input_scale: torch.Tensor | None = None
        self._absmax = torch.zeros(1, device=first.device)
        self._dtype = compute_dtype(first.dtype)
        self._product_dtype = self._kernels.product_dtype(self._dtype, first.device)
        self._memo: tuple[torch.Tensor, torch.Tensor] | None = None
        self._aimed: tuple[torch.Tensor, dict[str, torch.Tensor]] | None = None
        self._dequantized: dict[str, torch.Tensor] = {}
        self.solved: dict[str, FP4Linear] = {}

    @property
    def _title(self) -> str:
        return f"{self.prefix}.{self.names[0]}" + (
            "" if len(self.names) == 1 else f" (+{len(self.names) - 1})"
        )

    @property
    def _rows(self) -> int:
        return sum(linear.out_features for linear in self._linears.values())

    @property
    def _aims_by_outputs(self) -> bool:
        """Whether the original stream's outputs are cheaper to compare with, though they must be computed, than its inputs."""
        return 2 * self._rows <= self._linears[self.names[0]].in_features

    @property
    def _gives_outputs(self) -> bool:
        """Whether those outputs are the original stream's own; float16 ones are not: here they are added up in float32."""
        return self._aims_by_outputs and self._linears[self.names[0]].weight.dtype == self._dtype

    @property
    def entries(self) -> list[str]:
        """Names of the modules whose calls bring the group's input, relative to the block."""
        return self.names

    @property
    def bytes_per_token(self) -> int:
        """Of the inputs that `observe` will be given."""
        weight = self._linears[self.names[0]].weight
        return weight.shape[-1] * weight.element_size()

    def start(self, inputs: Iterable[Any]) -> None:
        """Choose the rotation; ``inputs``: what `observe` will be given, batch by batch, read up to the first token."""
        for x in inputs:
            first = x.flatten(0, -2)
            if len(first):  # an expert that no token of a batch was routed to has an empty input
                break
        require_finite(first, f"the input of {self._title}")
        self._begin(first, lambda: [(spread(first, ROTATION_TOKENS), self._stacked())] if len(first) else [])
        self._moments = SecondMoments(
            first.shape[-1],
            first.device,
            cross=self._config.uses_original_stream,
            cross_rows=self._rows if self._aims_by_outputs else None,
            kernel=self._kernels.add_moments,
        )

    def _begin(
        self, first: torch.Tensor, samples: Callable[[], list[tuple[torch.Tensor, torch.Tensor]]]
    ) -> None:
        """Choose the rotation on ``samples``, of inputs and the weight for them, and a scale for the time being."""
        size = self._config.hadamard_group_size
        if isinstance(size, str):  # "auto"
            size = self._best_size(samples() if len(first) else [], first.device)
        self.hadamard_size = size
        if self._format.has_global_scale:
            absmax = torch.zeros(1, device=first.device)
            if len(first):
                absmax += rotate(first, size).abs().amax()
            absmax = self._team.max_(absmax)
            self._input_scale = input_global_scale(absmax * _PROVISIONAL_HEADROOM / 2)

    def observe(self, x: Any, original: Any, tokens: int) -> None:
        """Add one batch of inputs: of the quantized stream, and of the original one for the correction.

        ``tokens``: how many the block has. A linear that gets fewer is an expert's, to which the two streams may route
        different ones: its target is not corrected. `ExpertsGroup` does better where it knows the routing.
        """
        assert self._moments is not None
        x = x.flatten(0, -2)
        if len(x) < tokens:
            original = None
            self._moments.forget_cross()
        if len(x) == 0:
            return
        rotated = self._rotated(x)
        self._note_maximum(rotated)
        if original is not None:
            original = self._aim(original)
        # Times the input scale, which is the same for all batches; `solve` divides by it.
        self._moments.add(rotated if self._rule is None else self._quantized(x, rotated), original)

    def _aim(self, original: torch.Tensor) -> torch.Tensor:
        """What cross moments are collected of: the original stream's rotated inputs, or its outputs."""
        if not self._aims_by_outputs:
            return self._rotated(original.flatten(0, -2))
        outputs = {
            name: self._product(original, linear.weight.detach()) for name, linear in self._linears.items()
        }
        if self._gives_outputs:
            self._aimed = (original, outputs)
        return torch.cat([y.flatten(0, -2) for y in outputs.values()], -1)

    def _note_maximum(self, rotated: torch.Tensor) -> None:
        """Of inputs; what is not finite stays so, and is refused by `_fix_input_scale`: asking now would wait for a GPU."""
        low, high = torch.aminmax(rotated)
        self._absmax = torch.maximum(self._absmax, torch.maximum(-low, high).float())

    def _rotated(self, x: torch.Tensor) -> torch.Tensor:
        """In float32, or where kernels do it in bfloat16: then moments take a tensor core's time."""
        if fake_quantizes(self._kernels, x):
            return quantize_input(self._kernels, x, self._format, None, self.hadamard_size, None)[0]
        return rotate(x, self.hadamard_size)

    def _quantized(self, x: torch.Tensor, rotated: torch.Tensor) -> torch.Tensor:
        """What the layer will see of ``x``, times the input scale."""
        if fake_quantizes(self._kernels, x):
            return self._quantize_input(x, self._input_scale)[0]
        assert self._rule is not None
        return fake_quantize(self._kernels, rotated, self._format, self._rule, self._input_scale)[0]

    def _quantize_input(
        self, x: torch.Tensor, scale: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return quantize_input(self._kernels, x, self._format, self._rule, self.hadamard_size, scale)

    def _best_size(
        self, samples: list[tuple[torch.Tensor, torch.Tensor]], device: torch.device
    ) -> int | None:
        """The size, or none, whose solve leaves the least output error on the half of each sample that it did not see.

        On the samples of the first process that has any; each tries some of the sizes.
        """
        parts = self._team.first_of([part for sample in samples for part in _some(*sample)], device)
        if not parts:
            return None
        halves = [self._halves(*sample) for sample in zip(parts[::2], parts[1::2], strict=True)]
        sizes = [None, *(k for k in HADAMARD_SIZES if parts[0].shape[-1] % k == 0)]
        mine = slice(self._team.rank, None, self._team.size)
        errors = torch.zeros(len(sizes), device=device)
        if sizes[mine]:
            tasks: list[Callable[[], _Trial]] = [
                partial(self._trial, size, *half) for size in sizes[mine] for half in halves
            ]
            trials = _side_by_side(tasks, device)
            solved = self._solve_trials(trials).dequantize()
            each = torch.stack([trial.error(q) for trial, q in zip(trials, solved, strict=True)])
            # NaN, where a factorization failed, is no better than anything.
            errors[mine] = each.view(-1, len(halves)).sum(1).nan_to_num(nan=torch.inf)
        return sizes[int(self._team.sum_(errors).argmin())]

    def _halves(
        self, sample: torch.Tensor, weight: torch.Tensor
    ) -> tuple[torch.Tensor, DampedMoments, torch.Tensor]:
        """Of `_some` of a sample: the weight, moments of one half of the inputs, and the other half."""
        seen, unseen = sample[0::2].float(), sample[1::2].float()
        moments = DampedMoments.of(seen.T @ seen / len(seen), self._config.damp_percent, self._title)
        return weight, moments, unseen

    def _trial(
        self, size: int | None, weight: torch.Tensor, moments: DampedMoments, x: torch.Tensor
    ) -> _Trial:
        weight, x = rotate(weight, size), rotate(x, size)
        moments, global_scale = moments.rotated(size), self._global_scale(weight)
        scale = self._scales(weight, moments.second, global_scale)
        order = self._order(moments.second) if self._solves else None
        upper = moments.upper(order, check=False) if self._solves else None
        seen = x
        if self._rule is not None:
            divisor = input_global_scale(x.abs().amax().view(1)) if self._format.has_global_scale else None
            values, divisor = fake_quantize(self._kernels, x, self._format, self._rule, divisor)
            seen = values if divisor is None else values / divisor
        return _Trial(weight, scale, global_scale, order, upper, x, seen)

    def _solve_trials(self, trials: list[_Trial]) -> FP4Weight:
        """The weights of all trials as one stack, whose columns are solved in the same launches."""

        def stack(name: str) -> Any:
            tensors = [getattr(trial, name) for trial in trials]
            return None if tensors[0] is None else torch.stack(tensors)

        weight, scale, divisor = stack("weight"), stack("scale"), stack("global_scale")
        divisor = None if divisor is None else divisor.flatten()
        if not self._solves:
            return round_weight(weight, scale, self._format, divisor)
        return solve(weight, scale, self._format, divisor, stack("upper"), stack("order"), self._kernels)

    def _stacked(self) -> torch.Tensor:
        return torch.cat([linear.weight.detach().float() for linear in self._linears.values()])

    def _global_scale(self, weight: torch.Tensor, team: Team | None = None) -> torch.Tensor | None:
        """Of a weight, of which each process of ``team`` has some rows, maybe none."""
        if not self._format.has_global_scale:
            return None
        absmax = weight.new_zeros(1) if not len(weight) else weight.abs().amax().view(1)
        return weight_global_scale(absmax if team is None else team.max_(absmax))

    def _scales(
        self, weight: torch.Tensor, second: torch.Tensor, global_scale: torch.Tensor | None
    ) -> torch.Tensor:
        rule, search = self._config.weight_rule, self._kernels.search_scales
        return weight_scales(weight, self._format, rule, global_scale, second.diagonal(), search)

    def _order(self, second: torch.Tensor) -> torch.Tensor | None:
        return activation_order(second) if self._config.act_order else None

    @property
    def _solves(self) -> bool:
        return self._config.method != "rtn"

    def _fix_input_scale(self) -> None:
        """Once the maximum of all inputs is known, which must be finite."""
        absmax = self._team.max_(self._absmax.nan_to_num(nan=torch.inf, posinf=torch.inf))
        require_finite(absmax, f"the input of {self._title}, rotated (its largest magnitude)")
        if self._input_scale is not None:
            self._input_scale = input_global_scale(absmax)

    def solve(self) -> dict[str, Outcome]:
        """Quantize the group's weights from what was observed; what became of each linear, by its name."""
        config, team, moments = self._config, self._team, self._moments
        assert moments is not None
        moments.sum_over(team.sum_)
        if moments.tokens == 0:
            raise ValueError(
                f"no calibration token reached {self._title}; use more samples, or add it to modules_to_not_convert"
            )
        second, cross = moments.mean(None if self._rule is None else self._input_scale)
        self._moments = moments = self._aimed = None  # nothing else may keep what is freed below
        self._fix_input_scale()
        count = self._rows
        rows = team.rows(count)
        weight = rotate(self._stacked()[rows], self.hadamard_size)
        order = self._order(second)
        factor = OrderedFactor.of(second, order, config.damp_percent, self._title)
        if cross is not None:
            wanted = cross[rows] if self._aims_by_outputs else weight @ cross
            del cross
            weight = factor.correct_target(weight, wanted, config.error_correction)
            del wanted
        global_scale = self._global_scale(weight, team)
        part, power = self._solve_rows(weight, second, factor, order, global_scale)
        del weight, second, factor
        packed, scales = (team.join_rows(tensor, count) for tensor in (part.packed, part.scale))
        quantized = FP4Weight(packed, scales, global_scale, self._format)
        sizes = [linear.out_features for linear in self._linears.values()]
        for name, part in zip(self.names, quantized.split(sizes), strict=True):
            self._take(name, part)
        return dict.fromkeys(self.names, Outcome.of(team.sum_(power).tolist()))

    def _solve_rows(
        self,
        weight: torch.Tensor,
        second: torch.Tensor,
        factor: OrderedFactor,
        order: torch.Tensor | None,
        global_scale: torch.Tensor | None,
    ) -> tuple[FP4Weight, torch.Tensor]:
        """Quantize rows of a rotated weight; output power of them, of the error of rounding, and of the solve's, [3]."""
        scale = self._scales(weight, second, global_scale)
        rounded = solved = round_weight(weight, scale, self._format, global_scale)
        if self._solves:
            solved = solve(weight, scale, self._format, global_scale, factor.upper(), order, self._kernels)
            if passes := self._config.descent_passes:
                solved = descend(weight, solved, second, factor.added, passes, self._kernels)
        powers = [output_power(weight, second)]
        for each in (rounded, solved):
            powers.append(output_power(each.dequantize().neg_().add_(weight), second))
        return solved, torch.stack(powers)

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
        self._dequantized[name] = self._unpack_weight(*layer.stored(), layer.global_scales.values())
        self.solved[name] = layer

    def _unpack_weight(
        self, packed: torch.Tensor, scale: torch.Tensor, divisors: Iterable[torch.Tensor]
    ) -> torch.Tensor:
        """What quantized inputs are multiplied with, [N, K]; ``divisors``: global scales, [1] or of each row [N, 1]."""
        weight = dequantize_blocks(packed, scale, self._format, self._dtype)
        for divisor in divisors:  # powers of two, so the products are the layer's own bits
            weight /= divisor.to(weight.dtype)
        return weight

    def original(self) -> dict[str, Callable[[Any], torch.Tensor]]:
        """Per linear a function that computes what it does in less time; none where its own forward is as fast."""
        if self._product_dtype == self._dtype and not self._gives_outputs:
            return {}
        return {name: partial(self._forward_original, name) for name in self._linears}

    def _forward_original(self, name: str, x: torch.Tensor) -> torch.Tensor:
        linear = self._linears[name]
        if linear.bias is None and self._aimed is not None and self._aimed[0] is x:  # observed just now
            y = self._aimed[1].pop(name)
            if not self._aimed[1]:
                self._aimed = None
            return y
        if self._product_dtype == self._dtype:
            return torch.nn.functional.linear(x, linear.weight, linear.bias)
        bias = None if linear.bias is None else linear.bias.to(self._product_dtype)
        return self._product(x, linear.weight, bias)

    def _product(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``x weight^T + bias``, added up in float32 and rounded once whatever it is computed in."""
        dtype = self._product_dtype
        if dtype == x.dtype:
            return torch.nn.functional.linear(x, weight, bias)
        weight, y = weight.to(dtype), x.new_empty(*x.shape[:-1], len(weight))
        rows, results = (tensor.flatten(0, -2).split(CACHED_ROWS) for tensor in (x, y))
        for row, result in zip(rows, results, strict=True):
            result.copy_(torch.nn.functional.linear(row.to(dtype), weight, bias))
        return y

    def simulated(self) -> dict[str, Callable[[Any], torch.Tensor]]:
        """Per entry a function that computes what its FP4Linear will, on weights that are unpacked once per block."""
        return {name: partial(self._forward, name) for name in self.names}

    def _forward(self, name: str, x: torch.Tensor) -> torch.Tensor:
        if self._memo is None or self._memo[0] is not x:
            self._memo = (x, self._quantize_input(x, self.solved[name].input_global_scale)[0])
        values = self._memo[1]
        if name == self.names[-1]:  # nobody else will ask for it
            self._memo = None
        return self._linear(name, values).to(x.dtype)

    def _linear(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """What the solved layer gives for an input that is rotated and quantized already."""
        y, bias = self._product(values, self._dequantized[name]), self.solved[name].bias
        return y if bias is None else y + bias.to(y.dtype)


def _side_by_side(tasks: list[Callable[[], _T]], device: torch.device) -> list[_T]:
    """The results of tasks of which each leaves most of a GPU idle, computed on streams of their own."""
    if device.type != "cuda":
        return [task() for task in tasks]
    results, main = [], torch.cuda.current_stream(device)
    streams = [_stream(device, number) for number in range(len(tasks))]
    for task, stream in zip(tasks, streams, strict=True):
        stream.wait_stream(main)
        with torch.cuda.stream(stream):
            results.append(task())
    for stream in streams:
        main.wait_stream(stream)
    return results


@cache
def _stream(device: torch.device, number: int) -> torch.cuda.Stream:
    """The same every time: cuBLAS keeps memory for every stream that it has met."""
    return torch.cuda.Stream(device)


def spread(rows: torch.Tensor, count: int) -> torch.Tensor:
    """At most ``count`` rows, evenly spread."""
    return rows[:: max(1, -(-len(rows) // count))]


def _some(sample: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a sample of inputs and the weight for them, what the trials of rotations take."""
    columns = _spread_columns(sample.shape[-1], sample.device)
    return sample[:, columns], spread(weight, ROTATION_ROWS)[:, columns]


def _spread_columns(features: int, device: torch.device) -> torch.Tensor:
    """At most `ROTATION_COLUMNS` columns, in whole blocks of the largest rotation, evenly spread; all if they are few."""
    columns, block = torch.arange(features, device=device), max(HADAMARD_SIZES)
    if features <= ROTATION_COLUMNS or features % block:
        return columns
    return spread(columns.view(-1, block), ROTATION_COLUMNS // block).flatten()


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
