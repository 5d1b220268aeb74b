"""Physics on the GPU: ``mujoco_warp``, its arrays shared with torch, its sub-steps replayed as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import mujoco
import mujoco_warp
import torch
import warp

from m3po.errors import UserError
from m3po_tasks.dmcontrol.task import Physics

_RK4 = mujoco.mjtIntegrator.mjINT_RK4
_PLANE = mujoco.mjtGeom.mjGEOM_PLANE


class WarpBackend:
    """Steps N worlds one control step at a time and hands out the state after each.

    A control step is dm_control's: the second half of a physics step, whole ones, and the first half of the next,
    which leaves positions, velocities and their sensors up to date. On a CPU kernels are launched one by one: slow, for
    tests.
    """

    dtype = torch.float32

    def __init__(self, model: mujoco.MjModel, num_envs: int, sub_steps: int, control_steps: int, device: str) -> None:
        """Compile the kernels and record the graphs.

        Raises:
            UserError: If the model needs the noslip solver, which mujoco_warp does not have.
        """
        if model.opt.noslip_iterations > 0:
            raise UserError(
                "this DMControl task needs MuJoCo's noslip solver, which mujoco_warp lacks: backend rollout."
            )
        self.device = device
        self._sub_steps, self._control_steps = sub_steps, control_steps
        self._rk4 = model.opt.integrator == _RK4
        with warp.ScopedDevice(device):
            self._model = mujoco_warp.put_model(model)
            contacts, rows = _capacity(model)
            self._data = mujoco_warp.make_data(model, num_envs, nconmax=contacts, njmax=rows)
            self._accelerations = warp.zeros_like(self._data.sensordata)
        acceleration = torch.as_tensor(model.sensor_needstage == mujoco.mjtStage.mjSTAGE_ACC)
        self._is_acceleration = acceleration.repeat_interleave(torch.as_tensor(model.sensor_dim)).to(device)
        parts = (self._data.qpos, self._data.qvel, self._data.act, self._data.sensordata, self._accelerations)
        self._qpos, self._qvel, self._act, self._sensordata, self._acceleration_data = map(warp.to_torch, parts)
        self._ctrl = warp.to_torch(self._data.ctrl)
        self._warmstart = warp.to_torch(self._data.qacc_warmstart)
        self._advance = self._recorded(self._control_step)
        self._refresh = self._recorded(self._first_half)

    def load(self, rows: torch.Tensor, qpos: torch.Tensor, qvel: torch.Tensor, act: torch.Tensor) -> None:
        """Put the worlds ``rows``, (n,), into given states, (n, nq), (n, nv) and (n, na)."""
        self._qpos[rows], self._qvel[rows], self._act[rows] = qpos, qvel, act
        self._warmstart[rows] = 0.0
        self._refresh()

    def state_dict(self) -> None:
        """Nothing: the solver's warm start is part of the state, and mujoco_warp does not tell all of it."""

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Never called, as there is no state to restore."""
        raise RuntimeError("Worlds on a GPU do not tell their state.")

    def step(self, ctrl: torch.Tensor) -> Iterator[Physics]:
        """Advance all worlds under controls (N, nu); yields the physics after each control step."""
        self._ctrl.copy_(ctrl)
        for _ in range(self._control_steps):
            self._advance()
            sensordata = torch.where(self._is_acceleration, self._acceleration_data, self._sensordata)
            yield Physics(self._qpos, self._qvel, self._act, sensordata)

    def _control_step(self) -> None:
        model, data = self._model, self._data
        if self._rk4:  # has no second half: all stages evaluate the whole dynamics
            mujoco_warp.step(model, data)
        else:
            mujoco_warp.step2(model, data)
        for _ in range(self._sub_steps - 1):
            mujoco_warp.step(model, data)
        warp.copy(self._accelerations, data.sensordata)
        self._first_half()

    def _first_half(self) -> None:
        mujoco_warp.step1(self._model, self._data)

    def _recorded(self, launch: Callable[[], None]) -> Callable[[], None]:
        """What does the same as ``launch`` on the device: on CUDA, the replay of a graph."""
        device = warp.get_device(self.device)

        def run() -> None:
            with warp.ScopedDevice(device):
                launch()

        def replay() -> None:
            with warp.ScopedStream(warp.stream_from_torch(torch.cuda.current_stream(self.device))):
                warp.capture_launch(capture.graph)

        if not device.is_cuda:
            return run
        run()  # loads the kernels, which must not happen while recording
        with warp.ScopedDevice(device), warp.ScopedCapture() as capture:
            launch()
        return replay

    def close(self) -> None:
        """Do nothing: device memory is freed with the object."""


def _capacity(model: mujoco.MjModel) -> tuple[int, int]:
    """Contacts and constraint rows of a world, enough for a robot that lies on the floor on all its geoms.

    mujoco_warp's own guess (48 and 64) is too small for that, and what exceeds it is dropped.
    """
    collides = (model.geom_contype != 0) | (model.geom_conaffinity != 0)
    bodies = int((collides & (model.geom_type != _PLANE)).sum())
    contacts = 4 * bodies + 16
    limits = int(model.jnt_limited.sum() + model.tendon_limited.sum())
    rows_per_contact = 2 * (int(model.geom_condim[collides].max(initial=3)) - 1)
    return contacts, limits + model.neq * 6 + int((model.dof_frictionloss > 0).sum()) + contacts * rows_per_contact
