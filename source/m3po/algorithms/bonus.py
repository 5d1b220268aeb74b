"""Exploration bonus (4)-(7): the gap between what happened and what the world model predicted (arXiv 1811.07350).

Before a task's first reward its values are 0, and so is the paper's gap. Fixed random linear functions of the latent
stand beside the value, so that the gap shows what is new. The bonus is off by itself once episodes are rewarded.
"""

from __future__ import annotations

import torch

from m3po import distributed
from m3po.algorithms.gates import Gates
from m3po.algorithms.statistics import mean_per_task
from m3po.algorithms.tasks import Tasks
from m3po.config import BonusCfg
from m3po.planning import Objective
from m3po.storage import ReplayBuffer, RolloutStorage

PERCENTILE = 0.9
"""Gaps are measured in their distance between the median and this percentile, per task."""

LARGEST = 3.0
"""Bound of a centred gap."""

FLOOR = 0.3
"""Bound of the bonus where the advantage is smaller, stds of the advantage."""

TRAJECTORY = 64
"""Newest steps of an environment in which a reward is looked for."""

LARGEST_ALPHA = 1.0
"""Bound of the automatic weight."""


class ExplorationBonus:
    """Adds the bonus to the advantages of a rollout."""

    def __init__(self, objective: Objective, gates: Gates, tasks: Tasks, cfg: BonusCfg, seed: int) -> None:
        """Draw the random functions.

        Args:
            objective: Imagined values.
            gates: They say which tasks are rewarded.
            tasks: Tasks of the environments.
            cfg: Configuration.
            seed: Seed of the functions.
        """
        self.objective, self.gates, self.tasks, self.cfg = objective, gates, tasks, cfg
        model = objective.model
        generator = torch.Generator().manual_seed(seed)
        functions = torch.randn(model.anchor_dim + model.cfg.features, cfg.num_functions, generator=generator)
        self.functions = functions.to(tasks.ids.device) / max(1, functions.shape[0]) ** 0.5
        """Fixed random linear functions of the latent, (Z, F)."""

    @torch.no_grad()
    def add(
        self, st: RolloutStorage, replay: ReplayBuffer, advantage_std: torch.Tensor, progress: float
    ) -> dict[str, float]:
        """Add the bonus (7) to the advantages of a rollout.

        Args:
            st: Finished rollout with standardised advantages.
            replay: Replay buffer, the rollout in it.
            advantage_std: Std of each task's advantages before they were standardised, (K,).
            progress: Share of the training iterations that are done, in [0, 1].

        Returns:
            ``bonus/alpha``, and the means of the gap and of the size of the bonus.
        """
        metrics = {"bonus/alpha": 0.0, "bonus/gap": 0.0, "bonus/mean_abs": 0.0}
        task, count = st.task.flatten(), self.tasks.count
        if not self.cfg.literal:
            self._measure_rewarded(replay)  # without a bonus too: steps of the world model follow it
        wanted = self.gates.unrewarded()
        if self.cfg.size == 0.0 or not (self.cfg.literal or wanted.any()):
            return metrics
        gaps = self.gaps(st, advantage_std)
        # A model whose predictions are not finite must not reach the policy.
        valid = (st.next_obs_valid & ~st.invalid).flatten() & gaps.isfinite().all(-1)
        gaps = torch.where(valid.unsqueeze(-1), gaps, 0.0)
        advantages = st.advantages.flatten()
        if self.cfg.literal:
            eps = gaps[:, 0]
            centred = (eps - mean_per_task(eps, valid, task, count)[task]) * valid
            alpha = torch.full((count,), max(0.0, 1.0 - progress), device=eps.device)
            bound = advantages.abs()
        else:
            scale = mean_per_task(gaps.square(), valid, task, count).sqrt().clamp_min(1e-8)
            eps = (gaps / scale[task]).square().mean(-1).sqrt()
            centred = self._centred(eps, valid, task)
            sizes = [mean_per_task(x.abs(), valid, task, count) for x in (advantages, centred)]
            automatic = self.cfg.size * sizes[0].clamp_min(FLOOR) / sizes[1].clamp_min(1e-8)
            # Nothing else tells where to go while a task has no reward at all.
            seen = (self.gates.rewarded > 0.0).to(automatic.dtype)
            alpha = wanted * torch.lerp(torch.ones_like(automatic), automatic, seen).clamp(max=LARGEST_ALPHA)
            bound = advantages.abs().clamp_min(FLOOR)
        bonus = torch.minimum(torch.maximum(alpha[task] * centred, -bound), bound)
        st.advantages.add_(bonus.view_as(st.advantages))
        means = distributed.mean(torch.stack((eps.mean(), bonus.abs().mean())), weight=len(eps)).tolist()
        return metrics | {"bonus/alpha": alpha.mean().item(), "bonus/gap": means[0], "bonus/mean_abs": means[1]}

    def gaps(self, st: RolloutStorage, advantage_std: torch.Tensor) -> torch.Tensor:
        """Equations (4)-(6), ``eps = abs(Q_mf - Q_mb)`` in stds of the advantage, and the gaps of the functions.

        The true continuation mask stands on both sides; otherwise each termination would earn about ``gamma abs(V)``.

        Returns:
            Gaps, (B, 1 + F).
        """
        objective, model, task = self.objective, self.objective.model, st.task.flatten()
        alive = (~st.terminated.flatten()).to(st.rewards.dtype)
        gamma = self.tasks.discounts[task]
        obs, next_obs = st.obs.flatten(0, 1), st.next_obs.flatten(0, 1)
        z, target = objective.encode(obs, task), objective.encode(next_obs, task)
        predicted, reward, _ = model.step(z, st.actions.flatten(0, 1), task)
        reward = torch.where(st.terminated.flatten(), model.terminations.terminal[task], reward)
        q_mf = st.rewards.flatten() + gamma * alive * objective.value(target, task)
        q_mb = reward + gamma * alive * objective.value(predicted, task)
        off = target - predicted
        if model.anchor_dim:
            x = off[:, : model.anchor_dim] * (model.own_dims / model.changes.stds())[task]
            off = torch.cat([x, off[:, model.anchor_dim :]], dim=-1)
        return torch.cat([((q_mf - q_mb) / advantage_std[task]).unsqueeze(-1), off @ self.functions], dim=-1).abs()

    def _centred(self, eps: torch.Tensor, valid: torch.Tensor, task: torch.Tensor) -> torch.Tensor:
        """``(eps - median) / (percentile - median)`` within each task, over all processes, bounded; (B,)."""
        centred = torch.zeros_like(eps)
        everyone, everyones_task = distributed.gather(eps[valid]), distributed.gather(task[valid])
        for k in range(self.tasks.count):
            mine, own = (task == k) & valid, everyone[everyones_task == k]
            if own.numel() == 0:
                continue
            median, high = own.median(), own.kthvalue(max(1, round(PERCENTILE * own.numel()))).values
            centred[mine] = ((eps[mine] - median) / (high - median).clamp_min(1e-8)).clamp(-LARGEST, LARGEST)
        return centred

    def _measure_rewarded(self, replay: ReplayBuffer) -> None:
        """Share of the environments' newest trajectories with any reward other than 0."""
        steps = replay.latest(TRAJECTORY, ("rewards", "invalid", "task"))
        any_reward = ((steps["rewards"] != 0.0) & ~steps["invalid"]).any(0)
        task = steps["task"][-1]
        everyone, dtype = torch.ones_like(any_reward), steps["rewards"].dtype
        seen = mean_per_task(everyone.to(dtype), everyone, task, self.tasks.count) > 0
        self.gates.update_rewarded(mean_per_task(any_reward.to(dtype), everyone, task, self.tasks.count), seen)
