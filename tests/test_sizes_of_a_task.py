"""Sizes that follow the task: the width of the world model."""

from __future__ import annotations

import pytest
from toy_env import PointEnv, runner_cfg

from m3po.algorithms import M3PO


@pytest.mark.parametrize(("hidden", "most", "width"), [((32, 32), 256, 64), ((128, 64), 256, 128), ((400,), 256, 256)])
def test_the_world_model_is_as_wide_as_the_policy_in_bounds(hidden, most, width):
    cfg = runner_cfg(world_model={"width": most})
    cfg["actor"]["hidden_dims"] = list(hidden)
    env = PointEnv(num_envs=4)
    model = M3PO.construct_algorithm(env.get_observations(), env, cfg, "cpu").model
    assert model.cfg.width == width
    assert model.transition[0][0].out_features == width
