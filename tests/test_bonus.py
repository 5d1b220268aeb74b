"""The exploration bonus (4)-(7): gaps by hand, what it is bounded by, and when it is off."""

from types import SimpleNamespace

import pytest
import torch
from test_plan_learning import MODEL
from toy_env import PointEnv, runner_cfg

from m3po.algorithms.bonus import FLOOR, LARGEST, ExplorationBonus
from m3po.algorithms.gates import REWARDED_ENOUGH, Gates
from m3po.algorithms.tasks import Tasks
from m3po.config import BonusCfg
from m3po.runners import M3PORunner

LITERAL = {"size": 1.0, "num_functions": 0, "literal": True}


class HandModel:
    """A world model of one dimension whose every number is known: h(s) = s, d = z + a, R = 2 z."""

    anchor_dim = 0
    cfg = SimpleNamespace(features=1)

    def __init__(self, num_tasks=1, price=2.0):
        self.terminations = SimpleNamespace(terminal=torch.full((num_tasks,), price))

    def step(self, z, action, task):
        return z + action, 2.0 * z.squeeze(-1), torch.full_like(z[:, 0], 0.3)


class HandObjective:
    """Values of 10 z, or none at all, in reward units."""

    def __init__(self, model, value=10.0):
        self.model, self.factor = model, value

    def encode(self, obs, task):
        return obs

    def value(self, z, task):
        return self.factor * z.squeeze(-1)


def build(num_tasks=1, value=10.0, seed=0, gamma=0.9, **cfg):
    tasks = Tasks(torch.zeros(4, dtype=torch.long), torch.full((num_tasks,), gamma), torch.ones(num_tasks, 1).bool())
    return ExplorationBonus(HandObjective(HandModel(num_tasks), value), Gates(num_tasks), tasks, BonusCfg(**cfg), seed)


def rollout(obs, actions, rewards, next_obs, advantages=None, task=None):
    """A rollout of one step in B environments whose numbers are given."""
    obs, actions, rewards, next_obs = (
        torch.as_tensor(x, dtype=torch.float32).view(1, -1) for x in (obs, actions, rewards, next_obs)
    )
    no = torch.zeros(obs.shape, dtype=torch.bool)
    return SimpleNamespace(
        obs=obs.unsqueeze(-1),
        actions=actions.unsqueeze(-1),
        rewards=rewards,
        next_obs=next_obs.unsqueeze(-1),
        terminated=no.clone(),
        invalid=no.clone(),
        next_obs_valid=~no,
        advantages=torch.zeros_like(obs) if advantages is None else torch.as_tensor(advantages).view(1, -1).clone(),
        task=no.long() if task is None else task.view(1, -1),
    )


def surprising(count=400, seed=0, **kwargs):
    """Steps whose outcome the model is off by more or less."""
    stream = torch.Generator().manual_seed(seed)
    obs, actions, off, advantages = torch.randn(4, count, generator=stream)
    return rollout(obs, actions, 2.0 * obs, obs + actions + off, advantages, **kwargs)


class Replay:
    """The newest steps, (T, N), of one task unless said otherwise."""

    def __init__(self, rewards, invalid=None, task=None):
        no = torch.zeros_like(rewards, dtype=torch.bool)
        self.fields = {
            "rewards": rewards,
            "invalid": no if invalid is None else invalid,
            "task": no.long() if task is None else task,
        }

    def latest(self, num_steps, names):
        assert num_steps == 64
        return {name: self.fields[name] for name in names}


UNREWARDED = Replay(torch.zeros(8, 4))
ONE = torch.ones(1)


# -- the gap -----------------------------------------------------------------------------------------------------------


def test_the_gap_by_hand():
    # Q_mf = 3 + 0.9 * 10 * 2 = 21;  Q_mb = 2 * 1 + 0.9 * 10 * 1.5 = 15.5;  eps = 5.5, in stds of the advantage 2.75
    bonus = build(**LITERAL)
    st = rollout([1.0], [0.5], [3.0], [2.0])
    torch.testing.assert_close(bonus.gaps(st, ONE), torch.tensor([[5.5]]))
    torch.testing.assert_close(bonus.gaps(st, 2 * ONE), torch.tensor([[2.75]]))


def test_the_true_continuation_stands_on_both_sides():
    # A termination: Q_mf = 3, Q_mb = 2, its price. With the mask on one side only, the gap would be 12.5 or 17.
    bonus = build(**LITERAL)
    st = rollout([1.5], [0.5], [3.0], [2.0])
    st.terminated[:] = True
    torch.testing.assert_close(bonus.gaps(st, ONE), torch.tensor([[1.0]]))


def test_random_functions_of_the_latent_stand_beside_the_value():
    bonus = build(num_functions=3)
    st = rollout([1.0], [0.5], [3.0], [2.0])  # the latent is off by 0.5
    found = bonus.gaps(st, ONE)
    torch.testing.assert_close(found[0, 1:], (0.5 * bonus.functions[0]).abs())
    assert found[0, 0] == 5.5
    assert torch.equal(build(num_functions=3).functions, bonus.functions)
    assert not torch.equal(build(num_functions=3, seed=1).functions, bonus.functions)


def test_the_observation_counts_in_units_of_what_a_step_changes():
    """So no dimension of large numbers drowns the others, and what a task lacks does not count."""
    bonus = build(num_functions=4)
    model = bonus.objective.model
    model.anchor_dim, model.own_dims = 1, torch.ones(1, 1)
    model.changes = SimpleNamespace(stds=lambda: torch.tensor([[0.25]]))
    st = rollout([1.0], [0.5], [3.0], [2.0])
    torch.testing.assert_close(bonus.gaps(st, ONE)[0, 1:], (2.0 * bonus.functions[0]).abs())
    model.own_dims = torch.zeros(1, 1)
    assert not bonus.gaps(st, ONE)[0, 1:].any()


# -- the paper's form --------------------------------------------------------------------------------------------------


def test_the_literal_bonus_by_hand():
    # eps = (1, 3, 8): mean 4, centred (-3, -1, 4), alpha 0.5: (-1.5, -0.5, 2), bounded by |A| = (2, 0.2, 1)
    st = rollout([0.0] * 3, [0.0] * 3, [1.0, -3.0, 8.0], [0.0] * 3, [-2.0, 0.2, 1.0])
    bonus = build(**LITERAL)
    metrics = bonus.add(st, None, ONE, 0.5)
    torch.testing.assert_close(st.advantages, torch.tensor([[-3.5, 0.0, 2.0]]))
    assert metrics == pytest.approx({"bonus/alpha": 0.5, "bonus/gap": 4.0, "bonus/mean_abs": (1.5 + 0.2 + 1.0) / 3})


def test_its_alpha_falls_from_one_to_zero():
    bonus = build(**LITERAL)
    alphas = [bonus.add(surprising(), None, ONE, p)["bonus/alpha"] for p in (0.0, 0.25, 1.0, 1.5)]
    assert alphas == pytest.approx([1.0, 0.75, 0.0, 0.0])


def test_it_never_flips_a_sign_and_never_more_than_doubles():
    st = surprising(10_000)
    before = st.advantages.clone()
    build(**LITERAL).add(st, None, 0.1 * ONE, 0.0)
    assert (st.advantages * before >= 0).all()
    assert (st.advantages.abs() <= 2 * before.abs() + 1e-6).all()
    assert not torch.equal(st.advantages, before)


def test_it_is_centred_within_each_task():
    task = torch.arange(400) % 2
    st = surprising(task=task)
    st.advantages[:] = 1e3  # no bound
    st.rewards[:, 1::2] += 100.0
    before = st.advantages.clone()
    build(2, **LITERAL).add(st, None, torch.ones(2), 0.0)
    added = (st.advantages - before)[0]
    assert abs(added[task == 0].mean()) < 1e-3 < 0.5 < added.std()
    assert abs(added[task == 1].mean()) < 1e-3


# -- the default form --------------------------------------------------------------------------------------------------


def test_there_is_a_bonus_where_all_values_are_zero():
    """Before a task's first reward the paper's gap is 0 everywhere."""
    st = surprising()
    st.rewards.copy_(2.0 * st.obs.squeeze(-1))  # as predicted
    before = st.advantages.clone()
    build(value=0.0, num_functions=0).add(st, UNREWARDED, ONE, 0.0)
    assert torch.equal(st.advantages, before)
    metrics = build(value=0.0).add(st, UNREWARDED, ONE, 0.0)
    assert metrics["bonus/alpha"] == 1.0
    added = st.advantages - before
    off = (st.next_obs - st.obs - st.actions).squeeze(-1).abs()
    assert added.abs().mean() > 0.1
    # More is earned where the model was further off.
    assert added[off > off.quantile(0.9)].mean() > 0.3
    assert added[off < off.quantile(0.1)].mean() < 0.0


def test_the_bonus_is_off_where_episodes_are_rewarded():
    bonus, rewarded = build(), Replay(torch.ones(8, 4))
    alphas, sizes = [], []
    for _ in range(10):
        st = surprising()
        before = st.advantages.clone()
        metrics = bonus.add(st, rewarded, ONE, 0.0)
        alphas.append(metrics["bonus/alpha"])
        sizes.append((st.advantages - before).abs().mean().item())
    assert alphas[0] > alphas[1] > alphas[2] == 0.0  # after a fifth of the episodes
    assert sizes[0] > 0.0 == sizes[-1]
    assert metrics == {"bonus/alpha": 0.0, "bonus/gap": 0.0, "bonus/mean_abs": 0.0}
    # Each task has its own.
    two = build(2)
    two.gates.rewarded.copy_(torch.tensor([1.0, 0.0]))
    task = torch.arange(400) % 2
    st = surprising(task=task)
    before = st.advantages.clone()
    two.add(st, Replay(torch.tensor([[1.0, 0.0, 1.0, 0.0]]), task=torch.tensor([[0, 1, 0, 1]])), torch.ones(2), 0.0)
    added = (st.advantages - before)[0]
    assert not added[task == 0].any()
    assert added[task == 1].any()


def test_once_rewarded_its_mean_size_is_a_part_of_the_advantages():
    bonus = build(size=0.1)
    bonus.gates.rewarded.fill_(1e-6)
    st = surprising()
    before = st.advantages.clone()
    metrics = bonus.add(st, UNREWARDED, ONE, 0.0)
    assert 0.0 < metrics["bonus/alpha"] < 1.0
    assert (st.advantages - before).abs().mean() == pytest.approx(0.1 * before.abs().mean().item(), rel=0.1)
    assert metrics["bonus/mean_abs"] == pytest.approx((st.advantages - before).abs().mean().item(), rel=1e-3)
    # It falls while a fifth of the episodes comes to be rewarded.
    half = build(size=0.1)
    half.gates.rewarded.fill_(0.5 * REWARDED_ENOUGH / 0.9)
    found = half.add(surprising(), UNREWARDED, ONE, 0.0)
    assert found["bonus/alpha"] == pytest.approx(0.5 * metrics["bonus/alpha"], rel=1e-3)


def test_its_bound_is_the_advantage_and_a_floor_where_that_is_small():
    st = surprising(4000)
    st.advantages[:, ::2] *= 0.01
    before = st.advantages.clone()
    build().add(st, UNREWARDED, ONE, 0.0)
    added, bound = (st.advantages - before).abs(), before.abs().clamp_min(FLOOR)
    assert (added <= bound + 1e-6).all()
    small = before.abs() < FLOOR
    assert (added[small] > 0.99 * FLOOR).any()
    assert (added[small] > before.abs()[small]).any()
    assert (added[~small] > 0.99 * bound[~small]).any()


def test_neither_reward_scale_nor_advantages_scale_matters():
    found = []
    for scale in (1.0, 1e3, 1e-3):
        bonus = build(value=10.0 * scale)
        bonus.objective.model.step = lambda z, a, task, c=scale: (z + a, 2.0 * c * z.squeeze(-1), torch.ones(len(z)))
        st = surprising()
        st.rewards *= scale
        bonus.add(st, UNREWARDED, scale * ONE, 0.0)
        found.append(st.advantages)
    torch.testing.assert_close(found[1], found[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[2], found[0], atol=1e-4, rtol=1e-4)


def test_centring_is_robust_per_task_and_bounded():
    bonus = build(2)
    eps = torch.cat([torch.arange(101.0), 1000.0 * torch.arange(101.0)])
    task, valid = torch.arange(2).repeat_interleave(101), torch.ones(202, dtype=torch.bool)
    centred = bonus._centred(eps, valid, task)
    torch.testing.assert_close(centred[:101], centred[101:])  # the scale of a task does not matter
    assert centred[50] == 0.0
    torch.testing.assert_close(centred[90], torch.tensor(1.0), atol=0.03, rtol=0.0)  # the percentile is the unit
    torch.testing.assert_close(centred[10], torch.tensor(-1.0), atol=0.03, rtol=0.0)
    eps[100] = 1e9  # one outlier
    assert bonus._centred(eps, valid, task)[:101].max() == LARGEST
    torch.testing.assert_close(bonus._centred(eps, valid, task)[:100], centred[:100])


def test_gaps_of_value_and_functions_count_alike_whatever_their_size():
    st = surprising(4000)
    st.rewards += torch.randn(st.rewards.shape, generator=torch.Generator().manual_seed(5))
    plain, large = st.advantages.clone(), st.advantages.clone()
    st.advantages = plain
    build(value=0.0).add(st, UNREWARDED, ONE, 0.0)
    st.advantages = large
    bonus = build(value=0.0)
    bonus.functions *= 1e4
    bonus.add(st, UNREWARDED, ONE, 0.0)
    torch.testing.assert_close(plain, large, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("cfg", [{}, LITERAL])
def test_invalid_steps_and_those_whose_successor_is_unknown_have_no_bonus_and_change_none(cfg):
    found = []
    for poison in (0.0, 1e4):
        st = surprising()
        st.invalid[:, :20] = True
        st.next_obs_valid[:, 20:40] = False
        st.next_obs[:, :40] += poison
        st.rewards[:, :20] += poison
        before = st.advantages.clone()
        build(**cfg).add(st, UNREWARDED, ONE, 0.0)
        assert torch.equal(st.advantages[:, :40], before[:, :40])
        found.append(st.advantages)
    assert torch.equal(*found)
    assert not torch.equal(found[0], before)


def test_a_rewarded_trajectory_is_one_with_any_reward_that_is_not_invalid():
    rewards, invalid = torch.zeros(8, 4), torch.zeros(8, 4, dtype=torch.bool)
    rewards[3, 0] = -1e-3
    rewards[5, 1] = 7.0
    invalid[5, 1] = True
    bonus = build()
    bonus._measure_rewarded(Replay(rewards, invalid))
    assert bonus.gates.rewarded.item() == pytest.approx(0.1 * 0.25)


def test_without_a_size_nothing_is_added():
    st = surprising()
    before = st.advantages.clone()
    metrics = build(size=0.0).add(st, UNREWARDED, ONE, 0.0)
    assert torch.equal(st.advantages, before)
    assert not any(metrics.values())


class Unrewarded(PointEnv):
    """A point that earns nothing, ever."""

    def step(self, actions):
        obs, rewards, dones, extras = super().step(actions)
        return obs, 0.0 * rewards, dones, extras


@pytest.mark.parametrize("literal", [False, True])
def test_in_a_task_without_rewards_the_bonus_is_what_the_policy_learns_from(literal):
    """The paper's leaves its advantages at about 0, because the critic is; ours does not."""
    torch.manual_seed(0)
    runner = M3PORunner(Unrewarded(32), runner_cfg(world_model=MODEL, bonus={"literal": literal}), None, "cpu")
    runner.learn(4)
    assert runner.alg.metrics["gate/rewarded"] == 0.0
    if not literal:
        assert runner.alg.metrics["bonus/alpha"] == 1.0
        assert runner.alg.metrics["bonus/mean_abs"] > 0.1
