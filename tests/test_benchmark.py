"""The learning benchmark: finished runs are not repeated, crashes are reported, figures are those of the curves."""

import csv
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
import benchmark_learning
from benchmark_arms import ARMS, SUITES, TASKS
from benchmark_report import COLOURS, interval, reached, rival_levels, smooth, write_report

from m3po.cli.overrides import assign, parse_value
from m3po.config import AlgorithmCfg
from m3po.validation import validate


@pytest.fixture
def calls(monkeypatch, tmp_path):
    """Replace the processes of training and playing by ones that write what those would have written."""
    calls = []

    def fake(arguments):
        calls.append(arguments)
        if "--num_episodes" in arguments:
            values = {"return_mean": 7.0, "return_std": 0.0, "length_mean": 1, "termination_rate": 0, "num_episodes": 4}
            Path(arguments[arguments.index("--output") + 1]).write_text(json.dumps({"tasks": {"Isaac-Ant": values}}))
            return subprocess.CompletedProcess(arguments, 0, "")
        if "13" in arguments:
            return subprocess.CompletedProcess(arguments, 1, "something broke")
        folder = Path(arguments[arguments.index("--log_root") + 1]) / "run"
        folder.mkdir(parents=True)
        model = {"steps_per_iteration": 10 if "11" in arguments else 0}  # only then is there a planner
        agent = {"algorithm": {"world_model": model} if "m3po" in arguments else {}}
        manifest = {"versions": {"torch": "1"}, "environment": "secret", "configuration": {"agent": agent}}
        (folder / "run.json").write_text(json.dumps(manifest))
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
    assert len(calls) == 3 + 2 + 1  # three trainings, prior and planner of one that finished, prior of the other
    record = json.loads((tmp_path / "Isaac-Ant-v0" / "m3po" / "seed13.json").read_text())
    assert record["crashed"]
    assert "something broke" in record["output"]
    assert "secret" not in (tmp_path / "Isaac-Ant-v0" / "m3po" / "seed11.json").read_text()

    for seed in (12, 13):
        benchmark_learning.run("Isaac-Ant-v0", "ppo-tuned", seed, 0)
    benchmark_learning.run("Isaac-Cartpole-v0", "m3po", 13, 0)
    table = write_report(tmp_path)
    assert table.count("(1 crashed)") == 2
    assert "m3po                     crashed (1 seeds)" in table  # Cartpole's only run
    figures = json.loads((tmp_path / "summary.json").read_text())["Isaac-Ant-v0"]["m3po"]["11"]
    assert figures["area"] == 2.0
    assert figures["mean_return"] == 30.0
    assert figures["ms_per_step"] == 125.0  # 2 s for 16 steps
    assert figures["eval_planner"] == 7.0
    assert (figures["steps_90"], figures["seconds_90"]) == (16384, 4.0)  # the rival ends at 2: both average so far
    assert (tmp_path / "Isaac-Ant-v0.png").stat().st_size > 5000


def test_a_level_is_reached_by_the_average_over_a_window_of_steps():
    steps = np.arange(1, 11) * 10_000.0
    curve = {"env_steps": steps, "seconds": steps / 1000, "mean_step_reward": np.arange(10.0)}
    assert smooth(curve).tolist() == [0.0, 0.5, 1.0, 1.5, 2.5, 3.5, 4.5, 5.5, 6.5, 7.5]
    assert reached(curve, 3.0) == (60_000, 60)
    assert reached(curve, 7.6) == (np.inf, np.inf)
    assert reached(curve | {"mean_step_reward": np.arange(10.0, 0.0, -1.0)}, 7.0) == (40_000, 40)  # not before a window
    longer = {"env_steps": steps * 8, "seconds": steps, "mean_step_reward": np.arange(10.0)}
    waited = {"env_steps": 1e4 * np.array([2, 4, 8, 9]), "mean_step_reward": np.array([0.0, 1.0, 4.0, 8.0])}
    assert smooth(waited).tolist() == [0.0, 0.5, 4.0, 4.8]  # the last window begins within a row of four rollouts
    assert smooth(longer).tolist() == list(range(10))  # a rollout longer than the window is its own average


def test_intervals_are_those_of_the_seeds():
    mean, low, high = interval([1.0, 2.0, 3.0, 4.0, 100.0])
    assert mean == 3.0  # the middle half: an outlier does not count
    assert 1.0 <= low < mean < high
    assert interval([5.0]) == (5.0, 5.0, 5.0)


def test_arms_are_what_they_are_called(calls, tmp_path):
    """Every arm that a suite names exists, and its rollouts fill the task's budget."""
    assert {name for suite in SUITES.values() for name in suite} <= set(ARMS)
    for task, setting in TASKS.items():
        for name, arm in ARMS.items():
            if arm.runs_on(task):
                calls.clear()
                benchmark_learning.run(task, name, 11, 0)
                command = calls[0]
                iterations = int(command[command.index("--max_iterations") + 1])
                steps = iterations * arm.num_steps(task) * setting.num_envs
                assert abs(steps - setting.env_steps) < arm.num_steps(task) * setting.num_envs
                assert command[command.index("--algo") + 1] == arm.algo
                for override in arm.overrides_on(task):
                    assert override in command
    assert ARMS["ppo-shipped"].overrides_on("Isaac-Ant-v0") == ARMS["m3po"].overrides_on("Isaac-Ant-v0") == ()


@pytest.mark.parametrize("name", [name for name, arm in ARMS.items() if arm.algo == "m3po"])
def test_overrides_of_an_arm_of_m3po_make_a_configuration_that_can_run(name):
    """Nothing is misspelt, and no part is on whose model is off."""
    cfg = AlgorithmCfg()
    for override in ARMS[name].overrides:
        path, text = override.split("=")
        before = dataclasses.asdict(cfg)
        assign(cfg, path.removeprefix("agent.algorithm."), parse_value(text), "agent.algorithm")
        assert dataclasses.asdict(cfg) != before, f"{override} is the default"
    validate(cfg, 512, 8)


def test_stored_runs_are_those_of_the_arms_that_they_are_called():
    """A stored run is not repeated, so that it must not stand in for another arm."""
    paths = sorted(benchmark_learning.DATA.glob("*/*/seed*.json"))
    assert len(paths) > 50
    for path in paths:
        record = json.loads(path.read_text(encoding="utf-8"))
        assert (record["task"], record["arm"]) == path.parts[-3:-1]
        if record["arm"] in ARMS:
            words = record["command"].split()
            assert words[words.index("--algo") + 1] == ARMS[record["arm"]].algo
            assert set(ARMS[record["arm"]].overrides_on(record["task"])) <= set(words), path


def test_runs_of_version_0_1_are_drawn_and_in_the_table(calls, tmp_path):
    """Their arm exists as stored data alone."""
    benchmark_learning.run("Isaac-Ant-v0", "m3po", 11, 0)
    benchmark_learning.run("Isaac-Ant-v0", "ppo-tuned", 11, 0)
    (tmp_path / "Isaac-Ant-v0" / "m3po").rename(tmp_path / "Isaac-Ant-v0" / "m3po-0.1")
    path = tmp_path / "Isaac-Ant-v0" / "m3po-0.1" / "seed11.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"arm": "m3po-0.1"}))
    assert "m3po-0.1" not in ARMS
    assert "m3po-0.1" in COLOURS
    assert "\nm3po-0.1                     1" in write_report(tmp_path)
    assert (tmp_path / "Isaac-Ant-v0.png").stat().st_size > 5000


def test_rollouts_of_the_default_mode_are_as_long_as_the_arms_believe(run_script):
    code = "from isaaclab_m3po.agents import CPU_NUM_STEPS; print('steps', CPU_NUM_STEPS)"
    assert "steps 8" in run_script(["-c", code]).stdout
    assert {setting.num_steps["m3po"] for setting in TASKS.values()} == {8}


def test_levels_of_a_rival_whose_rewards_stay_negative():
    """90 % of a negative end would lie above it: what counts is the way from the lowest point."""
    steps = np.arange(1.0, 6.0) * 50_000
    rising = {"env_steps": steps, "mean_step_reward": np.array([5.0, -10.0, -8.0, -4.0, -2.0])}
    assert rival_levels([rising, rising]) == pytest.approx({0.5: -6.0, 0.75: -4.0, 0.9: -2.8})
    positive = {"env_steps": steps, "mean_step_reward": np.array([1.0, 2.0, 3.0, 3.0, 4.0])}
    assert rival_levels([positive]) == pytest.approx({0.5: 2.0, 0.75: 3.0, 0.9: 3.6})
