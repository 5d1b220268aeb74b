"""``scripts/train.py`` for task suites and several tasks."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import m3po
from m3po import distributed
from m3po.algorithms.construction import parse_algorithm_cfg
from m3po.cli import print_config, suite_job
from m3po.cli.arguments import Parser, add_distributed, at_least, folder_name, guarded
from m3po.cli.training import add_report_arguments, add_start_arguments, report_settings, train
from m3po.elastic import Launch
from m3po.envs.suite import suites
from m3po.errors import UserError
from m3po.evaluation_process import EvaluationProcess
from m3po.manifest import environment_variables, git_revision, package_versions, write_json
from m3po.presets import describe
from m3po.runners import M3PORunner
from m3po.runners.checkpoint import check_compatible, read_checkpoint
from m3po.runners.run_folder import record_resumption
from m3po.runners.task_transfer import TaskSizes, checkpoint_tasks, match_tasks, train_embedding_only
from m3po.stopping import StopSignals

SUITE_PACKAGES = ("dm-control", "metaworld", "mujoco-warp")
"""Distributions whose versions are recorded besides the usual ones."""


def run(argv: Sequence[str]) -> int:
    """Train as the command line says.

    Args:
        argv: Arguments without the program's name.

    Returns:
        Exit code: 0, 2 for a user's mistake, 130 after Ctrl-C and 75 after a cluster's signal, when all is saved.
    """
    return guarded(_main, argv)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(description="Train one agent on one or several tasks of any suite.")
    suite_job.add_common_arguments(parser)
    purpose = parser.add_mutually_exclusive_group()
    add_distributed(purpose)
    print_config.add_argument(purpose)
    parser.add_argument(
        "--split_tasks",
        "--split-tasks",
        action="store_true",
        help="With --distributed: deal the tasks out to the processes, instead of giving each some of every task.",
    )
    parser.add_argument("--max_iterations", type=at_least(1), help="Training iterations.")
    parser.add_argument("--run_name", type=folder_name, help="Appended to the name of the run folder.")
    start = parser.add_mutually_exclusive_group()
    add_start_arguments(start)
    start.add_argument("--transfer", metavar="PATH", help="Start with what a checkpoint of other tasks has learnt.")
    parser.add_argument(
        "--init_task_from",
        "--init-task-from",
        type=_pairs,
        default={},
        metavar="NEW=OLD[,NEW=OLD]",
        help="With --transfer: new tasks that start with the embeddings of tasks of the checkpoint.",
    )
    parser.add_argument(
        "--train_only",
        "--train-only",
        choices=("all", "embedding"),
        default="all",
        help="Of a checkpoint, train all, or the embeddings and action noise of the tasks alone.",
    )
    add_report_arguments(parser)
    parser.add_argument("--eval_envs", type=at_least(2), default=10, help="Environments of an evaluation, per task.")
    parser.add_argument(
        "--restart_members", "--restart-members", action="store_true", help="Restart a task's process that dies."
    )
    return parser


def _pairs(text: str) -> dict[str, str]:
    """Argument type: ``NEW=OLD,NEW=OLD``, task names by whatever names their suites know them."""
    pairs = [part.split("=") for part in text.split(",")]
    if not all(len(pair) == 2 and all(pair) for pair in pairs):
        raise argparse.ArgumentTypeError(f"expected NEW=OLD, got '{text}'")
    result = {_canonical(new): _canonical(old) for new, old in pairs}
    if len(result) < len(pairs):
        raise argparse.ArgumentTypeError(f"a new task is named twice in '{text}'")
    return result


def _canonical(name: str) -> str:
    return next((task for suite in suites().values() if (task := suite.resolve(name)) is not None), name)


def _main(argv: list[str]) -> int:
    """Check everything, then create the environments and train."""
    with print_config.kept_apart(argv):
        job = suite_job.prepare(_parser(), argv)
        args = job.args
        distributed.check_start(args.in_group)
        checkpoint = suite_job.resolve_checkpoint(job, args.checkpoint) if args.checkpoint else None
        if args.print_config:
            _find_start(job)
    if args.print_config:
        num_envs = dict(zip(job.names, job.sizes, strict=True))
        return print_config.show(args, args.agent, job.device, num_envs, _runner_cfg(job))
    stop = StopSignals()
    with contextlib.ExitStack() as stack:
        stack.enter_context(stop.caught())
        stack.enter_context(distributed.group(args.in_group, job.device))
        job.seed = job.train_cfg["seed"] = distributed.shared(job.seed)
        found = _find_start(job)
        sizes = [sum(of_task) for of_task in zip(*distributed.collected(job.sizes), strict=True)]
        launch = Launch(suite_job.experiment_dir(job), lambda: found[0] if found else _create_run(job, sizes))
        run_dir, resumed = launch.run_dir, launch.checkpoint or (found and found[1])
        if resumed is not None and distributed.is_main():
            record_resumption(run_dir, resumed, sys.orig_argv[1:])
        _report(job, sizes, run_dir)
        evaluator = None
        if args.eval_interval > 0 and distributed.is_main():
            order = {"arguments": job.arguments(), "num_envs": args.eval_envs}
            evaluator = EvaluationProcess("m3po.cli.evaluate", order, run_dir / "evaluation.log")
            stack.callback(evaluator.close)
        own_dir = run_dir if distributed.is_main() else run_dir / f"rank_{distributed.rank()}"
        own_dir.mkdir(exist_ok=True)
        seed = job.seed + distributed.rank()
        env = stack.enter_context(suite_job.environments(job, job.sizes, seed, own_dir, restart=args.restart_members))
        cfg = suite_job.with_groups(_runner_cfg(job), env)
        try:
            runner = M3PORunner(env, cfg, str(run_dir), job.device, evaluator, stop)
        except ValueError as error:  # rsl_rl's and our own complaints about classes and observation groups
            raise UserError(str(error)) from error
        if checkpoint is not None:
            print(f"[m3po] continuing from {checkpoint}")
            runner.load(str(checkpoint), map_location=job.device)
        if args.transfer is not None and launch.checkpoint is None:
            runner.transfer(args.transfer, args.init_task_from)
        if args.train_only == "embedding":
            print("[m3po] training nothing but task embeddings and action noise")
            train_embedding_only(runner.alg)
        code = train(runner, run_dir, job.train_cfg["max_iterations"], resumed, init_at_random_ep_len=True)
        if code == 0:
            launch.finish()
    return code


def _runner_cfg(job: suite_job.SuiteJob) -> dict[str, Any]:
    return job.train_cfg | report_settings(job.args)


def _find_start(job: suite_job.SuiteJob) -> tuple[Path, Path] | None:
    """The run to resume and its checkpoint; without ``--resume``, what else training starts from is checked."""
    if job.args.resume:
        return suite_job.find_run(job, job.args.resume)
    _check_start(job)
    return None


def _check_start(job: suite_job.SuiteJob) -> None:
    """Check what training is to start from, and print where each task comes from.

    Raises:
        UserError: If the options or the tasks do not fit.
    """
    args = job.args
    if args.split_tasks and not args.in_group:
        raise UserError("--split_tasks deals tasks out to several processes, which --distributed connects.")
    if args.train_only == "embedding" and not (job.multi_task and (args.checkpoint or args.transfer)):
        raise UserError("--train_only embedding needs trained networks: --transfer, or --checkpoint of several tasks.")
    if args.transfer is None:
        if args.init_task_from:
            raise UserError("--init_task_from needs a checkpoint to take the embeddings from: --transfer PATH.")
        return
    content = read_checkpoint(args.transfer, "cpu")
    check_compatible(args.transfer, content, algorithm=args.algo)
    there = checkpoint_tasks(args.transfer, content)
    here = [TaskSizes(info.name, info.obs_dim, info.action_dim) for info in job.infos]
    source = match_tasks(there, here, args.init_task_from)
    kept = [name for name in job.names if source.get(name) == name]
    print(f"[m3po] transferring {len(kept)} of {len(there)} tasks from {args.transfer}")
    new = [f"{name} ({'as ' + source[name] if name in source else 'afresh'})" for name in job.names if name not in kept]
    if new:
        print(f"[m3po] new tasks: {', '.join(new)}")


def _report(job: suite_job.SuiteJob, sizes: list[int], run_dir: Path) -> None:
    """Print what was chosen; ``sizes`` are the environments of each task in all processes."""
    tasks = ", ".join(f"{name} x {size}" for name, size in zip(job.names, sizes, strict=True))
    print(f"[m3po] tasks ({len(job.names)}): {tasks}")
    print(f"[m3po] algorithm: {job.args.algo}, seed: {job.seed}, device: {job.device}")
    together = f" in {distributed.world_size()} processes" if distributed.world_size() > 1 else ""
    print(f"[m3po] environments: {sum(sizes)}{together}, steps per rollout: {job.train_cfg['num_steps_per_env']}")
    if job.args.algo == "m3po":
        print(describe(parse_algorithm_cfg(job.train_cfg["algorithm"]), suite_job.AGENTS[job.args.agent], job.device))
    print(f"[m3po] run folder: {run_dir}")


def _create_run(job: suite_job.SuiteJob, sizes: list[int]) -> Path:
    """Create the run's folder, with ``run.json``: what the run was."""
    run_dir = suite_job.create_run_dir(job, job.args.run_name)
    manifest = {
        "tasks": job.names,
        "num_envs": sizes,
        "processes": distributed.world_size(),
        "created_at": datetime.now(UTC).isoformat(),
        "command": sys.orig_argv[1:],
        "algorithm": job.args.algo,
        "agent": job.args.agent,
        "seed": job.seed,
        "device": job.device,
        "torch_threads": torch.get_num_threads(),
        "environment": environment_variables(),
        "overrides": job.overrides,
        "versions": package_versions(SUITE_PACKAGES),
        "git": git_revision(Path(m3po.__file__)),
        "configuration": {"agent": job.train_cfg},
    }
    write_json(run_dir / "run.json", manifest)
    return run_dir
