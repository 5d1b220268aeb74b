"""The imagined return (2), the one objective that value gradient, MPPI and bonus share."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from rsl_rl.models import MLPModel
from tensordict import TensorDict

from m3po.config import PlannerCfg
from m3po.models import WorldModel

Values = Callable[[TensorDict, torch.Tensor], torch.Tensor]
"""Observations and tasks, batch size (B,) each -> values in reward units, (B,)."""


class Objective:
    """``J = mean over h = 1..H of [sum_{k<h} gamma^k c_k r_k + gamma^h c_h V(z_h)]``, or its last term alone.

    The policy's mean actions follow the first action, plus whatever perturbation is given. An anchored latent is
    evaluated by the policy and the critic of PPO themselves, a purely learnt one by its own heads.
    """

    def __init__(
        self,
        model: WorldModel,
        actor: MLPModel,
        values: Values,
        group_dims: dict[str, int],
        discounts: torch.Tensor,
        cfg: PlannerCfg,
        action_mask: torch.Tensor | None = None,
    ) -> None:
        """Bind the objective to its networks.

        Args:
            model: World model.
            actor: Policy.
            values: Critic.
            group_dims: Observation groups that the model reads, in this order, with their dimensions.
            discounts: Discount of each task, (K,).
            cfg: Horizon, and whether the mean over horizons is taken.
            action_mask: Action dimensions that each task has, (K, A), boolean; ``None``: all.
        """
        self.action_mask = action_mask
        self.model, self.actor, self.values, self.group_dims = model, actor, values, group_dims
        self.discounts, self.horizon, self.average = discounts, cfg.horizon, cfg.average_horizons

    def of(self, actor: MLPModel) -> Objective:
        """The same objective for another policy."""
        other = copy.copy(self)
        other.actor = actor
        return other

    def vector(self, obs: TensorDict) -> torch.Tensor:
        """Observation vector of the model, (..., O)."""
        return torch.cat([obs[group] for group in self.group_dims], dim=-1)

    def encode(self, obs: TensorDict, task: torch.Tensor) -> torch.Tensor:
        """Latents of observations, batch size (B,), of tasks (B,): (B, Z)."""
        return self.model.encode(self.vector(obs), task)

    def value(self, z: torch.Tensor, task: torch.Tensor) -> torch.Tensor:
        """``V(z)`` in reward units: (B, Z), (B,) -> (B,)."""
        if not self.model.cfg.anchor:
            return self.model.value(z, task)
        return self.values(self._groups(z, task), task)

    def policy(self, z: torch.Tensor, task: torch.Tensor) -> torch.Tensor:
        """Mean action of the policy in latents: (B, Z), (B,) -> (B, A)."""
        if not self.model.cfg.anchor:
            action = self.model.policy(z, task)
            return action if self.action_mask is None else action * self.action_mask[task]
        return self.actor(self._groups(z, task))

    def returns(
        self, z: torch.Tensor, action: torch.Tensor, task: torch.Tensor, noise: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Imagined return (2) of first actions that the policy follows.

        Args:
            z: Latents, (B, Z).
            action: First actions, (B, A).
            task: Task ids, (B,).
            noise: What is added to the policy's later actions, (B, H, A), action units; ``[:, 0]`` is not read.

        Returns:
            Returns in reward units, (B,).
        """
        gamma = self.discounts[task]
        earned, weight, ends = torch.zeros_like(gamma), torch.ones_like(gamma), []
        for k in range(self.horizon):
            if k > 0:
                action = self.policy(z, task)
                action = action if noise is None else action + noise[:, k]
            z, reward, alive = self.model.step(z, action, task)
            earned = earned + weight * reward
            weight = weight * gamma * alive
            if self.average or k + 1 == self.horizon:
                ends.append(earned + weight * self.value(z, task))
        return torch.stack(ends).mean(0)

    def gradient(self, z: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, task: torch.Tensor) -> torch.Tensor:
        """Gradient of the imagined return in the first action, at the policy's mean (arXiv 1510.09142).

        Args:
            z: Latents, (B, Z).
            mean: Mean of the policy, (B, A).
            std: Std of the policy, (B, A).
            task: Task ids, (B,).

        Returns:
            Reward units per std of the policy, (B, A); 0 where it is not finite.
        """
        with torch.inference_mode(False), torch.enable_grad():
            # Tensors made in inference mode cannot be differentiated through.
            z, mean, std, task = (x.clone() for x in (z, mean, std, task))
            shift = torch.zeros_like(mean, requires_grad=True)
            (gradient,) = torch.autograd.grad(self.returns(z, mean + std * shift, task).sum(), shift)
        return torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0)

    def _groups(self, z: torch.Tensor, task: torch.Tensor) -> TensorDict:
        """Observation groups that an anchored latent stands for."""
        parts = self.model.observation(z).split(list(self.group_dims.values()), dim=-1)
        groups = dict(zip(self.group_dims, parts, strict=True)) | {"task": task.unsqueeze(-1)}
        return TensorDict(groups, batch_size=z.shape[:1])
