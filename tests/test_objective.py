"""The imagined return (2) and its gradient."""

import copy

import pytest
import torch
from literal import LinearModel, literal_return, objective_of
from toy_env import PointEnv, runner_cfg

from m3po.algorithms import M3PO
from m3po.config import PlannerCfg
from m3po.envs.multi_task import MultiTaskVecEnv, TaskEnv
from m3po.planning import Objective


def build(several: bool = False, anchor: bool = True, **planner) -> M3PO:
    """An algorithm whose world model predicts something, although it was not trained."""
    torch.manual_seed(0)
    env = PointEnv(12)
    if several:
        task_envs = [
            TaskEnv("near", PointEnv(6, edge=1.5), (-20.0, 0.0)),
            TaskEnv("far", PointEnv(6, dim=3, episode=30)),
        ]
        env = MultiTaskVecEnv(task_envs, "cpu")
    cfg = runner_cfg(planner=planner, world_model={"anchor": anchor})
    alg = M3PO.construct_algorithm(env.get_observations(), env, cfg, "cpu")
    model = alg.model
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and name != "task_embedding":
            torch.nn.init.normal_(parameter, std=0.3)
    model.explained.uniform_(0.0, 0.1)
    model.changes.var.fill_(0.01)
    model.terminations.terminal.fill_(-5.0)
    alg.estimator.rewards.square.fill_(0.01)
    return alg


def in_float64(objective: Objective) -> Objective:
    """A copy whose networks and statistics are exact enough for finite differences."""
    exact = copy.deepcopy(objective)
    exact.model.double()
    exact.actor.double()
    estimator = exact.values.__self__
    estimator.critic.double()
    estimator.rewards.double()
    exact.discounts = exact.discounts.double()
    estimator.tasks.discounts = exact.discounts
    return exact


def inputs(alg: M3PO, exact: Objective, rows: int = 12):
    """Latents, means, stds, tasks and noise of the observations of an environment."""
    stream = torch.Generator().manual_seed(3)
    dims, actions = sum(exact.group_dims.values()), alg.tasks.action_mask.shape[1]
    obs, noise = torch.randn(rows, dims, generator=stream), torch.randn(rows, 3, actions, generator=stream)
    task = torch.arange(rows) % alg.tasks.count
    obs, mask = obs.double() * alg.model.own_dims[task], alg.tasks.action_mask[task]
    z = exact.model.encode(obs, task).detach()
    return (
        z,
        exact.policy(z, task).detach(),
        torch.full((rows, actions), 0.7).double(),
        task,
        noise.double() * mask[:, None],
    )


@pytest.mark.parametrize("with_noise", [False, True])
@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("anchor", [True, False])
@pytest.mark.parametrize("several", [True, False])
def test_returns_are_those_of_a_plain_loop(several, anchor, average, with_noise):
    alg = build(several, anchor, average_horizons=average)
    exact = in_float64(alg.objective)
    z, mean, std, task, noise = inputs(alg, exact)
    noise = noise if with_noise else None
    action = mean + 0.5 * std
    with torch.no_grad():
        found = exact.returns(z, action, task, noise)
        expected = [
            literal_return(exact, z[i], action[i], task[i], None if noise is None else noise[i]) for i in range(len(z))
        ]
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
        assert found.std() > 0.1
        rough = alg.objective.returns(z.float(), action.float(), task, None if noise is None else noise.float())
    torch.testing.assert_close(rough.double(), found, atol=1e-3, rtol=1e-3)


def test_returns_by_hand():
    # z = 1, a = 2: z' = 3, r = -9 - 0.4 = -9.4; then the policy does nothing: z'' = 3, r = -9. gamma = 0.5, V = 0.
    z, a, task = torch.ones(1, 1), torch.full((1, 1), 2.0), torch.zeros(1, dtype=torch.long)
    both = [objective_of(LinearModel(), PlannerCfg(horizon=2, average_horizons=mean), 0.5) for mean in (False, True)]
    found = [objective.returns(z, a, task).item() for objective in both]
    assert found == pytest.approx([-9.4 - 0.5 * 9.0, -9.4 - 0.25 * 9.0])


def test_what_may_follow_an_end_does_not_count():
    """The continuation weighs rewards and values after it, and not the reward of its own step."""

    class Ends(LinearModel):
        def step(self, z, action, task):
            return z, torch.ones_like(z[:, 0]), torch.full_like(z[:, 0], 0.5)

        def value(self, z, task):
            return torch.full_like(z[:, 0], 8.0)

    objective = objective_of(Ends(), PlannerCfg(horizon=2, average_horizons=False), 0.5)
    found = objective.returns(torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1, dtype=torch.long))
    assert found.item() == 1.0 + 0.25 * 1.0 + 0.0625 * 8.0


def test_the_policy_answers_where_imagination_has_come_to():
    """Later actions are the policy's at imagined states; the first is given, and its noise is not read."""
    seen = []

    class Follows(LinearModel):
        def policy(self, z, task):
            seen.append(z.clone())
            return -z

    objective = objective_of(Follows(), PlannerCfg(horizon=3))
    z, task = torch.ones(1, 2), torch.zeros(1, dtype=torch.long)
    noise = torch.zeros(1, 3, 2)
    noise[:, 1] = 0.5
    objective.returns(z, torch.ones(1, 2), task, noise)
    # 1 + 1 = 2, the policy takes that back and the noise adds 0.5.
    assert [x.tolist() for x in seen] == [[[2.0, 2.0]], [[0.5, 0.5]]]
    noise[:, 0] = 1e3
    first = objective.returns(z, torch.ones(1, 2), task, noise)
    noise[:, 0] = 0.0
    assert torch.equal(first, objective.returns(z, torch.ones(1, 2), task, noise))


def test_another_policy_is_followed_without_a_change_of_this_one():
    alg = build()
    other = copy.deepcopy(alg.actor)
    with torch.no_grad():
        other.mlp[-1].bias.add_(1.0)
    z, mean, _, task, _ = inputs(alg, in_float64(alg.objective))
    z, mean = z.float(), mean.float()
    with torch.no_grad():
        before = alg.objective.returns(z, mean, task)
        assert not torch.allclose(alg.objective.of(other).returns(z, mean, task), before)
        assert torch.equal(alg.objective.returns(z, mean, task), before)


# -- the gradient ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("anchor", [True, False])
@pytest.mark.parametrize("several", [True, False])
def test_the_gradient_is_that_of_finite_differences(several, anchor, average):
    alg = build(several, anchor, average_horizons=average)
    exact = in_float64(alg.objective)
    z, mean, std, task, _ = inputs(alg, exact)
    gradient = exact.gradient(z, mean, std, task)
    assert gradient.abs().max() > 0.01
    with torch.no_grad():
        for d in range(mean.shape[1]):
            step = torch.zeros_like(mean)
            step[:, d] = 1e-5
            up, down = (exact.returns(z, mean + sign * std * step, task) for sign in (1, -1))
            torch.testing.assert_close(gradient[:, d], (up - down) / 2e-5, atol=1e-7, rtol=1e-5)


def test_the_gradient_of_a_quadratic_by_hand():
    # J_1 = -(z + a)^2 - 0.1 a^2 has the gradient -2 z at a = 0; J_2, which does nothing more, has -4 z.
    z, task = torch.randn(5, 3), torch.zeros(5, dtype=torch.long)
    mean, std = torch.zeros(5, 3), torch.full((5, 3), 0.5)
    for average, factor in ((False, -4.0), (True, -3.0)):
        objective = objective_of(LinearModel(), PlannerCfg(horizon=2, average_horizons=average))
        torch.testing.assert_close(objective.gradient(z, mean, std, task), 0.5 * factor * z)


@pytest.mark.parametrize("anchor", [True, False])
def test_the_gradient_reaches_no_network(anchor):
    """Only the shift of the action is asked for: nothing is left behind for the optimisers to find."""
    alg = build(anchor=anchor)
    z, mean, std, task, _ = (
        x.float() if x.dtype == torch.float64 else x for x in inputs(alg, in_float64(alg.objective))
    )
    assert alg.objective.gradient(z, mean, std, task).any()
    networks = (alg.actor, alg.critic, alg.model)
    assert all(p.grad is None for network in networks for p in network.parameters())


@pytest.mark.parametrize("anchor", [True, False])
def test_the_gradient_exists_in_inference_mode(anchor):
    """Players and stock runners act in it."""
    alg = build(anchor=anchor)
    z, mean, std, task, _ = (
        x.float() if x.dtype == torch.float64 else x for x in inputs(alg, in_float64(alg.objective))
    )
    expected = alg.objective.gradient(z, mean, std, task)
    with torch.inference_mode():
        found = alg.objective.gradient(z * 1.0, mean * 1.0, std * 1.0, task + 0)
    assert torch.equal(found, expected)


def test_a_gradient_that_is_not_finite_is_zero():
    class Breaks(LinearModel):
        def step(self, z, action, task):
            z, reward, alive = super().step(z, action, task)
            return z, reward * torch.where(z[:, 0] > 0, 1.0, torch.nan), alive

    objective = objective_of(Breaks(), PlannerCfg(horizon=1))
    z, zero = torch.tensor([[1.0], [-1.0]]), torch.zeros(2, 1)
    found = objective.gradient(z, zero, zero + 1, torch.zeros(2, dtype=torch.long))
    assert found.flatten().tolist() == [-2.0, 0.0]


def test_actions_that_a_task_lacks_are_not_imagined():
    """Whatever a head says of them: the model has never seen them move."""
    alg = build(several=True, anchor=False)
    z, _, _, task, _ = (x.float() if x.dtype == torch.float64 else x for x in inputs(alg, in_float64(alg.objective)))
    with torch.no_grad():
        alg.model.policy_head[-1].bias.fill_(3.0)
        action = alg.objective.policy(z, task)
    mask = alg.tasks.action_mask[task]
    assert torch.equal(action != 0.0, mask)
