"""The last steps of all environments, kept for the file that is written when one of them goes wrong."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from m3po.envs.interface import M3POEnv
from m3po.runners.checkpoint import write_checkpoint

STEPS = 32
"""Steps that are kept: enough to see an explosion build up, little beside a rollout."""

MAX_ENVS = 16
"""Environments in a file."""

LIMIT = 1e15
"""Larger numbers count as infinite: statistics and losses add up their squares, and these overflow soon after."""

FORMAT = 1
"""Version of the file's layout."""


def is_sound(x: torch.Tensor) -> torch.Tensor:
    """Where numbers are finite, and not larger than :data:`LIMIT`; any shape."""
    return x.abs() <= LIMIT  # false for NaN


class FlightRecorder:
    """A ring of the last steps, on the device, as they were before anything was masked.

    Only vectors are kept: images would be most of the memory. "Finite" means :func:`is_sound` here. An environment with
    ``get_state() -> dict``, (N, ...) each, has the state before each step recorded too, from which
    :mod:`m3po.cli.replay_nonfinite` starts.
    """

    def __init__(self, env: M3POEnv, about: dict[str, Any]) -> None:
        """Start empty.

        Args:
            env: The environments.
            about: Plain values to be written along.
        """
        self.env, self.about = env, about
        self.step = 0
        """Steps recorded so far."""
        self._ring: dict[str, torch.Tensor] = {}
        self._terms = observation_terms(env)

    def begin(self, actions: torch.Tensor) -> None:
        """Record the state and what is about to be done in it, (N, A)."""
        for name, value in self.env.get_state().items():
            self._write(f"state/{name}", value)
        self._write("actions", actions)

    def end(
        self,
        answer: tuple[Mapping[str, torch.Tensor], torch.Tensor, torch.Tensor, dict[str, Any]],
        final: Mapping[str, torch.Tensor],
        findings: Mapping[str, torch.Tensor],
        fresh: torch.Tensor,
    ) -> None:
        """Record what came of it, which completes the step.

        Args:
            answer: The environment's.
            final: Final observations, where the environment delivered any.
            findings: Where something was not finite, (N,) each, by what it was.
            fresh: Environments in which that is new, (N,).
        """
        obs, rewards, dones, _ = answer
        self._write("rewards", rewards)
        self._write("dones", dones.bool())
        self._write("fresh", fresh)
        for label, groups in (("observations", obs), ("final_observations", final)):
            for group, value in groups.items():
                if value.dim() == 2:
                    self._write(f"{label}/{group}", value)
        for name, rows in findings.items():
            self._write(f"findings/{name}", rows)
        self.step += 1

    def _write(self, name: str, value: torch.Tensor) -> None:
        if name not in self._ring:
            self._ring[name] = torch.zeros(STEPS, *value.shape, dtype=value.dtype, device=value.device)
        self._ring[name][self.step % STEPS].copy_(value)

    def _slot(self, late: bool) -> int:
        """Slot of the last step, or of the one before."""
        return (self.step - (2 if late else 1)) % STEPS

    def fresh(self, late: bool) -> list[int]:
        """Environments in which something new was found in the last step, or in the one before it."""
        return self._ring["fresh"][self._slot(late)].nonzero().squeeze(1).tolist()

    def describe(self, late: bool) -> list[str]:
        """What was not finite in those environments: observation groups with their terms, rewards with theirs."""
        slot = self._slot(late)
        fresh = self._ring["fresh"][slot]
        result = []
        for name in [name for name in self._ring if name.startswith("findings/")]:
            rows = self._ring[name][slot] & fresh
            if not rows.any():
                continue
            source = name.removeprefix("findings/")
            kind, _, group = source.rpartition(" ")
            values = self._ring.get(f"{kind.replace(' ', '_')}s/{group}")
            if source == "reward":
                terms = self._reward_terms(rows)
            elif values is not None:
                terms = self._terms_of(group, (~is_sound(values[slot][rows])).any(0).nonzero().squeeze(1).tolist())
            else:
                terms = ""
            result.append(f"{source}{terms}")
        return result

    def _terms_of(self, group: str, columns: list[int]) -> str:
        """Terms that columns belong to, or the columns where the terms are not known."""
        if group not in self._terms:
            return f" (columns {_short(columns)})"
        terms = [name for name, start, stop in self._terms[group] if any(start <= c < stop for c in columns)]
        return f" ({_short(terms)})"

    def _reward_terms(self, rows: torch.Tensor) -> str:
        manager = getattr(self.env.unwrapped, "reward_manager", None)
        if manager is None:
            return ""
        terms = manager.get_active_iterable_terms(int(rows.nonzero()[0]))
        bad = [name for name, value in terms if not is_sound(torch.tensor(value)).all()]
        return f" ({_short(bad)})" if bad else ""

    def write(self, path: Path, environments: list[int], findings: list[str]) -> None:
        """Write the last steps of environments, oldest first.

        The file holds tensors and plain values: ``step``, ``task``, ``seed``, ``num_envs``, ``environments``,
        ``tasks`` (of those, where there are several), ``findings``, ``terms``, and under ``steps`` the tensors (K, n,
        ...) by name.
        """
        first = max(0, self.step - STEPS)
        slots = [index % STEPS for index in range(first, self.step)]
        chosen = environments[:MAX_ENVS]
        names, ids = self.env.task_names, self.env.task_ids
        content = {
            "format": FORMAT,
            **self.about,
            "step": self.step,
            "num_envs": self.env.num_envs,
            "environments": chosen,
            "tasks": [names[int(ids[row])] for row in chosen] if ids is not None and len(names) > 1 else [],
            "findings": findings,
            "terms": self._terms,
            "steps": {name: ring[slots][:, chosen].cpu() for name, ring in self._ring.items()},
        }
        write_checkpoint(path, content)


def observation_terms(env: M3POEnv) -> dict[str, list[tuple[str, int, int]]]:
    """Names and columns (first, behind the last) of the terms of each observation group, where Isaac Lab tells them."""
    manager: Any = getattr(env.unwrapped, "observation_manager", None)
    result = {}
    for group, names in getattr(manager, "active_terms", {}).items():
        shapes = manager.group_obs_term_dim[group]
        if not manager.group_obs_concatenate[group] or any(len(shape) != 1 for shape in shapes):
            continue
        start, columns = 0, []
        for name, (width,) in zip(names, shapes, strict=True):
            columns.append((name, start, start + width))
            start += width
        result[group] = columns
    return result


def _short(items: list[Any]) -> str:
    """The first few of many."""
    return ", ".join(str(item) for item in items[:8]) + (", ..." if len(items) > 8 else "")
