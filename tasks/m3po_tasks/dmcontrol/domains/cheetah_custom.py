"""Cheetah backwards, on one foot and in the air: TD-MPC2's variations of cheetah (arXiv 2310.16828, appendix)."""

from __future__ import annotations

from functools import partial
from typing import override

import mujoco
import torch

from m3po_tasks.dmcontrol.domains.cheetah import RUN_SPEED, Cheetah
from m3po_tasks.dmcontrol.rewards import tolerance
from m3po_tasks.dmcontrol.task import State, add_frame_sensor

BACKWARDS_SPEED = 0.8 * RUN_SPEED
"""Speed of running backwards with full reward, m/s."""

ONE_FOOT_SPEED = 0.6 * RUN_SPEED
"""Speed of running on one foot with full reward, m/s."""

HOVER_SPEED = 0.5
"""Highest speed of jumping with full reward, m/s."""

UP_HEIGHT = 1.2
"""Height of torso and feet with full reward, m."""

FRONT_FOOT, BACK_FOOT = "ffoot", "bfoot"


class RunBackwards(Cheetah):
    """Run backwards."""

    @override
    def reward(self, state: State) -> torch.Tensor:
        return _running(-self.speed(state), BACKWARDS_SPEED)


class Raised(Cheetah):
    """What the tasks with raised feet share."""

    @override
    def build(self) -> mujoco.MjSpec:
        spec = super().build()
        for body in ("torso", FRONT_FOOT, BACK_FOOT):
            add_frame_sensor(spec, "pos", "xbody", body)
        return spec

    def height(self, state: State, body: str) -> torch.Tensor:
        """Height of a body's frame, m, (N,)."""
        return state.sensor(f"{body}_pos")[:, 2]


class RunOnOneFoot(Raised):
    """Run forwards with the torso high and one foot in the air."""

    def __init__(self, raised_foot: str) -> None:
        """Create the task with the foot that is to be in the air."""
        super().__init__()
        self.raised_foot = raised_foot

    @override
    def reward(self, state: State) -> torch.Tensor:
        up = (3.0 * _up(self.height(state, self.raised_foot)) + 2.0 * _up(self.height(state, "torso"))) / 5.0
        return up * (5.0 * _running(self.speed(state), ONE_FOOT_SPEED) + 1.0) / 6.0


class Jump(Raised):
    """Be in the air with both feet, and do not move away."""

    @override
    def reward(self, state: State) -> torch.Tensor:
        torso = self.height(state, "torso")
        up = sum(_up((torso + self.height(state, foot)) / 2.0) for foot in (FRONT_FOOT, BACK_FOOT)) / 2.0
        slow = tolerance(
            self.speed(state), (-HOVER_SPEED, HOVER_SPEED), margin=HOVER_SPEED, value_at_margin=0.0, sigmoid="linear"
        )
        return (5.0 * up + slow) / 6.0


def _running(speed: torch.Tensor, full: float) -> torch.Tensor:
    """Reward of a speed: proportional to it up to ``full``, m/s."""
    return tolerance(speed, (full, float("inf")), margin=full, value_at_margin=0.0, sigmoid="linear")


def _up(height: torch.Tensor) -> torch.Tensor:
    """Reward of a height, m."""
    return tolerance(height, (UP_HEIGHT, float("inf")), margin=UP_HEIGHT / 2)


TASKS = {
    "cheetah-run-backwards": RunBackwards,
    "cheetah-run-front": partial(RunOnOneFoot, BACK_FOOT),
    "cheetah-run-back": partial(RunOnOneFoot, FRONT_FOOT),
    "cheetah-jump": Jump,
}
