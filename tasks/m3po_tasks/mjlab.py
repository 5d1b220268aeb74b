"""mjlab's tasks as a suite. mjlab and Isaac Lab need different MuJoCos, so that each has an environment of its own."""

from __future__ import annotations

import functools
import importlib.util
import math
from types import ModuleType
from typing import TYPE_CHECKING, Any, Self

import torch
from rsl_rl.env import VecEnv
from tensordict import TensorDict

from m3po.envs.interface import M3POEnv, Result
from m3po.envs.suite import TaskInfo
from m3po.errors import UserError
from m3po.presets import FIRST_STD

if TYPE_CHECKING:
    import numpy as np
    from mjlab.envs import ManagerBasedRlEnv

VERSION = "1.6.0"
"""The version that is tested."""

_PREFIX = "Mjlab-"


class MjlabSuite:
    """Every registered task; see :class:`m3po.envs.suite.Suite`."""

    name = "mjlab"
    own_process = False

    def tasks(self) -> list[str]:
        """Ids of all registered tasks; none where mjlab is not installed."""
        return [] if self.missing() else _registry().list_tasks()

    def sets(self) -> dict[str, tuple[str, ...]]:
        """None."""
        return {}

    def resolve(self, name: str) -> str | None:
        """The task itself. Where mjlab is not installed, any name that looks like one of its own."""
        known = name.startswith(_PREFIX) if self.missing() else name in _registry().list_tasks()
        return name if known else None

    def missing(self) -> str | None:
        """The command that installs mjlab, or ``None`` where it is installed."""
        return None if importlib.util.find_spec("mjlab") else f"pip install mjlab=={VERSION} (not beside Isaac Lab)"

    def info(self, task: str) -> TaskInfo:
        """Length of an episode, and first std of the actions; its sizes are known to its simulation alone."""
        cfg, agent = _registry().load_env_cfg(task), _registry().load_rl_cfg(task)
        steps = math.ceil(cfg.episode_length_s / (cfg.sim.mujoco.timestep * cfg.decimation))
        std = (agent.actor.distribution_cfg or {}).get("init_std", 1.0)
        return TaskInfo(task, None, None, steps, init_std=FIRST_STD * std, ppo_std=std)

    def make(self, task: str, num_envs: int, *, seed: int, device: str) -> VecEnv:
        """Create N environments of a task.

        Args:
            task: Registered id.
            num_envs: Environments N.
            seed: Seed of all that they draw, from torch's and numpy's generators.
            device: Torch device.

        Raises:
            UserError: If policy or critic would read images.
        """
        from mjlab.envs import ManagerBasedRlEnv

        cfg = _registry().load_env_cfg(task)
        cfg.scene.num_envs, cfg.seed = num_envs, seed
        cfg.auto_reset = False  # final observations are seen before the reset
        return MjlabVecEnv(ManagerBasedRlEnv(cfg, device), _registry().load_rl_cfg(task).obs_groups)

    def camera(self, env: MjlabVecEnv) -> Camera:
        """Film what the task's own viewer shows."""
        return Camera(env.env)


class MjlabVecEnv(M3POEnv):
    """N environments. ``extras`` holds ``time_outs`` (N,), ``final_obs``, and mjlab's ``log``."""

    def __init__(self, env: ManagerBasedRlEnv, groups: dict[str, tuple[str, ...]]) -> None:
        """Reset all of them.

        Args:
            env: mjlab's environments, which do not reset themselves.
            groups: Observation groups that policy and critic of the task's own agent read.

        Raises:
            UserError: If one of them is an image.
        """
        self.env, self.cfg, self.device = env, env.cfg, env.device
        self.num_envs, self.num_actions = env.num_envs, env.action_manager.total_action_dim
        self.max_episode_length = env.max_episode_length
        self._groups = {"policy": groups["actor"], "critic": groups.get("critic", groups["actor"])}
        self._obs = env.reset()[0]
        images = {name for read in self._groups.values() for name in read if self._obs[name].ndim != 2}
        if images:
            raise UserError(f"M3PO reads no images yet, and this task's agent does: {', '.join(sorted(images))}.")

    @property
    def episode_length_buf(self) -> torch.Tensor:
        """Steps of the present episodes, (N,), int64."""
        return self.env.episode_length_buf

    @episode_length_buf.setter
    def episode_length_buf(self, value: torch.Tensor) -> None:
        self.env.episode_length_buf = value

    @property
    def unwrapped(self) -> ManagerBasedRlEnv:
        """Mjlab's own environments."""
        return self.env

    def get_observations(self) -> TensorDict:
        """Groups ``policy`` (N, O) and ``critic`` (N, C)."""
        read = {group: torch.cat([self._obs[name] for name in names], 1) for group, names in self._groups.items()}
        return TensorDict(read, batch_size=[self.num_envs], device=self.device)

    def reset(self) -> tuple[TensorDict, dict[str, Any]]:
        """Begin new episodes everywhere."""
        self._obs, extras = self.env.reset()
        return self.get_observations(), extras

    def reset_envs(self, ids: torch.Tensor) -> TensorDict:
        """Begin new episodes in some environments, (n,), int64; returns the observations of all."""
        self._begin(ids)
        return self.get_observations()

    def seed(self, seed: int) -> None:
        """Draw from a seed from now on."""
        self.env.seed(seed)

    def step(self, actions: torch.Tensor) -> Result:
        """Advance by one decision; what is done begins anew."""
        self._obs, rewards, terminated, time_outs, extras = self.env.step(actions)
        dones, log = terminated | time_outs, dict(extras["log"])
        result = {"final_obs": self.get_observations()}
        if not self.cfg.is_finite_horizon:
            result["time_outs"] = time_outs.clone()
        rewards = rewards.clone()
        ids = dones.nonzero().squeeze(1)
        if len(ids):
            log |= self._begin(ids)
        return self.get_observations(), rewards, dones, result | {"log": log}

    def _begin(self, ids: torch.Tensor) -> dict[str, Any]:
        """Begin new episodes in some environments; returns the log. The others keep their observations' noise."""
        seen = self._obs
        new, extras = self.env.reset(env_ids=ids)
        self._obs = {name: value.index_copy(0, ids, new[name][ids]) for name, value in seen.items()}
        return extras["log"]

    def curriculum_state(self) -> int:
        """Steps so far, by which mjlab's curricula go."""
        return self.env.common_step_counter

    def load_curriculum_state(self, state: int) -> None:
        """Make the task as hard as :meth:`curriculum_state` says."""
        self.env.common_step_counter = state

    def close(self) -> None:
        """Close mjlab's environments."""
        self.env.close()


class Camera:
    """mjlab's own renderer; see :class:`m3po.cli.film.Camera`."""

    def __init__(self, env: ManagerBasedRlEnv) -> None:
        self._env, self._viewer = env, env.cfg.viewer
        self.size = (self._viewer.width, self._viewer.height)
        self.frames_per_second = 1.0 / env.step_dt

    def __enter__(self) -> Self:
        from mjlab.viewer.offscreen_renderer import OffscreenRenderer

        sim = self._env.sim
        self._renderer = OffscreenRenderer(
            sim.mj_model, self._viewer, self._env.scene, sim.model, expanded_fields=sim.expanded_fields
        )
        self._renderer.initialize()
        return self

    def __exit__(self, *_: object) -> None:
        self._renderer.close()

    def frame(self) -> np.ndarray:
        """The environment that the task's viewer shows, as it is now."""
        self._renderer.update(self._env.sim.data)
        return self._renderer.render()


@functools.cache
def _registry() -> ModuleType:
    """Mjlab's registry, with its tasks in it."""
    import mjlab.tasks  # noqa: F401
    from mjlab.tasks import registry

    return registry


SUITE = MjlabSuite()
"""The suite, as the entry point names it."""
