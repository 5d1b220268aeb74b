"""Cheetah: a planar runner."""

from __future__ import annotations

from typing import override

import mujoco
import numpy as np
import torch

from m3po_tasks.dmcontrol.rewards import tolerance
from m3po_tasks.dmcontrol.sampling import settle
from m3po_tasks.dmcontrol.task import Initial, State, Task, load_spec

RUN_SPEED = 10.0
"""Speed with full reward, m/s."""

SETTLING_STEPS = 200
"""Physics steps without control before an episode starts."""


class Cheetah(Task):
    """Run forwards."""

    @override
    def build(self) -> mujoco.MjSpec:
        return load_spec("cheetah.xml")

    @override
    def initial(self, count: int, rng: np.random.Generator) -> Initial:
        """Random joint angles, let fall."""
        start = Initial.rest(self.model, count)
        limited = self.model.jnt_limited == 1
        start.qpos[:, limited] = rng.uniform(*self.model.jnt_range[limited].T, (count, limited.sum()))
        return settle(self.model, start, SETTLING_STEPS)

    @override
    def observation(self, state: State) -> tuple[torch.Tensor, ...]:
        """Positions without the horizontal one, velocities."""
        return state.qpos[:, 1:], state.qvel

    def speed(self, state: State) -> torch.Tensor:
        """Horizontal speed of the centre of mass, m/s, (N,)."""
        return state.sensor("torso_subtreelinvel")[:, 0]

    @override
    def reward(self, state: State) -> torch.Tensor:
        speed = self.speed(state)
        return tolerance(speed, (RUN_SPEED, float("inf")), margin=RUN_SPEED, value_at_margin=0.0, sigmoid="linear")


TASKS = {"cheetah-run": Cheetah}
