"""Fish: a swimmer with a tail and two fins, without gravity."""

from __future__ import annotations

from typing import override

import mujoco
import numpy as np
import torch

from m3po_tasks.dmcontrol.frames import add_rotation_sensors, rotation, to_local
from m3po_tasks.dmcontrol.rewards import tolerance
from m3po_tasks.dmcontrol.sampling import random_rotations
from m3po_tasks.dmcontrol.task import Initial, State, Task, add_frame_sensor, load_spec

LARGEST_ANGLE = 0.2
"""Largest angle of a joint at the start, rad."""

TARGET_LOW = (-0.4, -0.4, 0.1)
TARGET_HIGH = (0.4, 0.4, 0.3)
"""Where the targets are, m."""


class Fish(Task):
    """Swim upright, mouth in a target. ``target`` is the target's position."""

    control_timestep = 0.04

    def __init__(self) -> None:
        super().__init__()
        self.reach = self.model.geom("mouth").size[0] + self.model.geom("target").size[0]

    @override
    def build(self) -> mujoco.MjSpec:
        spec = load_spec("fish.xml")
        add_frame_sensor(spec, "zaxis", "xbody", "torso")
        add_frame_sensor(spec, "pos", "geom", "mouth")
        add_rotation_sensors(spec, "geom", "mouth")
        return spec

    @override
    def initial(self, count: int, rng: np.random.Generator) -> Initial:
        start = Initial.rest(self.model, count)
        start.qpos[:, 3:7] = random_rotations(count, rng)
        start.qpos[:, 7:] = rng.uniform(-LARGEST_ANGLE, LARGEST_ANGLE, (count, self.model.nq - 7))
        start.target = rng.uniform(TARGET_LOW, TARGET_HIGH, (count, 3))
        return start

    def upright(self, state: State) -> torch.Tensor:
        """Cosine of the angle from upright, (N,)."""
        return state.sensor("torso_zaxis")[:, 2]

    def to_target(self, state: State) -> torch.Tensor:
        """Vector from the mouth to the target in the mouth's frame, (N, 3)."""
        return to_local(state.target - state.sensor("mouth_pos"), rotation(state, "mouth"))

    @override
    def observation(self, state: State) -> tuple[torch.Tensor, ...]:
        return state.qpos[:, 7:], self.upright(state), self.to_target(state), state.qvel

    @override
    def reward(self, state: State) -> torch.Tensor:
        in_target = tolerance(self.to_target(state).norm(dim=1), (0.0, self.reach), margin=2.0 * self.reach)
        return (7.0 * in_target + (self.upright(state) + 1.0) / 2.0) / 8.0


TASKS = {"fish-swim": Fish}
