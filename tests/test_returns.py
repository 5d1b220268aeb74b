"""GAE, V-trace and the bootstrap of time-outs against numbers worked out by hand."""

import torch
from tensordict import TensorDict
from toy_env import PointEnv, runner_cfg

from m3po.algorithms import M3PO
from m3po.algorithms.returns import gae, vtrace


def column(*values):
    return torch.tensor(values).view(-1, 1)


def test_gae_by_hand():
    # gamma = 0.5, lambda = 0.5. Step 1 terminates, step 2 times out with V(final) = 8.
    # delta_0 = 1 + 0.5 * 2 - 1 = 1;  delta_1 = 2 + 0 - 2 = 0;  delta_2 = 3 + 0.5 * 8 - 4 = 3
    # A_2 = 3 (cut);  A_1 = 0 (cut);  A_0 = 1 + 0.25 * 0 = 1
    returns, advantages = gae(
        column(1.0, 2.0, 3.0),
        column(1.0, 2.0, 4.0),
        column(2.0, 9.0, 8.0),
        column(False, True, False),
        column(False, True, True),
        0.5,
        0.5,
    )
    assert advantages.flatten().tolist() == [1.0, 0.0, 3.0]
    assert returns.flatten().tolist() == [2.0, 2.0, 7.0]


def test_gae_accumulates_over_steps():
    # No episode ends: A_1 = 1 + 0.5*4 - 2 = 1;  A_0 = (1 + 0.5*2 - 1) + 0.25 * 1 = 1.25
    no = column(False, False)
    _, advantages = gae(column(1.0, 1.0), column(1.0, 2.0), column(2.0, 4.0), no, no, 0.5, 0.5)
    assert advantages.flatten().tolist() == [1.25, 1.0]


def test_a_rollout_may_have_one_step():
    one = (column(2.0), column(1.0), column(3.0), column(0.0).bool(), column(0.0).bool())
    assert gae(*one, 0.5, 0.9)[1].item() == 2.0 + 0.5 * 3.0 - 1.0
    targets, advantages = vtrace(*one, column(0.0), 0.5, 0.9)
    assert (targets.item(), advantages.item()) == (3.5, 2.5)


def test_vtrace_by_hand():
    # rho = (0.5, 1 after truncation). gamma = 0.5, lambda = 1.
    # delta_1 = 1 * (1 + 0.5*4 - 2) = 1;  v_1 = 3;  A_1 = 1 + 0.5*4 - 2 = 1
    # delta_0 = 0.5 * (1 + 0.5*2 - 1) = 0.5;  v_0 = 1 + 0.5 + 0.5*0.5*1 = 1.75;  A_0 = 1 + 0.5*3 - 1 = 1.5
    no = column(False, False)
    targets, advantages = vtrace(
        column(1.0, 1.0),
        column(1.0, 2.0),
        column(2.0, 4.0),
        no,
        no,
        torch.log(column(0.5, 3.0)),
        0.5,
        1.0,
    )
    torch.testing.assert_close(targets.flatten(), torch.tensor([1.75, 3.0]))
    torch.testing.assert_close(advantages.flatten(), torch.tensor([1.5, 1.0]))


def test_vtrace_on_policy_targets_are_gae_returns():
    torch.manual_seed(0)
    shape = (12, 7)
    rewards, values, next_values = torch.randn(3, *shape)
    terminated = torch.rand(shape) < 0.1
    dones = terminated | (torch.rand(shape) < 0.1)
    episode = (rewards, values, next_values, terminated, dones)
    returns, _ = gae(*episode, 0.9, 0.8)
    # V-trace's correction uses the stored values of the next step, as GAE's deltas do.
    targets, _ = vtrace(*episode, torch.zeros(shape), 0.9, 0.8)
    torch.testing.assert_close(targets, returns)


def build(num_envs=3, **algorithm):
    env = PointEnv(num_envs)
    cfg = runner_cfg(**algorithm) | {"num_steps_per_env": 3}
    return env, M3PO.construct_algorithm(env.get_observations(), env, cfg, "cpu")


def play_three_steps(algorithm, with_final_obs):
    """Env 0 goes on, env 1 terminates and env 2 times out at step 1. Final observations are stale elsewhere."""
    torch.manual_seed(0)
    obs = [TensorDict({"policy": torch.randn(3, 4)}, batch_size=[3]) for _ in range(4)]
    final = torch.full((3, 4), 1e6)
    final[1], final[2] = 5.0, -0.7
    for t in range(3):
        algorithm.act(obs[t])
        ended = t == 1
        extras = {"time_outs": torch.tensor([False, False, ended])}
        if with_final_obs:
            extras["final_obs"] = {"policy": final}
        algorithm.process_env_step(obs[t + 1], torch.ones(3), torch.tensor([0, ended, ended]).long(), extras)
    algorithm.compute_returns(obs[3])
    algorithm.estimator.estimate(algorithm.storage)
    return obs, final


def test_time_outs_bootstrap_with_the_final_observation():
    _, algorithm = build()
    obs, final = play_three_steps(algorithm, with_final_obs=True)
    st, task = algorithm.storage, torch.zeros(3, dtype=torch.long)
    with torch.no_grad():
        value = {t: algorithm.estimator.values(obs[t], task) for t in range(4)}
        at_end = algorithm.estimator.values(TensorDict({"policy": final}, batch_size=[3]), task)
    # Stale rows of final_obs (1e6) must not leak anywhere.
    torch.testing.assert_close(st.next_values[0], value[1])
    torch.testing.assert_close(st.next_values[1, 0], value[2][0])
    torch.testing.assert_close(st.next_values[1, 2], at_end[2])
    torch.testing.assert_close(st.next_values[2], value[3])
    assert st.next_obs["policy"].abs().max() < 1e3
    gamma, lam = algorithm.cfg.gamma, algorithm.cfg.lam
    terminal = 1.0 - value[1][1]
    torch.testing.assert_close(st.returns[1, 1], terminal + value[1][1])
    cut = 1.0 + gamma * at_end[2] - value[1][2]
    torch.testing.assert_close(st.returns[1, 2], cut + value[1][2])
    before = 1.0 + gamma * value[1][2] - value[0][2] + gamma * lam * cut
    torch.testing.assert_close(st.returns[0, 2], before + value[0][2])


def test_values_are_in_units_of_the_rewards():
    """The critic says 1 where every step earns the root mean square of the rewards, for ever."""
    _, algorithm = build()
    play_three_steps(algorithm, with_final_obs=True)
    st, estimator = algorithm.storage, algorithm.estimator
    task = torch.zeros(3, dtype=torch.long)
    torch.testing.assert_close(estimator.units(task), torch.full((3,), 100.0))  # gamma is 0.99, rewards are 1
    with torch.no_grad():
        torch.testing.assert_close(st.values[0], 100.0 * algorithm.critic(st.obs[0]).squeeze(-1))


def test_advantages_are_standardised_and_their_std_is_told():
    _, algorithm = build()
    play_three_steps(algorithm, with_final_obs=True)
    st = algorithm.storage
    std = algorithm.estimator.estimate(st)
    raw = st.returns - st.values
    torch.testing.assert_close(std, raw.std().view(1))
    torch.testing.assert_close(st.advantages, (raw - raw.mean()) / raw.std())


def test_without_final_observations_a_trained_model_predicts_the_end():
    _, algorithm = build()
    play_three_steps(algorithm, with_final_obs=False)
    st, model, estimator = algorithm.storage, algorithm.model, algorithm.estimator
    with torch.no_grad():
        # Until then the value before the step stands in, as in rsl_rl.
        torch.testing.assert_close(st.next_values[1, 2:], estimator.values(st.obs[1, 2:], st.task[1, 2:]))
    algorithm.update()
    with torch.no_grad():
        model.transition[-1].weight.normal_(std=0.3)
        play_three_steps(algorithm, with_final_obs=False)
        z = model.encode(st.obs["policy"][1, 2:], st.task[1, 2:])
        z, _, _ = model.step(z, st.actions[1, 2:], st.task[1, 2:])
        after = TensorDict({"policy": model.observation(z)}, batch_size=[1])
        expected = estimator.values(after, st.task[1, 2:])
    torch.testing.assert_close(st.next_values[1, 2:], expected)
    assert not torch.allclose(expected, st.values[1, 2:])
    assert not st.next_obs_valid[1, 1:].any()
    assert st.next_obs_valid[1, 0]


def test_vtrace_cuts_what_follows_an_end_and_truncates_at_one():
    # gamma = lambda = 1, V = 0, r = 1. Step 1 terminates: A_0 sees one step more, A_1 none.
    # Step 2 times out before a value of 5: A_2 = 6, whatever follows. rho = 0.5 everywhere: v_1 = 0.5, A_0 = 1.5.
    zero, end = column(0.0, 0.0, 0.0, 0.0), column(False, True, True, False)
    targets, advantages = vtrace(
        column(1.0, 1.0, 1.0, 1.0),
        zero,
        column(0.0, 9.0, 5.0, 0.0),
        column(False, True, False, False),
        end,
        torch.log(column(0.5, 0.5, 0.5, 0.5)),
        1.0,
        1.0,
    )
    torch.testing.assert_close(advantages.flatten(), torch.tensor([1.5, 1.0, 6.0, 1.0]))
    torch.testing.assert_close(targets.flatten(), torch.tensor([0.75, 0.5, 3.0, 0.5]))


def test_discounts_of_environments_may_differ():
    no = torch.zeros(2, 2, dtype=torch.bool)
    one, zero = torch.ones(2, 2), torch.zeros(2, 2)
    gamma = torch.tensor([0.5, 1.0])
    returns, _ = gae(one, zero, zero, no, no, gamma, 1.0)
    assert returns.tolist() == [[1.5, 2.0], [1.0, 1.0]]
    targets, _ = vtrace(one, zero, zero, no, no, zero, gamma, 1.0)
    assert targets.tolist() == [[1.5, 2.0], [1.0, 1.0]]
