"""Training: ``scripts/train.py`` and ``isaaclab train --rl_library m3po``."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Generator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import m3po
from m3po import distributed
from m3po.algorithms.construction import parse_algorithm_cfg
from m3po.cli import print_config
from m3po.cli.arguments import Parser, add_distributed, at_least, folder_name, guarded
from m3po.cli.evaluate import evaluator
from m3po.cli.film import TrainingFilms, require_packages
from m3po.cli.job import Job, add_task_arguments, create_run_dir, find_run, resolve_checkpoint
from m3po.cli.suite_job import kind_of_job
from m3po.cli.transfer import add_transfer_arguments, check_start
from m3po.elastic import ElasticRun
from m3po.errors import UserError
from m3po.manifest import environment_variables, git_revision, package_versions, write_json
from m3po.presets import describe
from m3po.runners import M3PORunner
from m3po.runners.checkpoint import LAST
from m3po.runners.log_services import LOGGERS, check_logger
from m3po.runners.run_folder import MANIFEST, record_resumption
from m3po.runners.task_transfer import train_embedding_only
from m3po.stopping import INTERRUPTED, Stop, StopSignals

OWNER = {"version": 1, "library": "m3po"}
"""What Isaac Lab's own commands look for in a ``run.json``: its version, and the library of ``--rl_library``."""


def run(argv: Sequence[str], kind: type[Job] | None = None) -> int:
    """Train as the command line says.

    Args:
        argv: Arguments without the program's name.
        kind: Kind of the job; ``None``: what the tasks need.

    Returns:
        Exit code: 0, 2 for a user's mistake, 130 after Ctrl-C and 75 after a cluster's signal, when all is saved.
    """
    return guarded(lambda arguments: _main(arguments, kind or kind_of_job(arguments)), argv)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(description="Train M3PO, or rsl_rl's PPO in the same harness, on one or several tasks.")
    add_task_arguments(parser)
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
    parser.add_argument("--run_timestamp", help="Name of the run folder instead of the time (train_multigpu gives it).")
    start = parser.add_mutually_exclusive_group()
    _add_start_arguments(start)
    add_transfer_arguments(parser, start)
    _add_report_arguments(parser)
    parser.add_argument("--eval_envs", type=at_least(2), default=20, help="Environments of an evaluation, per task.")
    parser.add_argument(
        "--restart_members", "--restart-members", action="store_true", help="Restart a task's process that dies."
    )
    return parser


def _add_start_arguments(group: argparse._MutuallyExclusiveGroup) -> None:
    """Add the options that say what a training begins with."""
    group.add_argument(
        "--checkpoint", metavar="latest|best|PATH", help="Start a new run with what this checkpoint has learnt."
    )
    group.add_argument(
        "--resume",
        metavar="latest|best|PATH|RUN",
        help="Go on with a run in its own folder, up to --max_iterations in all. RUN is a folder or a --run_name.",
    )


def _add_report_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of what is printed, evaluated and kept."""
    parser.add_argument(
        "--quiet",
        action=argparse.BooleanOptionalAction,
        help="One line per iteration; by default where the output is not a terminal.",
    )
    parser.add_argument(
        "--logger",
        choices=LOGGERS,
        default="tensorboard",
        help="Service that receives the curves besides TensorBoard's files.",
    )
    parser.add_argument("--video", action="store_true", help="Film the training, below <run>/videos.")
    parser.add_argument("--video_length", type=at_least(1), default=200, help="Steps of a film.")
    parser.add_argument("--video_interval", type=at_least(1), default=2000, help="Steps from one film to the next.")
    parser.add_argument("--log_project_name", help="Project there (default: m3po).")
    parser.add_argument(
        "--eval_interval",
        type=at_least(0),
        default=25,
        help="Evaluate every so many iterations, in a process of its own; 0 never does, and keeps no model_best.pt.",
    )
    parser.add_argument(
        "--keep_checkpoints",
        type=at_least(1),
        default=M3PORunner.KEPT,
        help="Newest numbered checkpoints to keep, besides model_last.pt and model_best.pt.",
    )


def _main(argv: list[str], kind: type[Job]) -> int:
    """Check everything, then create the environments and train."""
    with print_config.kept_apart(argv):
        job = kind.read(_parser(), argv)
        args = job.args
        distributed.check_start(args.in_group)
        check_logger(args.logger)
        if args.video:
            require_packages("--video", "video", "imageio_ffmpeg")
            job.require_video()
        checkpoint = resolve_checkpoint(job, args.checkpoint) if args.checkpoint else None
        if args.print_config:
            _find_start(job)
    if args.print_config:
        return print_config.show(job, job.train_cfg | _report_settings(args))
    stop = StopSignals()
    with contextlib.ExitStack() as stack:
        stack.enter_context(stop.caught())
        stack.enter_context(distributed.group(args.in_group, job.device))
        stack.enter_context(fast_matrix_products())
        job.seed = distributed.shared(job.seed)
        found = _find_start(job)
        sizes = [sum(of_task) for of_task in zip(*distributed.collected(job.sizes), strict=True)]
        elastic_run = ElasticRun(job.experiment_dir, lambda: found[0] if found else _create_run(job, sizes))
        run_dir, resumed = elastic_run.run_dir, elastic_run.checkpoint or (found and found[1])
        if resumed is not None and distributed.is_main():
            record_resumption(run_dir, resumed, sys.orig_argv[1:])
        _report(job, sizes, run_dir)
        evaluating = None
        if args.eval_interval > 0 and distributed.is_main():
            evaluating = evaluator(job, args.eval_envs, run_dir / "evaluation.log")
            stack.callback(evaluating.close)
        own_dir = run_dir if distributed.is_main() else run_dir / f"rank_{distributed.rank()}"
        own_dir.mkdir(exist_ok=True)
        seed = job.seed + distributed.rank()
        env = stack.enter_context(job.environments(job.sizes, seed, own_dir, restart=args.restart_members))
        stack.enter_context(stop.caught())  # once more, because a simulation may have handlers of its own
        try:
            runner = M3PORunner(
                env, job.runner_cfg(env) | _report_settings(args), str(run_dir), job.device, evaluating, stop
            )
        except ValueError as error:  # rsl_rl's and our own complaints about classes and observation groups
            raise UserError(str(error)) from error
        if args.video and distributed.is_main():
            films = TrainingFilms(
                lambda path: job.films(env, path),
                run_dir / "videos",
                args.video_interval,
                min(args.video_length, args.video_interval),
                runner.reporter.add_video,
            )
            stack.callback(films.close)
            runner.after_step = films
        if checkpoint is not None:
            print(f"[m3po] continuing from {checkpoint}")
            runner.load(str(checkpoint), map_location=job.device)
        if args.transfer is not None and elastic_run.checkpoint is None:
            runner.transfer(args.transfer, args.init_task_from)
        if args.train_only == "embedding":
            print("[m3po] training nothing but task embeddings and action noise")
            train_embedding_only(runner.alg)
        at_random = job.train_cfg.get("init_at_random_ep_len", True)
        code = learn(runner, run_dir, job.train_cfg["max_iterations"], resumed, at_random)
        if code == 0:
            elastic_run.finish()
    return code


@contextlib.contextmanager
def fast_matrix_products() -> Generator[None]:
    """Let CUDA multiply matrices in TF32, and cuDNN choose its algorithms by trying them, as rsl_rl's training does."""
    settings = (
        (torch.backends.cuda.matmul, "allow_tf32"),
        (torch.backends.cudnn, "allow_tf32"),
        (torch.backends.cudnn, "benchmark"),
    )
    before = [getattr(*setting) for setting in settings]
    try:
        for setting in settings:
            setattr(*setting, True)
        yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setattr(*setting, value)


def _report_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The options of what is reported, as fields of a runner's configuration."""
    settings = {name: getattr(args, name) for name in ("eval_interval", "keep_checkpoints")}
    chosen = {name: getattr(args, name) for name in ("quiet", "logger", "log_project_name")}
    return settings | {name: value for name, value in chosen.items() if value is not None}


def _find_start(job: Job) -> tuple[Path, Path] | None:
    """The run to resume and its checkpoint; without ``--resume``, what else training starts from is checked."""
    if job.args.resume:
        return find_run(job, job.args.resume)
    check_start(job)
    return None


def learn(runner: M3PORunner, run_dir: Path, iterations: int, resumed: Path | None, init_at_random_ep_len: bool) -> int:
    """Train to the end or to a signal, and say which.

    Args:
        runner: Runner.
        run_dir: Folder of the run.
        iterations: Iterations of the run, those before it was resumed included.
        resumed: Checkpoint to resume the run from.
        init_at_random_ep_len: As in :meth:`M3PORunner.learn`.

    Returns:
        Exit code.
    """
    if resumed is not None:
        runner.resume(str(resumed))
        done = runner.current_learning_iteration - runner.first_iteration
        print(f"[m3po] resuming from {resumed}: {done} of {iterations} iterations are done", flush=True)
        if done >= iterations:
            print("[m3po] the run is complete; a larger --max_iterations would go on", flush=True)
        iterations = max(0, iterations - done)
    start = time.perf_counter()
    try:
        runner.learn(iterations, init_at_random_ep_len)
    except Stop as stop:
        path = run_dir / LAST
        word = "interrupted" if stop.exit_code == INTERRUPTED else f"stopped by {stop.signal.name}"
        print(f"\n[m3po] {word}; " + (f"saved {path}" if path.exists() else "nothing was learnt yet"), flush=True)
        return stop.exit_code
    print(f"[m3po] trained for {time.perf_counter() - start:.1f} s; checkpoints in {run_dir}")
    return 0


def _report(job: Job, sizes: list[int], run_dir: Path) -> None:
    """Print what was chosen; ``sizes`` are the environments of each task in all processes."""
    tasks = ", ".join(f"{name} x {size}" for name, size in zip(job.names, sizes, strict=True))
    print(f"[m3po] tasks ({len(job.names)}): {tasks}")
    print(f"[m3po] algorithm: {job.algo} ({job.agent}), seed: {job.seed}")
    threads = "OMP_NUM_THREADS" if os.environ.get("OMP_NUM_THREADS") else "OMP_NUM_THREADS is not set"
    print(f"[m3po] device: {job.device}, torch threads: {torch.get_num_threads()} ({threads})")
    together = f" in {distributed.world_size()} processes" if distributed.world_size() > 1 else ""
    print(f"[m3po] environments: {sum(sizes)}{together}, steps per rollout: {job.train_cfg['num_steps_per_env']}")
    for line in job.chosen():
        print(f"[m3po] {line}")
    if job.algo == "m3po":
        print(describe(parse_algorithm_cfg(job.train_cfg["algorithm"]), job.mode, job.device))
    print(f"[m3po] run folder: {run_dir}")


def _create_run(job: Job, sizes: list[int]) -> Path:
    """Create the run's folder, with ``run.json``: what the run was."""
    run_dir = create_run_dir(job)
    manifest = OWNER | {
        "task": job.train_cfg["task"],
        "tasks": job.names,
        "num_envs": sizes,
        "processes": distributed.world_size(),
        "created_at": datetime.now(UTC).isoformat(),
        "metadata": {"agent": job.agent, "algorithm": job.algo},
        "command": sys.orig_argv[1:],
        "algorithm": job.algo,
        "agent": job.agent,
        "seed": job.seed,
        "device": job.device,
        "torch_threads": torch.get_num_threads(),
        "environment": environment_variables(),
        "overrides": job.overrides,
        "versions": package_versions(job.versions),
        "git": git_revision(Path(m3po.__file__)),
        "configuration": {"agent": job.train_cfg},
    }
    for name, value in job.about().items():
        manifest[name] = manifest[name] | value if isinstance(manifest.get(name), dict) else value
    write_json(run_dir / MANIFEST, manifest)
    job.record(run_dir)
    return run_dir
