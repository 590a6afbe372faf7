"""One projection of all experts of a layer: statistics of the tokens routed to each, one solve, the simulated forward.

What the experts of a layer share: the rotation, and one scale of the input, so that a token is rotated and quantized once
for all experts that it is routed to. What each has of its own: second moments, target, scales of the weight, codes.

The correction compares both streams on the same tokens: those that the quantized model routes to an expert. What the
original model would have given for them there is computed with its own weights, wherever it routed them itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from ..config import MRGPTQConfig
from ..gptq import FP4Weight, descend, output_power, round_weight, solve
from ..hessian import OrderedFactor, SecondMoments, blended
from ..layers.experts import (
    DOWN,
    GATE_UP,
    FP4Experts,
    Projection,
    Routed,
    gather_rows,
    grouped_product,
    multiplies_groups,
)
from ..layers.linear import FP4Linear
from ..rotation import rotate
from ..scales import weight_global_scale
from .capture import require_finite
from .group import ROTATION_TOKENS, Group, Outcome, spread
from .team import Team

ROTATION_EXPERTS = 4
"""Experts, those with the most tokens, on which the Hadamard size of all is chosen."""

STACKED_VALUES = 1 << 26
"""Values of second moments that are collected and factored at once: as many experts as that allows, at least one."""

GATHERED_ROWS = 1 << 16
"""Rows of an expert that are copied to one place at once, though at least those of a batch."""

UNPACKED_VALUES = 1 << 26
"""Values of weights that are unpacked at once."""


def group_of(block: nn.Module, prefix: str, names: list[str], config: MRGPTQConfig, team: Team) -> Group:
    """The group of these linears, which share an input."""
    owner = names[0].rsplit(".", 2)[0]
    if names[0].count(".") > 1 and isinstance(block.get_submodule(owner), FP4Experts):
        return ExpertsGroup(block, prefix, names, config, team)
    return Group(block, prefix, names, config, team)


@contextmanager
def weights_together(groups: Iterable[Group]) -> Iterator[None]:
    """Context in which the original weights of experts, all of which will be replaced, are one tensor where that is faster."""
    projections = [
        group.projection for group in groups if isinstance(group, ExpertsGroup) and group.has_all_linears
    ]
    for projection in projections:
        projection.put_together()
    try:
        yield
    finally:
        for projection in projections:
            projection.together = None


@dataclass(frozen=True)
class _Seen:
    """One batch: what the linears see of its tokens [T, K], what the original stream has there, and the rows of each expert."""

    quantized: torch.Tensor
    original: torch.Tensor | None
    routed: Routed


class _Rows:
    """The rows of each expert in all batches; what was seen is taken out of the list."""

    def __init__(self, seen: list[_Seen]):
        self.offsets = torch.stack([batch.routed.offsets for batch in seen])
        self._offsets: list[list[int]] = self.offsets.tolist()
        self._tokens = [batch.quantized for batch in seen]
        self._original = [batch.original for batch in seen if batch.original is not None]
        rows = [batch.routed.rows for batch in seen if batch.routed.rows is not None]
        seen.clear()
        self._index: list[torch.Tensor] | None = None
        if rows:  # then one tensor of all tokens takes fewer gathers
            starts = accumulate((len(x) for x in self._tokens), initial=0)
            self._index = [own + start for own, start in zip(rows, starts, strict=False)]
            self._tokens = [torch.cat(self._tokens)]
            self._original = [torch.cat(self._original)] if self._original else []

    def new_moments(self, kernel: Callable[..., bool] | None) -> SecondMoments:
        """Of none yet."""
        first = self._tokens[0]
        return SecondMoments(first.shape[-1], first.device, cross=bool(self._original), kernel=kernel)

    def add_expert(self, moments: SecondMoments, expert: int) -> None:
        """Add those of one expert."""
        self._add(moments, [(i, own[expert], own[expert + 1]) for i, own in enumerate(self._offsets)])

    def add_all(self, moments: SecondMoments) -> None:
        """Add those of all experts."""
        self._add(moments, [(i, own[0], own[-1]) for i, own in enumerate(self._offsets)])

    def _add(self, moments: SecondMoments, where: list[tuple[int, int, int]]) -> None:
        """Add rows of some batches, from one to another."""
        count = sum(stop - start for _, start, stop in where)
        if count > GATHERED_ROWS and len(where) > 1:
            half = len(where) // 2
            self._add(moments, where[:half])
            self._add(moments, where[half:])
            return
        if not count:
            return
        index = None
        if self._index is not None:
            index = torch.cat([self._index[i][start:stop] for i, start, stop in where])

        def of(values: list[torch.Tensor]) -> torch.Tensor:
            if index is not None:
                return values[0][index]
            return torch.cat([values[i][start:stop] for i, start, stop in where])

        moments.add(of(self._tokens), of(self._original) if self._original else None)


class ExpertsGroup(Group):
    """`Group` of the linears of one projection of a `FP4Experts`."""

    def __init__(self, block: nn.Module, prefix: str, names: list[str], config: MRGPTQConfig, team: Team):
        super().__init__(block, prefix, names, config, team)
        self._owner = names[0].rsplit(".", 2)[0]
        experts: Any = block.get_submodule(self._owner)
        self._experts: FP4Experts = experts
        leaf = names[0].rpartition(".")[2]
        into = GATE_UP if leaf in experts.layout.projections[GATE_UP][1] else DOWN
        self.projection: Projection = getattr(experts, into)
        self._leaves = self.projection.linears
        self._into = into
        self._of_expert: dict[int, list[str]] = {}
        for name in names:
            self._of_expert.setdefault(int(name.split(".")[-2]), []).append(name)
        self.has_all_linears = len(names) == experts.num_experts * len(self._leaves)
        self._unpacked: torch.Tensor | None = None
        self._seen: list[_Seen] = []

    @property
    def entries(self) -> list[str]:
        """The projection, which is called once for all experts."""
        return [f"{self._owner}.{self._into}"]

    def start(self, inputs: Iterable[Any]) -> None:
        """Choose the rotation on the first batch; ``inputs``: the `Routed` that `observe` will be given."""
        first: Routed = next(iter(inputs))
        require_finite(first.tokens, f"the input of {self._title}")
        self._begin(first.tokens, lambda: self._samples(first))

    def _samples(self, routed: Routed) -> list[tuple[torch.Tensor, torch.Tensor]]:
        found = sorted(routed.by_expert(), key=lambda where: where[1] - where[2])
        busiest = [where for where in found if where[0] in self._of_expert]
        alike = [w for w in busiest if len(self._of_expert[w[0]]) == len(self._of_expert[busiest[0][0]])]
        return [
            (spread(routed.of_rows(routed.tokens, start, stop), ROTATION_TOKENS), self._weight(expert))
            for expert, start, stop in alike[:ROTATION_EXPERTS]
            if stop - start > 1
        ]

    def observe(self, x: Any, original: Any, tokens: int) -> None:
        """Add one batch of inputs, two `Routed`: of the quantized stream, and of the original one for the correction."""
        aimed = None
        if original is not None:
            aimed = original.tokens if x.source is None else self._original_input(x, original)
        rotated = self._rotated(x.tokens)
        self._note_maximum(rotated)
        # Times the input scale, as in `Group.observe`.
        values = rotated if self._rule is None else self._quantized(x.tokens, rotated)
        routed = x if self._experts.layout.routed else _without_zeros(x, aimed)
        self._seen.append(
            _Seen(values, None if aimed is None else self._rotated(aimed), replace(routed, source=None))
        )

    @torch.no_grad()
    def _original_input(self, x: Routed, original: Routed) -> torch.Tensor:
        """What the original model's experts give `DOWN` for the rows of the quantized stream."""
        assert x.source is not None and original.source is not None
        same_rows = replace(x.source, tokens=original.source.tokens.to(x.tokens.device))
        return self._experts.activate(self._experts.gate_up.compute(same_rows))

    def solve(self) -> dict[str, Outcome]:
        """Quantize every expert's weight from what was observed.

        An expert with fewer tokens than its input has features gets, for the missing ones, the average token of the layer.
        """
        rows = _Rows(self._seen)
        counts = self._team.sum_(rows.offsets.diff().sum(0)).tolist()
        if not sum(counts):
            raise ValueError(
                f"no calibration token reached {self._title}; use more samples, or add it to modules_to_not_convert"
            )
        divisor = None if self._rule is None else self._input_scale
        self._fix_input_scale()
        features = self._linears[self.names[0]].in_features
        pooled = None
        if any(counts[expert] < features for expert in self._of_expert):
            moments = rows.new_moments(self._kernels.add_moments)
            rows.add_all(moments)
            moments.sum_over(self._team.sum_)
            pooled = moments.mean(divisor)
        alike: dict[tuple[str, ...], list[int]] = {}  # some linears of some experts may be left out
        for expert, names in self._of_expert.items():
            alike.setdefault(tuple(name.rpartition(".")[2] for name in names), []).append(expert)
        together = max(1, STACKED_VALUES // features**2)
        outcomes: dict[str, Outcome] = {}
        for numbers in alike.values():
            for start in range(0, len(numbers), together):
                some = self._collect(numbers[start : start + together], rows)
                outcomes |= self._solve_stacked(some, pooled, divisor)
        return outcomes

    def _collect(self, numbers: list[int], rows: _Rows) -> dict[int, SecondMoments]:
        moments = {expert: rows.new_moments(self._kernels.add_moments) for expert in numbers}
        for expert, each in moments.items():
            rows.add_expert(each, expert)
            if self._team.size > 1:  # it waits for a GPU
                each.sum_over(self._team.sum_)
        return moments

    def _solve_stacked(
        self,
        moments: dict[int, SecondMoments],
        pooled: tuple[torch.Tensor, torch.Tensor | None] | None,
        divisor: torch.Tensor | None,
    ) -> dict[str, Outcome]:
        """Factor the moments of some experts as one batch, and solve each; a process of a team its share of them."""
        numbers, config = list(moments), self._config
        shares, seconds, crosses = zip(
            *(blended(each, pooled, divisor) for each in moments.values()), strict=True
        )
        titles = [f"{self.prefix}.{self._of_expert[expert][0]}" for expert in numbers]
        second = torch.stack(seconds)
        order = self._order(second)
        factor = OrderedFactor.stack(second, order, config.damp_percent, titles)
        weight = rotate(torch.stack([self._weight(expert) for expert in numbers]), self.hadamard_size)
        if crosses[0] is not None:
            weight = factor.correct_target(weight, weight @ torch.stack(crosses), config.error_correction)
        global_scale = None
        if self._format.has_global_scale:
            global_scale = weight_global_scale(torch.linalg.vector_norm(weight, torch.inf, (1, 2)))
        mine = self._team.rows(len(numbers))
        ordered = None if order is None else order[mine]
        solved = self._solve_together(
            weight[mine],
            second[mine],
            factor.part(mine),
            ordered,
            None if global_scale is None else global_scale[mine],
        )
        outcomes = {}
        for i, (packed, scale, power) in enumerate(self._joined(solved, weight)):
            names = self._of_expert[numbers[i]]
            rows = [self._linears[name].out_features for name in names]
            divisor = None if global_scale is None else global_scale[i : i + 1]
            parts = FP4Weight(packed, scale, divisor, self._format).split(rows)
            for name, part in zip(names, parts, strict=True):
                self._take(name, part)
                outcomes[name] = Outcome.of(power, moments[numbers[i]].tokens, shares[i])
        return outcomes

    def _solve_together(
        self,
        weight: torch.Tensor,
        second: torch.Tensor,
        factor: OrderedFactor,
        order: torch.Tensor | None,
        divisor: torch.Tensor | None,
    ) -> tuple[FP4Weight, torch.Tensor] | None:
        """`Group._solve_rows` of a stack of experts, whose columns are solved in the same launches; None for no expert."""
        if not len(weight):
            return None
        config, fmt = self._config, self._format
        divisors = [None] * len(weight) if divisor is None else divisor.split(1)
        scale = torch.stack(list(map(self._scales, weight, second, divisors)))
        rounded = solved = round_weight(weight, scale, fmt, divisor)
        if self._solves:
            solved = solve(weight, scale, fmt, divisor, factor.upper(), order, self._kernels)
            if config.descent_passes:
                solved = descend(weight, solved, second, factor.added, config.descent_passes, self._kernels)
        powers = [output_power(weight, second)]
        for each in (rounded, solved):
            powers.append(output_power(each.dequantize().neg_().add_(weight), second))
        return solved, torch.stack(powers, 1)

    def _joined(
        self, solved: tuple[FP4Weight, torch.Tensor] | None, weight: torch.Tensor
    ) -> Iterable[tuple[torch.Tensor, torch.Tensor, list[float]]]:
        """Codes, block scales and powers of all experts, from everybody's."""
        (count, rows, features), device = weight.shape, weight.device
        groups = features // self._format.group_size
        packed = torch.empty((0, rows, features // 2), dtype=torch.uint8, device=device)
        scale = torch.empty((0, rows, groups), dtype=self._format.scale_dtype, device=device)
        power = torch.empty((0, 3), device=device)
        if solved is not None:
            packed, scale, power = solved[0].packed, solved[0].scale, solved[1]
        all_ = [self._team.join_rows(part, count) for part in (packed, scale, power)]
        return zip(all_[0], all_[1], all_[2].tolist(), strict=True)

    def _weight(self, expert: int) -> torch.Tensor:
        return torch.cat([self._linears[name].weight.detach().float() for name in self._of_expert[expert]])

    def original(self) -> dict[str, Callable[[Any], torch.Tensor]]:
        """None: the projection calls its experts itself."""
        return {}

    def simulated(self) -> dict[str, Callable[[Any], torch.Tensor]]:
        """The projection as its FP4 linears will compute it, on weights that are unpacked once per block."""
        return {self.entries[0]: self._forward_routed}

    def _install(self, name: str, layer: FP4Linear) -> None:
        self.solved[name] = layer

    def _unpack(self) -> torch.Tensor:
        """`Group._unpack_weight` of every solved layer, [E, out, in]: others' rows are not set."""
        first = self._linears[self.names[0]]
        device, features = self.solved[self.names[0]].weight.device, first.in_features
        rows = len(self._leaves) * first.out_features
        unpacked = torch.empty(self._experts.num_experts, rows, features, dtype=self._dtype, device=device)
        together = max(1, UNPACKED_VALUES // first.weight.numel())
        for leaf, part in zip(
            self._leaves, self._experts.layout.parts(unpacked, len(self._leaves)), strict=True
        ):
            names = {f"{self._owner}.{expert}.{leaf}": expert for expert in range(len(part))}
            views = [(name, part[expert]) for name, expert in names.items() if name in self.solved]
            self._dequantized |= dict(views)
            for start in range(0, len(views), together):
                self._unpack_some(views[start : start + together])
        return unpacked

    def _unpack_some(self, views: Sequence[tuple[str, torch.Tensor]]) -> None:
        layers, rows = [self.solved[name] for name, _ in views], len(views[0][1])
        packed, scale = (
            torch.cat(parts) for parts in zip(*(layer.stored() for layer in layers), strict=True)
        )
        divisors = (
            torch.cat([layer.global_scales[key] for layer in layers]).repeat_interleave(rows)[:, None]
            for key in layers[0].global_scales
        )
        values = self._unpack_weight(packed, scale, divisors).split(rows)
        torch._foreach_copy_([view for _, view in views], list(values))

    def _forward_routed(self, routed: Routed) -> torch.Tensor:
        if self._unpacked is None:
            self._unpacked = self._unpack()
        values, _ = self._quantize_input(routed.tokens, self._input_scale)
        linears = self._leaves
        biased = self._linears[self.names[0]].bias is not None
        if self.has_all_linears and not biased and multiplies_groups(values, self._unpacked):
            return grouped_product(routed, values, self._unpacked)

        def run(expert: int, start: int, stop: int) -> torch.Tensor:
            parts = []
            for linear in linears:
                name = f"{self._owner}.{expert}.{linear}"
                if name in self.solved:
                    y = self._linear(name, routed.of_rows(values, start, stop))
                else:
                    (unchanged,) = self._experts.linears(expert, [linear])
                    y = unchanged(routed.of_rows(routed.tokens, start, stop))
                parts.append(y.to(routed.tokens.dtype))
            return self._experts.layout.join(parts, -1)

        rows = sum(linear.out_features for linear in self._experts.linears(0, linears))
        return gather_rows(routed, run, rows)


def _without_zeros(routed: Routed, original: torch.Tensor | None) -> Routed:
    """Of the tokens that a model gives to every expert those that are none of zeros, which are the ones meant for it."""
    meant = routed.tokens.ne(0).any(-1)
    if original is not None:
        meant &= original.ne(0).any(-1)
    before = nn.functional.pad(meant.cumsum(0), (1, 0))
    return Routed(routed.tokens, meant.nonzero().flatten(), before[routed.offsets])


def describe_coverage(rows: Iterable[Any]) -> str:
    """The experts whose second moments are not all their own, with the tokens that each got; empty if there are none."""
    few: dict[str, dict[int, int]] = {}
    for row in rows:
        found = re.fullmatch(r"(.+)\.(\d+)\.\w+", row.name)
        if found and row.own_share is not None and row.own_share < 1:
            few.setdefault(found[1], {})[int(found[2])] = row.tokens
    return "; ".join(
        f"{name}: " + ", ".join(f"{expert} ({tokens})" for expert, tokens in sorted(experts.items()))
        for name, experts in few.items()
    )
