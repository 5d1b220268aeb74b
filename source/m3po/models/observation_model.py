"""One-step model of observations: what the value gradient looks ahead with.

The latent world model must first learn what to predict; this one predicts the next observation itself, so that the
policy and the critic can be asked about it at once, and its gradient is useful after a twentieth of the training
(docs/experiments.md, entry 11).
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from m3po.models.normalizers import RewardStatistics, TaskNormalizer

OUTLIER = 5.0
"""Targets are cut off at this many deviations: contacts, and angles that wrap around, must not set the weights."""

CHANGE_WEIGHT, REWARD_WEIGHT = 4.0, 0.5
"""Weights of two loss terms; that of the termination is 1."""


class ObservationModel(nn.Module):
    """Change of the observation, reward and termination of one step, as one network of two hidden layers."""

    def __init__(
        self, obs_dim: int, action_dim: int, num_tasks: int, width: int, task_dims: list[int] | None = None
    ) -> None:
        """Create the network, which predicts "no change" at first.

        Args:
            obs_dim: Observation dimensions O.
            action_dim: Action dimensions A.
            num_tasks: Tasks K; each is told by a one-hot vector.
            width: Units of each hidden layer.
            task_dims: Observation dimensions of each task, see :class:`~m3po.models.normalizers.TaskNormalizer`.
        """
        super().__init__()
        self.obs_dim, self.num_tasks = obs_dim, num_tasks
        self.obs_normalizer = TaskNormalizer(num_tasks, obs_dim, task_dims)
        self.changes = TaskNormalizer(num_tasks, obs_dim, eps=1e-4)
        """Statistics of what a step changes; their deviations are the units of the network's output."""
        self.reward_normalizer = TaskNormalizer(num_tasks, 1, eps=1e-6)
        """Statistics of the rewards of steps that go on, whose deviation is the unit of that output."""
        self.falls = RewardStatistics(num_tasks)
        """What a termination earns: large and rare, it would set the reward's unit."""
        self.register_buffer("slope", torch.zeros(num_tasks))
        """Running mean of how much real advantages rose along the gradients that the model gave, for each task."""
        inputs = obs_dim + action_dim + (num_tasks if num_tasks > 1 else 0)
        layers = []
        for size in (inputs, width):
            layers += [nn.Linear(size, width), nn.LayerNorm(width), nn.SiLU()]
        self.net = nn.Sequential(*layers, nn.Linear(width, obs_dim + 2))
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)

    def predict(self, obs: torch.Tensor, action: torch.Tensor, task: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Raw predictions: change (B, O) and reward (B,) in deviations, logits of a termination (B,).

        Shapes (B, O) raw observations, (B, A) and (B,).
        """
        inputs = [self.obs_normalizer(obs, task), action]
        if self.num_tasks > 1:
            inputs.append(F.one_hot(task, self.num_tasks).to(obs.dtype))
        out = self.net(torch.cat(inputs, dim=-1))
        return out[:, : self.obs_dim], out[:, self.obs_dim], out[:, self.obs_dim + 1]

    def step(self, obs: torch.Tensor, action: torch.Tensor, task: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """One imagined step.

        Args:
            obs: Raw observations, (B, O).
            action: Actions, (B, A).
            task: Task ids, (B,).

        Returns:
            Next observations (B, O), rewards in reward units (B,), that of a termination included, and probabilities
            that the episode goes on (B,).
        """
        change, reward, logits = self.predict(obs, action, task)
        alive, normal = torch.sigmoid(-logits), self.reward_normalizer
        reward = normal.mean[task, 0] + reward * (normal.var[task, 0].sqrt() + normal.eps)
        reward = alive * reward + (1.0 - alive) * self.falls.terminal[task]
        return obs + change * (self.changes.var.sqrt()[task] + self.changes.eps), reward, alive

    def change_targets(self, obs: torch.Tensor, next_obs: torch.Tensor, task: torch.Tensor) -> torch.Tensor:
        """Change in the units of the prediction, without outliers. Shapes (B, O), (B, O), (B,) -> (B, O)."""
        deviations = self.changes.var.sqrt()[task] + self.changes.eps
        return ((next_obs - obs) / deviations).clamp(-OUTLIER, OUTLIER)

    def reward_targets(self, reward: torch.Tensor, task: torch.Tensor) -> torch.Tensor:
        """Reward in the units of the prediction, without outliers. Shapes (B,), (B,) -> (B,)."""
        return self.reward_normalizer(reward.unsqueeze(-1), task).squeeze(-1).clamp(-OUTLIER, OUTLIER)

    def losses(
        self,
        obs: torch.Tensor,
        action: torch.Tensor,
        next_obs: torch.Tensor,
        reward: torch.Tensor,
        terminated: torch.Tensor,
        task: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """Weighted loss terms of transitions, (B,) each.

        Args:
            obs: Raw observations, (B, O).
            action: Executed actions, (B, A).
            next_obs: Observations before any reset, (B, O).
            reward: Rewards, (B,).
            terminated: True terminations, (B,), boolean.
            task: Task ids, (B,).

        Returns:
            ``change``, mean over the dimensions, ``reward``, 0 for a termination, and ``termination``.
        """
        change, predicted, logits = self.predict(obs, action, task)
        changed = self.change_targets(obs, next_obs, task)
        earned = self.reward_targets(reward, task)
        return {
            "change": CHANGE_WEIGHT * (change - changed).square().mean(-1),
            "reward": REWARD_WEIGHT * (predicted - earned).square() * ~terminated,
            "termination": F.binary_cross_entropy_with_logits(logits, terminated.to(logits.dtype), reduction="none"),
        }

    @torch.no_grad()
    def update_statistics(
        self,
        obs: torch.Tensor,
        next_obs: torch.Tensor,
        valid: torch.Tensor,
        reward: torch.Tensor,
        terminated: torch.Tensor,
        task: torch.Tensor,
    ) -> None:
        """Merge transitions, as in :meth:`losses`, into the statistics; ``valid`` (B,): the successor is known."""
        self.obs_normalizer.update(obs, task)
        self.changes.update((next_obs - obs)[valid], task[valid])
        self.reward_normalizer.update(reward[~terminated].unsqueeze(-1), task[~terminated])
        self.falls.update(reward, terminated, task)
