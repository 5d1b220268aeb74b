"""Statistics per task and what is written of them: the console's table, ``tasks.csv``, TensorBoard, evaluations."""

import csv
import math
import sys
from collections import deque
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from toy_env import PointEnv, runner_cfg

from m3po.runners import M3PORunner
from m3po.runners.episode_statistics import EpisodeStatistics, capped_score
from m3po.runners.reporting import COLUMNS, EVALUATION_FIELDS, TASK_FIELDS, Reporter, console_block, console_line

NAMES = ("reach", "walk", "free")
IDS = torch.tensor([0, 0, 0, 1, 1, 2])
RANGES = (None, (0.0, 10.0), None)
"""A task that reports success, one with a range of returns, one with neither."""


def build(names=NAMES, ids=IDS, ranges=RANGES):
    return EpisodeStatistics(len(ids), "cpu", names, ids, ranges)


def random_steps(count, seed, reports_success=True):
    """Steps of the six environments: rewards, ends and extras; the second task has invalid steps now and then."""
    generator = torch.Generator().manual_seed(seed)

    def draw():
        return torch.rand(6, generator=generator)

    for _ in range(count):
        rewards = draw() * torch.tensor([1.0, 1.0, 1.0, 5.0, 5.0, 100.0])
        dones, extras = draw() < 0.3, {}
        if reports_success:
            extras["success"] = torch.where(IDS == 0, (draw() < 0.5).float(), torch.nan)
        if draw()[0] < 0.2:
            extras["invalid"] = IDS == 1
            dones, rewards = dones | extras["invalid"], rewards.masked_fill(extras["invalid"], 0.0)
        yield rewards, dones, extras


class Ledger:
    """The same statistics, one environment after the other in plain Python."""

    def __init__(self):
        self.windows = [deque(maxlen=100) for _ in NAMES]
        self.running = [(0.0, 0)] * len(IDS)
        self.rewards, self.episodes = [[], [], []], [0, 0, 0]

    def add(self, rewards, dones, extras):
        for env, task in enumerate(IDS.tolist()):
            if "invalid" in extras and extras["invalid"][env]:
                self.running[env] = (0.0, 0)
                continue
            total, length = self.running[env]
            total, length = total + rewards[env].item(), length + 1
            self.rewards[task].append(rewards[env].item())
            if dones[env]:
                success = extras["success"][env].item() if "success" in extras else math.nan
                self.windows[task].append((total, length, success))
                self.episodes[task] += 1
                total, length = 0.0, 0
            self.running[env] = (total, length)


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def test_agrees_with_bookkeeping_one_environment_at_a_time():
    statistics, ledger = build(), Ledger()
    for seed in range(3):  # iterations; the windows go on, rewards and counts start again
        ledger.rewards, ledger.episodes = [[], [], []], [0, 0, 0]
        for step in random_steps(500, seed):
            statistics.add(*step)
            ledger.add(*step)
        result = statistics.read()
        for k, name in enumerate(NAMES):
            window = ledger.windows[k]
            assert len(window) == 100
            assert result[f"task/{name}/return"] == pytest.approx(mean(w[0] for w in window), rel=1e-5)
            assert result[f"task/{name}/length"] == pytest.approx(mean(w[1] for w in window))
            assert result[f"task/{name}/episodes"] == ledger.episodes[k]
            assert result[f"task/{name}/step_reward"] == pytest.approx(mean(ledger.rewards[k]), rel=1e-5)
            assert result[f"task/{name}/share"] == pytest.approx((3, 2, 1)[k] / 6)
        assert result["task/reach/success"] == pytest.approx(mean(w[2] for w in ledger.windows[0]))
        for total, field in (("mean_return", "return"), ("mean_length", "length"), ("mean_step_reward", "step_reward")):
            assert result[total] == pytest.approx(mean(result[f"task/{name}/{field}"] for name in NAMES))
        assert result["episodes"] == sum(ledger.episodes)


def test_scores_by_hand():
    statistics = build()
    ones = torch.ones(6, dtype=torch.bool)
    success = torch.tensor([1.0, 0.0, 0.0, torch.nan, torch.nan, torch.nan])
    statistics.add(torch.tensor([9.0, 9.0, 9.0, 4.0, 8.0, -5.0]), ones, {"success": success})
    result = statistics.read()
    assert result["task/reach/score"] == result["task/reach/success"] == pytest.approx(1 / 3)
    assert result["task/walk/score"] == pytest.approx(0.6)  # mean return 6 of 10
    assert not {"task/walk/success", "task/free/success", "task/free/score"} & result.keys()
    assert result["success"] == pytest.approx(1 / 3)  # of the one task that reports it
    assert result["score_mean"] == pytest.approx((1 / 3 + 0.6) / 2)
    assert result["score_min"] == pytest.approx(1 / 3) and result["score_tasks"] == 2
    assert result["mean_return"] == pytest.approx((9.0 + 6.0 - 5.0) / 3)

    # Far above its range the return counts as 1, below it as 0.
    assert [capped_score(value, (-2.0, 2.0)) for value in (-3.0, -2.0, 0.0, 1.0, 2.0, 9.0)] == [0, 0, 0.5, 0.75, 1, 1]


def test_a_success_rate_in_a_tasks_log_is_its_success():
    """Isaac Lab's tasks log a rate instead of telling of each episode; it is known until the next reset's."""
    statistics = build()
    everyone, none = torch.ones(6, dtype=torch.bool), torch.zeros(6, dtype=torch.bool)
    log = {"walk/Metrics/success_rate": 0.25, "walk/Episode_Reward/success_rate": 0.9, "free/Metrics/error": 3.0}
    statistics.add(torch.ones(6), everyone, {"log": log})
    statistics.add(torch.ones(6), none, {"log": {"walk/Metrics/success_rate": 0.75}})
    for _ in range(2):
        result = statistics.read()
        assert result["task/walk/success"] == result["task/walk/score"] == result["success"] == 0.5
        assert "task/free/success" not in result
        statistics.add(torch.ones(6), none, {})
    # Episodes that tell of their success themselves are more exact.
    statistics.add(torch.ones(6), everyone, {"success": torch.ones(6), "log": log})
    result = statistics.read()
    assert result["task/walk/success"] == 1.0 and result["walk/Metrics/success_rate"] == 0.25


def test_invalid_episodes_do_not_count():
    statistics = build()
    none, everyone = torch.zeros(6, dtype=torch.bool), torch.ones(6, dtype=torch.bool)
    statistics.add(torch.ones(6), none, {})
    invalid = IDS == 1
    statistics.add(torch.where(invalid, 0.0, 1.0), invalid, {"invalid": invalid})
    result = statistics.read()
    assert result["episodes"] == 0 and "mean_return" not in result and "score_mean" not in result
    assert result["task/walk/step_reward"] == 1.0  # the invalid step had no reward
    statistics.add(torch.ones(6), everyone, {})
    result = statistics.read()
    assert [result[f"task/{name}/return"] for name in NAMES] == [3.0, 1.0, 3.0]
    statistics.add(torch.zeros(6), invalid, {"invalid": invalid})
    result = statistics.read()
    assert "task/walk/step_reward" not in result  # it made no step at all
    assert result["mean_step_reward"] == 0.0


def test_one_task_has_the_names_it_always_had():
    rewards, ends = torch.tensor([1.0, 3.0]), torch.ones(2)
    plain = EpisodeStatistics(2, "cpu")
    plain.add(rewards, ends, {})
    expected = {"mean_step_reward": 2.0, "episodes": 2, "mean_return": 2.0, "mean_length": 1.0}
    assert plain.read() == expected
    # A suite that reports success fills the column of Isaac Lab's success metric.
    plain.add(rewards, ends, {"success": torch.tensor([1.0, 0.0])})
    assert plain.read() == expected | {"success": 0.5}


def test_an_environment_says_whether_it_has_several_tasks():
    plain = EpisodeStatistics.of(SimpleNamespace(num_envs=6), "cpu")
    env = SimpleNamespace(num_envs=6, task_names=list(NAMES), task_ids=IDS, score_ranges=list(RANGES))
    several = EpisodeStatistics.of(env, "cpu")
    for statistics in (plain, several):
        statistics.add(torch.ones(6), torch.ones(6, dtype=torch.bool), {})
    assert not any(key.startswith("task/") for key in plain.read())
    assert several.read()["task/walk/score"] == 0.1


def test_adding_a_step_never_waits_for_the_device():
    """Tensors on the meta device have no values: whatever asks for one fails, as reading must and adding must not."""
    statistics = EpisodeStatistics(6, "meta", NAMES, IDS, RANGES)
    for rewards, dones, extras in random_steps(10, 0):
        extras = {key: value.to("meta") for key, value in extras.items()}
        statistics.add(rewards.to("meta"), dones.to("meta"), extras)
    with pytest.raises((NotImplementedError, RuntimeError), match=r"(?i)meta"):
        statistics.read()


# -- what is written --------------------------------------------------------------------------------------------------


def report_row(iteration, statistics):
    row = {name: 1.0 for name in COLUMNS if name not in ("mean_return", "mean_length", "success", "episodes")}
    return row | {"iteration": iteration, "env_steps": 600 * (iteration + 1), **statistics.read()}


def read(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_files_of_several_tasks(tmp_path):
    statistics, reporter, results = build(), Reporter(str(tmp_path)), []
    for iteration in range(2):
        for step in random_steps(40, iteration):
            statistics.add(*step)
        results.append(report_row(iteration, statistics))
        reporter.report(results[-1], {"value": 0.5}, {"planner/kl": 0.1})
    reporter.close()

    rows = read(tmp_path / "tasks.csv")
    assert list(rows[0]) == ["iteration", "env_steps", "seconds", "task", *TASK_FIELDS]
    assert [(row["iteration"], row["task"]) for row in rows] == [(i, name) for i in "01" for name in NAMES]
    assert [int(row["env_steps"]) for row in rows] == [300, 200, 100, 600, 400, 200]
    for i, row in enumerate(rows):
        for field in TASK_FIELDS:
            value = results[i // 3].get(f"task/{row['task']}/{field}")
            assert row[field] == "" if value is None else float(row[field]) == pytest.approx(value, rel=1e-5)
    assert rows[2]["score"] == "" and rows[1]["score"] != ""

    progress = read(tmp_path / "progress.csv")
    added = ["score_mean", "score_min", "score_tasks"]
    assert list(progress[0]) == [*COLUMNS, *added, "loss/value", "planner/kl"]
    assert float(progress[1]["score_mean"]) == pytest.approx(results[1]["score_mean"], rel=1e-5)

    events = EventAccumulator(str(tmp_path)).Reload()
    scalar = {tag: events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"]}
    for tag, name in (
        ("Train/score_mean", "score_mean"),
        ("Train/score_min", "score_min"),
        ("Train/mean_reward", "mean_return"),
        *((f"Task/{task}/{field}", f"task/{task}/{field}") for task in NAMES for field in ("return", "step_reward")),
        ("Task/reach/success", "task/reach/success"),
    ):
        assert scalar[tag] == pytest.approx(results[-1][name], rel=1e-5), tag
    assert not any(tag.startswith("task/") or tag.endswith("/share") for tag in scalar)
    assert "Task/free/score" not in scalar


def test_one_task_writes_the_files_it_always_wrote(tmp_path):
    statistics, reporter = EpisodeStatistics(2, "cpu"), Reporter(str(tmp_path))
    statistics.add(torch.ones(2), torch.ones(2), {"log": {"Metrics/success_rate": 0.25}})
    reporter.report(report_row(0, statistics), {"value": 0.5}, {"planner/kl": 0.1})
    reporter.report_evaluation({"iteration": 0, "prior": {"return_mean": 1.0, "success_rate": None}, "planner": None})
    reporter.close()
    (progress,) = read(tmp_path / "progress.csv")
    assert list(progress) == [*COLUMNS, "loss/value", "planner/kl"] and progress["success"] == "0.25"
    (evaluation,) = read(tmp_path / "evaluations.csv")
    assert list(evaluation) == ["iteration", "policy", *EVALUATION_FIELDS]
    assert not list(tmp_path.glob("task*"))


def test_evaluations_of_several_tasks(tmp_path):
    reporter = Reporter(str(tmp_path))

    def outcome(value):
        return dict.fromkeys(EVALUATION_FIELDS, value) | {"score": value / 10}

    for iteration in (4, 9):
        prior = {"return_mean": 3.0, "score_mean": 0.15, "tasks": {"reach": outcome(1.0), "walk": outcome(2.0)}}
        planner = {"return_mean": 4.0, "tasks": {"reach": outcome(5.0), "walk": outcome(6.0) | {"success_rate": None}}}
        reporter.report_evaluation({"iteration": iteration, "prior": prior, "planner": planner})
    totals = read(tmp_path / "evaluations.csv")
    assert [(r["iteration"], r["policy"], r["return_mean"]) for r in totals] == [
        ("4", "prior", "3.0"),
        ("4", "planner", "4.0"),
        ("9", "prior", "3.0"),
        ("9", "planner", "4.0"),
    ]
    rows = read(tmp_path / "task_evaluations.csv")
    assert list(rows[0]) == ["iteration", "policy", "task", *EVALUATION_FIELDS, "score"]
    assert [(r["policy"], r["task"], r["return_mean"], r["score"]) for r in rows[:4]] == [
        ("prior", "reach", "1.0", "0.1"),
        ("prior", "walk", "2.0", "0.2"),
        ("planner", "reach", "5.0", "0.5"),
        ("planner", "walk", "6.0", "0.6"),
    ]
    assert len(rows) == 8 and rows[3]["success_rate"] == ""


def test_the_console_has_an_aligned_row_per_task():
    statistics = build()
    everyone = torch.ones(6, dtype=torch.bool)
    success = torch.where(IDS == 0, 1.0, torch.nan)
    statistics.add(torch.tensor([9.0, 9.0, 9.0, 4.0, 8.0, -12345.5]), everyone, {"success": success})
    row = report_row(0, statistics) | {"walk/Episode_Reward/alive": 1.0}
    text = console_block("Iteration 1/2", row, {}, {}, 0.0)
    assert "alive" not in text
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("task "))
    table = lines[start : start + 4]
    assert len({len(line) for line in table}) == 1
    assert [line.split() for line in table[1:]] == [
        ["reach", "9.00", "1.0", "1.000", "1.000", "9.0000"],
        ["walk", "6.00", "1.0", "-", "0.600", "6.0000"],
        ["free", "-12345.50", "1.0", "-", "-", "-12345.5000"],
    ]
    assert "Mean return (mean over 3 tasks): -4110.17" in text
    assert "Score, mean of 2 tasks: 0.800" in text and "Lowest score: 0.600 (walk)" in text
    assert "task/" not in text and "not shown" not in text


def test_of_many_tasks_the_console_shows_the_lowest_scores():
    count = 27
    ids = torch.arange(count)
    ranges = [(0.0, 100.0)] * 25 + [None] * 2
    statistics = build([f"t{k:02}" for k in range(count)], ids, ranges)
    returns = torch.tensor([float(7 * k % 25) for k in range(25)] + [0.0, 0.0])
    statistics.add(returns, torch.ones(count, dtype=torch.bool), {})
    lines = console_block("Iteration 1/2", report_row(0, statistics), {}, {}, 0.0).splitlines()
    shown = [line.split() for line in lines if line.startswith("t") and line[1:3].isdigit()]
    assert [float(cells[1]) for cells in shown] == [float(k) for k in range(20)]
    assert "7 tasks with higher scores, or none, are not shown." in lines


def test_the_console_leaves_out_what_is_off():
    row = dict.fromkeys(COLUMNS, 1.0) | {"env_steps": 600, "Episode_Reward/alive": 0.0, "Episode_Reward/energy": -0.5}
    losses, metrics = {"value": 0.0, "surrogate": 0.25}, {"plan/kl": 0.0, "plan/gain": 0.5}
    text = console_block("Iteration 1/2", row, losses, metrics, 0.0)
    assert not any(name in text for name in ("value", "plan/kl", "alive"))
    assert all(line in text for line in ("loss/surrogate: 0.2500", "plan/gain: 0.5000", "energy: -0.5000"))


def test_a_line_says_the_most_important():
    statistics = build()
    everyone = torch.ones(6, dtype=torch.bool)
    statistics.add(torch.arange(6.0), everyone, {"success": torch.where(IDS == 0, 1.0, torch.nan)})
    row = report_row(0, statistics)
    line = console_line("Iteration 1/2", row, 61.0)
    assert "\n" not in line
    assert line.startswith("[m3po] Iteration 1/2: ")
    for part in (f"{row['env_steps']:,} steps", "return ", "length 1", "success 1", "score ", "0:01:01 left"):
        assert part in line, part


@pytest.mark.parametrize(
    ("options", "terminal", "quiet"), [({}, True, False), ({}, False, True), ({"quiet": False}, False, False)]
)
def test_a_run_prints_blocks_on_a_terminal_and_lines_elsewhere(capsys, monkeypatch, options, terminal, quiet):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    M3PORunner(PointEnv(8), runner_cfg() | options, None, "cpu").learn(2)
    text = capsys.readouterr().out
    assert text.count("Iteration 2/2") == 1
    assert ("[m3po] Iteration 2/2: " in text) == quiet
    assert ("Steps per second:" in text) != quiet
