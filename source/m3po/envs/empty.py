"""No environment of a task, in a process that leaves the task to others."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict

from m3po.envs.interface import M3POEnv


class EmptyVecEnv(M3POEnv):
    """Zero environments with the sizes of a task."""

    num_envs = 0

    def __init__(self, obs_dim: int, num_actions: int, episode_length: int, device: str) -> None:
        """Remember the sizes.

        Args:
            obs_dim: Observation dimensions O.
            num_actions: Action dimensions A.
            episode_length: Longest episode, decision steps.
            device: Torch device of what is returned.
        """
        self.num_actions, self.max_episode_length, self.device, self.cfg = num_actions, episode_length, device, None
        self.episode_length_buf = torch.zeros(0, dtype=torch.long, device=device)
        self._obs = TensorDict({"policy": torch.zeros(0, obs_dim, device=device)}, batch_size=[0])

    def get_observations(self) -> TensorDict:
        """Group ``policy``, (0, O)."""
        return self._obs

    def reset(self) -> tuple[TensorDict, dict[str, Any]]:
        """Nothing to reset."""
        return self._obs, {}

    def step(self, actions: torch.Tensor) -> tuple[TensorDict, torch.Tensor, torch.Tensor, dict[str, Any]]:
        """Nothing to step."""
        return self._obs, torch.zeros(0, device=self.device), torch.zeros(0, device=self.device).bool(), {}
