"""What a rollout says of its behaviour: how far it was from the policy, and whether that paid."""

from __future__ import annotations

import torch

from m3po import distributed
from m3po.algorithms.gates import Gates
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
        Planned share, KL and predicted gain of the plans, share of them that was predicted to be better; effective
        sample size of the ratios; explained variance of the returns.
    """
    st, planned = rollout, rollout.planned
    rho = (st.log_pi - st.log_beta).exp().clamp(max=1.0)
    if execution == "projected":
        kl = 0.5 * ((st.plan_mean - st.mean) / st.std).square().sum(-1)
    else:
        kl = st.log_beta - st.log_pi
    value_ev = explained_variance(st.values / units, st.returns / units, ~st.lost, st.task, num_tasks)
    parts = (torch.ones_like(rho), planned, kl * planned, st.plan_gain * planned, (st.plan_gain > 0) & planned)
    sums = distributed.total(torch.stack([x.sum().to(rho) for x in (*parts, rho, rho.square())])).tolist()
    samples, count, kl_sum, gain, accepted, rho_sum, rho_squares = sums
    return {
        "planner/share": count / samples,
        "planner/kl": kl_sum / max(1, count),
        "planner/gain": gain / max(1, count),
        "planner/accepted": accepted / max(1, count),
        "policy/effective_sample_size": rho_sum**2 / rho_squares / samples,
        "policy/value_ev": value_ev.mean().item(),
    }


def measure_realised_gain(rollout: RolloutStorage, gates: Gates) -> dict[str, float]:
    """Advantage of planned environments over the others, in stds, mean of the tasks that have both; else 0.

    One rollout says little: its environments differ by more than their actions. The gates keep the mean over many.
    """
    advantages, task, count = rollout.advantages, rollout.task, len(gates.realised)
    groups = [rollout.planned & ~rollout.lost, ~rollout.planned & ~rollout.lost]
    planned, others = (mean_per_task(advantages, group, task, count) for group in groups)
    steps = [count_per_task(group, task, count) for group in groups]
    both = (steps[0] > 0) & (steps[1] > 0)
    realised = torch.where(both, planned - others, 0.0)
    gates.update_realised(realised, torch.where(both, steps[0], 0.0))
    return {"planner/realised_gain": realised.sum().item() / max(1, int(both.sum()))}
