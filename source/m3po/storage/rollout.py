"""One on-policy rollout, preallocated on the device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from tensordict import NestedKey, TensorDict


class RolloutStorage:
    """T steps of N environments with true terminations, time-outs, final observations and behaviour densities."""

    def __init__(
        self,
        obs: TensorDict,
        next_obs_groups: Iterable[NestedKey],
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
        self._shape = (num_steps, self.num_envs)

        self.obs = self._groups(obs)
        """Observations, batch size (T, N)."""
        self.next_obs = self._groups(obs.select(*next_obs_groups))
        """Observations that a step led to before any reset, batch size (T, N), some groups alone."""
        self.next_obs_valid = self._flags().fill_(True)
        """Whether these are known, (T, N): not where an episode ended and the environment did not deliver them."""
        self.task = torch.zeros(self._shape, dtype=torch.long, device=device)
        """Task ids, (T, N)."""
        self.actions = self._vectors(num_actions)
        """Executed actions, (T, N, A)."""
        self.mean = self._vectors(num_actions)
        """Mean of the policy, (T, N, A)."""
        self.std = self._vectors(num_actions)
        """Std of the policy, (T, N, A)."""
        self.plan_mean = self._vectors(num_actions)
        """Mean of the behaviour, (T, N, A); the policy's where nothing was planned."""
        self.planned = self._flags()
        """Whether a plan was acted on, (T, N)."""
        self.plan_gain = self._scalars()
        """Predicted gain of the plan over the policy, (T, N), in stds of the candidates' returns."""
        self.log_pi = self._scalars()
        """Log-probability of the action under the policy, (T, N)."""
        self.log_beta = self._scalars()
        """Log-probability of the action under the behaviour, (T, N)."""
        self.rewards = self._scalars()
        """Rewards, (T, N)."""
        self.terminated = self._flags()
        """True terminations, (T, N)."""
        self.dones = self._flags()
        """Any end of an episode, (T, N)."""
        self.invalid = self._flags()
        """Steps that never took place, because an environment had to be restarted, (T, N)."""
        self.values = self._scalars()
        """Values of the observations, reward units, (T, N)."""
        self.next_values = self._scalars()
        """Values of what the steps led to, reward units, (T, N)."""
        self.returns = self._scalars()
        """Lambda-returns, reward units, (T, N)."""
        self.advantages = self._scalars()
        """Advantages, in stds of the task's, (T, N)."""
        self.any_invalid = False
        self.step = 0

    def _groups(self, obs: TensorDict) -> TensorDict:
        buffers = {k: torch.zeros(self.num_steps, *v.shape, dtype=v.dtype, device=self.device) for k, v in obs.items()}
        return TensorDict(buffers, batch_size=self._shape, device=self.device)

    def _flags(self) -> torch.Tensor:
        return torch.zeros(self._shape, dtype=torch.bool, device=self.device)

    def _scalars(self) -> torch.Tensor:
        return torch.zeros(self._shape, device=self.device)

    def _vectors(self, dims: int) -> torch.Tensor:
        return torch.zeros(*self._shape, dims, device=self.device)

    def add_action(self, obs: TensorDict, task: torch.Tensor, **fields: torch.Tensor) -> None:
        """Record what was seen and done at the current step.

        Args:
            obs: Observations, batch size (N,), at least the stored groups.
            task: Task ids, (N,).
            **fields: ``actions, mean, std, plan_mean`` (N, A); ``log_pi, log_beta, plan_gain, planned`` (N,).

        Raises:
            OverflowError: If the rollout is already full.
        """
        if self.step >= self.num_steps:
            raise OverflowError("The rollout is full; call clear() before adding another step.")
        self.obs[self.step].copy_(obs.select(*self.obs.keys()))
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
        invalid: torch.Tensor | None = None,
    ) -> None:
        """Record what the environment answered, and move on to the next step.

        Args:
            next_obs: Observations before any reset, batch size (N,), at least the stored groups.
            next_obs_valid: Whether each row of ``next_obs`` is the true successor, (N,), boolean.
            rewards: Rewards, (N,).
            terminated: True terminations, (N,), boolean.
            dones: Any end of an episode, (N,), boolean.
            invalid: Environments whose step never took place, (N,), boolean; ``None``: none.
        """
        self.next_obs[self.step].copy_(next_obs.select(*self.next_obs.keys()))
        self.next_obs_valid[self.step].copy_(next_obs_valid)
        self.rewards[self.step].copy_(rewards)
        self.terminated[self.step].copy_(terminated)
        self.dones[self.step].copy_(dones)
        if invalid is not None:
            self.invalid[self.step].copy_(invalid)
            self.any_invalid = True
        self.step += 1

    def noise(self) -> torch.Tensor:
        """What was added to the mean of the behaviour, stds of the policy, (T, N, A)."""
        return (self.actions - self.plan_mean) / self.std

    def repair_invalid(self) -> None:
        """Make what invalid steps hold finite, whatever networks gave there: masks multiply, and NaN stays."""
        for name in ("actions", "mean", "std", "plan_mean", "log_pi", "log_beta", "plan_gain"):
            field = getattr(self, name)
            invalid = self.invalid.view(*self.invalid.shape, *[1] * (field.dim() - 2))
            field.masked_fill_(invalid & ~field.isfinite(), 1.0 if name == "std" else 0.0)

    def of_length(self, num_steps: int) -> RolloutStorage:
        """An empty storage that differs in the number of steps alone; this one where it does not."""
        if num_steps == self.num_steps:
            return self
        return RolloutStorage(self.obs[0], self.next_obs.keys(), num_steps, self.actions.shape[-1], self.device)

    def clear(self) -> None:
        """Start the next rollout."""
        if self.any_invalid:
            self.invalid.zero_()
            self.any_invalid = False
        self.step = 0

    def mini_batches(self, num_mini_batches: int, num_epochs: int) -> Iterator[dict[str, torch.Tensor | TensorDict]]:
        """Yield shuffled flat mini-batches of the steps that took place; one permutation serves all epochs (as rsl_rl).

        The fields are what the policy update reads.
        """
        samples = self.num_steps * self.num_envs
        kept = (~self.invalid).flatten().nonzero().squeeze(-1) if self.any_invalid else None
        size = (samples if kept is None else len(kept)) // num_mini_batches
        order = torch.randperm(num_mini_batches * size, device=self.device)
        if kept is not None:
            order = kept[order]
        names = ("obs", "actions", "mean", "std", "values", "log_pi", "log_beta", "returns", "advantages", "task")
        flat = {name: getattr(self, name).flatten(0, 1) for name in names}
        for _ in range(num_epochs):
            for i in range(num_mini_batches):
                index = order[i * size : (i + 1) * size]
                yield {name: values[index] for name, values in flat.items()}
