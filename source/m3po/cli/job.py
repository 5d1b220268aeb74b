"""A checked request: which tasks run, and how. One Isaac Lab task and tasks of any suite differ in a few methods."""

from __future__ import annotations

import abc
import argparse
import contextlib
import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar, Self

from rsl_rl.env import VecEnv

from m3po.cli.arguments import any_seed, at_least
from m3po.envs.interface import M3POEnv
from m3po.envs.suite import TaskInfo
from m3po.errors import UserError
from m3po.runners import run_folder
from m3po.runners.checkpoint import SELECTORS, check_compatible, read_checkpoint

ALGORITHMS = {"m3po": "m3po_cfg_entry_point", "ppo": "rsl_rl_cfg_entry_point"}
"""Algorithm -> its default agent."""

Hook = Callable[[], None]
"""Called after each step."""


@dataclass
class Job(abc.ABC):
    """A checked request. Nothing is started yet."""

    args: argparse.Namespace
    """Options."""

    overrides: list[str]
    """Overrides as typed; already applied to the configurations."""

    infos: list[TaskInfo]
    """The tasks, in order."""

    sizes: list[int]
    """Environments of each task in this process."""

    device: str
    """Torch device of agent and environments."""

    agent: str
    """Name of the agent's configuration, as ``--agent``."""

    mode: str
    """Mode of M3PO's preset behind it, for messages."""

    multi_task: bool
    """Whether policy and critic are conditioned on the task, even where there is one."""

    train_cfg: dict[str, Any]
    """Runner configuration."""

    suite: ClassVar[str | None] = None
    """Suite that brings this kind of job; ``None``: tasks of any suites."""

    play_envs: ClassVar[int]
    """Environments of each task that play, unless the command line says otherwise."""

    versions: ClassVar[tuple[str, ...]] = ()
    """Distributions whose versions are recorded besides the usual ones."""

    @classmethod
    @abc.abstractmethod
    def read(cls, parser: argparse.ArgumentParser, argv: Sequence[str], play: bool = False) -> Self:
        """Check a command line.

        Args:
            parser: Parser with :func:`add_task_arguments` and the command's own options.
            argv: Arguments without the program's name.
            play: Whether a trained policy is to act.

        Raises:
            UserError: For everything that cannot run as asked.
        """

    @classmethod
    @abc.abstractmethod
    def recreate(cls, options: dict[str, Any], overrides: list[str]) -> Self:
        """A job in another process, from :meth:`order`."""

    @abc.abstractmethod
    def environments(
        self, sizes: list[int], seed: int, log_dir: Path | None = None, restart: bool = False
    ) -> contextlib.AbstractContextManager[M3POEnv]:
        """Create environments of the tasks; they end with the context.

        Args:
            sizes: Environments of each task.
            seed: Seed of what they draw.
            log_dir: Folder that receives what they log.
            restart: Whether a task's process that dies is started again.
        """

    @abc.abstractmethod
    def require_video(self) -> None:
        """Check that the tasks can be filmed, and prepare it. To be called before :meth:`environments`.

        Raises:
            UserError: If they cannot.
        """

    @abc.abstractmethod
    def films(self, env: VecEnv, path: Path) -> Iterable[contextlib.AbstractContextManager[Hook]]:
        """Films of the first environment of each task, as mp4 files; of several tasks, their names end the files'."""

    def about(self) -> dict[str, Any]:
        """What ``run.json`` and results say of this kind of job besides the usual."""
        return {}

    def chosen(self) -> list[str]:
        """Lines that say what was chosen for this kind of job."""
        return []

    def record(self, run_dir: Path) -> None:  # noqa: B027 - most kinds have nothing to add
        """Write what else belongs into a new run's folder."""

    def conditioned_on(self) -> list[str] | None:
        """Tasks that policy and critic are conditioned on; ``None`` if they are not."""
        return self.names if self.multi_task else None

    def runner_cfg(self, env: VecEnv) -> dict[str, Any]:
        """The runner's configuration for the environments, a copy, because the runner changes it."""
        return copy.deepcopy(self.train_cfg)

    @property
    def names(self) -> list[str]:
        """Names of the tasks."""
        return [info.name for info in self.infos]

    @property
    def algo(self) -> str:
        """Key of :data:`ALGORITHMS`."""
        return self.args.algo

    @property
    def seed(self) -> int:
        """Seed of everything random."""
        return self.train_cfg["seed"]

    @seed.setter
    def seed(self, seed: int) -> None:
        self.train_cfg["seed"] = seed

    @property
    def experiment_dir(self) -> Path:
        """Folder of all runs of the algorithm and the experiment."""
        return Path(self.args.log_root).resolve() / self.algo / self.train_cfg["experiment_name"]

    def order(self) -> dict[str, Any]:
        """What recreates this job in another process, as JSON; that process has all tasks to itself."""
        same = ("task", "algo", "agent", "assets", "processes", "experiment_name", "log_root")
        options = {name: getattr(self.args, name) for name in same}
        options |= {"num_envs": max(sum(self.sizes), len(self.sizes)), "seed": self.seed, "device": self.device}
        options |= {"multi_task": self.multi_task}
        return {"suite": self.suite, "options": options, "overrides": self.overrides}


def add_task_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what runs; all commands have them."""
    parser.add_argument("--task", required=True, help="Tasks and task sets, separated by commas.")
    parser.add_argument("--algo", choices=list(ALGORITHMS), default="m3po", help="m3po, or rsl_rl's own PPO.")
    parser.add_argument("--agent", help="Configuration, as m3po_paper_cfg_entry_point (default: the algorithm's).")
    count = parser.add_mutually_exclusive_group()
    count.add_argument("--num_envs", type=at_least(1), help="Environments in total, split evenly over the tasks.")
    count.add_argument("--num_envs_per_task", type=at_least(1), help="Environments of each task.")
    parser.add_argument("--seed", type=any_seed, help="Seed of everything random; -1 draws one.")
    parser.add_argument(
        "--assets",
        choices=("auto", "embedded", "remote"),
        default="auto",
        help="Robots of Isaac Lab: built from installed packages, from its server, or embedded where possible.",
    )
    parser.add_argument("--log_root", default="logs", help="Folder that receives the run folders.")
    parser.add_argument("--experiment_name", help="Folder of related runs below <log_root>/<algo>.")
    parser.add_argument("--headless", action="store_true", help="Accepted and ignored: no window opens without --viz.")
    parser.add_argument(
        "--multi_task",
        "--multi-task",
        action="store_true",
        help="Give a single task the networks of several, from which others can start (--transfer implies it).",
    )
    parser.add_argument(
        "--processes",
        choices=("auto", "all", "none"),
        default="auto",
        help="Tasks with a process of their own: those that need one, all, or none.",
    )


def create_run_dir(job: Job) -> Path:
    """Create ``<log_root>/<algo>/<experiment>/<timestamp>[_run_name]``, never one that exists already."""
    stamp = job.args.run_timestamp or datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    run_name = job.args.run_name or job.train_cfg.get("run_name")
    name, parent = f"{stamp}_{run_name}" if run_name else stamp, job.experiment_dir
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for suffix in ("", *(f"_{i}" for i in range(2, 100))):
            with contextlib.suppress(FileExistsError):
                run_dir = parent / (name + suffix)
                run_dir.mkdir()
                return run_dir
    except OSError as error:
        raise UserError(f"cannot write the log folder '{parent}': {error.strerror}.") from error
    raise UserError(f"too many runs named '{name}' in '{parent}'.")


def find_run(job: Job, wanted: str) -> tuple[Path, Path]:
    """Find the run of the job that ``--resume`` means, and its checkpoint, and check that this fits.

    Args:
        job: The checked request.
        wanted: As in :func:`m3po.runners.run_folder.find_run`.
    """
    run, path = run_folder.find_run(job.experiment_dir, wanted, lambda manifest: _is_of(job, manifest, job.agent))
    _check(job, path)
    return run, path


def resolve_checkpoint(job: Job, wanted: str) -> Path:
    """Find a checkpoint and check that it is readable and belongs to the job's tasks and algorithm.

    Args:
        job: The checked request.
        wanted: Path of a file, or ``latest`` or ``best``: of the newest run of the job's tasks and agent that has one.
    """
    path = _select(job, SELECTORS[wanted]) if wanted in SELECTORS else Path(wanted)
    _check(job, path)
    return path


def _select(job: Job, filename: str) -> Path:
    found = sorted(job.experiment_dir.glob(f"*/{filename}"), key=lambda path: path.stat().st_mtime)
    for path in reversed(found):
        if _is_of(job, run_folder.read_manifest(path.parent), job.agent):
            return path
    raise UserError(
        f"no run of task '{', '.join(job.names)}' with agent '{job.agent}' in '{job.experiment_dir}' has a {filename}; "
        "train first, or give the path of a checkpoint."
    )


def _is_of(job: Job, manifest: dict[str, Any], agent: str) -> bool:
    """Whether a run with a manifest is of the job's tasks, algorithm and agent."""
    tasks = manifest.get("tasks") or [manifest.get("task")]
    return (tasks, manifest.get("algorithm"), manifest.get("agent")) == (job.names, job.algo, agent)


def _check(job: Job, path: Path) -> None:
    content = read_checkpoint(path, "cpu")
    check_compatible(path, content, task=job.train_cfg["task"], tasks=job.conditioned_on(), algorithm=job.algo)
