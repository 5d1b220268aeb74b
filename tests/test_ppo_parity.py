"""With planning and bonus off, the update is rsl_rl's PPO."""

import copy

import torch
from rsl_rl.algorithms import PPO
from tensordict import TensorDict
from toy_env import PointEnv, runner_cfg

from m3po.algorithms import M3PO

OFF = {
    "planner": {"share": 0.0},
    "bonus": {"alpha": 0.0},
    "world_model": {"steps_per_iteration": 0},
    "critic_min_learning_rate": 0.0,
    "lam": 0.95,
    "learning_rate": 1e-3,
    "entropy_coef": 0.01,
}


def build():
    """Both algorithms on the same environment, with the same initial weights."""
    env = PointEnv(32)
    cfg = runner_cfg(**OFF)
    m3po = M3PO.construct_algorithm(env.get_observations(), env, copy.deepcopy(cfg), "cpu")
    ppo_cfg = cfg | {"multi_gpu": None, "algorithm": {"class_name": "PPO", "lam": 0.95, "entropy_coef": 0.01}}
    ppo = PPO.construct_algorithm(env.get_observations(), env, ppo_cfg, "cpu")
    ppo.actor.load_state_dict(m3po.actor.state_dict())
    ppo.critic.load_state_dict(m3po.critic.state_dict())
    return m3po, ppo


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
            algorithm.last = actions, algorithm.storage.returns.clone().view(8, 32), algorithm.update()
        torch.testing.assert_close(m3po.last[0], ppo.last[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(m3po.last[1], ppo.last[1], rtol=1e-4, atol=1e-5)
        for name in ("value", "surrogate", "entropy"):
            assert abs(m3po.last[2][name] - ppo.last[2][name]) < 1e-4, name
        for mine, theirs in ((m3po.actor, ppo.actor), (m3po.critic, ppo.critic)):
            for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
        assert abs(m3po.learning_rate / ppo.learning_rate - 1) < 1e-6


def test_zero_planner_iterations_reproduce_the_prior_bit_for_bit():
    runs = []
    for planner in ({"share": 0.0}, {"share": 1.0, "num_iterations": 0}):
        torch.manual_seed(3)
        env = PointEnv(32)
        gates = {"min_skill": None, "min_reward_ev": None}
        cfg = runner_cfg(**{**OFF, "planner": planner | gates})
        algorithm = M3PO.construct_algorithm(env.get_observations(), env, cfg, "cpu")
        obs = env.get_observations()
        torch.manual_seed(4)
        for _ in range(3):
            for _ in range(8):
                obs, reward, dones, extras = env.step(algorithm.act(obs))
                algorithm.process_env_step(obs, reward, dones, extras)
            algorithm.compute_returns(obs)
            algorithm.update()
        # The planner itself, not only the shortcut that skips it.
        decision = algorithm.behaviour.prior(obs)
        algorithm.behaviour.planned_ids = torch.arange(32)
        improved = algorithm.behaviour.improve(obs, decision)
        if planner["share"]:
            assert torch.equal(improved.actions, decision.actions)
            assert torch.equal(improved.log_beta, decision.log_pi)
        runs.append((obs["policy"], [p.detach().clone() for p in algorithm.actor.parameters()]))
    assert torch.equal(runs[0][0], runs[1][0])
    for a, b in zip(runs[0][1], runs[1][1], strict=True):
        assert torch.equal(a, b)


def test_learning_a_model_does_not_perturb_the_policy():
    """The model draws from streams of its own: without a planner, training it changes no action and no weight."""
    runs = []
    for steps in (0, 3):
        torch.manual_seed(5)
        env = PointEnv(16)
        cfg = runner_cfg(planner={"share": 0.0}, world_model={"steps_per_iteration": steps})
        algorithm = M3PO.construct_algorithm(env.get_observations(), env, cfg, "cpu")
        obs = env.get_observations()
        for _ in range(3):
            for _ in range(8):
                obs, reward, dones, extras = env.step(algorithm.act(obs))
                algorithm.process_env_step(obs, reward, dones, extras)
            algorithm.compute_returns(obs)
            algorithm.update()
        runs.append(torch.cat([obs["policy"].flatten(), *(p.detach().flatten() for p in algorithm.actor.parameters())]))
    assert torch.equal(runs[0], runs[1])
