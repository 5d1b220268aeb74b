"""Look-ahead at update time: the policy moves along the gradient of a value imagined from stored observations.

PPO learns from how an action happened to turn out. A model tells how the value *would* change with the action, in
every dimension at once and without that noise: the stochastic value gradient of arXiv 1510.09142 at the mean action,
with PPO's own critic at the end of 1 to H imagined steps. As with the planner, the result is a plan within a trust
region, which the policy's mean is regressed onto; unlike the planner it costs nothing while acting.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from rsl_rl.models import MLPModel
from tensordict import TensorDict
from torch import nn

from m3po import distributed
from m3po.algorithms.advantage_estimator import AdvantageEstimator
from m3po.algorithms.model_learning import explained_variance, mean_per_task
from m3po.algorithms.step_guard import StepGuard
from m3po.algorithms.tasks import Tasks
from m3po.config import AlgorithmCfg
from m3po.models.observation_model import ObservationModel
from m3po.storage import RolloutRing, RolloutStorage

LARGEST_SHIFT = 4.0
"""A plan goes no further than this multiple of the root mean square of all plans."""

FOLLOWED = 0.5
"""KL that the policy is to move by, as a share of the plans': a network cannot follow all of them at once, and what it
moves beyond that is noise. The regression's step size may be adapted to it."""

RATES = (1e-5, 1e-2)
"""Bounds of that step size."""

SLOPE_RATE = 0.2
SLOPE_STEPS = 4096
"""Weight in the running mean of the slope of a rollout of so many steps, which tells it to about 0.016. Smaller ones
weigh in proportion: 512 steps of DMControl tell it to 0.05 to 0.2, where 0.06 is the whole trust region's worth. Until
there are enough of them, all rollouts so far weigh the same, with four more of slope 0."""


class ValueGradient:
    """Trains a model of observations on the ring, and improves the policy by its gradient."""

    def __init__(
        self,
        actor: MLPModel,
        policy: Callable[[TensorDict], tuple[torch.Tensor, torch.Tensor]],
        model: ObservationModel,
        group_dims: dict[str, int],
        estimator: AdvantageEstimator,
        tasks: Tasks,
        cfg: AlgorithmCfg,
    ) -> None:
        """Create the optimisers.

        Args:
            actor: Policy.
            policy: Observations -> its mean and deviation, (B, A) each.
            model: Model of observations.
            group_dims: Observation groups that the model reads and predicts, all that policy and critic read among
                them, in this order, with their dimensions.
            estimator: Evaluates observations with the critic.
            tasks: Tasks of the environments.
            cfg: Configuration.
        """
        self.actor, self.policy, self.model, self.group_dims = actor, policy, model, group_dims
        self.estimator, self.tasks, self.cfg = estimator, tasks, cfg.value_gradient
        self.stored_steps = cfg.critic_replay.horizon
        self.num_mini_batches, self.max_grad_norm = cfg.num_mini_batches, cfg.max_grad_norm
        self.optimizer = torch.optim.Adam(model.parameters(), lr=self.cfg.learning_rate, fused=True)
        self.policy_optimizer = torch.optim.Adam(actor.parameters(), lr=self.cfg.policy_learning_rate, fused=True)
        self.guards = (
            StepGuard("observation model", self.optimizer, (model,), cfg.restore_after),
            StepGuard("value gradient", self.policy_optimizer, (actor,), cfg.restore_after),
        )
        self.expected_kl = 0.0
        """KL by which the plans of the newest rollout are expected to move the policy, nats."""

    def plan(self, ring: RolloutRing, rollout: RolloutStorage, iteration: int) -> dict[str, float]:
        """Plan at the observations of a finished rollout, which neither model nor policy has been trained on yet.

        So the rollout also tells what the gradient is worth: its actions happened to lie more or less along it, and
        their advantages are known. The plans go as far as the mean of this over recent rollouts warrants. Earlier
        observations, drawn from the ring, can be planned at as well: a small rollout shows little of an episode.

        Args:
            ring: Recent rollouts, the finished one among them.
            rollout: The finished rollout.
            iteration: Training iteration, from 0.

        Returns:
            ``skill``: one minus the error of the predicted observation over that of "no change"; ``reward_ev``:
            explained variance of the reward of steps that go on; ``slope``: how much the real advantage rises, in its
            deviations, per deviation of the action along the gradient; ``max_kl``: trust region of these plans, nats.
        """
        st, count = rollout, self.tasks.count
        own, kept = st.task.flatten(), ~st.lost.flatten()
        skill, reward_ev = self._quality(st, kept)
        self._obs, task, planned = self._observations(st, ring)
        gradient = self.gradient(self._obs, task)
        size = mean_per_task(gradient[: len(own)].square().sum(-1), kept, own, count).sqrt().clamp_min(1e-12)
        direction = gradient / size[task].unsqueeze(-1)
        noise = ((st.actions - st.mean) / st.std).flatten(0, 1)
        along = (direction[: len(own)] * noise).sum(-1)
        slope = mean_per_task(along * st.advantages.flatten(), kept, own, count)
        steps = distributed.total(torch.zeros_like(slope).index_add(0, own, kept.to(slope.dtype)))
        weight = (SLOPE_RATE * steps / SLOPE_STEPS).clamp(1.0 / (1.0 / SLOPE_RATE + iteration), SLOPE_RATE)
        self.model.slope.lerp_(slope.nan_to_num(0.0, 0.0, 0.0), weight * (steps > 0))
        radius = (2.0 * self.cfg.max_kl) ** 0.5 * (self.model.slope / self.cfg.full_slope).clamp(0.0, 1.0)
        largest = LARGEST_SHIFT / direction.norm(dim=-1, keepdim=True).clamp_min(LARGEST_SHIFT)
        self._shift = direction * largest * radius[task].unsqueeze(-1)
        self._weight = (planned & (radius > 0.0)[task]).float()
        found = {"skill": skill, "reward_ev": reward_ev, "slope": slope, "max_kl": 0.5 * radius.square()}
        metrics = {f"ahead/{name}": value.mean().item() for name, value in found.items()}
        self.expected_kl = FOLLOWED * metrics["ahead/max_kl"]
        return metrics

    def _observations(self, st: RolloutStorage, ring: RolloutRing) -> tuple[TensorDict, torch.Tensor, torch.Tensor]:
        """Observations to plan at, those of the rollout first, their tasks, and which of their steps took place."""
        found = st.obs.flatten(0, 1), st.task.flatten(), ~st.lost.flatten()
        more = self.cfg.stored_rollouts * len(found[1])
        if more == 0:
            return found
        latest = ring.latest(self.stored_steps)
        rows = torch.randint(latest["lost"].numel(), (more,), generator=ring.generator, device=found[1].device)
        stored = (latest[name].flatten(0, 1)[rows] for name in ("obs", "task"))
        stored = (*stored, ~latest["lost"].flatten()[rows])
        return tuple(torch.cat(pair) for pair in zip(found, stored, strict=True))

    @torch.no_grad()
    def _quality(self, st: RolloutStorage, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Skill and explained variance of the reward of each task, (K,) each; (B,) ``kept``: steps that took place."""
        count, task = self.tasks.count, st.task.flatten()
        obs, next_obs = self._vector(st.obs.flatten(0, 1)), self._vector(st.next_obs.flatten(0, 1))
        known = kept & st.next_obs_valid.flatten()
        change, reward, _ = self.model.predict(obs, st.actions.flatten(0, 1), task)
        rewards = self.model.reward_targets(st.rewards.flatten(), task)
        target = self.model.change_targets(obs, next_obs, task)
        error, still = (mean_per_task(x.square().mean(-1), known, task, count) for x in (change - target, target))
        reward_ev = explained_variance(reward, rewards, kept & ~st.terminated.flatten(), task, count)
        return 1.0 - error / still.clamp_min(1e-12), reward_ev

    def gradient(self, obs: TensorDict, task: torch.Tensor) -> torch.Tensor:
        """Gradient of the imagined value in the policy's mean action.

        Args:
            obs: Observations, batch size (B,).
            task: Task ids, (B,).

        Returns:
            Reward units per deviation of the policy, (B, A); 0 where it is not finite.
        """
        with torch.no_grad():
            mean, std = (x.clone() for x in self.policy(obs))
        shift = torch.zeros_like(mean, requires_grad=True)
        (gradient,) = torch.autograd.grad(self.imagine(obs, mean + std * shift, task).sum(), shift)
        return torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0) * self.tasks.action_mask[task]

    def imagine(self, obs: TensorDict, action: torch.Tensor, task: torch.Tensor) -> torch.Tensor:
        """Value of an action that the policy's mean actions follow: imagined steps, and the critic after them.

        It is the mean over 1 to H steps: whether the critic or the model is to be trusted differs between tasks.

        Args:
            obs: Observations, batch size (B,).
            action: First actions, (B, A).
            task: Task ids, (B,).

        Returns:
            Discounted value, reward units, (B,).
        """
        gamma, x = self.tasks.discounts[task], self._vector(obs)
        earned, weight, values = torch.zeros_like(gamma), torch.ones_like(gamma), []
        for k in range(self.cfg.horizon):
            if k > 0:
                action = self.actor(obs)
            x, reward, alive = self.model.step(x, action, task)
            earned = earned + weight * reward
            weight = weight * gamma * alive
            obs = self._groups(x, obs)
            values.append(earned + weight * self.estimator.values(obs, task))
        return torch.stack(values).mean(0)

    def train(self, ring: RolloutRing, rollout: RolloutStorage, iteration: int) -> dict[str, float]:
        """Take the model's gradient steps of an iteration, counted from 0.

        Args:
            ring: Recent rollouts, the finished one among them.
            rollout: The finished rollout, from which the statistics learn first.
            iteration: Training iteration.

        Returns:
            The mean of each loss term.
        """
        cfg, sums = self.cfg, {}
        self._update_statistics(rollout)
        num_steps = cfg.steps_per_iteration + (cfg.extra_steps if iteration < cfg.extra_iterations else 0)
        self.guards[0].begin()
        for _ in range(num_steps):
            batch = ring.sample(cfg.batch_size, 1)
            obs, next_obs = self._vector(batch.obs[:, 0]), self._vector(batch.next_obs[:, 0])
            outcome = (batch.rewards[:, 0], batch.terminated[:, 0], batch.task[:, 0])
            terms = self.model.losses(obs, batch.actions[:, 0], next_obs, *outcome)
            masks = dict.fromkeys(terms, batch.mask[:, 0]) | {"change": batch.next_mask[:, 0]}
            means = {name: (term * masks[name]).mean() for name, term in terms.items()}
            self.optimizer.zero_grad(set_to_none=True)
            self.guards[0].backward(torch.stack(list(means.values())).sum())
            distributed.average_gradients(self.optimizer)
            self.guards[0].step(nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm))
            for name, value in means.items():
                sums[name] = sums.get(name, 0.0) + value.detach()
        return distributed.means({f"ahead_{name}": (x / num_steps).item() for name, x in sums.items()}, obs.device)

    @torch.no_grad()
    def _update_statistics(self, st: RolloutStorage) -> None:
        """What the model's inputs and outputs are measured in, from the steps of a rollout that took place."""
        kept = ~st.lost.flatten()
        obs, next_obs = self._vector(st.obs.flatten(0, 1)), self._vector(st.next_obs.flatten(0, 1))
        others = (x.flatten() for x in (st.next_obs_valid, st.rewards, st.terminated, st.task))
        self.model.update_statistics(*(x[kept] for x in (obs, next_obs, *others)))

    def improve(self, generator: torch.Generator) -> dict[str, float]:
        """Regress the policy's mean onto the plans of :meth:`plan`, from where it is now.

        Adam's steps are as long as its rate, however short the plans: unless it is fixed, the rate is proportional to
        their length, and follows how far the policy moved.

        Args:
            generator: Draws the order of the mini-batches.

        Returns:
            ``kl`` between the policies before and after, nats, ``followed``, the cosine between what was planned and
            what came out, and ``learning_rate``, that of plans which go the whole trust region.
        """
        obs, shift, weight = self._obs, self._shift, self._weight
        size = distributed.mean(weight.mean(), weight=len(weight))
        group = self.policy_optimizer.param_groups[0]
        if size == 0:
            return {"ahead/kl": 0.0, "ahead/followed": 0.0, "ahead/learning_rate": group["lr"]}
        with torch.no_grad():
            mean, std = (x.clone() for x in self.policy(obs))
        target = mean + std * shift
        rate, adaptive = group["lr"], self.cfg.policy_schedule == "adaptive"
        if adaptive:
            length = distributed.mean((shift.square().sum(-1) * weight).mean(), weight=len(weight)) / size
            group["lr"] = rate * min(1.0, (length / (2.0 * self.cfg.max_kl)).sqrt().item())
        self.guards[1].begin()
        for _ in range(self.cfg.num_epochs):
            order = torch.randperm(len(weight), generator=generator, device=weight.device)
            for rows in order.chunk(self.num_mini_batches):
                off = ((self.actor(obs[rows]) - target[rows]) / std[rows]).square().sum(-1)
                self.policy_optimizer.zero_grad(set_to_none=True)
                self.guards[1].backward(0.5 * (off * weight[rows]).mean() / size)
                distributed.average_gradients(self.policy_optimizer, weight=len(rows))
                self.guards[1].step(nn.utils.clip_grad_norm_(self.actor.parameters(), self.max_grad_norm))
        with torch.no_grad():
            moved = (self.actor(obs) - mean) / std
            pairs = ((moved, moved), (shift, shift), (moved, shift))
            sums = torch.stack([((x * y).sum(-1) * weight).mean() for x, y in pairs])
            moves, shifts, both = distributed.mean(sums, weight=len(weight))
        followed = both / (moves * shifts).sqrt().clamp_min(1e-12)
        if adaptive:
            group["lr"] = _adapted(rate, (moves / shifts.clamp_min(1e-12)).item())
        metrics = {"kl": (0.5 * moves / size).item(), "followed": followed.item(), "learning_rate": group["lr"]}
        return {f"ahead/{name}": value for name, value in metrics.items()}

    # -- between observations and the model's vector -------------------------------------------------------------------

    def _vector(self, obs: TensorDict) -> torch.Tensor:
        """Observation vector of the model, (B, O)."""
        return torch.cat([obs[group] for group in self.group_dims], dim=-1)

    def _groups(self, x: torch.Tensor, like: TensorDict) -> TensorDict:
        """Observation groups of an observation vector (B, O); groups that the model does not predict are as before."""
        parts = zip(self.group_dims, x.split(list(self.group_dims.values()), dim=-1), strict=True)
        return TensorDict({**like, **dict(parts)}, batch_size=like.batch_size)


def _adapted(rate: float, share: float) -> float:
    """The next step size of a regression that moved the policy by a share of what was planned, as rsl_rl adapts its."""
    if share > 2.0 * FOLLOWED:
        return max(RATES[0], rate / 1.5)
    if share < 0.5 * FOLLOWED:
        return min(RATES[1], rate * 1.5)
    return rate
