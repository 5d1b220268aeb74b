"""Densities of the behaviours that a plan induces: a Gaussian on the trust region, or a draw among the elites.

The projection onto the trust region itself is a kernel, :func:`m3po.kernels.elites.project`.
"""

from __future__ import annotations

import math

import torch

from m3po.planning.mppi import Plan


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
    index = torch.multinomial(plan.weights, 1, generator=generator)
    centre = plan.candidates.gather(1, index.unsqueeze(-1).expand(-1, -1, plan.candidates.shape[-1])).squeeze(1)
    noise = torch.randn(centre.shape, generator=generator, device=centre.device)
    action = centre + plan.std * noise
    # Dimensions that a task lacks have std 0; as in the policy's own density, they count as 0 with std 1.
    std = torch.where(plan.std > 0.0, plan.std, 1.0)
    components = gaussian_log_prob(action.unsqueeze(1), plan.candidates, std.unsqueeze(1))
    return action, torch.logsumexp(plan.weights.log() + components, dim=1)
