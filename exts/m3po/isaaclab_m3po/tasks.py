"""From the task name a person types to the id under which Isaac Lab registered it."""

from __future__ import annotations

import difflib
import re

import gymnasium as gym

from m3po.errors import UserError


def isaaclab_tasks_with(key: str) -> list[str]:
    """Ids of all registered tasks whose specification carries an entry point.

    Args:
        key: Name of the entry point, for example ``env_cfg_entry_point``.
    """
    return sorted(name for name, spec in gym.registry.items() if key in (spec.kwargs or {}))


def resolve_task(name: str) -> str:
    """Map a task name to a registered Isaac Lab task.

    Isaac Lab 3.0 dropped the version suffix of its ids, so ``Isaac-Ant-v0`` means ``Isaac-Ant`` where the former is not
    registered itself. Registration must have happened before (:mod:`isaaclab_m3po.registration`).

    Args:
        name: Task name, optionally with a ``module:`` prefix as Isaac Lab accepts it.

    Returns:
        The registered id.

    Raises:
        UserError: If there is no such task; the message names the closest ones.
    """
    task = name.split(":")[-1]
    known = isaaclab_tasks_with("env_cfg_entry_point")
    stem = re.sub(r"-v\d+$", "", task)
    for candidate in (task, stem):
        if candidate in known:
            return candidate
    by_lowercase = {known_name.lower(): known_name for known_name in known}
    wanted = stem.lower() if stem.lower().startswith("isaac") else f"isaac-{stem.lower()}"
    close = difflib.get_close_matches(wanted, by_lowercase, n=5, cutoff=0.5)
    names = ", ".join(by_lowercase[match] for match in close)
    raise UserError(f"unknown task '{name}'. {f'Closest: {names}.' if names else '`isaaclab list_envs` lists all.'}")
