"""Running statistics kept per task, so that one task's scale never drowns another's.

All of them change only when ``update`` is called: they are frozen during a rollout and its policy update. What several
processes bring to an ``update`` is merged in all of them. No single sample weighs more than :data:`LARGEST` stds,
so that one wild number of a simulator does not set a unit for good.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from rsl_rl.modules.normalization import EmpiricalNormalization
from torch import nn

from m3po import distributed

LARGEST = 100.0
"""Size from which on a sample counts as this many stds, or times the usual reward. A reward that comes once in
10 000 steps is that large if nothing else is rewarded, so rare rewards pass."""

MEMORY = 2.0**20
"""Rows that older ones may weigh as much as, at most, in what policy and critic read: units follow a curriculum."""

USUAL_SHARE = 0.99
"""Share of a first rollout's rewards, the smaller ones, that say what is usual."""


class TaskNormalizer(nn.Module):
    """Per-task running mean and std of a vector."""

    scale: torch.Tensor
    mean: torch.Tensor
    var: torch.Tensor
    count: torch.Tensor

    def __init__(
        self,
        num_tasks: int,
        dim: int,
        task_dims: Sequence[int] | None = None,
        eps: float = 1e-2,
        memory: float = math.inf,
    ) -> None:
        """Start at mean 0 and std 1 for each of ``num_tasks`` tasks.

        Args:
            num_tasks: Tasks K.
            dim: Dimensions D of the vector, padded with zeros where a task has fewer.
            task_dims: Dimensions of each task, D_k. The tasks share layers behind, so each is scaled by
                ``sqrt(max_j D_j / D_k)`` to a common expected norm: otherwise a small task's signal is lost among the
                weights that large ones need, and its functions are learnt far more slowly. ``None``: nothing is scaled.
            eps: Added to the stds.
            memory: Rows of a task that older ones may weigh as much as, at most; what is older is forgotten.
        """
        super().__init__()
        self.eps, self.memory = eps, memory
        scale = [1.0] * num_tasks if task_dims is None else [(max(task_dims) / d) ** 0.5 for d in task_dims]
        # Where there is a scale it is part of the state: among other tasks, what was learnt with it keeps it.
        self.register_buffer("scale", torch.tensor(scale).unsqueeze(1), persistent=task_dims is not None)
        self.register_buffer("mean", torch.zeros(num_tasks, dim))
        self.register_buffer("var", torch.ones(num_tasks, dim))
        self.register_buffer("count", torch.zeros(num_tasks))

    def forward(self, x: torch.Tensor, task: torch.Tensor) -> torch.Tensor:
        """Normalise rows. Shapes (..., D) and (...,) -> (..., D)."""
        return (x - self.mean[task]) / ((self.var.sqrt() + self.eps) / self.scale)[task]

    def stds(self) -> torch.Tensor:
        """Stds of each task, (K, D)."""
        return self.var.sqrt() + self.eps

    def invert(self, x: torch.Tensor, task: torch.Tensor) -> torch.Tensor:
        """Rows whose normalised values are given. Shapes (..., D) and (...,) -> (..., D)."""
        return self.mean[task] + x * (self.stds() / self.scale)[task]

    @torch.no_grad()
    def update(self, x: torch.Tensor, task: torch.Tensor) -> None:
        """Merge a batch of rows (B, D) of tasks (B,) into the running statistics (parallel Welford)."""
        for k in range(self.count.shape[0]):
            rows = x if self.count.shape[0] == 1 else x[task == k]
            if self.count[k] > 0:
                rows = bounded(rows, self.mean[k], self.var[k], self.eps)
            count, mean, var = distributed.moments(rows)
            if count == 0:
                continue
            total = self.count[k] + count
            rate = count / total
            delta = mean - self.mean[k]
            self.mean[k] += rate * delta
            self.var[k] += rate * (var - self.var[k] + delta * (mean - self.mean[k]))
            self.count[k] = total.clamp(max=self.memory)


class BoundedNormalization(EmpiricalNormalization):
    """rsl_rl's normaliser of the observations of a single task; it forgets, and no sample weighs too much."""

    @torch.jit.unused
    def update(self, x: torch.Tensor) -> None:
        """Learn from rows (B, D)."""
        count = self.get_buffer("count")  # annotated as those of others are, TorchScript would not export it
        if count > 0:
            x = bounded(x, self.get_buffer("_mean"), self.get_buffer("_var"), self.eps)
        super().update(x)
        count.clamp_(max=int(MEMORY))


def bounded(rows: torch.Tensor, mean: torch.Tensor, var: torch.Tensor, eps: float) -> torch.Tensor:
    """Rows (B, D) within :data:`LARGEST` stds of a mean (D,); a dimension that never changed has no scale yet."""
    most = torch.where(var > 0.0, LARGEST * (var.sqrt() + eps), torch.inf)
    return rows.clamp(mean - most, mean + most)


class RewardStatistics(nn.Module):
    """Per-task reward scale, and reward of a termination."""

    square: torch.Tensor
    terminal: torch.Tensor
    count: torch.Tensor
    terminations: torch.Tensor

    def __init__(self, num_tasks: int, memory: float = math.inf) -> None:
        """Start at scale 1, terminal reward 0.

        Args:
            num_tasks: Tasks K.
            memory: Rewards of a task that older ones may weigh as much as, at most; what is older is forgotten.
        """
        super().__init__()
        self.memory = memory
        self.register_buffer("square", torch.ones(num_tasks))
        self.register_buffer("terminal", torch.zeros(num_tasks))
        self.register_buffer("count", torch.zeros(num_tasks))
        self.register_buffer("terminations", torch.zeros(num_tasks))

    def scale(self, task: torch.Tensor) -> torch.Tensor:
        """Root mean square of the per-step reward of surviving steps, reward units, shape of ``task``."""
        return self.square[task].sqrt().clamp_min(1e-6)

    def bounded(self, reward: torch.Tensor, task: torch.Tensor) -> torch.Tensor:
        """Rewards (B,) of tasks (B,), none larger than :data:`LARGEST` times what is usual in its task."""
        rate = self.terminations / self.count.clamp_min(1)
        usual = ((1.0 - rate) * self.square + rate * self.terminal.square()).sqrt()
        for k in (self.count == 0).nonzero().flatten().tolist():
            sizes = reward[task == k].abs().sort().values
            usual[k] = sizes[: math.ceil(USUAL_SHARE * len(sizes))].square().mean().sqrt() if len(sizes) else 0.0
        most = torch.where(usual > 0.0, LARGEST * usual, torch.inf)[task]
        return reward.clamp(-most, most)

    @torch.no_grad()
    def update(self, reward: torch.Tensor, terminated: torch.Tensor, task: torch.Tensor) -> None:
        """Merge a rollout's rewards (B,), true terminations (B,) and tasks (B,)."""
        sums = []
        for k in range(self.count.shape[0]):
            alive, ended = (task == k) & ~terminated, (task == k) & terminated
            counts = (alive.sum().to(reward), ended.sum().to(reward))
            sums.append(torch.stack((*counts, (reward.square() * alive).sum(), (reward * ended).sum())))
        for k, (n_alive, n_ended, squares, terminal_reward) in enumerate(distributed.total(torch.stack(sums))):
            n = n_alive + n_ended
            seen_alive = self.count[k] - self.terminations[k]
            self.square[k] += (
                n_alive / (seen_alive + n_alive).clamp_min(1) * (squares / n_alive.clamp_min(1) - self.square[k])
            )
            self.terminal[k] += (
                n_ended
                / (self.terminations[k] + n_ended).clamp_min(1)
                * (terminal_reward / n_ended.clamp_min(1) - self.terminal[k])
            )
            kept = (self.memory / (self.count[k] + n).clamp_min(1)).clamp(max=1.0)
            self.count[k] = (self.count[k] + n) * kept
            self.terminations[k] = (self.terminations[k] + n_ended) * kept
