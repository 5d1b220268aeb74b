"""Evaluates the checkpoints of a training on an Isaac Lab task, in a process and a simulation of its own."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from m3po.errors import UserError
from m3po.evaluation_process import SEED_OFFSET, Evaluate, EvaluationProcess, acting_cfg, answer, policies_of

from . import launch


class EvaluationWorker(EvaluationProcess):
    """Evaluates a training's checkpoints with a simulation of its own."""

    def __init__(self, job: launch.Job, log_path: Path, num_envs: int = 32) -> None:
        """Remember what to evaluate; nothing is started.

        Args:
            job: The training's checked request: task, overrides, agent, seed and device are taken from it.
            log_path: File that receives the output of the child.
            num_envs: Environments, and episodes, of one evaluation, over all policies together.

        Raises:
            UserError: If there are fewer environments than policies to evaluate.
        """
        kinds = policies_of(job.train_cfg())
        if num_envs < len(kinds):
            raise UserError(
                f"evaluating {' and '.join(kinds)} needs at least {len(kinds)} environments, got {num_envs}."
            )
        # The child repeats the training's own resolution of its configuration, checks included, before it changes the
        # number of environments and the seed. Thus it accepts whatever the training has accepted.
        training = ["--num_envs", str(job.env_cfg.scene.num_envs), "--seed", str(job.agent_cfg.seed)]
        order = {"arguments": job.arguments() + training, "num_envs": num_envs}
        super().__init__("isaaclab_m3po.evaluation_worker", order, log_path)


@contextlib.contextmanager
def _build(order: dict[str, Any]) -> Iterator[Evaluate]:
    """Start the simulation that evaluates a training's checkpoints."""
    from m3po.evaluation import evaluate_policies
    from m3po.runners import M3PORunner

    job = make_job(order["arguments"], order["num_envs"])
    kinds = policies_of(job.train_cfg())
    with launch.environment(job) as env:
        runner = M3PORunner(env, acting_cfg(job.train_cfg()), log_dir=None, device=job.device)

        def evaluate(checkpoint: str) -> dict[str, dict]:
            runner.load(checkpoint, load_cfg={"actor": True})
            env.seed(job.agent_cfg.seed)  # the same initial states for every checkpoint
            policies = {kind: runner.inference_policy(kind) for kind in kinds}
            return evaluate_policies(env, policies, env.num_envs // len(kinds))

        yield evaluate


def make_job(arguments: list[str], num_envs: int) -> launch.Job:
    """The training's job on fewer environments and the held-out seed.

    Args:
        arguments: Command line that recreates the training's job, its number of environments and seed included.
        num_envs: Environments of the evaluation.
    """
    parser = argparse.ArgumentParser()
    launch.add_common_arguments(parser)
    job = launch.prepare(launch.parse(parser, arguments))
    job.env_cfg.scene.num_envs = num_envs
    job.agent_cfg.seed = job.env_cfg.seed = job.agent_cfg.seed + SEED_OFFSET
    return job


if __name__ == "__main__":
    sys.exit(answer(_build))
