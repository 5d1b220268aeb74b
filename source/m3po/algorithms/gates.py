"""Measured gates: how far a part may go, of each task, while the run goes on. Nothing else switches parts on or off.

docs/algorithm.md has a table of what each of them measures, and what follows.
"""

from __future__ import annotations

import torch
from torch import nn

GAIN_RATE, GAIN_STEPS = 0.1, 4096
"""Weight in the running mean of the gain of a rollout of so many steps, which tells it to about 0.016. Smaller ones
weigh in proportion, so that the mean is told to about 0.004 everywhere. Until there are enough of them, all rollouts so
far weigh the same, with nine more of gain 0."""

REALISED_RATE, REALISED_STEPS = 0.1, 1024
"""Weight in the running mean of the realised gain of a rollout with so many planned steps, and fewer in proportion."""

FULL_REALISED = 0.05
"""Realised gain, in stds of the advantage, from which on the full share of the environments acts by plans."""

LEAST_SHARE = 0.125
"""Smallest part of that share, which goes on measuring, while plans are worth something at all."""

REWARDED_RATE, REWARDED_ENOUGH = 0.1, 0.2
"""Weight of a rollout in the running share of rewarded trajectories, and the share that needs no bonus."""

BUDGET_RATE, BUDGET_STEPS = 1.0, 4096
"""Change of the logarithm of a KL budget, per slope that a rollout of so many steps shows. Another number
weighs by its square root, up to 2: the noise of a slope, and so of the budgets, is the same then."""

LEAST_BUDGET = 1.0 / 32.0
"""Smallest part of a KL budget."""

LARGEST_SLOPE = 0.2
"""Bound of the slope that a single rollout shows."""

LEAST_MODEL_STEPS = 0.25
"""Part of the world model's steps that is taken while its gradient is worth nothing."""


class Gates(nn.Module):
    """Running measurements of K tasks; part of a checkpoint."""

    def __init__(self, num_tasks: int) -> None:
        """Start closed for plans, and open for what only they lead to."""
        super().__init__()
        self.gain = nn.Buffer(torch.zeros(num_tasks))
        """Rise of the real advantage along the gradient, in its stds, per std of the action."""
        self.judged = nn.Buffer(torch.zeros(num_tasks))
        """Rollouts that the gain was measured on."""
        self.gradient_size = nn.Buffer(torch.ones(num_tasks))
        """Root mean square of the gradients at the observations of the newest rollout, reward units per std."""
        self.realised = nn.Buffer(torch.full((num_tasks,), FULL_REALISED))
        """Advantage of planned environments over the others, in its stds."""
        self.ppo_budget = nn.Buffer(torch.ones(num_tasks))
        """Part of the KL budget that PPO's update may use, per rollout."""
        self.plan_budget = nn.Buffer(torch.ones(num_tasks))
        """Part of their trust region that plans may use, per rollout, before :meth:`trust`."""
        self.waited = 1
        """Rollouts that the present update has waited for."""
        self.rewarded = nn.Buffer(torch.zeros(num_tasks))
        """Share of recent trajectories with a reward."""

    def trust(self, full_gain: float) -> torch.Tensor:
        """Part of its trust region that a plan may use, (K,), in [0, 1], of its length."""
        return (self.gain / full_gain).clamp(0.0, 1.0)

    def worth_acting(self) -> torch.Tensor:
        """How much plans have been worth acting on, (K,), in [0, 1]."""
        return torch.where(self.gain > 0.0, (self.realised / FULL_REALISED).clamp(0.0, 1.0), 0.0)

    def acting(self) -> torch.Tensor:
        """Part of the largest share of the environments that acts by plans, (K,), in [0, 1]."""
        return torch.where(self.gain > 0.0, self.worth_acting().clamp_min(LEAST_SHARE), 0.0)

    def unrewarded(self) -> torch.Tensor:
        """How far the episodes of a task are from being rewarded, (K,): 1 if none is, 0 from a fifth of them on."""
        return (1.0 - self.rewarded / REWARDED_ENOUGH).clamp(min=0.0)

    def model_steps(self, full_gain: float) -> float:
        """Part of the world model's gradient steps that is worth taking."""
        worth = 2.0 * self.trust(full_gain)
        return torch.maximum(worth, self.unrewarded()).max().clamp(LEAST_MODEL_STEPS, 1.0).item()

    def wait(self, most: int) -> int:
        """Rollouts that the next update waits for, a power of two of at most ``most``.

        Four updates of PPO's that may each go a quarter of the way become one that goes all of it, at a quarter of the
        work. The task that may go furthest decides.
        """
        longest, self.waited = self.ppo_budget.max().item(), 1
        while 2 * self.waited <= min(most, 1.0 / longest):
            self.waited *= 2
        return self.waited

    def part(self, name: str) -> torch.Tensor:
        """Part of its KL that ``ppo`` or ``plan`` may use in an update that waited, (K,), in [0, 1]."""
        return (self.waited * getattr(self, f"{name}_budget")).clamp(max=1.0)

    @torch.no_grad()
    def update_gain(self, gain: torch.Tensor, steps: torch.Tensor) -> None:
        """Take in the gain (K,) that a rollout with ``steps`` (K,) showed."""
        weight = torch.maximum(GAIN_RATE * steps / GAIN_STEPS, 1.0 / (1.0 / GAIN_RATE + self.judged)).clamp(
            max=GAIN_RATE
        )
        self.judged.add_(steps > 0)
        self.gain.lerp_(gain.nan_to_num(0.0, 0.0, 0.0), weight * (steps > 0))

    @torch.no_grad()
    def update_budget(self, part: str, slope: torch.Tensor, steps: torch.Tensor) -> None:
        """Let the budget of a part of the update grow while the return still rises at the end of its steps.

        Args:
            part: ``ppo`` or ``plan``.
            slope: Slope of the advantage there, along the step, in stds per std of the action, (K,).
            steps: Steps that this was measured on, (K,).
        """
        slope = slope.nan_to_num(0.0, 0.0, 0.0).clamp(-LARGEST_SLOPE, LARGEST_SLOPE)
        change = BUDGET_RATE * slope * (steps / BUDGET_STEPS).clamp(max=4.0).sqrt()
        getattr(self, f"{part}_budget").mul_(change.exp()).clamp_(LEAST_BUDGET, 1.0)

    @torch.no_grad()
    def update_realised(self, realised: torch.Tensor, planned_steps: torch.Tensor) -> None:
        """Take in the realised gain (K,) of a rollout with so many planned steps (K,); 0: none can be told."""
        weight = REALISED_RATE * (planned_steps / REALISED_STEPS).clamp(max=1.0)
        self.realised.lerp_(realised.nan_to_num(0.0, 0.0, 0.0), weight)

    @torch.no_grad()
    def update_rewarded(self, share: torch.Tensor, seen: torch.Tensor) -> None:
        """Take in the share (K,) of rewarded trajectories; ``seen`` (K,): tasks that a rollout showed."""
        self.rewarded.lerp_(share, REWARDED_RATE * seen.to(share.dtype))

    def metrics(self) -> dict[str, float]:
        """The state of the gates, means over the tasks, for the report."""
        names = ("gain", "realised", "rewarded", "ppo_budget", "plan_budget")
        state = {name: getattr(self, name) for name in names}
        return {f"gate/{name}": value.mean().item() for name, value in state.items()} | {"gate/rollouts": self.waited}
