"""A batch of environments of one DMControl task: torch tensors in and out, physics in one of two backends."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from tensordict import TensorDict

from m3po.envs.interface import M3POEnv
from m3po_tasks.dmcontrol.initial_states import InitialStates
from m3po_tasks.dmcontrol.task import Physics, State, Task


class Backend(Protocol):
    """What moves N worlds."""

    dtype: torch.dtype
    """Floating-point type of all its tensors."""

    device: str
    """Device of all its tensors."""

    def load(self, rows: torch.Tensor, qpos: torch.Tensor, qvel: torch.Tensor, act: torch.Tensor) -> None:
        """Put the worlds ``rows``, (n,), into given states, (n, nq), (n, nv) and (n, na)."""

    def step(self, ctrl: torch.Tensor) -> Iterator[Physics]:
        """Advance all worlds by one decision under controls (N, nu); yields the physics after each control step."""

    def state_dict(self) -> dict[str, torch.Tensor] | None:
        """All that the worlds' future depends on, for :meth:`load_state_dict`; ``None`` if it cannot be told."""

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Put all worlds back into the states of :meth:`state_dict`."""

    def close(self) -> None:
        """End what would outlive the object, such as threads."""


class MjcfVecEnv(M3POEnv):
    """N worlds of one task. Episodes are truncated and never terminate.

    The reward of a step is the sum over its control steps. ``extras`` holds ``time_outs`` (N,) and ``final_obs``, the
    observations before the resets of this step.
    """

    def __init__(self, task: Task, backend: Backend, num_envs: int, episode_length: int, seed: int) -> None:
        """Create the worlds and reset them.

        Args:
            task: The task.
            backend: The physics of ``num_envs`` worlds; decides the control steps per decision.
            num_envs: Number of worlds N.
            episode_length: Decision steps of an episode.
            seed: Seed of the initial states.
        """
        self.num_envs, self.num_actions, self.device = num_envs, task.model.nu, backend.device
        self.max_episode_length = episode_length
        self.cfg = SimpleNamespace()
        self.episode_length_buf = torch.zeros(num_envs, dtype=torch.long, device=self.device)
        self.task, self.backend = task, backend
        self._sensors = _sensor_columns(task)
        low, high = torch.as_tensor(task.model.actuator_ctrlrange, dtype=backend.dtype, device=self.device).T
        self._ctrl_center, self._ctrl_scale = (high + low) / 2, (high - low) / 2
        self.initial = InitialStates(task, num_envs, seed, self.device, backend.dtype)
        ctrl = torch.zeros(len(self.initial.target), self.num_actions, dtype=backend.dtype, device=self.device)
        self.initial_obs = self._observe(State(self.initial.physics, ctrl, self.initial.target, self._sensors))
        self.target = torch.zeros(num_envs, self.initial.target.shape[1], dtype=backend.dtype, device=self.device)
        self.reset()

    def reset(self) -> tuple[TensorDict, dict]:
        """Start a new episode in all worlds."""
        self._obs = self._restart(torch.arange(self.num_envs, device=self.device))
        return self.get_observations(), {}

    def seed(self, seed: int) -> None:
        """Pick initial states by a seed from now on."""
        self.initial.generator.manual_seed(seed)

    def reset_envs(self, ids: torch.Tensor) -> TensorDict:
        """Start new episodes in some worlds, (n,), int64; returns the observations of all."""
        self._obs = self._obs.index_copy(0, ids, self._restart(ids))
        return self.get_observations()

    def get_observations(self) -> TensorDict:
        """Observation group ``policy``, float32 (N, O): dm_control's observation, flattened."""
        return self._group(self._obs)

    def step(self, actions: torch.Tensor) -> tuple[TensorDict, torch.Tensor, torch.Tensor, dict]:
        """Advance by one decision.

        Args:
            actions: Clamped to [-1, 1] and scaled to the actuators' ranges, (N, A).

        Returns:
            Observations after resets, rewards float32 (N,), dones bool (N,), extras.
        """
        ctrl = self._ctrl_center + self._ctrl_scale * actions.to(self.backend.dtype).clamp(-1.0, 1.0)
        reward = torch.zeros(self.num_envs, dtype=self.backend.dtype, device=self.device)
        for physics in self.backend.step(ctrl):
            state = State(physics, ctrl, self.target, self._sensors)
            reward += self.task.reward(state)
        self._obs = self._observe(state)
        self.episode_length_buf = self.episode_length_buf + 1
        dones = self.episode_length_buf >= self.max_episode_length
        extras = {"time_outs": dones.clone(), "final_obs": self._group(self._obs)}
        rows = dones.nonzero().squeeze(1)
        if len(rows):  # on a GPU the host waits here, once per step
            self._obs = self._obs.index_copy(0, rows, self._restart(rows))
        return self.get_observations(), reward.float(), dones, extras

    def state_dict(self) -> dict[str, Any] | None:
        """All that the future of the environments depends on; ``None`` where the backend cannot tell it."""
        worlds = self.backend.state_dict()
        if worlds is None:
            return None
        own = {"obs": self._obs, "target": self.target, "episode_length_buf": self.episode_length_buf}
        return {**own, "worlds": worlds, "generator": self.initial.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> bool:
        """Go on from :meth:`state_dict` of as many environments. Returns True: they go on exactly."""
        self._obs, self.target = state["obs"].to(self.device), state["target"].to(self.device)
        self.episode_length_buf = state["episode_length_buf"].to(self.device)
        self.backend.load_state_dict(state["worlds"])
        self.initial.generator.set_state(state["generator"].cpu())
        return True

    def _restart(self, rows: torch.Tensor) -> torch.Tensor:
        """Start new episodes in some worlds, (n,); returns their observations."""
        picked = self.initial.draw(len(rows))
        qpos, qvel, act, _ = self.initial.physics
        self.backend.load(rows, qpos[picked], qvel[picked], act[picked])
        # Not in place: these may have been made in inference mode, and be needed outside of it.
        self.target = self.target.index_copy(0, rows, self.initial.target[picked])
        self.episode_length_buf = self.episode_length_buf.index_fill(0, rows, 0)
        return self.initial_obs[picked]

    def _observe(self, state: State) -> torch.Tensor:
        parts = self.task.observation(state)
        return torch.cat([part.reshape(len(part), -1) for part in parts], dim=1).float()

    def _group(self, obs: torch.Tensor) -> TensorDict:
        return TensorDict({"policy": obs}, batch_size=[self.num_envs], device=self.device)

    def close(self) -> None:
        """End what would outlive the object, such as threads."""
        self.backend.close()


def _sensor_columns(task: Task) -> dict[str, slice]:
    """Columns of each sensor in the sensor data, by name."""
    sensors = (task.model.sensor(index) for index in range(task.model.nsensor))
    return {sensor.name: slice(sensor.adr[0], sensor.adr[0] + sensor.dim[0]) for sensor in sensors}
