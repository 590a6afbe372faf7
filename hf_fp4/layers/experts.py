"""`FP4Experts`: the experts of one layer, which transformers keeps in 3-D parameters, as linears of their own.

Linears are what everything else in this package converts, calibrates, checks and stores; so the experts of a model are
taken apart first. They are stored under the names that serving engines read, ``experts.{e}.gate_proj`` and so on.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
)
from transformers.integrations import moe

from ..backends import Kernels, KernelSource, input_arguments, select
from .gated_mlp import gate_in_kernels, is_silu
from .linear import KERNEL_ROWS, KERNEL_TILE_ROWS, FP4Linear, HasStoredLayout, is_watched
from .linear import use_kernels as use_kernels_by_layer

GATE_UP, DOWN = "gate_up", "down"


@dataclass(frozen=True)
class ExpertsLayout:
    """How a module of transformers holds its experts, as ``use_experts_implementation`` describes it.

    gated: ``gate_up_proj`` rather than ``up_proj``; transposed: [E, in, out] rather than [E, out, in]; biased: there is a
    ``.._bias`` [E, out] of each; concatenated: rows of gate and up one after the other, not taking turns; routed: its
    forward takes tokens, experts' numbers and weights, not the tokens of every expert one after the other.
    """

    gated: bool
    transposed: bool
    biased: bool
    concatenated: bool
    routed: bool

    @property
    def projections(self) -> dict[str, tuple[str, tuple[str, ...]]]:
        """`GATE_UP` and `DOWN` -> the 3-D parameter, and the linears that each expert's part of it becomes."""
        into = ("gate_up_proj", ("gate_proj", "up_proj")) if self.gated else ("up_proj", ("up_proj",))
        return {GATE_UP: into, DOWN: ("down_proj", ("down_proj",))}

    @property
    def parameters(self) -> list[str]:
        """Names of the parameters that are taken apart."""
        weights = [parameter for parameter, _ in self.projections.values()]
        return weights + [f"{name}_bias" for name in weights if self.biased]

    def split(self, parameter: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
        """A 3-D weight or the 2-D biases -> views of every linear's part, by its name: ``3.up_proj.weight``."""
        name = parameter.removesuffix("_bias")
        leaf = "weight" if name == parameter else "bias"
        linears = next(linears for own, linears in self.projections.values() if own == name)
        if leaf == "weight" and self.transposed:
            value = value.transpose(1, 2)
        return {
            f"{expert}.{linear}.{leaf}": part[expert]
            for linear, part in zip(linears, self.parts(value, len(linears)), strict=True)
            for expert in range(len(value))
        }

    def parts(self, value: torch.Tensor, count: int) -> list[torch.Tensor]:
        """Views of the rows [E, out, ...] of each of ``count`` linears: the inverse of `join` in dimension 1."""
        if self.concatenated:
            return list(value.chunk(count, 1))
        return [value[:, start::count] for start in range(count)]

    def join(self, parts: list[torch.Tensor], dim: int) -> torch.Tensor:
        """What the linears of one projection give, or hold, in the order of the 3-D parameter's rows."""
        if self.concatenated:
            return torch.cat(parts, dim)
        dim %= parts[0].dim()
        return torch.stack(parts, dim + 1).flatten(dim, dim + 1)


def layout_of_experts(module: nn.Module) -> ExpertsLayout | None:
    """The layout of ``module`` if it holds experts in 3-D parameters and computes what `FP4Experts` does, else None."""
    weights = {name: p.shape for name, p in module.named_parameters(recurse=False) if p.dim() == 3}
    gated = "gate_up_proj" in weights
    into, down = weights.get("gate_up_proj" if gated else "up_proj"), weights.get("down_proj")
    if into is None or down is None or into[0] != down[0]:
        return None
    arguments = list(inspect.signature(module.forward).parameters)
    described: Any = module
    if hasattr(module, "is_transposed"):  # use_experts_implementation
        layout = ExpertsLayout(
            gated, described.is_transposed, described.has_bias, described.is_concatenated, routed=True
        )
    else:
        width = 2 if gated else 1
        transposed = into[2] == width * down[1] and into[1] == down[2]
        layout = ExpertsLayout(gated, transposed, False, True, routed=len(arguments) == 3)
        if len(arguments) == 3 and not hasattr(module, "_apply_gate"):
            return None  # whatever its forward does beside the linears is not known
        if len(arguments) not in (1, 3):
            return None
    if {name for name, _ in module.named_parameters(recurse=False)} != set(layout.parameters):
        return None
    return layout


def gates_by_silu(own: Any, layout: ExpertsLayout) -> bool:
    """Whether ``own`` makes silu(gate) * up of the output of `GATE_UP`, gate and up one after the other."""
    default = getattr(moe, "_default_apply_gate", None)
    plain = getattr(type(own), "_apply_gate", default) is default
    concatenated = layout.gated and layout.concatenated
    return concatenated and plain and is_silu(getattr(own, "act_fn", None))


@dataclass(frozen=True)
class Routed:
    """The input of one projection: rows sorted by expert.

    tokens: [T, K]; rows: int64 [S], the token that each row is, or None: they are the tokens as they come; offsets: int64
    [E + 1], where each expert's rows start, rows after the last offset belong to none; source: the layer's input, for `DOWN`;
    gated: tokens are [T, 2 K], gate and up, and silu(gate) * up is meant. Only kernels are given that.
    """

    tokens: torch.Tensor
    rows: torch.Tensor | None
    offsets: torch.Tensor
    source: Routed | None = None
    gated: bool = False

    @property
    def count(self) -> int:
        """Number of rows."""
        return len(self.tokens if self.rows is None else self.rows)

    def of_rows(self, values: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Rows ``start`` to ``stop`` of ``values`` [T, ...], which has something for every token."""
        return values[start:stop] if self.rows is None else values[self.rows[start:stop]]

    def by_expert(self) -> Iterator[tuple[int, int, int]]:
        """Number of each expert that has rows, and where they start and stop."""
        for expert, (start, stop) in enumerate(pairwise(self.offsets.tolist())):
            if start < stop:
                yield expert, start, stop


class Projection(nn.Module):
    """One of the two linears of all experts; it owns no tensor. A module, so that calibration can hook its calls."""

    def __init__(self, experts: FP4Experts, name: str):
        super().__init__()
        self._experts = (experts,)  # in a tuple, or it would be a child of this module
        self.linears = experts.layout.projections[name][1]
        self.together: torch.Tensor | None = None
        """The weights of its `nn.Linear`s [E, out, in] while they are views of that, see `put_together`."""
        self._stacked: _Stacked | None = None

    def forward(self, routed: Routed) -> torch.Tensor:
        """[S, out], zeros for rows of no expert."""
        return self.compute(routed)

    def applies_silu(self, x: torch.Tensor) -> bool:
        """Whether kernels make their input of gate and up ``x`` themselves. Not while somebody looks at that input."""
        return not is_watched(self) and self._stacked is not None and self._stacked.takes(x)

    def compute(self, routed: Routed) -> torch.Tensor:
        """`forward`, also while calibration has that redirected."""
        experts, x = self._experts[0], routed.tokens
        if self._stacked is not None and self._stacked.takes(x):
            return self._stacked.run(routed)
        if self.together is not None and multiplies_groups(x, self.together):
            return grouped_product(routed, x, self.together)

        def run(expert: int, start: int, stop: int) -> torch.Tensor:
            x = routed.of_rows(routed.tokens, start, stop)
            return experts.layout.join([linear(x) for linear in experts.linears(expert, self.linears)], -1)

        return gather_rows(routed, run, self._out_features)

    @property
    def _out_features(self) -> int:
        return sum(linear.out_features for linear in self._experts[0].linears(0, self.linears))

    def put_together(self) -> None:
        """Make views of one tensor of the weights of its `nn.Linear`s, if one product of all experts is faster with that."""
        experts = self._experts[0]
        found = [experts.linears(number, self.linears) for number in range(experts.num_experts)]
        every = [linear for linears in found for linear in linears]
        if any(type(linear) is not nn.Linear or linear.bias is not None for linear in every):
            return
        first = every[0].weight
        together = first.new_empty(len(found), self._out_features, first.shape[1], requires_grad=False)
        if not multiplies_groups(first, together):
            return
        parts = experts.layout.parts(together, len(self.linears))
        for of_linear, part in zip(zip(*found, strict=True), parts, strict=True):
            for linear, view in zip(of_linear, part, strict=True):
                linear.weight.data = view.copy_(linear.weight.detach())
        self.together = together

    # --- all experts in one tensor, which kernels run at once

    def layers(self) -> list[list[FP4Linear]]:
        """Its linears by expert, if all are FP4 linears that one kernel can run; else none."""
        experts = self._experts[0]
        found = [experts.linears(number, self.linears) for number in range(experts.num_experts)]
        every = [linear for linears in found for linear in linears]
        alike = {_kind(linear) for linear in every if type(linear) is FP4Linear and not linear.weight.is_meta}
        same = len(alike) == 1 and all(type(linear) is FP4Linear for linear in every)
        if not same:
            return []
        inputs: list[Any] = [linear.input_global_scale for linear in every]
        tied = [(scale, inputs[0]) for scale in inputs]
        for linears in found:  # other tools may give gate and up scales of their own
            divisors: list[Any] = [linear.weight_global_scale for linear in linears]
            tied += [(divisor, divisors[0]) for divisor in divisors]
        return found if all(a is b or torch.equal(a, b) for a, b in tied) else []

    def stack(self, kernels: Kernels) -> bool:
        """Lay out the weights as one tensor for ``kernels``; the linears' become views of it. Whether that was possible."""
        found = self.layers()
        if not found or self._out_features % KERNEL_ROWS or kernels.module is None:
            return False
        if kernels.backend == "cpu":  # its products are fast for one expert at a time
            return False
        if not hasattr(kernels.module, "grouped_linear"):  # a package from before there were experts
            return False
        layout, first = self._experts[0].layout, found[0][0]
        by_linear = list(zip(*found, strict=True))

        def joined(name: str) -> torch.Tensor:
            return layout.join(
                [torch.stack([getattr(each, name) for each in linears]) for linears in by_linear], 1
            )

        divisors = None
        if first.weight_global_scale is not None:
            own_divisors: list[Any] = [linears[0].weight_global_scale for linears in found]
            divisors = torch.cat(own_divisors)
        # Tiles of rows cannot be divided among the linears, or only between whole ones; rows always can.
        tiled = len(by_linear) == 1 or (layout.concatenated and first.out_features % KERNEL_TILE_ROWS == 0)
        packed, row_scale = kernels.module.prepare_experts(
            joined("weight"), joined("weight_scale"), divisors, **({} if tiled else {"by_row": True})
        )
        parts = [layout.parts(tensor, len(by_linear)) for tensor in (packed, row_scale)]
        for linears, of_linear, scales in zip(by_linear, *parts, strict=True):
            for layer, own, own_scale in zip(linears, of_linear, scales, strict=True):
                layer.take_part(kernels, own, own_scale)
        bias = None if first.bias is None else joined("bias").detach()
        every = [layer for linears in found for layer in linears]
        self._stacked = _Stacked(kernels, packed, row_scale, bias, every)
        return True

    def unstack(self) -> None:
        """Give each linear memory of its own again."""
        if self._stacked is not None:
            for linear in self._stacked.linears:
                linear.leave_part()
            self._stacked = None


def _kind(linear: FP4Linear) -> tuple[Any, ...]:
    """What must be the same for one kernel to run several linears."""
    rules = (linear.format, linear.hadamard_size, linear.activation_scale_rule, linear.in_features)
    return (*rules, linear.bias is None, linear.input_global_scale is None, linear.weight.device)


@dataclass(frozen=True)
class _Stacked:
    """Weights of one projection of all experts: uint8 [E, ...], float32 [E, N], bias [E, N]; and its linears."""

    kernels: Kernels
    packed: torch.Tensor
    row_scale: torch.Tensor
    bias: torch.Tensor | None
    linears: list[FP4Linear]

    def takes(self, x: torch.Tensor) -> bool:
        """Whether the kernels can compute this; gradients and autocast are the linears' own affair."""
        differentiates = torch.is_grad_enabled() and x.requires_grad
        autocast = torch.is_autocast_enabled(x.device.type)
        return self.kernels.take(x.dtype) and not differentiates and not autocast

    def run(self, routed: Routed) -> torch.Tensor:
        """[S, N]."""
        layer, module = self.linears[0], self.kernels.module
        assert module is not None
        x, up = routed.tokens.chunk(2, -1) if routed.gated else (routed.tokens, None)
        return module.grouped_linear(
            x,
            routed.offsets,
            self.packed,
            self.row_scale,
            None if self.bias is None else self.bias.to(x.dtype),
            up=up,
            index=routed.rows,
            **input_arguments(layer.activation_scale_rule, layer.hadamard_size, layer.input_global_scale),
        )


def multiplies_groups(values: torch.Tensor, weights: torch.Tensor) -> bool:
    """Whether torch has a fast `grouped_product` of these."""
    if not values.is_cuda or not values.dtype == weights.dtype == torch.bfloat16:
        return False
    aligned = weights.shape[1] % 8 == weights.shape[2] % 8 == 0
    return aligned and torch.cuda.get_device_capability(values.device) >= (9, 0)


def grouped_product(routed: Routed, values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """`gather_rows` of ``values`` [T, K], one for every token, times each expert's weight of [E, N, K], in one product."""
    x = values if routed.rows is None else values[routed.rows]
    y = nn.functional.grouped_mm(x, weights.mT, offs=routed.offsets[1:].int())
    absent = torch.arange(len(y), device=y.device) >= routed.offsets[-1]
    return y.masked_fill_(absent[:, None], 0)


def gather_rows(
    routed: Routed, run: Callable[[int, int, int], torch.Tensor], out_features: int
) -> torch.Tensor:
    """The rows [S, out_features] of all experts; ``run(expert, start, stop)`` gives those of one."""
    parts = [run(*where) for where in routed.by_expert()]
    absent = routed.count - sum(map(len, parts))
    if absent or not parts:
        parts.append((parts[0] if parts else routed.tokens).new_zeros(absent, out_features))
    return torch.cat(parts)


def _before_loading(experts: FP4Experts, *_: Any) -> None:
    """The linears load what is on disk, of which the weights of all are made anew."""
    experts._loading = experts._source
    experts.use_kernels(None)


def _after_loading(experts: FP4Experts, *_: Any) -> None:
    experts.use_kernels(experts._loading)


class FP4Experts(HasStoredLayout, nn.Module):
    """The experts of one layer with a `FP4Linear` (an `nn.Linear` before, or where it stays one) for each matrix.

    It takes the place of the module ``own`` of the model and is called as that is. Routing is the model's; so are the
    activation, its constants, and a norm of each expert's output, for which ``own`` is kept without its 3-D parameters.

    Submodules: ``{e}.gate_proj``, ``{e}.up_proj`` [I, H] and ``{e}.down_proj`` [H, I] of expert ``e``; ``gate_up`` and
    ``down``, which run them; and those of ``own``.

    Args:
        own: a module with experts in 3-D parameters, of which the linears are views until `release`.
        layout: what `layout_of_experts` says about it.
    """

    _is_hf_initialized = True

    def __init__(self, own: Any, layout: ExpertsLayout):
        super().__init__()
        self.layout, self.num_experts = layout, len(own.down_proj)
        self._gates_by_silu = gates_by_silu(own, layout)
        self._own = (own,)
        self._source: KernelSource | None = None
        for name, child in own.named_children():
            self.add_module(name, child)
        tensors = {
            key: part
            for name in layout.parameters
            for key, part in layout.split(name, getattr(own, name).detach()).items()
        }
        for expert in range(self.num_experts):
            names = [name for _, linears in layout.projections.values() for name in linears]
            self.add_module(
                str(expert),
                nn.ModuleDict(
                    {
                        n: _linear(tensors[f"{expert}.{n}.weight"], tensors.get(f"{expert}.{n}.bias"))
                        for n in names
                    }
                ),
            )
        self.gate_up, self.down = Projection(self, GATE_UP), Projection(self, DOWN)
        self.train(own.training)
        self._loading: KernelSource | None = None
        self.register_load_state_dict_pre_hook(_before_loading)
        self.register_load_state_dict_post_hook(_after_loading)

    @property
    def own(self) -> Any:
        """The model's own module."""
        return self._own[0]

    def linears(self, expert: int, names: Iterable[str]) -> list[Any]:
        """Those linears of one expert."""
        modules: Any = self._modules[str(expert)]
        return [modules[name] for name in names]

    # --- layouts, as `FP4Linear` has them

    def use_kernels(self, source: KernelSource | None) -> list[FP4Linear]:
        """Lay out what kernels can run for all experts at once; None: nothing. Returns the linears of which it is made."""
        self._source = source
        taken = []
        for projection in (self.gate_up, self.down):
            projection.unstack()
            layers = [linear for linears in projection.layers() for linear in linears]
            if source is not None and layers and projection.stack(select(source, layers[0].weight.device)):
                taken += layers
        return taken

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> FP4Experts:
        with self.stored_layout():
            return super()._apply(fn, recurse)

    # --- the 3-D parameters

    def release(self) -> None:
        """Let go of the 3-D parameters; linears that are still views of them get memory of their own."""
        own = self.own
        for name in self.layout.parameters:
            own.register_parameter(name, nn.Parameter(getattr(own, name).to("meta"), requires_grad=False))
        for module in self.modules():
            if type(module) is nn.Linear:
                for key, parameter in module.named_parameters():
                    if parameter.untyped_storage().nbytes() > parameter.nbytes and not parameter.is_meta:
                        setattr(
                            module, key, nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
                        )

    def fused(self) -> nn.Module:
        """The model's own module, with 3-D parameters made of the linears, which must be `nn.Linear`s."""
        own = self.own
        for parameter, linears in self.layout.projections.values():
            for leaf in ("weight", "bias") if self.layout.biased else ("weight",):
                parts = [
                    torch.stack(
                        [
                            getattr(self.linears(expert, [linear])[0], leaf).detach()
                            for expert in range(self.num_experts)
                        ]
                    )
                    for linear in linears
                ]
                value = self.layout.join(parts, 1)
                if leaf == "weight" and self.layout.transposed:
                    value = value.transpose(1, 2).contiguous()
                own.register_parameter(
                    parameter if leaf == "weight" else f"{parameter}_bias", nn.Parameter(value)
                )
        return own.train(self.training)

    # --- what it computes

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor | None = None,
        top_k_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As the model's own module.

        Args:
            hidden_states: [T, H]; without the others, the tokens of every expert one after the other, equally many.
            top_k_index: int64 [T, k], experts of each token; a number beyond the last expert is nobody's.
            top_k_weights: [T, k].

        Returns:
            [T, H] in the dtype of ``hidden_states``.
        """
        if top_k_index is None or top_k_weights is None:
            each = len(hidden_states) // self.num_experts
            offsets = each * torch.arange(self.num_experts + 1, device=hidden_states.device)
            return self._outputs(Routed(hidden_states, None, offsets))
        experts, order = top_k_index.reshape(-1).sort(stable=True)
        numbers = torch.arange(self.num_experts + 1, device=experts.device, dtype=experts.dtype)
        routed = Routed(hidden_states, order // top_k_index.shape[-1], torch.searchsorted(experts, numbers))
        weighted = self._outputs(routed) * top_k_weights.reshape(-1, 1)[order]
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        return weighted[back].view(*top_k_index.shape, -1).sum(1).to(hidden_states.dtype)

    def _outputs(self, routed: Routed) -> torch.Tensor:
        """What every expert makes of its rows, [S, H]."""
        inner = self.gate_up(routed)
        gated = self._gates_by_silu and self.down.applies_silu(inner)
        inner = inner if gated else self.activate(inner)
        outputs = self.down(Routed(inner, None, routed.offsets, routed, gated))
        own = self.own
        return own.post_expert_norm(outputs) if getattr(own, "has_post_expert_norm", False) else outputs

    def activate(self, x: torch.Tensor) -> torch.Tensor:
        """The output of `GATE_UP` [S, 2 I], in the order of the model's own parameter -> the input of `DOWN` [S, I]."""
        own = self.own
        if not self.layout.gated:
            return own.act_fn(x)
        if hasattr(own, "_apply_gate"):
            return own._apply_gate(x)
        gate, up = x.chunk(2, -1)
        return own.act_fn(gate) * up

    def extra_repr(self) -> str:
        return f"{type(self.own).__name__}, num_experts={self.num_experts}"


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    linear = nn.Linear.__new__(nn.Linear)  # without a weight of its own, which takes long to draw
    nn.Module.__init__(linear)
    linear.out_features, linear.in_features = weight.shape
    linear.weight = nn.Parameter(weight, requires_grad=weight.is_floating_point())
    linear.register_parameter("bias", None if bias is None else nn.Parameter(bias))
    return linear


def take_apart(model: nn.Module, names: Iterable[str]) -> dict[str, FP4Experts]:
    """Put a `FP4Experts` of `nn.Linear`s, views of what was there, in the place of each of the named modules."""
    taken = {}
    for name in names:
        own = model.get_submodule(name)
        layout = layout_of_experts(own)
        assert layout is not None
        taken[name] = FP4Experts(own, layout)
        model.set_submodule(name, taken[name])
    return taken


def put_back(model: nn.Module, experts: dict[str, FP4Experts]) -> None:
    """Undo `take_apart`, on the meta device or before `release`."""
    for name, taken in experts.items():
        model.set_submodule(name, taken.own)


def experts_in(model: nn.Module) -> dict[str, FP4Experts]:
    """Every `FP4Experts` of ``model`` by its full name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FP4Experts)}


def use_kernels(model: nn.Module, source: KernelSource) -> set[Kernels]:
    """Lay out every FP4 layer of ``model`` for the kernels of its device: all experts of a layer as one, others by themselves.

    Returns what was found for the devices of the layers.
    """
    stacked = {linear for experts in experts_in(model).values() for linear in experts.use_kernels(source)}
    gate_in_kernels(model)
    return use_kernels_by_layer(model, source, stacked)


def conversions_of_linears(conversions: Iterable[WeightTransform]) -> list[WeightTransform]:
    """transformers' conversions of a checkpoint's names and tensors, for a model whose experts are taken apart.

    Merging experts into 3-D parameters becomes, if the checkpoint has other names for their linears, renaming them.
    """
    changed: list[WeightTransform] = []
    for conversion in conversions:
        if not isinstance(conversion, WeightConverter) or not _merges_experts(conversion):
            changed.append(conversion)
            continue
        (target,) = conversion._original_target_patterns
        linears = (
            ("gate_proj", "up_proj") if target.endswith("gate_up_proj") else (target.rpartition(".")[2],)
        )
        for source, linear in zip(conversion._original_source_patterns, linears, strict=True):
            before, own = re.fullmatch(r"(.*)\*\.(\w+)\.weight", source).groups()  # type: ignore[union-attr]
            if own != linear:
                before = before.replace("\\", "")
                renaming = WeightRenaming(rf"{re.escape(before)}(\d+)\.{own}\.", rf"{before}\1.{linear}.")
                renaming.scope_prefix = conversion.scope_prefix
                renaming.base_model_prefix = conversion.base_model_prefix
                changed.append(renaming)
    return changed


def _merges_experts(conversion: WeightConverter) -> bool:
    kinds = [type(operation) for operation in conversion.operations]
    return kinds in ([MergeModulelist], [MergeModulelist, Concatenate])
