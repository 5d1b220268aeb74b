"""The policy's objectives as pure functions of (B,) tensors."""

from __future__ import annotations

import torch


def surrogate_loss(
    log_pi: torch.Tensor,
    log_pi_old: torch.Tensor,
    log_beta: torch.Tensor,
    advantage: torch.Tensor,
    clip_param: float,
    ratio: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Clipped surrogate (8)-(9).

    ``prior`` is the paper's PPO objective with ``r = pi / pi_old``. ``decoupled`` weighs it by
    ``rho_bar = min(1, pi_old / beta)`` (arXiv 2110.00641 with V-trace's truncation), because planned actions were
    drawn from ``beta``.

    Args:
        log_pi: Log-probability under the policy being trained, (B,).
        log_pi_old: Log-probability under the policy of the rollout, (B,).
        log_beta: Log-probability under the behaviour, (B,).
        advantage: Advantages, (B,).
        clip_param: Clipping range.
        ratio: ``decoupled`` or ``prior``.

    Returns:
        Scalar loss, and the share of clipped ratios (scalar, no gradient).
    """
    r = torch.exp(log_pi - log_pi_old)
    loss = torch.max(-advantage * r, -advantage * r.clamp(1.0 - clip_param, 1.0 + clip_param))
    if ratio == "decoupled":
        loss = loss * torch.exp(log_pi_old - log_beta).clamp(max=1.0)
    return loss.mean(), ((r - 1.0).abs() > clip_param).to(r.dtype).mean().detach()


def value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, clip_param: float
) -> torch.Tensor:
    """Squared error of the critic with PPO2's clipped update. All (B,); returns a scalar."""
    moved = old_values + (values - old_values).clamp(-clip_param, clip_param)
    return torch.max((values - returns).pow(2), (moved - returns).pow(2)).mean()
