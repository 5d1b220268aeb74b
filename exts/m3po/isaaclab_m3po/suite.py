"""Isaac Lab's tasks as a suite, so that several of them, and those of other suites, can train in one batch."""

from __future__ import annotations

import contextlib
import importlib.util
import math
from collections.abc import Generator, Sequence
from typing import Any

from rsl_rl.env import VecEnv

from m3po.cli.job import Job
from m3po.envs.final_observations import ask_for_final_observations
from m3po.envs.suite import TaskInfo
from m3po.errors import UserError


class IsaacLabSuite:
    """Every registered Isaac Lab task; each needs a process of its own, where Isaac Lab has its one simulation."""

    name = "isaaclab"
    own_process = True

    def tasks(self) -> list[str]:
        """Ids of all registered tasks that have an agent; none where Isaac Lab is not installed."""
        if self.missing():
            return []
        from . import registration  # noqa: F401
        from .tasks import isaaclab_tasks_with

        return isaaclab_tasks_with("rsl_rl_cfg_entry_point")

    def sets(self) -> dict[str, tuple[str, ...]]:
        """The classic control tasks whose robots are embedded."""
        return {"Isaac-Classic-MT3": ("Isaac-Cartpole", "Isaac-Ant", "Isaac-Humanoid")}

    def resolve(self, name: str) -> str | None:
        """The registered id of a name, with or without its old version suffix.

        Where Isaac Lab is not installed, any name that looks like one of its own.
        """
        if self.missing():
            return name if name.startswith("Isaac-") else None
        from . import registration  # noqa: F401
        from .tasks import known_task

        return known_task(name)

    def missing(self) -> str | None:
        """The command that installs Isaac Lab, or ``None`` where it is installed."""
        return None if importlib.util.find_spec("isaaclab") else "pip install 'm3po[isaaclab]'"

    def info(self, task: str) -> TaskInfo:
        """Episode length of a task; its sizes are known to its simulation alone."""
        from isaaclab_tasks.utils.hydra import resolve_presets
        from isaaclab_tasks.utils.parse_cfg import load_cfg_from_registry

        from .agents import first_noise, ppo_noise

        cfg = resolve_presets(load_cfg_from_registry(task, "env_cfg_entry_point"))  # some are a choice of several
        steps = math.ceil(cfg.episode_length_s / (cfg.sim.dt * cfg.decimation))
        agent = resolve_presets(load_cfg_from_registry(task, "rsl_rl_cfg_entry_point"))
        return TaskInfo(task, None, None, steps, init_std=first_noise(agent), ppo_std=ppo_noise(agent))

    def job(self) -> type[Job]:
        """What a command line for a single task becomes."""
        from .isaac_job import IsaacJob

        return IsaacJob

    @contextlib.contextmanager
    def make(
        self, task: str, num_envs: int, *, seed: int, device: str, overrides: Sequence[str] = (), **options: Any
    ) -> Generator[VecEnv]:
        """Simulate a task; the simulation ends with the context.

        Args:
            task: Registered id.
            num_envs: Environments.
            seed: Seed.
            device: Torch device.
            overrides: Overrides of the environment's configuration, as typed: ``env.FIELD=VALUE``.
            **options: ``assets``: where the robots come from, as ``--assets``.
        """
        here = {"task": task, "num_envs": num_envs, "seed": seed, "device": device}
        job = self.job().recreate({"assets": "auto"} | here | options, list(overrides))
        with job.environments([num_envs], seed) as env:
            ask_for_final_observations(env)
            if env.num_tasks > 1:
                raise UserError(f"'{task}' is a scene of several tasks already; train it alone.")
            yield env


SUITE = IsaacLabSuite()
"""The suite, as the entry point names it."""
