"""A fast, deterministic environment in plain torch: a point to be pushed to the origin, with every kind of end."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from rsl_rl.env import VecEnv
from tensordict import TensorDict


class PointEnv(VecEnv):
    """Position and velocity in D dimensions; reward ``-|x|^2 - 0.1 |a|^2``; terminates beyond ``edge``."""

    def __init__(self, num_envs: int = 16, dim: int = 2, episode: int = 20, edge: float = 3.0, seed: int = 0) -> None:
        """Create the environments and reset them."""
        self.num_envs, self.num_actions, self.dim = num_envs, dim, dim
        self.max_episode_length, self.edge, self.device = episode, edge, "cpu"
        self.cfg = SimpleNamespace(compute_final_obs=False, is_finite_horizon=False)
        self.generator = torch.Generator().manual_seed(seed)
        self.state = torch.zeros(num_envs, 2 * dim)
        self.episode_length_buf = torch.zeros(num_envs, dtype=torch.long)
        # Stale on purpose outside of resets, as in Isaac Lab.
        self.final_obs = {"policy": torch.full((num_envs, 2 * dim), 1e3)}
        self._reset(torch.ones(num_envs, dtype=torch.bool))

    def state_dict(self) -> dict[str, Any]:
        """All that the future depends on."""
        own = {"state": self.state, "length": self.episode_length_buf, "final": self.final_obs["policy"]}
        return {**own, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> bool:
        """Go on exactly."""
        self.state, self.episode_length_buf = state["state"], state["length"]
        self.final_obs = {"policy": state["final"]}
        self.generator.set_state(state["generator"])
        return True

    def _reset(self, rows: torch.Tensor) -> None:
        fresh = torch.cat(
            [
                2 * torch.rand(self.num_envs, self.dim, generator=self.generator) - 1,
                torch.zeros(self.num_envs, self.dim),
            ],
            dim=1,
        )
        self.state = torch.where(rows[:, None], fresh, self.state)
        self.episode_length_buf = torch.where(rows, 0, self.episode_length_buf)

    def reset(self) -> tuple[TensorDict, dict]:
        """Reset all environments."""
        self._reset(torch.ones(self.num_envs, dtype=torch.bool))
        return self.get_observations(), {}

    def get_observations(self) -> TensorDict:
        """Observation group ``policy``, (N, 2 D)."""
        return TensorDict({"policy": self.state.clone()}, batch_size=[self.num_envs])

    def step(self, actions: torch.Tensor) -> tuple[TensorDict, torch.Tensor, torch.Tensor, dict]:
        """Advance by 0.1 s."""
        x, v = self.state.split(self.dim, dim=1)
        a = actions.clamp(-2, 2)
        v = v + 0.1 * a
        x = x + 0.1 * v
        self.state = torch.cat([x, v], dim=1)
        self.episode_length_buf = self.episode_length_buf + 1
        reward = -x.square().sum(1) - 0.1 * a.square().sum(1)
        terminated = x.abs().amax(1) > self.edge
        time_outs = (self.episode_length_buf >= self.max_episode_length) & ~terminated
        dones = terminated | time_outs
        extras = {"time_outs": time_outs}
        if self.cfg.compute_final_obs:
            if dones.any():
                self.final_obs = {"policy": self.state.clone()}
            extras["final_obs"] = self.final_obs
        self._reset(dones)
        return self.get_observations(), reward, dones.long(), extras


def runner_cfg(**algorithm: object) -> dict:
    """A runner configuration of M3PO for :class:`PointEnv`, small enough for a test."""
    network = {"class_name": "MLPModel", "hidden_dims": [32, 32], "activation": "elu"}
    noise = {"class_name": "GaussianDistribution", "init_std": 1.0}
    values = {
        "class_name": "m3po.algorithms:M3PO",
        "policy_average_decay": 0.0,
        "world_model": {
            "features": 16,
            "width": 32,
            "task_embedding_dim": 4,
            "steps_per_iteration": 4,
            "extra_steps": 0,
            "batch_size": 64,
            "replay_transitions": 2000,
        },
        "planner": {"num_samples": 8, "num_states": 256},
        "critic_replay": {"steps_per_iteration": 4, "batch_size": 64},
    }
    for name, value in algorithm.items():
        values[name] = {**values.get(name, {}), **value} if isinstance(value, dict) else value
    return {
        "seed": 1,
        "num_steps_per_env": 8,
        "max_iterations": 4,
        "save_interval": 2,
        "obs_groups": {"actor": ["policy"], "critic": ["policy"]},
        "actor": {**network, "distribution_cfg": noise},
        "critic": network,
        "algorithm": values,
    }
