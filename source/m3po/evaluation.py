"""Noise-free evaluation with a fixed number of episodes per environment.

Counting the first episodes that *finish* would over-represent short ones: a policy that falls half of the time would
look as if it fell nearly always. Here every environment plays its own share, and only that share is counted.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from rsl_rl.env import VecEnv
from tensordict import TensorDict

from m3po.envs.interface import M3POEnv, as_m3po_env
from m3po.envs.logs import number
from m3po.errors import UserError

Policy = Callable[[TensorDict], torch.Tensor]
"""Observations [n] to actions [n, A]. ``policy.reset(dones)`` is called after every step where it exists."""

CHECK_INTERVAL = 16
"""Steps between two looks of the host at the device, to see whether all episodes are over."""


def evaluate(env: VecEnv, policy: Policy, num_episodes: int, on_step: Callable[[], object] | None = None) -> dict:
    """Evaluate one policy; see :func:`evaluate_policies`.

    Returns:
        ``return_mean``, ``return_std``, ``length_mean``, ``length_std`` [steps], ``termination_rate`` (true ends, not
        time-outs), ``success_rate`` (``None`` where the task does not report it), ``num_episodes``,
        ``steps_per_second`` (of all environments together) and ``returns``, one per episode.
    """
    return evaluate_policies(env, {"policy": policy}, num_episodes, on_step)["policy"]


def evaluate_policies(
    env: VecEnv, policies: Mapping[str, Policy], num_episodes: int, on_step: Callable[[], object] | None = None
) -> dict[str, dict]:
    """Evaluate several policies in one pass, each on its own share of the environments, from a fresh reset.

    Args:
        env: The environments; needs ``reset()`` besides what :class:`rsl_rl.env.VecEnv` asks for.
        policies: The policies by name. The environments of each task are split evenly among them, in order.
        num_episodes: Episodes of each policy in each task, spread evenly over its environments. One that goes on beyond
            the task's time limit ends there, and counts as a time-out.
        on_step: Called after every step, for example to record a frame.

    Returns:
        The result of each policy under its name, as :func:`evaluate` describes it. Of several tasks it is that of all
        episodes together, with the results of the tasks by name under ``tasks``, their ``score`` where it is defined
        (:func:`capped_score`), and ``score_mean`` and ``score_min`` over them.

        Success comes from ``extras["success"]`` where there is one. Otherwise a task's log reports success as one
        number for all of its episodes that end in a step. Where this number is the share of time-outs at every step,
        success means survival and is known for each episode. Otherwise each of them counts with the number; where they
        belong to several policies and the number is neither 0 nor 1, ``success_rate`` is ``None``.

    Raises:
        UserError: If a task has fewer environments than there are policies, or no episodes are asked for.
    """
    if num_episodes < 1:
        raise UserError(f"The number of episodes must be at least 1, got {num_episodes}.")
    env = as_m3po_env(env)
    parts = _split(env, len(policies))
    tally = _Tally(env, parts, num_episodes)
    max_steps = tally.num_slots * (int(torch.as_tensor(env.max_episode_length).max()) + 1)

    start = time.perf_counter()
    # Simulators update their buffers in place, and tensors born in inference mode can only be updated there: hence the
    # reset is inside as well.
    with torch.inference_mode():
        obs, _ = env.reset()
        for policy, part in zip(policies.values(), parts, strict=True):
            _reset(policy, torch.ones(len(part), dtype=torch.bool, device=env.device))
        actions = torch.zeros(env.num_envs, env.num_actions, device=env.device)
        for step in range(1, max_steps + 1):
            for policy, part in zip(policies.values(), parts, strict=True):
                actions[part] = policy(obs[part]).to(env.device)
            obs, rewards, dones, extras = env.step(actions.clone())
            tally.add(rewards, dones, extras)
            for policy, part in zip(policies.values(), parts, strict=True):
                _reset(policy, dones[part])
            if on_step is not None:
                on_step()
            if step % CHECK_INTERVAL == 0 and tally.complete():
                break
    steps_per_second = step * env.num_envs / (time.perf_counter() - start)
    return {
        name: {**_summary(env, tally, part), "steps_per_second": steps_per_second}
        for name, part in zip(policies, parts, strict=True)
    }


def _summary(env: M3POEnv, tally: _Tally, part: torch.Tensor) -> dict:
    """Statistics of the environments of ``part``, and of each of several tasks among them."""
    result = tally.summary(part)
    if env.num_tasks == 1:
        return result
    result["tasks"] = {}
    for name, score_range, rows in zip(env.task_names, env.score_ranges, _rows_of_tasks(env), strict=True):
        task = tally.summary(part[torch.isin(part, rows.to(part.device))])
        if task["success_rate"] is not None:
            task["score"] = task["success_rate"]
        elif score_range is not None:
            task["score"] = capped_score(task["return_mean"], score_range)
        result["tasks"][name] = task
    scores = [task["score"] for task in result["tasks"].values() if "score" in task]
    if scores:
        result |= {"score_mean": sum(scores) / len(scores), "score_min": min(scores)}
    return result


class _Tally:
    """Running episodes and the counted ones, on the environments' device."""

    def __init__(self, env: M3POEnv, parts: list[torch.Tensor], num_episodes: int) -> None:
        """Give every environment its share of its task's episodes; earlier environments take the remainder."""
        device = env.device
        self.quota = torch.empty(env.num_envs, dtype=torch.long, device=device)
        self.group = torch.empty(env.num_envs, dtype=torch.long, device=device)
        self.num_slots = 0
        """Largest share of an environment."""
        for index, part in enumerate(parts):
            self.group[part] = index
            for rows in _rows_of_tasks(env):
                mine = part[torch.isin(part, rows)]
                share, remainder = divmod(num_episodes, len(mine))
                self.quota[mine] = share
                self.quota[mine[:remainder]] += 1
                self.num_slots = max(self.num_slots, share + (remainder > 0))
        shape = (env.num_envs, self.num_slots)
        self.returns = torch.zeros(shape, device=device)
        self.lengths = torch.zeros(shape, device=device)
        self.terminated = torch.zeros(shape, device=device)
        self.success = torch.full(shape, torch.nan, device=device)
        self.finished = torch.zeros(env.num_envs, dtype=torch.long, device=device)
        self._return = torch.zeros(env.num_envs, device=device)
        self._length = torch.zeros(env.num_envs, device=device)
        self._time_limit = torch.as_tensor(env.max_episode_length, device=device)
        self._rows = torch.arange(env.num_envs, device=device)
        # A single task's log has no prefix.
        several = env.num_tasks > 1
        self._prefixes = [f"{name}/" for name in env.task_names] if several else [""]
        self._rows_of_tasks = _rows_of_tasks(env)
        self._success_keys: dict[int, str] = {}
        """Task -> entry of the log that is its success rate, once seen."""
        self._is_survival = torch.zeros(env.num_envs, dtype=torch.bool, device=device)

    def add(self, rewards: torch.Tensor, dones: torch.Tensor, extras: dict[str, Any]) -> None:
        """Account for one step.

        Args:
            rewards: Shape (num_envs,).
            dones: Shape (num_envs,); terminations and time-outs alike.
            extras: ``time_outs``, shape (num_envs,); without it every end is a termination, which is what a task with a
                finite horizon means by it. ``log`` may carry the success rate of the environments that reset.
        """
        device = self._return.device
        done = dones.to(device).bool()
        time_outs = extras["time_outs"].to(device).bool() if "time_outs" in extras else torch.zeros_like(done)
        self._return += rewards.to(device)
        self._length += 1
        success = self._success(done, time_outs, extras)
        beyond = ~done & (self._length > self._time_limit)
        done, time_outs = done | beyond, time_outs | beyond
        counted = done & (self.finished < self.quota)
        slot = self.finished.clamp(max=self.num_slots - 1)
        for table, value in (
            (self.returns, self._return),
            (self.lengths, self._length),
            (self.terminated, (~time_outs).float()),
            (self.success, success),
        ):
            table[self._rows, slot] = torch.where(counted, value, table[self._rows, slot])
        self.finished += counted
        self._return.masked_fill_(done, 0.0)
        self._length.masked_fill_(done, 0.0)

    def _success(self, done: torch.Tensor, time_outs: torch.Tensor, extras: dict[str, Any]) -> torch.Tensor:
        """Return the success of the episodes that end now, shape (num_envs,); NaN where unknown."""
        success = torch.full_like(self._return, torch.nan)
        if log := extras.get("log"):
            self._find_success_keys(log)
            for k, key in self._success_keys.items():
                if key in log:
                    rows = self._rows_of_tasks[k]
                    success[rows] = self._reported_success(rows, done[rows], time_outs[rows], log[key])
        if "success" in extras:
            given = extras["success"].to(success)
            self._is_survival &= given.isnan()
            success = torch.where(given.isnan(), success, given)
        return success

    def _find_success_keys(self, log: dict[str, Any]) -> None:
        """Learn where tasks report success; until a step shows otherwise, it may mean survival."""
        for k, prefix in enumerate(self._prefixes):
            if k not in self._success_keys:
                found = (x for x in log if x.startswith(prefix) and is_success_rate(x.removeprefix(prefix)))
                key = next(found, None)
                if key is not None:
                    self._success_keys[k] = key
                    self._is_survival[self._rows_of_tasks[k]] = True

    def _reported_success(
        self, rows: torch.Tensor, done: torch.Tensor, time_outs: torch.Tensor, rate: Any
    ) -> torch.Tensor:
        """Return the success of a task's episodes that end now, shape (); NaN where unknown.

        The log is the simulator's own dictionary and stays until the next reset: it says something only where ``done``.

        Args:
            rows: The task's environments, (n,).
            done: Ends of episodes, (n,).
            time_outs: Those by time-out, (n,).
            rate: What the log says.
        """
        rate = rate if isinstance(rate, torch.Tensor) else number(rate)
        value = torch.as_tensor(rate, dtype=torch.float32, device=done.device).mean()
        time_out_share = (time_outs & done).sum() / done.sum()
        self._is_survival[rows] &= ~done.any() | torch.isclose(value, time_out_share)
        group = self.group[rows]
        first = torch.where(done, group, self.group.max() + 1).min()
        last = torch.where(done, group, -1).max()
        return torch.where((first == last) | (value == 0.0) | (value == 1.0), value, torch.nan)

    def complete(self) -> bool:
        """Return whether every environment has played its share. Waits for the device."""
        return bool((self.finished >= self.quota).all())

    def summary(self, part: torch.Tensor) -> dict:
        """Return the statistics of the counted episodes of environments, shape (n,)."""
        counted = torch.arange(self.num_slots, device=self.quota.device) < self.quota[part, None]
        success = torch.where(self._is_survival[:, None], 1.0 - self.terminated, self.success)
        columns = torch.stack([t[part][counted] for t in (self.returns, self.lengths, self.terminated, success)])
        returns, lengths, terminated, success = columns.double().cpu()
        return {
            "return_mean": returns.mean().item(),
            "return_std": returns.std(correction=0).item(),
            "length_mean": lengths.mean().item(),
            "length_std": lengths.std(correction=0).item(),
            "termination_rate": terminated.mean().item(),
            "success_rate": None if success.isnan().any() else success.mean().item(),
            "num_episodes": returns.numel(),
            "returns": returns.tolist(),
        }


def capped_score(mean_return: float, score_range: tuple[float, float]) -> float:
    """Where a mean return lies in a task's range, capped to [0, 1]."""
    low, high = score_range
    return min(max((mean_return - low) / (high - low), 0.0), 1.0)


def is_success_rate(key: str) -> bool:
    """Tell a task's success metric (``Metrics/success_rate``, ``Metrics/lift_success_rate``) from reward terms."""
    return key.startswith("Metrics/") and key.endswith("success_rate")


def _rows_of_tasks(env: M3POEnv) -> list[torch.Tensor]:
    """Environments of each task."""
    if env.task_ids is None:
        return [torch.arange(env.num_envs, device=env.device)]
    return [(env.task_ids == k).nonzero().squeeze(-1) for k in range(env.num_tasks)]


def _split(env: M3POEnv, num_groups: int) -> list[torch.Tensor]:
    """Split the environments of each task into groups whose sizes differ by at most one.

    Raises:
        UserError: If a task has fewer environments than there are groups.
    """
    groups: list[list[torch.Tensor]] = [[] for _ in range(num_groups)]
    for rows in _rows_of_tasks(env):
        if len(rows) < num_groups:
            raise UserError(f"{num_groups} policies need at least as many environments, got {len(rows)}.")
        bounds = [len(rows) * index // num_groups for index in range(num_groups + 1)]
        for group, (start, stop) in zip(groups, itertools.pairwise(bounds), strict=True):
            group.append(rows[start:stop])
    return [torch.cat(group) for group in groups]


def _reset(policy: Policy, dones: torch.Tensor) -> None:
    """Tell a policy with a memory which environments start a new episode."""
    reset = getattr(policy, "reset", None)
    if reset is not None:
        reset(dones)
