"""A dead evaluation does not end the training: it is started once more, then given up with one line."""

from __future__ import annotations

from pathlib import Path

import pytest
from toy_env import PointEnv, runner_cfg

from m3po.errors import M3POError
from m3po.runners import M3PORunner

RESULT = {"return_mean": -3.0, "return_std": 0.5, "length_mean": 20.0, "termination_rate": 0.0, "success_rate": None}


class Mortal:
    """Evaluates at once, and dies as often as told, each time after a checkpoint was queued."""

    def __init__(self, deaths: int) -> None:
        self.deaths, self.starts, self.queue, self.evaluated = deaths, 1, [], []

    def submit(self, path: str, iteration: int) -> None:
        self.queue.append({"iteration": iteration, "checkpoint": path, "prior": RESULT, "planner": None})

    def poll(self) -> list[dict]:
        if self.queue and self.deaths > 0:
            self.deaths -= 1
            raise M3POError("The evaluation process ended with exit code -9; see evaluation.log.\nlast words\nmore")
        results, self.queue = self.queue, []
        self.evaluated += [result["iteration"] for result in results]
        return results

    def wait(self) -> list[dict]:
        return self.poll()

    def restart(self) -> None:
        self.starts, self.queue = self.starts + 1, []

    def close(self) -> None: ...


@pytest.mark.parametrize("deaths", [0, 1, 2, 3])
def test_training_goes_on_when_the_evaluation_dies(deaths, tmp_path, capsys):
    evaluator = Mortal(deaths)
    cfg = runner_cfg() | {"algo": "m3po", "task": "toy", "eval_interval": 1}
    runner = M3PORunner(PointEnv(8), cfg, str(tmp_path), "cpu", evaluator)
    runner.learn(4)
    out = capsys.readouterr().out
    assert runner.env_steps == 4 * 8 * 8
    assert out.count("It is started once more.") == min(1, deaths)
    assert out.count("Training goes on without evaluations.") == (deaths > 1)
    assert "last words" not in out
    assert evaluator.starts == 1 + (deaths > 0)
    assert evaluator.evaluated == ([0, 1, 2, 3] if deaths < 2 else [])
    assert (Path(tmp_path) / "model_best.pt").exists() == (deaths < 2)
    assert (Path(tmp_path) / "model_last.pt").exists()
