"""What gradients, plans and updates were worth, told by the rewards that followed.

Advantages of a short rollout end in values of the critic after a few steps. Plans climb these very values, so they look
good there even where the critic is wrong. So a step is judged once it has enough later ones, by its lambda-return along
them. What is judged, in stds of the advantage:

* the gradient of the world model: how much the advantage rises along it, per std of the action;
* each part of an update: the same along the update, at its end. The next rollout has not been seen by it. A slope above
  0 says that the step could have gone further, one below 0 that it went too far (a line search over many updates);
* plans that were acted on: the advantage of planned environments over the others. One rollout says little of it, as
  environments differ by more than their actions; the gates keep the mean over many.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from m3po.algorithms.advantage_estimator import AdvantageEstimator
from m3po.algorithms.behaviour_metrics import gain_of_plans
from m3po.algorithms.gates import Gates
from m3po.algorithms.statistics import count_per_task, mean_per_task
from m3po.storage.replay import DIRECTIONS

LATER = 24
"""Steps that must have followed; fewer where the replay buffer's horizon has not room for them."""


@dataclass
class Judged:
    """T steps of N environments, judged."""

    advantages: torch.Tensor
    """Advantages, in stds of the task's, (T, N)."""

    along: torch.Tensor
    """How far the noise of the actions lay along each of :data:`~m3po.storage.replay.DIRECTIONS`, (T, N, 3)."""

    planned: torch.Tensor
    """Whether a plan was acted on, (T, N)."""

    invalid: torch.Tensor
    """Steps that never took place, (T, N)."""

    task: torch.Tensor
    """Task ids, (T, N)."""


class Hindsight:
    """Judges each rollout once, and tells the gates."""

    def __init__(self, estimator: AdvantageEstimator, gates: Gates, horizon: int, schedule: str) -> None:
        """Bind to the gates.

        Args:
            estimator: Standardises advantages.
            gates: They keep the running means.
            horizon: Newest steps of each environment that are looked back at.
            schedule: As in :class:`~m3po.config.AlgorithmCfg`; KL budgets follow the slopes if it is ``measured``.
        """
        self.estimator, self.gates, self.horizon, self.measured = estimator, gates, horizon, schedule == "measured"
        self.room = horizon - LATER
        """Steps of a rollout for which enough later ones are looked back at."""

    def judge(self, steps: dict[str, torch.Tensor], num_steps: int) -> Judged | None:
        """Judge the newest rollout that has enough later steps.

        Args:
            steps: Newest steps with advantages, as :meth:`~m3po.algorithms.critic_replay.CriticReplay.look_back` gives
                them.
            num_steps: Steps T of a rollout.

        Returns:
            The rollout, ``None`` while there is none.
        """
        later = max(0, min(LATER, self.horizon - num_steps))
        end = len(steps["invalid"]) - later
        if end <= 0:
            return None
        fields = {name: steps[name] for name in ("advantages", "planned", "invalid", "task")}
        fields["along"] = steps["notes"][..., : len(DIRECTIONS)]
        judged = Judged(**{name: field[max(0, end - num_steps) : end].clone() for name, field in fields.items()})
        self.estimator.standardise(judged.advantages, ~judged.invalid, judged.task)
        return judged

    def measure(self, judged: Judged | None) -> dict[str, float]:
        """Tell the gates what a rollout was worth.

        Returns:
            Means over the tasks; 0 where nothing is judged.
        """
        names = ("plan/gain", "update/ppo_slope", "update/plan_slope", "planner/lasting_gain")
        if judged is None:
            return dict.fromkeys(names, 0.0)
        task, count, gates = judged.task, len(self.gates.gain), self.gates
        rises = (judged.along * judged.advantages.unsqueeze(-1)).flatten(0, 1)
        gain, ppo, plan = mean_per_task(rises, ~judged.invalid.flatten(), task.flatten(), count).unbind(-1)
        steps = count_per_task(~judged.invalid, task, count)
        gates.update_gain(gain, steps)
        if self.measured:
            for part, slope in (("ppo", ppo), ("plan", plan)):
                went = judged.along[..., DIRECTIONS.index(part)] != 0.0  # else there was no such part
                gates.update_budget(part, slope, count_per_task(went & ~judged.invalid, task, count))
        lasting, planned = gain_of_plans(judged.advantages, judged.planned, judged.invalid, task, count)
        gates.update_realised(lasting, planned)
        found = [x.mean().item() for x in (gain, ppo, plan)] + [lasting.sum().item() / max(1, int((planned > 0).sum()))]
        return dict(zip(names, found, strict=True))
