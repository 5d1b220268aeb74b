"""Batched MPPI over the latent model, in coordinates whitened by the policy prior.

A candidate is a sequence of perturbations ``u`` with ``a_k = mu_k + sigma * u_k`` around the prior's own imagined
trajectory. Candidate returns are z-scored per environment before the softmax, so scaling all rewards leaves the plan
unchanged; zero iterations return the prior's mean bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from m3po.config import PlannerCfg
from m3po.models import WorldModel
from m3po.planning.noise import planner_noise


@dataclass
class Plan:
    """What the planner found for n environments, A action dimensions and E elites."""

    mean: torch.Tensor
    """First action of the plan, shape (n, A), action units."""

    gain: torch.Tensor
    """Predicted return of the plan minus the prior's, shape (n,), in deviations of the candidates' returns."""

    elites: torch.Tensor
    """First actions of the final elites, shape (n, E, A), action units."""

    elite_weights: torch.Tensor
    """Softmax weights of the final elites, shape (n, E)."""

    elite_std: torch.Tensor
    """Deviation of the final sampling distribution's first action, shape (n, A), action units."""


class _Start(NamedTuple):
    """Where imagination starts: latents (n, Z), prior mean and deviation (n, A), embeddings (n, E), task ids (n,)."""

    z: torch.Tensor
    mu: torch.Tensor
    sigma: torch.Tensor
    e: torch.Tensor
    task: torch.Tensor
    action_mask: torch.Tensor | None


class MPPIPlanner:
    """Model-predictive path integral control in the latent space of a :class:`WorldModel`."""

    def __init__(self, model: WorldModel, cfg: PlannerCfg, gamma: float, seed: int) -> None:
        """Bind the planner to a model.

        Args:
            model: World model.
            cfg: Budget and sampling distribution.
            gamma: Discount per step.
            seed: Seed of the counter-based noise.
        """
        self.model = model
        self.cfg = cfg
        self.gamma = gamma
        self.seed = seed

    @torch.no_grad()
    def plan(
        self,
        z: torch.Tensor,
        mu: torch.Tensor,
        sigma: torch.Tensor,
        task: torch.Tensor,
        env_ids: torch.Tensor,
        step: int,
        action_mask: torch.Tensor | None = None,
    ) -> Plan:
        """Plan for a batch of environments.

        Args:
            z: Latents, shape (n, Z).
            mu: Mean action of the policy prior, shape (n, A).
            sigma: Deviation of the policy prior, shape (n, A).
            task: Task ids, shape (n,).
            env_ids: Environment ids that key the noise, shape (n,).
            step: Step counter that keys the noise.
            action_mask: Valid action dimensions, shape (n, A), boolean; masked ones stay exactly 0.

        Returns:
            The plan.
        """
        cfg, n = self.cfg, z.shape[0]
        if action_mask is not None:
            mu, sigma = mu * action_mask, sigma * action_mask
        if cfg.num_iterations == 0:
            one = torch.ones(n, 1, device=z.device)
            return Plan(mu, torch.zeros(n, device=z.device), mu.unsqueeze(1), one, sigma)

        num_closed = 1 + cfg.num_prior_samples
        start = _Start(z, mu, sigma, self.model.embed(task), task, action_mask)
        mean = mu.new_zeros(n, cfg.horizon, mu.shape[1])
        std = torch.ones_like(mean)
        for iteration in range(cfg.num_iterations):
            noise = self._noise(env_ids, step, iteration, mean.shape[1:], action_mask)
            u = (mean.unsqueeze(1) + std.unsqueeze(1) * noise).clamp(-cfg.max_noise, cfg.max_noise)
            if iteration == 0:
                # The unperturbed prior goes along as candidate 0: its actions are what the others perturb.
                u = torch.cat([torch.zeros_like(u[:, :1]), u], dim=1)
                actions, returns = self._imagine(start, u, num_closed=num_closed)
                nominal, nominal_return = actions[:, 0], returns[:, 0]
                offset = actions[:, 1:num_closed] - nominal.unsqueeze(1)
                u[:, 1:num_closed] = offset / sigma.clamp_min(1e-6)[:, None, None]
                u = u[:, 1:].clamp(-cfg.max_noise, cfg.max_noise)
                returns = returns[:, 1:]
                prior_u, prior_returns = u[:, : cfg.num_prior_samples], returns[:, : cfg.num_prior_samples]
            else:
                # The prior's own trajectories compete again, without being evaluated again.
                u = torch.cat([prior_u, u[:, cfg.num_prior_samples :]], dim=1)
                _, fresh = self._imagine(start, u[:, cfg.num_prior_samples :], nominal)
                returns = torch.cat([prior_returns, fresh], dim=1)
            elites, weights, spread = self._select(u, returns)
            mean = (weights[..., None, None] * elites).sum(1)
            variance = (weights[..., None, None] * (elites - mean.unsqueeze(1)).square()).sum(1)
            std = variance.sqrt().clamp(cfg.min_std, 1.0)

        _, plan_return = self._imagine(start, mean.unsqueeze(1), nominal)
        return Plan(
            mean=mu + sigma * mean[:, 0],
            gain=(plan_return.squeeze(1) - nominal_return) / spread,
            elites=mu.unsqueeze(1) + sigma.unsqueeze(1) * elites[:, :, 0],
            elite_weights=weights,
            elite_std=sigma * std[:, 0],
        )

    def _noise(
        self, env_ids: torch.Tensor, step: int, iteration: int, shape: torch.Size, action_mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Antithetic noise of shape (n, S, H, A): a pair ``(u, -u)`` cancels the sample mean's error."""
        num_samples = self.cfg.num_samples
        half = planner_noise(self.seed, step, env_ids, iteration, ((num_samples + 1) // 2, *shape))
        noise = torch.stack([half, -half], dim=2).flatten(1, 2)[:, :num_samples]
        return noise if action_mask is None else noise * action_mask[:, None, None]

    def _imagine(
        self, start: _Start, u: torch.Tensor, nominal: torch.Tensor | None = None, num_closed: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Roll candidates out in the model and add up their predicted return (2).

        Args:
            start: Where the candidates start.
            u: Perturbations, shape (n, S, H, A).
            nominal: Actions that are perturbed, shape (n, H, A). ``None``: those of candidate 0.
            num_closed: Candidates, from the first, whose own imagined states the prior answers; without ``nominal``.

        Returns:
            Actions (n, S, H, A) and returns (n, S) in units of the task's reward scale.
        """
        samples = u.shape[1]
        mu, sigma = start.mu.unsqueeze(1), start.sigma.unsqueeze(1)
        z, e = (x.unsqueeze(1).expand(-1, samples, -1) for x in (start.z, start.e))
        task = start.task.unsqueeze(1).expand(-1, samples)
        actions, total, alive, discount = [], 0.0, 1.0, 1.0
        for k in range(self.cfg.horizon):
            if nominal is not None:
                centre = nominal[:, None, k]
            elif k == 0:
                centre = mu  # the executed policy's own mean, not the latent prior's
            else:
                own = self.model.prior(z[:, :num_closed], e[:, :num_closed])
                if start.action_mask is not None:
                    own = own * start.action_mask.unsqueeze(1)
                centre = torch.cat([own, own[:, :1].expand(-1, samples - num_closed, -1)], dim=1)
            actions.append(centre + sigma * u[:, :, k])
            z, reward, survives = self.model.step(z, actions[-1], e, task)
            total = total + discount * alive * reward
            alive, discount = alive * survives, discount * self.gamma
        return torch.stack(actions, dim=2), total + discount * alive * self.model.value(z, e)

    def _select(self, u: torch.Tensor, returns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Elites (n, E, H, A), their softmax weights (n, E), and the deviation of all returns (n,)."""
        spread = returns.std(dim=1, unbiased=False).clamp_min(1e-8)
        score, index = ((returns - returns.mean(1, keepdim=True)) / spread.unsqueeze(1)).topk(self.cfg.num_elites, 1)
        weights = torch.softmax(self.cfg.temperature * score, dim=1)
        elites = u.gather(1, index[..., None, None].expand(-1, -1, *u.shape[2:]))
        return elites, weights, spread
