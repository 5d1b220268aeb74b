"""The DMControl suite: 28 tasks of dm_control and TD-MPC2's 11 variations of them (arXiv 2310.16828, appendix)."""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING

from rsl_rl.env import VecEnv

from m3po.envs.suite import TaskInfo
from m3po.errors import UserError

if TYPE_CHECKING:
    from m3po_tasks.dmcontrol.env import MjcfVecEnv
    from m3po_tasks.dmcontrol.rendering import Camera

_TASKS = {
    "acrobot-swingup": ("acrobot", 6, 1),
    "cartpole-balance": ("cartpole", 5, 1),
    "cartpole-balance-sparse": ("cartpole", 5, 1),
    "cartpole-swingup": ("cartpole", 5, 1),
    "cartpole-swingup-sparse": ("cartpole", 5, 1),
    "cheetah-jump": ("cheetah_custom", 17, 6),
    "cheetah-run": ("cheetah", 17, 6),
    "cheetah-run-back": ("cheetah_custom", 17, 6),
    "cheetah-run-backwards": ("cheetah_custom", 17, 6),
    "cheetah-run-front": ("cheetah_custom", 17, 6),
    "cup-catch": ("cup", 8, 2),
    "cup-spin": ("cup_custom", 8, 2),
    "dog-run": ("dog", 223, 38),
    "dog-stand": ("dog", 223, 38),
    "dog-trot": ("dog", 223, 38),
    "dog-walk": ("dog", 223, 38),
    "finger-spin": ("finger", 9, 2),
    "finger-turn-easy": ("finger", 12, 2),
    "finger-turn-hard": ("finger", 12, 2),
    "fish-swim": ("fish", 24, 5),
    "hopper-hop": ("hopper", 15, 4),
    "hopper-hop-backwards": ("hopper_custom", 15, 4),
    "hopper-stand": ("hopper", 15, 4),
    "humanoid-run": ("humanoid", 67, 21),
    "humanoid-stand": ("humanoid", 67, 21),
    "humanoid-walk": ("humanoid", 67, 21),
    "pendulum-spin": ("pendulum_custom", 3, 1),
    "pendulum-swingup": ("pendulum", 3, 1),
    "quadruped-run": ("quadruped", 78, 12),
    "quadruped-walk": ("quadruped", 78, 12),
    "reacher-easy": ("reacher", 6, 2),
    "reacher-hard": ("reacher", 6, 2),
    "reacher-three-easy": ("reacher_custom", 8, 3),
    "reacher-three-hard": ("reacher_custom", 8, 3),
    "walker-run": ("walker", 24, 6),
    "walker-run-backwards": ("walker_custom", 24, 6),
    "walker-stand": ("walker", 24, 6),
    "walker-walk": ("walker", 24, 6),
    "walker-walk-backwards": ("walker_custom", 24, 6),
}
"""Module in ``domains``, observation and action dimensions of each task; its ``TASKS`` holds the task's constructor."""

DMC39 = tuple(_TASKS)
"""All tasks."""

_NOT_IN_MT30 = ("dog-", "humanoid-", "quadruped-")

DMC_MT30 = tuple(task for task in _TASKS if not task.startswith(_NOT_IN_MT30))
"""The DMControl part of TD-MPC2's set of 80 tasks: 19 of dm_control and the 11 variations."""

ACTION_REPEAT = 2
"""Control steps per decision."""

EPISODE_LENGTH = 1000 // ACTION_REPEAT
"""Decision steps of an episode: dm_control's 1000 control steps."""

BACKENDS = ("rollout", "warp")
"""MuJoCo's C code on CPU threads, and mujoco_warp."""

_PREFIX = "dmc-"


class DMControlSuite:
    """Satisfies :class:`m3po.envs.suite.Suite`."""

    name = "dmcontrol"
    own_process = False

    def tasks(self) -> list[str]:
        """Names of all 39 tasks."""
        return list(_TASKS)

    def sets(self) -> dict[str, tuple[str, ...]]:
        """``DMC39``: all tasks. ``DMC-MT30``: those in TD-MPC2's set of 80 tasks."""
        return {"DMC39": DMC39, "DMC-MT30": DMC_MT30}

    def resolve(self, name: str) -> str | None:
        """The task of a name, with or without ``dmc-`` in front; ``None`` if it is not of this suite."""
        task = name.removeprefix(_PREFIX)
        return task if task in _TASKS else None

    def missing(self) -> str | None:
        """How to install dm_control, or ``None`` where it is installed."""
        return None if importlib.util.find_spec("dm_control") else "pip install 'm3po[dmcontrol]'"

    def info(self, task: str) -> TaskInfo:
        """Dimensions, length of an episode and the range of its return, [0, 1000]."""
        _, obs_dim, action_dim = _TASKS[task]
        return TaskInfo(task, obs_dim, action_dim, EPISODE_LENGTH, score_range=(0.0, 1000.0))

    def make(
        self,
        task: str,
        num_envs: int,
        *,
        seed: int,
        device: str,
        backend: str | None = None,
        num_threads: int | None = None,
    ) -> VecEnv:
        """Create N worlds of a task.

        Args:
            task: Canonical name.
            num_envs: Number of worlds N.
            seed: Seed of the initial states.
            device: Device of all tensors.
            backend: ``rollout`` (the default for the device cpu; computes on the CPU whatever the device) or ``warp``
                (the default for other devices).
            num_threads: Threads of the backend ``rollout``; by default all CPUs this process may use.

        Raises:
            UserError: If the backend is unknown or lacks what the task needs.
        """
        # Simulators are imported here, so that importing the suite is cheap and works without them.
        from m3po_tasks.dmcontrol.env import MjcfVecEnv

        backend = backend or ("rollout" if device == "cpu" else "warp")
        if backend not in BACKENDS:
            raise UserError(f"unknown DMControl backend '{backend}', choose from: {', '.join(BACKENDS)}.")
        module, _, _ = _TASKS[task]
        built = importlib.import_module(f"m3po_tasks.dmcontrol.domains.{module}").TASKS[task]()
        if backend == "rollout":
            from m3po_tasks.dmcontrol.rollout_backend import RolloutBackend
            from m3po_tasks.dmcontrol.sampling import available_cpus

            threads = num_threads or available_cpus()
            physics = RolloutBackend(built.model, num_envs, built.sub_steps, ACTION_REPEAT, threads, device)
        else:
            from m3po_tasks.dmcontrol.warp_backend import WarpBackend

            physics = WarpBackend(built.model, num_envs, built.sub_steps, ACTION_REPEAT, device)
        return MjcfVecEnv(built, physics, num_envs, EPISODE_LENGTH, seed)

    def camera(self, env: MjcfVecEnv) -> Camera:
        """Film the first world of a batch."""
        from m3po_tasks.dmcontrol.rendering import Camera

        return Camera(env)


SUITE = DMControlSuite()
