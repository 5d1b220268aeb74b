"""The process that evaluates the checkpoints of a training on task suites."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from m3po.cli import suite_job
from m3po.cli.arguments import Parser
from m3po.evaluation import evaluate_policies
from m3po.evaluation_process import SEED_OFFSET, Evaluate, acting_cfg, answer, policies_of
from m3po.runners import M3PORunner


@contextlib.contextmanager
def _build(order: dict[str, Any]) -> Iterator[Evaluate]:
    """Create environments of the training's tasks with a seed of their own."""
    parser = Parser()
    suite_job.add_common_arguments(parser)
    job = suite_job.prepare(parser, order["arguments"])
    kinds = policies_of(job.train_cfg)
    sizes = [order["num_envs"]] * len(job.infos)
    with suite_job.environments(job, sizes, job.seed + SEED_OFFSET) as env:
        cfg = suite_job.with_groups(acting_cfg(job.train_cfg), env)
        runner = M3PORunner(env, cfg, log_dir=None, device=job.device)

        def evaluate(checkpoint: str) -> dict[str, dict]:
            runner.load(checkpoint, load_cfg={"actor": True})
            policies = {kind: runner.inference_policy(kind) for kind in kinds}
            return evaluate_policies(env, policies, order["num_envs"] // len(kinds))

        yield evaluate


if __name__ == "__main__":
    sys.exit(answer(_build))
