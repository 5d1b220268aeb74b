"""A whole plan as one CUDA graph: a single launch from the host, whatever the number of kernels."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

WARM_UP = 3
"""Runs before the capture, in which kernels are compiled and buffers allocated."""


class CUDAGraphPlan:
    """Replays a function of a dataclass of tensors on its own copy of the inputs."""

    def __init__(self, plan: Callable[[Any], Any], inputs: Any) -> None:
        """Warm up on a stream of its own and capture.

        Args:
            plan: Function to capture; it allocates nothing after its first call and never waits for the host.
            inputs: Inputs of the shapes that all replays will have.
        """
        self._inputs = type(inputs)(**{name: value.clone() for name, value in _fields(inputs).items()})
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                plan(self._inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._result = plan(self._inputs)

    def fits(self, inputs: Any) -> bool:
        """Whether inputs have the shapes of the capture."""
        there = _fields(self._inputs)
        return all(value.shape == there[name].shape for name, value in _fields(inputs).items())

    def replay(self, inputs: Any) -> Any:
        """Copy the inputs and replay. Returns what the captured call returned, in the same buffers."""
        for name, value in _fields(inputs).items():
            getattr(self._inputs, name).copy_(value)
        self._graph.replay()
        return self._result


def _fields(inputs: Any) -> dict[str, torch.Tensor]:
    return {f.name: getattr(inputs, f.name) for f in dataclasses.fields(inputs)}
