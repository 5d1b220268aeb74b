"""Ball in cup: a cup that moves in a plane, and a ball on a string."""

from __future__ import annotations

from typing import override

import mujoco
import numpy as np
import torch

from m3po_tasks.dmcontrol.sampling import without_contacts
from m3po_tasks.dmcontrol.task import Initial, State, Task, add_frame_sensor, load_spec

BALL_X_RANGE = (-0.2, 0.2)
BALL_Z_RANGE = (0.2, 0.5)
"""Where the ball starts, in coordinates of its joints, m."""


class Cup(Task):
    """Catch the ball."""

    control_timestep = 0.02

    def __init__(self) -> None:
        super().__init__()
        room = self.model.site("target").size - self.model.geom("ball").size[0]
        self.room_x, self.room_z = room[0], room[2]

    @override
    def build(self) -> mujoco.MjSpec:
        spec = load_spec("ball_in_cup.xml")
        add_frame_sensor(spec, "pos", "site", "target")
        add_frame_sensor(spec, "pos", "xbody", "ball")
        return spec

    @override
    def initial(self, count: int, rng: np.random.Generator) -> Initial:
        start = Initial.rest(self.model, count)
        x, z = (self.model.joint(name).qposadr[0] for name in ("ball_x", "ball_z"))

        def draw(count: int) -> np.ndarray:
            qpos = np.tile(self.model.qpos0, (count, 1))
            qpos[:, x] = rng.uniform(*BALL_X_RANGE, count)
            qpos[:, z] = rng.uniform(*BALL_Z_RANGE, count)
            return qpos

        start.qpos = without_contacts(self.model, count, draw)
        return start

    @override
    def observation(self, state: State) -> tuple[torch.Tensor, ...]:
        return state.qpos, state.qvel

    @override
    def reward(self, state: State) -> torch.Tensor:
        offset = (state.sensor("target_pos") - state.sensor("ball_pos")).abs()
        return ((offset[:, 0] < self.room_x) & (offset[:, 2] < self.room_z)).to(offset.dtype)


TASKS = {"cup-catch": Cup}
