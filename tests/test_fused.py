"""The fused roll-out: the returns of the objective itself, in every form, by the newest networks."""

from dataclasses import replace

import pytest
import torch
from rsl_rl.models import MLPModel
from tensordict import TensorDict
from toy_env import PointEnv, runner_cfg

from m3po.algorithms import M3PO
from m3po.config import PlannerCfg, WorldModelCfg
from m3po.models import WorldModel
from m3po.models.task_policy import TaskMLPModel
from m3po.planning import MPPIPlanner, Objective, Start
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

    objective = Objective(model, actor, values, GROUPS, discounts, cfg, critic, units)
    with torch.no_grad():
        z = objective.encode(obs, task)
    mu, sigma = torch.randn(n, ACTIONS), 0.2 + torch.rand(n, ACTIONS)
    u = torch.randn(n, samples, cfg.horizon, ACTIONS) * mask[task][:, None, None]
    start = Start(z, mu, sigma, torch.zeros_like(mu), task, torch.arange(n), torch.tensor(0), mask[task])
    return MPPIPlanner(objective, cfg, 0), start, u


@torch.no_grad()
def reference(planner, start, u):
    """The objective on every candidate."""
    samples = u.shape[1]
    z, mu, task = (x.repeat_interleave(samples, 0) for x in (start.z, start.mu, start.task))
    noise = (u * start.sigma[:, None, None]).flatten(0, 1)
    return planner.objective.returns(z, mu + noise[:, 0], task, noise).view(-1, samples)


def deviation(planner, start, u):
    """Largest difference, in units of the largest return of the task."""
    expected = reference(planner, start, u)
    assert expected.std() > 0
    assert planner._fused is not None
    error = (planner.evaluate(start, u) - expected).abs()
    return max(
        (error[start.task == k].max() / expected[start.task == k].abs().max()).item() for k in start.task.unique()
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
    planner, start, u = make(tasks, n=7, samples=samples)
    before = start.z.clone(), u.clone()
    assert deviation(planner, start, u) < 1e-5
    assert torch.equal(start.z, before[0])
    assert torch.equal(u, before[1])


@pytest.mark.parametrize("activation", ["silu", "relu", "tanh", "gelu", "lrelu"])
@pytest.mark.parametrize("normalized", [False, True])
def test_other_activations_and_no_normalisation(activation, normalized):
    activation = "swish" if activation == "silu" else activation
    assert deviation(*make(activation=activation, normalized=normalized)) < 1e-5


def test_inputs_far_from_the_mean_are_bounded_for_the_model_alone():
    planner, start, u = make()
    start.z[0, :4] = 300.0
    assert deviation(planner, start, u) < 1e-5


def test_terminations_end_a_return():
    planner, start, u = make()
    output = planner.objective.model.transition[-1]
    with torch.no_grad():
        output.weight[-1], output.bias[-1] = 0.0, 50.0  # every step is a fall
    planner.refresh()
    terminal = planner.objective.model.falls.terminal[0].expand_as(u[..., 0, 0])
    torch.testing.assert_close(planner.evaluate(start, u), terminal)


def test_bfloat16_ranks_candidates_alike():
    planner, start, u = make(samples=32, precision="bfloat16")
    expected = reference(planner, start, u)
    found = planner.evaluate(start, u)
    assert found.dtype == torch.float32
    both = torch.stack((found.flatten() - found.mean(), expected.flatten() - expected.mean()))
    assert torch.corrcoef(both)[0, 1] > 0.99


@pytest.mark.usefixtures("float64")
def test_float64():
    assert deviation(*make(tasks=3)) < 1e-12


def test_a_model_without_a_fused_form_is_imagined_by_the_objective_and_said_once(capsys):
    planner, start, u = make()
    module._tell.cache_clear()
    planner.objective.critic = None
    general = MPPIPlanner(planner.objective, planner.cfg, 0)
    for _ in range(2):
        plan = general.plan(start)
    assert capsys.readouterr().out.count("the critic behind the values is not known") == 1
    torch.testing.assert_close(planner.plan(start).mean, plan.mean)
    torch.testing.assert_close(general.evaluate(start, u), reference(planner, start, u))


def test_copies_keep_their_places_and_leave_inference_mode():
    planner, start, u = make(tasks=3)
    with torch.inference_mode():
        planner.plan(start)
    fused = planner._fused
    places = [t.data_ptr() for t in (*fused._tables.values(), *fused._actor.layers.tensors.values())]
    randomise(planner.objective.actor)
    planner.refresh()
    assert deviation(planner, start, u) < 1e-5
    assert places == [t.data_ptr() for t in (*fused._tables.values(), *fused._actor.layers.tensors.values())]


def algorithm(seed=1):
    env = PointEnv(num_envs=8)
    torch.manual_seed(seed)
    cfg = runner_cfg(planner={"share": 1.0, "max_learning_kl": 0.0}) | {"seed": seed}
    alg = M3PO.construct_algorithm(env.get_observations(), env, cfg, "cpu")
    alg.train_mode()
    return alg, env


def exact(alg, env, planner=None):
    """Whether a planner's returns are those of the networks of now."""
    planner = planner or alg.behaviour.planner
    obs, ids = env.get_observations(), torch.arange(env.num_envs)
    with torch.no_grad():
        mu = planner.objective.actor(obs)
        z = planner.objective.encode(obs, torch.zeros_like(ids))
    mask = torch.ones_like(mu, dtype=torch.bool)
    start = Start(z, mu, torch.ones_like(mu), torch.zeros_like(mu), torch.zeros_like(ids), ids, torch.tensor(0), mask)
    return deviation(planner, start, torch.randn(len(mu), 4, planner.cfg.horizon, mu.shape[1])) < 1e-5


def rollout(alg, env):
    with torch.inference_mode():
        obs = env.get_observations()
        for _ in range(8):
            obs, *outcome = env.step(alg.act(obs))
            alg.process_env_step(obs, *outcome)
        alg.compute_returns(obs)
    return alg.update()


def test_planning_uses_what_was_just_learnt_loaded_or_received(monkeypatch):
    alg, env = algorithm()
    assert exact(alg, env)
    rollout(alg, env)
    assert exact(alg, env)
    other, _ = algorithm(seed=2)
    assert exact(other, env)
    other.load(alg.save(), None, strict=True)
    assert exact(other, env)

    def receive(tensor, src):
        if tensor.is_floating_point():
            tensor.mul_(1.1)

    monkeypatch.setattr(torch.distributed, "broadcast", receive)
    other.broadcast_parameters()
    assert exact(other, env)


def test_a_played_planner_reads_the_policy_it_was_given():
    alg, env = algorithm()
    alg.inference_policy("planner")(env.get_observations())
    rollout(alg, env)
    policy = alg.inference_policy("planner")
    policy(env.get_observations())
    planner = next(
        cell.cell_contents for cell in policy.__wrapped__.__closure__ if hasattr(cell.cell_contents, "planner")
    ).planner
    assert exact(alg, env, planner)


def test_zero_iterations_are_the_plan_of_the_gradient():
    planner, start, _ = make(num_iterations=0)
    start = replace(start, shift=0.01 * torch.ones_like(start.mu))
    torch.testing.assert_close(planner.plan(start).mean, start.mu + 0.01 * start.sigma)
