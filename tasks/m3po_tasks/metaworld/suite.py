"""Meta-World as a task suite."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from m3po_tasks.metaworld.tasks import (
    ACTION_DIM,
    EPISODE_LENGTH,
    MT10_NAMES,
    NAMES,
    OBS_DIM,
    VERSION,
    task_name,
)

if TYPE_CHECKING:
    from m3po.envs.suite import TaskInfo
    from m3po_tasks.metaworld.env import MetaWorldVecEnv


class MetaWorldSuite:
    """50 manipulation tasks of one robot arm.

    What imports torch is imported late: the worker processes import this package, and have no use for torch.
    """

    name = "metaworld"
    own_process = False

    def tasks(self) -> list[str]:
        """``mw-assembly`` and so on, in Meta-World's order."""
        return [task_name(name) for name in NAMES]

    def sets(self) -> dict[str, tuple[str, ...]]:
        """Meta-World's MT10 and MT50, and the 80 tasks of TD-MPC2, of which 30 are DMControl's."""
        from m3po_tasks.dmcontrol.suite import DMC_MT30

        return {
            "MT10": tuple(task_name(name) for name in MT10_NAMES),
            "MT50": tuple(self.tasks()),
            "MT80": (*DMC_MT30, *self.tasks()),
        }

    def resolve(self, name: str) -> str | None:
        """The task of ``mw-reach``, ``reach-v3`` or ``mw-reach-v3``; ``None`` for any other name."""
        stem = name.removeprefix("mw-").removesuffix("-v3")
        return task_name(stem) if stem != name and stem in NAMES else None

    def missing(self) -> str | None:
        """The command that installs Meta-World.

        Without its dependencies, all of which are here: it pins an old MuJoCo, and Isaac Lab needs a new one. The
        project's lock overrides that pin, so ``./isaaclab.sh`` installs both as they are.
        """
        return None if importlib.util.find_spec("metaworld") else f"pip install --no-deps metaworld=={VERSION}"

    def info(self, task: str) -> TaskInfo:
        """The same for each task."""
        from m3po.envs.suite import TaskInfo

        return TaskInfo(task, OBS_DIM, ACTION_DIM, EPISODE_LENGTH, reports_success=True)

    def make(
        self, task: str, num_envs: int, *, seed: int, device: str, num_workers: int | None = None
    ) -> MetaWorldVecEnv:
        """Create environments of a task; see :class:`m3po_tasks.metaworld.env.MetaWorldVecEnv`."""
        from m3po_tasks.metaworld.env import MetaWorldVecEnv

        return MetaWorldVecEnv(task, num_envs, seed, device, num_workers)


SUITE = MetaWorldSuite()
"""The suite that this package offers in the entry-point group ``m3po.suites``."""
