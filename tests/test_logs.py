"""Which logs of an environment are new: direct tasks change theirs, manager-based ones replace it."""

import pytest
import torch
from test_task_reporting import build

from m3po.envs.logs import NewLogs


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
