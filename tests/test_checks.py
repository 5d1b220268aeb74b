"""What is checked of a task and its agent before a simulation starts."""

from __future__ import annotations

from types import SimpleNamespace

import gymnasium as gym
import pytest
from isaaclab_rl.rsl_rl import RslRlOnPolicyRunnerCfg, RslRlPpoAlgorithmCfg

from isaaclab_m3po.checks import PPO_SETTINGS, RUNNER_SETTINGS, check_actions, ignored_settings
from m3po.errors import UserError


@pytest.mark.parametrize("spec", [{3}, [{3}, {2}], {"a": 2}, (2, {3}), gym.spaces.Discrete(4)])
def test_actions_that_are_no_vectors_of_numbers_are_refused(spec):
    for cfg in (SimpleNamespace(action_space=spec), SimpleNamespace(action_spaces={"one": 3, "other": spec})):
        with pytest.raises(UserError, match=r"task 'T' has actions of kind \w+\. M3PO and rsl_rl's PPO act with vec"):
            check_actions("T", cfg)


@pytest.mark.parametrize("spec", [3, [2], gym.spaces.Box(-1.0, 1.0, (4,))])
def test_vectors_of_numbers_are_taken(spec):
    check_actions("T", SimpleNamespace(action_space=spec))
    check_actions("T", SimpleNamespace(action_spaces={"one": spec, "other": 2}))
    check_actions("T", SimpleNamespace())  # a manager-based task


def agents(**algorithm) -> tuple[RslRlOnPolicyRunnerCfg, RslRlOnPolicyRunnerCfg]:
    used, own = RslRlOnPolicyRunnerCfg(), RslRlOnPolicyRunnerCfg()
    own.algorithm = RslRlPpoAlgorithmCfg()
    for name, value in algorithm.items():
        setattr(own.algorithm, name, value)
    return used, own


def test_defaults_are_not_named():
    used, own = agents()
    assert ignored_settings(used, own) == ignored_settings(used, None) == []
    assert all(hasattr(RslRlOnPolicyRunnerCfg(), name) for name in RUNNER_SETTINGS)
    assert all(hasattr(RslRlPpoAlgorithmCfg(), name) for name in PPO_SETTINGS)


def test_settings_without_effect_are_named():
    used, own = agents(symmetry_cfg={"use_data_augmentation": True}, optimizer="sgd", learning_rate=7.0)
    used.logger, used.resume = "wandb", True
    assert ignored_settings(used, own) == ["logger", "resume", "algorithm.symmetry_cfg", "algorithm.optimizer"]
    assert ignored_settings(used, None) == ["logger", "resume"]
