"""From the task name a person types to the id under which Isaac Lab registered it."""

from __future__ import annotations

import re

import gymnasium as gym

from m3po.envs.suite import unknown_task


def isaaclab_tasks_with(key: str) -> list[str]:
    """Ids of all registered tasks whose specification carries an entry point.

    Args:
        key: Name of the entry point, for example ``env_cfg_entry_point``.
    """
    return sorted(name for name, spec in gym.registry.items() if key in (spec.kwargs or {}))


def known_task(name: str) -> str | None:
    """Id of the registered Isaac Lab task that a name means, or ``None``.

    Isaac Lab 3.0 dropped the version suffix of its ids, so ``Isaac-Ant-v0`` means ``Isaac-Ant`` where the former is not
    registered itself. Registration must have happened before (:mod:`isaaclab_m3po.registration`).

    Args:
        name: Task name, optionally with a ``module:`` prefix as Isaac Lab accepts it.
    """
    task = name.split(":")[-1]
    known = isaaclab_tasks_with("env_cfg_entry_point")
    return next((found for found in (task, re.sub(r"-v\d+$", "", task)) if found in known), None)


def resolve_task(name: str) -> str:
    """:func:`known_task`; a name that means none is a ``UserError``, which names the closest."""
    task = known_task(name)
    if task is None:
        raise unknown_task(name.split(":")[-1])
    return task
