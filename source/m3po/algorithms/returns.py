"""Advantages and value targets: GAE (arXiv 1506.02438) and V-trace (arXiv 1802.01561), with true terminations.

All tensors have shape (T, N). ``next_values[t]`` is the value of the state that step ``t`` led to *before* any reset:
on a time-out that is the final observation's value.
"""

from __future__ import annotations

import torch


def gae(
    rewards: torch.Tensor,
    values: torch.Tensor,
    next_values: torch.Tensor,
    terminated: torch.Tensor,
    dones: torch.Tensor,
    gamma: float | torch.Tensor,
    lam: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation.

    Args:
        rewards: Rewards, (T, N).
        values: ``V(s_t)``, (T, N).
        next_values: ``V(s_{t+1})`` before resets, (T, N).
        terminated: True terminations, (T, N), boolean: the value beyond them is 0.
        dones: Any end of an episode, (T, N), boolean: no advantage flows across it.
        gamma: Discount, one number or one for each environment (N,).
        lam: Lambda.

    Returns:
        Returns and advantages, (T, N) each.
    """
    returns = torch.empty_like(values)
    advantage = torch.zeros_like(values[0])
    deltas = rewards + gamma * next_values * (~terminated) - values
    for t in reversed(range(rewards.shape[0])):
        advantage = deltas[t] + gamma * lam * (~dones[t]) * advantage
        returns[t] = advantage + values[t]
    return returns, returns - values


def vtrace(
    rewards: torch.Tensor,
    values: torch.Tensor,
    next_values: torch.Tensor,
    terminated: torch.Tensor,
    dones: torch.Tensor,
    log_ratio: torch.Tensor,
    gamma: float | torch.Tensor,
    lam: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """V-trace targets with both truncations at 1.

    Args:
        rewards: Rewards, (T, N).
        values: ``V(s_t)``, (T, N).
        next_values: ``V(s_{t+1})`` before resets, (T, N).
        terminated: True terminations, (T, N), boolean.
        dones: Any end of an episode, (T, N), boolean.
        log_ratio: ``log pi - log beta`` of the executed actions, (T, N).
        gamma: Discount, one number or one for each environment (N,).
        lam: Lambda; scales the trace coefficient.

    Returns:
        Targets ``v_t`` and advantages ``r_t + gamma * v_{t+1} - V(s_t)``, (T, N) each.
    """
    rho = log_ratio.exp().clamp(max=1.0)
    alive, within = ~terminated, ~dones
    deltas = rho * (rewards + gamma * next_values * alive - values)
    targets, advantages = torch.empty_like(values), torch.empty_like(values)
    correction = torch.zeros_like(values[0])
    for t in reversed(range(rewards.shape[0])):
        # v_{t+1} differs from V(s_{t+1}) by the trace of the steps that follow, unless the episode ended here.
        advantages[t] = rewards[t] + gamma * alive[t] * (next_values[t] + within[t] * correction) - values[t]
        correction = deltas[t] + gamma * lam * rho[t] * within[t] * correction
        targets[t] = values[t] + correction
    return targets, advantages
