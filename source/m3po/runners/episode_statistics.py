"""Returns, lengths, success and scores per task over one iteration, kept on the device until it ends.

Those of several processes are put together when they are read: all know the episodes of all, in the order in which one
process with all environments would have seen them.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from rsl_rl.env import VecEnv

from m3po import distributed
from m3po.envs.interface import as_m3po_env
from m3po.envs.logs import NewLogs, number
from m3po.evaluation import capped_score, is_success_rate

OWN_NAMES = frozenset(
    (
        *("bonus", "gate", "loss", "model", "plan", "planner", "policy", "robust", "task", "update"),
        *("Eval", "Loss", "Perf", "Task", "Train"),
    )
)
"""First parts of the names that reports use. An environment's log that has one is reported below ``Episode``."""


class EpisodeStatistics:
    """Episode bookkeeping of N environments without a host synchronisation per step."""

    WINDOW = 100
    """Finished episodes of a task that the printed means cover, as in rsl_rl."""

    def __init__(
        self,
        num_envs: int,
        device: str,
        task_names: Sequence[str] = ("task",),
        task_ids: torch.Tensor | None = None,
        score_ranges: Sequence[tuple[float, float] | None] = (None,),
    ) -> None:
        """Start with empty episodes in all environments.

        Args:
            num_envs: Environments N.
            device: Torch device of the bookkeeping.
            task_names: Names of the K tasks.
            task_ids: Task of each environment, (N,), int64; needed for several tasks only. A task may have no
                environment in this process.
            score_ranges: Returns that mean a score of 0 and of 1, for each task that has them.
        """
        self.task_names, self.score_ranges = tuple(task_names), tuple(score_ranges)
        self._tasks = torch.zeros(num_envs, dtype=torch.long) if task_ids is None else task_ids
        self._tasks = self._tasks.to(device)
        self._windows: list[deque[list[float]]] = [deque(maxlen=self.WINDOW) for _ in self.task_names]
        """Return, length and success of finished episodes, per task."""
        self._success_rates: dict[str, float] = {}
        """Latest success rates in the logs of several tasks, by task."""
        self._return = torch.zeros(num_envs, device=device)
        self._length = torch.zeros(num_envs, device=device)
        self._unknown = torch.full((num_envs,), torch.nan, device=device)
        self._never = torch.zeros(num_envs, dtype=torch.bool, device=device)
        self._steps: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._rewards = torch.zeros(2, num_envs, device=device)
        """Sum of the rewards and number of the steps since the last reading."""
        self._logs: list[dict[str, Any]] = []
        self._new_logs = NewLogs()
        self._skipped: set[str] = set()

    @classmethod
    def of(cls, env: VecEnv, device: str) -> EpisodeStatistics:
        """The statistics of an environment: of a ``MultiTaskVecEnv``'s tasks, or of a single one."""
        env = as_m3po_env(env)
        if env.task_ids is None:
            return cls(env.num_envs, device)
        return cls(env.num_envs, device, env.task_names, env.task_ids, env.score_ranges)

    def add(self, rewards: torch.Tensor, dones: torch.Tensor, extras: dict[str, Any]) -> None:
        """Add one step.

        Args:
            rewards: Rewards, (N,).
            dones: Ends of episodes, (N,).
            extras: The environment's. ``success``, (N,): success of the episodes that end, NaN where a task does not
                report it. ``invalid``, (N,), boolean: steps that never happened, because the environments' process was
                restarted; their episodes do not count. ``log``: the environment's own, entries of several tasks
                as ``<task>/<entry>``.
        """
        dones, invalid = dones.bool(), self._never
        if "invalid" in extras:
            invalid = extras["invalid"].to(self._never.device)
        success = extras["success"].to(self._unknown) if "success" in extras else self._unknown
        self._return += rewards
        self._length += 1
        self._rewards += torch.stack((rewards, ~invalid))
        self._steps.append((dones & ~invalid, torch.stack((self._return, self._length, success))))
        self._return.masked_fill_(dones, 0.0)
        self._length.masked_fill_(dones, 0.0)
        if log := self._new_logs.take(extras.get("log", extras.get("episode"))):
            self._logs.append(log)

    def read(self) -> dict[str, float]:
        """Statistics since the last call: the only host synchronisation of an iteration's bookkeeping.

        All processes of a group must call it at the same time.

        Returns of tasks with different scales cannot be averaged over episodes. So ``mean_return``, ``mean_length``,
        ``mean_step_reward`` and ``success`` are means over tasks of the task's own means; of one task they are its
        means. What no episode has told yet is left out.

        Several tasks have besides:

        * ``task/<name>/return``, ``.../length``, ``.../success``, ``.../score``: means over the task's window. The
          score is the success where it is reported, otherwise the return within the task's range, capped to [0, 1].
          A success rate in the task's log counts where its episodes report none; it is the latest one.
        * ``task/<name>/step_reward``, ``.../episodes``: mean reward and finished episodes since the last call.
        * ``task/<name>/share``: share of the environments.
        * ``score_mean``, ``score_min``: over the tasks that have a score; ``score_tasks`` is their number.
        """
        log = self._read_log()
        tasks = self._read_tasks()
        result = {
            "mean_step_reward": _mean(task["step_reward"] for task in tasks if "step_reward" in task),
            "episodes": sum(task["episodes"] for task in tasks),
            **log,
        }
        for name, field in (("mean_return", "return"), ("mean_length", "length"), ("success", "success")):
            if known := [task[field] for task in tasks if field in task]:
                result[name] = _mean(known)
        if len(tasks) > 1:
            for name, task in zip(self.task_names, tasks, strict=True):
                result |= {f"task/{name}/{field}": value for field, value in task.items()}
            if scores := [task["score"] for task in tasks if "score" in task]:
                result |= {"score_mean": _mean(scores), "score_min": min(scores), "score_tasks": len(scores)}
        return result

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` needs after a :meth:`read`, as tensors and plain values."""
        return {
            "return": self._return,
            "length": self._length,
            "windows": [list(window) for window in self._windows],
            "success_rates": self._success_rates,
        }

    def load_state_dict(self, state: dict[str, Any], running: bool) -> None:
        """Go on from :meth:`state_dict`.

        Args:
            state: What it returned.
            running: Whether the environments are in the midst of the same episodes; otherwise these begin now.
        """
        if running:
            self._return.copy_(state["return"])
            self._length.copy_(state["length"])
        for window, episodes in zip(self._windows, state["windows"], strict=True):
            window.extend(episodes)
        self._success_rates = dict(state["success_rates"])

    def _read_tasks(self) -> list[dict[str, float]]:
        """Values of each task, those that are known."""
        episodes = self._close_episodes()
        count, ids = len(self.task_names), self._tasks.cpu()
        rows = torch.cat((self._rewards.double().cpu(), torch.ones(1, len(ids)).double()))
        sums = distributed.collected(torch.zeros(3, count).double().index_add(1, ids, rows))
        rewards, steps, sizes = torch.stack(sums).sum(0).tolist()
        self._rewards.zero_()
        tasks = []
        for k, name in enumerate(self.task_names):
            task = {"episodes": episodes[k], "share": sizes[k] / sum(sizes)}
            if steps[k]:
                task["step_reward"] = rewards[k] / steps[k]
            means = _episode_means(self._windows[k], self.score_ranges[k], self._success_rates.get(name))
            tasks.append(task | means)
        return tasks

    def _close_episodes(self) -> list[int]:
        """Move the episodes that finished since the last call to their tasks' windows. Returns how many per task."""
        finished, values = (torch.stack(x) for x in zip(*self._steps, strict=True))
        self._steps.clear()
        steps, rows = finished.nonzero(as_tuple=True)
        table = torch.cat((torch.stack((steps, self._tasks[rows])), values.movedim(1, 0)[:, finished])).double().cpu()
        table = torch.cat(distributed.collected(table), dim=1)
        table = table[:, table[0].argsort(stable=True)]
        owners = table[1].long()
        for task, episode in zip(owners.tolist(), table[2:].T.tolist(), strict=True):
            self._windows[task].append(episode)
        return torch.bincount(owners, minlength=len(self.task_names)).tolist()

    def _read_log(self) -> dict[str, float]:
        """Means of the environment's own log; a single task's success rate also under the name ``success``."""
        values: dict[str, list[float]] = {}
        logs = [self._numbers(log) for log in self._logs]
        for log in itertools.chain.from_iterable(distributed.collected(logs)):
            for key, value in log.items():
                values.setdefault(key, []).append(value)
        result: dict[str, float] = {}
        for key, series in values.items():
            own = "/" not in key or key.split("/")[0] in OWN_NAMES
            name = f"Episode/{key}" if own else key
            result[name] = _mean(series)
            task, several, metric = key.rpartition("/Metrics/")
            if is_success_rate(key):
                result["success"] = result[name]
            elif several and is_success_rate(f"Metrics/{metric}"):
                self._success_rates[task] = result[name]
        self._logs.clear()
        return result

    def _numbers(self, log: dict[str, Any]) -> dict[str, float]:
        """The entries of a log that are numbers, or the means of numbers; which are not is said once."""
        numbers = {str(key): number(value) for key, value in log.items()}
        for key in [key for key, value in numbers.items() if math.isnan(value)]:
            del numbers[key]
            if key not in self._skipped:
                self._skipped.add(key)
                print(f"[m3po] the environment's log holds no number under '{key}', which is not reported", flush=True)
        return numbers


def _episode_means(
    window: deque[list[float]], score_range: tuple[float, float] | None, success_rate: float | None
) -> dict[str, float]:
    """Mean return, length and success of a task's episodes, and its score: those that are known."""
    if not window:
        return {}
    returns, lengths, successes = zip(*window, strict=True)
    means = {"return": _mean(returns), "length": _mean(lengths)}
    reported = [success for success in successes if not math.isnan(success)]
    if reported:
        means["success"] = means["score"] = _mean(reported)
    elif success_rate is not None:
        means["success"] = means["score"] = success_rate
    elif score_range is not None:
        means["score"] = capped_score(means["return"], score_range)
    return means


def _mean(values: Iterable[float]) -> float:
    """Arithmetic mean; NaN of no values."""
    values = list(values)
    return sum(values) / len(values) if values else math.nan
