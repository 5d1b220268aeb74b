"""Pendulum: a pole with too weak a motor."""

from __future__ import annotations

import math
from typing import override

import mujoco
import numpy as np
import torch

from m3po_tasks.dmcontrol.rewards import tolerance
from m3po_tasks.dmcontrol.sampling import random_joints
from m3po_tasks.dmcontrol.task import Initial, State, Task, add_frame_sensor, load_spec

UPRIGHT_COSINE = math.cos(math.radians(8.0))
"""Cosine of the largest angle with reward."""


class Pendulum(Task):
    """Swing up and balance; reward is 0 or 1."""

    @override
    def build(self) -> mujoco.MjSpec:
        spec = load_spec("pendulum.xml")
        add_frame_sensor(spec, "zaxis", "xbody", "pole")
        return spec

    @override
    def initial(self, count: int, rng: np.random.Generator) -> Initial:
        start = Initial.rest(self.model, count)
        start.qpos = random_joints(self.model, count, rng)
        return start

    @override
    def observation(self, state: State) -> tuple[torch.Tensor, ...]:
        axis = state.sensor("pole_zaxis")
        return axis[:, 2], axis[:, 0], state.qvel

    @override
    def reward(self, state: State) -> torch.Tensor:
        return tolerance(state.sensor("pole_zaxis")[:, 2], (UPRIGHT_COSINE, 1.0))


TASKS = {"pendulum-swingup": Pendulum}
