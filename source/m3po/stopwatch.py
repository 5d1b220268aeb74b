"""Where the time of an iteration goes, without stopping the device to look."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Adds up the seconds spent in named sections.

    On CUDA, sections are bracketed by events that are read once per iteration, so that measuring never synchronises
    the rollout.
    """

    def __init__(self, device: str) -> None:
        """Choose events on CUDA and the host's clock elsewhere."""
        self.cuda = str(device).startswith("cuda")
        self._seconds: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def section(self, name: str) -> Generator[None]:
        """Time a block of code under a name."""
        if self.cuda:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._events.append((name, start, end))
        else:
            begin = time.perf_counter()
            yield
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - begin

    def read(self) -> dict[str, float]:
        """Seconds per section since the last call; resets the watch. Synchronises once on CUDA."""
        if self._events:
            torch.cuda.synchronize()
            for name, start, end in self._events:
                self._seconds[name] = self._seconds.get(name, 0.0) + start.elapsed_time(end) / 1000.0
            self._events.clear()
        seconds, self._seconds = self._seconds, {}
        return seconds
