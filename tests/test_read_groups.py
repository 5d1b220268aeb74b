"""Observation groups that no network reads are neither stored, nor judged, nor saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rsl_rl.runners import OnPolicyRunner
from tensordict import TensorDict
from toy_env import PointEnv, runner_cfg

from m3po.envs.read_groups import ReadGroups, only_read_groups
from m3po.presets import suite_runner_cfg
from m3po.runners import M3PORunner

PPO = suite_runner_cfg(False, "cpu", "default", "ppo")["algorithm"] | {"class_name": "PPO"}


class CameraEnv(PointEnv):
    """A point with a camera, and a depth sensor that is infinite where nothing is."""

    def get_observations(self) -> TensorDict:
        obs = super().get_observations()
        obs["camera"] = torch.zeros(self.num_envs, 32, 32, 3)
        obs["depth"] = torch.full((self.num_envs, 4), torch.inf)
        return obs

    def step(self, actions):
        obs, rewards, dones, extras = super().step(actions)
        if "final_obs" in extras:
            extras["final_obs"] = dict(extras["final_obs"], depth=obs["depth"])
        return obs, rewards, dones, extras


def configuration(algo: str) -> dict:
    cfg = runner_cfg() | {"algo": algo, "task": "toy"}
    if algo == "ppo":
        cfg["algorithm"] = dict(PPO)
    return cfg


def run(env: PointEnv, algo: str, folder: Path) -> M3PORunner:
    torch.manual_seed(0)
    runner = M3PORunner(env, configuration(algo), str(folder), "cpu")
    runner.learn(2)
    return runner


@pytest.mark.parametrize("algo", ["m3po", "ppo"])
def test_a_run_is_the_same_with_groups_that_nobody_reads(algo, tmp_path, capsys):
    runners = [run(kind(num_envs=8), algo, tmp_path / kind.__name__) for kind in (PointEnv, CameraEnv)]
    assert "NaN guard" not in capsys.readouterr().out
    plain, camera = (runner.alg.actor.state_dict() for runner in runners)
    assert all(torch.equal(value, camera[name]) for name, value in plain.items())
    sizes = [(tmp_path / kind.__name__ / "model_last.pt").stat().st_size for kind in (PointEnv, CameraEnv)]
    assert sizes[1] < 1.02 * sizes[0]


def test_the_stock_runner_stores_them_neither():
    runner = OnPolicyRunner(CameraEnv(num_envs=8), configuration("m3po"), None, "cpu")
    runner.learn(1)
    assert set(runner.alg.storage.obs.keys()) == set(runner.alg.replay._fields["obs"].keys()) == {"policy"}


def test_an_environment_without_others_is_not_wrapped():
    env = PointEnv()
    assert only_read_groups(env, {"actor": ["policy"], "critic": ["policy"]}) is env
    assert only_read_groups(env, {}) is env


@pytest.mark.parametrize(
    ("obs_groups", "seen"),
    [
        ({"actor": ["policy"], "critic": ["policy"]}, {"policy"}),
        ({"actor": ["policy"], "critic": ["policy", "depth"]}, {"policy", "depth"}),
        ({"actor": ["policy"], "critic": ["policy"], "rnd_state": ["camera"]}, {"policy", "camera"}),
        ({"actor": ["depth"]}, {"policy", "depth"}),
        ({}, {"policy"}),
    ],
)
def test_what_a_set_names_is_seen(obs_groups, seen):
    env = only_read_groups(CameraEnv(), obs_groups)
    env.cfg.compute_final_obs = True
    assert set(env.get_observations().keys()) == seen
    obs, _, _, extras = env.step(torch.zeros(16, 2))
    assert set(obs.keys()) == seen
    assert set(extras["final_obs"]) == seen & {"policy", "depth"}


def test_everything_else_is_the_environments_own():
    env = CameraEnv(num_envs=4)
    wrapped = ReadGroups(env, ["policy"])
    wrapped.episode_length_buf = torch.tensor([1, 2, 3, 4])
    assert env.episode_length_buf.tolist() == [1, 2, 3, 4]
    assert (wrapped.num_envs, wrapped.max_episode_length) == (4, 20)
    assert wrapped.reset_envs(torch.tensor([0])) is None
    assert hasattr(wrapped, "state_dict")
    env.reset_envs = lambda ids: env.get_observations()
    wrapped = ReadGroups(env, ["policy"])
    assert set(wrapped.reset_envs(torch.tensor([0])).keys()) == {"policy"}
