"""What the newest update did to the policy, in two parts: PPO's, and the regression onto plans."""

from __future__ import annotations

import copy
from typing import Any

import torch
from rsl_rl.models import MLPModel

from m3po.algorithms.policy_outputs import PolicyOutputs
from m3po.algorithms.statistics import mean_per_task
from m3po.storage import ReplayBuffer, RolloutStorage

PARTS = ("ppo", "plan")
"""Parts of an update, in their order."""


class NewestUpdate:
    """Keeps the policies before each part of the newest update, and says how the next rollout lies along them."""

    def __init__(self, actor: MLPModel, num_tasks: int) -> None:
        """Bind to a policy of K tasks."""
        self.actor, self.num_tasks = actor, num_tasks
        self.earlier = {part: copy.deepcopy(actor).requires_grad_(False) for part in PARTS}
        """The policy as it was before each part of the newest update."""
        self.known = False

    def keep(self, part: str) -> None:
        """Keep the current policy, which a part of the update is about to change."""
        self.earlier[part].load_state_dict(self.actor.state_dict())
        self.known = True

    @torch.no_grad()
    def note(self, st: RolloutStorage, replay: ReplayBuffer) -> dict[str, float]:
        """Note in the replay buffer how the newest policy's rollout, which it holds, lies along each part.

        That is the derivative of an action's log-density, along what the part did to mean and std, at the newest
        policy, per std of the action: the slope of the return there is its mean product with the advantage.

        Returns:
            Of each part, mean over the tasks: ``kl`` between the policies before and after, nats.
        """
        if not self.known:
            return {f"update/{part}_kl": 0.0 for part in PARTS}
        task, kept, metrics = st.task.flatten(), ~st.invalid.flatten(), {}
        obs, noise, sigma = st.obs.flatten(0, 1), st.noise().flatten(0, 1), st.std.flatten(0, 1)
        after = st.mean.flatten(0, 1), sigma
        for part in reversed(PARTS):
            # What the normaliser has learnt since is not the update's doing.
            for name, statistics in self.actor.named_buffers():
                self.earlier[part].get_buffer(name).copy_(statistics)
            before = PolicyOutputs(self.earlier[part])(obs)
            kl = mean_per_task(gaussian_kl(before, after), kept, task, self.num_tasks)
            along = noise * (after[0] - before[0]) / sigma + (noise.square() - 1.0) * (after[1] / before[1]).log()
            along = along.sum(-1) / (2.0 * kl).sqrt().clamp_min(1e-9)[task]
            replay.note(part, torch.where((kl > 1e-9)[task], along, 0.0).view(st.task.shape))
            metrics[f"update/{part}_kl"] = kl.mean().item()
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
