"""What a runner writes, and how it goes on from that."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rsl_rl.runners import OnPolicyRunner

from m3po import distributed
from m3po.algorithms import M3PO
from m3po.envs.interface import M3POEnv
from m3po.errors import CheckpointError
from m3po.runners.checkpoint import (
    BEST,
    FORMAT,
    LAST,
    check_compatible,
    check_optimizers,
    check_shapes,
    numbered,
    read_checkpoint,
    write_checkpoint,
)
from m3po.runners.episode_statistics import EpisodeStatistics
from m3po.runners.random_state import random_state, restore_random_state
from m3po.runners.reporting import Reporter
from m3po.runners.run_folder import rewind
from m3po.runners.task_transfer import describe_tasks

RUNNER_STATE = ("env_steps", "seconds", "best_return", "first_iteration")
"""Attributes that a checkpoint holds."""


class ResumableRunner(OnPolicyRunner):
    """The part of :class:`~m3po.runners.M3PORunner` that saves, loads and resumes (docs/checkpoints.md)."""

    alg: Any  # M3PO, or an algorithm of rsl_rl
    env: M3POEnv
    env_steps: int
    evaluator: Any  # an Evaluator, or None
    log_dir: Any  # a folder, or None where nothing is written
    run_dir: Any
    reporter: Reporter
    statistics: EpisodeStatistics
    _agent: str
    _algo: str | None
    _unevaluated: dict[int, str]

    KEPT = 10
    """Numbered checkpoints that are kept, unless ``keep_checkpoints`` of the configuration says otherwise."""

    def description(self) -> dict[str, Any]:
        """What a checkpoint says about itself."""
        obs = self.env.get_observations()
        return {
            "format": FORMAT,
            "task": self.cfg.get("task"),
            **describe_tasks(self.env),
            "algorithm": self._algo or ("m3po" if isinstance(self.alg, M3PO) else "ppo"),
            "obs_dims": {group: value.shape[-1] for group, value in obs.items()},
            "num_actions": self.env.num_actions,
            "agent": self._agent,
        }

    def save(self, path: str, infos: dict | None = None, resumable: bool = False) -> None:
        """Write a checkpoint atomically (docs/checkpoints.md).

        Args:
            path: File.
            infos: Kept with it.
            resumable: Include what :meth:`resume` needs to go on exactly: the replay buffer, which is large, random
                numbers, statistics, and the environments where these tell their state.

        Raises:
            CheckpointError: If it cannot be written.
        """
        content = self.alg.save()
        content["iter"] = self.current_learning_iteration
        content["infos"] = infos
        content["m3po"] = self.description()
        content["runner_state"] = {name: getattr(self, name) for name in RUNNER_STATE}
        content["curriculum"] = self.env.curriculum_state()
        if resumable:
            content["resume"] = self._resume_state()
        write_checkpoint(path, content)

    def _resume_state(self) -> dict[str, Any]:
        """What this process needs to go on exactly, besides what all of them have learnt."""
        return {
            "processes": distributed.world_size(),
            "algorithm": self.alg.resume_state() if isinstance(self.alg, M3PO) else None,
            "random": random_state(),
            "statistics": self.statistics.state_dict(),
            "environment": self.env.state_dict(),
            "unevaluated": {it: os.path.basename(path) for it, path in self._unevaluated.items()},
        }

    def load(
        self, path: str, load_cfg: dict | None = None, strict: bool = True, map_location: str | None = None
    ) -> Any:
        """Restore a checkpoint of the same task, spaces and algorithm; training continues with the next iteration.

        The task is as hard as it was there, from the next reset on.

        Raises:
            CheckpointError: If the file is unreadable or does not fit; nothing is loaded then.
        """
        content = read_checkpoint(path, map_location or self.device)
        self._load(path, content, load_cfg, strict)
        state = content.get("curriculum")
        if state is not None:
            self.env.load_curriculum_state(state)
            print("[m3po] curricula are where they were at the checkpoint", flush=True)
        self.first_iteration = self.current_learning_iteration
        return content["infos"]

    def _load(self, path: str, content: dict[str, Any], load_cfg: dict | None = None, strict: bool = True) -> None:
        here = self.description()
        compared = ("task", "tasks", "algorithm", "obs_dims", "num_actions")
        check_compatible(path, content, **{name: here[name] for name in compared if name in here})
        ours = self.alg.save()
        check_shapes(content, ours)
        if load_cfg is None or load_cfg.get("optimizer"):
            check_optimizers(content, ours)
        if self.alg.load(content, load_cfg, strict):
            self.current_learning_iteration = content["iter"] + 1
            for name in RUNNER_STATE:
                setattr(self, name, content["runner_state"].get(name, 0))

    def resume(self, path: str) -> None:
        """Go on with the run in :attr:`log_dir` from one of its checkpoints, as if it had never stopped.

        Of several processes, all call this, and if they are as many as before, each goes on with its own part.

        The result is the same, bit for bit on a CPU, from ``model_last.pt`` and where the environments tell their
        state; what is missing for that is said. Rows of later iterations leave the run's tables.

        Args:
            path: Checkpoint.

        Raises:
            CheckpointError: If the file is unreadable or does not fit.
        """
        content = read_checkpoint(path, self.device)
        self._load(path, content)
        for change in _changes(json.loads(content["m3po"]["agent"]), json.loads(self._agent)):
            print(f"[m3po] not as before: {change}", flush=True)
        folder, unevaluated = Path(path).parent, content.get("resume", {}).get("unevaluated", {})
        state: Any = content.get("resume") if distributed.is_main() else _own_state(folder, content["iter"])
        complete = state is not None and state["processes"] == distributed.world_size()
        complete = all(distributed.collected(complete))
        if complete and state["algorithm"] is not None:
            self.alg.restore(state["algorithm"])
        if distributed.is_main():  # only now that nothing can be refused any more
            rewind(folder, self.current_learning_iteration - 1, self.env_steps)
            self._keep_best(folder)
            self._evaluate_again(folder, unevaluated)
        if not complete:
            print(f"[m3po] '{path}' holds networks, optimisers and counters alone; the rest starts afresh.", flush=True)
            return
        if state["environment"] is not None:
            self._episodes_run = self.env.load_state_dict(state["environment"])
        if not self._episodes_run:
            print("[m3po] these environments do not tell their whole state; new episodes begin.", flush=True)
            if state["algorithm"] is not None:
                self.alg.replay.interrupt()
        self.statistics.load_state_dict(state["statistics"], running=self._episodes_run)
        restore_random_state(state["random"])  # last, because to build anything draws from them

    def _keep_best(self, folder: Path) -> None:
        """The best checkpoint may be of later than the one that the run goes on from, and stays the best."""
        if (folder / BEST).exists():
            infos = read_checkpoint(folder / BEST, "cpu")["infos"] or {}
            self.best_return = max(self.best_return, infos.get("quality", self.best_return))

    def _evaluate_again(self, folder: Path, unevaluated: dict[int, str]) -> None:
        """Submit the checkpoints whose evaluation had not come back when the run ended."""
        done = self.reporter.evaluated()
        for it, name in unevaluated.items():
            if self.evaluator is not None and it not in done and (folder / name).exists():
                self._unevaluated[it] = str(folder / name)
                self.evaluator.submit(str(folder / name), it)

    def _save_last(self) -> None:
        """Write the checkpoint that the run goes on from; other processes than the first write their own part of it."""
        if distributed.is_main():
            self.save(os.path.join(self.run_dir, LAST), resumable=True)
        else:
            own = {"actor_state_dict": {}, "iter": self.current_learning_iteration, "resume": self._resume_state()}
            write_checkpoint(_part(Path(self.run_dir)), own)

    def _remove_old(self) -> None:
        """Remove the oldest numbered checkpoints, but none that waits for its evaluation."""
        waiting = {os.path.basename(path) for path in self._unevaluated.values()}
        for path in numbered(Path(self.log_dir))[self.cfg.get("keep_checkpoints", self.KEPT) :]:
            if path.name not in waiting:
                path.unlink(missing_ok=True)


def _part(folder: Path) -> Path:
    """File of what this process needs to go on, of several."""
    return folder / f"rank_{distributed.rank()}.pt"


def _own_state(folder: Path, iteration: int) -> dict[str, Any] | None:
    """What this process needs to go on after an iteration; ``None`` if it was not saved then."""
    try:
        own = read_checkpoint(_part(folder), "cpu")
    except CheckpointError:
        return None
    return own["resume"] if own["iter"] == iteration else None


def _changes(before: Any, now: Any, path: str = "agent") -> Iterator[str]:
    """Where two nested configurations differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in sorted((before.keys() | now.keys()) - {"run_name"}):  # a resumed run keeps its folder
            yield from _changes(before.get(name), now.get(name), f"{path}.{name}")
    elif before != now:
        yield f"{path} was {before} and is {now}"
