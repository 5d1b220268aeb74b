"""One environment of Meta-World: what a worker process steps."""

from __future__ import annotations

import pickle
from functools import cache

import mujoco
import numpy as np
from metaworld.env_dict import ALL_V3_ENVIRONMENTS
from metaworld.sawyer_xyz_env import SawyerXYZEnv
from metaworld.types import Task

from m3po_tasks.metaworld.tasks import ACTION_REPEAT, metaworld_name


class Environment:
    """An environment with a visible goal, an action repeat of 2 and no time limit; all of a task share one model.

    Each episode draws a goal and the objects' positions from the environment's own generator. It then is the episode
    that Meta-World plays when ``set_task`` gives it what was drawn.
    """

    def __init__(self, task: str, seed: int) -> None:
        """Create the environment; it must be reset before its first step.

        Args:
            task: Name of the task.
            seed: Seed of its generator.
        """
        name = metaworld_name(task)
        self._env = _shared_model_class(name)()
        facts = {"env_cls": ALL_V3_ENVIRONMENTS[name], "rand_vec": None, "partially_observable": False}
        self._env.set_task(Task(name, pickle.dumps(facts)))
        self._env.seeded_rand_vec = True
        self.seed(seed)
        self._poses = _poses(self._env.model)

    def seed(self, seed: int) -> None:
        """Draw goals and positions from a seed from now on."""
        self._env.seed(seed)

    def reset(self) -> np.ndarray:
        """Start an episode; returns its first observation, (39,)."""
        self._take_model()
        self._env._freeze_rand_vec = False
        obs, _ = self._env.reset()
        self._poses = _poses(self._env.model)
        return obs

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool]:
        """Advance by one decision step.

        Args:
            action: Values in [-1, 1], (4,).

        Returns:
            The observation, (39,), the sum of the rewards, and whether the task is solved now.
        """
        self._take_model()
        total = 0.0
        for _ in range(ACTION_REPEAT):
            obs, reward, _, _, info = self._env.step(action)
            total += reward
        return obs, total, bool(info["success"])

    def _take_model(self) -> None:
        """Put this environment's goal and fixtures where another one had its own."""
        self._env.model.body_pos[:], self._env.model.site_pos[:] = self._poses


@cache
def _shared_model_class(name: str) -> type[SawyerXYZEnv]:
    """Meta-World's class of a task, with one model for all environments of this process.

    A model takes 18 MB and a tenth of a second, and an environment changes nothing in it but the positions of bodies
    and sites, in a reset.
    """
    base = ALL_V3_ENVIRONMENTS[name]

    class SharedModel(base):
        _model: mujoco.MjModel | None = None

        def _initialize_simulation(self) -> tuple[mujoco.MjModel, mujoco.MjData]:
            cls = type(self)
            if cls._model is None:
                cls._model, _ = super()._initialize_simulation()
            return cls._model, mujoco.MjData(cls._model)

        def reset_model(self) -> np.ndarray:
            # Meta-World's reset calls this twice, and what the first call placed is read by the second: both must place
            # the same, or reward and observation are made of two draws (in window-open, the handle is 5 cm off).
            obs = super().reset_model()
            self._freeze_rand_vec = True
            return obs

    return SharedModel


def _poses(model: mujoco.MjModel) -> tuple[np.ndarray, np.ndarray]:
    return model.body_pos.copy(), model.site_pos.copy()
