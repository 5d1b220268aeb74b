"""The learning benchmark: finished runs are not repeated, crashes are reported, figures are those of the curves."""

import csv
import dataclasses
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

from benchmarks import __main__ as command_line
from benchmarks import report, runner
from benchmarks.report import interval, is_reward, load, reached, rival_levels, smooth, write_report
from benchmarks.runner import ARMS, DATA, run, runs_on, short
from m3po.cli import suite_job
from m3po.cli.overrides import assign, parse_value
from m3po.config import AlgorithmCfg
from m3po.errors import UserError
from m3po.validation import validate

CRASHES = 13
OURS = [name for name, arm in ARMS["arms"].items() if arm.get("algo", "m3po") == "m3po" and "agent" not in arm]


@pytest.fixture
def calls(monkeypatch, tmp_path):
    """Replace trainings by processes that write what those would have written; one seed crashes."""
    calls = []

    def table(path, header, *rows):
        with open(path, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows((header, *rows))

    def fake(words):
        calls.append(words)
        if str(CRASHES) in words:
            return subprocess.CompletedProcess(words, 1, "something broke")
        folder = Path(words[words.index("--log_root") + 1]) / "run"
        folder.mkdir(parents=True)
        tasks = words[words.index("--task") + 1].replace("-v0", "").split(",")
        manifest = {"tasks": tasks, "versions": {"torch": "1"}, "git": {}, "environment": "secret"}
        (folder / "run.json").write_text(json.dumps(manifest))
        head = ("iteration", "env_steps", "seconds", "mean_step_reward", "mean_return", "action_std", "unwanted")
        table(folder / "progress.csv", head, (0, 8192, 2.0, 1.0, "", 0.123456, 0), (1, 16384, 4.0, 3.0, 30.0, 0.1, 0))
        if len(tasks) == 1:
            rows = [("prior", 1), ("prior", 40), ("planner", 50)]
            table(folder / "evaluations.csv", ("policy", "return_mean"), *rows)
        else:
            rows = [(32 * k, k, task, 5 * k, 0.1 * k) for k in (1, 2) for task in tasks]
            table(folder / "tasks.csv", ("env_steps", "seconds", "task", "return", "success"), *rows)
            rows = [(task, "prior", 7, 0.25) for task in tasks]
            table(folder / "task_evaluations.csv", ("task", "policy", "return_mean", "success_rate"), *rows)
        return subprocess.CompletedProcess(words, 0, "")

    monkeypatch.setattr(runner, "run_python", fake)
    monkeypatch.setattr(runner, "iterations", lambda *_: 2)
    monkeypatch.setattr(runner, "DATA", tmp_path)
    return calls


def figures(folder: Path) -> dict[tuple[str, ...], dict[str, str]]:
    """Rows of ``figures.csv`` by experiment, task, arm and seed."""
    with open(folder / "figures.csv", encoding="utf-8") as file:
        return {tuple(row[key] for key in ("experiment", "task", "arm", "seed")): row for row in csv.DictReader(file)}


def test_runs_are_stored_once_and_crashes_reported(calls, tmp_path):
    for _ in range(2):
        for seed in (11, 12, CRASHES):
            run("Isaac-Ant-v0", "m3po", seed)
        run("Isaac-Ant-v0", "ppo-tuned", 11)
        run("DMC-MT6", "m3po", 11)
        run("walker-walk", "ppo", 11)
    assert len(calls) == 6
    stored = (tmp_path / "Isaac-Ant-v0" / "runs.jsonl").read_text()
    assert "something broke" in stored
    assert "secret" not in stored
    assert (tmp_path / "Isaac-Ant-v0" / "m3po.csv").read_text().splitlines() == [
        "seed,env_steps,seconds,reward,action_std,return",
        *(f"{seed},{row}" for seed in (11, 12) for row in ("8192,2,1,0.12346,", "16384,4,3,0.1,30")),
    ]
    tables = write_report(tmp_path, [])
    assert f"m3po seed {CRASHES} CRASHED" in tables
    assert "\nIsaac-Ant-v0 : interquartile mean [95 % interval] over seeds, x 1000\n" in tables
    found = figures(tmp_path)
    ant = found["Isaac-Ant-v0", "Isaac-Ant", "m3po", "11"]
    assert (float(ant["area"]), float(ant["end"]), float(ant["prior"]), float(ant["planner"])) == (2.0, 2.0, 40.0, 50.0)
    assert float(ant["ms_per_step"]) == 125.0  # 4 s for 32 steps of 512 environments
    assert (float(ant["steps_90"]), float(ant["seconds_90"])) == (16384, 4.0)  # the rival ends at 2: averages so far
    mean = found["DMC-MT6", "(mean)", "m3po", "11"]
    assert (float(mean["end"]), float(mean["prior"])) == (0.2, 0.25)  # success, where a task has it
    assert {name for name, *_ in found} == {"Isaac-Ant-v0", "DMC-MT6", "walker-walk"}
    for name in ("Isaac-Ant-v0", "DMC-MT6", "walker-walk"):
        assert (tmp_path / f"{name}.png").stat().st_size > 5000


def test_long_curves_are_thinned_and_end_where_they_end(tmp_path):
    rows = "".join(f"{k},{k},{k},1\n" for k in range(1001))
    (tmp_path / "progress.csv").write_text("env_steps,seconds,mean_return,mean_step_reward\n" + rows)
    kept = [int(row["env_steps"]) for row in runner._curves(tmp_path, ["walker-walk"])]
    assert len(kept) <= runner.MOST_ROWS
    assert kept[-1] == 1000
    assert len(set(np.diff(kept))) == 1


def test_numbers_are_short_and_nothing_else_is():
    texts = ("0.123456789", "123456.7", "16384", "1e-07", "walker-walk", "")
    assert [short(text) for text in texts] == ["0.12346", "123457", "16384", "1e-07", "walker-walk", ""]


def test_a_level_is_reached_by_the_average_over_a_window_of_steps():
    steps = np.arange(1, 11) * 10_000.0
    curve = {"steps": steps, "seconds": steps / 1000, "value": np.arange(10.0)}
    assert smooth(curve).tolist() == [0.0, 0.5, 1.0, 1.5, 2.5, 3.5, 4.5, 5.5, 6.5, 7.5]
    assert reached(curve, 3.0, True) == (60_000, 60)
    assert reached(curve, 3.0, False) == (40_000, 40)  # returns are averages already
    assert reached(curve, 7.6, True) == (np.inf, np.inf)
    falling = curve | {"value": np.arange(10.0, 0.0, -1.0)}
    assert reached(falling, 7.0, True) == (40_000, 40)  # not before a window
    longer = {"steps": steps * 8, "seconds": steps, "value": np.arange(10.0)}
    waited = {"steps": 1e4 * np.array([2, 4, 8, 9]), "value": np.array([0.0, 1.0, 4.0, 8.0])}
    assert smooth(waited).tolist() == [0.0, 0.5, 4.0, 4.8]  # the last window begins within a row of four rollouts
    assert smooth(longer).tolist() == list(range(10))  # a rollout longer than the window is its own average


def test_intervals_are_those_of_the_seeds():
    mean, low, high = interval([1.0, 2.0, 3.0, 4.0, 100.0])
    assert mean == 3.0  # the middle half: an outlier does not count
    assert 1.0 <= low < mean < high
    assert interval([5.0]) == (5.0, 5.0, 5.0)


def test_levels_of_a_rival_whose_rewards_stay_negative():
    """90 % of a negative end would lie above it: what counts is the way from the lowest point."""
    rising = np.array([5.0, -10.0, -8.0, -4.0, -2.0])
    assert rival_levels([rising, rising]) == pytest.approx({0.5: -6.0, 0.75: -4.0, 0.9: -2.8})
    positive = np.array([1.0, 2.0, 3.0, 3.0, 4.0])
    assert rival_levels([positive]) == pytest.approx({0.5: 2.0, 0.75: 3.0, 0.9: 3.6})


def test_groups_suites_rivals_and_colours_name_what_exists():
    experiments, arms = ARMS["experiments"], ARMS["arms"]
    assert {name for group in ARMS["groups"].values() for name in group} <= set(experiments)
    assert {name for suite in ARMS["suites"].values() for name in suite} <= set(arms)
    assert set(ARMS["rivals"]) <= set(arms)
    assert {task for arm in arms.values() for task in arm.get("only_on", ())} <= set(experiments)
    stored = {record["arm"] for path in DATA.glob("*/runs.jsonl") for record in runner.read_records(path.parent)}
    assert set(ARMS["colours"]) <= set(arms) | stored
    assert not set(experiments) & set(ARMS["groups"])
    assert not runs_on("ppo-tuned", "walker-walk")
    assert runs_on("ppo-tuned", "Isaac-Ant-v0")
    assert runs_on("m3po", "walker-walk")


@pytest.mark.parametrize("name", OURS)
def test_overrides_of_an_arm_of_m3po_make_a_configuration_that_can_run(name):
    """Nothing is misspelt, and no part is on whose model is off."""
    cfg = AlgorithmCfg()
    for override in ARMS["arms"][name].get("overrides", ()):
        path, text = override.split("=")
        if path.startswith("agent.algorithm."):
            before = dataclasses.asdict(cfg)
            assign(cfg, path.removeprefix("agent.algorithm."), parse_value(text), "agent.algorithm")
            assert dataclasses.asdict(cfg) != before, f"{override} is the default"
    validate(cfg, 512, 8)


@pytest.mark.parametrize("arm", [name for name in ARMS["arms"] if runs_on(name, "walker-walk")])
def test_every_arm_can_be_started(arm):
    """Its overrides are fields, and fit each other; those of M3PO's parts change the default."""
    words = runner.command("walker-walk", arm, 1)[1:]
    cfg, default = (
        suite_job.make_job(*(w for w in chosen if w != "--headless")).train_cfg
        for chosen in (words, runner.command("walker-walk", "m3po", 1)[1:])
    )
    same = {key: cfg[key] == default[key] for key in ("algorithm", "num_steps_per_env")}
    assert all(same.values()) is (arm == "m3po")


@pytest.mark.parametrize(("arm", "count"), [("m3po", 490), ("ppo", 245), ("ppo-long", 1225), ("m3po-paper", 245)])
def test_iterations_fill_the_budget_however_long_the_rollouts_are(arm, count):
    words = runner.command("walker-walk", arm, 1)
    assert runner.iterations("walker-walk", arm, words) == count


def test_an_arm_that_cannot_be_trained_says_why():
    words = [*runner.command("walker-walk", "m3po", 1), "agent.algorithm.planer.planned_fraction=1"]
    with pytest.raises(UserError, match=r"cannot be trained: error: .*planer"):
        runner.iterations("walker-walk", "m3po", words)


RENAMED = {"agent.algorithm.planner.share": "agent.algorithm.planner.planned_fraction"}
"""Fields of version 0.1 in commands as they were typed -> their names today."""


def current_name(word: str) -> str:
    name, sign, value = word.partition("=")
    return RENAMED.get(name, name) + sign + value


def test_stored_runs_are_those_of_the_arms_that_they_are_called():
    """A stored run is not repeated, so that it must not stand in for another arm."""
    records = [(path.parent, r) for path in DATA.glob("*/runs.jsonl") for r in runner.read_records(path.parent)]
    assert len(records) > 150
    for folder, record in records:
        rows = [row for row in runner.read_curves(folder, record["arm"]) if row["seed"] == str(record["seed"])]
        assert rows or record.get("crashed"), (folder, record["arm"], record["seed"])
        settings, words = ARMS["arms"].get(record["arm"]), record["command"].split()
        if settings and record["arm"] != "ppo-core":  # which was --algo ppo in version 0.1
            assert words[words.index("--algo") + 1] == settings.get("algo", "m3po")
            wanted = (*settings.get("overrides", ()), *settings.get("only_on", {}).get(folder.name, ()))
            assert set(wanted) <= {current_name(word) for word in words}, record["command"]


def test_data_are_few_and_small():
    files = [
        path for path in DATA.parent.rglob("*") if path.is_file() and path.suffix in (".csv", ".json", ".jsonl", ".png")
    ]
    assert len(files) <= 150
    assert sum(path.stat().st_size for path in files) <= 6 * 2**20


def test_what_a_curve_tells():
    """Rewards of one Isaac Lab task, success where it is told, else returns."""
    assert is_reward("Isaac-Ant", 1)
    assert not is_reward("Isaac-Ant", 3)
    ant, walk = (load(DATA / name)[0] for name in ("Isaac-Ant-v0", "walker-walk"))
    assert -1.0 < ant["curves"][ant["tasks"][0]]["value"][-1] < 1.0
    assert walk["curves"]["walker-walk"]["value"][-1] > 100.0
    (success,) = {run["curves"]["mw-reach"]["value"].max() <= 1.0 for run in load(DATA / "MT10")}
    assert success


def test_the_command_lists_what_there_is(capsys, calls):
    assert command_line.main([]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == list(command_line.COMMANDS)
    assert command_line.main(["nothing"]) == 2
    assert "unknown benchmark 'nothing'" in capsys.readouterr().err
    assert command_line.main(["run", "walker-wlak"]) == 2
    assert "walker-wlak" in capsys.readouterr().err
    assert command_line.main(["run", "frontier", "--suite", "frontier", "--seeds", "1", "--processes", "1"]) == 0
    assert len(calls) == 9


def test_runs_of_version_0_1_are_drawn_and_in_the_table(calls, tmp_path, monkeypatch):
    """Their arm exists as stored data alone."""
    labels = []
    monkeypatch.setattr(report, "_draw", lambda *args: labels.append((args[5], len(args[2]))))
    for seed in (11, 12):
        run("Isaac-Ant-v0", "m3po", seed)
    folder = tmp_path / "Isaac-Ant-v0"
    (folder / "m3po.csv").rename(folder / "m3po-0.1.csv")
    (folder / "runs.jsonl").write_text((folder / "runs.jsonl").read_text().replace('"m3po"', '"m3po-0.1"'))
    assert "\nm3po-0.1                       2" in write_report(tmp_path, [])
    assert ("m3po-0.1", 2) in labels
