"""Physics on the CPU: MuJoCo's own C code on a pool of threads (``mujoco.rollout``)."""

from __future__ import annotations

from collections.abc import Iterator

import mujoco
import mujoco.rollout
import numpy as np
import torch

from m3po_tasks.dmcontrol.sampling import split_states, with_disabled
from m3po_tasks.dmcontrol.task import Physics


class RolloutBackend:
    """Steps N worlds by all control steps of a decision at once and hands out the state after each.

    MuJoCo reads sensors before it integrates, so the readings of sub-step k are of the state before it. What dm_control
    sees after a control step, sensors of positions and velocities of the new state and sensors of forces and
    accelerations of the last sub-step, is hence found in the first sub-step of the next control step and in the last of
    this one; behind the last control step, one more sub-step without dynamics supplies it.

    The constraint solver starts each decision cold: it converges all the same.
    """

    dtype = torch.float64

    def __init__(
        self, model: mujoco.MjModel, num_envs: int, sub_steps: int, control_steps: int, num_threads: int, device: str
    ) -> None:
        """Start the threads.

        Args:
            model: The model of all worlds.
            num_envs: Number of worlds N.
            sub_steps: Physics steps per control step.
            control_steps: Control steps per decision.
            num_threads: Threads that share the worlds.
            device: Device of all tensors that come and go; without copies on the CPU.
        """
        self.device = device
        self._model, self._sub_steps = model, sub_steps
        self._models, self._kinematics = [model] * num_envs, [_kinematics(model)] * num_envs
        self._pool = mujoco.rollout.Rollout(nthread=num_threads)
        self._data = [mujoco.MjData(model) for _ in range(num_threads)]
        steps, nstate = sub_steps * control_steps, mujoco.mj_stateSize(model, mujoco.mjtState.mjSTATE_FULLPHYSICS)
        self.state = np.zeros((num_envs, nstate))
        """MuJoCo's full states of all worlds, float64 (N, 1 + nq + nv + na)."""
        self._control = np.zeros((num_envs, steps, model.nu))
        self._states = np.zeros((num_envs, steps, nstate))
        self._sensors = np.zeros((num_envs, steps, model.nsensordata))
        self._last_state = np.zeros((num_envs, 1, nstate))
        self._last_sensors = np.zeros((num_envs, 1, model.nsensordata))
        self._accelerations = np.repeat(model.sensor_needstage == mujoco.mjtStage.mjSTAGE_ACC, model.sensor_dim)

    def load(self, rows: torch.Tensor, qpos: torch.Tensor, qvel: torch.Tensor, act: torch.Tensor) -> None:
        """Put the worlds ``rows``, (n,), into given states, (n, nq), (n, nv) and (n, na)."""
        time = qpos.new_zeros(len(rows), 1)
        self.state[rows.cpu().numpy()] = torch.cat([time, qpos, qvel, act], dim=1).cpu().numpy()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """MuJoCo's full states; the solver starts each decision cold, so nothing else matters."""
        return {"state": torch.from_numpy(self.state)}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Put all worlds back into the states of :meth:`state_dict`."""
        self.state[:] = state["state"].cpu().numpy()

    def step(self, ctrl: torch.Tensor) -> Iterator[Physics]:
        """Advance all worlds by one decision under controls (N, nu); yields the physics after each control step."""
        self._control[:] = ctrl.cpu().numpy()[:, None]
        self._run(self._models, self.state, self._control, self._states, self._sensors)
        self.state[:] = self._states[:, -1]
        for end in range(self._sub_steps, self._states.shape[1], self._sub_steps):
            yield self._physics(end - 1, self._sensors[:, end])
        if not self._accelerations.all():
            self._run(self._kinematics, self.state, None, self._last_state, self._last_sensors)
        yield self._physics(-1, self._last_sensors[:, 0])

    def _run(
        self,
        models: list[mujoco.MjModel],
        start: np.ndarray,
        control: np.ndarray | None,
        states: np.ndarray,
        sensors: np.ndarray,
    ) -> None:
        # The checks would copy all arrays.
        self._pool.rollout(
            models,
            self._data,
            start,
            control,
            nstep=states.shape[1],
            state=states,
            sensordata=sensors,
            skip_checks=True,
        )

    def _physics(self, step: int, sensors: np.ndarray) -> Physics:
        """The physics after a sub-step, given the sensor readings of the next one."""
        if self._accelerations.any():
            sensors = np.where(self._accelerations, self._sensors[:, step], sensors)
        _, qpos, qvel, act = split_states(self._model, self._states[:, step])
        return Physics(*(torch.from_numpy(part).to(self.device) for part in (qpos, qvel, act, sensors)))

    def close(self) -> None:
        """End the threads."""
        self._pool.close()


def _kinematics(model: mujoco.MjModel) -> mujoco.MjModel:
    """The model without dynamics: a step of it computes positions, velocities and their sensors at little cost."""
    flags = mujoco.mjtDisableBit
    copy = with_disabled(
        model,
        flags.mjDSBL_CONSTRAINT,
        flags.mjDSBL_CONTACT,
        flags.mjDSBL_ACTUATION,
        flags.mjDSBL_SPRING,
        flags.mjDSBL_DAMPER,
        flags.mjDSBL_GRAVITY,
    )
    copy.opt.integrator = mujoco.mjtIntegrator.mjINT_EULER
    return copy
