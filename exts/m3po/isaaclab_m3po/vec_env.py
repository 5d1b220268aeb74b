"""Isaac Lab's environments behind rsl_rl's interface, with what resuming and the NaN guard ask for besides."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from isaaclab_rl.rsl_rl import RslRlVecEnvWrapper
from tensordict import TensorDict

from m3po.envs.final_observations import memory_of
from m3po.envs.interface import M3POEnv


class IsaacVecEnv(RslRlVecEnvWrapper, M3POEnv):
    """A wrapper whose curricula go on when a run is resumed, and whose environments can be reset one by one.

    The episodes themselves do not: Isaac Lab tells poses and velocities, but not what solvers, managers and commands
    remember, and an episode restored by half would hand out wrong rewards.
    """

    def curriculum_state(self) -> dict[str, Any]:
        """How hard the task is by now: the step counter, terrain levels, and the ranges of commands."""
        env, terrain = self.unwrapped, self._terrain()
        state: dict[str, Any] = {"common_step_counter": int(env.common_step_counter)}
        if terrain is not None:
            state["terrain_levels"] = terrain.terrain_levels.clone()
        ranges = {name: _numbers(ranges) for name, ranges in self._command_ranges().items()}
        return state | ({"command_ranges": ranges} if ranges else {})

    def load_curriculum_state(self, state: Mapping[str, Any]) -> None:
        """Make the task as hard as :meth:`curriculum_state` of as many environments or of others says.

        Other numbers of environments get the same distribution of terrain levels. It applies from the next reset on.
        """
        self.unwrapped.common_step_counter = state["common_step_counter"]
        terrain, levels = self._terrain(), state.get("terrain_levels")
        if terrain is not None and levels is not None:
            count = len(terrain.terrain_levels)
            if len(levels) != count:
                levels = levels.sort().values[torch.arange(count, device=levels.device) * len(levels) // count]
            terrain.terrain_levels[:] = levels.to(terrain.terrain_levels.device)
            terrain.env_origins[:] = terrain.terrain_origins[terrain.terrain_levels, terrain.terrain_types]
        for name, ranges in self._command_ranges().items():
            for field, value in state.get("command_ranges", {}).get(name, {}).items():
                setattr(ranges, field, tuple(value))

    def state_dict(self) -> dict[str, Any]:
        """What goes on in a resumed run: :meth:`curriculum_state`."""
        return self.curriculum_state()

    def load_state_dict(self, state: dict[str, Any]) -> bool:
        """Go on from :meth:`state_dict` with new episodes. Returns False: they do not go on exactly."""
        self.load_curriculum_state(state)
        with torch.inference_mode():
            self.reset()
        return False

    def reset_envs(self, ids: torch.Tensor) -> TensorDict | None:
        """Start new episodes in some environments, (n,), int64; returns the observations of all.

        Observations with a memory show zeros until the next step.
        """
        env = self.unwrapped
        if hasattr(env, "env"):  # a multi-agent environment seen as one of a single agent
            return None
        log = env.extras.get("log")
        env._reset_idx(ids.to(env.device, torch.int32))
        env.extras["log"] = log or {}  # the episodes that end here are not to be counted, and hold what is not finite
        return self._observe(ids)

    def get_state(self) -> dict[str, torch.Tensor]:
        """Poses, velocities and joints of everything in the scene, (N, ...) each, positions relative to the origins."""
        state = self.unwrapped.scene.get_state(is_relative=True)
        return {
            f"{kind}/{name}/{part}": value
            for kind, assets in state.items()
            for name, parts in assets.items()
            for part, value in parts.items()
        }

    def set_state(self, state: Mapping[str, torch.Tensor]) -> TensorDict:
        """Put all environments into the states of :meth:`get_state`, for a replay; returns the observations."""
        env = self.unwrapped
        ids = torch.arange(self.num_envs, device=env.device)
        nested = env.scene.get_state(is_relative=True)
        for name, value in state.items():
            kind, asset, part = name.split("/")
            nested[kind][asset][part] = value.to(env.device)
        env.scene.reset_to(nested, ids.int(), is_relative=True)
        return self._observe(ids)

    def _observe(self, ids: torch.Tensor) -> TensorDict:
        """Bring the kinematics up to date, and take new observations of some environments into those of all.

        Where asking would enter what the observations remember, zeros stand in until the next step.
        """
        env = self.unwrapped
        env.scene.write_data_to_sim()
        env.sim.forward()
        manager = getattr(env, "observation_manager", None)
        if memory_of(self) is not None:
            fresh = {group: torch.zeros_like(value) for group, value in env.obs_buf.items()}
        else:
            fresh = env._compute_observations() if manager is None else manager.compute()
        rows = torch.zeros(self.num_envs, dtype=torch.bool, device=env.device).index_fill(0, ids.long(), True)
        env.obs_buf = {
            group: torch.where(rows.view(-1, *[1] * (value.dim() - 1)), value, env.obs_buf[group])
            for group, value in fresh.items()
        }
        return self.get_observations()

    def _command_ranges(self) -> dict[str, Any]:
        """The ranges that commands are drawn from, by name of the command."""
        manager = getattr(self.unwrapped, "command_manager", None)
        terms = {} if manager is None else {name: manager.get_term(name) for name in manager.active_terms}
        ranges = {name: getattr(term.cfg, "ranges", None) for name, term in terms.items()}
        return {name: value for name, value in ranges.items() if value is not None}

    def _terrain(self) -> Any:
        """The terrain importer of a terrain with levels, if there is one."""
        terrain = getattr(getattr(self.unwrapped, "scene", None), "terrain", None)
        return terrain if getattr(terrain, "terrain_origins", None) is not None else None


def _numbers(ranges: Any) -> dict[str, list[float]]:
    """The fields of a command's ranges that are pairs of numbers."""
    pairs = {name: value for name, value in vars(ranges).items() if isinstance(value, (tuple, list))}
    numbers = {name: pair for name, pair in pairs.items() if all(isinstance(x, (int, float)) for x in pair)}
    return {name: [float(x) for x in pair] for name, pair in numbers.items()}
