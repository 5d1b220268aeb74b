"""Environments whose numbers are not finite: masked, reset, counted, and recorded for a replay.

A step whose action, observation, reward or final observation is not finite is marked as ``invalid``: nothing is learnt
from it, and its episode ends as a time-out with reward 0. The environment is reset where it can be, that is where it
has ``reset_envs(ids) -> observations``, which resets the environments ``ids``, (n,), int64, sets their
``episode_length_buf`` to 0, and returns the observations of all N. Otherwise it is stepped on, showing zeros for what
is not finite, and all its steps are invalid until it ends an episode by itself.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rsl_rl.env import VecEnv
from tensordict import TensorDict

from m3po import distributed
from m3po.config import MAX_NAN_FRACTION, check_max_nan_fraction, check_runner_fields
from m3po.deferred_flag import DeferredFlag
from m3po.envs.interface import as_m3po_env
from m3po.errors import CheckpointError
from m3po.runners.flight_recorder import FlightRecorder, is_sound
from m3po.text import listed

MAX_FILES, MAX_MESSAGES = 10, 3
"""Recordings written in a run, and messages printed in a rollout; the rest is counted only."""

Answer = tuple[TensorDict, torch.Tensor, torch.Tensor, dict[str, Any]]
"""Observations, rewards, dones and extras, as :meth:`rsl_rl.env.VecEnv.step` returns them."""


class NanGuard:
    """Stands between an environment and an algorithm. What is finite passes through it bit for bit.

    On a CPU it acts at once. On a GPU nothing waits for the device: values are masked there in every step, and the host
    learns of them one step later (:class:`~m3po.deferred_flag.DeferredFlag`), when it reports and resets; that costs
    the environment one more invalid step.
    """

    def __init__(
        self, env: VecEnv, cfg: Mapping[str, Any], log_dir: str | None, device: str, late: bool | None = None
    ) -> None:
        """Watch an environment.

        Args:
            env: Environment.
            cfg: Runner configuration: ``check_for_nan`` (false: nothing is watched), ``max_nan_fraction``, and
                ``task`` and ``seed`` for recordings.
            log_dir: Folder that receives recordings; none are written without one.
            device: Torch device of the algorithm.
            late: Whether the host learns of a step one step later; by default on a GPU.

        Raises:
            ValueError: If ``max_nan_fraction`` is not a fraction, or a field has another name now.
        """
        self.env, self.device, self.log_dir = as_m3po_env(env), device, log_dir
        check_runner_fields(cfg)
        self.active = bool(cfg.get("check_for_nan", True))
        self.max_fraction = cfg.get("max_nan_fraction", MAX_NAN_FRACTION)
        check_max_nan_fraction(self.max_fraction)
        self._flag = DeferredFlag(device, late)
        self._recorder = FlightRecorder(self.env, {"task": cfg.get("task"), "seed": cfg.get("seed")})
        self._task_names: Sequence[str] = self.env.task_names
        ids = self.env.task_ids
        self._task_ids = torch.zeros(env.num_envs, dtype=torch.long) if ids is None else ids.cpu()
        self._stuck = torch.zeros(env.num_envs, dtype=torch.bool, device=device)
        """Environments that are not usable before they are reset, (N,)."""
        self._counts = torch.zeros(2, env.num_envs, dtype=torch.long, device=device)
        """Steps of the rollout in which an environment became invalid, and in which it was, (2, N)."""
        self.metrics: dict[str, float] = {}
        """Counts of the rollout that was closed last."""
        self.task_metrics: dict[str, float] = {}
        """Its counts of environments of each of several tasks, as ``task/<name>/nan_envs``."""
        self.affected = 0.0
        """Fraction of the environments with an invalid step in it."""
        self._num_files = 0 if log_dir is None else len(list(Path(log_dir).glob("nonfinite_*.pt")))  # resumed runs too
        self._num_messages = 0

    def first(self, obs: TensorDict) -> TensorDict:
        """The observations that a training begins with, with zeros in rows that are not finite."""
        return obs.clone(recurse=False).update(_zeroed(obs)) if self.active else obs

    def before(self, actions: torch.Tensor) -> torch.Tensor:
        """Note the actions, (N, A), and return them with zeros in rows that are not finite."""
        if not self.active:
            return actions
        self._recorder.begin(actions)
        self._bad_action = ~_finite_rows(actions)
        return torch.where(self._bad_action.unsqueeze(1), 0.0, actions)

    def after(self, previous: TensorDict, answer: Answer) -> Answer:
        """Check what the environment answered to the actions.

        Args:
            previous: Observations before the step, finite, batch size (N,).
            answer: The environment's, on the algorithm's device.

        Returns:
            The answer, finite; ``extras["invalid"]``, (N,), marks steps to be ignored, where there may be any.
        """
        if not self.active:
            return answer
        obs, rewards, dones, extras = answer
        ends = dones.bool()
        findings = {"action": self._bad_action, "reward": ~_finite_rows(rewards)}
        findings |= {f"observation {group}": ~_finite_rows(x) for group, x in _floats(obs)}
        delivered = extras.get("final_obs")
        final = {} if delivered is None else {group: x.to(self.device) for group, x in _floats(delivered)}
        findings |= {f"final observation {group}": ~_finite_rows(x) & ends for group, x in final.items()}
        bad = torch.stack(list(findings.values())).any(0)
        invalid, fresh = bad | self._stuck, bad & ~self._stuck
        broken = torch.stack([rows for name, rows in findings.items() if name.startswith("observation")]).any(0)
        self._stuck = (invalid & ~ends) | broken
        self._counts += torch.stack((fresh, invalid))
        self._recorder.end(answer, final, findings, fresh)
        if self._flag(invalid.any()):
            obs = self._intervene(obs)
        elif not self._flag.late:
            return answer
        return self._masked(previous, (obs, rewards, dones, extras), invalid)

    def close_rollout(self) -> None:
        """Count what happened since the last call: the only time that the host always waits."""
        nan_envs, invalid = self._counts.cpu()
        self._counts = torch.zeros_like(self._counts)
        self._num_messages = 0
        sums = torch.stack((nan_envs.sum(), invalid.sum(), (invalid > 0).sum(), torch.tensor(len(invalid))))
        events, steps, affected, envs = distributed.total(sums).tolist()
        self.affected = affected / envs
        self.metrics = {"robust/nan_envs": float(events), "robust/invalid_steps": float(steps)}
        if events:
            print(
                f"[m3po] NaN guard: {events} findings in this rollout, in {self.affected:.1%} of the environments; "
                f"{steps} invalid steps",
                flush=True,
            )
        if len(self._task_names) > 1:
            sums = torch.zeros(len(self._task_names), dtype=torch.long).index_add(0, self._task_ids, nan_envs)
            counts = zip(self._task_names, distributed.total(sums).tolist(), strict=True)
            self.task_metrics = {f"task/{name}/nan_envs": float(count) for name, count in counts}

    @property
    def exceeded(self) -> bool:
        """Whether more environments had invalid steps in the rollout closed last than the run may go on with."""
        return self.affected > self.max_fraction

    def _masked(self, previous: TensorDict, answer: Answer, invalid: torch.Tensor) -> Answer:
        """The answer with everything finite that somebody may read."""
        obs, rewards, dones, extras = answer
        obs = obs.clone(recurse=False).update(_zeroed(obs))
        extras = dict(extras)  # the environment keeps its own
        extras["time_outs"] = invalid | extras.get("time_outs", torch.zeros_like(invalid)).to(self.device).bool()
        extras["invalid"] = invalid | extras.get("invalid", torch.zeros_like(invalid)).to(self.device)
        if extras.get("final_obs") is not None:
            final = {group: x.to(self.device) for group, x in extras["final_obs"].items()}
            extras["final_obs"] = {group: _keep(~invalid, x, previous[group]) for group, x in final.items()}
        return obs, torch.where(invalid, 0.0, rewards), torch.where(invalid, torch.ones_like(dones), dones), extras

    def _intervene(self, obs: TensorDict) -> TensorDict:
        """Reset what can be reset, and report what the flag was about. Returns the current observations."""
        rows = self._stuck.nonzero().squeeze(1)
        after = self.env.reset_envs(rows.to(self.env.device)) if len(rows) else None
        if after is not None:
            after = after.to(self.device)
            groups = obs.keys()  # a TensorDict iterates over its rows
            obs = obs.clone(recurse=False).update({g: _keep(~self._stuck, obs[g], after[g]) for g in groups})
            healthy = torch.stack([_finite_rows(x) for _, x in _floats(obs)]).all(0)
            # Of several tasks, some may not be able to: where an episode has not begun, nothing was reset.
            self._stuck = self._stuck & ~(healthy & (self.env.episode_length_buf.to(self.device) == 0))
        affected = self._recorder.fresh(late=self._flag.late)
        if affected:
            self._report(affected)
        return obs

    def _report(self, affected: list[int]) -> None:
        """Say what was found in which environments, and write the recording."""
        self._num_messages += 1
        if self._num_messages > MAX_MESSAGES:
            return
        findings = self._recorder.describe(late=self._flag.late)
        tasks = (
            dict.fromkeys(self._task_names[k] for k in self._task_ids[affected].tolist()) if self._task_names else ()
        )
        stuck = [row for row in affected if self._stuck[row]]
        fate = "their steps are not learnt from"
        if stuck:
            fate += f"; {listed(stuck)} cannot be reset and will be stepped on until an episode ends"
        where = ""
        if self.log_dir is not None and self._num_files < MAX_FILES:
            self._num_files += 1
            path = Path(self.log_dir) / f"nonfinite_{self._recorder.step}.pt"
            if path.exists():  # of the same run before it was resumed, which counts steps anew
                path = path.with_stem(f"{path.stem}_{time.time_ns()}")
            try:
                self._recorder.write(path, affected, findings)
                where = f"; recorded in {path}"
            except CheckpointError as error:  # a full disk does not end the run
                where = f"; not recorded: {error}"
        of = f" of {', '.join(tasks)}" if tasks else ""
        print(
            f"[m3po] NaN guard at step {self._recorder.step}: not finite in {listed(affected)}{of}: "
            f"{', '.join(findings)}; {fate}{where}",
            flush=True,
        )


def _floats(groups: Mapping[str, torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
    """The groups that can be anything but finite."""
    return [(group, x) for group, x in groups.items() if x.is_floating_point()]


def _zeroed(obs: TensorDict) -> dict[str, torch.Tensor]:
    """The groups of :func:`_floats` with zeros in rows that are not finite."""
    return {group: _keep(_finite_rows(x), x, 0.0) for group, x in _floats(obs)}


def _finite_rows(x: torch.Tensor) -> torch.Tensor:
    """Rows of (N, ...) that are finite in every element, (N,), boolean."""
    return is_sound(x).view(len(x), -1).all(1)


def _keep(rows: torch.Tensor, x: torch.Tensor, other: torch.Tensor | float) -> torch.Tensor:
    """``x``, (N, ...), in some rows, (N,), and something else in the others."""
    return torch.where(rows.view(-1, *[1] * (x.dim() - 1)), x, other)
