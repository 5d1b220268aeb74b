"""With planning and bonus off, the update is rsl_rl's PPO."""

import copy

import pytest
import torch
from rsl_rl.algorithms import PPO
from tensordict import TensorDict
from toy_env import PointEnv, runner_cfg

from m3po.algorithms import M3PO

# rsl_rl multiplies these two in float32, also where all else is float64: of these, that is exact.
DISCOUNT = {"gamma": 127 / 128, "lam": 61 / 64}
OFF = {
    "planner": {"max_learning_kl": 0.0, "planned_fraction": 0.0},
    "bonus": {"size": 0.0},
    "world_model": {"steps_per_iteration": 0},
    "critic_replay": {"steps_per_iteration": 0},
    "value_loss_coef": 1.0,
    "std_learning_rate": 0.0,
    "desired_kl": 0.01,
    "schedule": "adaptive",
    "learning_rate": 1e-5,  # the critic's never falls below this, which is the schedule's own bound
    "entropy_coef": 0.01,
    **DISCOUNT,
}
FIRST_RATE = 1e-3


def in_reward_units(algorithm):
    """Let the critic work in reward units, as PPO's does, instead of the task's."""
    estimator = algorithm.estimator
    estimator.rewards.square.copy_((1.0 - algorithm.tasks.discounts).square())
    estimator.learn_units = lambda storage: None
    assert torch.equal(estimator.units(torch.zeros(1, dtype=torch.long)), torch.ones(1))


def build():
    """Both algorithms on the same environment, with the same initial weights."""
    env = PointEnv(32)
    cfg = runner_cfg(**OFF)
    m3po = M3PO.construct_algorithm(env.get_observations(), env, copy.deepcopy(cfg), "cpu")
    m3po.policy_learner._set_learning_rate(FIRST_RATE)
    in_reward_units(m3po)
    shared = {name: OFF[name] for name in ("entropy_coef", "desired_kl", "value_loss_coef")} | DISCOUNT
    ppo_cfg = cfg | {"multi_gpu": None, "algorithm": {"class_name": "PPO", "learning_rate": FIRST_RATE, **shared}}
    ppo = PPO.construct_algorithm(env.get_observations(), env, ppo_cfg, "cpu")
    ppo.actor.load_state_dict(m3po.actor.state_dict())
    ppo.critic.load_state_dict(m3po.critic.state_dict())
    return m3po, ppo


@pytest.mark.usefixtures("float64")
def test_same_actions_returns_and_update_as_rsl_rl():
    m3po, ppo = build()
    stream = torch.Generator().manual_seed(0)
    obs = [TensorDict({"policy": torch.randn(32, 4, generator=stream)}, batch_size=[32]) for _ in range(9)]
    for rollout in range(2):
        rewards = torch.randn(8, 32, generator=stream)
        dones = torch.rand(8, 32, generator=stream) < 0.1
        for algorithm in (m3po, ppo):
            torch.manual_seed(rollout)
            with torch.inference_mode():
                for t in range(8):
                    actions = algorithm.act(obs[t])
                    # Terminations only: on a time-out the two differ on purpose, rsl_rl bootstraps with V(s_t).
                    extras = {"time_outs": torch.zeros(32, dtype=torch.bool)}
                    algorithm.process_env_step(obs[t + 1], rewards[t], dones[t].long(), extras)
                algorithm.compute_returns(obs[8])
            torch.manual_seed(100 + rollout)
            losses = algorithm.update()  # M3PO estimates the returns there
            algorithm.last = actions, algorithm.storage.returns.clone().view(8, 32), losses
        torch.testing.assert_close(m3po.last[0], ppo.last[0], rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(m3po.last[1], ppo.last[1], rtol=1e-8, atol=1e-10)
        for name in ("value", "surrogate", "entropy"):
            assert abs(m3po.last[2][name] - ppo.last[2][name]) < 1e-8, name
        for mine, theirs in ((m3po.actor, ppo.actor), (m3po.critic, ppo.critic)):
            for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
        assert abs(m3po.learning_rate / ppo.learning_rate - 1) < 1e-6


def rollouts(algorithm, env, count=3):
    """Train for some iterations. Returns the last observations, and all weights of the policy."""
    obs = env.get_observations()
    for _ in range(count):
        with torch.inference_mode():
            for _ in range(8):
                obs, reward, dones, extras = env.step(algorithm.act(obs))
                algorithm.process_env_step(obs, reward, dones, extras)
            algorithm.compute_returns(obs)
        algorithm.update()
    return obs["policy"], torch.cat([p.detach().flatten() for p in algorithm.actor.parameters()])


def made(seed, num_envs=32, **changes):
    """An environment and the algorithm without all parts, but for some changes."""
    torch.manual_seed(seed)
    env = PointEnv(num_envs)
    return env, M3PO.construct_algorithm(env.get_observations(), env, runner_cfg(**{**OFF, **changes}), "cpu")


def test_plans_of_length_0_are_the_policy_bit_for_bit():
    runs, model = [], {"steps_per_iteration": 3}
    for planner in ({"planned_fraction": 0.0}, {"planned_fraction": 1.0, "num_iterations": 0}):
        env, algorithm = made(3, planner={"max_learning_kl": 0.0, **planner}, world_model=model)
        torch.manual_seed(4)
        runs.append(rollouts(algorithm, env))
        if planner["planned_fraction"]:
            # The planner itself, not only a shortcut that skips it.
            obs = env.get_observations()
            policy = algorithm.behaviour.sample(obs)
            planned = algorithm.behaviour.plan(obs, policy)
            assert planned.planned.all()
            assert torch.equal(planned.actions, policy.actions)
            assert torch.equal(planned.log_beta, policy.log_pi)
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


def test_a_gate_that_stays_closed_is_the_part_switched_off():
    runs, model = [], {"steps_per_iteration": 3}
    for max_kl, fraction in ((0.0, 0.0), (0.06, 0.25)):
        env, algorithm = made(6, planner={"max_learning_kl": max_kl, "planned_fraction": fraction}, world_model=model)
        algorithm.gates.update_gain = lambda *args: None
        runs.append(rollouts(algorithm, env))
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


def test_learning_a_model_does_not_perturb_the_policy():
    """The model draws from streams of its own: without plans, training it changes no action and no weight."""
    runs = [rollouts(*reversed(made(5, 16, world_model={"steps_per_iteration": steps}))) for steps in (0, 3)]
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)
