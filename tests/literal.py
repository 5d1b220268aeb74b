"""Imagined return and planner written down from the equations, row by row: what the fast ones must equal."""

from types import SimpleNamespace

import torch

from m3po.planning import MPPIPlanner, Objective
from m3po.planning.mppi import MAX_NOISE, MIN_STD


class LinearModel:
    """No terminations: z' = z + a, reward -|z'|^2 - 0.1 |a|^2 (scaled), V = 0, a policy that does nothing."""

    cfg = SimpleNamespace(anchor=False)

    def __init__(self, scale=1.0):
        self.scale = scale

    def step(self, z, action, task):
        z = z + action
        return z, -self.scale * (z.square().sum(-1) + 0.1 * action.square().sum(-1)), torch.ones_like(z[..., 0])

    def value(self, z, task):
        return torch.zeros_like(z[..., 0])

    def policy(self, z, task):
        return torch.zeros_like(z)


def objective_of(model, cfg, gamma=1.0):
    """The objective of a model with its own value and policy, for one task."""
    return Objective(model, None, None, {}, torch.tensor([gamma]), cfg)


def planner_of(model, cfg, seed=0, gamma=1.0):
    return MPPIPlanner(objective_of(model, cfg, gamma), cfg, seed)


def literal_return(objective, z, action, task, noise=None):
    """Equation (2) of one row: z (Z,), action (A,), task (), noise (H, A)."""
    z, task, gamma = z.unsqueeze(0), task.view(1), objective.discounts[task].item()
    earned, alive, ends = 0.0, 1.0, []
    for k in range(objective.horizon):
        a = action.unsqueeze(0)
        if k > 0:
            a = objective.policy(z, task)
            if noise is not None:
                a = a + noise[k]
        z, reward, goes_on = objective.model.step(z, a, task)
        earned += gamma**k * alive * reward.item()
        alive *= goes_on.item()
        ends.append(earned + gamma ** (k + 1) * alive * objective.value(z, task).item())
    return sum(ends) / len(ends) if objective.average else ends[-1]


def literal_plan(objective, cfg, z, mu, sigma, shift, task, noise, mask):
    """Planned first action and gain of one environment, in the precision of its inputs.

    ``noise`` holds the draws (S', H, A) of each iteration, of those candidates that are drawn in it.
    """
    mask = mask.to(mu.dtype)
    mu, sigma = mu * mask, sigma * mask

    def value(u):
        return literal_return(objective, z, mu + sigma * u[0], task, sigma * u)

    def shifted(u, by):
        u = u.clone()
        u[0] += by
        return u

    zero = torch.zeros(cfg.horizon, len(mu), dtype=mu.dtype)
    known = [shifted(zero, length * shift) for length in (0.0, 0.5, 1.0, 2.0)]
    draws = [u.clamp(-MAX_NOISE, MAX_NOISE) * mask for u in noise[0]]
    known += draws[: cfg.num_policy_samples]
    others = [shifted(u, shift).clamp(-MAX_NOISE, MAX_NOISE) for u in draws[cfg.num_policy_samples :]]
    mean, std = zero, zero
    for iteration in range(cfg.num_iterations):
        if iteration > 0:
            others = [(mean + std * u).clamp(-MAX_NOISE, MAX_NOISE) * mask for u in noise[iteration]]
        candidates = known + others
        returns = torch.tensor([value(u) for u in candidates], dtype=mu.dtype)
        spread = returns.std(unbiased=False)
        score = (returns - returns.mean()) / spread
        best = sorted(range(len(candidates)), key=lambda s: -score[s].item())[: cfg.num_elites]
        weight = (cfg.temperature * score[best]).exp()
        weight = weight / weight.sum()
        mean = sum(w * candidates[s] for w, s in zip(weight, best, strict=True))
        variance = sum(w * (candidates[s] - mean) ** 2 for w, s in zip(weight, best, strict=True))
        std = variance.sqrt().clamp(MIN_STD, 1.0)
    first = mean[0] * mask
    first = first * min(1.0, (2.0 * cfg.max_acting_kl) ** 0.5 / first.norm().clamp_min(1e-12).item())
    mean = torch.cat([first.unsqueeze(0), mean[1:]])
    policy, gradient, plan = returns[0].item(), returns[2].item(), value(mean)
    if plan < gradient:
        first = shift * mask
    return mu + sigma * first, (max(plan, gradient) - policy) / spread.item()
