"""Batched MPPI over the latent model, in coordinates whitened by the policy prior.

A candidate is a sequence of perturbations ``u`` with ``a_k = mu_k + sigma * u_k`` around the prior's own imagined
trajectory. Candidate returns are z-scored per environment before the softmax, so scaling all rewards leaves the plan
unchanged; zero iterations return the prior's mean bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from m3po.config import PlannerCfg
from m3po.kernels import elites, sampling
from m3po.planning.capture import CapturedPlan
from m3po.planning.imagination import Layout, Start, allocate

OPERATIONS = {
    "torch": (sampling.sample_candidates_torch, elites.update_distribution_torch, elites.project_torch),
    "warp": (sampling.sample_candidates, elites.update_distribution, elites.project),
}
"""Sampling, update of the sampling distribution, and projection: in torch, or as Warp kernels."""


@dataclass
class Plan:
    """What the planner found for n environments, A action dimensions and S candidates.

    The tensors are the planner's own: they hold until its next call.
    """

    mean: torch.Tensor
    """First action of the plan, shape (n, A), action units."""

    projected: torch.Tensor
    """The same on the trust region around the prior, shape (n, A), action units."""

    gain: torch.Tensor
    """Predicted return of the plan minus the prior's, shape (n,), in deviations of the candidates' returns."""

    candidates: torch.Tensor
    """First actions of the last candidates, shape (n, S, A), action units."""

    weights: torch.Tensor
    """Softmax weights of the elites among them and 0 elsewhere, shape (n, S)."""

    std: torch.Tensor
    """Deviation of the final sampling distribution's first action, shape (n, A), action units."""


class Rollout(Protocol):
    """Predicts returns of candidates; see :class:`~m3po.planning.imagination.Imagination`."""

    def refresh(self) -> None:
        """Take over changes of the model."""

    def begin(self, start: Start, samples: int) -> None:
        """Prepare for a plan."""

    def roll(
        self,
        u: torch.Tensor,
        returns: torch.Tensor,
        nominal: torch.Tensor | None = None,
        actions: torch.Tensor | None = None,
    ) -> None:
        """Predict the returns of candidates."""


def plan_layout(n: int, action_dim: int, cfg: PlannerCfg) -> Layout:
    """Buffers of one plan of n environments."""
    samples, horizon = cfg.num_samples, cfg.horizon
    sequence = (n, horizon, action_dim)
    shapes = {
        "u": (n, 1 + samples, horizon, action_dim),
        "returns": (n, 1 + samples),
        "actions": (n, 1 + cfg.num_prior_samples, horizon, action_dim),
        "prior_u": (n, cfg.num_prior_samples, horizon, action_dim),
        "prior_returns": (n, cfg.num_prior_samples),
        "mean": sequence,
        "std": sequence,
        "weights": (n, samples),
        "spread": (n,),
        "plan_return": (n, 1),
        "action": (n, action_dim),
        "projected": (n, action_dim),
        "action_std": (n, action_dim),
        "candidates": (n, samples, action_dim),
        "gain": (n,),
    }
    return {name: (shape, torch.float32) for name, shape in shapes.items()} | {
        "counters": ((max(1, cfg.num_iterations), 3), torch.int64)
    }


class MPPIPlanner:
    """Model-predictive path integral control in an imagined latent space."""

    def __init__(self, imagination: Rollout, cfg: PlannerCfg, seed: int) -> None:
        """Bind the planner to an imagination.

        Args:
            imagination: Predicts the returns of candidates.
            cfg: Budget and sampling distribution.
            seed: Seed of the counter-based noise.
        """
        self.imagination, self.cfg, self.seed = imagination, cfg, seed
        self._sample, self._update, self._project = OPERATIONS[cfg.kernels]
        self._buffers: dict[str, torch.Tensor] = {}
        self._graph: CapturedPlan | None = None

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
            The plan, in buffers that the next call overwrites.
        """
        if action_mask is not None:
            mu, sigma = mu * action_mask, sigma * action_mask
        if self.cfg.num_iterations == 0:
            n = mu.shape[0]
            weights = torch.ones(n, 1, device=mu.device)
            return Plan(mu, mu, torch.zeros(n, device=mu.device), mu.unsqueeze(1), weights, sigma)
        self._allocate(*mu.shape, mu.device)
        self._buffers["counters"][:, 1].fill_(step)
        self.imagination.refresh()
        start = Start(z, mu, sigma, task, env_ids, action_mask)
        if not self.cfg.cuda_graph:
            return self._plan(start)
        if self._graph is None:
            self._graph = CapturedPlan(self._plan, start)
        return self._graph.replay(start)

    def _plan(self, start: Start) -> Plan:
        """All iterations; everything that changes between calls is read from device memory."""
        cfg, b = self.cfg, self._buffers
        u, returns, mean, std = b["u"], b["returns"], b["mean"], b["std"]
        mu, sigma = start.mu, start.sigma
        # The unperturbed prior goes along as candidate 0: its actions are what the others perturb.
        candidates, candidate_returns = u[:, 1:], returns[:, 1:]
        prior_u, nominal = u[:, 1 : 1 + cfg.num_prior_samples], b["actions"][:, 0]
        self.imagination.begin(start, 1 + cfg.num_samples)
        mean.zero_()
        std.fill_(1.0)
        for iteration in range(cfg.num_iterations):
            self._sample(
                candidates, mean, std, b["counters"][iteration], start.env_ids, start.action_mask, cfg.max_noise
            )
            if iteration == 0:
                u[:, 0].zero_()
                self.imagination.roll(u, returns, actions=b["actions"])
                torch.sub(b["actions"][:, 1:], nominal.unsqueeze(1), out=prior_u)
                prior_u.div_(torch.clamp(sigma, min=1e-6, out=b["action_std"])[:, None, None])
                prior_u.clamp_(-cfg.max_noise, cfg.max_noise)
                b["prior_u"].copy_(prior_u)
                b["prior_returns"].copy_(candidate_returns[:, : cfg.num_prior_samples])
            else:
                # The prior's own trajectories compete again, without being evaluated again.
                prior_u.copy_(b["prior_u"])
                fresh = slice(1 + cfg.num_prior_samples, None)
                self.imagination.roll(u[:, fresh], returns[:, fresh], nominal)
                candidate_returns[:, : cfg.num_prior_samples] = b["prior_returns"]
            self._update(
                mean,
                std,
                b["weights"],
                b["spread"],
                candidates,
                candidate_returns,
                cfg.num_elites,
                cfg.temperature,
                cfg.min_std,
            )

        self.imagination.roll(mean.unsqueeze(1), b["plan_return"], nominal)
        self._project(b["projected"], mu, sigma, mean[:, 0], cfg.max_kl)
        return Plan(
            mean=torch.addcmul(mu, sigma, mean[:, 0], out=b["action"]),
            projected=b["projected"],
            gain=torch.sub(b["plan_return"][:, 0], returns[:, 0], out=b["gain"]).div_(b["spread"]),
            candidates=torch.addcmul(mu.unsqueeze(1), sigma.unsqueeze(1), candidates[:, :, 0], out=b["candidates"]),
            weights=b["weights"],
            std=torch.mul(sigma, std[:, 0], out=b["action_std"]),
        )

    def _allocate(self, n: int, action_dim: int, device: torch.device) -> None:
        """Make the buffers for n environments, once."""
        if self._buffers and self._buffers["spread"].shape[0] == n:
            return
        self._graph = None
        self._buffers = allocate(plan_layout(n, action_dim, self.cfg), device)
        counters = self._buffers["counters"]
        counters[:, 0] = self.seed
        counters[:, 2] = torch.arange(counters.shape[0], device=device)
