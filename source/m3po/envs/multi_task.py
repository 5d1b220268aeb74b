"""Several tasks as one batch of environments: padded observations and actions, masks, and per-task facts."""

from __future__ import annotations

import contextlib
import itertools
import traceback
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rsl_rl.env import VecEnv
from tensordict import TensorDict

from m3po.envs.interface import M3POEnv, Result, as_m3po_env
from m3po.envs.logs import NewLogs
from m3po.envs.padding import Padding
from m3po.envs.subproc_env import SubprocVecEnv, TaskEnvError
from m3po.envs.subproc_worker import reason
from m3po.errors import UserError

MAX_DEATHS, DEATH_WINDOW = 3, 100
"""A task that dies this often within so many steps is not restarted again."""


@dataclass(frozen=True)
class TaskEnv:
    """The environments of one task."""

    name: str
    """Name of the task, unique in the batch."""

    env: VecEnv
    """Its environments."""

    score_range: tuple[float, float] | None = None
    """Episode returns that mean a normalised score of 0 and of 1, if defined."""

    reports_success: bool = False
    """Whether ``extras["success"]`` holds the success of the episodes that end in a step, (N_k,)."""


def task_discount(episode_length: int) -> float:
    """Discount of a task: ``(T/5 - 1) / (T/5)`` within [0.95, 0.995], as TD-MPC2 chooses it (arXiv 2310.16828).

    Args:
        episode_length: ``T``, longest episode, decision steps.
    """
    return min(max(1.0 - 5.0 / episode_length, 0.95), 0.995)


class MultiTaskVecEnv(M3POEnv):
    """The environments of K tasks as one batch. A task's environments are consecutive rows, in the order given.

    Observations are padded with zeros to the largest task; of the actions, a task sees its own dimensions. Tensors that
    a step returns stay as they are until the step after the next begins.
    """

    def __init__(self, task_envs: Sequence[TaskEnv], device: str, restart_members: bool = False) -> None:
        """Wait for the tasks' processes and gather their first observations.

        Args:
            task_envs: The tasks. They are closed by :meth:`close`, and when anything fails here.
            device: Torch device of what is returned; tasks may live on others.
            restart_members: Whether a task is restarted when its process fails in a step, instead of ending the run.

        Raises:
            UserError: If there is no task, or two have the same name.
            TaskEnvError: If a task's environments cannot be built.
        """
        self.task_envs, self.device, self.restart_members = list(task_envs), device, restart_members
        self.task_names = [task_env.name for task_env in task_envs]
        self._envs = [as_m3po_env(task_env.env) for task_env in task_envs]
        with self._closed_on_failure():
            if not task_envs or len(set(self.task_names)) < len(task_envs):
                raise UserError(f"a batch needs one or more tasks with different names, got {self.task_names}.")
            for env in self._envs:
                if isinstance(env, SubprocVecEnv):
                    env.connect()
            first = [env.get_observations()["policy"] for env in self._envs]
            self._describe(first)
            self._pad, self._pad_final = self._padding(), self._padding()
            self._obs = self._pad(first)
        self._concurrent = [k for k, env in enumerate(self._envs) if env.steps_beside]
        self._logs = [NewLogs() for _ in self.task_envs]
        self._deaths: list[list[int]] = [[] for _ in task_envs]
        self._num_steps = 0

    def _describe(self, observations: list[torch.Tensor]) -> None:
        """Set what is known of the batch and its tasks."""
        envs, device = self._envs, self.device
        self.num_tasks = len(envs)
        self._sizes = [env.num_envs for env in envs]
        bounds = itertools.accumulate(self._sizes, initial=0)
        self._rows = [slice(start, stop) for start, stop in itertools.pairwise(bounds)]
        self.num_envs = sum(self._sizes)
        self.obs_dims = [observation.shape[1] for observation in observations]
        self.action_dims = [env.num_actions for env in envs]
        self.num_actions = max(self.action_dims)
        self.episode_lengths = [int(env.max_episode_length) for env in envs]
        self.score_ranges = [task_env.score_range for task_env in self.task_envs]
        self.cfg = {"tasks": {task_env.name: task_env.env.cfg for task_env in self.task_envs}}
        self.task_ids = torch.arange(self.num_tasks).repeat_interleave(torch.tensor(self._sizes)).to(device)
        self.discounts = torch.tensor([task_discount(length) for length in self.episode_lengths], device=device)
        self.max_episode_length = self._per_env(self.episode_lengths)
        dims = torch.tensor(self.action_dims, device=device)
        self.action_masks = torch.arange(self.num_actions, device=device) < dims[:, None]
        self.action_mask = self.action_masks[self.task_ids]

    def _padding(self) -> Padding:
        return Padding(self._sizes, self.obs_dims, self.device, kernel=torch.device(self.device).type == "cuda")

    # -- environments -------------------------------------------------------------------------------------------------

    @property
    def episode_length_buf(self) -> torch.Tensor:
        """Steps of the current episodes, (N,), int64. Assigning it sets that of the tasks."""
        return self._cat((env.episode_length_buf for env in self._envs), torch.long)

    @episode_length_buf.setter
    def episode_length_buf(self, value: torch.Tensor) -> None:
        for env, rows in zip(self._envs, self._rows, strict=True):
            env.episode_length_buf = value[rows].to(env.device, copy=True)  # tasks count in place

    def get_observations(self) -> TensorDict:
        """Groups ``policy``, (N, O), and ``task``, (N, 1), the task ids."""
        return self._obs

    def reset(self) -> tuple[TensorDict, dict[str, Any]]:
        """Reset all environments."""
        with self._closed_on_failure():
            self._obs = self._pad([env.reset()[0]["policy"] for env in self._envs])
        return self.get_observations(), {}

    def reset_envs(self, ids: torch.Tensor) -> TensorDict:
        """Reset some environments, (n,), int64; those of tasks that cannot do it stay as they are.

        Returns:
            The observations of all.
        """
        after = self._obs.clone()  # what was padded is still in use
        with self._closed_on_failure():
            for env, rows, dim in zip(self._envs, self._rows, self.obs_dims, strict=True):
                own = ids[(ids >= rows.start) & (ids < rows.stop)]
                local = own - rows.start
                observed = env.reset_envs(local.to(env.device)) if len(own) else None
                if observed is not None:
                    after["policy"][own, :dim] = observed["policy"].to(self.device)[local]
        self._obs = after
        return self.get_observations()

    def step(self, actions: torch.Tensor) -> Result:
        """Step all tasks at the same time.

        Args:
            actions: Actions, (N, A); of a row, the dimensions of its task count.

        Returns:
            Observations; rewards, (N,); dones, (N,), bool; and extras: ``time_outs`` (N,), false where a task tells
            none; ``final_obs``, in steps in which a task delivers it, like the observations, those before the reset
            in rows that are done; ``final_obs_valid`` (N,), in steps in which only some tasks deliver it, false in
            rows of others that are done; ``success`` (N,), where a task reports it, NaN in rows of others; ``log``,
            new entries as ``<task>/<entry>``; ``invalid`` (N,), in steps in which a task was restarted: its rows are
            done by time-out with reward 0 and the last observation as the final one, as nobody knows what they did.

        Raises:
            TaskEnvError: If a task fails and is not restarted. All tasks are closed then.
        """
        self._num_steps += 1
        results = self._step_tasks(actions)
        invalid = [isinstance(result, TaskEnvError) for result in results]
        with self._closed_on_failure():
            results = [self._restart(k, r) if isinstance(r, TaskEnvError) else r for k, r in enumerate(results)]
        obs, rewards, dones, extras = zip(*results, strict=True)
        self._obs = self._pad([group["policy"] for group in obs])
        ends = self._cat(dones, torch.bool)
        merged = self._merge_extras(obs, ends, extras)
        if any(invalid):
            merged["invalid"] = self._per_env(invalid)
        return self.get_observations(), self._cat(rewards, torch.get_default_dtype()), ends, merged

    def seed(self, seed: int) -> None:
        """Give each task a seed of its own, from ``seed`` on."""
        for k, env in enumerate(self._envs):
            env.seed(seed + k)

    def curriculum_state(self) -> list[dict[str, Any] | None]:
        """How hard each task is by now; ``None`` where it does not tell."""
        return [env.curriculum_state() for env in self._envs]

    def load_curriculum_state(self, state: list[dict[str, Any] | None]) -> None:
        """Make the tasks as hard as :meth:`curriculum_state` of other environments of the same tasks says."""
        for env, part in zip(self._envs, state, strict=True):
            if part is not None:
                env.load_curriculum_state(part)

    def state_dict(self) -> list[dict[str, Any] | None]:
        """What the tasks tell of their state, for :meth:`load_state_dict`."""
        return [env.state_dict() for env in self._envs]

    def load_state_dict(self, state: list[dict[str, Any] | None]) -> bool:
        """Go on from :meth:`state_dict` of the same tasks.

        Returns:
            Whether all of them go on exactly; otherwise new episodes begin in all of them.
        """
        with self._closed_on_failure():
            exact = True
            for env, part in zip(self._envs, state, strict=True):
                exact &= part is not None and env.load_state_dict(part)
            if exact:
                self._obs = self._pad([env.get_observations()["policy"] for env in self._envs])
        if not exact:
            self.reset()
        return exact

    def close(self) -> None:
        """Close all tasks, even where one of them fails to."""
        for env in self._envs:
            if isinstance(env, SubprocVecEnv):
                env.stop()  # all at once
        with contextlib.ExitStack() as stack:
            for env in self._envs:
                stack.callback(env.close)

    # -- step ---------------------------------------------------------------------------------------------------------

    def _step_tasks(self, actions: torch.Tensor) -> list[Result | TaskEnvError]:
        """Results of all tasks, started before any is waited for; a failure takes the place of a result."""
        parts = [
            actions[rows, : env.num_actions].to(env.device).contiguous()
            for env, rows in zip(self._envs, self._rows, strict=True)
        ]
        results: list[Any] = [None] * self.num_tasks
        for k in self._concurrent:
            results[k] = self._attempt(k, self._envs[k].step_async, parts[k])
        for k, env in enumerate(self._envs):
            if k not in self._concurrent:
                results[k] = self._attempt(k, env.step, parts[k])
        for k in self._concurrent:
            if results[k] is None:
                results[k] = self._attempt(k, self._envs[k].step_wait)
        return results

    def _attempt(self, k: int, function: Callable[..., Any], *arguments: torch.Tensor) -> Any:
        """Call a function of a task; returns its failure, so that the others can finish their step first."""
        try:
            return function(*arguments)
        except TaskEnvError as error:
            return error
        except Exception as error:
            return TaskEnvError(self.task_names[k], reason(error), traceback.format_exc())

    def _restart(self, k: int, error: TaskEnvError) -> Result:
        """Restart a task whose process died; returns its rows of the invalid step.

        Raises:
            TaskEnvError: ``error``, if there is no restart; another, if it dies too often.
        """
        env, rows = self._envs[k], self._rows[k]
        if not self.restart_members or not isinstance(env, SubprocVecEnv):
            raise error
        restarted = False
        while not restarted:
            recent = [step for step in self._deaths[k] if step > self._num_steps - DEATH_WINDOW]
            self._deaths[k] = [*recent, self._num_steps]
            if len(self._deaths[k]) == MAX_DEATHS:
                raise error
            print(f"[m3po] restarting task '{error.task}': {error.reason}", flush=True)
            try:
                env.restart()
                restarted = True
            except TaskEnvError as next_error:
                error = next_error
        last = {"policy": self._obs["policy"][rows, : self.obs_dims[k]]}
        ends = torch.ones(env.num_envs, dtype=torch.bool, device=env.device)
        extras = {"time_outs": ends, "final_obs": last}
        return env.get_observations(), torch.zeros(env.num_envs, device=env.device), ends, extras

    def _merge_extras(
        self, obs: Sequence[TensorDict], dones: torch.Tensor, extras: Sequence[dict[str, Any]]
    ) -> dict[str, Any]:
        """Extras of the batch from those of the tasks, as :meth:`step` describes them."""
        merged: dict[str, Any] = {"time_outs": self._cat_extras("time_outs", extras, 0.0, torch.bool)}
        delivered = ["final_obs" in extra for extra in extras]
        if any(delivered):
            final = [extra.get("final_obs", group)["policy"] for extra, group in zip(extras, obs, strict=True)]
            merged["final_obs"] = self._pad_final(final)
            if not all(delivered):
                merged["final_obs_valid"] = self._per_env(delivered) | ~dones
        if any(task_env.reports_success for task_env in self.task_envs):
            merged["success"] = self._cat_extras("success", extras, torch.nan, torch.get_default_dtype())
        if log := self._new_logs(extras):
            merged["log"] = log
        return merged

    def _new_logs(self, extras: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Entries of new logs."""
        merged = {}
        for name, logs, extra in zip(self.task_names, self._logs, extras, strict=True):
            merged |= {f"{name}/{key}": value for key, value in logs.take(extra.get("log")).items()}
        return merged

    # -- tensors ------------------------------------------------------------------------------------------------------

    def _cat(self, parts: Iterable[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        return torch.cat([part.to(self.device, dtype) for part in parts])

    def _cat_extras(
        self, name: str, extras: Sequence[dict[str, Any]], default: float, dtype: torch.dtype
    ) -> torch.Tensor:
        """An entry of all tasks, (N,); the default in the rows of those without it."""
        parts = [
            extra[name] if name in extra else torch.full((size,), default, device=self.device)
            for extra, size in zip(extras, self._sizes, strict=True)
        ]
        return self._cat(parts, dtype)

    def _per_env(self, values: Sequence[int | bool]) -> torch.Tensor:
        """One value per task, repeated for each of its environments, (N,)."""
        return torch.tensor(values, device=self.device)[self.task_ids]

    @contextlib.contextmanager
    def _closed_on_failure(self) -> Generator[None]:
        try:
            yield
        except BaseException:
            self.close()
            raise
