"""The processes that calibrate one model together, when torch.distributed is initialised (torchrun, accelerate launch).

Each takes its share of the calibration batches; sums of second moments are everybody's, so all hold the same. Each tries its
share of the rotations, and corrects and solves its share of a weight's rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


class Team:
    """This process among those of the default process group; alone when there is none."""

    def __init__(self) -> None:
        together = dist.is_available() and dist.is_initialized()
        self.size = dist.get_world_size() if together else 1
        self.rank = dist.get_rank() if together else 0

    def require_same(self, value: Any, what: str) -> None:
        """Raise ValueError, in every process, if not all have the same ``value``."""
        values = self._all(value)
        if any(other != value for other in values):
            raise ValueError(f"all processes must calibrate with the same {what}, got {values} by rank")

    def share(self, batches: Sequence[T]) -> list[T]:
        """This process's batches; ValueError if they don't suffice for all."""
        if len(batches) < self.size:
            raise ValueError(
                f"expected at least one calibration batch for each of {self.size} processes, got {len(batches)}; use a "
                "smaller batch_size, more samples or fewer processes"
            )
        return list(batches[self.rank :: self.size])

    def samples(self, count: int) -> slice:
        """This process's of the ``count`` samples of one batch; where that leaves it none, one that another has too."""
        return slice(self.rank % count, None, self.size)

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Add up everybody's ``tensor``, in place."""
        if self.size > 1:
            whole = tensor.contiguous()
            dist.all_reduce(whole)
            tensor.copy_(whole)
        return tensor

    def max_(self, tensor: torch.Tensor) -> torch.Tensor:
        """The element-wise maximum of everybody's ``tensor``, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor

    def decide(self, able: bool, choose: Callable[[], T]) -> T | None:
        """What the first process that is ``able`` chooses, in all of them; None if none is."""
        flags = self._all(able)
        if not any(flags):
            return None
        source = flags.index(True)
        choice = [choose() if self.rank == source else None]
        if self.size > 1:
            dist.broadcast_object_list(choice, src=source)
        return choice[0]

    def first_of(self, tensors: list[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
        """The tensors, in all processes, of the first one that has any; they are on ``device``."""
        if self.size == 1:
            return tensors
        found = self._all([(tensor.shape, tensor.dtype) for tensor in tensors])
        source = next((rank for rank, kinds in enumerate(found) if kinds), 0)
        if self.rank != source:
            tensors = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in found[source]]
        tensors = [tensor.contiguous() for tensor in tensors]
        for tensor in tensors:
            dist.broadcast(tensor.view(torch.uint8), src=source)
        return tensors

    def rows(self, count: int) -> slice:
        """Which of ``count`` rows this process solves."""
        chunk = -(-count // self.size)
        return slice(self.rank * chunk, min((self.rank + 1) * chunk, count))

    def join_rows(self, part: torch.Tensor, count: int) -> torch.Tensor:
        """All ``count`` rows, from everybody's `rows` of them; ``part`` [rows, ...]."""
        if self.size == 1:
            return part
        chunk = -(-count // self.size)
        padded = torch.zeros((chunk, *part.shape[1:]), dtype=part.dtype, device=part.device).view(torch.uint8)
        padded[: len(part)] = part.view(torch.uint8)
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded)
        return torch.cat(parts)[:count].view(part.dtype)

    def _all(self, value: T) -> list[T]:
        """Everybody's ``value``, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values
