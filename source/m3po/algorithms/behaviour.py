"""The behaviour ``beta``: the prior everywhere, improved by the planner in a share of the environments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from rsl_rl.models import MLPModel
from tensordict import TensorDict

from m3po.config import PlannerCfg, planner_at
from m3po.models import WorldModel
from m3po.planning import Imagination, MPPIPlanner
from m3po.planning.trust_region import draw_elite, gaussian_log_prob


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
        gamma: float,
        task_ids: torch.Tensor,
        seed: int,
    ) -> None:
        """Bind the behaviour to a policy and a model.

        Args:
            actor: Policy prior.
            model: World model.
            encode_obs: Observation groups -> the model's observation vector, (..., O).
            cfg: Planner.
            gamma: Discount per step.
            task_ids: Task of each environment, (N,).
            seed: Seed of the planner's noise.
        """
        self.actor, self.model, self.encode_obs = actor, model, encode_obs
        self.task_ids, self.seed = task_ids, seed
        self.imagination = Imagination(model, cfg, gamma)
        self.generator = torch.Generator(device=task_ids.device).manual_seed(seed)
        self.num_envs = task_ids.shape[0]
        self._schedule = cfg
        self.cfg: PlannerCfg | None = None
        self.set_progress(0.0)
        self.first_planned = 0
        self.step = 0
        self.planner_on = cfg.min_skill is None and cfg.min_reward_ev is None

    def set_progress(self, progress: float) -> None:
        """Take the planner's budget of this share of the training iterations from its schedule."""
        cfg = planner_at(self._schedule, progress)
        if self.cfg != cfg:
            self.cfg = cfg
            self.planner = MPPIPlanner(self.imagination, cfg, self.seed)
            self.num_planned = round(cfg.share * self.num_envs) if cfg.num_iterations > 0 else 0

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
        device = self.task_ids.device
        ids = (self.first_planned + torch.arange(self.num_planned, device=device)) % self.num_envs
        mu, sigma, task = prior.mean[ids], prior.std[ids], self.task_ids[ids]
        z = self.model.encode(self.encode_obs(obs)[ids], task)
        plan = self.planner.plan(z, mu, sigma, task, ids, self.step)
        if self.cfg.execution == "projected":
            m = self._accept(plan.gain, mu, plan.projected)
            # The prior's own draw is kept, only its mean moves: zero iterations change nothing, bit for bit.
            action = prior.actions[ids] + (m - mu)
            excess = gaussian_log_prob(action, m, sigma) - gaussian_log_prob(action, mu, sigma)
        else:
            action, log_beta = draw_elite(plan, self.generator)
            m, excess = plan.mean, log_beta - gaussian_log_prob(action, mu, sigma)
        actions = prior.actions.index_copy(0, ids, action)
        log_pi = self.actor.get_output_log_prob(actions).detach()
        return Decision(
            actions=actions,
            mean=prior.mean,
            std=prior.std,
            plan_mean=prior.mean.index_copy(0, ids, m),
            plan_gain=prior.plan_gain.index_copy(0, ids, plan.gain),
            planned=prior.planned.index_fill(0, ids, True),
            log_pi=log_pi,
            log_beta=log_pi.index_add(0, ids, excess),
        )

    def rotate(self) -> None:
        """Move on to the next share of the environments; called once per rollout."""
        self.first_planned = (self.first_planned + self.num_planned) % self.num_envs

    def gate(self, skill: float, reward_ev: float) -> None:
        """Switch the planner on while the model is good enough, given its held-out skill and explained variance."""
        thresholds = ((skill, self.cfg.min_skill), (reward_ev, self.cfg.min_reward_ev))
        self.planner_on = all(least is None or value >= least for value, least in thresholds)

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
            task = self.task_ids[: mu.shape[0]]
            plan = self.planner.plan(self.model.encode(self.encode_obs(obs), task), mu, sigma, task, ids, step)
            step += 1
            if self.cfg.execution == "mppi":
                return plan.mean
            return self._accept(plan.gain, mu, plan.projected)

        return act

    @staticmethod
    def _accept(gain: torch.Tensor, mu: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        """The plan, or the prior where the model itself ranks the plan below it."""
        return torch.where((gain > 0).unsqueeze(-1), m, mu)
