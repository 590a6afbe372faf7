"""Equalization: channels of a linear's input scaled so that FP4 loses least, by what makes the input.

In blocks, rotated or not, rounding the input and the weight of a linear to FP4 costs an output error in proportion to

    sum over blocks of  mean_i (d_i s_i)^2  *  mean_i (w_i / d_i)^2,

where s_i is the RMS of channel i of the input, w_i that of the weight's column i, and the input is multiplied by d and the
weight divided by it. It is least at d_i = sqrt(w_i / s_i), by Cauchy and Schwarz. The powers of two nearest to that are used,
which change no rounding, and nothing at run time: the weight of the norm before q, k, v or gate, up takes them, the rows of
v_proj those of o_proj's input, and the rows of up_proj those of down_proj's. (Cross-layer equalization of arXiv 1906.04721,
with the scales that suit block formats.)

Of a model's names only those in `_MAKERS` are known here. What does not compute the same afterwards is put back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from ..layers.replace import linear_at
from .capture import BlockCall, block_device, run_block
from .team import Team

LARGEST_EXPONENT = 6
"""Of a channel's factor, either way."""

_MAKERS = {"o_proj": "v_proj", "down_proj": "up_proj"}
"""Whose rows each channel of an input is made of, by the names of siblings."""

_NORM_TOLERANCE, _BLOCK_TOLERANCE = 1e-2, 5e-2
"""Relative errors of a norm's result and of what a block adds to its input. Both are 0 where a norm multiplies by its weight;
where it multiplies by 1 + weight, that rounds to the weight's dtype. What reads a norm and is no linear makes much larger ones."""


@dataclass
class _Norm:
    """What a norm gave in the recorded forward, and the linears that were called on it."""

    module: nn.Module
    input: Tensor
    output: Tensor
    readers: list[nn.Linear] = field(default_factory=list)


class _Recorder:
    """Records a forward of a block: the squares of each linear's input, summed over tokens, and what reads norms' results."""

    def __init__(self, block: nn.Module):
        self.norms: dict[nn.Module, _Norm] = {}
        self.squares: dict[nn.Linear, Tensor] = {}  # float32 [in_features]
        self._block = block

    def hooks(self) -> ExitStack:
        """A context in which a forward is recorded."""
        stack = ExitStack()
        for module in self._block.modules():
            if isinstance(module, nn.Linear):
                stack.callback(module.register_forward_pre_hook(self._linear).remove)
            elif _is_norm(module):
                stack.callback(module.register_forward_hook(self._norm).remove)
        return stack

    def _norm(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        if len(args) == 1 and isinstance(output, Tensor):
            self.norms[module] = _Norm(module, args[0], output)

    def _linear(self, module: nn.Linear, args: tuple) -> None:
        if len(args) != 1:
            return
        for norm in self.norms.values():
            if norm.output is args[0]:
                norm.readers.append(module)
        rows = args[0].flatten(0, -2)
        squares = torch.linalg.vector_norm(rows, dim=0, dtype=torch.float32).square()
        before = self.squares.get(module)
        self.squares[module] = squares if before is None else before + squares

    def add_up(self, team: Team, *, counts: bool) -> None:
        """Make everybody's squares the sums over those that count, for all linears of the block."""
        linears = [module for module in self._block.modules() if isinstance(module, nn.Linear)]
        sizes, device = [linear.in_features for linear in linears], block_device(self._block)
        mine = self.squares if counts else {}
        every = [
            mine[linear] if linear in mine else torch.zeros(size, device=device)
            for linear, size in zip(linears, sizes, strict=True)
        ]
        self.squares = dict(zip(linears, team.sum_(torch.cat(every)).split(sizes), strict=True))


_Change = tuple[Tensor, Tensor]
"""A parameter and the data that it had."""

_Step = Callable[[], list[_Change]]


@torch.no_grad()
def equalize(
    block: nn.Module, hidden: Tensor, call: BlockCall, groups: list[list[str]], team: Team
) -> dict[str, Tensor]:
    """Equalize the inputs of ``block``'s linears, in place; the statistics are those of one batch.

    Args:
        block: a decoder block whose linears are still `nn.Linear`.
        hidden: the batch, [B, T, hidden_size], of which each process takes its samples; the first process's counts.
        call: what the block is called with beside this process's samples.
        groups: the linears that will be quantized, by shared input; no others are changed.
        team: the processes that do it together.

    Returns:
        Norms' parameters that changed, by name relative to the block: they stay in the model beside the quantized linears.
    """
    hidden = hidden.to(block_device(block))  # the block before may be elsewhere
    (hidden,) = team.first_of([hidden] if team.rank == 0 else [], hidden.device)
    twice = team.rank >= len(hidden)
    hidden = hidden[team.samples(len(hidden))]
    recorder = _Recorder(block)
    with recorder.hooks():
        before = run_block(block, hidden, call)
    recorder.add_up(team, counts=not twice)
    added = (before - hidden).float().norm()

    def differs() -> bool:
        after = run_block(block, hidden, call)
        miss = ((after - before).float().norm() / added).nan_to_num(nan=torch.inf)
        return float(team.max_(miss.view(1))) > _BLOCK_TOLERANCE

    def attempt(steps: list[_Step]) -> list[_Change]:
        changes = [change for step in steps for change in step()]
        if not changes or not differs():
            return changes
        _undo(changes)
        return []

    by_rows = list(_row_steps(block, groups, recorder.squares))
    by_norm = list(_norm_steps(block, groups, recorder, team))
    changed = attempt([*by_rows, *by_norm])  # most blocks compute the same after all of them
    if not changed and by_norm:
        changed = attempt(by_rows)
        for step in by_norm:
            changed += attempt([step])
    kept = {parameter for parameter, _ in changed}
    norms = [(name, module) for name, module in block.named_modules() if module in recorder.norms]
    return {
        f"{name}.{key}": p.data for name, module in norms for key, p in module.named_parameters() if p in kept
    }


def set_parameters(block: nn.Module, values: dict[str, Tensor]) -> None:
    """Give parameters of ``block`` the values that `equalize` returned, each on its own device."""
    for name, value in values.items():
        parameter = block.get_parameter(name)
        parameter.data = value.to(parameter.device)


def _row_steps(
    block: nn.Module, groups: list[list[str]], squares: dict[nn.Linear, Tensor]
) -> Iterator[_Step]:
    """For inputs that are made of another linear's results, channel by channel."""
    quantized = {name for names in groups for name in names}
    for reader in sorted(quantized):
        parent, _, child = reader.rpartition(".")
        maker = f"{parent}.{_MAKERS[child]}" if child in _MAKERS else ""
        if maker not in quantized:
            continue
        owner, first, second = block.get_submodule(parent), linear_at(block, maker), linear_at(block, reader)
        if any("limit" in key for key in vars(owner)):  # its results are clamped, maybe not in this batch
            continue
        # Attention: each head of v_proj makes as many heads of the input as share it.
        width = getattr(owner, "head_dim", first.out_features) if child == "o_proj" else first.out_features
        if first.out_features % width or second.in_features % first.out_features:
            continue
        yield partial(_scale_rows, first, second, squares[second], width)


def _scale_rows(first: nn.Linear, second: nn.Linear, squares: Tensor, width: int) -> list[_Change]:
    shape = first.out_features // width, second.in_features // first.out_features, width
    weight = second.weight.float().square().sum(0)
    factors = _factors(squares.view(shape).sum(1), weight.view(shape).sum(1))
    changes = [_multiply(parameter, factors.flatten()) for parameter in first.parameters()]
    every = factors[:, None].expand(shape).flatten()
    return [*changes, _multiply(second.weight, every.reciprocal(), dim=-1)]


def _norm_steps(
    block: nn.Module, groups: list[list[str]], recorder: _Recorder, team: Team
) -> Iterator[_Step]:
    """For inputs that a norm gives, which nothing but quantized linears may read."""
    quantized = {linear_at(block, name) for names in groups for name in names}
    for norm in recorder.norms.values():
        if norm.readers and quantized.issuperset(norm.readers):
            yield partial(_scale_norm, norm, recorder.squares[norm.readers[0]], team)


def _scale_norm(norm: _Norm, squares: Tensor, team: Team) -> list[_Change]:
    columns = torch.cat([reader.weight.float() for reader in norm.readers]).square().sum(0)
    factors = _factors(squares, columns)
    if (factors == 1).all():
        return []
    changes = [_multiply(parameter, factors) for parameter in norm.module.parameters()]
    if not _gives(norm, factors, team):
        _undo(changes)
        changes, factors = _multiply_one_more(norm.module, factors)
        if not _gives(norm, factors, team):
            _undo(changes)
            return []
    return [*changes, *(_multiply(reader.weight, factors.reciprocal(), dim=-1) for reader in norm.readers)]


def _multiply_one_more(module: nn.Module, factors: Tensor) -> tuple[list[_Change], Tensor]:
    """For a norm that multiplies by 1 + weight; and what rounding to the weight's dtype leaves of the factors."""
    weight, *others = module.parameters()
    gain = 1 + weight.float()
    small = gain.abs() < 2.0**-4
    wanted = torch.where(small, weight.float(), gain * factors - 1)
    changes: list[_Change] = [(weight, weight.data)]
    weight.data = wanted.to(weight.dtype)
    factors = torch.where(small, 1.0, (1 + weight.float()) / gain)
    return [*changes, *(_multiply(other, factors) for other in others)], factors


def _gives(norm: _Norm, factors: Tensor, team: Team) -> bool:
    """Whether the norm now gives everybody what it gave, times the factors."""
    wanted = norm.output.float() * factors
    miss = (norm.module(norm.input).float() - wanted).norm() / wanted.norm()
    return float(team.max_(miss.nan_to_num(nan=torch.inf).view(1))) < _NORM_TOLERANCE


def _factors(squares: Tensor, weight: Tensor) -> Tensor:
    """Powers of two next to ``sqrt(w / s)``, with a median of about 1, from squared w and s; 1 where that is not known."""
    exponents = 0.25 * (weight.log2() - squares.log2())
    exponents = torch.where(exponents.isfinite(), exponents, torch.nan)
    exponents = (exponents - exponents.nanmedian()).round().clamp(-LARGEST_EXPONENT, LARGEST_EXPONENT)
    return torch.exp2(exponents.nan_to_num(nan=0.0))


def _multiply(parameter: Tensor, factors: Tensor, dim: int = 0) -> _Change:
    """Multiply what lies along ``dim``: rows, or with -1 columns."""
    change = (parameter, parameter.data)
    shape = [1] * parameter.dim()
    shape[dim] = -1
    parameter.data = (parameter.data * factors.view(shape)).to(parameter.dtype)
    return change


def _undo(changes: list[_Change]) -> None:
    for parameter, data in reversed(changes):
        parameter.data = data


def _is_norm(module: nn.Module) -> bool:
    """Whether it looks like a norm: its name says so, and it has a weight, and maybe a bias, per channel."""
    parameters = list(module.parameters())
    return "Norm" in type(module).__name__ and bool(parameters) and all(p.dim() == 1 for p in parameters)
