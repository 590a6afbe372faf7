"""MLPs whose output linear gets silu(gate) * up: its kernels make that themselves while they quantize it.

For long inputs these are two passes over the largest tensors of a block that are saved. A model's own class and modules stay as
they are; only a `forward` that is known to compute nothing else gets another one, on the instance.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers.activations import SiLUActivation

from .linear import FP4Linear, is_watched


def is_silu(function: Any) -> bool:
    """Whether an activation of a model is x * sigmoid(x)."""
    return isinstance(function, (nn.SiLU, SiLUActivation))


def gate_in_kernels(model: nn.Module) -> None:
    """Let kernels gate the input of every FP4 linear that an MLP with a known forward gates by SiLU. Results are the same bits.

    Left as they are: modules with a forward of their own, such as those that accelerate hooks.
    """
    for module in model.modules():
        forward = None if "forward" in module.__dict__ else _KNOWN.get(_key(type(module).forward))
        if forward is not None and isinstance(getattr(module, "down_proj", None), FP4Linear):
            module.forward = MethodType(forward, module)


def _down(linear: Any, activation: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """What the linear, which by now may be another one, gives for the gated input."""
    known = type(linear) is FP4Linear and is_silu(activation) and not is_watched(activation)
    if known and linear.can_gate(gate, up):
        return linear.gated(gate, up)
    return linear(activation(gate) * up)


# --- what is known: the model's forward, and the one in its place, whose only argument may have any name


def _separate(self: Any, x: torch.Tensor) -> torch.Tensor:
    down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    return down_proj


def _separate_at_once(self: Any, x: torch.Tensor) -> torch.Tensor:
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def _of_separate(self: Any, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
    (x,) = (*args, *kwargs.values())
    return _down(self.down_proj, self.act_fn, self.gate_proj(x), self.up_proj(x))


def _together(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    up_states = self.gate_up_proj(hidden_states)
    gate, up_states = up_states.chunk(2, dim=-1)
    up_states = up_states * self.activation_fn(gate)
    return self.down_proj(up_states)


def _of_together(self: Any, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
    (x,) = (*args, *kwargs.values())
    gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
    return _down(self.down_proj, self.activation_fn, gate, up)


def _key(function: Any) -> Any:
    """The same for functions that do the same with their arguments; None without Python code, as of a wrapped one."""
    code = getattr(function, "__code__", None)
    if code is None:
        return None
    constants = tuple(constant for constant in code.co_consts if constant != function.__doc__)
    variable = code.co_flags & (inspect.CO_VARARGS | inspect.CO_VARKEYWORDS)
    return code.co_code, code.co_names, constants, code.co_argcount, code.co_kwonlyargcount, variable


_KNOWN: dict[Any, Callable[..., torch.Tensor]] = {
    _key(_separate): _of_separate,
    _key(_separate_at_once): _of_separate,
    _key(_together): _of_together,
}
