"""From a finished rollout to returns and advantages, each task in its own units."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from rsl_rl.models import MLPModel
from tensordict import TensorDict

from m3po import distributed
from m3po.algorithms.returns import gae, vtrace
from m3po.algorithms.tasks import Tasks
from m3po.config import AlgorithmCfg
from m3po.models.normalizers import MEMORY, RewardStatistics
from m3po.storage import RolloutStorage


class AdvantageEstimator:
    """Evaluates rollouts with the critic, whose output is in units of ``RMS(reward) / (1 - gamma)`` of each task.

    So neither the scale of the rewards nor that of another task matters.
    """

    def __init__(self, critic: MLPModel, tasks: Tasks, cfg: AlgorithmCfg) -> None:
        """Bind the estimator to a critic.

        Args:
            critic: Value function on the observation, in units of its task.
            tasks: Tasks of the environments.
            cfg: Configuration.
        """
        self.critic, self.tasks, self.cfg = critic, tasks, cfg
        self.rewards = RewardStatistics(tasks.count, MEMORY).to(tasks.ids.device)
        # A single discount stays a plain number, so that a single task is computed exactly as PPO computes it.
        self.gamma = cfg.gamma if tasks.count == 1 else tasks.discounts[tasks.ids]
        self.predict: Callable[[TensorDict, torch.Tensor, torch.Tensor], torch.Tensor] | None = None
        """Observations, actions and tasks, (B,) each -> value of what follows, (B,): of a trained world model."""
        self.cut_rewards = 0
        """Rewards of the newest rollout that were cut because they were far beyond the usual."""
        self._told: set[str] = set()

    def units(self, task: torch.Tensor) -> torch.Tensor:
        """Reward units of the critic's output, shape of ``task``."""
        return self.rewards.scale(task) / (1.0 - self.tasks.discounts[task]).clamp_min(1e-3)

    def values(self, obs: TensorDict, task: torch.Tensor) -> torch.Tensor:
        """Values in reward units of observations with batch size (B,) of tasks (B,), shape (B,)."""
        return self.critic(obs).squeeze(-1) * self.units(task)

    def values_of(self, obs: TensorDict, task: torch.Tensor) -> torch.Tensor:
        """:meth:`values` of observations with any batch size, shape of ``task``."""
        return self.values(obs.reshape(-1), task.flatten()).view(task.shape)

    def learn_units(self, st: RolloutStorage) -> None:
        """Cut wild rewards of a finished rollout, and take its rewards into the units."""
        kept = ~st.invalid.flatten()
        bounded = self.rewards.bounded(st.rewards.flatten(), st.task.flatten()).view(st.rewards.shape)
        self.cut_rewards = int((bounded != st.rewards).logical_and_(~st.invalid).sum())
        if self.cut_rewards > 0:
            row = (st.rewards - bounded).abs().mul_(~st.invalid).argmax()
            was, now = st.rewards.flatten()[row].item(), bounded.flatten()[row].item()
            self._tell_once(
                "rewards", f"a reward of {was:g} is far beyond the usual, so {now:g} is learnt from instead"
            )
            st.rewards.copy_(bounded)
        self.rewards.update(st.rewards.flatten()[kept], st.terminated.flatten()[kept], st.task.flatten()[kept])

    @torch.no_grad()
    def estimate(self, st: RolloutStorage) -> torch.Tensor:
        """Fill in values, returns and advantages, the latter standardised per task over all processes.

        Args:
            st: Finished rollout.

        Returns:
            Std of the advantages of each task before they were standardised, reward units, (K,).
        """
        cfg = self.cfg
        st.values.copy_(self.values_of(st.obs, st.task))
        if st.any_invalid:
            st.values.masked_fill_(st.invalid & ~st.values.isfinite(), 0.0)
        st.next_values[:-1].copy_(st.values[1:])
        ends = st.dones & ~st.terminated
        ends[-1] = ~st.terminated[-1]
        self.bootstrap(st.next_values, ends, vars(st))
        if st.any_invalid:
            # A step that never took place must not reach the steps before it: its temporal difference is 0.
            st.next_values[st.invalid] = ((st.values - st.rewards) / self.tasks.discounts[st.task])[st.invalid]
        episode = (st.rewards, st.values, st.next_values, st.terminated, st.dones)
        if cfg.advantage == "gae":
            returns, advantages = gae(*episode, self.gamma, cfg.lam)
        else:
            returns, advantages = vtrace(*episode, st.log_pi - st.log_beta, self.gamma, cfg.lam)
        st.returns.copy_(returns)
        std = self.standardise(advantages, ~st.invalid, st.task)
        st.advantages.copy_(advantages)
        return std

    def standardise(self, advantages: torch.Tensor, kept: torch.Tensor, task: torch.Tensor) -> torch.Tensor:
        """Standardise the kept advantages of each task over all processes, in place.

        Args:
            advantages: Advantages, (T, N).
            kept: Those that count, (T, N), boolean.
            task: Task ids, (T, N).

        Returns:
            Std of each task before, (K,); 1 where there are fewer than two.
        """
        std = torch.ones(self.tasks.count, device=advantages.device)
        everyone, everyones_task = distributed.gather(advantages[kept]), distributed.gather(task[kept])
        for k in range(self.tasks.count):
            mine, own = (task == k) & kept, everyone[everyones_task == k]
            if own.numel() > 1:
                std[k] = own.std() + 1e-8
                advantages[mine] = (advantages[mine] - own.mean()) / std[k]
        return std

    def bootstrap(self, next_values: torch.Tensor, ends: torch.Tensor, steps: Mapping[str, Any]) -> None:
        """Fill in what follows the last step of trajectories that did not terminate.

        Where the environment does not deliver the observation before a reset, the world model predicts it. Until the
        model is trained, and where its prediction is not finite, the value of the observation before the step stands
        in, as in rsl_rl.

        Args:
            next_values: Filled in at ``ends``, reward units, (T, N).
            ends: Where, (T, N), boolean.
            steps: Fields ``obs, next_obs, next_obs_valid, actions, task``, (T, N) each.
        """
        known, unknown = ends & steps["next_obs_valid"], ends & ~steps["next_obs_valid"]
        next_values[known] = self.values(steps["next_obs"][known], steps["task"][known])
        if not unknown.any():
            return
        obs, task = steps["obs"][unknown], steps["task"][unknown]
        following = self.values(obs, task)
        if self.predict is not None:
            predicted = self.predict(obs, steps["actions"][unknown], task)
            following = torch.where(predicted.isfinite(), predicted, following)
        next_values[unknown] = following
        if self.predict is not None:
            self._tell_once(
                "time-outs",
                "the environment does not deliver final observations: time-outs are bootstrapped with the world "
                "model's prediction, in the first iteration as in rsl_rl",
            )

    def _tell_once(self, topic: str, text: str) -> None:
        if topic not in self._told:
            self._told.add(topic)
            print(f"[m3po] {text}", flush=True)
