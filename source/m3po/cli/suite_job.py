"""From a command line to the environments of one or several tasks of any suite."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from rsl_rl.env import VecEnv

from m3po import distributed
from m3po.algorithms.construction import check_cfg
from m3po.baselines.ppo import check_ppo_cfg
from m3po.cli.arguments import any_seed, at_least, check_device, drawn
from m3po.cli.overrides import assign, parse_value
from m3po.envs.absent import AbsentEnv
from m3po.envs.member_process import ProcessMember
from m3po.envs.multi_task import Member, MultiTaskVecEnv, task_discount
from m3po.envs.suite import TaskInfo, as_context, expand, find_task, is_known_without_isaac_lab, named_sets
from m3po.errors import UserError
from m3po.presets import PLAIN_GROUPS, suite_runner_cfg
from m3po.runners import run_folder
from m3po.runners.checkpoint import SELECTORS, check_compatible, read_checkpoint

AGENTS = {"m3po_cfg_entry_point": "default", "m3po_paper_cfg_entry_point": "paper"}
"""Agent, named as for a single Isaac Lab task -> mode of the preset."""

NUM_ENVS = {"cpu": 64, "cuda": 1024}
"""Environments of a task by type of device, unless the command line says otherwise."""


@dataclass
class SuiteJob:
    """A checked request: which tasks run, and how."""

    args: argparse.Namespace
    """Options."""

    overrides: list[str]
    """Overrides as typed; already applied to :attr:`train_cfg`."""

    infos: list[TaskInfo]
    """The tasks."""

    sizes: list[int]
    """Environments of each task in this process."""

    device: str
    """Torch device of agent and environments."""

    seed: int
    """Seed of everything random."""

    multi_task: bool
    """Whether agent and environments are those of several tasks, even where there is one."""

    train_cfg: dict[str, Any]
    """Runner configuration."""

    def arguments(self) -> list[str]:
        """Options that recreate this job in another process."""
        args = self.args
        num_envs = max(sum(self.sizes), len(self.sizes))  # that process has all tasks
        options = {"--task": args.task, "--algo": args.algo, "--agent": args.agent, "--num_envs": num_envs}
        options |= {"--seed": self.seed, "--device": self.device, "--assets": args.assets}
        options["--processes"] = args.processes
        flags = ["--multi_task"] if self.multi_task else []
        return [str(part) for option in options.items() for part in option] + flags + self.overrides

    @property
    def names(self) -> list[str]:
        """Names of the tasks."""
        return [info.name for info in self.infos]


def handles(argv: Sequence[str]) -> bool:
    """Whether a command line asks for anything but one Isaac Lab task alone, which Isaac Lab's own launcher starts.

    A name that no other suite knows may be that of a task which a user's package registers with Isaac Lab.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--task", default="")
    early.add_argument("--multi_task", "--multi-task", action="store_true")
    early.add_argument("--transfer", nargs="?")
    args = early.parse_known_args(list(argv))[0]
    if args.task == "":
        return False
    if "," in args.task or args.task in named_sets() or args.multi_task or args.transfer is not None:
        return True
    return is_known_without_isaac_lab(args.task)


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that training and playing share."""
    parser.add_argument("--task", required=True, help="Tasks and task sets, separated by commas.")
    parser.add_argument("--algo", choices=("m3po", "ppo"), default="m3po", help="m3po, or rsl_rl's own PPO.")
    parser.add_argument("--agent", choices=list(AGENTS), default=next(iter(AGENTS)), help="Default or paper mode.")
    count = parser.add_mutually_exclusive_group()
    count.add_argument("--num_envs", type=at_least(1), help="Environments in total, split evenly over the tasks.")
    count.add_argument("--num_envs_per_task", type=at_least(1), help="Environments of each task.")
    parser.add_argument("--seed", type=any_seed, default=0, help="Seed of everything random; -1 draws one.")
    parser.add_argument("--device", help="Torch device of agent and environments (default: CUDA where available).")
    parser.add_argument(
        "--assets",
        choices=("auto", "embedded", "remote"),
        default="auto",
        help="Where the robots of Isaac Lab's tasks come from.",
    )
    parser.add_argument("--log_root", default="logs", help="Folder that receives the run folders.")
    parser.add_argument("--experiment_name", help="Folder of related runs below <log_root>/<algo>.")
    parser.add_argument("--headless", action="store_true", help="Accepted and ignored: no window opens.")
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


def prepare(parser: argparse.ArgumentParser, argv: Sequence[str]) -> SuiteJob:
    """Check a command line; nothing is started.

    Args:
        parser: Parser with :func:`add_common_arguments` and the command's own options.
        argv: Arguments without the program's name.

    Raises:
        UserError: For everything that cannot run as asked.
    """
    args, rest = parser.parse_known_args(list(argv))
    for token in rest:
        if not token.startswith("agent.") or "=" not in token:
            raise UserError(
                f"'{token}' is neither an option (see --help) nor an override agent.FIELD=VALUE"
                + (", and env.* is for a single Isaac Lab task." if token.startswith("env.") else ".")
            )
    if args.algo == "ppo" and AGENTS[args.agent] != "default":
        raise UserError(f"agent '{args.agent}' is not one of algorithm 'ppo'; leave out --agent.")
    names = expand(args.task)
    found = [find_task(name) for name in names]
    infos = [suite.info(task) for suite, task in found]
    needy = [name for name, (suite, _) in zip(names, found, strict=True) if suite.own_process]
    if args.processes == "none" and needy:
        raise UserError(f"{', '.join(needy)} cannot share a process; --processes auto gives each its own.")
    device = check_device(args.device, present=not getattr(args, "print_config", False))
    if getattr(args, "in_group", False):
        device = distributed.local_device(device)
    sizes = _sizes(args, names, device)
    multi_task = args.multi_task or len(infos) > 1 or getattr(args, "transfer", None) is not None
    train_cfg = _train_cfg(args, infos, multi_task, device, args.seed)
    for token in rest:
        key, text = token.split("=", 1)
        assign(train_cfg, key.removeprefix("agent."), parse_value(text), "agent")
    train_cfg["seed"] = drawn(train_cfg["seed"])
    num_steps, share = train_cfg["num_steps_per_env"], train_cfg["quarantine_share"]
    if args.algo == "ppo":
        check_ppo_cfg(train_cfg["algorithm"], sum(sizes), num_steps, share)
        train_cfg["algorithm"]["class_name"] = "m3po.baselines.ppo:PPO" if multi_task else "PPO"
    else:
        check_cfg(train_cfg["algorithm"], sum(sizes), num_steps, device, share=share)
        train_cfg["algorithm"] = dataclasses.asdict(train_cfg["algorithm"]) | {"class_name": "m3po.algorithms:M3PO"}
    return SuiteJob(args, rest, infos, sizes, device, train_cfg["seed"], multi_task, train_cfg)


def _sizes(args: argparse.Namespace, names: list[str], device: str) -> list[int]:
    """Environments of each task in this process."""
    own = distributed.own_share(len(names)) if getattr(args, "split_tasks", False) else [True] * len(names)
    if not any(own):
        raise UserError(f"{len(names)} tasks cannot be split over {distributed.started_by_torchrun()} processes.")
    if args.num_envs is None:
        each = args.num_envs_per_task or NUM_ENVS[torch.device(device).type]
        return [each * mine for mine in own]
    if args.num_envs < sum(own):
        raise UserError(f"--num_envs {args.num_envs} leaves no environment for some of {sum(own)} tasks.")
    share, remainder = divmod(args.num_envs, sum(own))
    return [(share + (sum(own[:k]) < remainder)) * mine for k, mine in enumerate(own)]


def _train_cfg(
    args: argparse.Namespace, infos: list[TaskInfo], multi_task: bool, device: str, seed: int
) -> dict[str, Any]:
    """Runner configuration before overrides. They are checked by the fields of its algorithm, a dataclass for M3PO."""
    cfg = suite_runner_cfg(multi_task, device, AGENTS[args.agent], args.algo)
    discounts = [task_discount(info.episode_length) for info in infos]
    if args.algo == "ppo":
        cfg["algorithm"]["gamma"] = sum(discounts) / len(discounts)  # rsl_rl's PPO has one for all tasks
    elif len(infos) == 1:
        cfg["algorithm"].gamma = discounts[0]
    ours = args.algo == "m3po" and AGENTS[args.agent] == "default"
    stds = [info.init_std if ours else info.ppo_std for info in infos]
    cfg["actor"]["distribution_cfg"]["init_std"] = stds if len(set(stds)) > 1 else stds[0]
    names = [info.name for info in infos]
    cfg |= {"seed": seed, "experiment_name": args.experiment_name or _set_name(names), "task": ",".join(names)}
    cfg["algo"] = args.algo
    if getattr(args, "max_iterations", None):
        cfg["max_iterations"] = args.max_iterations
    return cfg


def _set_name(names: list[str]) -> str:
    """Name of a task set, the same however it was typed: its own if it has one, else the names of the tasks."""
    for name, tasks in named_sets().items():
        if list(tasks) == names:
            return name
    joined = "+".join(names)
    return joined if len(joined) <= 80 else f"{names[0]}+{len(names) - 1}-more"


@contextlib.contextmanager
def environments(
    job: SuiteJob, sizes: list[int], seed: int, log_dir: Path | None = None, restart: bool = False
) -> Iterator[VecEnv]:
    """Create the environments of a job; they end with the context.

    Where a task has none in this process, the others tell its sizes.

    Args:
        job: The checked request.
        sizes: Environments of each task.
        seed: Seed; each task gets one of its own.
        log_dir: Folder that receives what processes of their own print.
        restart: Whether a process that dies is started again.

    Yields:
        A ``MultiTaskVecEnv``, or the task's own environments where the job is not ``multi_task``.
    """
    torch.manual_seed(seed)
    with contextlib.ExitStack() as stack:
        members: list[Member] = []
        for k, (info, size) in enumerate(zip(job.infos, sizes, strict=True)):
            if size == 0:
                continue
            suite, task = find_task(info.name)
            if job.args.processes == "all" or (suite.own_process and job.args.processes == "auto"):
                options = {"suite": suite.name, "task": task, "num_envs": size, "device": job.device}
                if suite.name == "isaaclab":
                    options["assets"] = job.args.assets
                log = None if log_dir is None else log_dir / f"member_{info.name}.log"
                env: VecEnv = ProcessMember(task, "m3po.envs.suite:make_environments", options, seed + k, log)
                stack.callback(env.close)
            else:
                env = stack.enter_context(as_context(suite.make(task, size, seed=seed + k, device=job.device)))
                _check_environments(env, info.name)
            members.append(Member(info.name, env, info.score_range, info.reports_success))
        if not job.multi_task:
            yield members[0].env.connect() if isinstance(env, ProcessMember) else env
            return
        batch = MultiTaskVecEnv(with_absent(members, job.infos, job.device), job.device, restart)
        stack.callback(batch.close)  # first, because it tells all processes to stop at once
        yield batch


def _check_environments(env: Any, task: str) -> None:
    """Check that a suite made what training and evaluations ask for."""
    if not isinstance(env, VecEnv):
        raise UserError(f"the environments of task '{task}' are a {type(env).__name__}, not an rsl_rl VecEnv.")
    if not hasattr(env, "reset"):
        raise UserError(f"the environments of task '{task}' need reset() -> (observations, extras), for evaluations.")
    groups = list(env.get_observations().keys())
    if "policy" not in groups:
        raise UserError(f"the environments of task '{task}' have no observation group 'policy', only: {groups}.")


def with_groups(train_cfg: dict[str, Any], env: VecEnv) -> dict[str, Any]:
    """A runner configuration whose critic reads the group ``critic`` where the environments of a task offer it.

    Several tasks share one critic, which reads the group ``policy``; that is said where a task offers another.
    """
    members = getattr(env, "members", ())
    offering = [member.name for member in members if "critic" in member.env.get_observations().keys()]  # noqa: SIM118
    if offering:
        print(
            f"[m3po] the critic of several tasks does not read the group 'critic' of: {', '.join(offering)}", flush=True
        )
    if train_cfg["obs_groups"] != PLAIN_GROUPS or "critic" not in env.get_observations().keys():  # noqa: SIM118
        return train_cfg
    return train_cfg | {"obs_groups": {"actor": ["policy"], "critic": ["critic"]}}


def with_absent(members: list[Member], infos: list[TaskInfo], device: str) -> list[Member]:
    """Members of all tasks in order, those of other processes with no environments."""
    if min(distributed.collected(len(members))) == len(infos):
        return members
    sizes = {}
    for member in members:
        if isinstance(member.env, ProcessMember):
            member.env.connect()
        obs_dim = member.env.get_observations()["policy"].shape[1]
        sizes[member.name] = (obs_dim, member.env.num_actions, int(member.env.max_episode_length))
    for theirs in distributed.collected(sizes):
        sizes |= theirs
    own = {member.name: member for member in members}
    return [
        own.get(info.name)
        or Member(info.name, AbsentEnv(*sizes[info.name], device), info.score_range, info.reports_success)
        for info in infos
    ]


def experiment_dir(job: SuiteJob) -> Path:
    """Folder of all runs of the job's algorithm and experiment."""
    return Path(job.args.log_root).resolve() / job.args.algo / job.train_cfg["experiment_name"]


def create_run_dir(job: SuiteJob, run_name: str | None) -> Path:
    """Create ``<log_root>/<algo>/<experiment>/<timestamp>[_run_name]``, never one that exists already."""
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    name = f"{stamp}_{run_name}" if run_name else stamp
    try:
        experiment_dir(job).mkdir(parents=True, exist_ok=True)
        for suffix in ("", *(f"_{i}" for i in range(2, 100))):
            with contextlib.suppress(FileExistsError):
                run_dir = experiment_dir(job) / (name + suffix)
                run_dir.mkdir()
                return run_dir
    except OSError as error:
        raise UserError(f"cannot write the log folder '{experiment_dir(job)}': {error.strerror}.") from error
    raise UserError(f"too many runs named '{name}' in '{experiment_dir(job)}'.")


def resolve_checkpoint(job: SuiteJob, wanted: str) -> Path:
    """Find a checkpoint and check that it is readable and of the job's tasks.

    Args:
        job: The checked request.
        wanted: Path of a file, or ``latest`` or ``best``: of the newest run of the job's tasks that has one.
    """
    path = _select_checkpoint(job, wanted) if wanted in SELECTORS else Path(wanted)
    tasks = job.names if job.multi_task else None
    check_compatible(path, read_checkpoint(path, "cpu"), task=job.train_cfg["task"], tasks=tasks)
    return path


def find_run(job: SuiteJob, wanted: str) -> tuple[Path, Path]:
    """Find the run of the job's tasks that ``--resume`` means, and its checkpoint, and check that this fits.

    Args:
        job: The checked request.
        wanted: As in :func:`m3po.runners.run_folder.find_run`.
    """
    here = {"tasks": job.names, "algorithm": job.args.algo, "agent": job.args.agent}
    run, path = run_folder.find_run(
        experiment_dir(job), wanted, lambda manifest: all(manifest.get(key) == value for key, value in here.items())
    )
    tasks = job.names if job.multi_task else None
    check_compatible(path, read_checkpoint(path, "cpu"), task=job.train_cfg["task"], tasks=tasks)
    return run, path


def _select_checkpoint(job: SuiteJob, wanted: str) -> Path:
    runs = sorted(experiment_dir(job).glob(f"*/{SELECTORS[wanted]}"), key=lambda path: path.stat().st_mtime)
    for path in reversed(runs):
        manifest = json.loads((path.parent / "run.json").read_text(encoding="utf-8"))
        if manifest["tasks"] == job.names:
            return path
    raise UserError(f"no run of these tasks in '{experiment_dir(job)}' has a {SELECTORS[wanted]}; train first.")
