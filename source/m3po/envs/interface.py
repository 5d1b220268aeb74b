"""What M3PO asks of environments besides rsl_rl's ``VecEnv``. All of it has a default."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from rsl_rl.env import VecEnv
from tensordict import TensorDict

Result = tuple[TensorDict, torch.Tensor, torch.Tensor, dict[str, Any]]
"""What :meth:`rsl_rl.env.VecEnv.step` returns."""


class M3POEnv(VecEnv):
    """N environments of one or several tasks.

    ``step(actions)`` may put into ``extras``: ``time_outs`` (N,), which ends are truncations; ``final_obs``, the
    observations before a reset; ``final_obs_valid`` (N,), in which rows; ``success`` (N,), of the episodes that end,
    NaN where it is not known; ``invalid`` (N,), steps that never took place; ``log``, numbers by name.
    """

    cfg: Any
    """Configuration, of any class."""

    task_names: Sequence[str] = ()
    """Tasks that policy and critic are told; none for environments of one task without a name."""

    task_ids: torch.Tensor | None = None
    """Which of them each row is, (N,), int64; ``None`` where there are none."""

    obs_dims: Sequence[int]
    """Observation dimensions of each of them, K numbers."""

    action_dims: Sequence[int]
    """Action dimensions of each of them, K numbers."""

    action_masks: torch.Tensor
    """Which action dimensions each of them has, (K, A), boolean."""

    discounts: torch.Tensor
    """Discount per step of each of several tasks, (K,)."""

    num_tasks: int = 1
    """Number of tasks K."""

    score_ranges: Sequence[tuple[float, float] | None] = (None,)
    """Returns of each task that mean a normalised score of 0 and of 1, where defined."""

    step_async: Any
    step_wait: Any
    steps_beside: bool = False
    """Whether a step can be begun by ``step_async(actions)`` and ended by ``step_wait()``, beside those of others."""

    def reset(self) -> tuple[TensorDict, dict[str, Any]]:
        """Begin new episodes everywhere; returns their first observations. Evaluations need it."""
        raise NotImplementedError(f"{type(self).__name__} has no reset(), which evaluations need.")

    def seed(self, seed: int) -> None:
        """Draw from a seed from now on, initial states above all; by default nothing is drawn."""

    def reset_envs(self, ids: torch.Tensor) -> TensorDict | None:
        """Begin new episodes in some environments, (n,), int64.

        Returns:
            The observations of all; ``None``, the default, if only whole batches can be reset.
        """
        return None

    def state_dict(self) -> Any:
        """What resuming needs, tensors and plain values; ``None``, the default, if nothing can be told."""
        return None

    def load_state_dict(self, state: Any) -> bool:
        """Go on from :meth:`state_dict`. Returns whether exactly; otherwise new episodes have begun."""
        return False

    def curriculum_state(self) -> Any:
        """How hard the task is by now; ``None``, the default, if that never changes."""
        return None

    def load_curriculum_state(self, state: Any) -> None:
        """Make the task as hard as :meth:`curriculum_state` of as many environments or of others says."""

    def get_state(self) -> dict[str, torch.Tensor]:
        """The physical state, (N, ...) each, for recordings; empty by default."""
        return {}

    def set_state(self, state: dict[str, torch.Tensor]) -> TensorDict | None:
        """Put all environments into :meth:`get_state`; returns the observations, or ``None`` if that cannot be done."""
        return None

    def close(self) -> None:
        """Release what would outlive the object."""

    @property
    def unwrapped(self) -> Any:
        """The simulation's own environment, for reports of what it consists of."""
        return self


def as_m3po_env(env: VecEnv) -> M3POEnv:
    """An environment with all of :class:`M3POEnv`: itself, or a wrapper around any other ``VecEnv``."""
    return env if isinstance(env, M3POEnv) else WrappedEnv(env)


class WrappedEnv(M3POEnv):
    """Everything is the environment's own, to be read and to be set; what it lacks is the default."""

    def __init__(self, env: VecEnv, **own: Any) -> None:
        """Wrap an environment.

        Args:
            env: Environment of any class.
            **own: Attributes of the wrapper; their names begin with an underscore.
        """
        known = [*vars(M3POEnv), "step", "get_observations"]
        plain = [name for name in known if name[0] != "_" and not self._overrides(name)]
        self.__dict__.update(own, _env=env, _forwarded=frozenset(name for name in plain if hasattr(env, name)))

    @classmethod
    def _overrides(cls, name: str) -> bool:
        """Whether a subclass has its own version of an attribute."""
        return getattr(cls, name) is not getattr(WrappedEnv, name)

    def __getattribute__(self, name: str) -> Any:
        """Of the names that are known here, those that the environment has are its own."""
        get = super().__getattribute__
        return getattr(get("_env"), name) if name[0] != "_" and name in get("_forwarded") else get(name)

    def __getattr__(self, name: str) -> Any:
        """Any other attribute."""
        return getattr(self._env, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set it in the environment."""
        setattr(self._env, name, value)

    def get_observations(self) -> TensorDict:
        """Current observations, batch size (N,)."""
        return self._env.get_observations()

    def step(self, actions: torch.Tensor) -> Result:
        """As the environment's own."""
        return self._env.step(actions)
