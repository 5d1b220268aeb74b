"""What a batch of environments and its workers share: one block of float32 numbers, cut into arrays on both sides."""

from __future__ import annotations

import mmap
from typing import Any, NamedTuple

import numpy as np

from m3po_tasks.metaworld.tasks import ACTION_DIM, OBS_DIM

_WIDTHS = (ACTION_DIM, 1, OBS_DIM, OBS_DIM, 1, 1)


class Buffers(NamedTuple):
    """Arrays or tensors of N environments; views of one block."""

    actions: Any
    """Actions of the step, (N, 4)."""

    ends: Any
    """1 where the step is the last one of its episode, (N, 1). The parent knows this, the worker resets."""

    obs: Any
    """Observations after the step, and after the reset where there was one, (N, 39)."""

    final_obs: Any
    """Observations before the reset, (N, 39); stale where the episode goes on."""

    rewards: Any
    """Rewards of the step, (N, 1)."""

    success: Any
    """Whether the task is solved after the step, 0 or 1, (N, 1)."""


def num_bytes(num_envs: int) -> int:
    """Size of the block."""
    return 4 * num_envs * sum(_WIDTHS)


def block(file: int, num_envs: int) -> np.ndarray:
    """The block in the memory behind a file descriptor, which may be closed afterwards."""
    return np.frombuffer(mmap.mmap(file, num_bytes(num_envs)), dtype=np.float32)


def cut(block: Any, num_envs: int) -> Buffers:
    """The arrays or tensors in a block: views, nothing is copied."""
    parts, start = [], 0
    for width in _WIDTHS:
        parts.append(block[start : start + num_envs * width].reshape(num_envs, width))
        start += num_envs * width
    return Buffers(*parts)
