"""Isaac Lab's environments behind rsl_rl's interface, with what survives the end of a process."""

from __future__ import annotations

from typing import Any

import torch
from isaaclab_rl.rsl_rl import RslRlVecEnvWrapper


class IsaacVecEnv(RslRlVecEnvWrapper):
    """A wrapper whose curricula go on when a run is resumed.

    The episodes themselves do not: Isaac Lab tells poses and velocities, but not what solvers, managers and commands
    remember, and an episode restored by half would hand out wrong rewards.
    """

    def state_dict(self) -> dict[str, Any]:
        """Counters and levels that curricula depend on."""
        terrain = self._terrain()
        state: dict[str, Any] = {"common_step_counter": int(self.unwrapped.common_step_counter)}
        if terrain is not None:
            state["terrain_levels"] = terrain.terrain_levels.clone()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> bool:
        """Go on from :meth:`state_dict` with new episodes. Returns False: they do not go on exactly."""
        self.unwrapped.common_step_counter = state["common_step_counter"]
        terrain, levels = self._terrain(), state.get("terrain_levels")
        if terrain is not None and levels is not None and levels.shape == terrain.terrain_levels.shape:
            terrain.terrain_levels[:] = levels.to(terrain.terrain_levels.device)
            terrain.env_origins[:] = terrain.terrain_origins[terrain.terrain_levels, terrain.terrain_types]
        with torch.inference_mode():
            self.reset()
        return False

    def _terrain(self) -> Any:
        """The terrain importer of a terrain with levels, if there is one."""
        terrain = getattr(getattr(self.unwrapped, "scene", None), "terrain", None)
        return terrain if getattr(terrain, "terrain_origins", None) is not None else None
