"""A whole plan as one CUDA graph: a single launch from the host, whatever the number of kernels."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

WARM_UP = 3
"""Runs before the capture, in which kernels are compiled and buffers allocated."""


class CapturedPlan:
    """Replays a function of a dataclass of tensors on its own copy of the inputs."""

    def __init__(self, plan: Callable[[Any], Any], start: Any) -> None:
        """Warm up on a stream of its own and capture.

        Args:
            plan: Function to capture; it allocates nothing after its first call and never waits for the host.
            start: Inputs of the shapes that all replays will have.
        """
        self._start = type(start)(**{name: value.clone() for name, value in _fields(start).items()})
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                plan(self._start)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._result = plan(self._start)

    def fits(self, start: Any) -> bool:
        """Whether inputs have the shapes of the capture."""
        there = _fields(self._start)
        return all(value.shape == there[name].shape for name, value in _fields(start).items())

    def replay(self, start: Any) -> Any:
        """Copy the inputs and replay. Returns what the captured call returned, in the same buffers."""
        for name, value in _fields(start).items():
            getattr(self._start, name).copy_(value)
        self._graph.replay()
        return self._result


def _fields(start: Any) -> dict[str, torch.Tensor]:
    return {f.name: getattr(start, f.name) for f in dataclasses.fields(start)}
