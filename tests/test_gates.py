"""Each gate closes where its part is useless, and opens where it is useful."""

import pytest
import torch
from test_plan_learning import MODEL, collect, judged, runner_of
from toy_env import PointEnv

from m3po.algorithms.gates import (
    FULL_REALISED,
    GAIN_RATE,
    GAIN_STEPS,
    LEAST_MODEL_STEPS,
    LEAST_SHARE,
    REALISED_RATE,
    REALISED_STEPS,
    REWARDED_ENOUGH,
    REWARDED_RATE,
    Gates,
)


def gains_of(runner, iterations=12, before=4):
    """What rollouts said of the gradient, after the first few."""
    found = []
    for iteration in range(iterations):
        runner.learn(1)
        if iteration >= before:
            found.append(runner.alg.metrics["plan/gain"])
    return torch.tensor(found)


# -- plans -------------------------------------------------------------------------------------------------------------


def test_the_gain_opens_plans_in_proportion():
    gates = Gates(4)
    gates.gain.copy_(torch.tensor([-1.0, 0.0, 0.03, 1.0]))
    assert gates.trust(0.06).tolist() == pytest.approx([0.0, 0.0, 0.5, 1.0])


@pytest.mark.parametrize(
    ("steps", "before", "weight"),
    [
        (GAIN_STEPS / 8, 10_000, GAIN_RATE / 8),  # what a few steps tell is mostly noise
        (100 * GAIN_STEPS, 10_000, GAIN_RATE),
        (GAIN_STEPS / 8, 0, GAIN_RATE),  # at first there is nothing else to go by
        (GAIN_STEPS / 8, 3, 1 / (1 / GAIN_RATE + 3)),
        (0, 0, 0.0),
    ],
)
def test_how_much_a_rollout_weighs_in_the_running_gain(steps, before, weight):
    gates = Gates(2)
    gates.gain.fill_(0.5)
    gates.judged.fill_(before)
    gates.update_gain(torch.tensor([2.0, 2.0]), torch.tensor([steps, 0.0]))
    assert gates.judged.tolist() == [before + (steps > 0), before]
    assert gates.gain.tolist() == pytest.approx([0.5 + weight * 1.5, 0.5])


def test_numbers_that_are_not_finite_count_as_no_gain():
    gates = Gates(1)
    for value in (torch.nan, torch.inf):
        gates.update_gain(torch.tensor([value]), torch.tensor([1e6]))
        gates.update_realised(torch.tensor([value]), torch.tensor([1e6]))
    assert gates.gain.isfinite().all()
    assert gates.realised.isfinite().all()


# -- plans that are acted on -------------------------------------------------------------------------------------------


def test_the_share_that_acts_follows_the_realised_gain():
    gates = Gates(5)
    gates.gain.copy_(torch.tensor([0.1, 0.1, 0.1, 0.1, 0.0]))
    gates.realised.copy_(FULL_REALISED * torch.tensor([-1.0, 0.0, 0.5, 3.0, 3.0]))
    # Least part, so that it can still be measured; nothing at all where the gradient is worth nothing.
    assert gates.acting().tolist() == pytest.approx([LEAST_SHARE, LEAST_SHARE, 0.5, 1.0, 0.0])
    assert gates.worth_acting().tolist() == pytest.approx([0.0, 0.0, 0.5, 1.0, 0.0])


def test_a_realised_gain_of_zero_shrinks_the_share_to_the_least_part():
    runner = runner_of(PointEnv(64), planned_fraction=0.5)
    runner.learn(1)
    alg = runner.alg
    alg.gates.gain.fill_(1.0)
    alg.behaviour.rotate()
    assert len(alg.behaviour.planned_ids) == 32
    collect(runner)
    st = alg.storage
    assert st.planned.any(0).sum() == 32
    st.advantages.zero_()
    for _ in range(200):
        alg.hindsight.measure(judged(alg))
    alg.behaviour.rotate()
    assert len(alg.behaviour.planned_ids) == round(LEAST_SHARE * 32)
    # Where planned environments do better, the share comes back.
    st.advantages.copy_(st.planned.float())
    metrics = {}
    for _ in range(200):
        metrics = alg.hindsight.measure(judged(alg))
    assert metrics["planner/lasting_gain"] == pytest.approx(1.0)
    alg.behaviour.rotate()
    assert len(alg.behaviour.planned_ids) == 32
    # Where they do worse, it goes.
    st.advantages.copy_(-st.planned.float())
    for _ in range(200):
        alg.hindsight.measure(judged(alg))
    assert alg.gates.realised.item() == pytest.approx(-1.0, abs=0.1)
    alg.behaviour.rotate()
    assert len(alg.behaviour.planned_ids) == round(LEAST_SHARE * 32)


def test_steps_that_never_took_place_say_nothing_of_plans():
    runner = runner_of(PointEnv(8), planned_fraction=1.0)
    alg = runner.alg
    collect(runner)
    st = alg.storage
    st.planned[:, :4] = True
    st.advantages.copy_(st.planned.float())
    st.invalid[:, 3] = st.any_invalid = True
    st.advantages[:, 3] = 1e6
    assert alg.hindsight.measure(judged(alg))["planner/lasting_gain"] == pytest.approx(1.0)
    before = alg.gates.realised.clone()
    st.planned.fill_(True)  # nothing to compare with
    assert alg.hindsight.measure(judged(alg))["planner/lasting_gain"] == 0.0
    assert torch.equal(alg.gates.realised, before)


def test_few_planned_steps_move_the_realised_gain_little():
    gates = Gates(3)
    gates.update_realised(torch.full((3,), 1.0), torch.tensor([0.0, REALISED_STEPS / 4, 10.0 * REALISED_STEPS]))
    weight = torch.tensor([0.0, REALISED_RATE / 4, REALISED_RATE])
    torch.testing.assert_close(gates.realised, FULL_REALISED + weight * (1 - FULL_REALISED))


# -- the bonus, and steps of the model ---------------------------------------------------------------------------------


def test_rewarded_episodes_close_the_bonus():
    gates = Gates(3)
    for _ in range(200):
        gates.update_rewarded(torch.tensor([0.0, 0.5 * REWARDED_ENOUGH, 1.0]), torch.ones(3).bool())
    assert gates.unrewarded().tolist() == pytest.approx([1.0, 0.5, 0.0], abs=1e-4)
    gates = Gates(2)
    gates.update_rewarded(torch.ones(2), torch.tensor([True, False]))
    assert gates.rewarded.tolist() == pytest.approx([REWARDED_RATE, 0.0])


def test_the_model_learns_as_much_as_it_is_needed():
    """For plans that are worth something, or for the bonus; otherwise a part, so that this can still be found out."""
    gates = Gates(2)
    gates.rewarded.fill_(1.0)
    assert gates.model_steps(0.06) == LEAST_MODEL_STEPS
    gates.gain[1] = 0.024  # of one task is enough
    assert gates.model_steps(0.06) == pytest.approx(0.8)
    gates.gain[1] = 0.03
    assert gates.model_steps(0.06) == 1.0
    gates.gain.zero_()
    gates.rewarded[0] = 0.5 * REWARDED_ENOUGH
    assert gates.model_steps(0.06) == pytest.approx(0.5)
    gates.rewarded[0] = 0.0
    assert gates.model_steps(0.06) == 1.0


def test_without_a_bonus_rewards_are_looked_for_all_the_same():
    """Otherwise the model would take all of its steps for ever."""
    runner = runner_of(PointEnv(32), bonus={"size": 0.0})
    runner.learn(3)
    assert runner.alg.metrics["gate/rewarded"] > 0.2
    assert runner.alg.metrics["bonus/alpha"] == 0.0


def test_gates_are_reported_and_part_of_a_checkpoint():
    gates = Gates(2)
    gates.gain.copy_(torch.tensor([1.0, 2.0]))
    gates.plan_budget.copy_(torch.tensor([0.25, 0.75]))
    state = {"gain": 1.5, "realised": FULL_REALISED, "rewarded": 0.0, "ppo_budget": 1.0, "plan_budget": 0.5}
    state["rollouts"] = 1
    assert gates.metrics() == pytest.approx({f"gate/{name}": value for name, value in state.items()})
    other = Gates(2)
    other.load_state_dict(gates.state_dict())
    assert torch.equal(other.gain, gates.gain)


def test_the_model_takes_no_more_than_all_of_its_steps():
    """However much its gradient is worth, and none of its steps are extra where that is half of what is full."""
    gates = Gates(2)
    gates.rewarded.fill_(1.0)
    for gain, part in ((1.0, 1.0), (0.03, 1.0), (0.015, 0.5), (0.0, LEAST_MODEL_STEPS)):
        gates.gain.copy_(torch.tensor([gain, -1.0]))
        assert gates.model_steps(0.06) == pytest.approx(part)


# -- in training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [0, 1, 2])
def test_a_critic_of_noise_closes_plans(noise):
    """Advantages that have nothing to do with the actions leave a mean gain near 0."""
    runner = runner_of(PointEnv(64, seed=noise))
    runner.learn(3)
    alg, stream, seen = runner.alg, torch.Generator().manual_seed(noise), []
    alg.gates.gain.fill_(0.0)
    alg.gates.judged.fill_(1000)
    for _ in range(20):
        collect(runner)
        alg.plan_learner.plan(alg.storage, alg.replay)
        alg.hindsight.measure(judged(alg, torch.randn(alg.storage.advantages.shape, generator=stream)))
        seen.append(alg.gates.trust(alg.cfg.planner.full_gain).item())
        alg.storage.clear()
    assert alg.gates.gain.abs() < 0.02
    assert sum(seen) / len(seen) < 0.2


def test_advantages_along_the_gradient_open_plans():
    runner = runner_of(PointEnv(64))
    runner.learn(3)
    alg, stream = runner.alg, torch.Generator().manual_seed(0)
    alg.gates.gain.fill_(0.0)
    for _ in range(20):
        collect(runner)
        st = alg.storage
        obs, task = st.obs.flatten(0, 1), st.task.flatten()
        z = alg.objective.encode(obs, task)
        gradient = alg.objective.gradient(z, st.mean.flatten(0, 1), st.std.flatten(0, 1), task)
        noise = ((st.actions - st.mean) / st.std).flatten(0, 1)
        along = (gradient / gradient.square().sum(-1).mean().sqrt() * noise).sum(-1)
        advantage = 0.3 * along + torch.randn(along.shape, generator=stream)
        alg.plan_learner.plan(st, alg.replay)
        alg.hindsight.measure(judged(alg, advantage.view_as(st.advantages)))
        st.clear()
    assert alg.gates.trust(alg.cfg.planner.full_gain) == 1.0


def test_a_model_that_is_fed_with_shuffled_actions_closes_plans():
    """It cannot know what actions do, so its gradient is worth less than that of the model that was told."""
    found = {False: [], True: []}
    for seed in range(3):
        for shuffled, gains in found.items():
            torch.manual_seed(seed)
            world_model = MODEL | {"replay_transitions": 40_000}
            runner = runner_of(PointEnv(512, episode=60, seed=seed), desired_kl=0.03, world_model=world_model)
            replay = runner.alg.replay
            if shuffled:
                sample = replay.sample

                def confused(batch_size, horizon, sample=sample, replay=replay):
                    batch = sample(batch_size, horizon)
                    batch.actions = batch.actions[torch.randperm(batch_size, generator=replay.generator)]
                    return batch

                replay.sample = confused
            gains.append(gains_of(runner, 20))
    told, shuffled = (torch.cat(gains).mean() for gains in found.values())
    assert told > shuffled + 0.01, found
    assert shuffled < 0.02, found
