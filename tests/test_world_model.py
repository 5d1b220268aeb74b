"""The world model: gradients go where they should, training improves it, terminations are calibrated."""

import torch
from tensordict import TensorDict

from m3po.algorithms.model_learning import ModelLearner, explained_variance
from m3po.config import WorldModelCfg
from m3po.models import WorldModel
from m3po.models.world_model import balanced_bce
from m3po.storage import Sequences


def sequences(batch=256, horizon=3, seed=0):
    """x' = x + 0.3 a, reward -|x|^2, a fall when x leaves the unit box."""
    generator = torch.Generator().manual_seed(seed)
    obs = 2 * torch.rand(batch, 1, 2, generator=generator) - 1
    actions = torch.randn(batch, horizon, 2, generator=generator)
    states = torch.cat([obs, obs + 0.3 * actions.cumsum(1)], dim=1)
    terminated = states[:, 1:].abs().amax(-1) > 1.0
    alive = torch.cumprod(1 - terminated.long(), 1)
    mask = torch.cat([torch.ones(batch, 1), alive[:, :-1]], 1).bool()
    wrap = {"batch_size": (batch, horizon)}
    reward = -states[:, :-1].square().sum(-1)
    return Sequences(
        obs=TensorDict({"policy": states[:, :-1]}, **wrap),
        next_obs=TensorDict({"policy": states[:, 1:]}, **wrap),
        actions=actions,
        rewards=reward,
        returns=3 * reward,
        terminated=terminated,
        mask=mask,
        next_mask=mask,
        task=torch.zeros(batch, horizon, dtype=torch.long),
    )


def build(**overrides):
    torch.manual_seed(0)
    cfg = WorldModelCfg(size="tiny", task_embedding_dim=4, learning_rate=3e-3, value_target="returns", **overrides)
    model = WorldModel(2, 2, 1, cfg)
    zero, one = (lambda obs, x=x: torch.full((obs.batch_size[0], 2), x) for x in (0.0, 1.0))
    learner = ModelLearner(
        model,
        lambda obs: obs["policy"],
        lambda obs: (zero(obs), one(obs)),
        lambda obs, task: zero(obs)[:, 0],
        torch.ones(1, 2, dtype=torch.bool),
    )
    return model, learner


def test_the_dynamics_learns_from_consistency_and_the_target_does_not():
    model, learner = build(dynamics="plain")
    batch = sequences()
    learner.losses(batch)["consistency"].backward()
    assert model.latent_head.weight.grad.abs().sum() > 0
    # With one step, the encoder receives a gradient through the prediction's input alone: cutting the prediction's
    # path must leave none, which would not hold if the target carried one.
    model.zero_grad()
    one = sequences(horizon=1)
    for p in model.transition.parameters():
        p.requires_grad_(False)
    model.latent_head.requires_grad_(False)
    torch.nn.init.zeros_(model.latent_head.weight)
    learner.losses(one)["consistency"].backward()
    assert model.encoder[-1].weight.grad is None or model.encoder[-1].weight.grad.abs().sum() == 0


def test_the_policys_gradient_does_not_enter_the_encoder():
    model, learner = build()
    learner.policy = lambda obs: (obs["policy"], torch.ones_like(obs["policy"]))
    learner.losses(sequences())["prior"].backward()
    assert model.encoder[-1].weight.grad is None
    assert model.prior_head[-1].weight.grad.abs().sum() > 0


def test_masked_steps_contribute_nothing():
    _, learner = build()
    batch = sequences()
    assert not batch.mask.all()
    reference = learner.losses(batch)
    batch.rewards[~batch.mask] = 1e6
    batch.next_obs["policy"][~batch.mask] = 1e3
    batch.terminated[~batch.mask] ^= True
    for name, loss in learner.losses(batch).items():
        torch.testing.assert_close(loss, reference[name])


def test_residual_dynamics_start_as_no_change():
    model, _ = build()
    z = model.encode(torch.randn(64, 2), torch.zeros(64, dtype=torch.long))
    z_next, _, _ = model.predict(z, torch.randn(64, 2), model.embed(torch.zeros(64, dtype=torch.long)))
    assert (z_next - z).abs().max() < 0.01


def test_training_beats_no_change_and_explains_reward_and_falls():
    model, learner = build()
    for i in range(5):
        batch = sequences(2000, 1, seed=i)
        flat = batch.task.flatten()
        model.obs_normalizer.update(batch.obs["policy"].flatten(0, 1), flat)
        model.rewards.update(batch.rewards.flatten(), batch.terminated.flatten(), flat)

    class Ring:
        calls = 100

        def sample(self, batch_size, horizon):
            Ring.calls += 1
            return sequences(batch_size, horizon, seed=Ring.calls)

    for _ in range(10):
        learner.train(Ring(), 0)
    quality = learner.measure(sequences(1000, seed=1))
    assert quality["skill_1"] > 0.5
    assert quality["skill_H"] > 0.5
    assert quality["reward_ev"] > 0.7
    assert quality["value_ev"] > 0.7
    assert quality["fall_probability"] > 0.5


def test_class_balance_is_undone_by_the_base_rate():
    """Trained on labels alone, a balanced head plus the base rate must report the base rate."""
    model, _ = build(balance_terminations=True)
    rate = 0.02
    model.rewards.rate.fill_(rate)
    task = torch.zeros(10_000, dtype=torch.long)
    falls = torch.arange(10_000) < rate * 10_000
    logit = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.Adam([logit], lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        balanced_bce(logit.expand(10_000), falls, model.rewards.termination_logit(task)).mean().backward()
        optimizer.step()
    alive = model.continuation(logit.detach().expand(1), task[:1])
    torch.testing.assert_close(1 - alive, torch.tensor([rate]), rtol=0.05, atol=0.0)


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
