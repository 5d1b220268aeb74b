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
    return loss.mean(), ((r - 1.0).abs() > clip_param).float().mean().detach()


def value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, clip_param: float, clipped: bool
) -> torch.Tensor:
    """Squared error of the critic, optionally with PPO2's clipped update. All (B,); returns a scalar."""
    errors = (values - returns).pow(2)
    if not clipped:
        return errors.mean()
    moved = old_values + (values - old_values).clamp(-clip_param, clip_param)
    return torch.max(errors, (moved - returns).pow(2)).mean()


def distillation_loss(
    mean: torch.Tensor, std_old: torch.Tensor, plan_mean: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """``KL(N(m, sigma) || N(mu, sigma))`` where the plan is predicted to be better, averaged over the whole batch.

    Args:
        mean: Mean of the policy being trained, (B, A).
        std_old: Deviation at the rollout, (B, A).
        plan_mean: Executed plan's mean, (B, A).
        weight: 1 where the plan is to be imitated, else 0, (B,).

    Returns:
        Scalar loss.
    """
    kl = 0.5 * ((mean - plan_mean) / std_old).square().sum(-1)
    return (weight * kl).mean()
