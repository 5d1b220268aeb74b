"""How a plan is executed: projected onto a trust region around the prior, or as a draw among the elites."""

from __future__ import annotations

import math

import torch

from m3po.planning.mppi import Plan


def project(mu: torch.Tensor, sigma: torch.Tensor, plan_mean: torch.Tensor, max_kl: float) -> torch.Tensor:
    """Mean ``m = mu + s * (m_mppi - mu)`` with ``KL(N(m, sigma) || N(mu, sigma)) <= max_kl``.

    Args:
        mu: Prior mean, shape (n, A).
        sigma: Prior deviation, shape (n, A); 0 marks a masked dimension.
        plan_mean: Planned mean, shape (n, A).
        max_kl: Trust region, nats. ``inf`` leaves the plan as it is.

    Returns:
        Projected mean, shape (n, A); exactly ``mu`` where the plan equals it.
    """
    offset = plan_mean - mu
    norm = (offset / sigma.clamp_min(1e-6)).norm(dim=-1, keepdim=True)
    scale = (math.sqrt(2.0 * max_kl) / norm.clamp_min(1e-12)).clamp(max=1.0)
    return torch.where(offset == 0, mu, mu + scale * offset)


def gaussian_log_prob(x: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """Log-density of a diagonal Gaussian, summed over the last dimension. Shapes (..., A) -> (...,)."""
    return (-0.5 * ((x - mean) / std).square() - std.log() - 0.5 * math.log(2.0 * math.pi)).sum(-1)


def draw_elite(plan: Plan, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Paper execution: an elite drawn by its weight plus noise, and the log-density of that mixture.

    Args:
        plan: The plan.
        generator: Source of the draw.

    Returns:
        Actions (n, A) and ``log beta`` (n,).
    """
    index = torch.multinomial(plan.elite_weights, 1, generator=generator)
    centre = plan.elites.gather(1, index.unsqueeze(-1).expand(-1, -1, plan.elites.shape[-1])).squeeze(1)
    noise = torch.randn(centre.shape, generator=generator, device=centre.device)
    action = centre + plan.elite_std * noise
    components = gaussian_log_prob(action.unsqueeze(1), plan.elites, plan.elite_std.unsqueeze(1))
    return action, torch.logsumexp(plan.elite_weights.log() + components, dim=1)
