"""Rotations of a model's frames, and vectors seen from them."""

from __future__ import annotations

import mujoco
import torch

from m3po_tasks.dmcontrol.task import State, add_frame_sensor

_AXES = ("xaxis", "yaxis", "zaxis")


def add_rotation_sensors(spec: mujoco.MjSpec, kind: str, name: str) -> None:
    """Add what :func:`rotation` reads; arguments as in :func:`~m3po_tasks.dmcontrol.task.add_frame_sensor`."""
    for axis in _AXES:
        add_frame_sensor(spec, axis, kind, name)


def rotation(state: State, name: str) -> torch.Tensor:
    """Rotation from a frame to the world, dm_control's ``xmat``, (N, 3, 3)."""
    return torch.stack([state.sensor(f"{name}_{axis}") for axis in _AXES], dim=2)


def to_local(vector: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Vectors of the world, (N, 3), in the coordinates of frames with the given rotations, (N, 3, 3)."""
    return torch.einsum("ni,nij->nj", vector, rotation)
