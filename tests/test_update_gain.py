"""How far updates go follows the slope that is left at the end of them, on data that they have not seen."""

import math

import pytest
import torch
from test_plan_learning import collect, runner_of
from toy_env import PointEnv, runner_cfg

from m3po.algorithms.gates import BUDGET_RATE, BUDGET_STEPS, LARGEST_SLOPE, LEAST_BUDGET, Gates
from m3po.algorithms.policy_learning import LEAST_STD
from m3po.algorithms.policy_outputs import PolicyOutputs
from m3po.algorithms.update_gain import PARTS, gaussian_kl
from m3po.runners import M3PORunner

NUM_ENVS = 2048


def moved(ppo: torch.Tensor, plan: torch.Tensor, log_std: float = 0.0):
    """A rollout of a policy that an update has just moved, in two parts (A,), stds, and what measures it."""
    torch.manual_seed(0)
    runner = runner_of(PointEnv(NUM_ENVS))
    alg = runner.alg
    distribution, update_gain = alg.actor.distribution, alg.update_gain
    with torch.no_grad():
        update_gain.keep("ppo")
        distribution.std_param *= math.exp(log_std)
        alg.actor.mlp[-1].bias += ppo * distribution.std_param
        update_gain.keep("plan")
        alg.actor.mlp[-1].bias += plan * distribution.std_param
    collect(runner)
    st = alg.storage
    return update_gain, alg.gates, st, (st.actions - st.mean) / st.std


# -- the measurement ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beyond", [1.0, 0.0, -1.0])
def test_the_slope_is_what_is_left_of_a_quadratic_at_the_end_of_the_step(beyond):
    """Its optimum lies ``beyond`` another step of PPO; the plans' part went at right angles to that."""
    ppo, plan = torch.tensor([0.4, 0.0]), torch.tensor([0.0, 0.2])
    update_gain, _, st, noise = moved(ppo, plan)
    st.advantages.copy_(-0.5 * (noise - beyond * ppo).square().sum(-1))
    st.advantages -= st.advantages.mean()
    found = update_gain.measure(st)
    assert found["update/ppo_slope"] == pytest.approx(beyond * 0.4, abs=0.03)
    assert found["update/plan_slope"] == pytest.approx(0.0, abs=0.03)
    assert found["update/ppo_kl"] == pytest.approx(0.5 * 0.4**2, rel=1e-4)
    assert found["update/plan_kl"] == pytest.approx(0.5 * 0.2**2, rel=1e-4)


def test_the_std_is_part_of_the_step():
    """The advantage falls with the noise, and the std fell."""
    update_gain, _, st, noise = moved(torch.zeros(2), torch.zeros(2), log_std=-0.1)
    st.advantages.copy_(-0.5 * noise.square().sum(-1))
    st.advantages -= st.advantages.mean()
    found = update_gain.measure(st)
    # d J / d log std = -1 in each of two dimensions
    assert found["update/ppo_slope"] == pytest.approx(0.2 / (2.0 * found["update/ppo_kl"]) ** 0.5, rel=0.05)
    assert found["update/plan_slope"] == found["update/plan_kl"] == 0.0


def test_lost_and_planned_steps_do_not_count():
    ppo = torch.tensor([0.4, 0.0])
    update_gain, _, st, noise = moved(ppo, torch.zeros(2))
    st.advantages.copy_(noise[..., 0])
    before = update_gain.measure(st)["update/ppo_slope"]
    st.lost[:, :100], st.planned[:, 100:200] = True, True
    st.advantages[:, :200] = 1e6
    assert update_gain.measure(st)["update/ppo_slope"] == pytest.approx(before, abs=0.05)
    assert before == pytest.approx(1.0, abs=0.05)


def test_what_the_normaliser_learnt_is_not_part_of_the_step():
    cfg = runner_cfg(bonus={"size": 0.0})
    cfg["actor"]["obs_normalization"] = True
    runner = M3PORunner(PointEnv(64), cfg, None, "cpu")
    actor, update_gain, st = runner.alg.actor, runner.alg.update_gain, runner.alg.storage
    for part in PARTS:
        update_gain.keep(part)
    actor.obs_normalizer._mean += 1.0
    for moved_by in (0.0, 0.1):
        with torch.no_grad():
            actor.mlp[-1].bias += moved_by
        collect(runner)
        found = update_gain.measure(st)
        st.clear()
        assert found["update/plan_kl"] == pytest.approx(2 * 0.5 * moved_by**2, rel=1e-3, abs=1e-9)
        assert found["update/ppo_kl"] == pytest.approx(0.0, abs=1e-9)


def test_nothing_is_known_before_the_first_update():
    runner = runner_of()
    collect(runner)
    found = runner.alg.update_gain.measure(runner.alg.storage)
    assert set(found) == {f"update/{part}_{name}" for part in PARTS for name in ("slope", "kl")}
    assert not any(found.values())
    assert all((getattr(runner.alg.gates, f"{part}_budget") == 1.0).all() for part in PARTS)


def test_the_kl_of_gaussians():
    p, q = (torch.distributions.Normal(torch.randn(5, 3), torch.rand(5, 3) + 0.5) for _ in range(2))
    expected = torch.distributions.kl_divergence(p, q).sum(-1)
    torch.testing.assert_close(gaussian_kl((p.loc, p.scale), (q.loc, q.scale)), expected)


# -- the budgets -------------------------------------------------------------------------------------------------------


def test_budgets_follow_the_slope():
    gates, slope = Gates(4), torch.tensor([-0.1, 0.1, 0.1, -5.0])
    gates.plan_budget.copy_(torch.tensor([0.5, 0.5, 1.0, 0.5]))
    gates.update_budget("plan", slope, torch.full((4,), BUDGET_STEPS))
    grown, least = math.exp(BUDGET_RATE * 0.1), math.exp(-BUDGET_RATE * LARGEST_SLOPE)
    assert gates.plan_budget.tolist() == pytest.approx([0.5 / grown, 0.5 * grown, 1.0, 0.5 * least])
    assert gates.ppo_budget.tolist() == [1.0] * 4


def test_few_steps_weigh_less_and_nothing_falls_below_the_least():
    gates, slope = Gates(2), torch.full((2,), -0.1)
    gates.update_budget("ppo", slope, torch.tensor([BUDGET_STEPS / 8, 0.0]))
    assert gates.ppo_budget.tolist() == pytest.approx([math.exp(-BUDGET_RATE * 0.1 / 8**0.5), 1.0])
    for _ in range(200):
        gates.update_budget("ppo", slope, torch.full((2,), BUDGET_STEPS))
    assert gates.ppo_budget.tolist() == pytest.approx([LEAST_BUDGET] * 2)
    gates.update_budget("ppo", torch.full((2,), torch.nan), torch.full((2,), BUDGET_STEPS))
    assert gates.ppo_budget.tolist() == pytest.approx([LEAST_BUDGET] * 2)


def test_budgets_set_how_far_the_parts_go():
    """The plans' trust region, PPO's desired KL, and the step size of the std."""
    runner = runner_of(desired_kl=0.06)
    runner.learn(2)
    alg = runner.alg
    alg.gates.gain.fill_(1e3)
    alg.gates.ppo_budget.fill_(0.25)
    alg.gates.plan_budget.fill_(0.5)
    runner.learn(1)
    assert alg.metrics["plan/max_kl"] == pytest.approx(0.5 * 0.06, rel=0.2)
    learner = alg.policy_learner
    rest = 0.06 - 0.5 * alg.metrics["plan/max_kl"]
    assert learner.desired_kls == pytest.approx([0.25 * rest], rel=0.1)
    rates = dict(zip(learner._names, (group["lr"] for group in learner.optimizer.param_groups), strict=True))
    assert rates["std"] == pytest.approx(alg.cfg.std_learning_rate * 0.5, rel=0.1)


# -- long runs ---------------------------------------------------------------------------------------------------------


@pytest.mark.learning
def test_a_task_that_is_learnt_stays_learnt():
    """Three times as long as it takes; the std keeps its floor, and updates become shorter."""
    torch.manual_seed(1)
    model = {"features": 0, "steps_per_iteration": 20, "batch_size": 128}
    critic = {"steps_per_iteration": 32, "batch_size": 256}
    cfg = runner_cfg(desired_kl=0.06, world_model=model, critic_replay=critic)
    runner = M3PORunner(PointEnv(64, episode=40), cfg, None, "cpu")
    alg, rewards, compute_returns = runner.alg, [], runner.alg.compute_returns

    def record(obs):
        rewards.append(alg.storage.rewards.mean().item())
        compute_returns(obs)

    alg.compute_returns = record
    runner.learn(120)
    start, learnt, end = (sum(part) / len(part) for part in (rewards[:3], rewards[30:40], rewards[-20:]))
    assert learnt > 0.2 * start, (start, learnt)
    assert end > 2.0 * learnt, (learnt, end)
    assert PolicyOutputs(alg.actor)(runner.env.get_observations())[1].min() >= LEAST_STD - 1e-6
    assert min(alg.gates.ppo_budget.item(), alg.gates.plan_budget.item()) < 0.99
