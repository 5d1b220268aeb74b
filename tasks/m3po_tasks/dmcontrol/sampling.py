"""What initial states are drawn with: random joints, states without contacts, and letting the model come to rest."""

from __future__ import annotations

import math
import os
from collections.abc import Callable

import mujoco
import mujoco.rollout
import numpy as np

from m3po_tasks.dmcontrol.task import Initial

MAX_DRAWS = 1000
"""Draws after which no state without contacts is believed to exist."""


def available_cpus() -> int:
    """CPUs this process may use."""
    return len(os.sched_getaffinity(0))


def random_joints(model: mujoco.MjModel, count: int, rng: np.random.Generator) -> np.ndarray:
    """Positions with random joints, as dm_control's ``randomize_limited_and_rotational_joints`` draws them.

    Limited hinges and slides are uniform in their range, other hinges in [-pi, pi], a free joint keeps its position and
    takes the quaternion of four uniform numbers in [0, 1] (dm_control's choice, not the uniform rotation). Ball joints
    are in no task of the suite.

    Returns:
        ``qpos``, (count, nq).
    """
    qpos = np.tile(model.qpos0, (count, 1))
    for joint in range(model.njnt):
        address, kind = model.jnt_qposadr[joint], model.jnt_type[joint]
        if kind == mujoco.mjtJoint.mjJNT_FREE:
            qpos[:, address + 3 : address + 7] = _normalised(rng.uniform(size=(count, 4)))
        elif model.jnt_limited[joint]:
            qpos[:, address] = rng.uniform(*model.jnt_range[joint], count)
        elif kind == mujoco.mjtJoint.mjJNT_HINGE:
            qpos[:, address] = rng.uniform(-np.pi, np.pi, count)
    return qpos


def random_rotations(count: int, rng: np.random.Generator) -> np.ndarray:
    """Uniform rotations: unit quaternions, (count, 4)."""
    return _normalised(rng.standard_normal((count, 4)))


def _normalised(quaternions: np.ndarray) -> np.ndarray:
    return quaternions / np.linalg.norm(quaternions, axis=1, keepdims=True)


def contact_counts(model: mujoco.MjModel, qpos: np.ndarray) -> np.ndarray:
    """Number of contacts of each position, (n,). One position after the other: for initial states only."""
    data = mujoco.MjData(model)
    counts = np.empty(len(qpos), dtype=int)
    for row, position in enumerate(qpos):
        data.qpos[:] = position
        mujoco.mj_fwdPosition(model, data)
        counts[row] = data.ncon
    return counts


def without_contacts(model: mujoco.MjModel, count: int, draw: Callable[[int], np.ndarray]) -> np.ndarray:
    """Positions without contacts, each drawn until it has none.

    Args:
        model: The model.
        count: Number of positions.
        draw: Returns as many positions as it is asked for, (n, nq).

    Returns:
        ``qpos``, (count, nq).

    Raises:
        RuntimeError: If a position still has contacts after ``MAX_DRAWS`` draws.
    """
    qpos = draw(count)
    rows = np.arange(count)
    for _ in range(MAX_DRAWS):
        rows = rows[contact_counts(model, qpos[rows]) > 0]
        if not len(rows):
            return qpos
        qpos[rows] = draw(len(rows))
    raise RuntimeError(f"no state without contacts in {MAX_DRAWS} draws")


def settle(model: mujoco.MjModel, start: Initial, steps: int) -> Initial:
    """States after ``steps`` physics steps without control, on all CPUs.

    As dm_control does it, which sets positions without a forward pass: the first step still has the accelerations of
    the default pose.
    """
    states = full_states(model, start)
    one = mujoco.MjData(model)
    for row, position in enumerate(start.qpos):
        mujoco.mj_resetData(model, one)
        mujoco.mj_forward(model, one)
        one.qpos[:] = position
        mujoco.mj_step2(model, one)
        mujoco.mj_getState(model, one, states[row], mujoco.mjtState.mjSTATE_FULLPHYSICS)
    data = [mujoco.MjData(model) for _ in range(available_cpus())]
    with mujoco.rollout.Rollout(nthread=len(data)) as pool:
        for part in np.array_split(states, math.ceil(len(states) / 1024)):  # trajectories of all would need much memory
            part[:] = pool.rollout(model, data, part, nstep=steps - 1)[0][:, -1]
    _, qpos, qvel, act = split_states(model, states)
    return Initial(qpos, qvel, act, start.target)


def initial_sensors(model: mujoco.MjModel, start: Initial) -> np.ndarray:
    """Sensor readings of initial states, (n, nsensordata), from a forward pass without actuation as in dm_control."""
    passive = with_disabled(model, mujoco.mjtDisableBit.mjDSBL_ACTUATION)
    with mujoco.rollout.Rollout() as pool:
        _, sensors = pool.rollout(passive, mujoco.MjData(passive), full_states(model, start), nstep=1)
    return sensors[:, 0]


def with_disabled(model: mujoco.MjModel, *flags: mujoco.mjtDisableBit) -> mujoco.MjModel:
    """A copy of a model with parts of the physics switched off."""
    copy = model.__copy__()
    for flag in flags:
        copy.opt.disableflags |= flag
    return copy


def full_states(model: mujoco.MjModel, start: Initial) -> np.ndarray:
    """MuJoCo's full states at time 0, (n, 1 + nq + nv + na)."""
    return np.concatenate([np.zeros((len(start.qpos), 1)), start.qpos, start.qvel, start.act], axis=1)


def split_states(model: mujoco.MjModel, states: np.ndarray) -> list[np.ndarray]:
    """Time, qpos, qvel and act of full states (..., 1 + nq + nv + na), as views."""
    return np.split(states, np.cumsum([1, model.nq, model.nv]), axis=-1)
