"""Implicit world model (no decoder): latent dynamics, reward and continuation of one step, in one trunk.

The latent is ``z = (x, y)``. ``x`` is the observation itself, which the encoder copies (the anchor); ``y`` are SimNorm
features of it (arXiv 2310.16828, section 3.1). The whole latent is trained to predict itself one step ahead. Without
the anchor the latent is ``y`` alone, and value and policy are heads on it.

All targets are in units of what a step changes, so that no task and no dimension sets the weights of another.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from m3po.config import WorldModelCfg
from m3po.models.layers import SimNorm, head, trunk
from m3po.models.normalizers import RewardStatistics, TaskNormalizer
from m3po.models.task_policy import embed, new_embedding

OUTLIER = 5.0
"""Targets are cut off at this many units: contacts, and angles that wrap around, must not set the weights."""

INPUT_BOUND = 10.0
"""Bound of the normalised observation at the network's input, stds."""

SIMPLEX = 8
"""Dimensions of a group of features; each group lies on a simplex."""

PREDICTABLE = 0.05
"""A dimension is predicted in full from this share of explained change on, and passes through at 0."""

LEAST_WEIGHT = 0.1
"""Smallest weight in the loss of a dimension that is not predicted, relative to one that is."""

EXPLAINED_RATE = 0.2
"""Weight of a rollout in the running share of explained change."""


class WorldModel(nn.Module):
    """Encoder ``h``, dynamics ``d``, reward ``R`` and continuation ``c``; without the anchor also ``V`` and ``pi``."""

    def __init__(
        self, obs_dim: int, action_dim: int, num_tasks: int, cfg: WorldModelCfg, task_dims: list[int] | None = None
    ) -> None:
        """Create the networks, which predict "no change" at first.

        Args:
            obs_dim: Observation dimensions O.
            action_dim: Action dimensions A.
            num_tasks: Rows of the task embedding K; a single task is one row.
            cfg: Sizes.
            task_dims: Observation dimensions of each task, see :class:`~m3po.models.normalizers.TaskNormalizer`.
        """
        super().__init__()
        self.cfg, self.num_tasks = cfg, num_tasks
        self.anchor_dim = obs_dim if cfg.anchor else 0
        """Dimensions X of the anchor: O, or 0."""
        memory = cfg.replay_transitions / num_tasks
        self.obs_normalizer = TaskNormalizer(num_tasks, obs_dim, task_dims, memory=memory)
        self.changes = TaskNormalizer(num_tasks, obs_dim, eps=1e-4, memory=memory)
        """Statistics of what a step changes; their stds are the units of the anchor's prediction."""
        self.reward_normalizer = TaskNormalizer(num_tasks, 1, eps=1e-8, memory=memory)
        """Statistics of the rewards of steps that go on, whose std is the unit of the reward's prediction."""
        self.terminations = RewardStatistics(num_tasks, memory=memory)
        """What a termination earns: large and rare, it would set the reward's unit."""
        dims = torch.tensor(task_dims or [obs_dim] * num_tasks).unsqueeze(1)
        self.own_dims = nn.Buffer((torch.arange(obs_dim) < dims).to(torch.get_default_dtype()), persistent=False)
        self.explained = nn.Buffer(torch.ones(num_tasks, obs_dim))
        """Running share of the change that is explained on unseen steps, of each task and dimension."""
        self.feature_change = nn.Buffer(torch.ones(num_tasks))
        """Mean square of what a step changes in the features, of each task: nothing is gained by making them small."""
        self.task_embedding = new_embedding(num_tasks, cfg.task_embedding_dim)

        width, state_dim = cfg.width, self.anchor_dim + cfg.features + cfg.task_embedding_dim
        self.simnorm = SimNorm(SIMPLEX)
        if cfg.features > 0:
            inputs = obs_dim + cfg.task_embedding_dim
            encoder_width = width // 4 if cfg.anchor else width
            self.encoder = nn.Sequential(trunk(inputs, [encoder_width]), head(encoder_width, cfg.features))
        self.transition = nn.Sequential(
            trunk(state_dim + action_dim, [width, width]),
            head(width, self.anchor_dim + cfg.features + 2, zero=True),
        )
        if not cfg.anchor:
            heads = (head(width, 1, zero=True), head(width, action_dim, zero=True))
            self.value_head, self.policy_head = (nn.Sequential(trunk(state_dim, [width, width]), x) for x in heads)
            self.values = TaskNormalizer(num_tasks, 1, eps=1e-8, memory=memory)
            """Statistics of the critic's values, whose std is the unit of the value head."""

    # -- predictions --------------------------------------------------------------------------------------------------

    def embed(self, task: torch.Tensor) -> torch.Tensor:
        """Task embedding of norm 1, which only the policy's losses train. Shape (...,) -> (..., E)."""
        return embed(self.task_embedding.detach(), task)

    def encode(self, obs: torch.Tensor, task: torch.Tensor) -> torch.Tensor:
        """Latent ``z = h(s, e)``: raw observations (..., O) and task ids (...,) -> (..., Z)."""
        parts = [obs] if self.anchor_dim else []
        if self.cfg.features > 0:
            parts.append(self.simnorm(self.encoder(torch.cat([self._input(obs, task), self.embed(task)], dim=-1))))
        return torch.cat(parts, dim=-1)

    def observation(self, z: torch.Tensor) -> torch.Tensor:
        """Raw observation that an anchored latent stands for, (..., Z) -> (..., O)."""
        return z[..., : self.anchor_dim]

    def predict(self, z: torch.Tensor, action: torch.Tensor, task: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Raw predictions of one step.

        Args:
            z: Latents, (..., Z).
            action: Actions, (..., A).
            task: Task ids, (...,).

        Returns:
            Change of the anchor (..., X) in units of :attr:`changes`, next features (..., Y), reward (...,) in
            stds of the task's rewards, and logits of a termination (...,).
        """
        out = self.transition(torch.cat([self._state(z, task), action, self.embed(task)], dim=-1))
        change, logits, reward, termination = out.split([self.anchor_dim, self.cfg.features, 1, 1], dim=-1)
        features = self.simnorm(logits) if self.cfg.features > 0 else logits
        return change, features, reward.squeeze(-1), termination.squeeze(-1)

    def step(self, z: torch.Tensor, action: torch.Tensor, task: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """One imagined step. Dimensions of the observation that cannot be predicted stay as they are.

        Args:
            z: Latents, (..., Z).
            action: Actions, (..., A).
            task: Task ids, (...,).

        Returns:
            Next latents (..., Z), rewards (...,) in reward units, that of a termination included, and probabilities
            (...,) that the episode goes on.
        """
        change, features, reward, logits = self.predict(z, action, task)
        alive = torch.sigmoid(-logits)
        reward = self.reward_normalizer.invert(reward.unsqueeze(-1), task).squeeze(-1)
        reward = alive * reward + (1.0 - alive) * self.terminations.terminal[task]
        if not self.anchor_dim:
            return features, reward, alive
        predicted = self.own_dims * (self.explained / PREDICTABLE).clamp(0.0, 1.0)
        x = self.observation(z) + change * (self.changes.stds() * predicted)[task]
        return torch.cat([x, features], dim=-1), reward, alive

    def value(self, z: torch.Tensor, task: torch.Tensor) -> torch.Tensor:
        """``V(z)`` of the purely latent form, reward units: (..., Z), (...,) -> (...,)."""
        value = self.value_head(torch.cat([z, self.embed(task)], dim=-1))
        return self.values.invert(value, task).squeeze(-1)

    def policy(self, z: torch.Tensor, task: torch.Tensor) -> torch.Tensor:
        """Mean action of ``pi(z)`` of the purely latent form: (..., Z), (...,) -> (..., A)."""
        return self.policy_head(torch.cat([z, self.embed(task)], dim=-1))

    def _input(self, obs: torch.Tensor, task: torch.Tensor) -> torch.Tensor:
        return self.obs_normalizer(obs, task).clamp(-INPUT_BOUND, INPUT_BOUND)

    def _state(self, z: torch.Tensor, task: torch.Tensor) -> torch.Tensor:
        """The latent as the transition reads it: its anchor normalised."""
        if not self.anchor_dim:
            return z
        return torch.cat([self._input(self.observation(z), task), z[..., self.anchor_dim :]], dim=-1)

    # -- targets and their statistics ---------------------------------------------------------------------------------

    def change_targets(self, obs: torch.Tensor, next_obs: torch.Tensor, task: torch.Tensor) -> torch.Tensor:
        """Change in the units of the prediction, without outliers: (..., O), (..., O), (...,) -> (..., O)."""
        return ((next_obs - obs) / self.changes.stds()[task]).clamp(-OUTLIER, OUTLIER)

    def reward_targets(self, reward: torch.Tensor, task: torch.Tensor) -> torch.Tensor:
        """Reward in the units of the prediction, without outliers: (...,), (...,) -> (...,)."""
        return self.reward_normalizer(reward.unsqueeze(-1), task).squeeze(-1).clamp(-OUTLIER, OUTLIER)

    def change_loss(self, change: torch.Tensor, target: torch.Tensor, task: torch.Tensor) -> torch.Tensor:
        """Squared error, mean over the task's own dimensions, (...,); what cannot be predicted weighs less."""
        weight = (self.own_dims * self.explained.clamp(LEAST_WEIGHT, 1.0))[task]
        return ((change - target).square() * weight).sum(-1) / weight.sum(-1)

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
        """Merge transitions into the statistics.

        Args:
            obs: Raw observations, (B, O).
            next_obs: Observations before any reset, (B, O).
            valid: Whether that is known, (B,), boolean.
            reward: Rewards, (B,).
            terminated: True terminations, (B,), boolean.
            task: Task ids, (B,).
        """
        self.obs_normalizer.update(obs, task)
        self.changes.update((next_obs - obs)[valid], task[valid])
        self.reward_normalizer.update(reward[~terminated].unsqueeze(-1), task[~terminated])
        self.terminations.update(reward, terminated, task)

    @torch.no_grad()
    def update_explained(self, explained: torch.Tensor, seen: torch.Tensor) -> None:
        """Take the explained share of the change (K, O) of a rollout in; ``seen`` (K,): tasks that it showed."""
        self.explained.lerp_(explained.nan_to_num(0.0), EXPLAINED_RATE * seen.to(explained.dtype).unsqueeze(1))


def termination_loss(logits: torch.Tensor, terminated: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy of a termination's logits, any shape."""
    return F.binary_cross_entropy_with_logits(logits, terminated.to(logits.dtype), reduction="none")
