"""`FP4Linear`: the module that takes the place of `nn.Linear`; and which of them share the work on their input."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .. import ops
from ..backends import REFERENCE, Kernels, KernelSource, input_arguments, select
from ..formats import FP4Format, dequantize_blocks
from ..gptq import FP4Weight
from ..rotation import rotate
from ..scales import fused_partners

KERNEL_ROWS = 16
"""Kernels take outputs in multiples of this."""
KERNEL_TILE_ROWS = 64
"""Kernels that lay out weights in tiles have whole tiles of so many rows."""

# Asked here and not in forward: torch.compile of torch 2.11 cannot trace the question.
_AUTOCAST_DEVICES = {
    device for device in ("cpu", "cuda", "xpu", "mps", "hpu") if torch.amp.is_autocast_available(device)
}


def is_watched(module: nn.Module) -> bool:
    """Whether somebody looks at what ``module`` is called on, or has it do something else."""
    return bool(module._forward_pre_hooks or module._forward_hooks or "forward" in module.__dict__)


class HasStoredLayout:
    """What `use_kernels` lays out for the device it is on, and has as it is on disk without kernels."""

    _source: KernelSource | None
    use_kernels: Callable[[KernelSource | None], Any]
    """Lays out for the kernels of a source; None: as on disk."""

    @contextmanager
    def stored_layout(self) -> Iterator[None]:
        """Context in which the buffers are the bytes on disk; afterwards they are laid out for the device they are on."""
        source = self._source
        self.use_kernels(None)
        try:
            yield
        finally:
            self.use_kernels(source)


class FP4Linear(HasStoredLayout, nn.Linear):
    """A linear layer on a packed FP4 weight.

    ``forward`` is one call of `ops.linear`, the reference backend, until `use_kernels` finds kernels for the layer's device.
    These read the weight in a layout of their own: ``weight`` is then what their ``prepare_weight`` made of ``weight`` and
    ``weight_scale``, ``row_scale`` goes with it, and ``weight_scale`` is None. State dicts hold the bytes on disk either way.

    Buffers (the bytes on disk):
        weight: uint8 [out_features, in_features/2], low nibble = even k, code = sign << 3 | e2m1.
        weight_scale: float8_e4m3fn [out_features, in_features/16] (nvfp4) or uint8 E8M0 [.., in_features/32] (mxfp4).
        weight_global_scale: float32 [1], a divisor (nvfp4).
        input_global_scale: float32 [1], a divisor of the activations (calibrated nvfp4 W4A4).
        bias: [out_features], if the linear has one (a parameter in the model's dtype, the only one).

    Args:
        in_features, out_features: as in `nn.Linear`; in_features a multiple of the format's group size.
        format: the FP4 format.
        bias: whether there is a bias.
        hadamard_size: size of the block Hadamard rotation of the input, which the stored weight holds already; None: none.
        activation_scale_rule: how activations are quantized (`scales.ACTIVATION_SCALE_RULES`); None: W4A16.
        static_input_scale: whether there is an ``input_global_scale``; without it the scale is per token.
        dtype: dtype of the bias, and of `dequantize`.
    """

    weight: torch.Tensor
    weight_scale: torch.Tensor | None
    row_scale: torch.Tensor | None
    weight_global_scale: torch.Tensor | None
    input_global_scale: torch.Tensor | None
    _is_hf_initialized = True  # transformers must not draw random numbers for what a checkpoint lacks

    def __init__(
        self,
        in_features: int,
        out_features: int,
        format: FP4Format,
        *,
        bias: bool = False,
        hadamard_size: int | None = None,
        activation_scale_rule: str | None = None,
        static_input_scale: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        nn.Module.__init__(self)  # nn.Linear's would make a weight of its own
        self.in_features, self.out_features, self.format = in_features, out_features, format
        self.hadamard_size, self.activation_scale_rule = hadamard_size, activation_scale_rule
        if in_features % format.group_size:
            raise ValueError(
                f"in_features must be a multiple of {format.group_size} for {format.value}, got {in_features}"
            )
        groups = in_features // format.group_size

        def empty(*shape: int, dtype: torch.dtype | None) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        def divisor(present: bool) -> torch.Tensor | None:
            return empty(1, dtype=torch.float32) if present else None

        self.register_buffer("weight", empty(out_features, in_features // 2, dtype=torch.uint8))
        self.register_buffer("weight_scale", empty(out_features, groups, dtype=format.scale_dtype))
        self.register_buffer("row_scale", None)
        self.register_buffer("weight_global_scale", divisor(format.has_global_scale))
        self.register_buffer("input_global_scale", divisor(static_input_scale))
        self.kernels = REFERENCE
        self._source: KernelSource | None = None
        self._fp8 = False
        self._shared: _SharedInput | None = None
        self.register_parameter("bias", nn.Parameter(empty(out_features, dtype=dtype)) if bias else None)

    @property
    def global_scales(self) -> dict[str, torch.Tensor]:
        """The global scales that this layer has, by buffer name."""
        names = ("weight_global_scale", "input_global_scale")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def set_weight(
        self, weight: FP4Weight, bias: torch.Tensor | None, input_global_scale: torch.Tensor | None
    ) -> None:
        """Take over a solved weight, and the bias and input scale that go with it."""
        with self.stored_layout():
            self.weight, self.weight_scale = weight.packed, weight.scale
            self.weight_global_scale = weight.global_scale
            self.input_global_scale = input_global_scale
            if bias is not None:
                self.bias = nn.Parameter(bias.detach())

    def check(self, name: str) -> None:
        """Raise ValueError if a scale is misshapen, zero, negative or non-finite; ``name`` is used in the message."""
        ops.check_linear(name, *self.stored(), self.global_scales, self.format, self.hadamard_size)

    # --- layouts

    def use_kernels(self, source: KernelSource | None) -> Kernels:
        """Choose the backend for the layer's device and lay out the weight for it; None: the reference, the stored layout.

        The choice is made again whenever the layer moves. Returns what was found; `self.kernels` is what runs, which is the
        reference as well if the kernels cannot take the layer (out_features that are no multiple of 16).
        """
        if source is None and self.kernels.module is None:  # as it is
            self._source = None
            return REFERENCE
        self.weight, self.weight_scale = self.stored()
        self.row_scale, self.kernels, self._source = None, REFERENCE, source
        if source is None or self.weight.is_meta:
            return REFERENCE
        found = select(source, self.weight.device)
        if found.module is None or self.out_features % KERNEL_ROWS:
            return found
        quantizes = self.activation_scale_rule is not None
        self._fp8 = (
            self.format is FP4Format.MXFP4
            and quantizes
            and found.module.fp8_exact(self.weight, self.weight_scale)
        )
        self.weight, self.row_scale = found.module.prepare_weight(
            self.weight, self.weight_scale, self.weight_global_scale
        )
        self.weight_scale, self.kernels = None, found
        return found

    def take_part(self, kernels: Kernels, packed: torch.Tensor, row_scale: torch.Tensor) -> None:
        """The weight becomes a view of what ``kernels`` prepared for several: rows of bytes, or tiles."""
        if packed.dim() == 2:
            half = self.in_features // 2
            self.weight, self.weight_scale = packed[:, :half], packed[:, half:].view(self.format.scale_dtype)
        else:
            self.weight, self.row_scale, self.weight_scale, self.kernels = packed, row_scale, None, kernels

    def leave_part(self) -> None:
        """Memory of its own again, in the stored layout: the inverse of `take_part`."""
        self.weight, self.weight_scale = (part.contiguous() for part in self.stored())
        self.row_scale, self.kernels = None, REFERENCE

    def stored(self) -> tuple[torch.Tensor, torch.Tensor]:
        """``weight`` and ``weight_scale`` as they are on disk, restored if the layer has another layout."""
        if self.kernels.module is None:
            assert self.weight_scale is not None
            return self.weight, self.weight_scale
        return self.kernels.module.restore_weight(
            self.weight, self.row_scale, self.out_features, self.in_features
        )

    def _apply(self, fn, recurse: bool = True):
        """`model.to(dtype)` and `.half()` move the packed weight and its scales, and cast only the bias."""
        with self.stored_layout():
            kept = {id(buffer) for buffer in self.buffers(recurse=False)}

            def apply(tensor: torch.Tensor) -> torch.Tensor:
                changed = fn(tensor)
                return (
                    tensor.to(changed.device)
                    if id(tensor) in kept and changed.dtype != tensor.dtype
                    else changed
                )

            return super()._apply(apply, recurse)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"], destination[f"{prefix}weight_scale"] = self.stored()
        # Not a buffer with persistent=False: accelerate's offloading trips over one that is None.
        destination.pop(f"{prefix}row_scale", None)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        with self.stored_layout():
            super()._load_from_state_dict(*args, **kwargs)

    # --- what it computes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        device = x.device.type
        if device in _AUTOCAST_DEVICES and torch.is_autocast_enabled(device):
            # As nn.Linear: the input is cast, and so is the result. What comes between chooses its own dtypes.
            with torch.autocast(device, enabled=False):
                return self._compute(x, torch.get_autocast_dtype(device))
        return self._compute(x, x.dtype)

    def _compute(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if not self.kernels.take(dtype):
            return ops.linear(
                x.to(dtype),
                *self.stored(),
                self.weight_global_scale,
                self.input_global_scale,
                self.bias,
                self.format.value,
                self.activation_scale_rule,
                self.hadamard_size or 0,
            )
        if torch.is_grad_enabled() and (
            x.requires_grad or (self.bias is not None and self.bias.requires_grad)
        ):
            return _DifferentiableLinear.apply(x, self.bias, self, dtype)
        return self._run(x, dtype)

    def _run(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if self._shared is not None:
            result = self._shared.result_of(self, x, dtype)
            if result is not None:
                return result
        module: Any = self.kernels.module
        return module.linear(
            x.to(dtype), self.weight, self.row_scale, self._bias_in(dtype), **self._input_arguments
        )

    def can_gate(self, gate: torch.Tensor, up: torch.Tensor) -> bool:
        """Whether `gated` may take the place of a call. Not while somebody looks at the input, nor for gradients."""
        differentiates = torch.is_grad_enabled() and any(
            t is not None and t.requires_grad for t in (gate, up, self.bias)
        )
        autocast = gate.device.type in _AUTOCAST_DEVICES and torch.is_autocast_enabled(gate.device.type)
        return self.kernels.take(gate.dtype) and not (is_watched(self) or differentiates or autocast)

    def gated(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """What `forward` makes of silu(gate) * up, [..., in_features] both, which its kernels make themselves: `can_gate`."""
        module: Any = self.kernels.module
        bias = self._bias_in(gate.dtype)
        return module.linear(gate, self.weight, self.row_scale, bias, up=up, **self._input_arguments)

    def _bias_in(self, dtype: torch.dtype) -> torch.Tensor | None:
        return None if self.bias is None else self.bias.to(dtype)

    @property
    def _input_arguments(self) -> dict[str, Any]:
        """What the kernels are told about the input; `_SharedInput` needs it to be the same in all its layers."""
        arguments = input_arguments(self.activation_scale_rule, self.hadamard_size, self.input_global_scale)
        return {**arguments, "fp8": self._fp8}

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight that this layer stands for, rotated back, [out_features, in_features] in ``dtype``."""
        values = dequantize_blocks(*self.stored(), self.format, torch.float32)
        if self.weight_global_scale is not None:
            values /= self.weight_global_scale
        return rotate(values, self.hadamard_size).to(dtype)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self.format.value}, {'W4A16' if self.activation_scale_rule is None else 'W4A4'}, "
            f"hadamard={self.hadamard_size}"
        )


class _DifferentiableLinear(torch.autograd.Function):
    """A layer's kernels forward; backward as `ops.linear`'s: straight through the quantization of the input."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, bias: torch.Tensor | None, layer: FP4Linear, dtype: torch.dtype
    ) -> torch.Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        return layer._run(x, dtype)

    @staticmethod
    def backward(
        ctx: Any, gradient: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        layer = ctx.layer
        x = bias = None
        if ctx.needs_input_grad[0]:
            x = torch.ops.hf_fp4.linear_input_gradient(
                gradient,
                *layer.stored(),
                layer.weight_global_scale,
                layer.format.value,
                layer.hadamard_size or 0,
            ).to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            bias = gradient.reshape(-1, gradient.shape[-1]).sum(0).to(layer.bias.dtype)
        return x, bias, None, None


class _SharedInput:
    """Layers that are called on the same tensor, such as q, k and v: the first call computes the results of all of them.

    Each of the others' is kept until its layer is called, and computed anew whenever it is not sure to be right: for another
    tensor or one that was written to, on another stream, and between what is captured in a CUDA graph and what is not.
    Layers that turn out to be called on different tensors, as in cross-attention, or not all, as where keys are shared with
    another block, are computed one by one from then on.
    """

    def __init__(self, layers: list[FP4Linear]):
        self._layers = layers
        # Calls one after the other whose results were not all taken. One may have been interrupted; two are the model's way.
        self._left = 0
        self._held: tuple[torch.Tensor, Any, dict[FP4Linear, torch.Tensor]] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None  # the copies' layers work one by one until `use_kernels` pairs them

    @property
    def _together(self) -> bool:
        return self._left < 2

    def result_of(self, layer: FP4Linear, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
        """What ``layer`` makes of ``x`` in ``dtype``; None: it has to see to that itself."""
        moment = (dtype, _moment(x))
        if self._held is not None:
            held, its_moment, results = self._held
            if layer in results:
                if held is x and its_moment == moment:
                    rest = {other: y for other, y in results.items() if other is not layer}
                    self._held = (x, moment, rest) if rest else None
                    # Not written for nothing: compiled code would do that after each call.
                    if self._left and not rest:
                        self._left = 0
                    return results[layer]
                self._left += 1  # the tensors differ: that is no interruption
            self._left, self._held = self._left + 1, None
        if not self._together or not all(_runs_alike(other, layer) for other in self._layers):
            return None
        module: Any = layer.kernels.module
        made = module.linears(
            x.to(dtype),
            [(other.weight, other.row_scale) for other in self._layers],
            [other._bias_in(dtype) for other in self._layers],
            **layer._input_arguments,
        )
        results = dict(zip(self._layers, made, strict=True))
        result = results.pop(layer)
        self._held = (x, moment, results)
        return result


def _moment(x: torch.Tensor) -> Any:
    """What must not change between two calls for them to see the same values of ``x`` in the same order of execution."""
    if torch.compiler.is_compiling():
        return None  # one trace, one stream
    version = None if x.is_inference() else x._version
    if not x.is_cuda:
        return version
    # By its number: of a device object, Python would find the number first, which takes longer than the rest.
    stream = torch.accelerator.current_stream(x.get_device())
    return version, stream, torch.cuda.is_current_stream_capturing()


def use_kernels(model: nn.Module, source: KernelSource, without: Container[FP4Linear] = ()) -> set[Kernels]:
    """`FP4Linear.use_kernels` on every layer of ``model``, and one call of kernels for layers that share their input.

    ``without``: layers that are left as they are. Returns what was found for the devices of the layers.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, FP4Linear) and module not in without
    }
    found = {layer.use_kernels(source) for layer in layers.values() if not layer.weight.is_meta}
    for name, layer in layers.items():
        partners = [layers[n] for n in fused_partners(name) if n in layers]
        if layer is partners[0]:
            alike = [layer for layer in partners if _takes_same_input(layer, partners[0])]
            shared = _SharedInput(alike) if len(alike) > 1 else None
            for partner in partners:
                partner._shared = shared if partner in alike else None
    return found


def _runs_alike(a: FP4Linear, b: FP4Linear) -> bool:
    return a.kernels.module is not None and a.kernels is b.kernels and a.weight.device == b.weight.device


def _takes_same_input(a: FP4Linear, b: FP4Linear) -> bool:
    if not _runs_alike(a, b) or (a.format, a.in_features) != (b.format, b.in_features):
        return False
    mine, other = a._input_arguments, b._input_arguments
    scales = [arguments.pop("input_global_scale") for arguments in (mine, other)]
    same = scales[0] is scales[1] or (
        None not in scales and scales[0].device == scales[1].device and torch.equal(*scales)
    )
    return same and mine == other
