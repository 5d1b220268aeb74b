"""The behaviour ``beta``: the prior everywhere, improved by the planner in a share of the environments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from rsl_rl.models import MLPModel
from tensordict import TensorDict

from m3po import distributed
from m3po.algorithms.tasks import Tasks
from m3po.config import PlannerCfg, planner_at
from m3po.models import WorldModel
from m3po.models.task_policy import task_of
from m3po.planning import Imagination, MPPIPlanner, Plan
from m3po.planning.trust_region import draw_elite, gaussian_log_prob
from m3po.text import listed


@dataclass
class Decision:
    """What was decided for N environments."""

    actions: torch.Tensor
    """Actions to execute, (N, A)."""

    mean: torch.Tensor
    """Mean of the prior, (N, A)."""

    std: torch.Tensor
    """Deviation of the prior, (N, A)."""

    plan_mean: torch.Tensor
    """Mean of the behaviour, (N, A); the prior's where nothing was planned."""

    plan_gain: torch.Tensor
    """Predicted gain of the plan over the prior, (N,), in deviations of the candidates' returns."""

    planned: torch.Tensor
    """Whether an environment was planned, (N,), boolean."""

    log_pi: torch.Tensor
    """Log-probability of the action under the prior, (N,)."""

    log_beta: torch.Tensor
    """Log-probability of the action under the behaviour, (N,)."""


class Behaviour:
    """Chooses actions while collecting; the planned share rotates over the environments with every rollout."""

    def __init__(
        self,
        actor: MLPModel,
        model: WorldModel,
        encode_obs: Callable[[TensorDict], torch.Tensor],
        cfg: PlannerCfg,
        tasks: Tasks,
        seed: int,
    ) -> None:
        """Bind the behaviour to a policy and a model.

        Args:
            actor: Policy prior.
            model: World model.
            encode_obs: Observation groups -> the model's observation vector, (..., O).
            cfg: Planner.
            tasks: Tasks of the environments.
            seed: Seed of the planner's noise, the same in all processes.
        """
        self.actor, self.model, self.encode_obs = actor, model, encode_obs
        self.tasks, self.seed = tasks, seed
        self.imagination = Imagination(model, cfg, tasks.discounts)
        self.generator = torch.Generator(device=tasks.ids.device).manual_seed(seed + distributed.rank())
        self.first_env = distributed.rows_before(len(tasks.ids), tasks.ids.device)
        """Where the environments of this process begin among those of all, whose numbers key the planner's noise."""
        self.step = 0
        self._fallbacks, self._plans = torch.zeros_like(tasks.ids), 0
        self._rows = [(tasks.ids == k).nonzero().squeeze(-1) for k in range(tasks.count)]
        self._first = [0] * tasks.count
        open_gate = cfg.min_skill is None and cfg.min_reward_ev is None
        self.planner_on = torch.full((tasks.count,), open_gate)
        """Whether each task is planned, (K,), on the host."""
        self._schedule = cfg
        self.cfg: PlannerCfg | None = None
        self.set_progress(0.0)

    def set_progress(self, progress: float) -> None:
        """Take the planner's budget of this share of the training iterations from its schedule."""
        cfg = planner_at(self._schedule, progress)
        if self.cfg != cfg:
            self.cfg = cfg
            self.planner = MPPIPlanner(self.imagination, cfg, self.seed)
            self._choose()

    def _planned(self, task: int) -> int:
        """Number of environments of a task that are planned."""
        if self.cfg.num_iterations == 0 or not self.planner_on[task]:
            return 0
        return round(self.cfg.share * len(self._rows[task]))

    def _choose(self) -> None:
        """Set :attr:`planned_ids`, the environments that are planned until the next call."""
        parts = []
        for k, rows in enumerate(self._rows):
            offset = torch.arange(self._planned(k), device=rows.device)
            parts.append(rows[(self._first[k] + offset) % max(1, len(rows))])
        self.planned_ids = torch.cat(parts)

    def prior(self, obs: TensorDict) -> Decision:
        """Sample the policy prior in all environments, exactly as rsl_rl's PPO does."""
        actions = self.actor(obs, stochastic_output=True).detach()
        mean, std = (p.detach() for p in self.actor.output_distribution_params)
        std = std.expand_as(mean)
        log_pi = self.actor.get_output_log_prob(actions).detach()
        none = torch.zeros_like(log_pi)
        return Decision(actions, mean, std, mean, none, none.bool(), log_pi, log_pi)

    def improve(self, obs: TensorDict, prior: Decision) -> Decision:
        """Replace the prior's actions by planned ones in this rollout's share of the environments."""
        ids = self.planned_ids
        mu, sigma, task = prior.mean[ids], prior.std[ids], self.tasks.ids[ids]
        z = self.model.encode(self.encode_obs(obs)[ids], task)
        plan = self.planner.plan(z, mu, sigma, task, ids + self.first_env, self.step, self._mask(task))
        plan, usable = _usable(plan, mu, sigma)
        self._fallbacks.index_add_(0, ids, (~usable).long())
        self._plans += len(ids)
        if self.cfg.execution == "projected":
            m = self._accept(plan.gain, mu, plan.projected)
            # The prior's own draw is kept, only its mean moves: zero iterations change nothing, bit for bit.
            action = prior.actions[ids] + (m - mu)
            excess = gaussian_log_prob(action, m, sigma) - gaussian_log_prob(action, mu, sigma)
        else:
            action, log_beta = draw_elite(plan, self.generator)
            m, excess = plan.mean, log_beta - gaussian_log_prob(action, mu, sigma)
            action = torch.where(usable.unsqueeze(-1), action, prior.actions[ids])
            excess = torch.where(usable, excess, 0.0)
        actions = prior.actions.index_copy(0, ids, action)
        log_pi = self.actor.get_output_log_prob(actions).detach()
        return Decision(
            actions=actions,
            mean=prior.mean,
            std=prior.std,
            plan_mean=prior.mean.index_copy(0, ids, m),
            plan_gain=prior.plan_gain.index_copy(0, ids, plan.gain),
            planned=prior.planned.index_copy(0, ids, usable),
            log_pi=log_pi,
            log_beta=log_pi.index_add(0, ids, excess),
        )

    def read_fallbacks(self) -> float:
        """Share of the plans since the last call that were not finite and gave way to the prior; names them if any."""
        times, plans = self._fallbacks.tolist(), max(1, self._plans)
        self._fallbacks.zero_()
        self._plans = 0
        environments = [index for index, count in enumerate(times) if count]
        if environments:
            share = f"{sum(times)} of {plans} plans were not finite"
            print(f"[m3po] planner: {share}, so the prior acted; {listed(environments)}", flush=True)
        return sum(times) / plans

    def rotate(self) -> None:
        """Move on to the next share of the environments of each task; called once per rollout, after :meth:`gate`."""
        for k, rows in enumerate(self._rows):
            self._first[k] = (self._first[k] + self._planned(k)) % max(1, len(rows))
        self._choose()

    def gate(self, skill: torch.Tensor, reward_ev: torch.Tensor) -> None:
        """Switch the planner on in the tasks whose model is good enough.

        Args:
            skill: Held-out skill over "no change" of each task, (K,).
            reward_ev: Explained variance of the reward of each task, (K,).
        """
        self.planner_on = torch.ones_like(self.planner_on)
        for value, least in ((skill, self.cfg.min_skill), (reward_ev, self.cfg.min_reward_ev)):
            if least is not None:
                self.planner_on &= value.cpu() >= least
        self._choose()

    def state(self) -> dict[str, list]:
        """What :meth:`restore` needs, as plain values."""
        return {"first_planned": self._first, "planner_on": self.planner_on.tolist()}

    def restore(self, first_planned: list[int], planner_on: list[bool]) -> None:
        """Go on from :meth:`state`."""
        self._first, self.planner_on = list(first_planned), torch.tensor(planner_on)
        self._choose()

    def _mask(self, task: torch.Tensor) -> torch.Tensor | None:
        """Valid action dimensions of tasks (n,), shape (n, A); ``None`` for a single task, which has them all."""
        return self.tasks.action_mask[task] if self.tasks.count > 1 else None

    def planner_policy(self) -> Callable[[TensorDict], torch.Tensor]:
        """A noise-free policy that plans in every environment: observations, batch size (n,) -> actions (n, A)."""
        step = 0
        self.imagination.model_changed()  # perhaps loaded since

        @torch.no_grad()
        def act(obs: TensorDict) -> torch.Tensor:
            nonlocal step
            decision = self.prior(obs)
            mu, sigma = decision.mean, decision.std
            ids = torch.arange(mu.shape[0], device=mu.device)
            task = task_of(obs) if self.tasks.count > 1 else torch.zeros_like(ids)
            z = self.model.encode(self.encode_obs(obs), task)
            plan = self.planner.plan(z, mu, sigma, task, ids, step, self._mask(task))
            step += 1
            plan, _ = _usable(plan, mu, sigma)
            if self.cfg.execution == "mppi":
                return plan.mean
            return self._accept(plan.gain, mu, plan.projected)

        return act

    @staticmethod
    def _accept(gain: torch.Tensor, mu: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        """The plan, or the prior where the model itself ranks the plan below it."""
        return torch.where((gain > 0).unsqueeze(-1), m, mu)


def _usable(plan: Plan, mu: torch.Tensor, sigma: torch.Tensor) -> tuple[Plan, torch.Tensor]:
    """Replace plans that are not finite, because the model's predictions were not, by the prior.

    Args:
        plan: The plans.
        mu: Mean of the prior, (n, A).
        sigma: Deviation of the prior, (n, A).

    Returns:
        The plans, and where they were finite, (n,), boolean.
    """
    actions = torch.stack((plan.mean, plan.projected, plan.std))
    usable = plan.gain.isfinite() & actions.isfinite().all(0).all(-1)
    row = usable.unsqueeze(-1)
    plan = Plan(
        mean=torch.where(row, plan.mean, mu),
        projected=torch.where(row, plan.projected, mu),
        gain=torch.where(usable, plan.gain, 0.0),
        candidates=plan.candidates,  # as they are: what is drawn among them is not used
        weights=torch.where(row, plan.weights, 1.0),  # or the draw would fail
        std=torch.where(row, plan.std, sigma),
    )
    return plan, usable
