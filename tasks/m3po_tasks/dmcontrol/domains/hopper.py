"""Hopper: a planar one-legged jumper."""

from __future__ import annotations

from typing import override

import mujoco
import numpy as np
import torch

from m3po_tasks.dmcontrol.rewards import tolerance
from m3po_tasks.dmcontrol.sampling import random_joints
from m3po_tasks.dmcontrol.task import Initial, State, Task, add_frame_sensor, load_spec

STAND_HEIGHTS = (0.6, 2.0)
"""Heights of the torso above the foot that count as standing, m."""

HOP_SPEED = 2.0
"""Speed with full reward, m/s."""


class Hopper(Task):
    """What both tasks share."""

    control_timestep = 0.02

    @override
    def build(self) -> mujoco.MjSpec:
        spec = load_spec("hopper.xml")
        for body in ("torso", "foot"):
            add_frame_sensor(spec, "pos", "body", body)
        return spec

    @override
    def initial(self, count: int, rng: np.random.Generator) -> Initial:
        start = Initial.rest(self.model, count)
        start.qpos = random_joints(self.model, count, rng)
        return start

    @override
    def observation(self, state: State) -> tuple[torch.Tensor, ...]:
        touch = torch.cat([state.sensor("touch_toe"), state.sensor("touch_heel")], dim=1)
        return state.qpos[:, 1:], state.qvel, touch.log1p()

    def standing(self, state: State) -> torch.Tensor:
        """Whether the torso is high enough, 0 or 1, (N,)."""
        height = state.sensor("torso_pos")[:, 2] - state.sensor("foot_pos")[:, 2]
        return tolerance(height, STAND_HEIGHTS)

    def speed(self, state: State) -> torch.Tensor:
        """Horizontal speed of the centre of mass, m/s, (N,)."""
        return state.sensor("torso_subtreelinvel")[:, 0]


class Stand(Hopper):
    """Stand with little control."""

    @override
    def reward(self, state: State) -> torch.Tensor:
        small_control = tolerance(state.ctrl, margin=1.0, value_at_margin=0.0, sigmoid="quadratic").mean(dim=1)
        return self.standing(state) * (small_control + 4.0) / 5.0


class Hop(Hopper):
    """Hop forwards."""

    @override
    def reward(self, state: State) -> torch.Tensor:
        hopping = tolerance(
            self.speed(state), (HOP_SPEED, float("inf")), margin=HOP_SPEED / 2, value_at_margin=0.5, sigmoid="linear"
        )
        return self.standing(state) * hopping


TASKS = {"hopper-stand": Stand, "hopper-hop": Hop}
