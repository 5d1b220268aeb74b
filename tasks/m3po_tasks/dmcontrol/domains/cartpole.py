"""Cartpole: a cart on a rail with a pole."""

from __future__ import annotations

from functools import partial
from typing import override

import mujoco
import numpy as np
import torch

from m3po_tasks.dmcontrol.rewards import tolerance
from m3po_tasks.dmcontrol.task import Initial, State, Task, add_frame_sensor, load_spec

CART_RANGE = (-0.25, 0.25)
"""Positions of the cart with sparse reward, m."""

ANGLE_COSINE_RANGE = (0.995, 1.0)
"""Cosines of the pole's angle with sparse reward."""


class Cartpole(Task):
    """Balance the pole, from near the top or from below."""

    def __init__(self, swing_up: bool, sparse: bool) -> None:
        """Create the task.

        Args:
            swing_up: Whether the pole starts hanging in the middle of the rail, else nearly upright anywhere near it.
            sparse: Whether the reward is 0 or 1.
        """
        super().__init__()
        self.swing_up, self.sparse = swing_up, sparse

    @override
    def build(self) -> mujoco.MjSpec:
        spec = load_spec("cartpole.xml")
        add_frame_sensor(spec, "zaxis", "xbody", "pole_1")
        return spec

    @override
    def initial(self, count: int, rng: np.random.Generator) -> Initial:
        start = Initial.rest(self.model, count)
        if self.swing_up:
            start.qpos[:] = [0.0, np.pi] + 0.01 * rng.standard_normal((count, 2))
        else:
            start.qpos[:] = rng.uniform(-1.0, 1.0, (count, 2)) * [0.1, 0.034]
        start.qvel[:] = 0.01 * rng.standard_normal((count, 2))
        return start

    @override
    def observation(self, state: State) -> tuple[torch.Tensor, ...]:
        axis = state.sensor("pole_1_zaxis")
        return state.qpos[:, 0], axis[:, 2], axis[:, 0], state.qvel

    @override
    def reward(self, state: State) -> torch.Tensor:
        position, cosine = state.qpos[:, 0], state.sensor("pole_1_zaxis")[:, 2]
        if self.sparse:
            return tolerance(position, CART_RANGE) * tolerance(cosine, ANGLE_COSINE_RANGE)
        upright = (cosine + 1.0) / 2.0
        centered = (1.0 + tolerance(position, margin=2.0)) / 2.0
        small_control = tolerance(state.ctrl[:, 0], margin=1.0, value_at_margin=0.0, sigmoid="quadratic")
        small_velocity = (1.0 + tolerance(state.qvel[:, 1], margin=5.0)) / 2.0
        return upright * (4.0 + small_control) / 5.0 * small_velocity * centered


TASKS = {
    "cartpole-balance": partial(Cartpole, swing_up=False, sparse=False),
    "cartpole-balance-sparse": partial(Cartpole, swing_up=False, sparse=True),
    "cartpole-swingup": partial(Cartpole, swing_up=True, sparse=False),
    "cartpole-swingup-sparse": partial(Cartpole, swing_up=True, sparse=True),
}
