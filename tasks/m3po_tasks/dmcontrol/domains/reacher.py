"""Reacher: a planar arm with two joints."""

from __future__ import annotations

from functools import partial
from typing import override

import mujoco
import numpy as np
import torch

from m3po_tasks.dmcontrol.rewards import tolerance
from m3po_tasks.dmcontrol.sampling import random_joints
from m3po_tasks.dmcontrol.task import Initial, State, Task, add_frame_sensor, load_spec

EASY_TARGET_RADIUS = 0.05
HARD_TARGET_RADIUS = 0.015
"""Sizes of the targets, m."""

TARGET_DISTANCES = (0.05, 0.2)
"""Range of the targets' distances from the arm's root, m."""


class Reacher(Task):
    """Bring the finger into a target; reward is 0 or 1. ``target`` is the target's position (x, y)."""

    def __init__(self, target_radius: float) -> None:
        """Create the task with the radius of the target, m."""
        super().__init__()
        self.reach = target_radius + self.model.geom("finger").size[0]

    @override
    def build(self) -> mujoco.MjSpec:
        spec = load_spec("reacher.xml")
        add_frame_sensor(spec, "pos", "geom", "finger")
        return spec

    @override
    def initial(self, count: int, rng: np.random.Generator) -> Initial:
        start = Initial.rest(self.model, count)
        start.qpos = random_joints(self.model, count, rng)
        angle, distance = rng.uniform(0.0, 2.0 * np.pi, count), rng.uniform(*TARGET_DISTANCES, count)
        start.target = np.stack([distance * np.sin(angle), distance * np.cos(angle)], axis=1)
        return start

    def to_target(self, state: State) -> torch.Tensor:
        """Vector (x, y) from the finger to the target, (N, 2)."""
        return state.target - state.sensor("finger_pos")[:, :2]

    @override
    def observation(self, state: State) -> tuple[torch.Tensor, ...]:
        return state.qpos, self.to_target(state), state.qvel

    @override
    def reward(self, state: State) -> torch.Tensor:
        return tolerance(self.to_target(state).norm(dim=1), (0.0, self.reach))


TASKS = {
    "reacher-easy": partial(Reacher, EASY_TARGET_RADIUS),
    "reacher-hard": partial(Reacher, HARD_TARGET_RADIUS),
}
