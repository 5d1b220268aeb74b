"""The policy that is played: an average over the last iterations of the one that learns.

A policy that learns from small rollouts changes by what happens to be in them. States that are rare there, as the first
seconds of long episodes are, can be forgotten within a few updates and be learnt again within a few more; the newest
weights are those of one such moment. Averaged weights (Polyak and Juditsky 1992) hold what they have in common.
"""

from __future__ import annotations

from typing import Any

from rsl_rl.models import MLPModel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

KEY = "average_actor_state_dict"
"""Where a checkpoint holds it; of one that has none, its policy stands in."""


class PolicyAverage:
    """Exponential moving average of a policy's weights; its statistics are the policy's own."""

    def __init__(self, actor: MLPModel, decay: float) -> None:
        """Start with the current weights.

        Args:
            actor: The policy that learns.
            decay: Weight of the average before each update, in [0, 1); with 0 the policy itself is played.
        """
        self.actor = actor
        self._average: Any = None  # torch types the module of an AveragedModel as any module
        if decay > 0:
            self._average = AveragedModel(actor, multi_avg_fn=get_ema_multi_avg_fn(decay)).eval()

    @property
    def policy(self) -> MLPModel:
        """What is to be played."""
        return self.actor if self._average is None else self._average.module

    def update(self) -> None:
        """Take in the policy after an iteration."""
        if self._average is not None:
            self._average.update_parameters(self.actor)

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {} if self._average is None else {KEY: self._average.module.state_dict()}

    def load(self, content: dict[str, Any], strict: bool = True) -> None:
        """Restore :meth:`state` from a checkpoint, whose policy is loaded already."""
        if self._average is not None:
            self._average.module.load_state_dict(content[KEY], strict=strict)
            self._average.n_averaged.fill_(1)  # at 0 the next update would begin the average anew
