"""Final observations are asked for where asking changes nothing, and where they are what the policy would have seen."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from toy_env import PointEnv, runner_cfg

from m3po.envs.final_observations import ask_for_final_observations, memory_of
from m3po.runners import M3PORunner


class DirectEnv(PointEnv):
    """As Isaac Lab's direct workflow: ``_get_observations``, called once more in steps that end an episode."""

    def __init__(self) -> None:
        super().__init__(num_envs=4)
        self.resets = 0

    def _get_observations(self) -> Any:
        return PointEnv.get_observations(self)

    def reset(self):
        self.resets += 1
        return super().reset()


class Stacking(DirectEnv):
    def _get_observations(self):
        obs = super()._get_observations()
        self._frames = [*getattr(self, "_frames", [obs["policy"] * 0] * 2)[1:], obs["policy"].clone()]
        return obs


class InPlace(DirectEnv):
    def __init__(self) -> None:
        super().__init__()
        self.filtered = torch.zeros(4, 4)

    def _get_observations(self):
        obs = super()._get_observations()
        self.filtered.mul_(0.9).add_(obs["policy"])
        return obs


class Queue(DirectEnv):
    def __init__(self) -> None:
        super().__init__()
        self.delay = deque([torch.zeros(4, 4)] * 3, maxlen=3)

    def _get_observations(self):
        obs = super()._get_observations()
        self.delay.append(obs["policy"].clone())
        return obs


class OwnObject(DirectEnv):
    class Filter:
        def __init__(self) -> None:
            self.count = 0

    def __init__(self) -> None:
        super().__init__()
        self.filter = self.Filter()

    def _get_observations(self):
        self.filter.count += 1
        return super()._get_observations()


class LastAction(DirectEnv):
    """What many direct tasks do: the action is remembered while observing, which is the same if done twice."""

    def __init__(self) -> None:
        super().__init__()
        self.actions, self.previous = torch.ones(4, 2), torch.zeros(4, 2)

    def _get_observations(self):
        self.previous = self.actions.clone()
        return super()._get_observations()


class Noisy(DirectEnv):
    def _get_observations(self):
        obs = super()._get_observations()
        obs["policy"] += torch.randn(4, 4)
        return obs


class Logging(DirectEnv):
    def _get_observations(self):
        self.extras = {"log": {"calls": getattr(self, "extras", {}).get("log", {}).get("calls", 0) + 1}}
        return super()._get_observations()


@pytest.mark.parametrize(
    ("kind", "name"), [(Stacking, "_frames"), (InPlace, "filtered"), (Queue, "delay"), (OwnObject, "filter")]
)
def test_a_memory_of_the_environments_own_is_found(kind, name, capsys):
    env = kind()
    ask_for_final_observations(env)
    assert not env.cfg.compute_final_obs
    assert f"asking for observations changes '{name}' of {kind.__name__}" in capsys.readouterr().out
    assert env.resets == 1
    ask_for_final_observations(env)
    assert env.resets == 1  # asked once


@pytest.mark.parametrize("kind", [DirectEnv, LastAction, Noisy, Logging])
def test_others_are_asked_and_nothing_is_drawn(kind, capsys):
    env = kind()
    torch.manual_seed(3)
    ask_for_final_observations(env)
    assert env.cfg.compute_final_obs
    assert env.resets == 0
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(1))
    assert capsys.readouterr().out == ""


def manager(**term: Any) -> SimpleNamespace:
    plain = {"history_length": 0, "delay_max_lag": 0, "modifiers": None}
    terms = [SimpleNamespace(**plain), SimpleNamespace(**plain | term)]
    return SimpleNamespace(_group_obs_term_names={"policy": ["pos", "vel"]}, _group_obs_term_cfgs={"policy": terms})


class WithReset:
    def reset(self) -> None: ...


@pytest.mark.parametrize(
    ("term", "what"),
    [
        ({"history_length": 3}, "has a history"),
        ({"delay_max_lag": 2}, "has a delay"),
        ({"modifiers": [SimpleNamespace(func=WithReset())]}, "has a filter"),
        ({"modifiers": [SimpleNamespace(func=abs)]}, None),
        ({}, None),
    ],
)
def test_terms_of_a_manager(term, what):
    env = PointEnv()
    env.observation_manager = manager(**term)
    assert memory_of(env) == (what and f"observation policy/vel {what}")


def test_an_environment_without_the_switch_is_left_alone():
    env = PointEnv()
    env.cfg = {}
    ask_for_final_observations(env)
    assert env.cfg == {}


def test_a_run_with_a_memory_bootstraps_without_them():
    env = Stacking()
    runner = M3PORunner(env, runner_cfg() | {"algo": "m3po", "task": "toy"}, None, "cpu")
    runner.learn(4)
    ends = runner.alg.replay._fields["dones"]
    assert ends.any()
    assert not runner.alg.replay._fields["next_obs_valid"][ends].any()
