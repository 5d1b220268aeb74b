"""Training and held-out measurement of the world model."""

from __future__ import annotations

import torch
from tensordict import TensorDict

from m3po import distributed
from m3po.algorithms.gates import Gates
from m3po.algorithms.policy_outputs import PolicyOutputs
from m3po.algorithms.statistics import explained_variance, mean_per_task
from m3po.algorithms.step_guard import StepGuard
from m3po.algorithms.tasks import Tasks
from m3po.config import AlgorithmCfg
from m3po.models.world_model import termination_loss
from m3po.planning import Objective
from m3po.storage import ReplayBuffer, RolloutStorage, Sequences

CHANGE_WEIGHT, REWARD_WEIGHT, FEATURE_WEIGHT = 4.0, 0.5, 1.0
"""Weights of loss terms; that of the termination, and of the heads of the purely latent form, is 1."""

DECAY = 0.5
"""Step ``k`` of a sub-sequence is weighted ``DECAY**k``."""

EXTRA_ITERATIONS = 10
"""First iterations, which take extra steps: plans start while the policy still learns most."""


class ModelLearner:
    """Gradient steps on the replay buffer."""

    def __init__(
        self, objective: Objective, policy: PolicyOutputs, gates: Gates, tasks: Tasks, cfg: AlgorithmCfg
    ) -> None:
        """Create the optimiser.

        Args:
            objective: Holds the model, and what reads its latents.
            policy: Policy, which the purely latent form imitates.
            gates: They say how many steps are worth taking.
            tasks: Tasks of the environments.
            cfg: Configuration.
        """
        self.objective, self.model, self.policy = objective, objective.model, policy
        self.gates, self.tasks, self.cfg = gates, tasks, cfg.world_model
        self.full_gain, self.replay_ratio = cfg.planner.full_gain, cfg.replay_ratio
        self.plans = cfg.planner.max_learning_kl > 0.0
        # Many large steps would move the policy, which reads the task embedding too: the model takes that as given.
        own = [p for name, p in self.model.named_parameters() if name != "task_embedding"]
        self.optimizer = torch.optim.Adam(own, lr=self.cfg.learning_rate, fused=True)
        self.guard = StepGuard("world model", self.optimizer, (self.model,), cfg.max_grad_norm)

    def train(self, replay: ReplayBuffer, rollout: RolloutStorage, iteration: int) -> dict[str, float]:
        """Take the gradient steps of an iteration, counted from 0.

        Args:
            replay: Replay buffer, the finished rollout in it.
            rollout: The finished rollout, from which the statistics learn first.
            iteration: Training iteration.

        Returns:
            The mean of each loss term.
        """
        cfg, sums = self.cfg, {}
        if cfg.steps_per_iteration == 0:
            return {}
        self._update_statistics(rollout)
        worth = self.gates.model_steps(self.full_gain) if self.plans else 1.0
        extra = cfg.extra_steps if iteration < EXTRA_ITERATIONS else 0
        num_steps = max(1, round(self.replay_ratio * (cfg.steps_per_iteration * worth + extra)))
        self.guard.begin()
        for _ in range(num_steps):
            terms = self.losses(replay.sample(cfg.batch_size, cfg.horizon))
            self.guard.step(torch.stack(list(terms.values())).sum())
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + value.detach()
        means = {f"model_{name}": (x / num_steps).item() for name, x in sums.items()}
        return distributed.means(means | {"model_steps": num_steps}, rollout.device)

    def losses(self, batch: Sequences) -> dict[str, torch.Tensor]:
        """Weighted loss terms of sub-sequences, each a scalar: means over all steps, masked ones count as 0."""
        model, vector = self.model, self.objective.vector
        next_obs, task, terms = vector(batch.next_obs), batch.task, {}
        z, weight = model.encode(vector(batch.obs[:, 0]), task[:, 0]), 1.0
        with torch.no_grad():
            features = model.encode(next_obs, task)[..., model.anchor_dim :]
        for k in range(batch.actions.shape[1]):
            now = (batch.actions[:, k], task[:, k])
            change, predicted, reward, logits = model.predict(z, *now)
            mask, known = weight * batch.mask[:, k], weight * batch.next_mask[:, k]
            step = {}
            if model.anchor_dim:
                # Targets are from where imagination is, so that its errors are made good for.
                target = model.change_targets(model.observation(z), next_obs[:, k], task[:, k])
                step["change"] = CHANGE_WEIGHT * (model.change_loss(change, target, task[:, k]) * known).mean()
            if self.cfg.features:
                off = (predicted - features[:, k]).square().mean(-1) / model.feature_change[task[:, k]]
                step["features"] = FEATURE_WEIGHT * (off * known).mean()
            earned = model.reward_targets(batch.rewards[:, k], task[:, k])
            alive = mask * ~batch.terminated[:, k]
            step["reward"] = REWARD_WEIGHT * ((reward - earned).square() * alive).mean()
            step["termination"] = (termination_loss(logits, batch.terminated[:, k]) * mask).mean()
            if not model.anchor_dim:
                step |= self._head_losses(z, batch.obs[:, k], task[:, k], mask)
            terms = {name: terms.get(name, 0.0) + value for name, value in step.items()}
            if k + 1 < batch.actions.shape[1]:
                z, weight = model.step(z, *now)[0], DECAY * weight
        return terms

    def _head_losses(
        self, z: torch.Tensor, obs: TensorDict, task: torch.Tensor, mask: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Errors of ``V(z)`` and ``pi(z)`` against critic and policy; the policy's does not reach the encoder."""
        model = self.model
        with torch.no_grad():
            value = model.values(self.objective.values(obs, task).unsqueeze(-1), task).squeeze(-1)
            mean, std = self.policy(obs)
        e = model.embed(task)
        predicted = model.value_head(torch.cat([z, e], dim=-1)).squeeze(-1)
        off = ((model.policy(z.detach(), task) - mean) / std).square() * self.tasks.action_mask[task]
        return {
            "value": ((predicted - value.clamp(-5.0, 5.0)).square() * mask).mean(),
            "policy": 0.5 * (off.sum(-1) * mask).mean(),
        }

    @torch.no_grad()
    def _update_statistics(self, st: RolloutStorage) -> None:
        """What the model's inputs and outputs are measured in, from the steps of a rollout that took place."""
        kept = ~st.invalid.flatten()
        obs, task = st.obs.flatten(0, 1)[kept], st.task.flatten()[kept]
        next_obs = self.objective.vector(st.next_obs.flatten(0, 1))[kept]
        others = (x.flatten()[kept] for x in (st.next_obs_valid, st.rewards, st.terminated))
        valid, rewards, terminated = others
        model, obs_vector = self.model, self.objective.vector(obs)
        model.update_statistics(obs_vector, next_obs, valid, rewards, terminated, task)
        if self.cfg.features:
            changed = model.encode(next_obs, task) - model.encode(obs_vector, task)
            changed = changed[..., model.anchor_dim :].square().mean(-1)
            unit = mean_per_task(changed, valid, task, self.tasks.count)
            model.feature_change.copy_(torch.where(unit > 0.0, unit.clamp_min(1e-8), model.feature_change))
        if not self.model.cfg.anchor:
            self.model.values.update(self.objective.values(obs, task).unsqueeze(-1), task)

    @torch.no_grad()
    def measure(self, st: RolloutStorage) -> dict[str, float]:
        """Quality on a finished rollout that the model has not been trained on, means over the tasks.

        Returns:
            ``dynamics_r2``: share of the change of the observation, or of the features, that is explained in one step;
            ``reward_ev``: explained variance of the reward of steps that go on; ``termination_probability``: mean
            predicted probability of true terminations.
        """
        model, count, task = self.model, self.tasks.count, st.task.flatten()
        kept = ~st.invalid.flatten()
        obs, next_obs = (self.objective.vector(x.flatten(0, 1)) for x in (st.obs, st.next_obs))
        known = kept & st.next_obs_valid.flatten()
        z = model.encode(obs, task)
        change, predicted, reward, logits = model.predict(z, st.actions.flatten(0, 1), task)
        if model.anchor_dim:
            target = model.change_targets(obs, next_obs, task)
            error, still = (mean_per_task(x.square(), known, task, count) for x in (change - target, target))
            explained = torch.where(still > 1e-6, 1.0 - error / still.clamp_min(1e-12), 1.0)
            seen = mean_per_task(known.to(still.dtype), known, task, count) > 0
            model.update_explained(explained.clamp(0.0, 1.0), seen)
            error, still = ((x * model.own_dims).sum(-1) for x in (error, still))
        else:
            target = model.encode(next_obs, task)
            pairs = (predicted - target, z - target)
            error, still = (mean_per_task(x.square().mean(-1), known, task, count) for x in pairs)
        rewards, alive = model.reward_targets(st.rewards.flatten(), task), kept & ~st.terminated.flatten()
        quality = {
            "dynamics_r2": 1.0 - error / still.clamp_min(1e-12),
            "reward_ev": explained_variance(reward, rewards, alive, task, count),
            "termination_probability": mean_per_task(
                torch.sigmoid(logits), kept & st.terminated.flatten(), task, count
            ),
        }
        return {f"model/{name}": value.mean().item() for name, value in quality.items()}
