"""Returns of candidates, as the planner imagines them in chunks: those of the objective for each of them alone."""

from dataclasses import replace

import pytest
import torch
from rsl_rl.models import MLPModel
from tensordict import TensorDict

from m3po.config import PlannerCfg, WorldModelCfg
from m3po.models import WorldModel
from m3po.models.task_policy import TaskMLPModel
from m3po.planning import MPPIPlanner, Objective, PlanInputs
from m3po.planning import mppi as module

NOISE = {"class_name": "GaussianDistribution", "init_std": 0.5}
GROUPS = {"policy": 5, "extra": 3}
ACTIONS = 3


def randomise(network):
    """No weight and no statistic keeps its first value, and no mean is near 0."""
    for name, x in network.state_dict().items():
        if name.endswith("count"):
            continue
        positive = any(part in name for part in ("var", "std", "scale", "square", "explained"))
        x.copy_(0.3 + torch.rand_like(x) if positive else x + 0.2 * torch.randn_like(x))


def make(tasks=1, n=6, samples=4, features=16, activation="elu", normalized=True, **planner):
    """A planner without chunks, what it plans from, and candidates, (n, S, H, A)."""
    torch.manual_seed(tasks)
    cfg = PlannerCfg(num_samples=samples, **planner)
    dim = sum(GROUPS.values())
    task = torch.arange(n) % tasks
    dims = [dim - 2 * k for k in range(tasks)] if tasks > 1 else None
    mask = torch.ones(tasks, ACTIONS, dtype=torch.bool)
    mask[1:, -1] = False
    obs = {name: 2.0 + torch.randn(n, d) for name, d in GROUPS.items()} | {"task": task.unsqueeze(1)}
    obs = TensorDict(obs, batch_size=[n])
    groups = {"actor": ["extra", "policy"], "critic": ["policy", "extra"]}
    model = WorldModel(dim, ACTIONS, tasks, WorldModelCfg(features=features, width=32, task_embedding_dim=4), dims)
    networks = []
    for name, outputs, noise in (("actor", ACTIONS, dict(NOISE)), ("critic", 1, None)):
        shared = {"hidden_dims": [24, 16], "activation": activation, "distribution_cfg": noise}
        if tasks == 1:
            networks.append(MLPModel(obs, groups, name, outputs, obs_normalization=normalized, **shared))
        else:
            shared |= {"action_mask": mask, "task_dims": dims, "embedding_dim": 4}
            networks.append(TaskMLPModel(obs, groups, name, outputs, **shared))
    actor, critic = networks
    for network in (model, *networks):
        randomise(network)
    scale = torch.tensor([3.0, 0.5, 40.0])[:tasks].to(model.task_embedding.dtype)
    discounts = torch.tensor([0.99, 0.9, 0.8])[:tasks].to(scale.dtype)

    def units(task):
        return scale[task]

    def values(obs, task):
        return critic(obs).squeeze(-1) * units(task)

    objective = Objective(model, actor, values, GROUPS, discounts, cfg)
    with torch.no_grad():
        z = objective.encode(obs, task)
    mu, sigma = torch.randn(n, ACTIONS), 0.2 + torch.rand(n, ACTIONS)
    u = torch.randn(n, samples, cfg.horizon, ACTIONS) * mask[task][:, None, None]
    inputs = PlanInputs(z, mu, sigma, torch.zeros_like(mu), task, torch.arange(n), torch.tensor(0), mask[task])
    return MPPIPlanner(objective, cfg, 0), inputs, u


@torch.no_grad()
def reference(planner, inputs, u):
    """The objective on every candidate."""
    samples = u.shape[1]
    z, mu, task = (x.repeat_interleave(samples, 0) for x in (inputs.z, inputs.mu, inputs.task))
    noise = (u * inputs.sigma[:, None, None]).flatten(0, 1)
    return planner.objective.returns(z, mu + noise[:, 0], task, noise).view(-1, samples)


def deviation(planner, inputs, u):
    """Largest difference, in units of the largest return of the task."""
    expected = reference(planner, inputs, u)
    assert expected.std() > 0
    error = (planner.evaluate(inputs, u) - expected).abs()
    return max(
        (error[inputs.task == k].max() / expected[inputs.task == k].abs().max()).item() for k in inputs.task.unique()
    )


@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("features", [0, 16])
@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("horizon", [1, 3])
def test_returns_are_those_of_the_objective(tasks, features, average, horizon):
    assert deviation(*make(tasks, features=features, average_horizons=average, horizon=horizon)) < 1e-5


@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("samples", [1, 5])
def test_chunks_and_any_number_of_candidates(tasks, samples, monkeypatch):
    monkeypatch.setitem(module.CHUNK_ROWS, "cpu", 11)
    planner, inputs, u = make(tasks, n=7, samples=samples)
    before = inputs.z.clone(), u.clone()
    assert deviation(planner, inputs, u) < 1e-5
    assert torch.equal(inputs.z, before[0])
    assert torch.equal(u, before[1])


@pytest.mark.parametrize("activation", ["silu", "relu", "tanh", "gelu", "lrelu"])
@pytest.mark.parametrize("normalized", [False, True])
def test_other_activations_and_no_normalisation(activation, normalized):
    activation = "swish" if activation == "silu" else activation
    assert deviation(*make(activation=activation, normalized=normalized)) < 1e-5


def test_inputs_far_from_the_mean_are_bounded_for_the_model_alone():
    planner, inputs, u = make()
    inputs.z[0, :4] = 300.0
    assert deviation(planner, inputs, u) < 1e-5


def test_terminations_end_a_return():
    planner, inputs, u = make()
    output = planner.objective.model.transition[-1]
    with torch.no_grad():
        output.weight[-1], output.bias[-1] = 0.0, 50.0  # every step is a termination
    terminal = planner.objective.model.terminations.terminal[0].expand_as(u[..., 0, 0])
    torch.testing.assert_close(planner.evaluate(inputs, u), terminal)


def test_bfloat16_ranks_candidates_alike():
    planner, inputs, u = make(samples=32, precision="bfloat16")
    expected = reference(planner, inputs, u)
    found = planner.evaluate(inputs, u)
    assert found.dtype == torch.float32
    both = torch.stack((found.flatten() - found.mean(), expected.flatten() - expected.mean()))
    assert torch.corrcoef(both)[0, 1] > 0.99


@pytest.mark.usefixtures("float64")
def test_float64():
    assert deviation(*make(tasks=3)) < 1e-12


def test_zero_iterations_are_the_plan_of_the_gradient():
    planner, inputs, _ = make(num_iterations=0)
    inputs = replace(inputs, shift=0.01 * torch.ones_like(inputs.mu))
    torch.testing.assert_close(planner.plan(inputs).mean, inputs.mu + 0.01 * inputs.sigma)
