"""Which task each environment belongs to, and what differs between tasks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from rsl_rl.env import VecEnv

from m3po.envs.interface import as_m3po_env


@dataclass
class Tasks:
    """The K tasks of N environments."""

    ids: torch.Tensor
    """Task of each environment, (N,), int64."""

    discounts: torch.Tensor
    """Discount per step of each task, (K,)."""

    action_mask: torch.Tensor
    """Action dimensions that each task has, (K, A), boolean."""

    obs_dims: list[int] | None = None
    """Observation dimensions of each task, K numbers, where policy and critic are told the task."""

    conditioned: bool = False
    """Whether policy and critic are told the task, which the observations name then; always so for several tasks."""

    @property
    def count(self) -> int:
        """Number of tasks K."""
        return len(self.discounts)

    @classmethod
    def single(cls, num_envs: int, num_actions: int, gamma: float, device: str) -> Tasks:
        """One task in all environments."""
        mask = torch.ones(1, num_actions, dtype=torch.bool, device=device)
        return cls(torch.zeros(num_envs, dtype=torch.long, device=device), torch.tensor([gamma], device=device), mask)

    @classmethod
    def of(cls, env: VecEnv, gamma: float, device: str) -> Tasks:
        """The tasks of an environment: those of a :class:`~m3po.envs.multi_task.MultiTaskVecEnv`, or a single one.

        Args:
            env: Environment. Its policy is conditioned on the task wherever it has task ids, even of one task.
            gamma: Discount of a single task; several tasks bring their own.
            device: Torch device.
        """
        env = as_m3po_env(env)
        if env.task_ids is None:
            return cls.single(env.num_envs, env.num_actions, gamma, device)
        discounts = env.discounts.to(device) if env.num_tasks > 1 else torch.tensor([gamma], device=device)
        masks = env.action_masks.to(device)
        return cls(env.task_ids.to(device), discounts, masks, list(env.obs_dims), conditioned=True)
