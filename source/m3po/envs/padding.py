"""Observations of different sizes in one zero-padded batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict import TensorDict

from m3po.kernels.padding import pad_observations


class Padding:
    """Writes the observations of K tasks into the rows of one batch, (N, O), with O the largest of them.

    There are two batches, written in turn: what a call returned stays as it is until the call after the next. That is
    cheaper than a new batch for each step, whose zeros would have to be written and whose groups built as well.
    """

    def __init__(
        self, num_envs: Sequence[int], obs_dims: Sequence[int], device: torch.device | str, kernel: bool
    ) -> None:
        """Create both batches.

        Args:
            num_envs: Environments of each task.
            obs_dims: Observation dimensions of each task.
            device: Torch device of the batch.
            kernel: Whether one Warp kernel moves all rows, which pays on a GPU, where every copy is a launch.
        """
        total, width = sum(num_envs), max(obs_dims)
        task = torch.arange(len(obs_dims)).repeat_interleave(torch.tensor(num_envs)).to(device)
        self._batches = [torch.zeros(total, width, device=device) for _ in range(2)]
        self._groups = [
            TensorDict({"policy": batch, "task": task[:, None]}, batch_size=[total]) for batch in self._batches
        ]
        self._turn = 0
        self._kernel = kernel
        self._views = [
            [rows[:, :dim] for rows, dim in zip(batch.split(list(num_envs)), obs_dims, strict=True)]
            for batch in self._batches
        ]
        if kernel:
            dims = torch.tensor(obs_dims, device=device)
            offsets = dims[task].cumsum(0) - dims[task]
            # The kernel also writes masks and embeddings. The masks never change here, and the networks embed the task.
            obs_mask = torch.empty(total, width, dtype=torch.bool, device=device)
            no_actions = torch.empty(total, 0, dtype=torch.bool, device=device)
            no_embedding = torch.empty(len(obs_dims), 0, device=device)
            self._masks = (obs_mask, no_actions)
            self._layout = (offsets, task, dims, dims, no_embedding)

    def __call__(self, observations: Sequence[torch.Tensor]) -> TensorDict:
        """Write the next batch.

        Args:
            observations: One tensor per task, (N_k, O_k), float32, on any device.

        Returns:
            Groups ``policy``, the batch (N, O), and ``task``, the task ids (N, 1).
        """
        self._turn = 1 - self._turn
        batch = self._batches[self._turn]
        if self._kernel:
            flat = torch.cat([observation.to(batch.device).reshape(-1) for observation in observations])
            pad_observations(batch, *self._masks, flat, *self._layout)
        else:
            for view, observation in zip(self._views[self._turn], observations, strict=True):
                view.copy_(observation)
        return self._groups[self._turn]
