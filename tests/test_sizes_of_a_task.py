"""Sizes that follow the task: the noise that training begins with, and the width of the world model."""

from __future__ import annotations

import pytest
import torch
from toy_env import PointEnv, runner_cfg

from m3po.algorithms import M3PO
from m3po.config import AlgorithmCfg
from m3po.envs.multi_task import Member, MultiTaskVecEnv
from m3po.presets import paper


def first_stds(env, first=0.8, kind="log", **fields) -> torch.Tensor:
    """Stds of the policy of a new M3PO."""
    cfg = runner_cfg(**fields)
    cfg["actor"]["distribution_cfg"] |= {"init_std": first, "std_type": kind}
    distribution = M3PO.construct_algorithm(env.get_observations(), env, cfg, "cpu").actor.distribution
    return distribution.log_std_param.exp() if kind == "log" else distribution.std_param


@pytest.mark.parametrize("kind", ["log", "scalar"])
@pytest.mark.parametrize(("dim", "factor"), [(1, 1.0), (2, 1.0), (8, 0.5), (32, 0.25)])
def test_all_dimensions_together_make_as_much_noise_as_two(kind, dim, factor):
    stds = first_stds(PointEnv(num_envs=4, dim=dim), kind=kind)
    torch.testing.assert_close(stds, torch.full((dim,), 0.8 * factor))


@pytest.mark.parametrize("kind", ["log", "scalar"])
def test_each_of_several_tasks_by_its_own_dimensions(kind):
    env = MultiTaskVecEnv([Member(str(dim), PointEnv(num_envs=4, dim=dim)) for dim in (2, 8)], "cpu")
    stds = first_stds(env, kind=kind)
    torch.testing.assert_close(stds[0, :2], torch.full((2,), 0.8))
    torch.testing.assert_close(stds[1], torch.full((8,), 0.4))


def test_the_number_of_dimensions_is_a_setting_and_paper_mode_has_none():
    env = PointEnv(num_envs=4, dim=8)
    torch.testing.assert_close(first_stds(env, noise_dims=0.5), torch.full((8,), 0.2))
    torch.testing.assert_close(first_stds(env, noise_dims=paper().noise_dims), torch.full((8,), 0.8))
    assert AlgorithmCfg().noise_dims == 2.0


@pytest.mark.parametrize(("hidden", "most", "width"), [((32, 32), 256, 64), ((128, 64), 256, 128), ((400,), 256, 256)])
def test_the_world_model_is_as_wide_as_the_policy_in_bounds(hidden, most, width):
    cfg = runner_cfg(world_model={"width": most})
    cfg["actor"]["hidden_dims"] = list(hidden)
    env = PointEnv(num_envs=4)
    model = M3PO.construct_algorithm(env.get_observations(), env, cfg, "cpu").model
    assert model.cfg.width == width
    assert model.transition[0][0].out_features == width
