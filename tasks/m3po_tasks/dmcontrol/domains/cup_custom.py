"""Ball in cup that spins: TD-MPC2's variation of ball in cup (arXiv 2310.16828, appendix)."""

from __future__ import annotations

from typing import override

import mujoco
import numpy as np
import torch

from m3po_tasks.dmcontrol.domains.cup import Cup
from m3po_tasks.dmcontrol.rewards import tolerance
from m3po_tasks.dmcontrol.sampling import without_contacts
from m3po_tasks.dmcontrol.task import Initial, State

FAR = 0.5
"""Distance between ball and cup with full reward, m."""

SPIN_SPEED = 6.0
"""Speed of the ball with full reward, m/s."""

SHARE_CAUGHT = 0.9
"""Share of the episodes that start with the ball in the cup."""

BALL = slice(2, 4)
"""Where the ball's joints, x and z, are among positions and velocities."""


class Spin(Cup):
    """Swing the ball around the cup: far from it and fast."""

    @override
    def initial(self, count: int, rng: np.random.Generator) -> Initial:
        """A ball in the cup, or as in the task ``cup-catch``."""
        start = super().initial(count, rng)
        caught = rng.random(count) < SHARE_CAUGHT
        data = mujoco.MjData(self.model)
        mujoco.mj_kinematics(self.model, data)
        centre = data.site("target").xpos - data.body("ball").xpos

        def draw(count: int) -> np.ndarray:
            qpos = np.tile(self.model.qpos0, (count, 1))
            # Lies within the ranges of cup-catch, so this is its distribution given that the ball is in the cup.
            offset = rng.uniform(-1.0, 1.0, (count, 2)) * (self.room_x, self.room_z)
            qpos[:, BALL] = centre[[0, 2]] + offset
            return qpos

        start.qpos[caught] = without_contacts(self.model, int(caught.sum()), draw)
        return start

    @override
    def reward(self, state: State) -> torch.Tensor:
        offset = state.sensor("target_pos") - state.sensor("ball_pos")
        distance = torch.hypot(offset[:, 0], offset[:, 2])
        speed = state.qvel[:, BALL].norm(dim=1)
        far = tolerance(distance, (FAR, float("inf")), margin=FAR / 2, value_at_margin=0.5, sigmoid="linear")
        fast = tolerance(
            speed, (SPIN_SPEED, float("inf")), margin=SPIN_SPEED / 2, value_at_margin=0.5, sigmoid="linear"
        )
        caught = super().reward(state)
        return (1.0 - caught) * (far + 2.0 * fast) / 3.0


TASKS = {"cup-spin": Spin}
