"""Quadruped: a four-legged walker with 12 actuators."""

from __future__ import annotations

from functools import partial
from typing import override

import mujoco
import numpy as np
import torch

from m3po_tasks.dmcontrol.rewards import tolerance
from m3po_tasks.dmcontrol.sampling import contact_counts, random_rotations
from m3po_tasks.dmcontrol.task import Initial, State, Task, add_frame_sensor, load_spec

WALK_SPEED = 0.5
RUN_SPEED = 5.0
"""Speeds with full reward, m/s."""

EPISODE_SECONDS = 20.0

HEIGHT_STEP = 0.01
"""Initial heights are multiples of it, m."""

MAX_HEIGHT_STEPS = 256
"""A height at which no orientation touches the floor, in multiples of ``HEIGHT_STEP``."""

TOES = ("front_left", "front_right", "back_right", "back_left")
OTHER_TASKS_GEOMS = ("wall_px", "wall_py", "wall_nx", "wall_ny", "terrain")


class Quadruped(Task):
    """Move forwards, upright."""

    control_timestep = 0.02

    def __init__(self, target_speed: float) -> None:
        """Create the task with the speed, m/s, that has full reward."""
        self.target_speed = target_speed
        super().__init__()

    @override
    def build(self) -> mujoco.MjSpec:
        spec = load_spec("quadruped.xml")
        spec.geom("floor").size[:2] = self.target_speed * EPISODE_SECONDS
        rangefinders = [sensor for sensor in spec.sensors if sensor.type == mujoco.mjtSensor.mjSENS_RANGEFINDER]
        geoms = [spec.geom(name) for name in OTHER_TASKS_GEOMS]
        for element in (*rangefinders, *geoms, spec.body("ball"), spec.site("target")):
            spec.delete(element)
        add_frame_sensor(spec, "zaxis", "xbody", "torso")
        return spec

    @override
    def initial(self, count: int, rng: np.random.Generator) -> Initial:
        """Any orientation, at the lowest of the heights without contacts."""
        start = Initial.rest(self.model, count)
        start.qpos[:, 3:7] = random_rotations(count, rng)
        # A robot without contacts has none further up either, so bisection finds the lowest height.
        touching, free = np.full(count, -1), np.full(count, MAX_HEIGHT_STEPS)
        while (free - touching > 1).any():
            middle = (touching + free) // 2
            start.qpos[:, 2] = HEIGHT_STEP * middle
            touches = contact_counts(self.model, start.qpos) > 0
            touching, free = np.where(touches, middle, touching), np.where(touches, free, middle)
        start.qpos[:, 2] = HEIGHT_STEP * free
        return start

    @override
    def observation(self, state: State) -> tuple[torch.Tensor, ...]:
        """Joints and actuators, velocity and upright component of the torso, its acceleration and turning, toes."""
        motion = (state.qpos[:, 7:], state.qvel[:, 6:], state.act)
        torso = (state.sensor("velocimeter"), state.sensor("torso_zaxis")[:, 2])
        imu = (state.sensor("imu_accel"), state.sensor("imu_gyro"))
        toes = (state.sensor(f"{quantity}_toe_{toe}").arcsinh() for quantity in ("force", "torque") for toe in TOES)
        return *motion, *torso, *imu, *toes

    @override
    def reward(self, state: State) -> torch.Tensor:
        upright = tolerance(
            state.sensor("torso_zaxis")[:, 2],
            (1.0, float("inf")),
            margin=2.0,
            value_at_margin=0.0,
            sigmoid="linear",
        )
        moving = tolerance(
            state.sensor("velocimeter")[:, 0],
            (self.target_speed, float("inf")),
            margin=self.target_speed,
            value_at_margin=0.5,
            sigmoid="linear",
        )
        return upright * moving


TASKS = {"quadruped-walk": partial(Quadruped, WALK_SPEED), "quadruped-run": partial(Quadruped, RUN_SPEED)}
