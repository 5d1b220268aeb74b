"""Rollout storage and the model's ring: order, masks, and sub-sequences that never cross a reset."""

import pytest
import torch
from tensordict import TensorDict

from m3po.storage import RolloutRing, RolloutStorage

T, N = 4, 3


def fill(storage, start, dones=()):
    """Store T steps whose observation is (time, env); ``dones`` lists (time, env) pairs that end an episode."""
    storage.clear()
    for t in range(start, start + T):
        stamp = torch.stack([torch.full((N,), float(t)), torch.arange(N).float()], 1)
        obs = TensorDict({"policy": stamp}, batch_size=[N])
        after = TensorDict({"policy": stamp + torch.tensor([1.0, 0.0])}, batch_size=[N])
        one = torch.ones(N)
        storage.add_action(
            obs,
            torch.zeros(N, dtype=torch.long),
            actions=stamp[:, :1],
            mean=stamp[:, :1],
            std=one[:, None],
            plan_mean=stamp[:, :1],
            values=one,
            log_pi=one,
            log_beta=one,
            plan_gain=one,
            planned=one.bool(),
        )
        ended = torch.tensor([(t, n) in dones for n in range(N)])
        storage.add_outcome(after, one.bool(), one * t, ended, ended)


@pytest.fixture
def storage():
    obs = TensorDict({"policy": torch.zeros(N, 2)}, batch_size=[N])
    return RolloutStorage(obs, ["policy"], T, 1, "cpu")


def test_a_full_rollout_refuses_another_step(storage):
    fill(storage, 0)
    with pytest.raises(OverflowError):
        storage.add_action(storage.obs[0], storage.task[0])


def test_mini_batches_cover_every_sample_once_per_epoch(storage):
    fill(storage, 0)
    seen = torch.cat([batch["obs"]["policy"] for batch in storage.mini_batches(2, 1)])
    assert sorted(map(tuple, seen.tolist())) == [(float(t), float(n)) for t in range(T) for n in range(N)]


def test_sequences_are_consecutive_and_never_cross_a_reset(storage):
    ring = RolloutRing(storage, 3)
    dones = {(1, 0), (6, 2), (9, 1), (13, 0)}
    for i in range(5):  # wraps around: steps 8..19 remain
        fill(storage, i * T, dones)
        ring.add(storage)
    assert ring.size == ring.capacity == 12
    torch.manual_seed(0)
    batch = ring.sample(2000, 5)
    time, env = batch.obs["policy"].unbind(-1)
    assert time[:, 0].min() == 8
    assert time[:, 0].max() == 15
    for k in range(5):
        valid = batch.mask[:, k]
        assert (time[valid, k] == time[valid, 0] + k).all()
        assert (env[valid, k] == env[valid, 0]).all()
        assert (batch.next_obs["policy"][valid, k, 0] == time[valid, k] + 1).all()
        if k:
            ended = torch.tensor(
                [(t, n) in dones for t, n in zip(time[:, k - 1].tolist(), env[:, 0].tolist(), strict=True)]
            )
            assert not (valid & ended).any()
            assert torch.equal(valid, batch.mask[:, k - 1] & ~ended)
    # A terminal transition itself is part of the data.
    assert (batch.terminated & batch.mask).any()


def test_newest_starts_at_the_current_rollout(storage):
    ring = RolloutRing(storage, 2)
    for i in range(3):
        fill(storage, i * T)
        ring.add(storage)
    batch = ring.newest(2)
    assert batch.obs["policy"][:, :, 0].tolist() == [[8.0, 9.0]] * N
    assert batch.obs["policy"][:, 0, 1].tolist() == [0.0, 1.0, 2.0]


def test_a_ring_of_one_rollout_holds_exactly_the_current_one(storage):
    ring = RolloutRing(storage, 1)
    for i in range(2):
        fill(storage, i * T)
        ring.add(storage)
    assert ring.sample(500, 2).obs["policy"][..., 0].min() >= T
