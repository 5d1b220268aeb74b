"""Exploration bonus (4)-(7): the gap between model-free and model-based value estimates (after arXiv 1811.07350)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tensordict import TensorDict

from m3po import distributed
from m3po.config import BonusCfg
from m3po.models import WorldModel
from m3po.storage import RolloutStorage


@torch.no_grad()
def value_gap(
    model: WorldModel,
    obs: torch.Tensor,
    action: torch.Tensor,
    reward: torch.Tensor,
    next_obs: torch.Tensor,
    terminated: torch.Tensor,
    task: torch.Tensor,
    gamma: torch.Tensor,
) -> torch.Tensor:
    """Equations (4)-(6): ``eps = abs(Q_mf - Q_mb)`` in reward units.

    The true continuation mask stands on both sides; otherwise every fall would earn about ``gamma * abs(V)``.

    Args:
        model: World model.
        obs: Observations, shape (B, O).
        action: Executed actions, shape (B, A).
        reward: Rewards, shape (B,).
        next_obs: Observations before any reset, shape (B, O).
        terminated: True terminations, shape (B,), boolean.
        task: Task ids, shape (B,).
        gamma: Discounts, shape (B,).

    Returns:
        The gap, shape (B,), reward units.
    """
    e = model.embed(task)
    z = model.encode(obs, task)
    scale = model.rewards.scale(task)
    alive = (~terminated).to(reward.dtype)
    predicted_z, reward_logits, _ = model.predict(z, action, e)
    predicted_reward = model.two_hot.decode(reward_logits)
    if model.cfg.terminal_reward:
        predicted_reward = torch.where(terminated, model.rewards.terminal[task] / scale, predicted_reward)
    q_mf = reward / scale + gamma * alive * model.value(model.encode(next_obs, task), e)
    q_mb = predicted_reward + gamma * alive * model.value(predicted_z, e)
    return (q_mf - q_mb).abs() * scale


def centre(eps: torch.Tensor, task: torch.Tensor, num_tasks: int, mode: str) -> torch.Tensor:
    """Centre the gap within each task, over all processes.

    Args:
        eps: Gaps in deviations of the advantage, shape (B,).
        task: Task ids, shape (B,).
        num_tasks: Number of tasks K.
        mode: ``mean`` subtracts the mean (7); ``robust`` is ``(eps - median) / MAD`` clipped to [-3, 3].

    Returns:
        Centred gaps, shape (B,).
    """
    centred = torch.zeros_like(eps)
    everyone, everyones_task = distributed.gather(eps), distributed.gather(task)
    for k in range(num_tasks):
        mine, own = task == k, everyone[everyones_task == k]
        if own.numel() == 0:
            continue
        if mode == "mean":
            centred[mine] = eps[mine] - own.mean()
        else:
            median = own.median()
            # 1.4826 * MAD estimates the deviation of a Gaussian.
            scale = (1.4826 * (own - median).abs().median()).clamp_min(1e-8)
            centred[mine] = ((eps[mine] - median) / scale).clamp(-3.0, 3.0)
    return centred


def add_bonus(advantage: torch.Tensor, centred: torch.Tensor, alpha: float, floor: float) -> torch.Tensor:
    """Equation (7): ``A + clip(alpha * centred, -abs(A), +abs(A))``: never flips a sign, never more than doubles.

    Args:
        advantage: Advantages, any shape.
        centred: Centred gaps, same shape.
        alpha: Weight of the bonus.
        floor: The bound is ``max(abs(A), floor)``; 0 is the paper's.

    Returns:
        Advantages with the bonus, same shape.
    """
    bound = advantage.abs().clamp_min(floor)
    return advantage + torch.minimum(torch.maximum(alpha * centred, -bound), bound)


def annealed_alpha(cfg: BonusCfg, progress: float) -> float:
    """Weight of the bonus at a share ``progress`` in [0, 1] of the training: linear from ``alpha`` to 0."""
    if cfg.anneal_fraction <= 0.0:
        return 0.0
    return cfg.alpha * max(0.0, 1.0 - progress / cfg.anneal_fraction)


def apply_bonus(
    rollout: RolloutStorage,
    model: WorldModel,
    model_obs: Callable[[TensorDict], torch.Tensor],
    discounts: torch.Tensor,
    advantage_std: torch.Tensor,
    alpha: float,
    cfg: BonusCfg,
) -> dict[str, float]:
    """Add the bonus (7) to the advantages of a rollout.

    Args:
        rollout: Finished rollout with standardised advantages.
        model: World model.
        model_obs: Observation groups -> the model's observation vector, (..., O).
        discounts: Discount of each task, (K,).
        advantage_std: Deviation of each task's advantages before they were standardised, (K,).
        alpha: Weight of the bonus; 0 leaves everything alone.
        cfg: Configuration.

    Returns:
        ``bonus/alpha``, and the means of the gap and of the size of the bonus.
    """
    metrics = {"bonus/alpha": alpha, "bonus/gap": 0.0, "bonus/mean_abs": 0.0}
    if alpha == 0.0:
        return metrics
    st, task = rollout, rollout.task.flatten()
    gap = value_gap(
        model,
        model_obs(st.obs).flatten(0, 1),
        st.actions.flatten(0, 1),
        st.rewards.flatten(),
        model_obs(st.next_obs).flatten(0, 1),
        st.terminated.flatten(),
        task,
        discounts[task],
    )
    centred = centre(gap / advantage_std[task], task, len(advantage_std), cfg.centering)
    centred = (centred * (st.next_obs_valid & ~st.lost).flatten()).view_as(st.advantages)
    with_bonus = add_bonus(st.advantages, centred, alpha, cfg.floor)
    sizes = torch.stack((gap.mean(), (with_bonus - st.advantages).abs().mean()))
    metrics["bonus/gap"], metrics["bonus/mean_abs"] = distributed.mean(sizes, weight=len(gap)).tolist()
    st.advantages.copy_(with_bonus)
    return metrics
