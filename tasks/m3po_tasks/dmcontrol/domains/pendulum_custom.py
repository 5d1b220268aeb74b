"""Pendulum that spins: TD-MPC2's variation of pendulum (arXiv 2310.16828, appendix)."""

from __future__ import annotations

from typing import override

import torch

from m3po_tasks.dmcontrol.domains.pendulum import Pendulum
from m3po_tasks.dmcontrol.rewards import tolerance
from m3po_tasks.dmcontrol.task import State

SPIN_SPEED = 9.0
"""Angular speed with full reward, rad/s."""


class Spin(Pendulum):
    """Spin fast, in either direction."""

    @override
    def reward(self, state: State) -> torch.Tensor:
        speed = state.qvel[:, 0].abs()
        return tolerance(
            speed, (SPIN_SPEED, float("inf")), margin=SPIN_SPEED / 2, value_at_margin=0.5, sigmoid="linear"
        )


TASKS = {"pendulum-spin": Spin}
