"""A task of a user's own, as the documentation shows it, trains under its own name, alone and in a set."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.sim
@pytest.mark.parametrize(
    ("task", "algo"), [("My-Balance", "m3po"), ("My-Balance", "ppo"), ("My-Balance,cup-catch", "m3po")]
)
def test_the_documented_task_trains(run_script, tmp_path, task, algo):
    text = (ROOT / "docs" / "own_task.md").read_text(encoding="utf-8")
    (tmp_path / "my_tasks.py").write_text(re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1), encoding="utf-8")
    info = tmp_path / "my_tasks-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-tasks\nVersion: 0.1\n", encoding="utf-8")
    (info / "entry_points.txt").write_text("[isaaclab.tasks]\nmy_tasks = my_tasks\n", encoding="utf-8")
    options = ["--num_envs", "32", "--max_iterations", "4", "--eval_interval", "0", "--device", "cpu"]
    line = ["scripts/train.py", "--task", task, "--algo", algo, *options]
    result = run_script(line, env={"PYTHONPATH": str(tmp_path)}, cwd=tmp_path, timeout=400)
    assert result.rc == 0, result.stderr[-3000:]
    assert "trained for" in result.stdout
    if "," not in task:
        assert "they hold all 2 files that My-Balance names" in result.stdout
        assert re.search(r"critic :  \['critic'\]", result.stdout)
        assert "no effect" not in result.stdout
