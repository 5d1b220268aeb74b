"""From a finished rollout to returns and advantages, each task in its own units."""

from __future__ import annotations

from collections.abc import Callable

import torch
from rsl_rl.models import MLPModel
from tensordict import TensorDict

from m3po import distributed
from m3po.algorithms.returns import gae, vtrace
from m3po.algorithms.tasks import Tasks
from m3po.config import AlgorithmCfg
from m3po.models import WorldModel
from m3po.models.normalizers import RewardStatistics
from m3po.storage import RolloutStorage


class AdvantageEstimator:
    """Evaluates rollouts with the critic.

    With ``normalize_values`` the critic's output is in units of ``RMS(reward) / (1 - gamma)`` of the task, so that
    tasks with large rewards do not drown those with small ones; without, in reward units.
    """

    def __init__(
        self,
        critic: MLPModel,
        model: WorldModel,
        model_obs: Callable[[TensorDict], torch.Tensor],
        tasks: Tasks,
        cfg: AlgorithmCfg,
    ) -> None:
        """Bind the estimator to a critic.

        Args:
            critic: Value function on the observation, in units of its task.
            model: World model; stands in where an environment does not deliver the final observation of an episode.
            model_obs: Observation groups -> the model's observation vector, (..., O).
            tasks: Tasks of the environments.
            cfg: Configuration.
        """
        self.critic, self.model, self.model_obs, self.tasks, self.cfg = critic, model, model_obs, tasks, cfg
        self.rewards = RewardStatistics(tasks.count).to(tasks.ids.device)
        # A single discount stays a plain number, so that a single task is computed exactly as PPO computes it.
        self.gamma = cfg.gamma if tasks.count == 1 else tasks.discounts[tasks.ids]

    def units(self, task: torch.Tensor) -> torch.Tensor:
        """Reward units of the critic's output, shape of ``task``."""
        if not self.cfg.normalize_values:
            return torch.ones((), device=task.device).expand(task.shape)
        return self.rewards.scale(task) / (1.0 - self.tasks.discounts[task]).clamp_min(1e-3)

    def values(self, obs: TensorDict, task: torch.Tensor) -> torch.Tensor:
        """Values in reward units of observations with batch size (B,) of tasks (B,), shape (B,)."""
        return self.critic(obs).squeeze(-1) * self.units(task)

    def evaluate(self, rollout: RolloutStorage, obs: TensorDict) -> torch.Tensor:
        """Fill in values, returns and advantages, the latter standardised per task over all processes.

        Args:
            rollout: Finished rollout, whose ``values`` are the critic's outputs.
            obs: Observations after the last step, batch size (N,).

        Returns:
            Deviation of the advantages of each task before they were standardised, reward units, (K,).
        """
        st = rollout
        if st.any_lost:
            st.repair_lost()
        if self.cfg.normalize_values:
            kept = ~st.lost.flatten()
            self.rewards.update(st.rewards.flatten()[kept], st.terminated.flatten()[kept], st.task.flatten()[kept])
            st.values.mul_(self.units(st.task))
        return self._estimate(st, self.values(obs, self.tasks.ids))

    @torch.no_grad()
    def evaluate_again(self, rollout: RolloutStorage) -> torch.Tensor:
        """:meth:`evaluate` with the critic of now, of a rollout that was evaluated before."""
        st = rollout
        st.values.copy_(self.values(st.obs.flatten(0, 1), st.task.flatten()).view_as(st.values))
        if st.any_lost:
            st.repair_lost()
        return self._estimate(st, self.values(st.next_obs[-1], st.task[-1]))

    def _estimate(self, st: RolloutStorage, last_values: torch.Tensor) -> torch.Tensor:
        """Returns and advantages from the values of a rollout and of the observations after it, (N,)."""
        cfg = self.cfg
        st.next_values[:-1].copy_(st.values[1:])
        st.next_values[-1].copy_(last_values.detach())
        self._bootstrap_time_outs(st)
        episode = (st.rewards, st.values, st.next_values, st.terminated, st.dones)
        if cfg.advantage == "gae":
            returns, advantages = gae(*episode, self.gamma, cfg.lam)
        else:
            returns, advantages = vtrace(*episode, st.log_pi - st.log_beta, self.gamma, cfg.lam)
        st.returns.copy_(returns)
        std = torch.ones(self.tasks.count, device=advantages.device)
        everyone, task = distributed.gather(advantages[~st.lost]), distributed.gather(st.task[~st.lost])
        for k in range(self.tasks.count):
            mine, own = (st.task == k) & ~st.lost, everyone[task == k]
            if own.numel() > 1:
                std[k] = own.std() + 1e-8
                advantages[mine] = (advantages[mine] - own.mean()) / std[k]
        st.advantages.copy_(advantages)
        return std

    def _bootstrap_time_outs(self, st: RolloutStorage) -> None:
        """Value of the final observation where an episode was cut short, or of the predicted latent without one."""
        cut = st.dones & ~st.terminated
        known, unknown = cut & st.next_obs_valid, cut & ~st.next_obs_valid
        if known.any():
            st.next_values[known] = self.values(st.next_obs[known], st.task[known]).detach()
        if unknown.any():
            task = st.task[unknown]
            e = self.model.embed(task)
            z = self.model.encode(self.model_obs(st.obs[unknown]), task)
            value = self.model.value(self.model.predict(z, st.actions[unknown], e)[0], e)
            st.next_values[unknown] = (value * self.model.rewards.scale(task)).detach()
        if st.any_lost:
            # A step that never took place must not reach the steps before it: its temporal difference is 0.
            gamma = self.tasks.discounts[st.task]
            st.next_values[st.lost] = ((st.values - st.rewards) / gamma)[st.lost]
