"""MPPI on the imagined return (3), with the gradient's plan among its candidates.

A candidate is a sequence of perturbations ``u`` with ``a_k = pi(z_k) + sigma * u_k``. The returns of the candidates are
z-scored per environment before the softmax, so that scaling all rewards leaves the plan unchanged.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from m3po.config import PlannerCfg
from m3po.kernels import elites, sampling
from m3po.planning.cuda_graph import CUDAGraphPlan
from m3po.planning.objective import Objective

OPERATIONS = {
    "torch": (sampling.sample_candidates_torch, elites.update_distribution_torch, elites.project_torch),
    "warp": (sampling.sample_candidates, elites.update_distribution, elites.project),
}
"""Sampling, update of the sampling distribution, and projection: in torch, or as Warp kernels."""

MAX_NOISE = 3.0
"""Bound of a perturbation, stds of the policy."""

MIN_STD = 0.05
"""Smallest std of the sampling distribution after an update, stds of the policy."""

GRADIENT_STEPS = (0.0, 0.5, 1.0, 2.0)
"""Lengths of the first candidates, in units of the gradient's plan; the first is the policy's mean."""

CHUNK_ROWS = {"cpu": 2048, "cuda": 65536}
"""Candidates that are imagined together: their activations stay near a core's cache, or fill a GPU (untested)."""


@dataclass
class PlanInputs:
    """What n environments are planned from."""

    z: torch.Tensor
    """Latents, (n, Z)."""

    mu: torch.Tensor
    """Mean of the policy, (n, A)."""

    sigma: torch.Tensor
    """Std of the policy, (n, A)."""

    shift: torch.Tensor
    """The gradient's plan, stds of the policy, (n, A)."""

    task: torch.Tensor
    """Task ids, (n,), int64."""

    env_ids: torch.Tensor
    """Environment ids that key the noise, (n,), int64."""

    step: torch.Tensor
    """Step counter that keys the noise, (), int64."""

    action_mask: torch.Tensor
    """Valid action dimensions, (n, A), boolean; the others stay exactly 0."""


@dataclass
class Plan:
    """What the planner found for n environments, A action dimensions and S candidates."""

    mean: torch.Tensor
    """Planned first action on the trust region around the policy, (n, A)."""

    gain: torch.Tensor
    """Imagined return of the plan minus the policy's, (n,), in stds of the candidates' returns."""

    candidates: torch.Tensor
    """First actions of the last candidates, (n, S, A)."""

    weights: torch.Tensor
    """Softmax weights of the elites among them and 0 elsewhere, (n, S)."""

    std: torch.Tensor
    """Std of the final sampling distribution's first action, (n, A)."""


class MPPIPlanner:
    """Model-predictive path integral control (arXiv 2310.16828, section 3.2), batched over environments."""

    def __init__(self, objective: Objective, cfg: PlannerCfg, seed: int) -> None:
        """Bind the planner to an objective.

        Args:
            objective: Imagined return.
            cfg: Budget.
            seed: Seed of the counter-based noise.
        """
        self.objective, self.cfg, self.seed = objective, cfg, seed
        self._sample, self._update, self._project = OPERATIONS[cfg.kernels]
        self._graph: CUDAGraphPlan | None = None

    @torch.no_grad()
    def plan(self, inputs: PlanInputs) -> Plan:
        """Plan for a batch of environments. Zero iterations return the gradient's plan."""
        if not self.cfg.cuda_graph:
            return self._plan(inputs)
        if self._graph is None or not self._graph.fits(inputs):
            self._graph = CUDAGraphPlan(self._plan, inputs)
        return self._graph.replay(inputs)

    def _plan(self, inputs: PlanInputs) -> Plan:
        """All iterations; everything that changes between calls is read from device memory."""
        cfg, mu, sigma = self.cfg, inputs.mu * inputs.action_mask, inputs.sigma * inputs.action_mask
        inputs = dataclasses.replace(inputs, mu=mu, sigma=sigma)
        n, dims = mu.shape
        device = mu.device
        u = torch.zeros(n, cfg.num_samples, cfg.horizon, dims, device=device)
        returns = torch.zeros(n, cfg.num_samples, device=device)
        own = len(GRADIENT_STEPS)
        known = own + cfg.num_policy_samples
        mean, std = torch.zeros(n, cfg.horizon, dims, device=device), torch.ones(n, cfg.horizon, dims, device=device)
        weights, spread = torch.zeros_like(returns), torch.ones(n, device=device)
        for iteration in range(cfg.num_iterations):
            counters = torch.stack((_int(self.seed, device), inputs.step, _int(iteration, device)))
            if iteration == 0:
                # The policy's own trajectories are drawn around it, all others around the gradient's plan.
                self._draw(u[:, own:], mean, std, counters, inputs)
                u[:, known:, 0] += inputs.shift.unsqueeze(1)
                u.clamp_(-MAX_NOISE, MAX_NOISE)
                for s, length in enumerate(GRADIENT_STEPS):  # a graph cannot copy a table from the host
                    u[:, s, 0] = length * inputs.shift
                returns = self.evaluate(inputs, u)
            else:  # what is known already competes again, without being evaluated again
                self._draw(u[:, known:], mean, std, counters, inputs)
                returns[:, known:] = self.evaluate(inputs, u[:, known:])
            update = (cfg.num_elites, cfg.temperature, MIN_STD)
            self._update(mean, std, weights, spread, u, returns, *update)
        plan = torch.empty_like(mu)
        if cfg.num_iterations == 0:
            self._project(plan, mu, sigma, inputs.shift, cfg.max_acting_kl)
            return Plan(plan, torch.ones_like(spread), plan.unsqueeze(1), torch.ones(n, 1, device=device), sigma)
        self._project(plan, mu, sigma, mean[:, 0].contiguous(), cfg.max_acting_kl)
        mean[:, 0] = (plan - mu) / sigma.clamp_min(1e-6)
        value = self.evaluate(inputs, mean.unsqueeze(1))[:, 0]
        # The gradient's plan is executed where the model ranks the elites' mean below it.
        index = GRADIENT_STEPS.index(1.0)
        better = value >= returns[:, index]
        plan = torch.where(better.unsqueeze(1), plan, mu + sigma * u[:, index, 0])
        gain = (torch.maximum(value, returns[:, index]) - returns[:, 0]) / spread
        return Plan(plan, gain, mu.unsqueeze(1) + sigma.unsqueeze(1) * u[:, :, 0], weights, sigma * std[:, 0])

    def _draw(
        self, out: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, counters: torch.Tensor, inputs: PlanInputs
    ) -> None:
        if out.shape[1] > 0:
            self._sample(out, mean, std, counters, inputs.env_ids, inputs.action_mask, MAX_NOISE)

    def evaluate(self, inputs: PlanInputs, u: torch.Tensor) -> torch.Tensor:
        """Imagined returns of candidates (n, S, H, A), (n, S), in chunks of rows that stay in the cache."""
        n, samples = u.shape[:2]
        size = max(1, CHUNK_ROWS[u.device.type] // samples)
        parts = [self._evaluate(inputs, u, slice(i, min(n, i + size))) for i in range(0, n, size)]
        return torch.cat(parts).to(inputs.mu.dtype)

    def _evaluate(self, inputs: PlanInputs, u: torch.Tensor, rows: slice) -> torch.Tensor:
        z, mu, task, samples = inputs.z[rows], inputs.mu[rows], inputs.task[rows], u.shape[1]
        noise = u[rows] * inputs.sigma[rows, None, None]
        z, mu, task, noise = (*(x.repeat_interleave(samples, 0) for x in (z, mu, task)), noise.flatten(0, 1))
        with torch.autocast(u.device.type, torch.bfloat16, enabled=self.cfg.precision == "bfloat16"):
            return self.objective.returns(z, mu + noise[:, 0], task, noise).view(-1, samples)


def _int(value: int, device: torch.device) -> torch.Tensor:
    return torch.full((), value, dtype=torch.int64, device=device)
