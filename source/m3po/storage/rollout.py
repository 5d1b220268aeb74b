"""One on-policy rollout, preallocated on the device."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from tensordict import TensorDict


class RolloutStorage:
    """T steps of N environments with true terminations, time-outs, final observations and behaviour densities.

    ``next_obs[t]`` is the observation that step ``t`` led to before any reset, for the observation groups that need it;
    ``next_obs_valid[t]`` is False where an episode ended and the environment did not deliver it. ``lost[t]`` marks
    steps that never took place, because an environment had to be restarted: nothing is learnt from them.
    """

    def __init__(
        self,
        obs: TensorDict,
        next_obs_groups: list[str],
        num_steps: int,
        num_actions: int,
        device: str,
    ) -> None:
        """Allocate the buffers.

        Args:
            obs: Example observations, batch size (N,).
            next_obs_groups: Observation groups whose successor is stored too.
            num_steps: Steps T.
            num_actions: Action dimensions A.
            device: Torch device.
        """
        self.num_steps, self.num_envs, self.device = num_steps, obs.batch_size[0], device
        shape = (num_steps, self.num_envs)

        def allocate(groups: TensorDict) -> TensorDict:
            buffers = {k: torch.zeros(num_steps, *v.shape, dtype=v.dtype, device=device) for k, v in groups.items()}
            return TensorDict(buffers, batch_size=shape, device=device)

        self.obs = allocate(obs)
        self.next_obs = allocate(obs.select(*next_obs_groups))
        self.next_obs_valid = torch.ones(shape, dtype=torch.bool, device=device)
        self.task = torch.zeros(shape, dtype=torch.long, device=device)
        for name in ("actions", "mean", "std", "plan_mean"):
            setattr(self, name, torch.zeros(*shape, num_actions, device=device))
        scalars = ("rewards", "values", "next_values", "log_pi", "log_beta", "plan_gain", "returns", "advantages")
        for name in scalars:
            setattr(self, name, torch.zeros(shape, device=device))
        for name in ("terminated", "dones", "planned", "lost"):
            setattr(self, name, torch.zeros(shape, dtype=torch.bool, device=device))
        self.any_lost = False
        self.step = 0

    def add_action(self, obs: TensorDict, task: torch.Tensor, **fields: torch.Tensor) -> None:
        """Record what was seen and done at the current step.

        Args:
            obs: Observations, batch size (N,).
            task: Task ids, (N,).
            **fields: ``actions, mean, std, plan_mean`` (N, A); ``values, log_pi, log_beta, plan_gain, planned`` (N,).

        Raises:
            OverflowError: If the rollout is already full.
        """
        if self.step >= self.num_steps:
            raise OverflowError("The rollout is full; call clear() before adding another step.")
        self.obs[self.step].copy_(obs)
        self.task[self.step].copy_(task)
        for name, value in fields.items():
            getattr(self, name)[self.step].copy_(value)

    def add_outcome(
        self,
        next_obs: TensorDict,
        next_obs_valid: torch.Tensor,
        rewards: torch.Tensor,
        terminated: torch.Tensor,
        dones: torch.Tensor,
        lost: torch.Tensor | None = None,
    ) -> None:
        """Record what the environment answered, and move on to the next step.

        Args:
            next_obs: Observations before any reset, batch size (N,), at least the stored groups.
            next_obs_valid: Whether each row of ``next_obs`` is the true successor, (N,), boolean.
            rewards: Rewards, (N,).
            terminated: True terminations, (N,), boolean.
            dones: Any end of an episode, (N,), boolean.
            lost: Environments whose step never took place, (N,), boolean; ``None``: none.
        """
        self.next_obs[self.step].copy_(next_obs.select(*self.next_obs.keys()))
        self.next_obs_valid[self.step].copy_(next_obs_valid)
        self.rewards[self.step].copy_(rewards)
        self.terminated[self.step].copy_(terminated)
        self.dones[self.step].copy_(dones)
        if lost is not None:
            self.lost[self.step].copy_(lost)
            self.any_lost = True
        self.step += 1

    def repair_lost(self) -> None:
        """Make what lost steps hold finite, even where networks gave something else: masks multiply, and NaN stays."""
        for name in ("actions", "mean", "std", "plan_mean", "values", "log_pi", "log_beta", "plan_gain"):
            field = getattr(self, name)
            lost = self.lost.view(*self.lost.shape, *[1] * (field.dim() - 2))
            field.masked_fill_(lost & ~field.isfinite(), 1.0 if name == "std" else 0.0)

    def clear(self) -> None:
        """Start the next rollout."""
        if self.any_lost:
            self.lost.zero_()
            self.any_lost = False
        self.step = 0

    def mini_batches(self, num_mini_batches: int, num_epochs: int) -> Iterator[dict[str, torch.Tensor | TensorDict]]:
        """Yield shuffled flat mini-batches of the steps that took place; one permutation serves all epochs (as rsl_rl).

        The fields are those of :meth:`add_action` with ``returns`` and ``advantages``.
        """
        samples = self.num_steps * self.num_envs
        kept = (~self.lost).flatten().nonzero().squeeze(-1) if self.any_lost else None
        size = (samples if kept is None else len(kept)) // num_mini_batches
        order = torch.randperm(num_mini_batches * size, device=self.device)
        if kept is not None:
            order = kept[order]
        names = ("obs", "actions", "mean", "std", "plan_mean", "values", "log_pi", "log_beta", "returns", "advantages")
        flat = {name: getattr(self, name).flatten(0, 1) for name in (*names, "task", "planned", "plan_gain")}
        for _ in range(num_epochs):
            for i in range(num_mini_batches):
                index = order[i * size : (i + 1) * size]
                yield {name: values[index] for name, values in flat.items()}
