"""Walker backwards: TD-MPC2's variations of walker (arXiv 2310.16828, appendix)."""

from __future__ import annotations

from functools import partial
from typing import override

import torch

from m3po_tasks.dmcontrol.domains.walker import RUN_SPEED, WALK_SPEED, Move
from m3po_tasks.dmcontrol.task import State


class MoveBackwards(Move):
    """Stand upright and move backwards."""

    @override
    def speed(self, state: State) -> torch.Tensor:
        """Horizontal speed of the centre of mass, backwards, m/s, (N,)."""
        return -super().speed(state)


TASKS = {
    "walker-walk-backwards": partial(MoveBackwards, WALK_SPEED),
    "walker-run-backwards": partial(MoveBackwards, RUN_SPEED),
}
