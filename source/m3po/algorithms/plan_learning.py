"""Plans while learning: the policy moves along the gradient of the imagined return, at real observations.

PPO learns from how an action happened to turn out. The model tells how the return *would* change with the action, in
every dimension at once and without that noise. A plan is a step along this gradient within a trust region, and the
policy's mean is regressed onto it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from rsl_rl.models import MLPModel
from tensordict import TensorDict

from m3po import distributed
from m3po.algorithms.gates import Gates
from m3po.algorithms.policy_outputs import PolicyOutputs
from m3po.algorithms.statistics import count_per_task, mean_per_task
from m3po.algorithms.step_guard import StepGuard
from m3po.algorithms.tasks import Tasks
from m3po.config import AlgorithmCfg
from m3po.planning import Objective
from m3po.storage import ReplayBuffer, RolloutStorage

LARGEST_SHIFT = 4.0
"""A plan goes no further than this multiple of the root mean square of all plans."""

NUM_EPOCHS = 16
"""Passes of the policy's regression onto the plans. Few large steps move the policy as far, but hardly along the
plans."""

EXPECTED_KL = 0.5
"""KL that the regression is expected to move the policy by, as a share of the plans'."""

FIRST_RATE, RATES = 1e-3, (1e-5, 1e-2)
"""First step size of the regression, and its bounds."""

GOOD_FIT = (0.8, 1.2)
"""Multiples of the regression's movement that need no other step size."""


@dataclass
class Plans:
    """Plans at B observations."""

    obs: TensorDict
    """Observations, batch size (B,), those of the rollout first."""

    shift: torch.Tensor
    """Planned shift of the mean action, stds of the policy, (B, A)."""

    weight: torch.Tensor
    """1 where a plan is to be learnt from, else 0, (B,)."""

    expected_kl: float
    """KL by which they are expected to move the policy, nats."""


class PlanLearner:
    """Plans at rollout and stored observations, and regresses the policy onto them."""

    def __init__(
        self,
        actor: MLPModel,
        policy: PolicyOutputs,
        objective: Objective,
        gates: Gates,
        tasks: Tasks,
        cfg: AlgorithmCfg,
    ) -> None:
        """Create the optimiser.

        Args:
            actor: Policy.
            policy: Its mean and std.
            objective: Imagined return.
            gates: They say how far plans may go.
            tasks: Tasks of the environments.
            cfg: Configuration.
        """
        self.actor, self.policy, self.objective, self.gates, self.tasks = actor, policy, objective, gates, tasks
        self.cfg, self.stored_steps = cfg.planner, cfg.critic_replay.horizon
        self.num_states = round(cfg.replay_ratio * self.cfg.num_states)
        self.num_mini_batches = cfg.num_mini_batches
        self.optimizer = torch.optim.Adam(actor.parameters(), lr=FIRST_RATE, fused=True)
        self.guard = StepGuard("plans", self.optimizer, (actor,), cfg.max_grad_norm)

    def plan(self, st: RolloutStorage, replay: ReplayBuffer) -> tuple[Plans | None, dict[str, float]]:
        """Plan at the observations of a finished rollout, which the model has not been trained on yet.

        So the rollout also tells what the gradient is worth: its actions happened to lie more or less along it, and
        what came of them will be known. This is noted in the replay buffer.

        Args:
            st: The finished rollout.
            replay: Replay buffer, the finished rollout in it.

        Returns:
            The plans, ``None`` where none are made, and ``max_kl``: their trust region, nats.
        """
        if self.cfg.max_learning_kl == 0.0:
            return None, {}
        count, own, kept = self.tasks.count, st.task.flatten(), ~st.invalid.flatten()
        obs, task, real = self._observations(st, replay)
        mean, std = (x.detach() for x in self.policy(obs))
        z = self.objective.encode(obs, task).detach()
        gradient = self.objective.gradient(z, mean, std, task) * self.tasks.action_mask[task]
        size = mean_per_task(gradient[: len(own)].square().sum(-1), kept, own, count).sqrt().clamp_min(1e-12)
        direction = gradient / size[task].unsqueeze(-1)
        direction = direction * (LARGEST_SHIFT / direction.norm(dim=-1, keepdim=True).clamp_min(LARGEST_SHIFT))
        along = (direction[: len(own)] * st.noise().flatten(0, 1)).sum(-1)
        replay.note("gradient", along.view(st.task.shape))
        steps = count_per_task(kept, own, count)
        self.gates.gradient_size.copy_(torch.where(steps > 0, size, self.gates.gradient_size))
        budget = self.cfg.max_learning_kl * self.gates.part("plan")
        radius = (2.0 * budget).sqrt() * self.gates.trust(self.cfg.full_gain)
        shift = direction * radius[task].unsqueeze(-1)
        weight = (real & (radius > 0.0)[task]).to(radius.dtype)
        max_kl = 0.5 * radius.square().mean().item()
        return Plans(obs, shift, weight, EXPECTED_KL * max_kl), {"plan/max_kl": max_kl}

    def _observations(self, st: RolloutStorage, replay: ReplayBuffer) -> tuple[TensorDict, torch.Tensor, torch.Tensor]:
        """Observations to plan at, those of the rollout first, their tasks, and which of their steps took place."""
        found = st.obs.flatten(0, 1), st.task.flatten(), ~st.invalid.flatten()
        rows = len(found[1])
        more = min(3 * rows, self.num_states - rows)
        if more <= 0:
            return found
        latest = replay.latest(self.stored_steps, ("obs", "task", "invalid"))
        picked = torch.randint(latest["invalid"].numel(), (more,), generator=replay.generator, device=found[1].device)
        stored = {name: field.flatten(0, 1)[picked] for name, field in latest.items()}
        obs, task, real = found
        obs = TensorDict.cat([obs, stored["obs"]])
        return obs, torch.cat((task, stored["task"])), torch.cat((real, ~stored["invalid"]))

    def regress(self, plans: Plans | None, generator: torch.Generator) -> dict[str, float]:
        """Regress the policy's mean onto plans, from where it is now.

        The policy moves by the multiple of the regression's movement that fits the plans best: the square of their
        cosine as a share of the plans' KL. So what no network can follow moves nothing. The step size follows that
        multiple.

        Args:
            plans: Plans.
            generator: Draws the order of the mini-batches.

        Returns:
            ``kl`` between the policies before and after, nats, ``cosine`` between what was planned and what came out,
            and the ``learning_rate``.
        """
        rate = self.optimizer.param_groups[0]["lr"]
        size = 0.0 if plans is None else distributed.mean(plans.weight.mean(), weight=len(plans.weight)).item()
        if plans is None or size == 0.0:
            return {"plan/kl": 0.0, "plan/cosine": 0.0, "plan/learning_rate": rate}
        obs, shift, weight = plans.obs, plans.shift, plans.weight
        before = [p.detach().clone() for p in self.actor.parameters()]
        mean, std = (x.detach().clone() for x in self.policy(obs))
        target = mean + std * shift
        self.guard.begin()
        for _ in range(NUM_EPOCHS):
            order = torch.randperm(len(weight), generator=generator, device=weight.device)
            for rows in order.chunk(self.num_mini_batches):
                off = ((self.actor(obs[rows]) - target[rows]) / std[rows]).square().sum(-1)
                self.guard.step(0.5 * (off * weight[rows]).mean() / size, weight=len(rows))
        _, fit, cosine = self._moved(obs, mean, std, shift, weight)
        with torch.no_grad():  # for small moves the mean is linear in the weights
            for parameter, old in zip(self.actor.parameters(), before, strict=True):
                parameter.copy_(torch.lerp(old, parameter, fit))
        self.optimizer.param_groups[0]["lr"] = _adapted(rate, fit)
        moved = self._moved(obs, mean, std, shift, weight)[0]
        return {"plan/kl": 0.5 * moved / size, "plan/cosine": cosine, "plan/learning_rate": rate}

    @torch.no_grad()
    def _moved(
        self, obs: TensorDict, mean: torch.Tensor, std: torch.Tensor, shift: torch.Tensor, weight: torch.Tensor
    ) -> tuple[float, float, float]:
        """Mean square of the policy's movement, the multiple of it that fits the plans best, and their cosine."""
        moved = (self.actor(obs) - mean) / std
        pairs = ((moved, moved), (shift, shift), (moved, shift))
        sums = torch.stack([((x * y).sum(-1) * weight).mean() for x, y in pairs])
        moves, shifts, both = distributed.mean(sums, weight=len(weight)).tolist()
        return moves, max(0.0, both / max(moves, 1e-12)), both / max((moves * shifts) ** 0.5, 1e-12)


def _adapted(rate: float, fit: float) -> float:
    """The next step size of a regression, of whose movement a multiple fits the plans best."""
    if fit < GOOD_FIT[0]:
        return max(RATES[0], rate / 1.5)
    if fit > GOOD_FIT[1]:
        return min(RATES[1], rate * 1.5)
    return rate
