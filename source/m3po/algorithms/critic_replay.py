"""Training of the critic on the last steps of each environment.

PPO's critic learns from one short rollout at a time, so that what it is told reaches back no further than that. The
replay buffer holds the last rollouts of each environment, which are one long trajectory. Lambda-returns along it, with
the values of the current critic, are targets that look many steps ahead. They are not corrected for the policies in
between, which differ by little more than an update each.
"""

from __future__ import annotations

from typing import Any

import torch
from rsl_rl.models import MLPModel
from torch import nn

from m3po import distributed
from m3po.algorithms.advantage_estimator import AdvantageEstimator
from m3po.algorithms.returns import gae
from m3po.algorithms.step_guard import StepGuard
from m3po.config import AlgorithmCfg
from m3po.storage import ReplayBuffer
from m3po.storage.replay import NOTES

LAMBDA = 0.95
"""Lambda of the returns along these steps."""


class CriticReplay:
    """Trains the critic on the newest steps of the replay buffer."""

    def __init__(
        self, critic: MLPModel, parameters: list[nn.Parameter], estimator: AdvantageEstimator, cfg: AlgorithmCfg
    ) -> None:
        """Create the optimiser, which is not that of the policy update: its step size does not follow the policy's.

        Args:
            critic: Value function.
            parameters: Those of its parameters that it shares with no other network.
            estimator: Evaluates observations with the critic.
            cfg: Configuration.
        """
        self.critic, self.estimator, self.cfg = critic, estimator, cfg.critic_replay
        self.num_steps = round(cfg.replay_ratio * self.cfg.steps_per_iteration)
        self.optimizer = torch.optim.Adam(parameters, lr=self.cfg.learning_rate, fused=True)
        self.guard = StepGuard("critic", self.optimizer, (critic,), cfg.max_grad_norm)

    def look_back(self, replay: ReplayBuffer) -> dict[str, Any]:
        """The newest steps of each environment in order of time, with their ``returns`` and ``advantages``, (T, N).

        Advantages are over the value that an observation had before the critic learnt what came of it. A critic that
        knows that by heart leaves nothing to the action.
        """
        steps = replay.latest(self.cfg.horizon)
        steps["returns"], advantages = self.returns(steps)
        newest = len(replay.newest)
        replay.note("baseline", (steps["returns"] - advantages)[-newest:])
        baseline = replay.latest(self.cfg.horizon, ("notes",))["notes"][..., NOTES.index("baseline")]
        steps["advantages"] = steps["returns"] - baseline
        return steps

    def train(self, steps: dict[str, Any], generator: torch.Generator) -> dict[str, float]:
        """Take the gradient steps of an iteration.

        Args:
            steps: Newest steps, of :meth:`look_back`.
            generator: Draws the mini-batches.

        Returns:
            The mean of the loss.
        """
        if self.num_steps == 0:
            return {}
        targets = (steps["returns"] / self.estimator.units(steps["task"])).flatten()
        invalid = steps["invalid"].flatten()
        # Several processes step together: one with nothing but invalid steps takes part, their target is the value.
        kept = (~invalid | invalid.all()).nonzero().squeeze(-1)
        obs, total = steps["obs"].flatten(0, 1), torch.zeros((), device=targets.device)
        self.guard.begin()
        for _ in range(self.num_steps):
            draw = torch.randint(len(kept), (self.cfg.batch_size,), generator=generator, device=kept.device)
            rows = kept[draw]
            loss = (self.critic(obs[rows]).squeeze(-1) - targets[rows]).square().mean()
            self.guard.step(loss)
            total += loss.detach()
        return distributed.means({"critic_replay": (total / self.num_steps).item()}, targets.device)

    @torch.no_grad()
    def returns(self, steps: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Lambda-returns and advantages along trajectories, with the values of the current critic.

        Args:
            steps: Fields of the replay buffer in order of time, as :meth:`~m3po.storage.ReplayBuffer.latest` gives
                them.

        Returns:
            Returns and advantages in reward units, (T, N) each. The return of a step that never took place is the
            critic's own value.
        """
        invalid, dones, terminated = steps["invalid"], steps["dones"], steps["terminated"]
        values = self.estimator.values_of(steps["obs"], steps["task"])
        values.masked_fill_(invalid & ~values.isfinite(), 0.0)  # masks multiply below, and NaN stays
        next_values = torch.empty_like(values)
        next_values[:-1] = values[1:]
        ends = (dones & ~terminated) | invalid
        ends[-1] = ~terminated[-1]
        self.estimator.bootstrap(next_values, ends, steps)
        rewards = torch.where(invalid, values, steps["rewards"])  # no temporal difference there
        next_values.masked_fill_(invalid, 0.0)
        terminated, dones = terminated | invalid, dones | invalid
        return gae(rewards, values, next_values, terminated, dones, self.estimator.gamma, LAMBDA)
