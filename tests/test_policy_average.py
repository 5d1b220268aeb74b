"""The policy that is played is the average of the one that learns, and survives checkpoints, exports and transfers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from toy_env import PointEnv, runner_cfg
from toy_gates import open_gates

from m3po.algorithms.policy_average import KEY
from m3po.algorithms.policy_outputs import PolicyOutputs
from m3po.envs.multi_task import MultiTaskVecEnv, TaskEnv
from m3po.errors import UserError
from m3po.export import export_policy
from m3po.runners import M3PORunner
from m3po.runners.checkpoint import read_checkpoint


def make(decay: float = 0.75, folder: Path | None = None) -> M3PORunner:
    """A runner with normalised observations."""
    torch.manual_seed(3)
    cfg = runner_cfg(policy_average_decay=decay)
    cfg["actor"]["obs_normalization"] = True
    return M3PORunner(PointEnv(), cfg, None if folder is None else str(folder), "cpu")


def weights(policy: torch.nn.Module) -> torch.Tensor:
    """All trained numbers of a policy."""
    return torch.cat([p.detach().flatten() for p in policy.parameters()]).clone()


def test_it_is_the_exponential_average_over_iterations_with_current_statistics():
    runner = make()
    expected = None
    for _ in range(4):
        runner.learn(1)
        newest = weights(runner.alg.actor)
        expected = newest if expected is None else 0.75 * expected + 0.25 * newest
        torch.testing.assert_close(weights(runner.alg.average.policy), expected)
    assert not torch.equal(expected, newest)
    assert not runner.inference_policy().training
    for name, value in runner.alg.actor.named_buffers():
        assert torch.equal(dict(runner.alg.average.policy.named_buffers())[name], value), name


def test_rollouts_are_those_of_the_newest_policy():
    """The average changes what is played, not what is learnt."""
    policies = []
    for decay in (0.0, 0.75):
        runner = make(decay)
        runner.learn(3)
        policies.append(weights(runner.alg.actor))
    assert torch.equal(*policies)


def test_without_a_decay_the_newest_policy_is_played_and_nothing_more_is_stored():
    runner = make(0.0)
    assert runner.inference_policy() is runner.alg.actor
    assert KEY not in runner.alg.save()


def test_a_checkpoint_brings_it_back_and_the_average_goes_on(tmp_path):
    trained, loaded = make(), make()
    trained.learn(3)
    trained.save(str(tmp_path / "a.pt"))
    loaded.load(str(tmp_path / "a.pt"))
    before = weights(trained.alg.average.policy)
    assert torch.equal(weights(loaded.inference_policy()), before)
    assert not torch.equal(weights(loaded.alg.actor), before)
    loaded.learn(1)
    expected = 0.75 * before + 0.25 * weights(loaded.alg.actor)
    torch.testing.assert_close(weights(loaded.inference_policy()), expected)


def test_a_checkpoint_that_has_none_plays_its_policy(tmp_path):
    """As those of earlier versions."""
    older, newer = make(0.0), make()
    older.learn(2)
    older.save(str(tmp_path / "a.pt"))
    newer.load(str(tmp_path / "a.pt"))
    assert torch.equal(weights(newer.inference_policy()), weights(older.alg.actor))


@pytest.mark.parametrize("decay", [0.0, 0.75])
def test_a_process_that_never_sampled_plans_with_the_noise_of_what_is_played(tmp_path, decay):
    """As an evaluation does, which loads a checkpoint and acts."""
    trained, loaded = make(decay), make(decay)
    open_gates(trained.alg)
    trained.learn(2)
    trained.save(str(tmp_path / "a.pt"))
    loaded.load(str(tmp_path / "a.pt"), {"actor": True, "critic": True})
    played, obs = loaded.alg.average.policy, loaded.env.get_observations()
    with torch.no_grad():
        mean, std = PolicyOutputs(played)(obs)
    assert torch.equal(mean, played(obs))
    torch.testing.assert_close(std, played.distribution.std_param.detach().expand_as(mean))
    with torch.inference_mode():
        actions = [runner.inference_policy("planner")(obs) for runner in (trained, loaded)]
    assert not torch.allclose(actions[0], mean)
    torch.testing.assert_close(*actions)


def test_a_noise_that_depends_on_the_observation_is_that_of_each():
    torch.manual_seed(3)
    cfg = runner_cfg()
    cfg["actor"]["distribution_cfg"] = {"class_name": "HeteroscedasticGaussianDistribution", "init_std": 0.7}
    runner = M3PORunner(PointEnv(), cfg, None, "cpu")
    runner.learn(1)
    actor, obs = runner.alg.actor, runner.env.get_observations()
    actor(obs, stochastic_output=True)
    for found, expected in zip(PolicyOutputs(actor)(obs), actor.output_distribution_params, strict=True):
        assert torch.equal(found, expected)
    assert actor.output_std.unique(dim=0).shape[0] == 16


def test_export_writes_what_is_played(tmp_path):
    runner = make()
    runner.learn(3)
    played = runner.inference_policy()
    assert max(export_policy(runner, tmp_path).values()) < 1e-5
    obs = runner.env.get_observations()
    exported = torch.jit.load(tmp_path / "policy.pt")(obs["policy"])
    torch.testing.assert_close(exported, played(obs))
    assert not torch.allclose(exported, runner.alg.actor(obs), atol=1e-3)


def test_other_tasks_start_with_the_average_of_the_ones_before(tmp_path):
    def agent(*names: str) -> M3PORunner:
        env = MultiTaskVecEnv([TaskEnv(name, PointEnv(8), (-20.0, 0.0)) for name in names], "cpu")
        return M3PORunner(env, runner_cfg(policy_average_decay=0.75), None, "cpu")

    old, new = agent("near", "far"), agent("far", "wide")
    old.learn(3)
    old.save(str(tmp_path / "a.pt"))
    new.transfer(str(tmp_path / "a.pt"))
    for key in ("mlp.0.weight", "mlp.0.bias"):
        there, here = (r.alg.average.policy.state_dict()[key] for r in (old, new))
        assert torch.equal(there, here), key
    embeddings = [r.alg.average.policy.state_dict()["task_embedding"] for r in (old, new)]
    assert torch.equal(embeddings[0][1], embeddings[1][0])
    stored = read_checkpoint(tmp_path / "a.pt")
    assert not torch.equal(stored[KEY]["mlp.0.weight"], stored["actor_state_dict"]["mlp.0.weight"])


@pytest.mark.parametrize("decay", [-0.1, 1.0, 2.0])
def test_a_decay_that_is_none_is_refused(decay):
    with pytest.raises(UserError, match=r"policy_average_decay must lie in \[0, 1\)"):
        make(decay)
