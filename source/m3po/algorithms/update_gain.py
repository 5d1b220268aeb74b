"""How far updates of the policy should go, measured on the rollout that comes after them.

An update gains a lot on the rollout that it was made from. Most of that is noise learnt by heart. The next rollout has
not been seen by it, and tells the slope of the return at the end of the step, along the step. A slope above 0 says that
the step could have gone further, one below 0 that it went too far (a line search over many updates).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from rsl_rl.models import MLPModel

from m3po.algorithms.gates import Gates
from m3po.algorithms.policy_outputs import PolicyOutputs
from m3po.algorithms.statistics import count_per_task, mean_per_task
from m3po.storage import RolloutStorage

PARTS = ("ppo", "plan")
"""Parts of an update, in their order."""


class UpdateGain:
    """Measures each part of the newest update, and tells the gates, which set how far the next one may go."""

    def __init__(self, actor: MLPModel, gates: Gates, schedule: str) -> None:
        """Bind to a policy and its gates; ``schedule`` as in :class:`~m3po.config.AlgorithmCfg`."""
        self.actor, self.gates, self.measured = actor, gates, schedule == "measured"
        self.earlier = {part: copy.deepcopy(actor).requires_grad_(False) for part in PARTS}
        """The policy as it was before each part of the newest update."""
        self.known = False

    def keep(self, part: str) -> None:
        """Keep the policy of now, which a part of the update is about to change."""
        self.earlier[part].load_state_dict(self.actor.state_dict())
        self.known = True

    @torch.no_grad()
    def measure(self, st: RolloutStorage) -> dict[str, float]:
        """Measure on a rollout of the newest policy, with advantages.

        Returns:
            Of each part, means over the tasks: ``slope``, by how much the advantage still rises along it, stds of the
            advantage per std of the action; ``kl`` between the policies before and after, nats.
        """
        count = len(self.gates.gain)
        if not self.known:
            return {f"update/{part}_{name}": 0.0 for part in PARTS for name in ("slope", "kl")}
        task, kept, metrics = st.task.flatten(), (~st.lost & ~st.planned).flatten(), {}
        obs, actions, advantages = st.obs.flatten(0, 1), st.actions.flatten(0, 1), st.advantages.flatten()
        steps = count_per_task(kept, task, count)
        after = newest, sigma = st.mean.flatten(0, 1), st.std.flatten(0, 1)
        noise = (actions - newest) / sigma
        for part in reversed(PARTS):
            # What the normaliser has learnt since is not the update's doing.
            for name, statistics in self.actor.named_buffers():
                self.earlier[part].get_buffer(name).copy_(statistics)
            before = PolicyOutputs(self.earlier[part])(obs)
            kl = mean_per_task(gaussian_kl(before, after), kept, task, count)
            # Derivative of the log-density along what this part did to mean and std, at the newest policy.
            along = noise * (after[0] - before[0]) / sigma + (noise.square() - 1.0) * (after[1] / before[1]).log()
            rise = mean_per_task(along.sum(-1) * advantages, kept, task, count)
            slope = torch.where(kl > 1e-9, rise / (2.0 * kl).sqrt().clamp_min(1e-9), 0.0)
            if self.measured:
                self.gates.update_budget(part, slope, steps)
            metrics |= {f"update/{part}_slope": slope.mean().item(), f"update/{part}_kl": kl.mean().item()}
            after = before
        return metrics

    def state(self) -> dict[str, Any]:
        """What an exact continuation needs."""
        return {part: actor.state_dict() for part, actor in self.earlier.items()} if self.known else {}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state`."""
        for part, values in state.items():
            self.earlier[part].load_state_dict(values)
        self.known = bool(state)


def gaussian_kl(p: tuple[torch.Tensor, torch.Tensor], q: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """``KL(p || q)`` of diagonal Gaussians, mean and std (B, A) each: (B,). Dimensions that a task lacks count as 0."""
    (mean, std), (other, other_std) = p, q
    spread = (std.square() + (mean - other).square()) / other_std.square()
    return ((other_std / std).log() + 0.5 * (spread - 1.0)).sum(-1)
