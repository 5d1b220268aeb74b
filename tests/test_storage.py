"""Rollout storage and the replay buffer: order, masks, and sub-sequences that never cross a reset."""

import pytest
import torch
from tensordict import TensorDict

from m3po.errors import CheckpointError
from m3po.storage import ReplayBuffer, RolloutStorage

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
    replay = ReplayBuffer(storage, 3)
    dones = {(1, 0), (6, 2), (9, 1), (13, 0)}
    for i in range(5):  # wraps around: steps 8..19 remain
        fill(storage, i * T, dones)
        replay.add(storage)
    assert replay.size == replay.capacity == 12
    torch.manual_seed(0)
    batch = replay.sample(2000, 5)
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


@pytest.mark.parametrize("steps", [2, 4, 6, 100])
def test_the_newest_steps_come_in_order_of_time(storage, steps):
    replay = ReplayBuffer(storage, 3)
    for i in range(5):
        fill(storage, i * T)
        replay.add(storage)
    found = replay.latest(steps)
    count = min(steps, 12)
    assert found["obs"]["policy"][:, :, 0].tolist() == [[float(t)] * N for t in range(20 - count, 20)]
    assert found["obs"]["policy"][0, :, 1].tolist() == [0.0, 1.0, 2.0]
    assert found["rewards"][:, 0].tolist() == [float(t) for t in range(20 - count, 20)]
    assert set(replay.latest(1, ("invalid", "task"))) == {"invalid", "task"}


def test_a_buffer_that_is_not_full_yet_holds_what_was_added(storage):
    replay = ReplayBuffer(storage, 3)
    for i in range(2):
        fill(storage, i * T)
        replay.add(storage)
    assert replay.latest(100)["rewards"][:, 0].tolist() == [float(t) for t in range(8)]
    starts = replay.sample(500, 3).obs["policy"][:, 0, 0]
    assert sorted(set(starts.tolist())) == [float(t) for t in range(6)]  # every start, and no other


def test_episodes_end_where_the_environments_do_not_go_on(storage):
    replay = ReplayBuffer(storage, 3)
    for i in range(4):
        if i == 3:
            replay.interrupt()
        fill(storage, i * T)
        replay.add(storage)
    found = replay.latest(100, ("dones", "rewards", "terminated"))
    assert found["rewards"][found["dones"]].tolist() == [11.0] * N
    assert not found["terminated"].any()
    batch = replay.sample(500, 3)
    time = batch.obs["policy"][..., 0]
    assert not (batch.mask & (time >= 12) & (time[:, :1] < 12)).any()


def test_steps_that_never_took_place_are_masked(storage):
    replay = ReplayBuffer(storage, 1)
    fill(storage, 0)
    storage.invalid[1, 2] = True
    storage.next_obs_valid[2, 0] = False
    replay.add(storage)
    batch = replay.sample(300, 2)
    time, env = batch.obs["policy"].unbind(-1)
    invalid, unknown = (time == 1) & (env == 2), (time == 2) & (env == 0)
    assert torch.equal(batch.mask, ~invalid)
    assert torch.equal(batch.next_mask, ~invalid & ~unknown)


def test_a_buffer_goes_on_from_its_state(storage):
    first = ReplayBuffer(storage, 2, seed=3)
    for i in range(3):
        fill(storage, i * T)
        first.add(storage)
    first.sample(5, 2)
    second = ReplayBuffer(storage, 2, seed=4)
    second.load_state_dict(first.state_dict())
    pairs = [(x.sample(50, 2), x.latest(3)) for x in (first, second)]
    assert torch.equal(pairs[0][0].obs["policy"], pairs[1][0].obs["policy"])
    assert torch.equal(pairs[0][1]["rewards"], pairs[1][1]["rewards"])
    with pytest.raises(CheckpointError, match="do not fit"):
        ReplayBuffer(storage, 3).load_state_dict(first.state_dict())


def test_a_buffer_of_one_rollout_holds_exactly_the_current_one(storage):
    replay = ReplayBuffer(storage, 1)
    for i in range(2):
        fill(storage, i * T)
        replay.add(storage)
    assert replay.sample(500, 2).obs["policy"][..., 0].min() >= T


def test_mini_batches_leave_out_what_never_took_place(storage):
    fill(storage, 0)
    storage.invalid[:, 1] = storage.any_invalid = True
    seen = torch.cat([batch["obs"]["policy"] for batch in storage.mini_batches(2, 1)])
    assert sorted(map(tuple, seen.tolist())) == [(float(t), float(n)) for t in range(T) for n in (0, 2)]
    storage.clear()
    assert not storage.invalid.any()


def test_all_epochs_share_one_order_and_rows_stay_together(storage):
    fill(storage, 0)
    storage.advantages.copy_(storage.rewards)
    batches = list(storage.mini_batches(3, 2))
    assert len(batches) == 6
    for first, second in zip(batches[:3], batches[3:], strict=True):
        assert torch.equal(first["advantages"], second["advantages"])
        assert torch.equal(first["obs"]["policy"][:, 0], first["advantages"])
        assert torch.equal(first["actions"][:, 0], first["advantages"])


def test_invalid_steps_are_made_finite_and_others_left_alone(storage):
    fill(storage, 0)
    storage.invalid[1, 2] = True
    for name in ("actions", "std", "log_beta"):
        getattr(storage, name)[1:3, 2] = torch.nan
    storage.repair_invalid()
    assert storage.actions[1, 2].item() == storage.log_beta[1, 2].item() == 0.0
    assert storage.std[1, 2].item() == 1.0
    for name in ("actions", "std", "log_beta"):
        assert getattr(storage, name)[2, 2].isnan().all()
