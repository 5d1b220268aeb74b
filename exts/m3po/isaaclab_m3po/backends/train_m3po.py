"""Training: ``scripts/train.py`` and ``isaaclab train --rl_library m3po``."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from m3po import distributed
from m3po.cli import print_config
from m3po.cli.arguments import Parser, add_distributed, at_least, folder_name, guarded
from m3po.elastic import Launch
from m3po.errors import UserError

from .. import launch


def run(argv: Sequence[str]) -> int:
    """Train as the command line says.

    Args:
        argv: Arguments without the program's name.

    Returns:
        Exit code: 0, 2 for a user's mistake, 130 after Ctrl-C and 75 after a cluster's signal, when all is saved.
    """
    return guarded(_main, argv)


def _parser() -> argparse.ArgumentParser:
    """Options of training; those shared with playing come from :mod:`isaaclab_m3po.launch`."""
    from m3po.cli.training import add_report_arguments, add_start_arguments

    parser = Parser(description="Train M3PO, or rsl_rl's PPO in the same harness, on an Isaac Lab task.")
    launch.add_common_arguments(parser)
    purpose = parser.add_mutually_exclusive_group()
    add_distributed(purpose)
    print_config.add_argument(purpose)
    parser.add_argument("--run_timestamp", help="Name of the run folder instead of the time (train_multigpu gives it).")
    parser.add_argument("--max_iterations", type=at_least(1), help="Training iterations.")
    parser.add_argument("--experiment_name", help="Folder of related runs below <log_root>/<algo>.")
    parser.add_argument("--run_name", type=folder_name, help="Appended to the name of the run folder.")
    add_start_arguments(parser.add_mutually_exclusive_group())
    add_report_arguments(parser)
    parser.add_argument("--eval_envs", type=at_least(2), default=32, help="Environments of an evaluation.")
    return parser


def _main(argv: list[str]) -> int:
    """Check everything, then simulate and train."""
    with print_config.kept_apart(argv):
        job = launch.prepare(launch.parse(_parser(), argv))
        in_group = job.args.in_group
        distributed.check_start(in_group)
        checkpoint = launch.resolve_checkpoint(job, job.args.checkpoint) if job.args.checkpoint else None
        if job.args.print_config and job.args.resume:
            launch.find_run(job, job.args.resume)
        cfg = _runner_cfg(job)
    if job.args.print_config:
        from isaaclab.utils import to_dict

        num_envs = {job.task: job.env_cfg.scene.num_envs}
        return print_config.show(job.args, job.agent_entry, job.device, num_envs, cfg, to_dict(job.env_cfg))
    with distributed.group(in_group, job.device):
        job.agent_cfg.seed = distributed.shared(job.agent_cfg.seed)
        job.env_cfg.seed = job.agent_cfg.seed + distributed.rank()
        found = launch.find_run(job, job.args.resume) if job.args.resume else None
        attempts = Launch(launch.experiment_dir(job), lambda: found[0] if found else _create_run(job))
        resumed = attempts.checkpoint or (found and found[1])
        launch.report(job)
        print(f"[m3po] run folder: {attempts.run_dir}")
        code = _train(job, attempts.run_dir, checkpoint, resumed)
        if code == 0:
            attempts.finish()
    return code


def _runner_cfg(job: launch.Job) -> dict[str, Any]:
    from m3po.cli.training import report_settings

    return job.train_cfg() | report_settings(job.args)


def _create_run(job: launch.Job) -> Path:
    """Create the run's folder, with what the run is."""
    from isaaclab_rl.entrypoints.common import dump_train_configs

    from ..manifest import write_manifest

    run_dir = launch.create_run_dir(job)
    job.env_cfg.log_dir = str(run_dir)
    write_manifest(job, run_dir)
    dump_train_configs(str(run_dir), job.env_cfg, job.agent_cfg)
    return run_dir


def _train(job: launch.Job, run_dir: Path, checkpoint: Path | None, resumed: Path | None) -> int:
    """Simulate and train; a signal saves what has been learnt."""
    from isaaclab_rl.entrypoints.common import scoped_torch_backend_flags

    from m3po.cli.training import train
    from m3po.runners import M3PORunner
    from m3po.runners.run_folder import record_resumption
    from m3po.stopping import StopSignals

    from ..evaluation_worker import EvaluationWorker

    job.env_cfg.log_dir = str(run_dir)
    if resumed is not None and distributed.is_main():
        record_resumption(run_dir, resumed, sys.orig_argv[1:])
    stop = StopSignals()
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
        stack.enter_context(stop.caught())  # within the simulation, which may have handlers of its own
        try:
            runner = M3PORunner(env, _runner_cfg(job), str(run_dir), job.device, evaluator, stop)
        except ValueError as error:  # rsl_rl's and our own complaints about classes and observation groups
            raise UserError(str(error)) from error
        if checkpoint is not None:
            print(f"[m3po] continuing from {checkpoint}")
            runner.load(str(checkpoint), map_location=job.device)
        return train(runner, run_dir, job.agent_cfg.max_iterations, resumed, job.agent_cfg.init_at_random_ep_len)
