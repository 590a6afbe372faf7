"""How much memory a piece of work takes: of a process, for scripts that tests run in one of their own (Linux), and in tensors."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def anonymous() -> int:
    """Bytes of this process that are no file's pages."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


def peak_while(work: Callable[[], Any]) -> int:
    """Most bytes over those at the start, while ``work`` runs and with what it returns still there."""
    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], anonymous())
            time.sleep(0.002)

    start, watcher = anonymous(), threading.Thread(target=watch)
    watcher.start()
    kept = work()
    done.set()
    watcher.join()
    del kept
    return peak[0] - start


class LiveTensors(TorchDispatchMode):
    """Context that notes the `peak` of the bytes in tensors that operations in it returned; what one takes inside is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        storages = [x.untyped_storage() for x in tree_leaves(result) if hasattr(x, "untyped_storage")]
        self._live |= {each._cdata: (StorageWeakRef(each), each.nbytes()) for each in storages}
        self._live = {key: pair for key, pair in self._live.items() if not pair[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return result
