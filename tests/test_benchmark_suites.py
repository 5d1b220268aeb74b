"""The suites' benchmark: finished runs are not repeated, crashes are reported, figures are those of the curves."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
import benchmark_suites
import benchmark_suites_report
from benchmark_suites import ARMS, GROUPS, Experiment, rollouts, run
from benchmark_suites_report import ARM_COLOURS, DEFAULTS, STORED, write_report

from m3po.cli import suite_job

pytestmark = pytest.mark.unit

WALK = Experiment("walker-walk", 4, 80)
FEW = Experiment("walker-walk", 2, 160, name="walker-walk-2-envs")
BOTH = Experiment("cup-catch,walker-walk", 8, 80)
CRASHES = 13


@pytest.fixture
def calls(monkeypatch, tmp_path):
    """Replace trainings by processes that write what those would have written; one seed crashes."""
    calls = []

    def table(path, header, *rows):
        with open(path, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows((header, *rows))

    def fake(arguments):
        calls.append(arguments)
        if str(CRASHES) in arguments:
            return subprocess.CompletedProcess(arguments, 1, "something broke")
        folder = Path(arguments[arguments.index("--log_root") + 1]) / "run"
        folder.mkdir(parents=True)
        tasks = arguments[arguments.index("--task") + 1].split(",")
        of_tasks = {"task": tasks[0]} if len(tasks) == 1 else {"tasks": tasks}
        manifest = {"num_envs": 4, "device": "cpu", "versions": {}, "git": {}, "environment": "secret"}
        (folder / "run.json").write_text(json.dumps(manifest | of_tasks))
        table(folder / "progress.csv", ("env_steps", "seconds", "mean_return"), (32, 1, ""), (64, 2, 10), (320, 9, 30))
        if len(tasks) == 1:
            table(folder / "evaluations.csv", ("policy", "return_mean"), ("prior", 1), ("prior", 40), ("planner", 50))
        else:
            rows = [(32 * k, k, task, 5 * k, 0.1 * k) for k in (1, 2) for task in tasks]
            table(folder / "tasks.csv", ("env_steps", "seconds", "task", "return", "success"), *rows)
            rows = [(task, "prior", 7, 0.25) for task in tasks]
            table(folder / "task_evaluations.csv", ("task", "policy", "return_mean", "success_rate"), *rows)
        return subprocess.CompletedProcess(arguments, 0, "")

    monkeypatch.setattr(benchmark_suites, "run_python", fake)
    monkeypatch.setattr(benchmark_suites, "DATA", tmp_path)
    return calls


def test_runs_are_stored_once_and_crashes_reported(calls, tmp_path, monkeypatch):
    for _ in range(2):
        for seed in (11, 12, CRASHES):
            run(WALK, "m3po", seed)
        run(WALK, "ppo-long", 11)
        run(FEW, "m3po", 11)
        run(BOTH, "ppo", 11)
    assert len(calls) == 6
    crashed = json.loads((tmp_path / "walker-walk" / "m3po" / f"seed{CRASHES}" / "run.json").read_text())
    assert crashed["crashed"]
    assert "something broke" in crashed["output"]
    assert "secret" not in (tmp_path / "walker-walk" / "m3po" / "seed11" / "run.json").read_text()

    beside = {}

    def plot(experiment, runs, single, *others):
        beside[experiment] = {run["experiment"] for run in single}
        draw(experiment, runs, single, *others)

    draw = benchmark_suites_report._plot
    monkeypatch.setattr(benchmark_suites_report, "_plot", plot)
    report = write_report(tmp_path)
    assert beside == {"DMC-MT2": {"walker-walk"}, "walker-walk": set(), "walker-walk-2-envs": set()}
    assert f"m3po seed {CRASHES} CRASHED" in report
    summary = json.loads((tmp_path / "summary.json").read_text())
    figures = {"training": 30.0, "prior": 40.0, "planner": 50.0, "seconds": 9.0}
    assert summary["walker-walk"]["walker-walk"] == {
        "m3po": {"11": figures, "12": figures},
        "ppo-long": {"11": figures},
    }
    assert summary["walker-walk-2-envs"] == {"walker-walk": {"m3po": {"11": figures}}}  # not mixed with the others
    together = {"training": 0.2, "prior": 0.25, "planner": None, "seconds": 9.0}  # success, where a task has it
    assert summary["DMC-MT2"] == {task: {"ppo": {"11": together}} for task in ("cup-catch", "walker-walk")}
    for name in ("walker-walk", "walker-walk-2-envs", "DMC-MT2"):
        assert (tmp_path / f"{name}.png").stat().st_size > 5000


def test_arms_fill_the_budget_of_an_experiment(calls):
    """However long their rollouts are; ``ppo-long`` has five times as much of it."""
    assert set(ARMS).isdisjoint(STORED)
    assert set(ARMS) | set(STORED) == set(ARM_COLOURS)
    for experiment in (e for group in GROUPS.values() for e in group):
        for name, arm in ARMS.items():
            share = rollouts(experiment, name) / experiment.steps * (5 if name != "ppo-long" else 1)
            if name == "ppo-rollouts-of-64":  # not every budget is a whole number of them
                assert 5 / 64 - 5 / experiment.steps < share <= 5 / 64, (experiment, name)
            else:
                assert share in (5 / 8, 5 / 16, 5 / 32), (experiment, name)
            calls.clear()
            run(experiment, name, 11)
            (command,) = calls
            assert command[command.index("--algo") + 1] == arm.algo
            assert command[command.index("--num_envs") + 1] == str(experiment.num_envs)
            assert all(override in command for override in arm.overrides)


def test_rollouts_are_as_long_as_the_task_has_them():
    """Of a single Isaac Lab task, PPO and the paper's mode keep the task's own."""
    ant, walker = Experiment("Isaac-Ant-v0", 256, 640), Experiment("walker-walk", 64, 640)
    assert [rollouts(ant, arm) for arm in ("m3po", "m3po-paper", "ppo", "ppo-long")] == [80, 20, 20, 100]
    assert [rollouts(walker, arm) for arm in ("m3po", "m3po-paper", "ppo", "ppo-long")] == [80, 40, 40, 200]


def test_stored_runs_are_those_of_their_arms_and_those_of_version_0_1_are_drawn(calls, tmp_path):
    """A stored run is not repeated, so that it must not stand in for another arm."""
    runs = benchmark_suites_report.load(benchmark_suites.ROOT / "benchmarks" / "suites")
    assert len(runs) > 50
    for stored in runs:
        assert stored["arm"] in ARM_COLOURS, stored["arm"]
        if stored["arm"] in ARMS and stored["arm"] != "ppo-core":  # which was --algo ppo
            assert set(ARMS[stored["arm"]].overrides) <= set(stored["command"].split()), stored["command"]
    run(WALK, "m3po", 11)
    (tmp_path / "walker-walk" / "m3po").rename(tmp_path / "walker-walk" / "m3po-0.1")
    path = tmp_path / "walker-walk" / "m3po-0.1" / "seed11" / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"arm": "m3po-0.1"}))
    assert "m3po-0.1" in DEFAULTS
    assert "m3po-0.1" in write_report(tmp_path)
    assert (tmp_path / "walker-walk.png").stat().st_size > 5000


@pytest.mark.parametrize("task", ["walker-walk", "walker-walk,cup-catch"])
def test_the_core_is_m3po_with_all_its_parts_off(task):
    """What the stored arm of that name was, as far as today's fields tell."""
    cfg = prepared(task, "ppo-core")
    algorithm = cfg["algorithm"]
    assert (cfg["num_steps_per_env"], algorithm["value_loss_coef"], algorithm["lam"]) == (16, 1.0, 0.95)
    off = [algorithm[part]["steps_per_iteration"] for part in ("world_model", "critic_replay")]
    off += [algorithm["planner"]["share"], algorithm["planner"]["max_learning_kl"], algorithm["bonus"]["size"]]
    off += [algorithm["std_learning_rate"], algorithm["policy_average_decay"]]
    assert off == [0] * len(off)


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_can_be_started(arm):
    """Its overrides are fields, and fit each other; those of M3PO's parts change the default."""
    cfg, default = prepared("walker-walk", arm), prepared("walker-walk", "m3po")
    assert (cfg["algorithm"] == default["algorithm"]) is (arm == "m3po")


def prepared(task, arm):
    """Runner configuration of an arm."""
    settings = ARMS[arm]
    options = ["--task", task, "--device", "cpu", "--algo", settings.algo, "--agent", settings.agent]
    return suite_job.make_job(*options, *settings.overrides).train_cfg
