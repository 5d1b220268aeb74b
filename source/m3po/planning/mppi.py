"""Batched MPPI over the latent model, in coordinates whitened by the policy prior.

A candidate is a sequence of perturbations ``u`` with ``a_k = mu_k + sigma * u_k`` around the prior's own imagined
trajectory. Candidate returns are z-scored per environment before the softmax, so scaling all rewards leaves the plan
unchanged; zero iterations return the prior's mean bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass

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

        e = self.model.embed(task)
        nominal, nominal_return = self._follow_prior(z, mu, sigma, e, task, action_mask)
        mean = torch.zeros_like(nominal)
        std = torch.ones_like(nominal)
        num_prior = cfg.num_prior_samples
        u = torch.empty(n, cfg.num_samples, *nominal.shape[1:], device=z.device)
        returns = torch.empty(n, cfg.num_samples, device=z.device)
        for iteration in range(cfg.num_iterations):
            noise = self._noise(env_ids, step, iteration, nominal.shape[1:], action_mask)
            if iteration == 0 and num_prior > 0:
                u[:, :num_prior], returns[:, :num_prior] = self._explore_prior(
                    z, mu, sigma, e, task, noise[:, :num_prior], nominal, action_mask
                )
            u[:, num_prior:] = (mean.unsqueeze(1) + std.unsqueeze(1) * noise[:, num_prior:]).clamp(
                -cfg.max_noise, cfg.max_noise
            )
            returns[:, num_prior:] = self._evaluate(z, nominal, sigma, e, task, u[:, num_prior:])
            elites, weights, spread = self._select(u, returns)
            mean = (weights[..., None, None] * elites).sum(1)
            variance = (weights[..., None, None] * (elites - mean.unsqueeze(1)).square()).sum(1)
            std = variance.sqrt().clamp(cfg.min_std, 1.0)

        plan_return = self._evaluate(z, nominal, sigma, e, task, mean.unsqueeze(1)).squeeze(1)
        return Plan(
            mean=mu + sigma * mean[:, 0],
            gain=(plan_return - nominal_return) / spread,
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

    def _follow_prior(
        self,
        z: torch.Tensor,
        mu: torch.Tensor,
        sigma: torch.Tensor,
        e: torch.Tensor,
        task: torch.Tensor,
        action_mask: torch.Tensor | None,
        noise: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Roll the prior out closed-loop: actions (..., H, A) and return (...,). Step 0 is the executed policy's."""
        actions, total, alive, discount = [], 0.0, 1.0, 1.0
        for k in range(self.cfg.horizon):
            action = mu if k == 0 else self.model.prior(z, e)
            if action_mask is not None:
                action = action * action_mask
            if noise is not None:
                action = action + sigma * noise[..., k, :]
            actions.append(action)
            z, reward, survives = self.model.step(z, action, e, task)
            total = total + discount * alive * reward
            alive, discount = alive * survives, discount * self.gamma
        total = total + discount * alive * self.model.value(z, e)
        return torch.stack(actions, dim=-2), total

    def _explore_prior(
        self,
        z: torch.Tensor,
        mu: torch.Tensor,
        sigma: torch.Tensor,
        e: torch.Tensor,
        task: torch.Tensor,
        noise: torch.Tensor,
        nominal: torch.Tensor,
        action_mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Noisy closed-loop trajectories of the prior, as perturbations (n, P, H, A) of the nominal, and returns."""
        samples = noise.shape[1]
        rows = [_repeat(t, samples) for t in (z, mu, sigma, e, task)]
        mask = None if action_mask is None else _repeat(action_mask, samples)
        bounded = noise.clamp(-self.cfg.max_noise, self.cfg.max_noise).flatten(0, 1)
        actions, returns = self._follow_prior(*rows, mask, bounded)
        offset = actions.unflatten(0, (-1, samples)) - nominal.unsqueeze(1)
        u = offset / sigma.clamp_min(1e-6)[:, None, None]
        return u.clamp(-self.cfg.max_noise, self.cfg.max_noise), returns.view(-1, samples)

    def _evaluate(
        self,
        z: torch.Tensor,
        nominal: torch.Tensor,
        sigma: torch.Tensor,
        e: torch.Tensor,
        task: torch.Tensor,
        u: torch.Tensor,
    ) -> torch.Tensor:
        """Predicted return (2) of open-loop candidates. Perturbations (n, S, H, A) -> returns (n, S)."""
        samples = u.shape[1]
        actions = (nominal.unsqueeze(1) + sigma[:, None, None] * u).flatten(0, 1)
        z, e, task = (_repeat(t, samples) for t in (z, e, task))
        total, alive, discount = 0.0, 1.0, 1.0
        for k in range(self.cfg.horizon):
            z, reward, survives = self.model.step(z, actions[:, k], e, task)
            total = total + discount * alive * reward
            alive, discount = alive * survives, discount * self.gamma
        total = total + discount * alive * self.model.value(z, e)
        return total.view(-1, samples)

    def _select(self, u: torch.Tensor, returns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Elites (n, E, H, A), their softmax weights (n, E), and the deviation of all returns (n,)."""
        spread = returns.std(dim=1, unbiased=False).clamp_min(1e-8)
        score, index = ((returns - returns.mean(1, keepdim=True)) / spread.unsqueeze(1)).topk(self.cfg.num_elites, 1)
        weights = torch.softmax(self.cfg.temperature * score, dim=1)
        elites = u.gather(1, index[..., None, None].expand(-1, -1, *u.shape[2:]))
        return elites, weights, spread


def _repeat(x: torch.Tensor, samples: int) -> torch.Tensor:
    """Repeat every row ``samples`` times, candidates of one environment next to each other."""
    return x.repeat_interleave(samples, dim=0)
