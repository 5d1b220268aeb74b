"""The model of observations through which the value gradient looks ahead."""

import pytest
import torch

from m3po.models.observation_model import OUTLIER, ObservationModel

pytestmark = pytest.mark.unit


def transitions(count: int = 512, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random steps of two dimensions, a quarter of which fall, for a price of 100."""
    stream = torch.Generator().manual_seed(seed)
    obs, action = (torch.randn(count, 2, generator=stream) for _ in range(2))
    terminated = obs[:, 0] > 0.67
    reward = torch.where(terminated, -100.0, 3.0 + 0.01 * action[:, 0])
    task = torch.zeros(count, dtype=torch.long)
    return {
        "obs": obs,
        "action": action,
        "next_obs": obs + 0.1 * action,
        "reward": reward,
        "terminated": terminated,
        "task": task,
    }


def fitted(data: dict[str, torch.Tensor], steps: int = 400) -> ObservationModel:
    """A model that was trained on transitions."""
    torch.manual_seed(0)
    model = ObservationModel(2, 2, 1, 32)
    valid = torch.ones(len(data["obs"]), dtype=torch.bool)
    model.update_statistics(data["obs"], data["next_obs"], valid, data["reward"], data["terminated"], data["task"])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        sum(term.mean() for term in model.losses(**data).values()).backward()
        optimizer.step()
    return model


def test_an_untrained_model_predicts_no_change():
    data = transitions()
    model = ObservationModel(2, 2, 1, 32)
    next_obs, reward, alive = model.step(data["obs"], data["action"], data["task"])
    assert torch.equal(next_obs, data["obs"])
    assert torch.equal(reward, torch.zeros_like(reward))
    assert torch.allclose(alive, torch.full_like(alive, 0.5))


def test_a_trained_model_predicts_change_reward_and_termination():
    """The price of a fall, ten thousand times as large as what actions do to the reward, does not drown that."""
    data = transitions()
    model, unseen = fitted(data), transitions(seed=1)
    with torch.no_grad():
        next_obs, reward, alive = model.step(unseen["obs"], unseen["action"], unseen["task"])
    change = unseen["next_obs"] - unseen["obs"]
    assert (next_obs - unseen["next_obs"]).square().mean() < 0.01 * change.square().mean()
    sure = (unseen["obs"][:, 0] - 0.67).abs() > 0.3
    assert torch.equal((alive < 0.5)[sure], unseen["terminated"][sure])
    fallen, going = unseen["terminated"] & sure, ~unseen["terminated"] & sure
    assert (reward[fallen] + 100).abs().max() < 20  # nearly sure of it
    # with the probability of the fall taken out, rewards are told apart to a part of what actions do
    normal = model.reward_normalizer
    with torch.no_grad():
        _, scaled, _ = model.predict(unseen["obs"], unseen["action"], unseen["task"])
    own = normal.mean[0, 0] + scaled * (normal.var[0, 0].sqrt() + normal.eps)
    assert (own - unseen["reward"])[going].square().mean() < 0.2 * 0.01**2


def test_outliers_do_not_set_the_targets():
    data = transitions()
    model = fitted(data, steps=0)
    data["next_obs"][0] += 1e6
    assert model.change_targets(data["obs"], data["next_obs"], data["task"]).abs().max() == OUTLIER
    assert model.reward_targets(torch.tensor([-1e6, 3.0]), data["task"][:2]).abs().max() == OUTLIER
