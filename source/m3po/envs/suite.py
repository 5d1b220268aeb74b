"""Task suites: where environments come from. A package offers one through the entry-point group ``m3po.suites``."""

from __future__ import annotations

import contextlib
import difflib
import importlib.metadata
import re
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

from rsl_rl.env import VecEnv

from m3po.errors import UserError

GROUP = "m3po.suites"
"""Entry points of this group name objects that satisfy :class:`Suite`."""


@dataclass(frozen=True)
class TaskInfo:
    """What is known of a task before anything is started."""

    name: str
    """Name on the command line."""

    obs_dim: int | None
    """Observation dimensions; ``None`` where only the simulation knows."""

    action_dim: int | None
    """Action dimensions; ``None`` where only the simulation knows."""

    episode_length: int
    """Longest episode, decision steps."""

    score_range: tuple[float, float] | None = None
    """Episode returns that mean a normalised score of 0 and of 1; ``None`` where nobody defined them."""

    reports_success: bool = False
    """Whether ``extras["success"]``, (N,), holds the success of episodes that end in a step; it is the score then."""

    init_std: float = 1.0
    """Std of the actions that the default mode begins with."""

    ppo_std: float = 1.0
    """Std of the actions that PPO and the paper mode begin with."""


class Suite(Protocol):
    """A family of tasks with one backend."""

    name: str
    """Name of the suite, for messages and ``--list``."""

    own_process: bool
    """Whether each of its tasks needs a process of its own, as simulators with global state do."""

    def tasks(self) -> list[str]:
        """Names of all tasks; cheap, and works where the backend is not installed."""

    def sets(self) -> dict[str, tuple[str, ...]]:
        """Named task sets, which may contain tasks of other suites."""

    def resolve(self, name: str) -> str | None:
        """The task that a typed name means (aliases, old names), or ``None`` if it is not of this suite."""

    def missing(self) -> str | None:
        """The command that installs the backend, or ``None`` where it is installed."""

    def info(self, task: str) -> TaskInfo:
        """What is known of a task."""

    def make(self, task: str, num_envs: int, *, seed: int, device: str, **options: Any) -> VecEnv:
        """Create a batch of environments of a task, or a context manager that yields one.

        They are an rsl_rl ``VecEnv`` with the observation group ``policy``, and with ``reset() -> (observations,
        extras)``. A group ``critic`` is read by the critic of a single task. ``extras["time_outs"]`` tells ends by
        time-out from terminations. ``close()`` is called at the end where there is one.
        """


@cache
def suites() -> dict[str, Suite]:
    """All installed suites by name, those last whose tasks only a simulator with processes of its own knows."""
    found = [entry.load() for entry in importlib.metadata.entry_points(group=GROUP)]
    return {suite.name: suite for suite in sorted(found, key=lambda suite: (suite.own_process, suite.name))}


def named_sets() -> dict[str, tuple[str, ...]]:
    """All named task sets."""
    return {name: tasks for suite in suites().values() for name, tasks in suite.sets().items()}


def find_task(name: str) -> tuple[Suite, str]:
    """Suite and canonical name of a task.

    Raises:
        UserError: If no suite knows the task (names the closest ones), or its backend is not installed.
    """
    for suite in suites().values():
        task = suite.resolve(name)
        if task is not None:
            command = suite.missing()
            if command is not None:
                raise UserError(f"task '{name}' needs {suite.name}, which is not installed: {command}")
            return suite, task
    raise unknown_task(name)


def is_known_without_isaac_lab(name: str) -> bool:
    """Whether a suite other than Isaac Lab's knows a task. Isaac Lab's own must be imported to be asked."""
    return any(suite.resolve(name) is not None for suite in suites().values() if suite.name != "isaaclab")


def unknown_task(name: str) -> UserError:
    """The error that names the tasks and sets whose names are closest."""
    names = [known for suite in suites().values() for known in suite.tasks()] + list(named_sets())
    known = {known.lower(): known for known in names}
    wanted = re.sub(r"-v\d+$", "", name.lower())
    if difflib.get_close_matches(f"isaac-{wanted}", known, n=1, cutoff=0.9):  # as other libraries name it
        wanted = f"isaac-{wanted}"
    close = difflib.get_close_matches(wanted, known, n=5, cutoff=0.5)
    listed = ", ".join(known[match] for match in close)
    return UserError(
        f"unknown task '{name}'. {f'Closest: {listed}.' if listed else 'scripts/list_tasks.py lists all.'}"
    )


def expand(text: str) -> list[str]:
    """Task names of a comma-separated list of tasks and sets, in order.

    Raises:
        UserError: If a name is empty or a task is named twice.
    """
    names: list[str] = []
    for part in text.split(","):
        part = part.strip()
        if not part:
            raise UserError(f"empty task name in '{text}'.")
        names.extend(named_sets().get(part, (part,)))
    canonical = [find_task(name)[1] for name in names]
    twice = sorted({name for name in canonical if canonical.count(name) > 1})
    if twice:
        raise UserError(f"tasks named more than once in '{text}': {', '.join(twice)}.")
    return canonical


def as_context(made: Any) -> contextlib.AbstractContextManager[VecEnv]:
    """A context that yields what :meth:`Suite.make` returned, and closes it at the end where it can be closed."""
    if not isinstance(made, VecEnv) and hasattr(made, "__enter__"):
        return made
    return contextlib.closing(made) if hasattr(made, "close") else contextlib.nullcontext(made)


def make_environments(suite: str, task: str, **options: Any) -> Any:
    """:meth:`Suite.make` of a suite by its name; what a process of a task's own calls."""
    return suites()[suite].make(task, **options)
