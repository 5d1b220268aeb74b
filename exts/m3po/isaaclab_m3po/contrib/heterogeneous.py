"""NVIDIA's heterogeneous manipulation scene, as the several tasks that it is.

The rows of that one scene hold different robots with different tasks. The scene itself says so in its observations
only, which start with a one-hot of the task; of the actions, which have a head for each task, a row's robot reads its
own. What the tasks are called and how wide their heads are stands in the configuration of the scene's own agent. From
both, :class:`HeterogeneousVecEnv` presents what several tasks are trained by: ids, masks, discounts, episode lengths
and success of each task.

The one-hot stays in the observations: the scene's own PPO agent reads it there. M3PO's normalisers, one for each task,
turn it into zeros, as it is constant within a task; M3PO reads the observation group ``task`` instead.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import torch
from tensordict import TensorDict

from m3po.envs.interface import M3POEnv
from m3po.envs.multi_task import task_discount
from m3po.errors import M3POError, UserError

if TYPE_CHECKING:
    from isaaclab.envs import ManagerBasedRLEnv
    from isaaclab_rl.rsl_rl import RslRlMLPModelCfg, RslRlVecEnvWrapper

    from ..vec_env import IsaacVecEnv

PACKAGE = "isaaclab_tasks.contrib.multitask_manipulation."
"""Isaac Lab's package whose tasks are such scenes."""


@dataclass(frozen=True)
class SceneTasks:
    """What the registered configurations of a scene say of its K tasks, in the order of the one-hot."""

    names: list[str]
    """Names of the tasks."""

    group: str
    """Observation group that holds the one-hot."""

    one_hot: slice
    """Columns of the one-hot in that group."""

    heads: list[int]
    """Action dimensions of each task; the heads lie side by side in the actions."""

    discounts: list[float]
    """Discounts, of the registered episode lengths: those of play mode are shorter and must not change them."""


# -- which tasks, and their agents ------------------------------------------------------------------------------------


def is_heterogeneous(task: str) -> bool:
    """Whether a registered task is a scene of several tasks."""
    return str(gym.registry[task].kwargs["env_cfg_entry_point"]).startswith(PACKAGE)


@functools.cache
def scene_tasks(task: str) -> SceneTasks:
    """The tasks of a heterogeneous scene, from its registered configurations.

    Args:
        task: Registered id.
    """
    from isaaclab_tasks.utils.parse_cfg import load_cfg_from_registry

    agent = load_cfg_from_registry(task, "rsl_rl_cfg_entry_point")
    lengths = episode_lengths(load_cfg_from_registry(task, "env_cfg_entry_point"))
    return SceneTasks(
        names=list(agent.algorithm.task_names),
        group=agent.algorithm.task_encoding_obs_group,
        one_hot=slice(*agent.algorithm.task_encoding_slice),
        heads=list(agent.actor.task_action_dims),
        discounts=[task_discount(length) for length in lengths],
    )


def task_names(task: str) -> list[str] | None:
    """Names of the tasks of a heterogeneous scene; ``None`` for any other task."""
    return scene_tasks(task).names if is_heterogeneous(task) else None


def episode_lengths(env_cfg: Any) -> list[int]:
    """Longest episode of each task of a scene, decision steps.

    Raises:
        UserError: If the configuration has no time limits.
    """
    time_out = env_cfg.terminations.time_out
    if time_out is None:
        raise UserError("a scene of several tasks needs their time limits: keep env.terminations.time_out.")
    step = env_cfg.sim.dt * env_cfg.decimation
    return [round(seconds / step) for seconds in time_out.params["episode_lengths_s"]]


def attach(task: str) -> None:
    """Replace M3PO's agents of a heterogeneous scene by ones for several tasks; other tasks keep theirs."""
    from ..registration import ENTRY_POINTS

    if is_heterogeneous(task):
        kwargs = gym.registry[task].kwargs
        kwargs.update({key: f"{__name__}:{mode}[{task}]" for key, mode in ENTRY_POINTS.items()})


def _for_several_tasks(agent_cfg: Any) -> Any:
    """M3PO's agent of a task, with M3PO's networks of several tasks.

    The scene's own agent has task heads of another kind, which M3PO's policy replaces by its own.
    """
    agent_cfg.actor, agent_cfg.critic = _shared(agent_cfg.actor), _shared(agent_cfg.critic)
    return agent_cfg


def _shared(model: RslRlMLPModelCfg) -> RslRlMLPModelCfg:
    """rsl_rl's plain network with the layers and the noise of a task-headed one."""
    from isaaclab_rl.rsl_rl import RslRlMLPModelCfg

    noise = model.distribution_cfg
    if noise is not None:
        noise = RslRlMLPModelCfg.GaussianDistributionCfg(
            init_std=noise.init_std, std_type=noise.std_type, std_range=noise.std_range
        )
    return RslRlMLPModelCfg(
        hidden_dims=model.hidden_dims,
        activation=model.activation,
        obs_normalization=model.obs_normalization,
        distribution_cfg=noise,
    )


def __getattr__(name: str) -> Callable[[], Any]:
    """Resolve the names that :func:`attach` puts into the registry; they are those of :mod:`~isaaclab_m3po.agents`."""
    if "[" not in name:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    from .. import agents

    load = getattr(agents, name)
    return lambda: _for_several_tasks(load())


# -- the environment --------------------------------------------------------------------------------------------------


def per_task(env: IsaacVecEnv, task: str) -> M3POEnv:
    """Present a heterogeneous scene as its tasks, and say so; other environments stay as they are.

    Args:
        env: Isaac Lab's environment behind rsl_rl's interface.
        task: Its registered id.
    """
    if not is_heterogeneous(task):
        return env
    tasks = HeterogeneousVecEnv(env, scene_tasks(task))
    sizes = torch.bincount(tasks.task_ids, minlength=tasks.num_tasks).tolist()
    facts = zip(tasks.task_names, sizes, tasks.heads, tasks.episode_lengths, strict=True)
    text = "; ".join(f"{name}: {n} environments, {a} actions, {steps} steps" for name, n, a, steps in facts)
    print(f"[m3po] one scene of {tasks.num_tasks} tasks ({text})")
    return tasks


class HeterogeneousVecEnv(M3POEnv):
    """A heterogeneous scene with the attributes of a :class:`~m3po.envs.multi_task.MultiTaskVecEnv`.

    Rows of a task need not be neighbours. They keep their task for good: it is the robot that stands there. All rows of
    a task have the same mask.

    ``obs_dims`` and ``action_dims`` are the full widths for every task, because a task's own dimensions are not the
    first ones; ``action_masks``, (K, A), and ``action_mask``, (N, A), tell which they are.
    """

    task_ids: Any  # a tensor, never None

    def __init__(self, env: RslRlVecEnvWrapper, tasks: SceneTasks) -> None:
        """Read each row's task.

        Args:
            env: The scene behind rsl_rl's interface, reset.
            tasks: Its tasks.

        Raises:
            UserError: If a task has no environment, or no time limit.
            M3POError: If observations or actions are not laid out as the scene's configurations say.
        """
        self.env, self.cfg, self._tasks = env, env.cfg, tasks
        self.num_envs, self.num_actions, self.device = env.num_envs, env.num_actions, env.device
        self.task_names, self.num_tasks, self.heads = tasks.names, len(tasks.names), tasks.heads
        if sum(self.heads) != self.num_actions:
            raise M3POError(f"the scene's action heads {self.heads} do not add up to its {self.num_actions} actions.")
        obs = env.get_observations()
        self.task_ids = self._read_tasks(obs)
        empty = [name for k, name in enumerate(self.task_names) if not (self.task_ids == k).any()]
        if empty:
            raise UserError(f"no environment of the scene has the task {', '.join(empty)}; use more of them.")
        self.episode_lengths = episode_lengths(env.cfg)
        self.discounts = torch.tensor(tasks.discounts, device=self.device)
        self.max_episode_length = torch.tensor(self.episode_lengths, device=self.device)[self.task_ids]
        owner = torch.arange(self.num_tasks).repeat_interleave(torch.tensor(self.heads)).to(self.device)
        self.action_masks = torch.arange(self.num_tasks, device=self.device)[:, None] == owner
        self.action_mask = self.action_masks[self.task_ids]
        self.obs_dims = [obs["policy"].shape[1]] * self.num_tasks
        self.action_dims = [self.num_actions] * self.num_tasks
        self.score_ranges = [None] * self.num_tasks
        self._success = _Success(env.unwrapped, self.task_names, self.task_ids)

    def _read_tasks(self, obs: TensorDict) -> torch.Tensor:
        """Task of each row, (N,), int64, from the one-hot."""
        group, columns = self._tasks.group, self._tasks.one_hot
        one_hot = obs[group][:, columns]
        is_one_hot = ((one_hot == 0) | (one_hot == 1)).all() and (one_hot.sum(1) == 1).all()
        if one_hot.shape[1] != self.num_tasks or not is_one_hot:
            raise M3POError(
                f"columns {columns.start} to {columns.stop - 1} of the scene's observation group '{group}' are not the "
                f"one-hot of the tasks {', '.join(self.task_names)}."
            )
        return one_hot.argmax(1)

    @property
    def unwrapped(self) -> ManagerBasedRLEnv:
        """Isaac Lab's environment."""
        return self.env.unwrapped

    @property
    def episode_length_buf(self) -> torch.Tensor:
        """Steps of the current episodes, (N,), int64."""
        return self.env.episode_length_buf

    @episode_length_buf.setter
    def episode_length_buf(self, value: torch.Tensor) -> None:
        self.env.episode_length_buf = value

    def seed(self, seed: int) -> None:
        """Seed everything random in the scene."""
        self.env.seed(seed)

    def get_observations(self) -> TensorDict:
        """The scene's observation groups, and ``task``, (N, 1), the task ids."""
        return self._with_task(self.env.get_observations())

    def reset(self) -> tuple[TensorDict, dict[str, Any]]:
        """Reset all environments.

        Raises:
            M3POError: If a row has changed its task, on which all that is kept per task relies.
        """
        obs, extras = self.env.reset()
        if not torch.equal(self._read_tasks(obs), self.task_ids):
            raise M3POError("the scene has changed which environment has which task; M3PO needs them to stay.")
        return self._with_task(obs), extras

    def step(self, actions: torch.Tensor) -> tuple[TensorDict, torch.Tensor, torch.Tensor, dict[str, Any]]:
        """Step the scene.

        Args:
            actions: Actions, (N, A). Of a row, its task's head counts; the others reach the scene as zeros, so that
                they do not show in its observation of the last actions either.

        Returns:
            Observations; rewards, (N,); dones, (N,), bool; and the scene's extras with ``final_obs`` as the
            observations and ``success``, (N,), of the episodes that end in this step, NaN where it is not known.
        """
        so_far = self._success.so_far()
        obs, rewards, dones, extras = self.env.step(torch.where(self.action_mask, actions, 0.0))
        dones, extras = dones.bool(), dict(extras)  # the scene keeps its dictionary
        extras["success"] = self._success.of_episodes(dones, so_far, extras.get("log", {}))
        if "final_obs" in extras:
            extras["final_obs"] = self._with_task(extras["final_obs"])
        return self._with_task(obs), rewards, dones, extras

    def reset_envs(self, ids: torch.Tensor) -> TensorDict:
        """Start new episodes in some environments, (n,); returns the observations of all."""
        return self._with_task(self.env.reset_envs(ids))

    def close(self) -> None:
        """Close the scene."""
        self.env.close()

    def _with_task(self, groups: Mapping[str, torch.Tensor]) -> TensorDict:
        return TensorDict({**dict(groups.items()), "task": self.task_ids[:, None]}, batch_size=[self.num_envs])


class _Success:
    """Success of each episode, as the scene's terms for ``<task>`` keep it.

    A task either ends an episode that succeeds, by the termination ``<task>_success``; or one of its rewards remembers
    the success, in ``succeeded``, until the episode ends, and logs the mean ``Metrics/<task>_success_rate``.
    """

    def __init__(self, scene: ManagerBasedRLEnv, names: Sequence[str], task_ids: torch.Tensor) -> None:
        self._terminations, self._names, self._ids = scene.termination_manager, names, task_ids
        rewards = scene.reward_manager
        terms = {name: rewards.get_term_cfg(name).func for name in rewards.active_terms}
        self._ends = [name for name in names if f"{name}_success" in self._terminations.active_terms]
        self._remembers = {
            name: term
            for name in names
            for label, term in terms.items()
            if label.startswith(f"{name}_") and hasattr(term, "succeeded")
        }

    def so_far(self) -> torch.Tensor:
        """Whether the current episodes have succeeded, (N,), where a reward remembers it: a reset forgets it."""
        result = torch.zeros_like(self._ids, dtype=torch.bool)
        for term in self._remembers.values():
            result |= term.succeeded
        return result

    def of_episodes(self, dones: torch.Tensor, so_far: torch.Tensor, log: Mapping[str, Any]) -> torch.Tensor:
        """Success of the episodes that end in a step, (N,); NaN in all other rows.

        Args:
            dones: Rows whose episodes end, (N,).
            so_far: Whether they had succeeded before the step, (N,).
            log: The scene's log of the step.
        """
        result = torch.full_like(dones, torch.nan, dtype=torch.float32)
        for k, name in enumerate(self._names):
            ended = dones & (self._ids == k)
            if name in self._ends:
                success = self._terminations.get_term(f"{name}_success").float()
            elif name in self._remembers:
                # A first success in the very step that ends an episode is in the scene's mean alone. Nobody can tell
                # which episode that was, so those that may have been it share it.
                late = log.get(f"Metrics/{name}_success_rate", 0.0) * ended.sum() - (ended & so_far).sum()
                share = late.round() / (ended & ~so_far).sum().clamp(min=1)
                success = torch.where(so_far, 1.0, share)
            else:
                continue
            result = torch.where(ended, success, result)
        return result
