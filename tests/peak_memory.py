"""How much memory a piece of work takes, for scripts that tests run in a process of their own (Linux)."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any


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
