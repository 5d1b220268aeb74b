"""The training benchmark: its figures, what it runs and repeats, crashes, mistakes, and one small real measurement."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from benchmarks import training
from benchmarks.processes import Finished, run_python
from m3po.cli.arguments import guarded

COLUMNS = ("time_collect", "time_update", "time_physics", "time_act", "time_plan", "time_policy", "time_model")
M3PO_ROWS = ((90.0, 60.0, 9.0, 9.0, 0.0, 9.0, 9.0),) + 2 * ((1.0, 1.0, 0.4, 0.1, 0.3, 0.5, 0.6),)
"""Compilation, then iterations of 2 s, of which 0.1 s are not timed apart."""

PPO_ROWS = ((90.0, 60.0, 9.0, 9.0, 0.0, 9.0, 0.0),) + 2 * ((0.6, 0.4, 0.4, 0.1, 0.0, 0.4, 0.0),)


def columns(rows, scale=1.0):
    return {name: [scale * row[i] for row in rows] for i, name in enumerate(COLUMNS)}


def record(algorithm="m3po", num_envs=10, rows=M3PO_ROWS, scale=1.0, memory=100.0):
    """A stored run of 4 steps per rollout."""
    iterations = columns(rows, scale)
    if algorithm == "m3po":
        iterations["planner/planned_fraction"] = [0.0, *[0.5] * (len(rows) - 1)]
    run = {"algorithm": algorithm, "num_envs": num_envs, "num_steps": 4, "peak_memory_mib": memory}
    return run | {"iterations": iterations}


def line(table, start):
    """The words of the only line of a table that starts so."""
    (found,) = (words for words in map(str.split, table.splitlines()) if words[: len(start)] == start)
    return found


def test_figures_of_a_run_are_those_of_its_later_iterations():
    rows = (*M3PO_ROWS, (8.0, 8.0, 0.4, 0.1, 0.3, 0.5, 0.6))  # an outlier that the median ignores
    figures = training.figures(record(rows=rows), warmup=1)
    assert figures["steps_per_second"] == pytest.approx(20.0)  # 10 environments x 4 steps in 2 s
    assert figures["ms_per_step"] == pytest.approx(500.0)  # 2 s for 4 steps of all environments
    expected = {"physics": 100, "act": 25, "policy": 125, "plan": 75, "model": 150, "other": 25}
    assert figures["split_ms"] == pytest.approx(expected)
    assert figures["planned"] == 0.5
    # without dropping: totals 150, 2, 2, 16
    assert training.figures(record(rows=rows), warmup=0)["ms_per_step"] == pytest.approx(9.0 / 4 * 1000)


def test_rows_are_medians_over_runs_with_ratio_and_criterion():
    runs = [record(), record(scale=2.0, memory=300.0), record(scale=4.0), record("ppo", rows=PPO_ROWS, memory=80.0)]
    runs += [record(num_envs=20, scale=1.5)]
    m3po, ppo, alone = training.summarise(runs, warmup=1)
    assert (m3po["algorithm"], m3po["num_envs"], m3po["runs"], m3po["crashed"]) == ("m3po", 10, 3, 0)
    assert (m3po["steps_per_second"], m3po["slowest"], m3po["fastest"]) == pytest.approx((10.0, 5.0, 20.0))
    assert m3po["ms_per_step"] == pytest.approx(1000.0)
    assert m3po["peak_memory_mib"] == 300.0
    assert ppo["steps_per_second"] == pytest.approx(40.0)
    assert (m3po["ratio_to_ppo"], ppo["ratio_to_ppo"]) == pytest.approx((0.25, 1.0))
    assert m3po["extra_to_rest"] == pytest.approx(225 / 275)  # plan 75 + model 150 of 500
    assert "extra_to_rest" not in ppo
    assert alone["steps_per_second"] == pytest.approx(80 / 3)
    assert "ratio_to_ppo" not in alone

    table = training.table([m3po, ppo, alone])
    words = ["10", "5-20", "1000.00", "0.25", "20.0%", "5.0%", "25.0%", "15.0%", "30.0%", "5.0%", "50%", "300", "-"]
    assert line(table, ["10", "m3po"])[2:] == words
    words = ["40", "40-40", "250.00", "1.00", "40.0%", "10.0%", "40.0%", "0.0%", "0.0%", "10.0%", "0%", "80", "-"]
    assert line(table, ["10", "ppo"])[2:] == words
    assert line(table, ["20", "m3po"])[5] == "-"
    assert f"{training.CRITERION}: 10 environments yes (0.82), 20 environments yes (0.82)" in table
    assert "not timed" not in table


def test_criterion_fails_where_planning_and_model_cost_more():
    dear = ((1.0, 1.0, 0.2, 0.1, 0.7, 0.3, 0.6),)
    table = training.table(training.summarise([record(rows=dear)], 0))
    assert "10 environments NO (1.86)" in table  # 1.3 of 2 s


def test_parts_that_are_not_timed_are_named_and_left_in_other():
    run = record()
    for name in ("time_act", "time_policy", "time_model"):
        del run["iterations"][name]
    rows = training.summarise([run], 1)
    assert rows[0]["split_ms"] == pytest.approx({"physics": 100, "plan": 75, "other": 325})
    table = training.table(rows)
    assert "contained in 'other': act, policy, model" in table
    assert "not measured" in table


def test_plot_is_written_with_crashes_too(tmp_path):
    crashed = {"algorithm": "ppo", "num_envs": 20, "crashed": True}
    rows = training.summarise([record(), record("ppo", rows=PPO_ROWS), record(num_envs=20), crashed], 1)
    training.plot(rows, "task", tmp_path / "some.png")
    training.plot(training.summarise([crashed], 1), "task", tmp_path / "none.png")
    assert (tmp_path / "some.png").stat().st_size > 10_000
    assert (tmp_path / "none.png").stat().st_size > 0


# -- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch):
    """Replace the trainings by ones that write what those would have written. PPO in 32 environments crashes."""
    calls = []

    def fake(arguments):
        calls.append(arguments)
        if "ppo" in arguments and "32" in arguments:
            return Finished(-9, "x" * 5000 + "the end", 50.0)
        folder = Path(arguments[arguments.index("--log_root") + 1]) / "run"
        folder.mkdir(parents=True)
        manifest = {"versions": {"torch": "1"}, "torch_threads": 1, "configuration": "long"}
        (folder / "run.json").write_text(json.dumps(manifest))
        with open(folder / "progress.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow((*COLUMNS, "mean_return"))
            writer.writerows((*row, "") for row in (M3PO_ROWS if "m3po" in arguments else PPO_ROWS))
        return Finished(0, "[m3po] preset: default, cpu\n", 123.0)

    monkeypatch.setattr(training, "run_python", fake)
    return calls


@pytest.fixture
def benchmark(tmp_path):
    """Call the benchmark's command; returns its exit code."""
    fixed = ["--task", "Isaac-Ant-v0", "--num_steps", "4", "--iterations", "3", "--warmup", "1"]
    return lambda *more: guarded(training.main, [*fixed, "--output", str(tmp_path), *more])


def test_every_round_runs_everything_once_in_another_order(calls, benchmark, tmp_path):
    assert benchmark("--num_envs", "16", "8", "--rounds", "2", "--overrides", "agent.a=1", "agent.b=2") == 0
    ran = [tuple(call[call.index(name) + 1] for name in ("--algo", "--num_envs", "--seed")) for call in calls]
    first = [("m3po", "8"), ("ppo", "8"), ("m3po", "16"), ("ppo", "16")]
    assert ran == [(*pair, "1") for pair in first] + [(*pair, "2") for pair in first[2:] + first[:2]]
    for call in calls:
        assert call[call.index("--eval_interval") + 1] == "0"
        assert call[call.index("--max_iterations") + 1] == "3"
        assert "agent.num_steps_per_env=4" in call
        own = ["agent.a=1", "agent.b=2"]
        assert [part for part in own if part in call] == (own if "m3po" in call else [])

    stored = json.loads((tmp_path / "Isaac-Ant-v0-cpu" / "m3po-8-2.json").read_text())
    assert stored["manifest"] == {"versions": {"torch": "1"}, "torch_threads": 1}
    assert stored["iterations"] == columns(M3PO_ROWS)
    assert (stored["peak_memory_mib"], stored["return_code"]) == (123.0, 0)
    assert stored["command"].startswith("scripts/train.py --task Isaac-Ant-v0 --algo m3po --num_envs 8 ")
    report = json.loads((tmp_path / "Isaac-Ant-v0-cpu.json").read_text())
    assert report["versions"] == {"torch": "1"}
    assert report["figures"][0]["steps_per_second"] == pytest.approx(16.0)  # 8 environments x 4 steps in 2 s
    assert (tmp_path / "Isaac-Ant-v0-cpu.png").stat().st_size > 10_000


def test_stored_runs_are_not_repeated_and_crashes_reported(calls, benchmark, tmp_path, capsys):
    for _ in range(2):
        assert benchmark("--num_envs", "8", "32", "--rounds", "1") == 0
    assert len(calls) == 4
    crashed = json.loads((tmp_path / "Isaac-Ant-v0-cpu" / "ppo-32-1.json").read_text())
    assert crashed["crashed"]
    assert crashed["return_code"] == -9
    assert len(crashed["output"]) == 2000
    assert crashed["output"].endswith("the end")
    assert "\n    32 ppo         (1 crashed)\n" in capsys.readouterr().out

    assert benchmark("--num_envs", "8", "--rounds", "2") == 0  # one more round
    assert len(calls) == 6


def test_run_of_another_command_is_neither_used_nor_lost(calls, benchmark, tmp_path, capsys):
    assert benchmark("--num_envs", "8", "--rounds", "1") == 0
    before = (tmp_path / "Isaac-Ant-v0-cpu" / "m3po-8-1.json").read_text()
    assert benchmark("--num_envs", "8", "--rounds", "1", "--overrides", "agent.a=1") == 2
    assert len(calls) == 2
    assert "m3po-8-1.json' holds a run of another command" in capsys.readouterr().err
    assert (tmp_path / "Isaac-Ant-v0-cpu" / "m3po-8-1.json").read_text() == before


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--num_envs", "8", "0"), "--num_envs: must be at least 1, got 0"),
        (("--num_envs", "many"), "expected an integer, got 'many'"),
        (("--rounds", "0"), "--rounds: must be at least 1, got 0"),
        (("--warmup", "3"), "--warmup (3) must be below --iterations (3)"),
        (("--iteration", "3"), "--iteration"),
        (("--output", "/dev/null/results"), "cannot write the folder '/dev/null/results'"),
    ],
)
def test_mistake_gets_one_line_and_exit_code_2(calls, benchmark, capsys, options, expected):
    assert benchmark(*options) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    assert expected in err
    assert not calls
    assert "benchmark" not in out


def test_unknown_task_is_a_mistake_that_leaves_nothing(run_script, tmp_path):
    options = ("--task", "Isaac-Antt-v0", "--num_envs", "8", "--output", str(tmp_path))
    result = run_script(["-m", "benchmarks", "training", *options], timeout=120)
    assert result.rc == 2
    assert result.stderr.startswith("error: unknown task 'Isaac-Antt-v0'. Closest: Isaac-Ant,")
    assert len(result.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_peak_memory_and_exit_code_are_those_of_the_process():
    result = run_python(["-c", "import sys; print('out'); bytearray(300 * 2**20); sys.exit('err')"])
    assert result.returncode == 1
    assert result.stdout.splitlines() == ["out", "err"]
    assert 300 < result.peak_memory_mib < 400
    killed = run_python(["-c", "import os; os.kill(os.getpid(), 9)"])
    assert killed.returncode == -9


@pytest.mark.sim
def test_both_algorithms_are_measured(run_script, tmp_path):
    options = ("--num_envs", "16", "--iterations", "3", "--warmup", "2", "--rounds", "1", "--output", tmp_path)
    # without the gradient's gate, the whole share acts by plans from the first step on
    planning = ("planner.planned_fraction=0.1", "planner.max_learning_kl=0.0", "world_model.steps_per_iteration=4")
    planning = [f"agent.algorithm.{override}" for override in planning]
    command = ["-m", "benchmarks", "training", "--task", "Isaac-Cartpole-v0", *options, "--overrides", *planning]
    result = run_script(command, timeout=600)
    assert result.rc == 0, result.stdout[-3000:] + result.stderr[-3000:]
    m3po, ppo = json.loads((tmp_path / "Isaac-Cartpole-v0-cpu.json").read_text())["figures"]
    for row in (m3po, ppo):
        assert row["runs"] == 1, result.stdout
        assert row["steps_per_second"] > 0
        assert row["split_ms"]["physics"] > 0
        assert row["split_ms"]["other"] >= 0
        assert sum(row["split_ms"].values()) == pytest.approx(row["ms_per_step"])
        assert row["peak_memory_mib"] > 300
    # A tenth of 16 environments.
    assert m3po["planned"] == 2 / 16
    assert m3po["split_ms"]["plan"] > 0
    assert ppo["split_ms"]["plan"] == 0
    stored = json.loads((tmp_path / "Isaac-Cartpole-v0-cpu" / "m3po-16-1.json").read_text())
    assert len(stored["iterations"]["time_physics"]) == 3
    assert stored["manifest"]["versions"]["isaaclab"] == "3.0.0"
    assert (tmp_path / "Isaac-Cartpole-v0-cpu.png").stat().st_size > 10_000
