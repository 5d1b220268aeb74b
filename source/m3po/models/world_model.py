"""Implicit latent world model (no reconstruction), after TD-MPC2 (arXiv 2310.16828) with terminations.

Rewards and values are predicted in units of the task's own reward scale; the methods that return numbers rather than
logits state their unit.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from m3po.config import MODEL_SIZES, WorldModelCfg
from m3po.models.layers import LATENT_FLOOR, SimNorm, head, trunk
from m3po.models.normalizers import RewardStatistics, TaskNormalizer
from m3po.models.task_policy import embed
from m3po.models.two_hot import TwoHot


class WorldModel(nn.Module):
    """Encoder ``h``, dynamics ``d``, reward ``R``, continuation ``c``, value ``V`` and latent prior ``pi_z``."""

    def __init__(
        self, obs_dim: int, action_dim: int, num_tasks: int, cfg: WorldModelCfg, task_dims: list[int] | None = None
    ) -> None:
        """Create the networks.

        Args:
            obs_dim: Observation dimensions O.
            action_dim: Action dimensions A.
            num_tasks: Rows of the task embedding K; a single task is one row.
            cfg: Sizes and loss weights.
            task_dims: Observation dimensions of each task, see :class:`~m3po.models.normalizers.TaskNormalizer`.
        """
        super().__init__()
        self.cfg = cfg
        self.latent_dim, width, encoder_width = MODEL_SIZES[cfg.size]
        self.residual = cfg.dynamics == "residual"

        self.obs_normalizer = TaskNormalizer(num_tasks, obs_dim, task_dims)
        self.rewards = RewardStatistics(num_tasks)
        self.task_embedding = nn.Parameter(torch.empty(num_tasks, cfg.task_embedding_dim).uniform_(-0.02, 0.02))

        state_dim = self.latent_dim + cfg.task_embedding_dim
        self.simnorm = SimNorm(cfg.simnorm_dim)
        self.two_hot = TwoHot(cfg.num_bins, tuple(cfg.bin_range))
        self.encoder = nn.Sequential(
            trunk(obs_dim + cfg.task_embedding_dim, [encoder_width]), head(encoder_width, self.latent_dim)
        )
        # Dynamics, reward and continuation of a step read one trunk: a third of the planner's work, and of its memory.
        self.transition = trunk(state_dim + action_dim, [width, width])
        self.latent_head = head(width, self.latent_dim, zero=self.residual)
        self.reward_head = head(width, cfg.num_bins, zero=True)
        self.termination_head = head(width, 1, zero=True)
        self.value_head = nn.Sequential(trunk(state_dim, [width, width]), head(width, cfg.num_bins, zero=True))
        self.prior_head = nn.Sequential(trunk(state_dim, [width, width]), head(width, action_dim, zero=True))

    def embed(self, task: torch.Tensor) -> torch.Tensor:
        """Task embedding of maximum norm 1. Shape (...,) -> (..., E)."""
        return embed(self.task_embedding, task)

    def encode(self, obs: torch.Tensor, task: torch.Tensor) -> torch.Tensor:
        """Latent ``z = h(s, e)``. Shapes (..., O) raw observations and (...,) task ids -> (..., Z)."""
        normalized = self.obs_normalizer(obs, task)
        return self.simnorm(self.encoder(torch.cat([normalized, self.embed(task)], dim=-1)))

    def predict(
        self, z: torch.Tensor, action: torch.Tensor, e: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Raw predictions of one step.

        The residual form adds the prediction to the latent's own logits: on a simplex ``softmax(log z) = z``, so a
        prediction of zero is "no change". The floor keeps dimensions that are nearly off within reach of an update.

        Args:
            z: Latents, shape (..., Z).
            action: Actions, shape (..., A).
            e: Task embeddings, shape (..., E).

        Returns:
            Next latent ``d(z, a)`` (..., Z), two-hot logits of the scaled reward of a surviving step (..., num_bins),
            and raw logits of a termination (...,).
        """
        features = self.transition(torch.cat([z, action, e], dim=-1))
        update = self.latent_head(features)
        z_next = self.simnorm(update, base=z + LATENT_FLOOR if self.residual else None)
        return z_next, self.reward_head(features), self.termination_head(features).squeeze(-1)

    def value_logits(self, z: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        """Two-hot logits of the scaled value, shape (..., num_bins)."""
        return self.value_head(torch.cat([z, e], dim=-1))

    def value(self, z: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        """Value ``V(z)`` in units of the task's reward scale, shape (...,)."""
        return self.two_hot.decode(self.value_logits(z, e))

    def prior(self, z: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        """Mean action of the latent prior ``pi_z``, shape (..., A)."""
        return self.prior_head(torch.cat([z, e], dim=-1))

    def continuation(self, termination_logits: torch.Tensor, task: torch.Tensor) -> torch.Tensor:
        """Probability ``c`` that the episode goes on after a step, from its raw logits, shape (...,).

        A class-balanced head believes that half of all steps are falls; the base rate puts that right.
        """
        if self.cfg.balance_terminations:
            termination_logits = termination_logits + self.rewards.termination_logit(task)
        return torch.sigmoid(-termination_logits)

    def step(
        self, z: torch.Tensor, action: torch.Tensor, e: torch.Tensor, task: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One imagined step.

        Args:
            z: Latents, shape (..., Z).
            action: Actions, shape (..., A).
            e: Task embeddings, shape (..., E).
            task: Task ids, shape (...,).

        Returns:
            Next latent (..., Z); expected reward (...,) in units of the task's reward scale, the reward of a fall
            included; probability of continuing (...,).
        """
        z_next, reward_logits, termination_logits = self.predict(z, action, e)
        reward = self.two_hot.decode(reward_logits)
        alive = self.continuation(termination_logits, task)
        if self.cfg.terminal_reward:
            reward = reward + (1.0 - alive) * self.rewards.terminal[task] / self.rewards.scale(task)
        return z_next, reward, alive

    def parameter_groups(self) -> list[dict]:
        """Optimiser groups: the encoder learns at its own, smaller rate."""
        encoder = list(self.encoder.parameters())
        ids = {id(p) for p in encoder}
        rest = [p for p in self.parameters() if id(p) not in ids]
        lr = self.cfg.learning_rate
        return [{"params": encoder, "lr": lr * self.cfg.encoder_lr_scale}, {"params": rest, "lr": lr}]


def balanced_bce(logits: torch.Tensor, positive: torch.Tensor, base_logit: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy in which both classes weigh one half, given the log-odds of the positive class.

    Args:
        logits: Predicted logits, any shape.
        positive: Boolean targets, same shape.
        base_logit: Log-odds of the positive class, broadcastable.

    Returns:
        Loss per element, same shape.
    """
    rate = torch.sigmoid(base_logit)
    weight = torch.where(positive, 0.5 / rate, 0.5 / (1.0 - rate))
    return weight * F.binary_cross_entropy_with_logits(logits, positive.to(logits.dtype), reduction="none")
