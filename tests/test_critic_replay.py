"""The critic's training on the replay buffer: targets against a plain loop, and what they are good for."""

import pytest
import torch
from tensordict import TensorDict
from toy_env import PointEnv, runner_cfg

from m3po.algorithms.advantage_estimator import AdvantageEstimator
from m3po.algorithms.critic_replay import LAMBDA, CriticReplay
from m3po.algorithms.tasks import Tasks
from m3po.config import AlgorithmCfg
from m3po.runners import M3PORunner
from m3po.validation import validate

pytestmark = pytest.mark.unit

REPLAY = {"steps_per_iteration": 8, "batch_size": 64, "horizon": 24}


def critic(obs: TensorDict) -> torch.Tensor:
    """A value that any observation tells from any other."""
    return (obs["policy"] * torch.tensor([3.0, 0.7])).sum(-1, keepdim=True).sin()


def predict(obs: TensorDict, actions: torch.Tensor, task: torch.Tensor) -> torch.Tensor:
    """What a world model could say of the value of what follows."""
    return critic(obs).squeeze(-1) + actions.sum(-1) + task


def replay(discounts: list[float]) -> CriticReplay:
    """A replay whose critic is :func:`critic`, of tasks with these discounts in :func:`trajectory`'s 8 environments."""
    count, cfg = len(discounts), AlgorithmCfg(gamma=discounts[0])
    mask = torch.ones(count, 2, dtype=torch.bool)
    estimator = AdvantageEstimator(critic, Tasks(torch.arange(8) % count, torch.tensor(discounts), mask), cfg)
    estimator.units = lambda task: 1.0 + task
    parameters = torch.nn.Linear(1, 1)
    return CriticReplay(parameters, list(parameters.parameters()), estimator, cfg)


def trajectory(num_steps: int, num_envs: int, num_tasks: int, seed: int = 0) -> dict:
    """Random steps with terminations, time-outs with and without their final observation, and invalid steps."""
    stream = torch.Generator().manual_seed(seed)

    def chance(share: float) -> torch.Tensor:
        return torch.rand(num_steps, num_envs, generator=stream) < share

    dones, invalid = chance(0.3), chance(0.1)
    shape = (num_steps, num_envs)
    return {
        "obs": TensorDict({"policy": torch.randn(*shape, 2, generator=stream)}, batch_size=shape),
        "next_obs": TensorDict({"policy": torch.randn(*shape, 2, generator=stream)}, batch_size=shape),
        "actions": torch.randn(*shape, 2, generator=stream),
        "rewards": torch.randn(shape, generator=stream),
        "dones": dones | invalid,
        "terminated": dones & chance(0.5) & ~invalid,
        "next_obs_valid": ~dones | chance(0.5),
        "invalid": invalid,
        "task": (torch.arange(num_envs) % num_tasks).expand(shape),
    }


@pytest.mark.parametrize("discounts", [[0.95], [0.95, 0.8]], ids=["one task", "two tasks"])
@pytest.mark.parametrize("trained", [False, True], ids=["no model yet", "a trained model"])
def test_returns_are_those_of_a_plain_loop(discounts, trained):
    num_steps, num_envs = 12, 8
    steps = trajectory(num_steps, num_envs, len(discounts))
    learner = replay(discounts)
    learner.estimator.predict = predict if trained else None
    found, advantages = learner.returns(steps)
    for n in range(num_envs):
        task = int(steps["task"][0, n])
        value = lambda group, t, n=n, task=task: critic(steps[group][t, n]).item() * (1 + task)  # noqa: E731
        target = 0.0
        for t in reversed(range(num_steps)):
            own = value("obs", t)
            done, terminated = bool(steps["dones"][t, n]), bool(steps["terminated"][t, n])
            ended = done or t == num_steps - 1
            if steps["invalid"][t, n]:
                target = own  # nothing was learnt of this step
            elif terminated:
                target = steps["rewards"][t, n].item()
            elif ended:
                after = value("next_obs", t)
                if done and not steps["next_obs_valid"][t, n]:  # the world model's prediction, or as rsl_rl
                    ids = torch.tensor(task)
                    after = predict(steps["obs"][t, n], steps["actions"][t, n], ids).item() if trained else own
                target = steps["rewards"][t, n].item() + discounts[task] * after
            else:
                ahead = (1 - LAMBDA) * value("obs", t + 1) + LAMBDA * target
                target = steps["rewards"][t, n].item() + discounts[task] * ahead
            assert found[t, n].item() == pytest.approx(target, abs=1e-5), (t, n)
            assert advantages[t, n].item() == pytest.approx(target - own, abs=1e-5), (t, n)


def test_what_an_invalid_step_showed_reaches_no_other_step():
    steps = trajectory(12, 8, 1)
    learner, clean = replay([0.95]), trajectory(12, 8, 1)
    for group in ("obs", "next_obs"):
        steps[group]["policy"][steps["invalid"]] = torch.nan
    kept = ~steps["invalid"]
    kept[:-1] &= ~steps["invalid"][1:] | steps["dones"][:-1]  # a step that led to an invalid one sees its value
    assert torch.equal(learner.returns(steps)[0][kept].isfinite(), torch.ones(int(kept.sum()), dtype=torch.bool))
    ended = kept & steps["dones"]
    assert torch.equal(learner.returns(steps)[0][ended], learner.returns(clean)[0][ended])


def train(iterations: int, seed: int = 0, **algorithm: object) -> M3PORunner:
    torch.manual_seed(seed)
    off = {"world_model": {"steps_per_iteration": 0}, "bonus": {"size": 0.0}}
    off["planner"] = {"planned_fraction": 0.0, "max_learning_kl": 0.0}
    cfg = runner_cfg(**{**off, "value_loss_coef": 1.0, **algorithm})
    runner = M3PORunner(PointEnv(32, episode=60), cfg, None, "cpu")
    runner.learn(iterations)
    return runner


def error_of_values(runner: M3PORunner) -> float:
    """Mean error of the critic against discounted returns of whole episodes, in stds of these."""
    env, alg = PointEnv(256, episode=60, seed=7), runner.alg
    obs, _ = env.reset()
    values, returns, alive = (
        alg.estimator.values(obs, alg.tasks.ids[:1].expand(256)).detach(),
        torch.zeros(256),
        torch.ones(256),
    )
    with torch.no_grad():
        for t in range(60):
            obs, reward, dones, _ = env.step(alg.actor(obs, stochastic_output=True))
            returns += alive * alg.cfg.gamma**t * reward
            alive *= 1 - dones
    return ((values - returns).square().mean().sqrt() / returns.std()).item()


def test_values_are_known_sooner():
    """Rewards of 60 steps reach a critic that learns from 8 at a time only after many rollouts.

    Six seeds, of which one goes the other way: the ratio of the means is 0.5, that of a seed is 0.3 to 1.3, and
    rounding, which depends on what else the process has done, is enough to make one seed another.
    """
    with_it, without = (
        [error_of_values(train(30, seed, critic_replay=replay)) for seed in range(6)]
        for replay in (REPLAY, {"steps_per_iteration": 0})
    )
    assert sum(with_it) < 0.75 * sum(without), (with_it, without)


def test_advantages_are_those_of_the_critic_that_has_learnt():
    runner = train(1, critic_replay=REPLAY)
    alg, seen = runner.alg, {}
    learn = alg.policy_learner.train

    def watched(rollout):
        with torch.no_grad():
            seen["values"] = rollout.values - alg.estimator.values_of(rollout.obs, rollout.task)
        seen["advantages"] = (rollout.returns - rollout.values).clone(), rollout.advantages.clone()
        return learn(rollout)

    alg.policy_learner.train = watched
    runner.learn(1)
    assert seen["values"].abs().max() < 1e-5
    raw, standardised = seen["advantages"]
    assert torch.allclose((raw - raw.mean()) / raw.std(), standardised, atol=1e-4)


def test_the_critic_learns_on_the_replay_buffer_alone():
    """Without its loss in the policy's epochs, these do not touch it."""
    runner = train(1, critic_replay=REPLAY, value_loss_coef=0.0)
    alg, learn, seen = runner.alg, runner.alg.policy_learner.train, []

    def watched(rollout):
        seen.append([p.clone() for p in alg.critic.parameters()])
        losses = learn(rollout)
        assert all(map(torch.equal, seen[-1], alg.critic.parameters()))
        assert "value" not in losses
        return losses

    alg.policy_learner.train = watched
    runner.learn(2)
    assert not any(map(torch.equal, *seen))
    assert error_of_values(train(30, critic_replay=REPLAY, value_loss_coef=0.0)) < 2.0


def test_an_interrupted_replay_buffer_does_not_chain_episodes():
    """After a resume that begins new episodes, the newest stored step must not be followed by one of the next."""
    runner = train(2, critic_replay=REPLAY)
    buffer = runner.alg.replay
    assert not buffer.latest(1)["dones"].all()
    buffer.interrupt()
    assert buffer.latest(1)["dones"].all()
    assert not buffer.latest(1)["terminated"].any()
    assert buffer.latest(10**6)["rewards"].shape[0] == buffer.size == 16


def test_a_critic_that_nothing_teaches_is_refused():
    with pytest.raises(ValueError, match="the critic would learn nothing"):
        validate(AlgorithmCfg(critic_replay={"steps_per_iteration": 0}), 16, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"horizon": 0}, "critic_replay.horizon must be at least 1, got 0"),
        ({"batch_size": 0}, "critic_replay.batch_size must be at least 1"),
        ({"steps_per_iteration": -1}, "critic_replay.steps_per_iteration must not be negative"),
        ({"learning_rate": -1.0}, "critic_replay.learning_rate must not be negative"),
    ],
)
def test_wrong_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        validate(AlgorithmCfg(critic_replay=change), 16, 8)
