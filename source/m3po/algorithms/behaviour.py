"""The behaviour ``beta``: the policy everywhere, improved by the planner in a share of the environments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from rsl_rl.models import MLPModel
from tensordict import TensorDict

from m3po import distributed
from m3po.algorithms.gates import Gates
from m3po.algorithms.policy_outputs import PolicyOutputs
from m3po.algorithms.tasks import Tasks
from m3po.config import PlannerCfg
from m3po.models.task_policy import task_of
from m3po.planning import MPPIPlanner, Objective, Plan, PlanInputs
from m3po.planning.mppi import MAX_NOISE
from m3po.planning.trust_region import draw_elite, gaussian_log_prob
from m3po.text import listed


@dataclass
class BehaviourSample:
    """What was decided for N environments."""

    actions: torch.Tensor
    """Actions to execute, (N, A)."""

    mean: torch.Tensor
    """Mean of the policy, (N, A)."""

    std: torch.Tensor
    """Std of the policy, (N, A)."""

    plan_mean: torch.Tensor
    """Mean of the behaviour, (N, A); the policy's where nothing was planned."""

    plan_gain: torch.Tensor
    """Predicted gain of the plan over the policy, (N,), in stds of the candidates' returns."""

    planned: torch.Tensor
    """Whether an environment was planned, (N,), boolean."""

    log_pi: torch.Tensor
    """Log-probability of the action under the policy, (N,)."""

    log_beta: torch.Tensor
    """Log-probability of the action under the behaviour, (N,)."""


class Behaviour:
    """Chooses actions while collecting; the planned share rotates over the environments with every rollout."""

    def __init__(
        self, actor: MLPModel, objective: Objective, gates: Gates, cfg: PlannerCfg, tasks: Tasks, seed: int
    ) -> None:
        """Bind the behaviour to a policy and an objective.

        Args:
            actor: Policy.
            objective: Imagined return.
            gates: They say how many environments are planned, and how far.
            cfg: Planner.
            tasks: Tasks of the environments.
            seed: Seed of the planner's noise, the same in all processes.
        """
        self.actor, self.objective, self.gates, self.cfg, self.tasks = actor, objective, gates, cfg, tasks
        self.planner = MPPIPlanner(objective, cfg, seed)
        self.gated = cfg.max_learning_kl > 0.0
        """Whether gates decide, as they do where plans contain the gradient."""
        device = tasks.ids.device
        self.generator = torch.Generator(device=device).manual_seed(seed + distributed.rank())
        self.first_env = distributed.rows_before(len(tasks.ids), device)
        """Where the environments of this process begin among those of all, whose numbers key the planner's noise."""
        self.step = torch.zeros((), dtype=torch.int64, device=device)
        """Steps so far, which key the planner's noise."""
        self._fallbacks, self._plans = torch.zeros_like(tasks.ids), 0
        self._rows = [(tasks.ids == k).nonzero().squeeze(-1) for k in range(tasks.count)]
        self._first = [0] * tasks.count
        self._choose(torch.zeros(tasks.count) if self.gated else torch.ones(tasks.count))

    def _choose(self, part: torch.Tensor) -> None:
        """Set :attr:`planned_ids`, a part (K,) of the largest share, until the next call.

        Where that share is an environment or more, any part of it is at least one: it goes on measuring.
        """
        most = [self.cfg.planned_fraction * len(rows) for rows in self._rows]
        pairs = zip(part.tolist(), most, strict=True)
        self._count = [max(round(p * m), min(1, round(m))) if p > 0.0 else 0 for p, m in pairs]
        chosen = []
        for first, count, rows in zip(self._first, self._count, self._rows, strict=True):
            chosen.append(rows[(first + torch.arange(count, device=rows.device)) % max(1, len(rows))])
        self.planned_ids = torch.cat(chosen)
        self._ids_beyond = self.planned_ids + self.first_env

    def sample(self, obs: TensorDict) -> BehaviourSample:
        """Sample the policy in all environments, exactly as rsl_rl's PPO does."""
        actions = self.actor(obs, stochastic_output=True).detach()
        mean, std = (p.detach() for p in self.actor.output_distribution_params)
        std = std.expand_as(mean)
        log_pi = self.actor.get_output_log_prob(actions).detach()
        none = torch.zeros_like(log_pi)
        return BehaviourSample(actions, mean, std, mean, none, none.bool(), log_pi, log_pi)

    def plan(self, obs: TensorDict, policy: BehaviourSample) -> BehaviourSample:
        """Replace the policy's actions by planned ones in this rollout's share of the environments."""
        ids = self.planned_ids
        mu, sigma, action = policy.mean[ids], policy.std[ids], policy.actions[ids]
        plan, usable = self._plan(obs[ids], mu, sigma, self.tasks.ids[ids], self._ids_beyond, self.step)
        self._fallbacks.index_add_(0, ids, (~usable).long())
        self._plans += len(ids)
        before = gaussian_log_prob(action, mu, sigma)
        if self.cfg.execution == "projected":
            m = self._accept(plan.gain, mu, plan.mean)
            # The policy's own draw is kept, only its mean moves: a plan of length 0 changes nothing, bit for bit.
            action = action + (m - mu)
            excess = gaussian_log_prob(action, m, sigma) - gaussian_log_prob(action, mu, sigma)
        else:
            drawn, log_beta = draw_elite(plan, self.generator)
            m, excess = plan.mean, log_beta - gaussian_log_prob(drawn, mu, sigma)
            action = torch.where(usable.unsqueeze(-1), drawn, action)
            excess = torch.where(usable, excess, 0.0)
        # Dimensions that a task lacks are 0 before and after, so they cancel.
        log_pi = policy.log_pi.index_add(0, ids, gaussian_log_prob(action, mu, sigma) - before)
        return BehaviourSample(
            actions=policy.actions.index_copy(0, ids, action),
            mean=policy.mean,
            std=policy.std,
            plan_mean=policy.mean.index_copy(0, ids, m),
            plan_gain=policy.plan_gain.index_copy(0, ids, plan.gain),
            planned=policy.planned.index_copy(0, ids, usable),
            log_pi=log_pi,
            log_beta=log_pi.index_add(0, ids, excess),
        )

    def _plan(
        self,
        obs: TensorDict,
        mu: torch.Tensor,
        sigma: torch.Tensor,
        task: torch.Tensor,
        env_ids: torch.Tensor,
        step: torch.Tensor,
    ) -> tuple[Plan, torch.Tensor]:
        """Plans of n environments, and where they are finite, (n,)."""
        z, mask = self.objective.encode(obs, task), self.tasks.action_mask[task]
        shift = torch.zeros_like(mu)
        if self.gated:
            radius = min((2.0 * self.cfg.max_acting_kl) ** 0.5, MAX_NOISE)
            shift = self.objective.gradient(z, mu, sigma, task) * mask / self.gates.gradient_size[task].unsqueeze(-1)
            shift = shift * radius / shift.norm(dim=-1, keepdim=True).clamp_min(1.0)
            shift = shift * self.gates.trust(self.cfg.full_gain)[task].unsqueeze(-1)
        return _usable(self.planner.plan(PlanInputs(z, mu, sigma, shift, task, env_ids, step, mask)), mu, sigma)

    def read_fallbacks(self) -> float:
        """Share of the plans since the last call that were not finite and gave way to the policy; names them if any."""
        times, plans = self._fallbacks.tolist(), max(1, self._plans)
        self._fallbacks.zero_()
        self._plans = 0
        environments = [index for index, count in enumerate(times) if count]
        if environments:
            share = f"{sum(times)} of {plans} plans were not finite"
            print(f"[m3po] planner: {share}, so the policy acted; {listed(environments)}", flush=True)
        return sum(times) / plans

    def rotate(self) -> None:
        """Plan with what was learnt, for the next share of each task's environments, as large as the gates say."""
        for k, rows in enumerate(self._rows):
            self._first[k] = (self._first[k] + self._count[k]) % max(1, len(rows))
        self._choose(self.gates.acting().cpu() if self.gated else torch.ones(self.tasks.count))

    def state_dict(self) -> dict:
        """What :meth:`load_state_dict` needs, as plain values."""
        return {"first_planned": self._first, "num_planned": self._count, "step": int(self.step)}

    def load_state_dict(self, state: dict) -> None:
        """Go on from :meth:`state_dict`."""
        self._first = list(state["first_planned"])
        self.step.fill_(state["step"])
        counts = zip(state["num_planned"], self._rows, strict=True)
        most = [max(1.0, self.cfg.planned_fraction * len(rows)) for rows in self._rows]
        self._choose(torch.tensor([count / m for (count, _), m in zip(counts, most, strict=True)]))

    def planner_policy(self, actor: MLPModel) -> Callable[[TensorDict], torch.Tensor]:
        """A noise-free policy that plans in every environment, around another policy than the newest.

        Plans go as far as the update of a rollout would: the policy is played as it would be after learning from them.
        They are shorter where acting on them was worth less while training, and 0 where it was worth nothing.

        Args:
            actor: The policy.

        Returns:
            From observations, batch size (n,), to actions (n, A).
        """
        other = Behaviour(actor, self.objective.of(actor), self.gates, self.cfg, self.tasks, self.planner.seed)
        outputs = PolicyOutputs(actor)

        @torch.no_grad()
        def act(obs: TensorDict) -> torch.Tensor:
            mean, std = outputs(obs)
            ids = torch.arange(len(mean), device=mean.device)
            task = task_of(obs) if self.tasks.count > 1 else torch.zeros_like(ids)
            plan, _ = other._plan(obs, mean, std, task, ids, other.step)
            other.step += 1
            if self.cfg.execution == "mppi":
                return plan.mean
            part = self._played_part()[task].unsqueeze(-1) if self.gated else 1.0
            return mean + part * (self._accept(plan.gain, mean, plan.mean) - mean)

        return act

    def _played_part(self) -> torch.Tensor:
        """Part of a plan that is played, of its length, (K,)."""
        longest = min(self.cfg.max_acting_kl, 0.5 * MAX_NOISE**2)
        update = self.cfg.max_learning_kl * self.gates.plan_budget / longest
        return self.gates.worth_acting() * update.clamp(max=1.0).sqrt()

    @staticmethod
    def _accept(gain: torch.Tensor, mu: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        """The plan, or the policy where the model itself ranks the plan below it."""
        return torch.where((gain > 0).unsqueeze(-1), m, mu)


def _usable(plan: Plan, mu: torch.Tensor, sigma: torch.Tensor) -> tuple[Plan, torch.Tensor]:
    """Replace plans that are not finite, because the model's predictions were not, by the policy.

    Args:
        plan: The plans.
        mu: Mean of the policy, (n, A).
        sigma: Std of the policy, (n, A).

    Returns:
        The plans, and where they were finite, (n,), boolean.
    """
    usable = plan.gain.isfinite() & torch.stack((plan.mean, plan.std)).isfinite().all(0).all(-1)
    row = usable.unsqueeze(-1)
    plan = Plan(
        mean=torch.where(row, plan.mean, mu),
        gain=torch.where(usable, plan.gain, 0.0),
        candidates=plan.candidates,  # as they are: what is drawn among them is not used
        weights=torch.where(row, plan.weights, 1.0),  # or the draw would fail
        std=torch.where(row, plan.std, sigma),
    )
    return plan, usable
