"""Dog: a detailed skeleton with 38 actuators."""

from __future__ import annotations

import math
from functools import partial
from typing import override

import mujoco
import numpy as np
import torch

from m3po_tasks.dmcontrol.frames import add_rotation_sensors, rotation, to_local
from m3po_tasks.dmcontrol.rewards import tolerance
from m3po_tasks.dmcontrol.task import Initial, State, Task, add_frame_sensor, load_spec

STAND_HEIGHT_FRACTION = 0.9
"""Fraction of the default pose's heights that has full reward."""

UPRIGHT_COSINE = math.cos(math.radians(30.0))
"""Cosine of the angle from upright with full reward."""

WALK_SPEED = 1.0
TROT_SPEED = 3.0
RUN_SPEED = 9.0
"""Speeds with full reward, m/s."""

EPISODE_SECONDS = 15.0

INITIAL_SPEED = 2.0
"""Std of the horizontal velocities at the start, m/s and rad/s."""

HEIGHTS = ("torso", "pelvis")
FRAMES = ("skull", "torso", "pelvis")
FEET = ("foot_L", "foot_R", "hand_L", "hand_R")
SOLES = ("palm_L", "palm_R", "sole_L", "sole_R")
OTHER_TASKS_GEOMS = ("target", "wall_px", "wall_py", "wall_nx", "wall_ny")


class Stand(Task):
    """Stand upright with the weight on the feet."""

    control_timestep = 0.015
    floor_size = WALK_SPEED * EPISODE_SECONDS

    def __init__(self) -> None:
        super().__init__()
        data = mujoco.MjData(self.model)
        mujoco.mj_kinematics(self.model, data)
        self.stand_heights = [STAND_HEIGHT_FRACTION * data.body(body).xpos[2] for body in HEIGHTS]
        self.weight = -self.model.opt.gravity[2] * self.model.body("torso").subtreemass[0]

    @override
    def build(self) -> mujoco.MjSpec:
        spec = load_spec("dog.xml")
        spec.geom("floor").size[:2] = self.floor_size
        geoms = [spec.geom(name) for name in OTHER_TASKS_GEOMS]
        cameras = [spec.camera(name) for name in ("ball", "head")]
        for element in (*geoms, *cameras, spec.body("ball")):
            spec.delete(element)
        for body in HEIGHTS:
            add_frame_sensor(spec, "pos", "xbody", body)
        for body in FRAMES:
            add_rotation_sensors(spec, "xbody", body)
        return spec

    @override
    def initial(self, count: int, rng: np.random.Generator) -> Initial:
        """The default pose in any direction, sliding and turning, with random actuators."""
        start = Initial.rest(self.model, count)
        half = rng.uniform(0.0, np.pi, count)
        zero = np.zeros(count)
        start.qpos[:, 3:7] = np.stack([np.cos(half), zero, zero, np.sin(half)], axis=1)
        start.qvel[:, [0, 1, 5]] = INITIAL_SPEED * rng.standard_normal((count, 3))
        start.act = rng.uniform(*self.model.actuator_ctrlrange.T, (count, self.model.nu))
        return start

    def heights(self, state: State) -> list[torch.Tensor]:
        """Heights of torso and pelvis, m, (N,) each."""
        return [state.sensor(f"{body}_pos")[:, 2] for body in HEIGHTS]

    def velocity(self, state: State) -> torch.Tensor:
        """Velocity of the centre of mass in the torso's frame, m/s, (N, 3)."""
        return to_local(state.sensor("torso_linvel"), rotation(state, "torso"))

    @override
    def observation(self, state: State) -> tuple[torch.Tensor, ...]:
        """Joints, heights, directions of the vertical, velocity, inertial sensors, forces, touch, actuators."""
        return (
            state.qpos[:, 7:],
            state.qvel[:, 6:],
            *self.heights(state),
            *(rotation(state, body)[:, 2] for body in FRAMES),
            self.velocity(state),
            *(state.sensor(name) for name in ("accelerometer", "velocimeter", "gyro", *FEET, *SOLES)),
            state.act,
        )

    @override
    def reward(self, state: State) -> torch.Tensor:
        reward = torch.ones_like(state.qpos[:, 0])
        for height, full in zip(self.heights(state), self.stand_heights, strict=True):
            reward = reward * tolerance(height, (full, float("inf")), margin=full)
        for body in FRAMES:
            reward = reward * tolerance(
                state.sensor(f"{body}_zaxis")[:, 2],
                (UPRIGHT_COSINE, float("inf")),
                margin=UPRIGHT_COSINE + 1.0,
                value_at_margin=0.0,
                sigmoid="linear",
            )
        touch = sum((state.sensor(name)[:, 0] for name in SOLES), torch.zeros_like(reward))
        return reward * tolerance(
            touch, (self.weight, float("inf")), margin=self.weight, value_at_margin=0.9, sigmoid="linear"
        )


class Move(Stand):
    """Stand upright and move forwards."""

    def __init__(self, target_speed: float) -> None:
        """Create the task with the lowest speed, m/s, that has full reward; the highest is twice that."""
        self.target_speed = target_speed
        self.floor_size = target_speed * EPISODE_SECONDS
        super().__init__()

    @override
    def reward(self, state: State) -> torch.Tensor:
        moving = tolerance(
            self.velocity(state)[:, 0],
            (self.target_speed, 2.0 * self.target_speed),
            margin=max(1.0, self.target_speed),
            value_at_margin=0.0,
            sigmoid="linear",
        )
        return super().reward(state) * (4.0 * moving + 1.0) / 5.0


TASKS = {
    "dog-stand": Stand,
    "dog-walk": partial(Move, WALK_SPEED),
    "dog-trot": partial(Move, TROT_SPEED),
    "dog-run": partial(Move, RUN_SPEED),
}
