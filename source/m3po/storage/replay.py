"""Replay buffer: the newest rollouts, sampled as sub-sequences that never cross a reset."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict

from m3po.errors import CheckpointError
from m3po.storage.rollout import RolloutStorage

SEQUENCE_FIELDS = ("obs", "task", "actions", "next_obs", "next_obs_valid", "rewards", "terminated", "dones", "invalid")
"""Fields that sub-sequences are made of."""

DIRECTIONS = ("gradient", "ppo", "plan")
"""The world model's gradient, and what PPO's part and the plans' part of the newest update did to the policy."""

NOTES = (*DIRECTIONS, "baseline")
"""What is noted of a step, to judge it later: how far the noise of its action lay along each direction, and the value
of its observation before the critic learnt from it."""


@dataclass
class Sequences:
    """B sub-sequences of H transitions. Steps after a reset are masked out and never contribute."""

    obs: TensorDict
    """Observations before each transition, batch size (B, H)."""

    next_obs: TensorDict
    """Observations after each transition and before any reset, batch size (B, H)."""

    actions: torch.Tensor
    """Executed actions, (B, H, A)."""

    rewards: torch.Tensor
    """Rewards, (B, H)."""

    terminated: torch.Tensor
    """True terminations, (B, H), boolean."""

    mask: torch.Tensor
    """Steps that belong to the same episode as the first and took place, (B, H), boolean."""

    next_mask: torch.Tensor
    """Those of them whose successor observation is known, (B, H), boolean."""

    task: torch.Tensor
    """Task ids, (B, H)."""


class ReplayBuffer:
    """The newest rollouts of N environments, in order of time, on the device."""

    def __init__(self, rollout: RolloutStorage, num_rollouts: int, seed: int = 0) -> None:
        """Allocate room for a number of rollouts shaped like the given one. They may differ in length.

        Draws come from a stream of their own: learning a model must not change what the policy samples.
        """
        self.num_envs, self.device = rollout.num_envs, rollout.device
        self.generator = torch.Generator(device=self.device).manual_seed(seed)
        self.capacity = num_rollouts * rollout.num_steps
        self.size = 0
        """Steps stored so far, at most :attr:`capacity`."""
        self.head = 0
        """Slot that the next rollout is written to."""
        self.newest = torch.arange(0, device=self.device)
        """Slots of the newest rollout."""
        self._fields: dict[str, Any] = {}
        for name in (*SEQUENCE_FIELDS, "planned"):
            source = getattr(rollout, name)
            if isinstance(source, TensorDict):
                buffers = {k: self._allocate(v) for k, v in source.items()}
                self._fields[name] = TensorDict(buffers, batch_size=(self.capacity, self.num_envs), device=self.device)
            else:
                self._fields[name] = self._allocate(source)
        self._fields["notes"] = torch.zeros(self.capacity, self.num_envs, len(NOTES), device=self.device)

    def _allocate(self, source: torch.Tensor) -> torch.Tensor:
        return torch.zeros(self.capacity, *source.shape[1:], dtype=source.dtype, device=self.device)

    def add(self, rollout: RolloutStorage) -> None:
        """Copy a finished rollout over the oldest steps."""
        self.newest = (self.head + torch.arange(rollout.num_steps, device=self.device)) % self.capacity
        for name, buffer in self._fields.items():
            buffer[self.newest] = 0.0 if name == "notes" else getattr(rollout, name)  # until :meth:`note`
        self.head = (self.head + rollout.num_steps) % self.capacity
        self.size = min(self.size + rollout.num_steps, self.capacity)

    def note(self, name: str, values: torch.Tensor) -> None:
        """Note one of :data:`NOTES` of the last T steps of the newest rollout, (T, N)."""
        self._fields["notes"][self.newest[-len(values) :], :, NOTES.index(name)] = values

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` needs, as tensors and plain values; the tensors are those in use."""
        fields = {
            name: dict(field.items()) if isinstance(field, TensorDict) else field
            for name, field in self._fields.items()
        }
        return {"fields": fields, "size": self.size, "head": self.head, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`.

        Raises:
            CheckpointError: If the rollouts had other sizes; nothing was loaded then.
        """
        found, here = _shapes(state["fields"]), _shapes(self.state_dict()["fields"])
        if found != here:
            there = found.get("rewards", "none")
            raise CheckpointError(
                f"the stored rollouts do not fit: {there} steps x environments there, {here['rewards']} here, or other "
                "observations. Resume with the settings that the run was started with."
            )
        for name, field in state["fields"].items():
            for key, value in field.items() if isinstance(field, dict) else [(None, field)]:
                (self._fields[name] if key is None else self._fields[name][key]).copy_(value)
        self.size, self.head = state["size"], state["head"]
        self.generator.set_state(state["generator"].cpu())

    def sample(self, batch_size: int, horizon: int) -> Sequences:
        """Draw sub-sequences uniformly over all starts whose ``horizon`` transitions are stored.

        Args:
            batch_size: Sub-sequences B.
            horizon: Transitions H, at most the steps stored.

        Returns:
            The sub-sequences.
        """
        oldest = self.head if self.size == self.capacity else 0
        draw: dict[str, Any] = {"size": (batch_size, 1), "generator": self.generator, "device": self.device}
        start, env = torch.randint(self.size - horizon + 1, **draw), torch.randint(self.num_envs, **draw)
        slot = (oldest + start + torch.arange(horizon, device=self.device)) % self.capacity
        return self._gather(slot, env)

    def latest(self, num_steps: int, names: Iterable[str] | None = None) -> dict[str, Any]:
        """The newest steps in order of time, all of them where fewer are stored.

        Args:
            num_steps: Steps.
            names: Fields; by default all.

        Returns:
            Fields, tensors and TensorDicts, (steps, N, ...) each. Those of an environment are one trajectory, which
            goes on after a reset where ``dones`` says so.
        """
        count = min(num_steps, self.size)
        slots = (self.head - count + torch.arange(count, device=self.device)) % self.capacity
        return {name: self._fields[name][slots] for name in names or self._fields}

    def interrupt(self) -> None:
        """Say that the environments do not go on from the newest step: all of its episodes end there, by time-out."""
        self._fields["dones"][(self.head - 1) % self.capacity] = True

    def _gather(self, slot: torch.Tensor, env: torch.Tensor) -> Sequences:
        """Collect transitions at slots (B, H) of environments (B, 1)."""
        flat = slot * self.num_envs + env
        picked = {name: self._fields[name].flatten(0, 1)[flat] for name in SEQUENCE_FIELDS}
        dones, valid, invalid = picked.pop("dones"), picked.pop("next_obs_valid"), picked.pop("invalid")
        ended = torch.cumsum(dones, dim=1) - dones.long()
        mask = (ended == 0) & ~invalid
        return Sequences(mask=mask, next_mask=mask & valid, **picked)


def _shapes(fields: dict[str, Any]) -> dict[str, Any]:
    """Shapes of nested tensors."""
    return {k: _shapes(v) if isinstance(v, dict) else tuple(v.shape) for k, v in fields.items()}
