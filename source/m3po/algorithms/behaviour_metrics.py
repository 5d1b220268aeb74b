"""What a rollout says of its behaviour: how far it was from the policy, and whether that paid."""

from __future__ import annotations

import torch

from m3po import distributed
from m3po.algorithms.statistics import count_per_task, explained_variance, mean_per_task
from m3po.storage import RolloutStorage


def behaviour_metrics(rollout: RolloutStorage, units: torch.Tensor, num_tasks: int, execution: str) -> dict[str, float]:
    """Figures of a finished rollout, over all processes.

    Args:
        rollout: Rollout with returns and standardised advantages.
        units: Reward units of the critic's output, (T, N).
        num_tasks: Tasks K.
        execution: How plans were executed, as :attr:`~m3po.config.PlannerCfg.execution`.

    Returns:
        Planned share, KL and predicted gain of the plans, share of them that was predicted to be better, and the gain
        that the rest of the rollout shows; effective sample size of the ratios; explained variance of the returns.
    """
    st, planned = rollout, rollout.planned
    rho = (st.log_pi - st.log_beta).exp().clamp(max=1.0)
    if execution == "projected":
        kl = 0.5 * ((st.plan_mean - st.mean) / st.std).square().sum(-1)
    else:
        kl = st.log_beta - st.log_pi
    value_ev = explained_variance(st.values / units, st.returns / units, ~st.invalid, st.task, num_tasks)
    realised, planned_steps = gain_of_plans(st.advantages, planned, st.invalid, st.task, num_tasks)
    parts = (torch.ones_like(rho), planned, kl * planned, st.plan_gain * planned, (st.plan_gain > 0) & planned)
    sums = distributed.total(torch.stack([x.sum().to(rho) for x in (*parts, rho, rho.square())])).tolist()
    samples, count, kl_sum, gain, accepted, rho_sum, rho_squares = sums
    return {
        "planner/planned_fraction": count / samples,
        "planner/kl": kl_sum / max(1, count),
        "planner/gain": gain / max(1, count),
        "planner/accepted": accepted / max(1, count),
        "planner/realised_gain": realised.sum().item() / max(1, int((planned_steps > 0).sum())),
        "policy/effective_sample_size": rho_sum**2 / rho_squares / samples,
        "policy/value_ev": value_ev.mean().item(),
    }


def gain_of_plans(
    advantages: torch.Tensor, planned: torch.Tensor, invalid: torch.Tensor, task: torch.Tensor, num_tasks: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean advantage of the planned steps of each task minus that of its others.

    Args:
        advantages: Advantages, in stds of the task's, (T, N).
        planned: Whether a plan was acted on, (T, N).
        invalid: Steps that never took place, (T, N).
        task: Task ids, (T, N).
        num_tasks: Tasks K.

    Returns:
        Gains, (K,), and the planned steps that they were told from, (K,); both 0 where there is nothing to compare.
    """
    groups = [planned & ~invalid, ~planned & ~invalid]
    steps, others = (count_per_task(group, task, num_tasks) for group in groups)
    acted, sampled = (mean_per_task(advantages, group, task, num_tasks) for group in groups)
    both = (steps > 0) & (others > 0)
    return torch.where(both, acted - sampled, 0.0), torch.where(both, steps, 0.0)
