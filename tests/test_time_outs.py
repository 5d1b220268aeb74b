"""Time-outs whose final observation the environment does not deliver: the world model says what follows."""

from __future__ import annotations

import torch
from tensordict import TensorDict
from toy_env import PointEnv, runner_cfg

from m3po.algorithms import M3PO
from m3po.runners import M3PORunner

MESSAGE = "the environment does not deliver final observations"


class Silent(PointEnv):
    """The point, without the observations before a reset."""

    def step(self, actions):
        obs, reward, dones, extras = super().step(actions)
        extras.pop("final_obs", None)
        return obs, reward, dones, extras


def train(env: PointEnv, iterations: int = 30, predicts: bool = True) -> M3PORunner:
    """Train critic and model with a policy that stays as it is, so that all runs have the same values to learn."""
    torch.manual_seed(0)
    cfg = runner_cfg(
        schedule="fixed",
        learning_rate=0.0,
        std_learning_rate=1e-12,
        gamma=0.95,
        planner={"max_learning_kl": 0.0, "planned_fraction": 0.0},
        world_model={"steps_per_iteration": 20},
        critic_replay={"steps_per_iteration": 32, "batch_size": 256},
    )
    run = M3PORunner(env, cfg, None, "cpu")
    if not predicts:
        run.alg._predicted_value = None
    run.learn(iterations)
    return run


def value_before_time_outs(run: M3PORunner) -> float:
    """Mean value of the last observations of episodes, reward units, with the policy of the run."""
    env, values = PointEnv(256, episode=8, edge=torch.inf, seed=7), []
    obs = env.get_observations()
    with torch.inference_mode():
        for _ in range(7):
            obs, *_ = env.step(run.alg.actor(obs, stochastic_output=True))
        values = run.alg.estimator.values(obs, torch.zeros(256, dtype=torch.long))
    assert (env.episode_length_buf == 7).all()
    return values.mean().item()


def test_values_before_time_outs_are_those_with_final_observations(capsys):
    """About -34, and -25 where the value of the observation before stands in."""
    known = value_before_time_outs(train(PointEnv(16, episode=8)))
    assert MESSAGE not in capsys.readouterr().out
    unknown = value_before_time_outs(train(Silent(16, episode=8)))
    assert capsys.readouterr().out.count(MESSAGE) == 1
    assert abs(unknown - known) < 3.0, (unknown, known)
    before = value_before_time_outs(train(Silent(16, episode=8), predicts=False))
    assert abs(before - known) > 6.0, (before, known)


def test_the_prediction_stands_in_once_the_model_is_trained_and_before_as_in_rsl_rl():
    env = Silent(16, episode=8)
    torch.manual_seed(0)
    alg = M3PO.construct_algorithm(env.get_observations(), env, runner_cfg(), "cpu")
    obs = env.get_observations()
    for trained in (False, True):
        with torch.inference_mode():
            for _ in range(8):
                obs, reward, dones, extras = env.step(alg.act(obs))
                alg.process_env_step(obs, reward, dones, extras)
            alg.compute_returns(obs)
        st, estimator = alg.storage, alg.estimator
        estimator.estimate(st)
        ends = st.dones & ~st.terminated
        assert ends.any()
        assert not st.next_obs_valid[ends].any()
        before, task = st.obs[ends], st.task[ends]
        with torch.no_grad():
            expected = estimator.values(before, task)
            if trained:
                ahead = alg.model.step(alg.objective.encode(before, task), st.actions[ends], task)[0]
                imagined = TensorDict({"policy": alg.model.observation(ahead)}, batch_size=task.shape)
                assert not torch.allclose(estimator.values(imagined, task), expected)
                expected = estimator.values(imagined, task)
        torch.testing.assert_close(st.next_values[ends], expected)
        alg.update()


def test_a_prediction_that_is_not_finite_is_not_used():
    run = train(Silent(16, episode=8), 2)
    alg, st, predict = run.alg, run.alg.storage, run.alg.estimator.predict
    ends = torch.zeros(8, 16, dtype=torch.bool)
    ends[-1] = True
    st.next_obs_valid[-1] = False
    values = []
    for spoilt in (False, True):

        def broken(*steps, spoilt=spoilt):
            return torch.where(torch.arange(16) == 3, torch.nan, predict(*steps)) if spoilt else predict(*steps)

        alg.estimator.predict, found = broken, torch.zeros(8, 16)
        with torch.no_grad():
            alg.estimator.bootstrap(found, ends, vars(st))
        values.append(found[-1])
    others = torch.arange(16) != 3
    assert torch.equal(values[0][others], values[1][others])
    with torch.no_grad():
        torch.testing.assert_close(
            values[1], torch.where(others, values[0], alg.estimator.values(st.obs[-1], st.task[-1]))
        )


def test_a_model_that_was_loaded_stands_in_at_once():
    run = train(Silent(16, episode=8), 1)
    again = M3PO.construct_algorithm(run.env.get_observations(), run.env, runner_cfg(), "cpu")
    assert again.estimator.predict is None
    again.load(run.alg.save(), None, True)
    assert again.estimator.predict is not None
