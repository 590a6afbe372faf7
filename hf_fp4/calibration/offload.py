"""Weights that wait on the disk, where ``device_map={"": "disk"}`` leaves them: reading them, and bringing them to memory.

Accelerate knows, for each module, where its tensors are in the checkpoint's files. What is read in the file's dtype is mapped:
its memory is the file's, which the system drops and reads again as it needs to.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_module
from torch import Tensor, nn


def tensors_on_disk(module: nn.Module) -> Mapping[str, Tensor] | None:
    """What is read, by the name that ``module`` itself gives it, when it is asked for; None if nothing waits on the disk."""
    hook: Any = getattr(module, "_hf_hook", None)
    on_cpu = torch.device("cpu")  # to a GPU, accelerate brings what waits in CPU memory as well
    for each in getattr(hook, "hooks", (hook,)):
        if getattr(each, "offload", False) and torch.device(each.execution_device) == on_cpu:
            return each.weights_map
    return None


def waits_on_disk(module: nn.Module) -> bool:
    """Whether anything in ``module`` waits on the disk."""
    return any(tensors_on_disk(child) is not None for child in module.modules())


def named_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """As `nn.Module.named_parameters`; those that wait on the disk are read, one at a time."""
    for name, parameter in model.named_parameters():
        owner, _, key = name.rpartition(".")
        stored = tensors_on_disk(model.get_submodule(owner)) if parameter.is_meta else None
        yield name, parameter if stored is None else stored[key]


def bring_to_memory(module: nn.Module) -> None:
    """Read everything in ``module`` that waits on the disk, and take accelerate's hooks away; nothing else is touched."""
    waiting = [child for child in module.modules() if tensors_on_disk(child) is not None]
    if not waiting:
        return
    for child in waiting:
        before = dict(child.named_parameters(recurse=False))
        child._hf_hook.pre_forward(child)  # type: ignore[union-attr, operator]
        for name, parameter in child.named_parameters(recurse=False):
            vars(parameter).update(vars(before[name]))  # what transformers notes on a parameter
    remove_hook_from_module(module, recurse=True)
    for child in module.modules():
        # What accelerate puts back refers to the module: a linear that is replaced would live until Python looks for circles.
        if getattr(vars(child).get("forward"), "__self__", None) is child:
            del child.forward


@cache
def _trim() -> Callable[[int], int] | None:
    return ctypes.CDLL(None).malloc_trim if platform.libc_ver()[0] == "glibc" else None


def return_freed_memory() -> None:
    """Give what was freed back to the system: glibc keeps pieces of large tensors, too small for the next, and grows."""
    trim = _trim()
    if trim is not None:
        trim(0)
