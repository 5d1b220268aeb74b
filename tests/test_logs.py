"""Which logs of an environment are new: direct tasks change theirs, manager-based ones replace it."""

from typing import ClassVar

import numpy as np
import pytest
import torch
from test_task_reporting import build
from toy_env import PointEnv, runner_cfg

from m3po.envs.logs import NewLogs
from m3po.runners import M3PORunner
from m3po.runners.episode_statistics import OWN_NAMES


class Direct:
    """A log as direct tasks of Isaac Lab keep it: one dictionary, whose values are replaced at a reset."""

    def __init__(self) -> None:
        self.log: dict = {}

    def reset(self, value: float) -> None:
        self.log["Success"] = torch.tensor(value)


class Managed(Direct):
    """A log of a manager-based task: another dictionary at each reset."""

    def reset(self, value: float) -> None:
        self.log = {"Success": torch.tensor(value)}


@pytest.mark.parametrize("kind", [Direct, Managed])
def test_each_reset_counts_once(kind):
    env, logs, taken = kind(), NewLogs(), []
    for step in range(9):
        if step % 3 == 1:
            env.reset(float(step))
        taken.append({key: value.item() for key, value in logs.take(env.log).items()})
    assert taken == [{}, {"Success": 1.0}, {}, {}, {"Success": 4.0}, {}, {}, {"Success": 7.0}, {}]


def test_what_was_taken_stays_as_it_was():
    env, logs = Direct(), NewLogs()
    env.reset(1.0)
    taken = logs.take(env.log)
    env.reset(2.0)
    assert taken["Success"].item() == 1.0


def test_entries_that_come_or_go_are_new_and_no_log_is_none():
    logs, log = NewLogs(), {"a": 1.0}
    assert logs.take(None) == logs.take({}) == {}
    assert logs.take(log) == {"a": 1.0}
    assert logs.take(None) == logs.take({}) == logs.take(log) == {}
    log["b"] = 2.0
    assert logs.take(log) == {"a": 1.0, "b": 2.0}


@pytest.mark.parametrize("kind", [Direct, Managed])
def test_every_iteration_reports_the_log_of_its_resets(kind):
    env, statistics, found = kind(), build(("only",), torch.zeros(6, dtype=torch.long), (None,)), []
    nothing = torch.zeros(6)
    for iteration in range(3):
        for step in range(4):
            if step == 2:
                env.reset(float(iteration))
            statistics.add(nothing, nothing.bool(), {"log": env.log})
        found.append(next(v for k, v in statistics.read().items() if k.endswith("Success")))
    assert found == [0.0, 1.0, 2.0]


class Odd(PointEnv):
    """A task whose log holds whatever it likes."""

    log: ClassVar = {
        "note": "hello",
        "Metrics/list": [1.0, 2.0],
        "Metrics/numpy": np.float32(1.5),
        "Metrics/array": np.arange(3),
        "Metrics/empty": torch.zeros(0),
        "Metrics/nan": torch.tensor(float("nan")),
        "Metrics/none": None,
        "Metrics/dict": {"a": 1},
        "task/success": 1.0,
        "policy/clip_fraction": 77.0,
        "loss/surrogate": 78.0,
        "mean_return": 79.0,
        3: 4.0,
    }

    def step(self, actions):
        obs, rewards, dones, extras = super().step(actions)
        return obs, rewards, dones, extras | {"log": dict(self.log)}


def test_names_and_values_of_a_log_cannot_hurt_a_run(tmp_path, capsys):
    """What is no number is said once and left out; names of ours stay ours."""
    runner = M3PORunner(Odd(8), runner_cfg() | {"algo": "m3po", "task": "toy"}, str(tmp_path), "cpu")
    rows = []
    runner.reporter.report = lambda row, losses, metrics: rows.append((row, losses, metrics))
    runner.learn(3)
    out = capsys.readouterr().out
    for key in ("note", "Metrics/empty", "Metrics/nan", "Metrics/none", "Metrics/dict"):
        assert out.count(f"holds no number under '{key}'") == 1
    (row, *_), (_, losses, metrics) = rows[0], rows[-1]  # a log that stays the same is told once
    assert (row["Metrics/list"], row["Metrics/numpy"], row["Metrics/array"]) == (1.5, 1.5, 1.0)
    assert (row["Episode/task/success"], row["Episode/policy/clip_fraction"]) == (1.0, 77.0)
    assert (row["Episode/loss/surrogate"], row["Episode/mean_return"], row["Episode/3"]) == (78.0, 79.0, 4.0)
    assert not [name for name in row if name.startswith("task/")]
    assert metrics["policy/clip_fraction"] != 77.0
    assert losses["surrogate"] != 78.0


def test_every_figure_of_ours_has_a_name_that_logs_cannot_take():
    runner = M3PORunner(PointEnv(8), runner_cfg() | {"algo": "m3po", "task": "toy"}, None, "cpu")
    runner.learn(2)
    assert {name.split("/")[0] for name in runner.alg.metrics} <= OWN_NAMES
