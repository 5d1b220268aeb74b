"""Jobs of one or several tasks of any suite."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import random
from collections.abc import Generator, Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from rsl_rl.env import VecEnv

from m3po import distributed
from m3po.algorithms.construction import check_cfg
from m3po.baselines.ppo import check_ppo_cfg
from m3po.cli import film
from m3po.cli.arguments import Parser, check_device, drawn
from m3po.cli.job import ALGORITHMS, Hook, Job, add_task_arguments
from m3po.cli.overrides import assign, parse_value
from m3po.envs.empty import EmptyVecEnv
from m3po.envs.interface import M3POEnv, as_m3po_env
from m3po.envs.multi_task import MultiTaskVecEnv, TaskEnv, task_discount
from m3po.envs.subproc_env import SubprocVecEnv
from m3po.envs.suite import (
    TaskInfo,
    as_context,
    expand,
    find_task,
    is_known_without_isaac_lab,
    named_sets,
    suites,
)
from m3po.errors import UserError
from m3po.presets import PLAIN_GROUPS, suite_runner_cfg

AGENTS = {"m3po_cfg_entry_point": "default", "m3po_paper_cfg_entry_point": "paper", ALGORITHMS["ppo"]: "default"}
"""Agent, named as for a single Isaac Lab task -> mode of the preset."""

NUM_ENVS = {"cpu": 64, "cuda": 1024}
"""Environments of a task by type of device, unless the command line says otherwise."""


def is_suite_command(argv: Sequence[str]) -> bool:
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


def kind_of_job(argv: Sequence[str]) -> type[Job]:
    """The kind of job that a command line asks for."""
    isaaclab: Any = suites()["isaaclab"]  # has job() besides
    return SuiteJob if is_suite_command(argv) or isaaclab.missing() else isaaclab.job()


def from_order(order: dict[str, Any]) -> Job:
    """The job that :meth:`Job.order` has described."""
    known: dict[str, Any] = suites()  # those that orders name have job() besides
    kind = SuiteJob if order["suite"] is None else known[order["suite"]].job()
    return kind.recreate(order["options"], order["overrides"])


class SuiteJob(Job):
    """A request for anything but one Isaac Lab task alone."""

    play_envs = 10
    versions = ("dm-control", "metaworld", "mujoco-warp")

    @classmethod
    def read(cls, parser: argparse.ArgumentParser, argv: Sequence[str], play: bool = False) -> Self:
        """See :meth:`Job.read`."""
        parser.add_argument("--device", help="Torch device of agent and environments (default: CUDA where available).")
        if play:
            parser.set_defaults(num_envs_per_task=cls.play_envs)
        return cls._checked(*parser.parse_known_args(list(argv)))

    @classmethod
    def recreate(cls, options: dict[str, Any], overrides: list[str]) -> Self:
        """See :meth:`Job.recreate`."""
        return cls._checked(argparse.Namespace(num_envs_per_task=None, **options), overrides)

    @classmethod
    def _checked(cls, args: argparse.Namespace, overrides: list[str]) -> Self:
        """Check what was asked for."""
        for token in overrides:
            if not token.startswith("agent.") or "=" not in token:
                raise UserError(
                    f"'{token}' is neither an option (see --help) nor an override agent.FIELD=VALUE"
                    + (", and env.* is for a single Isaac Lab task." if token.startswith("env.") else ".")
                )
        agent = _agent(args)
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
        train_cfg = _train_cfg(args, infos, multi_task, device, AGENTS[agent])
        for token in overrides:
            key, text = token.split("=", 1)
            assign(train_cfg, key.removeprefix("agent."), parse_value(text), "agent")
        train_cfg["seed"] = drawn(train_cfg["seed"])
        num_steps, max_nan = train_cfg["num_steps_per_env"], train_cfg["max_nan_fraction"]
        if args.algo == "ppo":
            check_ppo_cfg(train_cfg["algorithm"], sum(sizes), num_steps, max_nan)
            train_cfg["algorithm"]["class_name"] = "m3po.baselines.ppo:PPO" if multi_task else "PPO"
        else:
            check_cfg(train_cfg["algorithm"], sum(sizes), num_steps, device, max_nan=max_nan)
            train_cfg["algorithm"] = dataclasses.asdict(train_cfg["algorithm"]) | {"class_name": "m3po.algorithms:M3PO"}
        return cls(args, overrides, infos, sizes, device, agent, AGENTS[agent], multi_task, train_cfg)

    @contextlib.contextmanager
    def environments(
        self, sizes: list[int], seed: int, log_dir: Path | None = None, restart: bool = False
    ) -> Generator[M3POEnv]:
        """Create the environments, those of a task in a process of its own where that is needed or asked for.

        Where a task has none in this process, the others tell its sizes. See :meth:`Job.environments`.

        Yields:
            A ``MultiTaskVecEnv``, or the task's own environments where the job is not ``multi_task``.
        """
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        with contextlib.ExitStack() as stack:
            task_envs: list[TaskEnv] = []
            for k, (info, size) in enumerate(zip(self.infos, sizes, strict=True)):
                if size == 0:
                    continue
                suite, task = find_task(info.name)
                if self.args.processes == "all" or (suite.own_process and self.args.processes == "auto"):
                    options = {"suite": suite.name, "task": task, "num_envs": size, "device": self.device}
                    if suite.name == "isaaclab":
                        options["assets"] = self.args.assets
                    log = None if log_dir is None else log_dir / f"member_{info.name}.log"
                    env: VecEnv = SubprocVecEnv(task, "m3po.envs.suite:make_environments", options, seed + k, log)
                    stack.callback(env.close)
                else:
                    env = stack.enter_context(as_context(suite.make(task, size, seed=seed + k, device=self.device)))
                    _check_environments(env, info.name)
                task_envs.append(TaskEnv(info.name, env, info.score_range, info.reports_success))
            if not self.multi_task:
                yield env.connect() if isinstance(env, SubprocVecEnv) else as_m3po_env(env)
                return
            batch = MultiTaskVecEnv(with_empty(task_envs, self.infos, self.device), self.device, restart)
            stack.callback(batch.close)  # first, because it tells all processes to stop at once
            yield batch

    def runner_cfg(self, env: VecEnv) -> dict[str, Any]:
        """The configuration, whose critic reads what the environments offer it."""
        return with_groups(super().runner_cfg(env), env)

    def require_video(self) -> None:
        """See :meth:`Job.require_video`."""
        for name in self.names:
            suite, _ = find_task(name)
            if not hasattr(suite, "camera"):
                able = ", ".join(suite.name for suite in suites().values() if hasattr(suite, "camera"))
                raise UserError(f"--video cannot film task '{name}': of the suites, only these have a camera: {able}.")
        if self.args.processes == "all":
            raise UserError("--video films tasks in this process; leave out --processes all.")

    def films(self, env: VecEnv, path: Path) -> Iterable[contextlib.AbstractContextManager[Hook]]:
        """See :meth:`Job.films`."""
        batches = [task_env.env for task_env in env.task_envs] if isinstance(env, MultiTaskVecEnv) else [env]
        for info, batch in zip(self.infos, batches, strict=True):
            suite: Any = find_task(info.name)[0]  # has camera() besides
            file = path.with_stem(f"{path.stem}_{info.name}") if len(batches) > 1 else path
            # The state after the last step of an episode is the first of the next one.
            yield film.recorded(suite.camera(batch), file, self.args.video_length or info.episode_length - 1)


def make_job(*argv: str) -> SuiteJob:
    """The job of a command line that has no other options than those of all commands."""
    parser = Parser()
    add_task_arguments(parser)
    return SuiteJob.read(parser, argv)


def _agent(args: argparse.Namespace) -> str:
    """Name of the agent, one of the algorithm."""
    agent = args.agent or ALGORITHMS[args.algo]
    own = [name for name in AGENTS if (name == ALGORITHMS["ppo"]) == (args.algo == "ppo")]
    if agent not in own:
        listed = ", ".join(f"'{name}'" for name in own)
        raise UserError(f"agent '{agent}' is not one of algorithm '{args.algo}': choose from {listed}.")
    return agent


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
    args: argparse.Namespace, infos: list[TaskInfo], multi_task: bool, device: str, mode: str
) -> dict[str, Any]:
    """Runner configuration before overrides. They are checked by the fields of its algorithm, a dataclass for M3PO."""
    cfg = suite_runner_cfg(multi_task, device, mode, args.algo)
    discounts = [task_discount(info.episode_length) for info in infos]
    if args.algo == "ppo":
        cfg["algorithm"]["gamma"] = sum(discounts) / len(discounts)  # rsl_rl's PPO has one for all tasks
    elif len(infos) == 1:
        cfg["algorithm"].gamma = discounts[0]
    ours = args.algo == "m3po" and mode == "default"
    stds = [info.init_std if ours else info.ppo_std for info in infos]
    cfg["actor"]["distribution_cfg"]["init_std"] = stds if len(set(stds)) > 1 else stds[0]
    names = [info.name for info in infos]
    cfg |= {"seed": args.seed or 0, "task": ",".join(names), "algo": args.algo}
    cfg["experiment_name"] = args.experiment_name or _set_name(names)
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


def _check_environments(env: Any, task: str) -> None:
    """Check that a suite made what training and evaluations ask for."""
    if not isinstance(env, VecEnv):
        raise UserError(f"the environments of task '{task}' are a {type(env).__name__}, not an rsl_rl VecEnv.")
    if getattr(type(env), "reset", M3POEnv.reset) is M3POEnv.reset:
        raise UserError(f"the environments of task '{task}' need reset() -> (observations, extras), for evaluations.")
    groups = list(env.get_observations().keys())
    if "policy" not in groups:
        raise UserError(f"the environments of task '{task}' have no observation group 'policy', only: {groups}.")


def with_groups(train_cfg: dict[str, Any], env: VecEnv) -> dict[str, Any]:
    """A runner configuration whose critic reads the group ``critic`` where the environments of a task offer it.

    Several tasks share one critic, which reads the group ``policy``; that is said where a task offers another.
    """
    task_envs = env.task_envs if isinstance(env, MultiTaskVecEnv) else ()
    offering = [each.name for each in task_envs if "critic" in each.env.get_observations().keys()]  # noqa: SIM118
    if offering:
        print(
            f"[m3po] the critic of several tasks does not read the group 'critic' of: {', '.join(offering)}", flush=True
        )
    if train_cfg["obs_groups"] != PLAIN_GROUPS or "critic" not in env.get_observations().keys():  # noqa: SIM118
        return train_cfg
    return train_cfg | {"obs_groups": {"actor": ["policy"], "critic": ["critic"]}}


def with_empty(task_envs: list[TaskEnv], infos: list[TaskInfo], device: str) -> list[TaskEnv]:
    """The environments of all tasks in order, those of other processes with no environments."""
    if min(distributed.collected(len(task_envs))) == len(infos):
        return task_envs
    sizes = {}
    for task_env in task_envs:
        if isinstance(task_env.env, SubprocVecEnv):
            task_env.env.connect()
        obs_dim = task_env.env.get_observations()["policy"].shape[1]
        sizes[task_env.name] = (obs_dim, task_env.env.num_actions, int(task_env.env.max_episode_length))
    for theirs in distributed.collected(sizes):
        sizes |= theirs
    own = {task_env.name: task_env for task_env in task_envs}
    return [
        own.get(info.name)
        or TaskEnv(info.name, EmptyVecEnv(*sizes[info.name], device), info.score_range, info.reports_success)
        for info in infos
    ]
