"""A simulator's single wild numbers: no statistic is spoilt for good by one sample, and units follow a curriculum."""

from __future__ import annotations

import math

import pytest
import torch
from rsl_rl.modules.normalization import EmpiricalNormalization
from toy_env import PointEnv, runner_cfg

from m3po.models import normalizers
from m3po.models.normalizers import BoundedNormalization, RewardStatistics, TaskNormalizer
from m3po.runners import M3PORunner

ONE = torch.zeros(1000, dtype=torch.long)
NEVER = torch.zeros(1000, dtype=torch.bool)


class SpikeEnv(PointEnv):
    """A point with one wild number in its first environment."""

    def __init__(self, at: int, reward: float = 0.0, observation: float = 0.0) -> None:
        super().__init__(num_envs=32)
        self.at, self.wild_reward, self.wild_observation, self.count = at, reward, observation, 0

    def step(self, actions):
        obs, rewards, dones, extras = super().step(actions)
        self.count += 1
        if self.count == self.at:
            rewards[0] += self.wild_reward
            obs["policy"][0] += self.wild_observation
        return obs, rewards, dones, extras


def run(env: PointEnv, iterations: int = 4) -> M3PORunner:
    torch.manual_seed(0)
    cfg = runner_cfg() | {"algo": "m3po", "task": "toy"}
    for network in ("actor", "critic"):
        cfg[network]["obs_normalization"] = True
    runner = M3PORunner(env, cfg, None, "cpu")
    runner.learn(iterations)
    return runner


@pytest.mark.parametrize("at", [2, 20], ids=["first rollout", "later"])
@pytest.mark.parametrize("reward", [1e6, -1e9])
def test_one_wild_reward_does_not_set_the_unit(at, reward, capsys):
    plain, spoilt = run(SpikeEnv(0)), run(SpikeEnv(at, reward=reward))
    ratio = spoilt.alg.estimator.rewards.scale(ONE[:1]) / plain.alg.estimator.rewards.scale(ONE[:1])
    assert 0.5 < ratio.item() < 10.0
    assert capsys.readouterr().out.count("is far beyond the usual") == 1
    assert spoilt.alg.replay._fields["rewards"].abs().max() < 1e4


def test_cut_rewards_are_counted_in_their_iteration_alone():
    runner = run(SpikeEnv(20, reward=1e6), iterations=1)
    counts = []
    for _ in range(4):
        runner.learn(1)
        counts.append(runner.alg.metrics["robust/cut_rewards"])
    assert sorted(counts) == [0.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize("observation", [1e6, -1e8])
def test_one_wild_observation_does_not_set_the_unit(observation):
    plain, spoilt = run(SpikeEnv(0)), run(SpikeEnv(20, observation=observation))
    for network in ("actor", "critic"):
        usual, now = (getattr(runner.alg, network).obs_normalizer.std for runner in (plain, spoilt))
        assert (now / usual).max() < 10.0
    for name in ("obs_normalizer", "changes"):
        usual, now = (getattr(runner.alg.model, name).stds() for runner in (plain, spoilt))
        assert (now / usual).max() < 10.0


def test_rewards_are_cut_at_a_hundred_times_the_usual():
    statistics = RewardStatistics(1)
    statistics.update(torch.full((1000,), 2.0), NEVER, ONE)
    rewards = torch.tensor([3.0, 199.0, 201.0, -1e5])
    assert statistics.bounded(rewards, ONE[:4]).tolist() == [3.0, 199.0, 200.0, -200.0]


def test_the_first_rollout_is_judged_by_its_smaller_rewards():
    rewards = torch.full((1000,), -2.0)
    rewards[7] = 1e6
    assert RewardStatistics(1).bounded(rewards, ONE).tolist() == [-2.0 if i != 7 else 200.0 for i in range(1000)]


@pytest.mark.parametrize("every", [10, 1000, 4999])
def test_a_rare_reward_that_is_the_only_one_passes(every):
    statistics, seen = RewardStatistics(1), 0
    for _ in range(40):
        rewards = torch.tensor([1.0 if (seen + i) % every == every - 1 else 0.0 for i in range(1000)])
        seen += 1000
        assert torch.equal(statistics.bounded(rewards, ONE), rewards)
        statistics.update(rewards, NEVER, ONE)


def test_what_terminations_earn_is_usual_where_it_comes_often():
    statistics, terminated = RewardStatistics(1), NEVER.clone()
    terminated[::100] = True
    rewards = torch.where(terminated, -500.0, 0.01)
    for _ in range(3):
        assert torch.equal(statistics.bounded(rewards, ONE), rewards) or statistics.count == 0
        statistics.update(rewards, terminated, ONE)


def test_a_tasks_rewards_do_not_bound_anothers():
    statistics = RewardStatistics(2)
    task = torch.arange(1000) % 2
    rewards = torch.where(task == 0, 1e-3, 1e3)
    for _ in range(2):
        assert torch.equal(statistics.bounded(rewards, task), rewards)
        statistics.update(rewards, NEVER, task)


def test_units_follow_a_curriculum():
    assert run(PointEnv(num_envs=32), 1).alg.estimator.rewards.memory == normalizers.MEMORY
    statistics = RewardStatistics(1, memory=4096.0)
    for size in [1.0] * 20 + [0.1] * 40:
        statistics.update(torch.full((1000,), size), NEVER, ONE)
    assert statistics.scale(ONE[:1]).item() == pytest.approx(0.1, rel=0.2)


def test_the_normaliser_of_a_single_task_is_rsl_rls_on_usual_numbers():
    ours, theirs = BoundedNormalization(3), EmpiricalNormalization(3)
    for scale in (1.0, 5.0, 0.2):
        x = scale * torch.randn(200, 3)
        ours.update(x)
        theirs.update(x)
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value)


@pytest.mark.parametrize("kind", ["single", "several"])
def test_normalisers_bound_a_sample_and_forget(kind, monkeypatch):
    monkeypatch.setattr(normalizers, "MEMORY", 2000.0)
    single = BoundedNormalization(1)
    several = TaskNormalizer(1, 1, memory=2000.0)
    normalizer, task = (single, ()) if kind == "single" else (several, (ONE,))

    def std() -> float:
        return (single.std if kind == "single" else several.stds()).item()

    normalizer.update(torch.randn(1000, 1), *task)
    wild = torch.randn(1000, 1)
    wild[3] = 1e8
    normalizer.update(wild, *task)
    assert std() < math.sqrt(1.0 + 1e4 / 2000) * 1.2
    for _ in range(30):
        normalizer.update(torch.randn(1000, 1), *task)
    assert std() == pytest.approx(1.0, rel=0.05)


def test_a_dimension_that_begins_to_change_gets_its_scale():
    normalizer = TaskNormalizer(1, 1)
    normalizer.update(torch.zeros(1000, 1), ONE)
    normalizer.update(1e4 * torch.randn(1000, 1), ONE)
    assert normalizer.stds().item() > 1e3
