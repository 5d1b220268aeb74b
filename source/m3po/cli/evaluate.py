"""The process that evaluates the checkpoints of a training, with environments of its own."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

from m3po.cli.job import Job
from m3po.cli.suite_job import from_order
from m3po.errors import UserError
from m3po.evaluation import evaluate_policies
from m3po.evaluation_process import SEED_OFFSET, Evaluate, EvaluationProcess, acting_cfg, answer, policies_of
from m3po.runners import M3PORunner


def evaluator(job: Job, num_envs: int, log_path: Path) -> EvaluationProcess:
    """What evaluates the checkpoints of a job; nothing is started.

    Args:
        job: The training's checked request.
        num_envs: Environments, and episodes, of an evaluation of each task, over all policies together.
        log_path: File that receives the output of the process.

    Raises:
        UserError: If there are fewer environments than policies to evaluate.
    """
    kinds = policies_of(job.train_cfg)
    if num_envs < len(kinds):
        raise UserError(f"evaluating {' and '.join(kinds)} needs at least {len(kinds)} environments, got {num_envs}.")
    return EvaluationProcess("m3po.cli.evaluate", job.order() | {"num_envs": num_envs}, log_path)


@contextlib.contextmanager
def _build(order: dict[str, Any]) -> Generator[Evaluate]:
    """Create environments of the training's tasks, with a seed of their own."""
    job = from_order(order)
    kinds, seed = policies_of(job.train_cfg), job.seed + SEED_OFFSET
    with job.environments([order["num_envs"]] * len(job.infos), seed) as env:
        runner = M3PORunner(env, acting_cfg(job.runner_cfg(env)), log_dir=None, device=job.device)

        def evaluate(checkpoint: str) -> dict[str, dict]:
            runner.load(checkpoint, load_cfg={"actor": True})
            env.seed(seed)  # the same initial states for every checkpoint
            policies = {kind: runner.inference_policy(kind) for kind in kinds}
            return evaluate_policies(env, policies, order["num_envs"] // len(kinds))

        yield evaluate


if __name__ == "__main__":
    sys.exit(answer(_build))
