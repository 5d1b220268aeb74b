"""The learning benchmark: finished runs are not repeated, crashes are reported, figures are those of the curves."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
import benchmark_learning
from benchmark_report import write_report


@pytest.fixture
def calls(monkeypatch, tmp_path):
    """Replace the processes of training and playing by ones that write what those would have written."""
    calls = []

    def fake(arguments):
        calls.append(arguments)
        if "--num_episodes" in arguments:
            Path(arguments[arguments.index("--output") + 1]).write_text(
                json.dumps(
                    {"return_mean": 7.0, "return_std": 0.0, "length_mean": 1, "termination_rate": 0, "num_episodes": 4}
                )
            )
            return subprocess.CompletedProcess(arguments, 0, "")
        if "13" in arguments:
            return subprocess.CompletedProcess(arguments, 1, "something broke")
        folder = Path(arguments[arguments.index("--log_root") + 1]) / "run"
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(json.dumps({"versions": {"torch": "1"}, "environment": "secret"}))
        with open(folder / "progress.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("iteration", "env_steps", "seconds", "mean_step_reward", "mean_return", "unwanted"))
            writer.writerows([(0, 8192, 2.0, 1.0, 10.0, 0), (1, 16384, 4.0, 3.0, 30.0, 0)])
        return subprocess.CompletedProcess(arguments, 0, "")

    monkeypatch.setattr(benchmark_learning, "_python", fake)
    monkeypatch.setattr(benchmark_learning, "DATA", tmp_path)
    return calls


def test_runs_are_stored_once_and_crashes_reported(calls, tmp_path):
    for _ in range(2):
        for seed in (11, 12, 13):
            benchmark_learning.run("Isaac-Ant-v0", "m3po", seed, 4)
    assert len(calls) == 3 + 2 * 2  # three trainings, prior and planner of the two that finished
    record = json.loads((tmp_path / "Isaac-Ant-v0" / "m3po" / "seed13.json").read_text())
    assert record["crashed"]
    assert "something broke" in record["output"]
    assert "secret" not in (tmp_path / "Isaac-Ant-v0" / "m3po" / "seed11.json").read_text()

    table = write_report(tmp_path)
    assert "(1 crashed)" in table
    figures = json.loads((tmp_path / "summary.json").read_text())["Isaac-Ant-v0"]["m3po"]["11"]
    assert figures["area"] == 2.0
    assert figures["mean_return"] == 30.0
    assert figures["ms_per_step"] == 125.0  # 2 s for 16 steps
    assert figures["eval_planner"] == 7.0
    assert (tmp_path / "Isaac-Ant-v0.png").stat().st_size > 5000
