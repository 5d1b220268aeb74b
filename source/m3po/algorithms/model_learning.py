"""Training and held-out measurement of the world model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tensordict import TensorDict

from m3po import distributed
from m3po.algorithms.step_guard import StepGuard
from m3po.models import WorldModel
from m3po.models.world_model import balanced_bce
from m3po.storage import RolloutRing, Sequences

Flatten = Callable[[TensorDict], torch.Tensor]


class ModelLearner:
    """Gradient steps on the ring: consistency, reward, continuation, value and latent prior."""

    def __init__(
        self,
        model: WorldModel,
        flatten_obs: Flatten,
        policy: Callable[[TensorDict], tuple[torch.Tensor, torch.Tensor]],
        critic: Callable[[TensorDict, torch.Tensor], torch.Tensor],
        action_mask: torch.Tensor,
        restore_after: int = 5,
    ) -> None:
        """Bind the learner to a model and to the networks it follows.

        Args:
            model: World model.
            flatten_obs: Observation groups -> the model's observation vector, (..., O).
            policy: Observations -> mean and deviation of the current policy, (B, A) each.
            critic: Observations and tasks (B,) -> value of the current critic, (B,), reward units.
            action_mask: Action dimensions that each task has, (K, A), boolean.
            restore_after: Skipped steps in a row after which the last good state is restored.
        """
        self.model = model
        self.flatten_obs = flatten_obs
        self.policy = policy
        self.critic = critic
        self.action_mask = action_mask
        self.optimizer = torch.optim.Adam(model.parameter_groups(), eps=1e-5, fused=True)
        self.guard = StepGuard("world model", self.optimizer, (model,), restore_after)

    def train(self, ring: RolloutRing, iteration: int) -> dict[str, float]:
        """Take the gradient steps of an iteration, counted from 0. Returns the mean of each loss term."""
        cfg = self.model.cfg
        sums: dict[str, torch.Tensor] = {}
        extra = max(0.0, 1.0 - iteration / cfg.extra_iterations)
        num_steps = cfg.steps_per_iteration + round(cfg.extra_steps * extra)
        self.guard.begin()
        for _ in range(num_steps):
            batch = ring.sample(cfg.batch_size, cfg.horizon)
            losses = self.losses(batch)
            self.optimizer.zero_grad(set_to_none=True)
            self.guard.backward(self.total(losses))
            distributed.average_gradients(self.optimizer)
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), cfg.max_grad_norm)
            self.guard.step(norm)
            for name, loss in {**losses, "grad_norm": norm}.items():
                sums[name] = sums.get(name, 0.0) + loss.detach()
        means = {name: (total / num_steps).item() for name, total in sums.items()}
        return distributed.means(means, batch.rewards.device)

    def total(self, losses: dict[str, torch.Tensor]) -> torch.Tensor:
        """Weighted sum of the loss terms."""
        cfg = self.model.cfg
        return (
            cfg.consistency_coef * losses["consistency"]
            + cfg.reward_coef * losses["reward"]
            + cfg.value_coef * losses["value"]
            + cfg.continuation_coef * losses["continuation"]
            + cfg.prior_coef * losses["prior"]
        )

    def losses(self, batch: Sequences) -> dict[str, torch.Tensor]:
        """Loss terms of a batch of sub-sequences, each a scalar averaged over valid steps weighted by ``rho**k``.

        Of several processes, the mean of the terms is the average over the valid steps of all of them.
        """
        model, cfg, task = self.model, self.model.cfg, batch.task
        horizon = batch.actions.shape[1]
        with torch.no_grad():
            target_z = model.encode(self.flatten_obs(batch.next_obs), task)
            flat_obs = batch.obs.flatten(0, 1)
            target_action, std = (x.unflatten(0, batch.mask.shape) for x in self.policy(flat_obs))
            values = batch.returns
            if cfg.value_target == "critic":
                values = self.critic(flat_obs, task.flatten()).unflatten(0, batch.mask.shape)
            scale = model.rewards.scale(task)
            target_reward, target_value = batch.rewards / scale, values / scale
            base_logit = model.rewards.termination_logit(task)

        embedding = model.embed(task)
        z = model.encode(self.flatten_obs(batch.obs[:, 0]), task[:, 0])
        latents, steps = [], []
        for k in range(horizon):
            latents.append(z)
            # The target carries the stop-gradient, the prediction does not: the dynamics must learn from consistency.
            steps.append(model.predict(z, batch.actions[:, k], embedding[:, k]))
            z = steps[-1][0]
        z = torch.stack(latents, 1)
        z_next, reward_logits, termination_logits = (torch.stack(x, 1) for x in zip(*steps, strict=True))

        decay = cfg.rho ** torch.arange(horizon, device=z.device)
        weight = decay * batch.mask
        next_weight = decay * batch.next_mask
        consistency = (z_next - target_z).square().mean(-1)
        reward = model.two_hot.cross_entropy(reward_logits, target_reward)
        value = model.two_hot.cross_entropy(model.value_logits(z, embedding), target_value)
        rate_logit = base_logit if cfg.balance_terminations else torch.zeros_like(base_logit)
        continuation = balanced_bce(termination_logits, batch.terminated, rate_logit)
        # The policy's gradient does not enter the encoder: the prior reads a detached latent.
        deviation = (model.prior(z.detach(), embedding) - target_action) / std
        prior = 0.5 * (deviation * self.action_mask[task]).square().sum(-1)
        reward_weight = weight * ~batch.terminated if cfg.terminal_reward else weight
        sizes = distributed.mean(torch.stack([w.sum() for w in (next_weight, reward_weight, weight)]))
        next_size, reward_size, size = sizes.clamp_min(1e-8)  # all terms are 0 where no weight is left
        return {
            "consistency": (consistency * next_weight).sum() / next_size,
            "reward": (reward * reward_weight).sum() / reward_size,
            "value": (value * weight).sum() / size,
            "continuation": (continuation * weight).sum() / size,
            "prior": (prior * weight).sum() / size,
        }

    @torch.no_grad()
    def measure(self, batch: Sequences) -> dict[str, torch.Tensor]:
        """Quality on data that the model has not trained on, that of all processes.

        Returns:
            For each task, (K,) each: ``skill_1`` and ``skill_H``: one minus the k-step latent error over the error of
            "no change"; ``error_1`` and ``error_H``: the k-step latent error itself (mean square);
            ``reward_ev`` and ``value_ev``: explained variance of the reward (of surviving steps) and of the value;
            ``fall_probability``: mean predicted probability on true falls.
        """
        model, task = self.model, batch.task
        num_tasks, first = len(self.action_mask), batch.task[:, 0]
        embedding = model.embed(task)
        encoded = model.encode(self.flatten_obs(batch.next_obs), task)
        z = start = model.encode(self.flatten_obs(batch.obs[:, 0]), first)
        result, horizon = {}, batch.actions.shape[1]
        rewards, alive = [], []
        for k in range(horizon):
            z, reward, survives = model.step(z, batch.actions[:, k], embedding[:, k], task[:, k])
            rewards.append(reward)
            alive.append(survives)
            if k in (0, horizon - 1):
                mask = batch.next_mask[:, k]
                error = mean_per_task((z - encoded[:, k]).square().mean(-1), mask, first, num_tasks)
                still = mean_per_task((start - encoded[:, k]).square().mean(-1), mask, first, num_tasks)
                name = "1" if k == 0 else "H"
                result[f"error_{name}"] = error
                result[f"skill_{name}"] = 1.0 - error / still.clamp_min(1e-12)
        predicted = torch.stack(rewards, 1) * model.rewards.scale(task)
        alive_mask = batch.mask & ~batch.terminated
        result["reward_ev"] = explained_variance(predicted, batch.rewards, alive_mask, task, num_tasks)
        value = model.value(start, embedding[:, 0]) * model.rewards.scale(first)
        result["value_ev"] = explained_variance(value, batch.returns[:, 0], batch.mask[:, 0], first, num_tasks)
        falls = batch.terminated & batch.mask
        result["fall_probability"] = mean_per_task(1.0 - torch.stack(alive, 1), falls, task, num_tasks)
        return result


def mean_per_task(x: torch.Tensor, mask: torch.Tensor, task: torch.Tensor, num_tasks: int) -> torch.Tensor:
    """Mean of the masked elements of each task over all processes, (K,), 0 where there are none.

    All arguments have the same shape.
    """
    weight = mask.flatten().to(x.dtype)
    zero = torch.zeros(num_tasks, dtype=x.dtype, device=x.device)
    count = zero.index_add(0, task.flatten(), weight)
    count, total = distributed.total(torch.stack((count, zero.index_add(0, task.flatten(), x.flatten() * weight))))
    return total / count.clamp_min(1.0)


def explained_variance(
    predicted: torch.Tensor, target: torch.Tensor, mask: torch.Tensor, task: torch.Tensor, num_tasks: int
) -> torch.Tensor:
    """``1 - Var(target - predicted) / Var(target)`` over the masked elements of each task in all processes, (K,).

    0 where the target does not vary. All arguments have the same shape.
    """

    def variance(x: torch.Tensor) -> torch.Tensor:
        mean = mean_per_task(x, mask, task, num_tasks)
        return mean_per_task((x - mean[task]).square(), mask, task, num_tasks)

    spread = variance(target)
    explained = 1.0 - variance(target - predicted) / spread.clamp_min(1e-12)
    return torch.where(spread > 1e-12, explained, 0.0)
