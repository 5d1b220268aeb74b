"""The memory that a worker process shares with its parent: one block, cut into named tensors on both sides.

It is one block because every shared tensor on the CPU keeps a file descriptor open, and a process may have few of them.
The parent allocates it, so that it outlives a worker that dies.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

SLOTS = 2
"""Results are written to the slots in turn, so that those of a step stay as they are during the next one."""

_ALIGNMENT = 64


class Sizes(NamedTuple):
    """What the worker reports of its environments before anything is shared."""

    num_envs: int
    """Number of environments."""

    obs_dim: int
    """Observation dimensions."""

    num_actions: int
    """Action dimensions."""

    max_episode_length: int
    """Longest episode, decision steps."""

    device: str
    """Torch device of the environments, and of the block."""

    def tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and type of each shared tensor."""
        n = self.num_envs
        return {
            "actions": ((n, self.num_actions), torch.float32),
            "episode_length_buf": ((n,), torch.long),
            "obs": ((SLOTS, n, self.obs_dim), torch.float32),
            "final_obs": ((SLOTS, n, self.obs_dim), torch.float32),
            "rewards": ((SLOTS, n), torch.float32),
            "success": ((SLOTS, n), torch.float32),
            "dones": ((SLOTS, n), torch.bool),
            "time_outs": ((SLOTS, n), torch.bool),
        }


def allocate(sizes: Sizes) -> torch.Tensor:
    """A block for all tensors, (bytes,), uint8, in shared memory on the CPU; CUDA memory can always be shared."""
    total = sum(_bytes(*tensor) for tensor in sizes.tensors().values())
    block = torch.zeros(total, dtype=torch.uint8, device=sizes.device)
    return block if block.is_cuda else block.share_memory_()


def cut(block: torch.Tensor, sizes: Sizes) -> dict[str, torch.Tensor]:
    """The tensors of a block by name: views, nothing is copied."""
    tensors, start = {}, 0
    for name, (shape, dtype) in sizes.tensors().items():
        tensors[name] = block[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
        start += _bytes(shape, dtype)
    return tensors


def synchronize(block: torch.Tensor) -> None:
    """Wait until what was launched on the block's device is done; the other process knows nothing of our streams."""
    if block.is_cuda:
        torch.cuda.synchronize(block.device)


def _bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return math.ceil(math.prod(shape) * dtype.itemsize / _ALIGNMENT) * _ALIGNMENT
