"""More training of the critic than PPO gives it.

PPO's critic learns from one short rollout at a time, so that what it is told reaches back no further than that: with
rollouts of 8 steps a value must be handed on through many updates until it arrives where it was earned. The ring holds
the last rollouts of each environment, which are one long trajectory. Lambda-returns along it, with the values of the
critic of now, are targets that look many steps ahead. They are not corrected for the policies in between, which differ
by little more than an update each. The advantages of the newest rollout are estimated after that.
"""

from __future__ import annotations

import torch
from rsl_rl.models import MLPModel
from torch import nn

from m3po import distributed
from m3po.algorithms.advantage_estimator import AdvantageEstimator
from m3po.algorithms.returns import gae
from m3po.algorithms.step_guard import StepGuard
from m3po.config import AlgorithmCfg
from m3po.storage import RolloutRing


class CriticReplay:
    """Trains the critic on the newest steps of the ring."""

    def __init__(
        self,
        critic: MLPModel,
        parameters: list[nn.Parameter],
        estimator: AdvantageEstimator,
        cfg: AlgorithmCfg,
    ) -> None:
        """Create the optimiser, which is not that of the policy update: its step size does not follow the policy's.

        Args:
            critic: Value function.
            parameters: Those of its parameters that it shares with no other network.
            estimator: Evaluates observations with the critic.
            cfg: Configuration.
        """
        self.critic, self.estimator, self.cfg = critic, estimator, cfg.critic_replay
        self.max_grad_norm = cfg.max_grad_norm
        self.optimizer = torch.optim.Adam(parameters, lr=self.cfg.learning_rate, fused=True)
        self.guard = StepGuard("critic", self.optimizer, (critic,), cfg.restore_after)

    def train(self, ring: RolloutRing) -> dict[str, float]:
        """Take the gradient steps of an iteration. Returns the mean of the loss."""
        steps = ring.latest(self.cfg.horizon)
        returns = self.returns(steps)
        task = steps["task"]
        targets = (returns / self.estimator.units(task)).flatten()
        lost = steps["lost"].flatten()
        # Several processes step together: one that lost everything takes part, the target of a lost step is its value.
        kept = (~lost | lost.all()).nonzero().squeeze(-1)
        obs, total = steps["obs"].flatten(0, 1), torch.zeros((), device=targets.device)
        self.guard.begin()
        for _ in range(self.cfg.steps_per_iteration):
            draw = torch.randint(len(kept), (self.cfg.batch_size,), generator=ring.generator, device=kept.device)
            rows = kept[draw]
            loss = (self.critic(obs[rows]).squeeze(-1) - targets[rows]).square().mean()
            self.optimizer.zero_grad(set_to_none=True)
            self.guard.backward(loss)
            distributed.average_gradients(self.optimizer)
            self.guard.step(nn.utils.clip_grad_norm_(self.optimizer.param_groups[0]["params"], self.max_grad_norm))
            total += loss.detach()
        mean = (total / self.cfg.steps_per_iteration).item()
        return distributed.means({"critic_replay": mean}, targets.device)

    @torch.no_grad()
    def returns(self, steps: dict[str, torch.Tensor]) -> torch.Tensor:
        """Lambda-returns along trajectories, with the values of the critic of now.

        Args:
            steps: Fields of the ring in order of time, as :meth:`~m3po.storage.RolloutRing.latest` gives them.

        Returns:
            Returns in reward units, (T, N). Where it is not known what a step led to, that is the critic's own value.
        """
        task, dones, terminated = steps["task"], steps["dones"], steps["terminated"]
        values = self._values(steps["obs"], task)
        values.masked_fill_(steps["lost"] & ~values.isfinite(), 0.0)  # masks multiply below, and NaN stays
        next_values = torch.empty_like(values)
        next_values[:-1] = values[1:]
        ends = dones & ~terminated
        ends[-1] = ~terminated[-1]
        next_values[ends] = self._values(steps["next_obs"][ends], task[ends])
        unknown = steps["lost"] | (ends & ~steps["next_obs_valid"])
        rewards = torch.where(unknown, values, steps["rewards"])  # no temporal difference there
        next_values.masked_fill_(unknown, 0.0)
        terminated, dones = terminated | unknown, dones | unknown
        return gae(rewards, values, next_values, terminated, dones, self.estimator.gamma, self.cfg.lam)[0]

    def _values(self, obs: torch.Tensor, task: torch.Tensor) -> torch.Tensor:
        """Values in reward units of observations of any batch size; ``task`` has the same."""
        flat = obs.reshape(-1) if obs.batch_dims > 1 else obs
        return self.estimator.values(flat, task.flatten()).view(task.shape)
