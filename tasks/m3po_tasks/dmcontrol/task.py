"""What a domain file provides: a model, a distribution of initial states, and pure functions of a batched state."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import mujoco
import numpy as np
import torch


class Physics(NamedTuple):
    """A batch of worlds after a control step. These are buffers of the backend: valid until its next step."""

    qpos: torch.Tensor
    """Generalised positions, (N, nq)."""

    qvel: torch.Tensor
    """Generalised velocities, (N, nv)."""

    act: torch.Tensor
    """Actuator activations, (N, na)."""

    sensordata: torch.Tensor
    """Sensor readings, (N, nsensordata). Those of positions and velocities are of this very state; those of forces and
    accelerations are of the last sub-step, as in dm_control."""


@dataclass(frozen=True)
class State:
    """A batch of worlds as observation and reward see it: float64 on the CPU backend, float32 in Warp."""

    physics: Physics
    """Positions, velocities, activations and sensors."""

    ctrl: torch.Tensor
    """Control signals that led here, in the actuators' units, (N, nu); 0 after a reset."""

    target: torch.Tensor
    """What the task draws anew for each episode beside the physics, (N, K)."""

    sensors: Mapping[str, slice]
    """Columns of each sensor in the sensor data."""

    @property
    def qpos(self) -> torch.Tensor:
        """Generalised positions, (N, nq)."""
        return self.physics.qpos

    @property
    def qvel(self) -> torch.Tensor:
        """Generalised velocities, (N, nv)."""
        return self.physics.qvel

    @property
    def act(self) -> torch.Tensor:
        """Actuator activations, (N, na)."""
        return self.physics.act

    def sensor(self, name: str) -> torch.Tensor:
        """Readings of a sensor, (N, dim)."""
        return self.physics.sensordata[:, self.sensors[name]]


@dataclass
class Initial:
    """Initial states of n episodes, float64 arrays."""

    qpos: np.ndarray
    """Generalised positions, (n, nq)."""

    qvel: np.ndarray
    """Generalised velocities, (n, nv)."""

    act: np.ndarray
    """Actuator activations, (n, na)."""

    target: np.ndarray
    """The episodes' targets, (n, K); K = 0 for most tasks."""

    @classmethod
    def rest(cls, model: mujoco.MjModel, count: int) -> Initial:
        """The model's default pose without motion, ``count`` times, without targets."""
        qpos = np.tile(model.qpos0, (count, 1))
        return cls(qpos, np.zeros((count, model.nv)), np.zeros((count, model.na)), np.zeros((count, 0)))


class Task(ABC):
    """One task. Subclasses set what :meth:`build` needs before they call the constructor."""

    control_timestep: float | None = None
    """Seconds between two rewards; ``None`` for one physics step."""

    def __init__(self) -> None:
        self.model = self.build().compile()

    @property
    def sub_steps(self) -> int:
        """Physics steps per control step."""
        return 1 if self.control_timestep is None else round(self.control_timestep / self.model.opt.timestep)

    @abstractmethod
    def build(self) -> mujoco.MjSpec:
        """The model: dm_control's, with a sensor for everything beyond qpos, qvel and act that the task reads."""

    @abstractmethod
    def initial(self, count: int, rng: np.random.Generator) -> Initial:
        """Draw independent initial states from the distribution of dm_control's ``initialize_episode``."""

    @abstractmethod
    def observation(self, state: State) -> tuple[torch.Tensor, ...]:
        """The values of dm_control's observation in its order, (N,) or (N, dim) each."""

    @abstractmethod
    def reward(self, state: State) -> torch.Tensor:
        """Reward of one control step, (N,)."""


def load_spec(filename: str) -> mujoco.MjSpec:
    """A model of the installed dm_control suite, for example ``cheetah.xml``; dm_control itself is not imported."""
    package: Any = importlib.util.find_spec("dm_control")
    return mujoco.MjSpec.from_file(str(Path(package.submodule_search_locations[0], "suite", filename)))


def add_frame_sensor(spec: mujoco.MjSpec, quantity: str, kind: str, name: str) -> None:
    """Add a sensor ``<name>_<quantity>`` of a frame, three numbers in world coordinates.

    Args:
        spec: The model to extend.
        quantity: ``pos``, ``xaxis``, ``yaxis``, ``zaxis``, ``linvel`` or ``angvel``. The axes are the columns of
            dm_control's ``xmat``: ``xmat[body, 'zx']`` is the z component of the x axis.
        kind: ``xbody`` (``xpos``, ``xmat``), ``body`` (the inertial frame: ``xipos``), ``geom`` or ``site``.
        name: Name of the object.
    """
    spec.add_sensor(
        name=f"{name}_{quantity}",
        type=getattr(mujoco.mjtSensor, f"mjSENS_FRAME{quantity.upper()}"),
        objtype=getattr(mujoco.mjtObj, f"mjOBJ_{kind.upper()}"),
        objname=name,
    )
