"""The implicit world model: what it predicts, its units, what its losses reach, and that training improves it."""

from types import SimpleNamespace

import pytest
import torch
from tensordict import TensorDict

from m3po.algorithms.gates import Gates
from m3po.algorithms.model_learning import DECAY, ModelLearner
from m3po.algorithms.statistics import explained_variance
from m3po.algorithms.tasks import Tasks
from m3po.config import AlgorithmCfg, PlannerCfg, WorldModelCfg
from m3po.models import WorldModel
from m3po.models.world_model import OUTLIER, PREDICTABLE
from m3po.planning import Objective
from m3po.storage import Sequences
from m3po.validation import validate


def sequences(batch=256, horizon=3, seed=0, num_tasks=1):
    """x' = x + 0.3 a, reward -|x|^2, a termination that costs 20 when x leaves the unit box."""
    generator = torch.Generator().manual_seed(seed)
    obs = 2 * torch.rand(batch, 1, 2, generator=generator) - 1
    actions = torch.randn(batch, horizon, 2, generator=generator)
    states = torch.cat([obs, obs + 0.3 * actions.cumsum(1)], dim=1)
    terminated = states[:, 1:].abs().amax(-1) > 1.0
    alive = torch.cumprod(1 - terminated.long(), 1)
    mask = torch.cat([torch.ones(batch, 1), alive[:, :-1]], 1).bool()
    wrap = {"batch_size": (batch, horizon)}
    return Sequences(
        obs=TensorDict({"policy": states[:, :-1]}, **wrap),
        next_obs=TensorDict({"policy": states[:, 1:]}, **wrap),
        actions=actions,
        rewards=torch.where(terminated, -20.0, -states[:, :-1].square().sum(-1)),
        terminated=terminated,
        mask=mask,
        next_mask=mask,
        task=torch.arange(batch).unsqueeze(1).expand(-1, horizon) % num_tasks,
    )


def rollout_of(batch):
    """What a learner reads of a finished rollout, of sequences of one step."""
    fields = {"obs": batch.obs, "next_obs": batch.next_obs, "actions": batch.actions, "rewards": batch.rewards}
    flags = {"terminated": batch.terminated, "invalid": torch.zeros_like(batch.mask), "next_obs_valid": batch.next_mask}
    return SimpleNamespace(**fields, **flags, task=batch.task, device="cpu")


class Replay:
    """An endless supply of sequences."""

    calls = 100

    def sample(self, batch_size, horizon):
        Replay.calls += 1
        return sequences(batch_size, horizon, seed=Replay.calls)


def build(num_tasks=1, **overrides):
    torch.manual_seed(0)
    sizes = {"features": 16, "width": 32, "task_embedding_dim": 4, "batch_size": 128, "steps_per_iteration": 150}
    cfg = AlgorithmCfg(world_model=WorldModelCfg(**{**sizes, "extra_steps": 0, **overrides}))
    model = WorldModel(2, 2, num_tasks, cfg.world_model)
    tasks = Tasks(torch.zeros(4, dtype=torch.long), torch.full((num_tasks,), 0.99), torch.ones(num_tasks, 2).bool())
    objective = Objective(
        model, None, lambda obs, task: 3.0 * obs["policy"][..., 0], {"policy": 2}, tasks.discounts, PlannerCfg()
    )
    learner = ModelLearner(
        objective, lambda obs: (obs["policy"], torch.ones_like(obs["policy"])), Gates(num_tasks), tasks, cfg
    )
    return model, learner


def randomise(model, std=0.3):
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and name != "task_embedding":
            torch.nn.init.normal_(parameter, std=std)


# -- predictions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", [16, 0])
def test_an_untrained_anchored_model_predicts_no_change(features):
    model, _ = build(features=features)
    obs, task = torch.randn(64, 2), torch.zeros(64, dtype=torch.long)
    z = model.encode(obs, task)
    assert z.shape == (64, 2 + features)
    assert torch.equal(model.observation(z), obs)
    z, reward, alive = model.step(z, torch.randn(64, 2), task)
    assert torch.equal(model.observation(z), obs)
    assert torch.equal(reward, torch.zeros(64))
    torch.testing.assert_close(alive, torch.full((64,), 0.5))


def test_the_latent_without_the_anchor_is_features_alone_with_heads():
    model, _ = build(anchor=False)
    obs, task = torch.randn(5, 2), torch.zeros(5, dtype=torch.long)
    z = model.encode(obs, task)
    assert z.shape == (5, 16)
    torch.testing.assert_close(z.view(5, 2, 8).sum(-1), torch.ones(5, 2))
    after, reward, alive = model.step(z, torch.randn(5, 2), task)
    torch.testing.assert_close(after.view(5, 2, 8).sum(-1), torch.ones(5, 2))
    assert reward.shape == alive.shape == model.value(z, task).shape == (5,)
    assert torch.equal(model.policy(z, task), torch.zeros(5, 2))
    assert not hasattr(build()[0], "value_head")


def test_a_step_is_what_was_predicted_in_the_units_of_the_task():
    model, _ = build(num_tasks=2)
    randomise(model)
    model.changes.var.copy_(torch.tensor([[0.04, 1.0], [4.0, 9.0]]))
    model.reward_normalizer.mean.copy_(torch.tensor([[1.0], [-2.0]]))
    model.reward_normalizer.var.copy_(torch.tensor([[4.0], [0.25]]))
    model.terminations.terminal.copy_(torch.tensor([-7.0, 5.0]))
    obs, task, action = torch.randn(6, 2), torch.arange(6) % 2, torch.randn(6, 2)
    z = model.encode(obs, task)
    change, features, reward, logits = model.predict(z, action, task)
    after, earned, alive = model.step(z, action, task)
    unit = torch.tensor([[0.2, 1.0], [2.0, 3.0]])[task]
    torch.testing.assert_close(after[:, :2], obs + change * (unit + 1e-4))
    assert torch.equal(after[:, 2:], features)
    goes_on = torch.sigmoid(-logits)
    torch.testing.assert_close(alive, goes_on)
    going = torch.tensor([1.0, -2.0])[task] + reward * torch.tensor([2.0, 0.5])[task]
    expected = goes_on * going + (1 - goes_on) * torch.tensor([-7.0, 5.0])[task]
    torch.testing.assert_close(earned, expected, atol=1e-4, rtol=1e-4)


def test_other_dimensions_do_not_touch_a_padded_task():
    """What a task lacks stays 0, however far one imagines and whatever the network says there."""
    torch.manual_seed(0)
    model = WorldModel(5, 2, 2, WorldModelCfg(features=16, width=32, task_embedding_dim=4), [2, 5])
    randomise(model, 1.0)
    task = torch.tensor([0, 0, 1, 1])
    obs, actions = torch.randn(4, 5) * model.own_dims[task], torch.randn(3, 4, 2)

    def imagine():
        z = model.encode(obs, task)
        for action in actions:
            z, reward, _ = model.step(z, action, task)
        return model.observation(z), reward

    with torch.no_grad():
        x, reward = imagine()
        assert torch.equal(x[:2, 2:], torch.zeros(2, 3))
        assert (x[:, :2] != obs[:, :2]).all()
        assert (x[2:] != obs[2:]).all()
        model.transition[-1].weight[2:5] += 5.0  # the predicted change of dimensions 2 to 4
        again, reward_again = imagine()
    assert torch.equal(again[:2], x[:2])
    assert torch.equal(reward_again[:2], reward[:2])
    assert not torch.allclose(again[2:, 2:], x[2:, 2:])


def test_unpredictable_dimensions_pass_through():
    model, _ = build()
    randomise(model)
    obs, task = torch.randn(5, 2), torch.zeros(5, dtype=torch.long)
    z, action = model.encode(obs, task), torch.randn(5, 2)
    whole = model.observation(model.step(z, action, task)[0]) - obs
    for share, part in ((0.0, 0.0), (0.5 * PREDICTABLE, 0.5), (PREDICTABLE, 1.0), (0.9, 1.0)):
        model.explained[0, 1] = share
        change = model.observation(model.step(z, action, task)[0]) - obs
        torch.testing.assert_close(change[:, 1], part * whole[:, 1])
        torch.testing.assert_close(change[:, 0], whole[:, 0])


def test_what_cannot_be_predicted_is_found_out():
    """Here the second dimension is drawn anew at every step."""
    model, learner = build(steps_per_iteration=60)

    def noisy(batch, horizon, seed=0):
        found = sequences(batch, horizon, seed)
        stream = torch.Generator().manual_seed(seed + 7)
        for obs in (found.obs, found.next_obs):
            obs["policy"][..., 1] = torch.randn(batch, horizon, generator=stream)
        return found

    class Noisy(Replay):
        def sample(self, batch_size, horizon):
            Replay.calls += 1
            found = noisy(batch_size, horizon, Replay.calls)
            # What follows has nothing to do with what was.
            return found

    for i in range(12):
        rollout = rollout_of(noisy(500, 1, seed=i))
        rollout.obs["policy"][..., 1] = 0.0  # so that "no change" explains as much as anything can
        if i:
            learner.measure(rollout)
        learner.train(Noisy(), rollout, 20)
    assert model.explained[0, 0] > 0.8
    assert model.explained[0, 1] < 0.35


def test_actions_and_observations_of_another_task_are_told_apart():
    model, _ = build(num_tasks=2)
    randomise(model)
    obs, action = torch.randn(1, 2), torch.randn(1, 2)
    steps = [model.step(model.encode(obs, k), action, k)[0] for k in (torch.tensor([0]), torch.tensor([1]))]
    assert not torch.allclose(*steps)


# -- units and their statistics ----------------------------------------------------------------------------------------


def test_the_change_loss_is_a_mean_over_the_tasks_own_dimensions():
    model = WorldModel(4, 2, 2, WorldModelCfg(features=16, width=32), [1, 4])
    change, target = torch.zeros(2, 4), torch.tensor([[2.0, 9.0, 9.0, 9.0], [2.0, 0.0, 0.0, 0.0]])
    assert model.change_loss(change, target, torch.tensor([0, 1])).tolist() == [4.0, 1.0]
    # What cannot be predicted weighs a tenth.
    model.explained[1, 0] = 0.0
    found = model.change_loss(change, target, torch.tensor([0, 1]))
    torch.testing.assert_close(found, torch.tensor([4.0, 0.1 * 4.0 / 3.1]))


def test_outliers_do_not_set_the_targets():
    model, _ = build()
    task = torch.zeros(2, dtype=torch.long)
    jump = torch.tensor([[1e6, 0.0], [0.0, -1e6]])
    assert model.change_targets(torch.zeros(2, 2), jump, task).abs().max() == OUTLIER
    assert model.reward_targets(torch.tensor([-1e6, 3.0]), task).abs().max() == OUTLIER


def test_statistics_are_those_of_the_transitions():
    """Of rewards, those of steps that go on; of changes, those that are known."""
    model, _ = build()
    batch = sequences(4000, 1)
    obs, next_obs, task = (x.flatten(0, 1) for x in (batch.obs["policy"], batch.next_obs["policy"], batch.task))
    reward, terminated, valid = batch.rewards.flatten(), batch.terminated.flatten(), torch.ones(4000, dtype=torch.bool)
    valid[:100] = False
    poisoned = next_obs.clone()
    poisoned[:100] = 1e6
    model.update_statistics(obs, poisoned, valid, reward, terminated, task)
    torch.testing.assert_close(
        model.changes.var[0], (next_obs - obs)[100:].var(0, unbiased=False), rtol=1e-3, atol=1e-4
    )
    torch.testing.assert_close(model.obs_normalizer.mean[0], obs.mean(0), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(model.reward_normalizer.mean[0, 0], reward[~terminated].mean(), rtol=1e-3, atol=1e-3)
    assert model.terminations.terminal[0] == -20.0


def test_statistics_forget_what_the_replay_buffer_no_longer_holds():
    """Rewards grow with the policy: their unit is that of what is learnt from."""
    model, _ = build(replay_transitions=200)
    task, no = torch.zeros(100, dtype=torch.long), torch.zeros(100, dtype=torch.bool)
    for scale in [1.0] * 50 + [100.0] * 8:
        obs = scale * torch.randn(100, 2, generator=torch.Generator().manual_seed(int(scale)))
        reward = scale * torch.linspace(-1, 1, 100)
        model.update_statistics(obs, 2 * obs, ~no, reward, no, task)
    for found, wanted in (
        (model.obs_normalizer.var[0], obs.var(0)),
        (model.changes.var[0], obs.var(0)),
        (model.reward_normalizer.var[0, 0], reward.var()),
        (model.terminations.square[0], reward.square().mean()),
    ):
        torch.testing.assert_close(found / wanted, torch.ones_like(found), atol=0.1, rtol=0.0)


@pytest.mark.parametrize("num_tasks", [1, 2])
def test_their_memory_is_the_replay_buffers_share_of_a_task(num_tasks):
    model, _ = build(num_tasks, replay_transitions=1000)
    assert model.obs_normalizer.memory == model.terminations.memory == 1000 / num_tasks


def test_the_explained_share_is_a_running_mean_of_tasks_that_were_seen():
    model, _ = build(num_tasks=2)
    model.update_explained(torch.zeros(2, 2), torch.tensor([True, False]))
    torch.testing.assert_close(model.explained, torch.tensor([[0.8, 0.8], [1.0, 1.0]]))


# -- losses ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("anchor", [True, False])
def test_the_features_learn_to_predict_themselves_and_their_target_does_not(anchor):
    model, learner = build(anchor=anchor, horizon=3)
    randomise(model)
    encoder = model.encoder[0][0].weight
    learner.losses(sequences())["features"].backward()
    assert model.transition[-1].weight.grad.abs().sum() > 0
    assert encoder.grad.abs().sum() > 0
    # Where the prediction reads no features, a gradient of the encoder could only come from the target.
    model.zero_grad()
    with torch.no_grad():
        model.transition[0][0].weight[:, model.anchor_dim : model.anchor_dim + 16] = 0.0
    learner.losses(sequences(horizon=1))["features"].backward()
    assert model.transition[-1].weight.grad.abs().sum() > 0
    assert encoder.grad.abs().sum() == 0


def test_features_are_learnt_in_units_of_what_a_step_changes():
    """Nothing is gained by making them smaller: with the same predictions, half of all changes are half the unit."""
    _, learner = build()
    model = learner.model
    batch = sequences(horizon=1)
    shared = {name: getattr(batch, name) for name in ("obs", "next_obs", "rewards", "terminated", "task")}
    rollout = SimpleNamespace(invalid=~batch.mask, next_obs_valid=batch.next_mask, **shared)

    def loss(scale):
        noise = torch.randn(256, 16, generator=torch.Generator().manual_seed(0))

        def encode(obs, task):
            features = 0.5 + scale * torch.cat([obs] * 8, dim=-1)
            return torch.cat([obs, features], dim=-1)

        def predict(z, action, task):
            change, _, *others = WorldModel.predict(model, z, action, task)
            return change, z[..., 2:] + scale * noise, *others

        model.encode, model.predict = encode, predict
        learner._update_statistics(rollout)  # the unit is measured there
        found = learner.losses(batch)["features"].item()
        del model.encode, model.predict
        return found

    assert loss(1.0) == pytest.approx(loss(0.01), rel=1e-3)


def test_the_heads_imitate_critic_and_policy_and_the_policys_error_does_not_enter_the_encoder():
    model, learner = build(anchor=False)
    model.values.update(torch.randn(100, 1), torch.zeros(100, dtype=torch.long))
    encoder = model.encoder[0][0].weight
    randomise(model)
    learner.losses(sequences())["policy"].backward()
    assert encoder.grad is None or not encoder.grad.any()
    assert model.policy_head[-1].weight.grad.abs().sum() > 0
    learner.losses(sequences())["value"].backward()
    assert encoder.grad.any()
    assert set(build()[1].losses(sequences())) == {"change", "features", "reward", "termination"}


@pytest.mark.parametrize("anchor", [True, False])
def test_masked_steps_contribute_nothing(anchor):
    _, learner = build(anchor=anchor)
    randomise(learner.model)
    batch = sequences()
    assert not batch.mask.all()
    reference = learner.losses(batch)
    batch.rewards[~batch.mask] = 1e6
    batch.next_obs["policy"][~batch.mask] = 1e3
    batch.terminated[~batch.mask] ^= True
    for name, loss in learner.losses(batch).items():
        torch.testing.assert_close(loss, reference[name])


def test_the_reward_of_a_termination_is_not_learnt_as_a_reward():
    _, learner = build()
    randomise(learner.model)
    batch = sequences()
    reference = learner.losses(batch)["reward"]
    batch.rewards[batch.terminated] = 1e3
    assert torch.equal(learner.losses(batch)["reward"], reference)


def test_unknown_successors_teach_no_change_but_their_rewards_count():
    _, learner = build()
    randomise(learner.model)
    batch = sequences(horizon=1)
    batch.next_mask = batch.mask & (torch.arange(256) % 2 == 0).unsqueeze(1)
    reference = learner.losses(batch)
    batch.next_obs["policy"][~batch.next_mask] = 1e3
    found = learner.losses(batch)
    assert all(torch.equal(found[name], reference[name]) for name in ("change", "features", "reward"))
    batch.rewards += 0.5
    assert not torch.equal(learner.losses(batch)["reward"], reference["reward"])


def test_later_steps_weigh_less_and_start_where_imagination_is():
    model, learner = build(features=0)
    batch = sequences(horizon=2)
    batch.mask[:] = batch.next_mask[:] = True
    model.changes.var.fill_(1.0)
    # Untrained, it predicts no change: after two steps it is off by both of them.
    moved = (batch.next_obs["policy"] - batch.obs["policy"][:, :1]) / (1.0 + 1e-4)
    errors = moved.square().mean(-1).mean(0)
    found = learner.losses(batch)["change"].item()
    assert found == pytest.approx(4.0 * (errors[0] + DECAY * errors[1]).item(), rel=1e-4)


def test_the_task_embedding_is_the_policys():
    model, learner = build(num_tasks=2)
    randomise(model)
    terms = learner.losses(sequences(num_tasks=2))
    torch.stack(list(terms.values())).sum().backward()
    assert model.task_embedding.grad is None
    assert all(p is not model.task_embedding for group in learner.optimizer.param_groups for p in group["params"])


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("anchor", [True, False])
def test_training_explains_change_reward_and_terminations(anchor):
    """The price of a termination, many times what actions do to the reward, does not drown that."""
    model, learner = build(anchor=anchor)
    unseen = rollout_of(sequences(1000, 1, seed=1))
    for i in range(5):
        losses = learner.train(Replay(), rollout_of(sequences(1000, 1, seed=i + 10)), 20)
    quality = learner.measure(unseen)
    assert losses["model_steps"] == 150
    assert quality["model/dynamics_r2"] > (0.9 if anchor else 0.5)
    assert quality["model/reward_ev"] > 0.7
    assert quality["model/termination_probability"] > 0.5
    obs, task = unseen.obs["policy"][:, 0], unseen.task[:, 0]
    with torch.no_grad():
        z, reward, alive = model.step(model.encode(obs, task), unseen.actions[:, 0], task)
    distance = unseen.next_obs["policy"][:, 0].abs().amax(-1)
    sure, terminated = (distance - 1.0).abs() > 0.4, distance > 1.0
    assert ((alive < 0.5) == terminated)[sure].float().mean() > 0.95
    assert (reward[sure & terminated] + 20.0).abs().median() < 3.0
    assert reward[sure & ~terminated].median() > -3.0
    if anchor:
        off = model.observation(z) - unseen.next_obs["policy"][:, 0]
        assert off.square().mean() < 0.1 * (unseen.next_obs["policy"][:, 0] - obs).square().mean()


def test_the_first_iterations_take_extra_steps_and_the_gates_turn_the_others_down():
    _, learner = build(steps_per_iteration=8, extra_steps=5, batch_size=8)
    rollout = rollout_of(sequences(20, 1))
    steps = {}
    for iteration in (0, 9, 10):
        steps[iteration] = learner.train(Replay(), rollout, iteration)["model_steps"]
    assert steps == {0: 13, 9: 13, 10: 8}  # unrewarded: the bonus needs the model
    learner.gates.rewarded.fill_(1.0)
    assert learner.train(Replay(), rollout, 10)["model_steps"] == 2  # plans are worth nothing
    learner.gates.gain.fill_(1.0)
    assert learner.train(Replay(), rollout, 10)["model_steps"] == 8
    learner.replay_ratio = 0.5
    assert learner.train(Replay(), rollout, 10)["model_steps"] == 4


def test_without_steps_nothing_is_trained():
    model, learner = build(steps_per_iteration=0)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    assert learner.train(Replay(), rollout_of(sequences(20, 1)), 0) == {}
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_invalid_steps_reach_neither_statistics_nor_measurements():
    results = []
    for poison in (0.0, 50.0):
        model, learner = build()
        rollout = rollout_of(sequences(200, 1))
        rollout.invalid[:20] = True
        for field in (rollout.obs["policy"], rollout.next_obs["policy"], rollout.rewards, rollout.actions):
            field[:20] = poison
        learner._update_statistics(rollout)
        results.append((learner.measure(rollout), [x.clone() for x in model.buffers()]))
    assert results[0][0] == results[1][0]
    assert all(map(torch.equal, results[0][1], results[1][1]))


def test_explained_variance():
    target = torch.tensor([1.0, 2.0, 3.0, 100.0])
    mask = torch.tensor([True, True, True, False])
    task = torch.zeros(4, dtype=torch.long)
    assert explained_variance(target + 5.0, target, mask, task, 1) == 1.0
    assert explained_variance(torch.full((4,), 2.0), target, mask, task, 1) == 0.0
    assert explained_variance(target, torch.ones(4), mask, task, 1) == 0.0


def test_explained_variance_keeps_tasks_apart():
    target = torch.tensor([1.0, 2.0, 3.0, 1000.0, 2000.0, 0.0])
    predicted = torch.tensor([1.0, 2.0, 3.0, 5.0, 5.0, 5.0])
    task = torch.tensor([0, 0, 0, 1, 1, 2])
    mask = torch.ones(6, dtype=torch.bool)
    torch.testing.assert_close(explained_variance(predicted, target, mask, task, 4), torch.tensor([1.0, 0.0, 0.0, 0.0]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": 12}, "features must be a multiple of 8, got 12"),
        ({"features": 0, "anchor": False}, "features must be positive without the anchor"),
        ({"width": 0}, "world_model.width must be at least 1"),
        ({"horizon": 9}, "horizon .9. exceeds the 8 steps"),
        ({"batch_size": 0}, "world_model.batch_size must be at least 1"),
        ({"replay_transitions": -1}, "replay_transitions must not be negative"),
        ({"steps_per_iteration": 0}, "max_learning_kl is 0.06, but the world model.*set, for example, world_model.ste"),
    ],
)
def test_wrong_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        validate(AlgorithmCfg(world_model=WorldModelCfg(**change)), 16, 8)
