"""An environment of which only the observation groups that some network reads are seen.

Cameras, ground truth and logs that tasks offer beside them would be stored for each step, judged by the NaN guard and
saved in checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from rsl_rl.env import VecEnv
from tensordict import TensorDict

from m3po.envs.interface import M3POEnv, Result, WrappedEnv, as_m3po_env


def only_read_groups(env: M3POEnv, obs_groups: Mapping[str, list[str]]) -> M3POEnv:
    """The environment with the groups of ``obs_groups`` alone; itself where it has no others.

    Args:
        env: Environment.
        obs_groups: Observation groups of each observation set, as in a runner configuration. As in rsl_rl, an actor
            or critic without a set reads the group of its name, or else ``policy``.
    """
    offered = set(env.get_observations().keys())
    read = {group for groups in obs_groups.values() for group in groups}
    read |= {name if name in offered else "policy" for name in ("actor", "critic") if name not in obs_groups}
    if as_m3po_env(env).task_ids is not None:
        read.add("task")
    return env if offered <= read else ReadGroups(env, sorted(read & offered))


class ReadGroups(WrappedEnv):
    """Everything but observations is the environment's own, to be read and to be set."""

    def __init__(self, env: VecEnv, groups: list[str]) -> None:
        """Wrap an environment.

        Args:
            env: Environment.
            groups: Observation groups that are seen.
        """
        super().__init__(as_m3po_env(env), _groups=groups)

    def reset_envs(self, ids: torch.Tensor) -> TensorDict | None:
        """Begin new episodes in some environments; see :class:`M3POEnv`."""
        obs = self._env.reset_envs(ids)
        return None if obs is None else obs.select(*self._groups)

    def set_state(self, state: dict[str, torch.Tensor]) -> TensorDict | None:
        """Put all environments into a state; see :class:`M3POEnv`."""
        obs = self._env.set_state(state)
        return None if obs is None else obs.select(*self._groups)

    def get_observations(self) -> TensorDict:
        """Current observations, batch size (N,)."""
        return self._env.get_observations().select(*self._groups)

    def step(self, actions: torch.Tensor) -> Result:
        """As rsl_rl's ``VecEnv``; final observations have the same groups."""
        obs, rewards, dones, extras = self._env.step(actions)
        if extras.get("final_obs") is not None:
            final = {group: x for group, x in extras["final_obs"].items() if group in self._groups}
            extras = dict(extras, final_obs=final)
        return obs.select(*self._groups), rewards, dones, extras
