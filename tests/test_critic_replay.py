"""The critic's training on the ring: targets against a plain loop, and what they are good for."""

from types import SimpleNamespace

import pytest
import torch
from tensordict import TensorDict
from toy_env import PointEnv, runner_cfg

from m3po.algorithms.critic_replay import CriticReplay
from m3po.config import AlgorithmCfg
from m3po.runners import M3PORunner
from m3po.validation import validate

pytestmark = pytest.mark.unit

LAM, REPLAY = 0.9, {"steps_per_iteration": 8, "batch_size": 64, "horizon": 24}


def critic(obs: TensorDict) -> torch.Tensor:
    """A value that any observation tells from any other."""
    return (obs["policy"] * torch.tensor([3.0, 0.7])).sum(-1, keepdim=True).sin()


def replay(discounts: list[float]) -> CriticReplay:
    """A replay whose critic is :func:`critic`, of tasks with these discounts."""
    units = torch.nn.Linear(1, 1)
    gamma = discounts[0] if len(discounts) == 1 else torch.tensor(discounts).repeat(4)  # of trajectory()'s 8
    estimator = SimpleNamespace(values=lambda obs, task: critic(obs).squeeze(-1) * (1.0 + task), gamma=gamma)
    return CriticReplay(units, list(units.parameters()), estimator, AlgorithmCfg(critic_replay={"lam": LAM}))


def trajectory(num_steps: int, num_envs: int, num_tasks: int, seed: int = 0) -> dict:
    """Random steps with terminations, time-outs with and without their final observation, and lost steps."""
    stream = torch.Generator().manual_seed(seed)

    def chance(share: float) -> torch.Tensor:
        return torch.rand(num_steps, num_envs, generator=stream) < share

    dones, lost = chance(0.3), chance(0.1)
    shape = (num_steps, num_envs)
    return {
        "obs": TensorDict({"policy": torch.randn(*shape, 2, generator=stream)}, batch_size=shape),
        "next_obs": TensorDict({"policy": torch.randn(*shape, 2, generator=stream)}, batch_size=shape),
        "rewards": torch.randn(shape, generator=stream),
        "dones": dones | lost,
        "terminated": dones & chance(0.5) & ~lost,
        "next_obs_valid": ~dones | chance(0.5),
        "lost": lost,
        "task": (torch.arange(num_envs) % num_tasks).expand(shape),
    }


@pytest.mark.parametrize("discounts", [[0.95], [0.95, 0.8]], ids=["one task", "two tasks"])
def test_returns_are_those_of_a_plain_loop(discounts):
    num_steps, num_envs = 12, 8
    steps = trajectory(num_steps, num_envs, len(discounts))
    learner = replay(discounts)
    found = learner.returns(steps)
    for n in range(num_envs):
        task = int(steps["task"][0, n])
        value = lambda group, t, n=n, task=task: critic(steps[group][t, n]).item() * (1 + task)  # noqa: E731
        target = 0.0
        for t in reversed(range(num_steps)):
            own = value("obs", t)
            done, terminated = bool(steps["dones"][t, n]), bool(steps["terminated"][t, n])
            known = not steps["lost"][t, n] and (bool(steps["next_obs_valid"][t, n]) or terminated or not done)
            ended = done or t == num_steps - 1
            if not known:
                target = own  # nothing was learnt of this step
            elif terminated:
                target = steps["rewards"][t, n].item()
            elif ended:
                target = steps["rewards"][t, n].item() + discounts[task] * value("next_obs", t)
            else:
                ahead = (1 - LAM) * value("obs", t + 1) + LAM * target
                target = steps["rewards"][t, n].item() + discounts[task] * ahead
            assert found[t, n].item() == pytest.approx(target, abs=1e-5), (t, n)


def test_what_a_lost_environment_showed_reaches_no_other_step():
    steps = trajectory(12, 8, 1)
    learner, clean = replay([0.95]), trajectory(12, 8, 1)
    for group in ("obs", "next_obs"):
        steps[group]["policy"][steps["lost"]] = torch.nan
    kept = ~steps["lost"]
    kept[:-1] &= ~steps["lost"][1:] | steps["dones"][:-1]  # a step that led to a lost one sees its value
    assert torch.equal(learner.returns(steps)[kept].isfinite(), torch.ones(int(kept.sum()), dtype=torch.bool))
    ended = kept & steps["dones"]
    assert torch.equal(learner.returns(steps)[ended], learner.returns(clean)[ended])


def train(iterations: int, seed: int = 0, **algorithm: object) -> M3PORunner:
    torch.manual_seed(seed)
    cfg = runner_cfg(world_model={"steps_per_iteration": 0}, planner={"share": 0.0}, **algorithm)
    runner = M3PORunner(PointEnv(32, episode=60), cfg, None, "cpu")
    runner.learn(iterations)
    return runner


def error_of_values(runner: M3PORunner) -> float:
    """Mean error of the critic against discounted returns of whole episodes, in deviations of these."""
    env, alg = PointEnv(256, episode=60, seed=7), runner.alg
    obs, _ = env.reset()
    values, returns, alive = alg.critic(obs).squeeze(-1).detach(), torch.zeros(256), torch.ones(256)
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
        [error_of_values(train(30, seed, **replay)) for seed in range(6)] for replay in ({"critic_replay": REPLAY}, {})
    )
    assert sum(with_it) < 0.75 * sum(without), (with_it, without)


def test_advantages_are_those_of_the_critic_that_has_learnt():
    runner = train(1, critic_replay=REPLAY)
    alg, seen = runner.alg, {}
    learn = alg.policy_learner.train

    def watched(rollout):
        with torch.no_grad():
            seen["values"] = rollout.values - alg.critic(rollout.obs.flatten(0, 1)).view_as(rollout.values)
        seen["advantages"] = (rollout.returns - rollout.values).clone(), rollout.advantages.clone()
        return learn(rollout)

    alg.policy_learner.train = watched
    runner.learn(1)
    assert seen["values"].abs().max() < 1e-5
    raw, standardised = seen["advantages"]
    assert torch.allclose((raw - raw.mean()) / raw.std(), standardised, atol=1e-4)


def test_the_critic_learns_on_the_ring_alone():
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


def test_an_interrupted_ring_does_not_chain_episodes():
    """After a resume that begins new episodes, the newest stored step must not be followed by one of the next."""
    runner = train(2, critic_replay=REPLAY)
    ring = runner.alg.ring
    assert not ring.latest(1)["dones"].all()
    ring.interrupt()
    assert ring.latest(1)["dones"].all()
    assert not ring.latest(1)["terminated"].any()
    assert ring.latest(10**6)["rewards"].shape[0] == ring.size == 16


def test_a_critic_that_nothing_teaches_is_refused():
    with pytest.raises(ValueError, match="the critic would learn nothing"):
        validate(AlgorithmCfg(value_loss_coef=0.0), 16, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"horizon": 0}, "critic_replay.horizon must be at least 1, got 0"),
        ({"batch_size": 0}, "critic_replay.batch_size must be at least 1"),
        ({"steps_per_iteration": -1}, "critic_replay.steps_per_iteration must not be negative"),
        ({"lam": 1.5}, r"critic_replay.lam must lie in \[0, 1\]"),
    ],
)
def test_wrong_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        validate(AlgorithmCfg(critic_replay=change), 16, 8)
