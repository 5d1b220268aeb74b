"""New statistics of the observations do not change what policy and critic do."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from toy_env import PointEnv, runner_cfg

from m3po.algorithms import M3PO
from m3po.models.normalizers import SETTLED, SMALL, learn_statistics


def observations(rows: int, shift: float, stream: torch.Generator) -> TensorDict:
    """Observations of a point, whose position and spread depend on ``shift``."""
    x = shift + (1.0 + shift) * torch.randn(rows, 4, generator=stream)
    return TensorDict({"policy": x}, batch_size=[rows])


def algorithm(**changes) -> M3PO:
    """M3PO on points, with normalised observations."""
    env = PointEnv(num_envs=8)
    cfg = runner_cfg(policy_average_decay=0.5, **changes)
    for name in ("actor", "critic"):
        cfg[name]["obs_normalization"] = True
    alg = M3PO.construct_algorithm(env.get_observations(), env, cfg, "cpu")
    alg.train_mode()
    return alg


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", ["actor", "critic"])
def test_outputs_stay_while_statistics_change(name):
    stream, alg = torch.Generator().manual_seed(0), algorithm()
    network = getattr(alg, name)
    for _ in range(4 * SETTLED):
        learn_statistics(network, observations(64, 0.0, stream))
    seen = observations(64, 0.5, stream)
    before, mean = network(seen), network.obs_normalizer.mean
    learn_statistics(network, seen)
    assert (network.obs_normalizer.mean - mean).abs().min() > 0.01
    torch.testing.assert_close(network(seen), before)


@pytest.mark.usefixtures("float64")
def test_a_dimension_that_begins_to_change_keeps_its_weights():
    stream, network = torch.Generator().manual_seed(0), algorithm().actor
    constant = torch.tensor([1.0, 0.0, 1.0, 1.0])
    for _ in range(4 * SETTLED):
        rows = observations(64, 0.0, stream)
        rows["policy"] *= constant
        learn_statistics(network, rows)
    weights, std = network.mlp[0].weight.clone(), network.obs_normalizer.stds()
    learn_statistics(network, observations(64, 0.0, stream))
    stretched = network.obs_normalizer.stds() / std
    assert stretched[1] > 1.0 + SMALL
    torch.testing.assert_close(network.mlp[0].weight[:, 1], weights[:, 1])
    others = [0, 2, 3]
    torch.testing.assert_close(network.mlp[0].weight[:, others], (weights * stretched)[:, others])
    assert (stretched[others] != 1.0).all()


@pytest.mark.usefixtures("float64")
def test_young_statistics_change_outputs_as_in_rsl_rl():
    stream, alg = torch.Generator().manual_seed(0), algorithm()
    weights = alg.actor.mlp[0].weight.clone()
    for _ in range(SETTLED):
        learn_statistics(alg.actor, observations(64, 0.0, stream))
    assert torch.equal(alg.actor.mlp[0].weight, weights)
    learn_statistics(alg.actor, observations(64, 0.0, stream))
    assert not torch.equal(alg.actor.mlp[0].weight, weights)


@pytest.mark.usefixtures("float64")
def test_the_averaged_and_the_earlier_policies_keep_their_functions_too():
    stream, alg = torch.Generator().manual_seed(0), algorithm()
    for _ in range(4 * SETTLED):
        learn_statistics(alg.actor, observations(64, 0.0, stream))
    alg.average.update()
    alg.newest_update.keep("ppo")
    with torch.no_grad():
        alg.actor.mlp[-1].bias += 1.0  # a step of the policy
    seen = observations(64, 0.5, stream)
    others = [*alg.average.networks, alg.newest_update.earlier["ppo"]]
    before = [each(seen) for each in others]
    learn_statistics(alg.actor, seen, others)
    for each, was in zip(others, before, strict=True):
        for name, statistics in alg.actor.named_buffers():
            each.get_buffer(name).copy_(statistics)
        torch.testing.assert_close(each(seen), was)


def test_a_network_that_normalises_nothing_learns_nothing():
    env = PointEnv(num_envs=8)
    alg = M3PO.construct_algorithm(env.get_observations(), env, runner_cfg(), "cpu")
    before = {name: x.clone() for name, x in alg.actor.state_dict().items()}
    learn_statistics(alg.actor, env.get_observations())
    assert all(torch.equal(before[name], x) for name, x in alg.actor.state_dict().items())
