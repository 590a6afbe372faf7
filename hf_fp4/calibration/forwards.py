"""Forwards of one block that wait where a group of linears is first read, so that each of them runs only once.

A group is solved on the inputs of all batches, and what follows it in the block must be computed with the solved weights.
So each batch's forward waits, in a thread of its own, until the caller lets it go on. One thread runs at a time. The threads
serve block after block: what CUDA's libraries prepare for each thread is prepared once.

A forward that waits holds all that its block has computed. Where that is too much, it is given up and another one begins,
which need not compute those parts of the block whose last linear's input is known.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .capture import BlockCall, Outlet, block_device, call_block, redirect

Functions = Mapping[str, Callable[[Any], Tensor]]
"""What to call in the place of the forward of a linear, or of a projection of experts, by its name relative to the block."""


class Known:
    """A linear's input, of which its output is computed when that is asked for, and then kept in its place."""

    def __init__(self, input: Tensor):
        self._input: Tensor | None = input
        self._output: Tensor | None = None

    def output(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """What ``function`` gives for the input; a copy, since a block may write to it."""
        if self._output is None:
            assert self._input is not None
            self._output, self._input = function(self._input), None
        return self._output.clone()


@contextmanager
def paused_forwards(
    block: nn.Module,
    groups: Sequence[Sequence[str]],
    threads: Executor,
    outlets: Mapping[str, Outlet] | None = None,
) -> Iterator[Callable[..., PausedForward]]:
    """Context in which forwards of ``block`` pause at its ``groups`` (names relative to the block, in calling order).

    ``threads`` must have one thread for each forward that is started. ``outlets``: of the linears that may become known, what
    they are the last of.

    Yields ``start(hidden, call, functions, known={})``: a forward on ``hidden`` [B, T, hidden_size]. ``functions`` is read
    whenever a linear is called, so it may grow meanwhile. ``known``: linears of ``outlets`` whose input is `Known`; what they
    are the last of does not run. On leaving the context, forwards that have not ended are given up.
    """
    running = threading.local()
    forwards: list[PausedForward] = []

    def start(
        hidden: Tensor, call: BlockCall, functions: Functions, known: Mapping[str, Known] | None = None
    ) -> PausedForward:
        forwards.append(PausedForward(block, groups, hidden, call, functions, running, threads, known or {}))
        return forwards[-1]

    def part(name: str, outlet: Outlet, whole: Callable[..., Any], own: Callable[[Tensor], Tensor]):
        def forward(*args: Any, **kwargs: Any) -> Any:
            y = running.forward.known_output(name, own)
            return whole(*args, **kwargs) if y is None else outlet.wrap(y)

        return forward

    def dispatched(index: int, name: str, own: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def forward(input: Tensor) -> Tensor:
            return running.forward.linear(index, name, own, input)

        return forward

    pausing = {
        name: dispatched(index, name, block.get_submodule(name).forward)
        for index, names in enumerate(groups)
        for name in names
    }
    parts = {
        outlet.module: part(
            name, outlet, block.get_submodule(outlet.module).forward, block.get_submodule(name).forward
        )
        for name, outlet in (outlets or {}).items()
    }
    with redirect(block, {**pausing, **parts}):
        try:
            yield start
        finally:
            for forward in forwards:
                forward.abandon()


class PausedForward:
    """One forward of a block, of which nothing has run yet; `paused_forwards` makes it."""

    def __init__(
        self,
        block: nn.Module,
        groups: Sequence[Sequence[str]],
        hidden: Tensor,
        call: BlockCall,
        functions: Functions,
        running: Any,
        threads: Executor,
        known: Mapping[str, Known],
    ):
        self._block, self._groups, self._functions, self._known = block, groups, functions, known
        self._running, self._threads = running, threads
        self._nothing = hidden.new_empty(0)
        self._arguments: tuple[Tensor, BlockCall] | None = (hidden, call)
        self._reached: set[int] = set()
        self._at = -1
        self._input: Tensor | None = None
        self._output: Tensor | None = None
        self._error: BaseException | None = None
        self._ended = self._abandoned = False
        device = block_device(block)  # a thread begins on the first GPU and its default stream
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._go, self._paused = threading.Semaphore(0), threading.Semaphore(0)
        self._future: Future | None = None

    def input_of(self, index: int) -> Tensor:
        """The input of group ``index``, where the forward then waits.

        An empty [0, in_features] tensor when the block does not call the group, which is an expert that got no token.
        Groups are asked for in their order.
        """
        while not self._ended and self._at < index:
            self._advance()
        if self._at == index and self._input is not None:
            return self._input
        width: Any = self._block.get_submodule(self._groups[index][0]).in_features
        return self._nothing.new_empty(0, width)

    def output(self) -> Tensor:
        """The block's hidden states [B, T, hidden_size]; they are handed over, so only once."""
        while not self._ended:
            self._advance()
        assert self._output is not None
        output, self._output = self._output, None
        return output

    def _advance(self) -> None:
        if self._future is None:
            self._future = self._threads.submit(contextvars.copy_context().run, self._run)
        else:
            self._go.release()
        self._paused.acquire()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        self._running.forward = self
        assert self._arguments is not None
        (hidden, call), self._arguments = self._arguments, None
        try:
            with torch.no_grad(), torch.cuda.stream(self._stream):
                self._output = call_block(self._block, hidden, call)
        except _AbandonedForward:
            pass
        except BaseException as error:  # noqa: BLE001 - it is raised in the caller's thread
            self._error = error
        self._input, self._ended = None, True
        self._running.forward = None  # the thread lives on
        self._paused.release()

    def linear(self, index: int, name: str, own: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """What the linear ``name`` of group ``index`` gives, in this forward's thread; ``own`` is its own forward."""
        if index not in self._reached:
            self._wait_at(index, x)
        return self._functions.get(name, own)(x)

    def known_output(self, name: str, own: Callable[[Tensor], Tensor]) -> Tensor | None:
        """What the linear ``name`` gives, if its input is known; ``own`` is its own forward."""
        known = self._known.get(name)
        return None if known is None else known.output(self._functions.get(name, own))

    def abandon(self) -> None:
        """Unwind what is waiting."""
        self._abandoned, self._arguments = True, None
        if self._future is not None:
            self._go.release()
            self._future.result()

    def _wait_at(self, index: int, x: Tensor) -> None:
        self._reached.add(index)
        if index < self._at:
            raise ValueError(
                f"{type(self._block).__name__} calls {self._groups[index][0]} after {self._groups[self._at][0]} for some "
                'inputs and before it for others; it cannot be calibrated, use method="rtn"'
            )
        self._at, self._input = index, x
        self._paused.release()
        self._go.acquire()
        self._input = None
        if self._abandoned:
            raise _AbandonedForward


class _AbandonedForward(BaseException):
    """Unwinds a forward that nobody waits for any more; not an `Exception`, so that no model catches it."""
