"""A pool of initial states, drawn once. A reset picks from it, which costs a gather however many worlds end at once."""

from __future__ import annotations

import numpy as np
import torch

from m3po_tasks.dmcontrol.sampling import initial_sensors
from m3po_tasks.dmcontrol.task import Physics, Task

MIN_SIZE = 1024
"""Fewest states in a pool."""


class InitialStates:
    """Initial states of a task on the device of a batch of environments.

    dm_control draws every episode anew, some tasks by trial and error or by hundreds of physics steps. Here
    ``max(MIN_SIZE, num_envs)`` independent states are drawn at the start and picked uniformly with replacement: the
    marginal distribution is the same, the number of different episodes is finite.
    """

    def __init__(self, task: Task, num_envs: int, seed: int, device: str, dtype: torch.dtype) -> None:
        size = max(MIN_SIZE, num_envs)
        start = task.initial(size, np.random.default_rng(seed))
        sensordata = initial_sensors(task.model, start)
        self.physics = Physics(
            *(torch.from_numpy(part).to(device, dtype) for part in (start.qpos, start.qvel, start.act, sensordata))
        )
        self.target = torch.from_numpy(start.target).to(device, dtype)
        self.generator = torch.Generator(device).manual_seed(seed)
        """Draws which states are picked."""

    def draw(self, count: int) -> torch.Tensor:
        """Pick states: their rows in the pool, (count,)."""
        return torch.randint(len(self.target), (count,), generator=self.generator, device=self.target.device)
