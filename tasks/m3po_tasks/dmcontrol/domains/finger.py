"""Finger: a two-link finger beside a freely turning body."""

from __future__ import annotations

from functools import partial
from typing import override

import mujoco
import numpy as np
import torch

from m3po_tasks.dmcontrol.rewards import tolerance
from m3po_tasks.dmcontrol.sampling import random_joints, without_contacts
from m3po_tasks.dmcontrol.task import Initial, State, Task, load_spec

SPIN_VELOCITY = 15.0
"""Speed of the body with reward, rad/s."""

SPIN_DAMPING = 0.03
"""Damping of the body's hinge for spinning, N m s/rad."""

EASY_TARGET_RADIUS = 0.07
HARD_TARGET_RADIUS = 0.03
"""Sizes of the targets that the body's tip is to be turned into, m."""


class Finger(Task):
    """What all tasks share."""

    control_timestep = 0.02

    @override
    def build(self) -> mujoco.MjSpec:
        return load_spec("finger.xml")

    @override
    def initial(self, count: int, rng: np.random.Generator) -> Initial:
        start = Initial.rest(self.model, count)
        start.qpos = without_contacts(self.model, count, lambda count: random_joints(self.model, count, rng))
        return start

    def tip(self, state: State) -> torch.Tensor:
        """Position (x, z) of the body's tip relative to its hinge, (N, 2)."""
        return (state.sensor("tip") - state.sensor("spinner"))[:, [0, 2]]

    @override
    def observation(self, state: State) -> tuple[torch.Tensor, ...]:
        """Joints with the tip for the hinge's angle, velocities, touch."""
        joints = [state.sensor(name) for name in ("proximal", "distal")]
        velocities = [state.sensor(f"{name}_velocity") for name in ("proximal", "distal", "hinge")]
        touch = [state.sensor(name).log1p() for name in ("touchtop", "touchbottom")]
        return *joints, self.tip(state), *velocities, *touch


class Spin(Finger):
    """Spin the body; reward is 0 or 1."""

    @override
    def build(self) -> mujoco.MjSpec:
        spec = super().build()
        spec.joint("hinge").damping[0] = SPIN_DAMPING
        return spec

    @override
    def reward(self, state: State) -> torch.Tensor:
        return tolerance(state.sensor("hinge_velocity")[:, 0], (-float("inf"), -SPIN_VELOCITY))


class Turn(Finger):
    """Turn the body's tip into a target; reward is 0 or 1. ``target`` is the target's position, as :meth:`tip`."""

    def __init__(self, target_radius: float) -> None:
        """Create the task with the radius of the target, m."""
        super().__init__()
        self.target_radius = target_radius
        self.target_distance = self.model.geom("cap1").size.sum()

    @override
    def initial(self, count: int, rng: np.random.Generator) -> Initial:
        start = super().initial(count, rng)
        angle = rng.uniform(-np.pi, np.pi, count)
        start.target = self.target_distance * np.stack([np.sin(angle), np.cos(angle)], axis=1)
        return start

    def distance(self, state: State) -> torch.Tensor:
        """Distance of the tip from the target's surface, negative inside, m, (N,)."""
        return (state.target - self.tip(state)).norm(dim=1) - self.target_radius

    @override
    def observation(self, state: State) -> tuple[torch.Tensor, ...]:
        return *super().observation(state), state.target, self.distance(state)

    @override
    def reward(self, state: State) -> torch.Tensor:
        return tolerance(self.distance(state), (-float("inf"), 0.0))


TASKS = {
    "finger-spin": Spin,
    "finger-turn-easy": partial(Turn, EASY_TARGET_RADIUS),
    "finger-turn-hard": partial(Turn, HARD_TARGET_RADIUS),
}
