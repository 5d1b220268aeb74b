"""Humanoid: a biped with 21 joints."""

from __future__ import annotations

from functools import partial
from typing import override

import mujoco
import numpy as np
import torch

from m3po_tasks.dmcontrol.frames import add_rotation_sensors, rotation, to_local
from m3po_tasks.dmcontrol.rewards import tolerance
from m3po_tasks.dmcontrol.sampling import random_joints, without_contacts
from m3po_tasks.dmcontrol.task import Initial, State, Task, add_frame_sensor, load_spec

STAND_HEIGHT = 1.4
"""Height of the head with full reward, m."""

UPRIGHT_COSINE = 0.9
"""Cosine of the torso's angle from upright with full reward."""

WALK_SPEED = 1.0
RUN_SPEED = 10.0
"""Speeds with full reward, m/s."""

EXTREMITIES = ("left_hand", "left_foot", "right_hand", "right_foot")


class Humanoid(Task):
    """What all tasks share: stand upright with little control."""

    control_timestep = 0.025

    @override
    def build(self) -> mujoco.MjSpec:
        spec = load_spec("humanoid.xml")
        for body in ("torso", "head", *EXTREMITIES):
            add_frame_sensor(spec, "pos", "xbody", body)
        add_rotation_sensors(spec, "xbody", "torso")
        return spec

    @override
    def initial(self, count: int, rng: np.random.Generator) -> Initial:
        start = Initial.rest(self.model, count)
        start.qpos = without_contacts(self.model, count, lambda count: random_joints(self.model, count, rng))
        return start

    def velocity(self, state: State) -> torch.Tensor:
        """Velocity of the centre of mass, m/s, (N, 3)."""
        return state.sensor("torso_subtreelinvel")

    @override
    def observation(self, state: State) -> tuple[torch.Tensor, ...]:
        """Joint angles, height of the head, extremities seen from the torso, direction of the vertical, velocities."""
        torso = rotation(state, "torso")
        offsets = (state.sensor(f"{limb}_pos") - state.sensor("torso_pos") for limb in EXTREMITIES)
        extremities = (to_local(offset, torso) for offset in offsets)
        height = state.sensor("head_pos")[:, 2]
        return state.qpos[:, 7:], height, *extremities, torso[:, 2], self.velocity(state), state.qvel

    @override
    def reward(self, state: State) -> torch.Tensor:
        standing = tolerance(state.sensor("head_pos")[:, 2], (STAND_HEIGHT, float("inf")), margin=STAND_HEIGHT / 4)
        upright = tolerance(
            state.sensor("torso_zaxis")[:, 2],
            (UPRIGHT_COSINE, float("inf")),
            margin=UPRIGHT_COSINE + 1.0,
            value_at_margin=0.0,
            sigmoid="linear",
        )
        small_control = tolerance(state.ctrl, margin=1.0, value_at_margin=0.0, sigmoid="quadratic").mean(dim=1)
        return standing * upright * (4.0 + small_control) / 5.0


class Stand(Humanoid):
    """Stand still."""

    @override
    def reward(self, state: State) -> torch.Tensor:
        still = tolerance(self.velocity(state)[:, :2], margin=2.0).mean(dim=1)
        return super().reward(state) * still


class Move(Humanoid):
    """Stand upright and move in any direction."""

    def __init__(self, target_speed: float) -> None:
        """Create the task with the speed, m/s, that has full reward."""
        super().__init__()
        self.target_speed = target_speed

    @override
    def reward(self, state: State) -> torch.Tensor:
        moving = tolerance(
            self.velocity(state)[:, :2].norm(dim=1),
            (self.target_speed, float("inf")),
            margin=self.target_speed,
            value_at_margin=0.0,
            sigmoid="linear",
        )
        return super().reward(state) * (5.0 * moving + 1.0) / 6.0


TASKS = {
    "humanoid-stand": Stand,
    "humanoid-walk": partial(Move, WALK_SPEED),
    "humanoid-run": partial(Move, RUN_SPEED),
}
