"""Training: ``scripts/train.py`` and ``isaaclab train --rl_library m3po``."""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Sequence
from pathlib import Path

from m3po import distributed
from m3po.cli.arguments import Parser, add_distributed, at_least, guarded
from m3po.elastic import Launch
from m3po.errors import UserError

from .. import launch

INTERRUPTED = 130
"""Exit code after Ctrl-C."""


def run(argv: Sequence[str]) -> int:
    """Train as the command line says.

    Args:
        argv: Arguments without the program's name.

    Returns:
        Exit code: 0, 2 for a user's mistake, 130 when interrupted.
    """
    return guarded(_main, argv)


def _parser() -> argparse.ArgumentParser:
    """Options of training; those shared with playing come from :mod:`isaaclab_m3po.launch`."""
    parser = Parser(description="Train M3PO, or rsl_rl's PPO in the same harness, on an Isaac Lab task.")
    launch.add_common_arguments(parser)
    add_distributed(parser)
    parser.add_argument("--run_timestamp", help="Name of the run folder instead of the time (train_multigpu gives it).")
    parser.add_argument("--max_iterations", type=at_least(1), help="Training iterations.")
    parser.add_argument("--experiment_name", help="Folder of related runs below <log_root>/<algo>.")
    parser.add_argument("--run_name", help="Appended to the name of the run folder.")
    parser.add_argument("--checkpoint", metavar="latest|best|PATH", help="Continue from this checkpoint.")
    parser.add_argument(
        "--eval_interval",
        type=at_least(0),
        default=25,
        help="Evaluate every so many iterations, in a process of its own; 0 never does, and keeps no model_best.pt.",
    )
    parser.add_argument("--eval_envs", type=at_least(2), default=32, help="Environments of an evaluation.")
    return parser


def _main(argv: list[str]) -> int:
    """Check everything, then simulate and train."""
    request = launch.parse(_parser(), argv)
    job = launch.prepare(request)
    in_group = job.args.in_group
    distributed.check_start(in_group)
    checkpoint = launch.resolve_checkpoint(job, job.args.checkpoint) if job.args.checkpoint else None
    with distributed.group(in_group, job.device):
        job.agent_cfg.seed = distributed.shared(job.agent_cfg.seed)
        job.env_cfg.seed = job.agent_cfg.seed + distributed.rank()
        attempts = Launch(launch.experiment_dir(job), lambda: _create_run(job))
        launch.report(job)
        print(f"[m3po] run folder: {attempts.run_dir}")
        return _train(job, attempts, attempts.checkpoint or checkpoint)


def _create_run(job: launch.Job) -> Path:
    """Create the run's folder, with what the run is."""
    from isaaclab_rl.entrypoints.common import dump_train_configs

    from ..manifest import write_manifest

    run_dir = launch.create_run_dir(job)
    job.env_cfg.log_dir = str(run_dir)
    write_manifest(job, run_dir)
    dump_train_configs(str(run_dir), job.env_cfg, job.agent_cfg)
    return run_dir


def _train(job: launch.Job, attempts: Launch, checkpoint: Path | None) -> int:
    """Simulate and train; Ctrl-C saves what has been learnt."""
    from isaaclab_rl.entrypoints.common import scoped_torch_backend_flags

    from m3po.runners import M3PORunner

    from ..evaluation_worker import EvaluationWorker

    run_dir = attempts.run_dir
    job.env_cfg.log_dir = str(run_dir)
    train_cfg = job.train_cfg() | {"eval_interval": job.args.eval_interval}
    with contextlib.ExitStack() as stack:
        evaluator = None
        if job.args.eval_interval > 0 and distributed.is_main():
            evaluator = EvaluationWorker(job, run_dir / "evaluation.log", job.args.eval_envs)
            stack.callback(evaluator.close)
        flags = scoped_torch_backend_flags(  # Isaac Lab's choice for training
            cuda_matmul_allow_tf32=True, cudnn_allow_tf32=True, cudnn_deterministic=False, cudnn_benchmark=True
        )
        stack.enter_context(flags)
        env = stack.enter_context(launch.environment(job))
        try:
            runner = M3PORunner(env, train_cfg, str(run_dir), job.device, evaluator)
        except ValueError as error:  # rsl_rl's and our own complaints about classes and observation groups
            raise UserError(str(error)) from error
        if checkpoint is not None:
            print(f"[m3po] continuing from {checkpoint}")
            runner.load(str(checkpoint), map_location=job.device)
        start = time.perf_counter()
        try:
            left = attempts.iterations(runner.current_learning_iteration, job.agent_cfg.max_iterations)
            runner.learn(left, init_at_random_ep_len=job.agent_cfg.init_at_random_ep_len)
        except KeyboardInterrupt:
            path = run_dir / launch.SELECTORS["latest"]
            if distributed.is_main():
                runner.save(str(path))
            print(f"\n[m3po] interrupted; saved {path}")
            return INTERRUPTED
        attempts.finish()
        print(f"[m3po] trained for {time.perf_counter() - start:.1f} s; checkpoints in {run_dir}")
    return 0
