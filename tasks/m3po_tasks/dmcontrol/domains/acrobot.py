"""Acrobot: two links, actuated at the elbow."""

from __future__ import annotations

from typing import override

import mujoco
import numpy as np
import torch

from m3po_tasks.dmcontrol.rewards import tolerance
from m3po_tasks.dmcontrol.sampling import random_joints
from m3po_tasks.dmcontrol.task import Initial, State, Task, add_frame_sensor, load_spec

ARMS = ("upper_arm", "lower_arm")


class Acrobot(Task):
    """Swing up and bring the tip into the target."""

    def __init__(self) -> None:
        super().__init__()
        self.target_radius = self.model.site("target").size[0]

    @override
    def build(self) -> mujoco.MjSpec:
        spec = load_spec("acrobot.xml")
        for arm in ARMS:
            add_frame_sensor(spec, "zaxis", "xbody", arm)
        for site in ("target", "tip"):
            add_frame_sensor(spec, "pos", "site", site)
        return spec

    @override
    def initial(self, count: int, rng: np.random.Generator) -> Initial:
        start = Initial.rest(self.model, count)
        start.qpos = random_joints(self.model, count, rng)
        return start

    @override
    def observation(self, state: State) -> tuple[torch.Tensor, ...]:
        axes = torch.stack([state.sensor(f"{arm}_zaxis") for arm in ARMS], dim=1)
        return axes[..., 0], axes[..., 2], state.qvel

    @override
    def reward(self, state: State) -> torch.Tensor:
        distance = (state.sensor("target_pos") - state.sensor("tip_pos")).norm(dim=1)
        return tolerance(distance, (0.0, self.target_radius), margin=1.0)


TASKS = {"acrobot-swingup": Acrobot}
