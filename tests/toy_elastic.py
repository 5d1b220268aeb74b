"""A training under torchrun of which one process is killed: ``toy_elastic.py FOLDER RANK ITERATION``.

In the first attempt, the process RANK kills itself in the middle of a rollout of ITERATION.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
from toy_env import PointEnv, runner_cfg

from m3po import distributed
from m3po.cli.train import learn
from m3po.elastic import ElasticRun
from m3po.runners import M3PORunner

ITERATIONS, NUM_STEPS = 8, 8


class Fragile(PointEnv):
    """Dies in a given step."""

    last_step: int | None = None

    def step(self, actions: torch.Tensor) -> tuple:
        if self.last_step == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.last_step is not None:
            self.last_step -= 1
        return super().step(actions)


def create(experiment: Path) -> Path:
    run_dir = experiment / f"run_{len(list(experiment.glob('run_*')))}"
    run_dir.mkdir(parents=True)
    return run_dir


def main(folder: str, victim: str, iteration: str) -> None:
    """As the commands do it."""
    with distributed.group(True, "cpu"):
        torch.manual_seed(distributed.rank())
        elastic_run = ElasticRun(Path(folder), lambda: create(Path(folder)))
        env = Fragile(8, seed=distributed.rank())
        if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and distributed.rank() == int(victim):
            env.last_step = int(iteration) * NUM_STEPS + 3
        runner = M3PORunner(env, runner_cfg(), str(elastic_run.run_dir), device="cpu")
        begin = runner.learn
        runner.learn = lambda *args: (
            print(
                f"{distributed.world_size()} processes from iteration {runner.current_learning_iteration}", flush=True
            ),
            begin(*args),
        )
        learn(runner, elastic_run.run_dir, ITERATIONS, elastic_run.checkpoint, False)
        elastic_run.finish()


if __name__ == "__main__":
    main(*sys.argv[1:])
