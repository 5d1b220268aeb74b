"""Several Isaac Lab simulations, each in a process of its own, as one batch of one agent."""

from __future__ import annotations

import csv
import json

import pytest

from m3po.cli.train import run

pytestmark = [pytest.mark.sim, pytest.mark.slow]


def test_two_simulations_train_one_agent(tmp_path, capfd):
    arguments = ["--task", "Isaac-Cartpole-v0,Isaac-Ant-v0", "--num_envs", "24", "--max_iterations", "2"]
    code = run([*arguments, "--eval_interval", "0", "--device", "cpu", "--log_root", str(tmp_path)])
    printed = capfd.readouterr().out
    assert code == 0
    (run_dir,) = (tmp_path / "m3po" / "Isaac-Cartpole+Isaac-Ant").iterdir()
    manifest = json.loads((run_dir / "run.json").read_text())
    assert manifest["tasks"] == ["Isaac-Cartpole", "Isaac-Ant"]
    assert manifest["num_envs"] == [12, 12]
    with open(run_dir / "tasks.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["task"], int(row["env_steps"])) for row in rows[-2:]] == [("Isaac-Cartpole", 192), ("Isaac-Ant", 192)]
    assert (run_dir / "model_last.pt").is_file()
    assert (run_dir / "embeddings.csv").is_file()
    assert "nearest tasks" in printed
    for task in manifest["tasks"]:
        assert (run_dir / f"member_{task}.log").is_file()
