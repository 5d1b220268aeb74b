"""Hopper backwards: TD-MPC2's variation of hopper (arXiv 2310.16828, appendix)."""

from __future__ import annotations

from typing import override

import torch

from m3po_tasks.dmcontrol.domains.hopper import HOP_SPEED, Hopper
from m3po_tasks.dmcontrol.rewards import tolerance
from m3po_tasks.dmcontrol.task import State

BACKWARDS_SPEED = HOP_SPEED / 2
"""Speed with full reward, m/s."""


class HopBackwards(Hopper):
    """Hop backwards."""

    @override
    def reward(self, state: State) -> torch.Tensor:
        hopping = tolerance(
            -self.speed(state),
            (BACKWARDS_SPEED, float("inf")),
            margin=BACKWARDS_SPEED / 2,
            value_at_margin=0.5,
            sigmoid="linear",
        )
        return self.standing(state) * hopping


TASKS = {"hopper-hop-backwards": HopBackwards}
