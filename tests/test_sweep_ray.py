"""A sweep over two settings on a local Ray cluster."""

from __future__ import annotations

import json
import sys

import pytest
from conftest import REPOSITORY, assert_adds_to_the_lock, run_process

sys.path.insert(0, str(REPOSITORY / "scripts"))
import sweep_ray

from m3po.cli.arguments import guarded

TRAIN = ("--task", "walker-walk", "--algo", "ppo", "--num_envs", "4", "--max_iterations", "2", "--eval_interval", "0")
GRID = ("--grid", "agent.algorithm.desired_kl=0.01,0.03")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*GRID, "--output", "{folder}"), "-- --task TASK"),
        (("--grid", "agent.seed", "--output", "{folder}"), "FIELD=VALUE,VALUE"),
        ((*GRID, "--output", "{folder}", "--metric", "tasks:return"), "progress:COLUMN or evaluations:COLUMN"),
    ],
)
def test_bad_input_is_one_line(arguments, message, tmp_path, capsys):
    assert guarded(sweep_ray.main, [part.format(folder=tmp_path) for part in arguments]) == 2
    assert message in capsys.readouterr().err


def test_ray_is_asked_for_where_it_is_missing(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert guarded(sweep_ray.main, [*GRID, "--output", str(tmp_path), "--", *TRAIN]) == 2
    assert "requirements-ray.txt" in capsys.readouterr().err


def test_finished_trials_are_not_repeated_and_the_best_is_told(tmp_path, capsys, monkeypatch):
    ran = []

    def run_all(trials, *_):
        ran.extend(trials)
        yield from (
            (name, {"value": float(len(ran)), "run": name} if "=1" in name else {"error": "x"}) for name in trials
        )

    monkeypatch.setattr(sweep_ray, "_run_all", run_all)
    call = ["--output", str(tmp_path), "--mode", "min", "--grid", "a=1,2", "--grid", "b=1,2", "--", *TRAIN]
    assert sweep_ray.main(call) == 1
    assert ran == ["a=1 b=1", "a=1 b=2", "a=2 b=1", "a=2 b=2"]
    assert "best: a=1 b=1" in capsys.readouterr().out
    assert sweep_ray.main(call) == 1
    assert ran[4:] == ["a=2 b=2"]  # it failed before
    assert guarded(sweep_ray.main, [*call, "--seed", "3"]) == 2
    assert "another training" in capsys.readouterr().err


def test_the_lock_of_ray_adds_to_the_main_lock_and_changes_nothing_of_it():
    assert_adds_to_the_lock("requirements-ray.txt", "ray")


@pytest.mark.slow
def test_two_trials_on_a_local_cluster(tmp_path):
    pytest.importorskip("ray")
    command = [sys.executable, REPOSITORY / "scripts/sweep_ray.py", *GRID, "--output", tmp_path / "sweep"]
    command += ["--metric", "progress:mean_step_reward", "--", *TRAIN, "--device", "cpu"]
    result = run_process(command, timeout=400)
    assert result.rc == 0, result.stdout[-2000:] + result.stderr[-2000:]
    trials = json.loads((tmp_path / "sweep/results.json").read_text())["trials"]
    assert set(trials) == {"agent.algorithm.desired_kl=0.01", "agent.algorithm.desired_kl=0.03"}
    best = max(trials, key=lambda name: trials[name]["value"])
    assert f"best: {best}" in result.stdout
    again = run_process(command, timeout=100)
    assert again.rc == 0 and f"best: {best}" in again.stdout
    assert "Started a local Ray instance" not in again.stderr
