"""Walker: a planar biped."""

from __future__ import annotations

from functools import partial
from typing import override

import mujoco
import numpy as np
import torch

from m3po_tasks.dmcontrol.rewards import tolerance
from m3po_tasks.dmcontrol.sampling import random_joints
from m3po_tasks.dmcontrol.task import Initial, State, Task, add_frame_sensor, load_spec

STAND_HEIGHT = 1.2
"""Height of the torso with full reward, m."""

WALK_SPEED = 1.0
RUN_SPEED = 8.0
"""Speeds with full reward, m/s."""

BODIES = ("torso", "right_thigh", "right_leg", "right_foot", "left_thigh", "left_leg", "left_foot")


class Walker(Task):
    """Stand upright."""

    control_timestep = 0.025

    @override
    def build(self) -> mujoco.MjSpec:
        spec = load_spec("walker.xml")
        add_frame_sensor(spec, "pos", "xbody", "torso")
        for body in BODIES:
            add_frame_sensor(spec, "zaxis", "xbody", body)
        return spec

    @override
    def initial(self, count: int, rng: np.random.Generator) -> Initial:
        start = Initial.rest(self.model, count)
        start.qpos = random_joints(self.model, count, rng)
        return start

    @override
    def observation(self, state: State) -> tuple[torch.Tensor, ...]:
        # All joints turn about y: the x axis of a body, (zz, 0, -xz), follows from its z axis, (xz, 0, zz).
        axes = torch.stack([state.sensor(f"{body}_zaxis") for body in BODIES], dim=1)
        return axes[..., [2, 0]].flatten(1), state.sensor("torso_pos")[:, 2], state.qvel

    def speed(self, state: State) -> torch.Tensor:
        """Horizontal speed of the centre of mass, m/s, (N,)."""
        return state.sensor("torso_subtreelinvel")[:, 0]

    @override
    def reward(self, state: State) -> torch.Tensor:
        standing = tolerance(state.sensor("torso_pos")[:, 2], (STAND_HEIGHT, float("inf")), margin=STAND_HEIGHT / 2)
        upright = (1.0 + state.sensor("torso_zaxis")[:, 2]) / 2.0
        return (3.0 * standing + upright) / 4.0


class Move(Walker):
    """Stand upright and move forwards."""

    def __init__(self, target_speed: float) -> None:
        """Create the task with the speed, m/s, that has full reward."""
        super().__init__()
        self.target_speed = target_speed

    @override
    def reward(self, state: State) -> torch.Tensor:
        moving = tolerance(
            self.speed(state),
            (self.target_speed, float("inf")),
            margin=self.target_speed / 2,
            value_at_margin=0.5,
            sigmoid="linear",
        )
        return super().reward(state) * (5.0 * moving + 1.0) / 6.0


TASKS = {
    "walker-stand": Walker,
    "walker-walk": partial(Move, WALK_SPEED),
    "walker-run": partial(Move, RUN_SPEED),
}
