"""The planner: noise, optimum, invariances, trust region, and what is executed."""

from dataclasses import replace

import pytest
import torch
from literal import LinearModel, literal_plan, literal_return, objective_of, planner_of
from test_objective import build, in_float64
from torch.distributions import Normal, kl_divergence

from m3po.algorithms.behaviour import Behaviour
from m3po.algorithms.gates import FULL_REALISED
from m3po.algorithms.policy_outputs import PolicyOutputs
from m3po.config import AlgorithmCfg, PlannerCfg
from m3po.kernels.elites import project_torch
from m3po.kernels.sampling import philox4x32, planner_noise
from m3po.planning import MPPIPlanner, PlanInputs
from m3po.planning.mppi import MAX_NOISE
from m3po.planning.trust_region import draw_elite, gaussian_log_prob
from m3po.validation import validate

CFG = PlannerCfg(
    horizon=2,
    average_horizons=False,
    num_samples=260,
    num_policy_samples=0,
    num_iterations=8,
    num_elites=24,
    temperature=2.0,
    max_acting_kl=float("inf"),
)
SMALL = PlannerCfg(num_samples=12, num_policy_samples=2, num_iterations=2, num_elites=4)
"""Several iterations of few candidates."""


def inputs_of(n=6, dim=2, shift=None, mask=None, ids=None):
    """Where the quadratic is planned from: the policy does nothing."""
    ids = torch.arange(n) if ids is None else ids
    z = torch.randn(8, dim, generator=torch.Generator().manual_seed(3))[ids]
    zero = torch.zeros(len(ids), dim)
    mask = torch.ones(len(ids), dim, dtype=torch.bool) if mask is None else mask
    shift = zero if shift is None else shift
    return PlanInputs(z, zero, zero + 1.0, shift, torch.zeros_like(ids), ids, torch.tensor(7), mask)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, expected):
    """Random123's published vectors for philox4x32-10."""
    words = philox4x32(tuple(torch.tensor([c]) for c in counter), key)
    assert tuple(w.item() for w in words) == expected


def noise_of(seed, step, ids, iteration=0):
    pairs = planner_noise(torch.tensor([seed, step, iteration]), ids, (64, 3, 5))
    assert torch.equal(pairs[:, 1::2], -pairs[:, ::2])  # antithetic
    return pairs[:, ::2]


def test_noise_is_standard_normal_and_independent_of_the_batch():
    ids = torch.arange(64)
    noise = noise_of(5, 9, ids)
    assert noise.shape == (64, 32, 3, 5)
    assert abs(noise.mean()) < 0.01
    assert abs(noise.std() - 1.0) < 0.01
    assert abs((noise**4).mean() - 3.0) < 0.1
    alone = noise_of(5, 9, ids[17:18])
    assert torch.equal(alone[0], noise[17])
    for other in (noise_of(6, 9, ids), noise_of(5, 10, ids), noise_of(5, 9, ids, iteration=1)):
        assert abs((other * noise).mean()) < 0.01


# -- the optimum -------------------------------------------------------------------------------------------------------


def test_mppi_finds_the_optimum_of_a_linear_quadratic_problem():
    # Backward: after the last step V_1(z) = min_a |z + a|^2 + 0.1 a^2 = z^2 / 11, at a = -10/11 z.
    # First action: min_a (1 + 1/11) |z + a|^2 + 0.1 a^2  ->  a = -(12/11) / (12/11 + 0.1) z
    inputs = inputs_of()
    plan = planner_of(LinearModel(), CFG).plan(inputs)
    torch.testing.assert_close(plan.mean, -(12 / 11) / (12 / 11 + 0.1) * inputs.z, atol=0.05, rtol=0.0)
    assert (plan.gain > 0).all()


def test_a_gradient_plan_of_the_right_length_is_the_optimum_at_once():
    """In 24 dimensions, where a few random candidates find nothing."""
    cfg = replace(CFG, num_samples=8, num_policy_samples=2, num_iterations=1, num_elites=2, horizon=1)
    inputs = inputs_of(dim=24)
    optimum = -inputs.z / 1.1
    random, informed = (
        planner_of(LinearModel(), cfg).plan(replace(inputs, shift=shift)).mean
        for shift in (torch.zeros_like(optimum), optimum)
    )
    objective = objective_of(LinearModel(), cfg)
    best, found, blind = (objective.returns(inputs.z, a, inputs.task) for a in (optimum, informed, random))
    assert torch.equal(found, best)
    assert (blind < best - 1.0).all()


def test_planning_walks_uphill_where_the_gradient_says_so():
    cfg = replace(CFG, num_samples=8, num_policy_samples=2, num_iterations=1, num_elites=2, max_acting_kl=0.3)
    inputs = inputs_of(dim=6)
    gradient = objective_of(LinearModel(), cfg).gradient(inputs.z, inputs.mu, inputs.sigma, inputs.task)
    shift = 0.6**0.5 * gradient / gradient.norm(dim=-1, keepdim=True)
    plan = planner_of(LinearModel(), cfg).plan(replace(inputs, shift=shift))
    assert (torch.cosine_similarity(plan.mean, gradient) > 0.9).all()
    assert (plan.gain > 0).all()


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("anchor", [True, False])
@pytest.mark.parametrize("kernels", ["torch", "warp"])
@pytest.mark.parametrize("iterations", [1, 2])
def test_a_plan_equals_a_literal_loop_in_float64(several, anchor, kernels, iterations, monkeypatch):
    monkeypatch.setattr("m3po.planning.mppi.CHUNK_ROWS", {"cpu": 25})  # several chunks, the last one smaller
    cfg = replace(SMALL, num_iterations=iterations, temperature=0.7, kernels=kernels)
    alg = build(several, anchor)
    inputs = random_inputs(alg, 5)
    found = MPPIPlanner(alg.objective, cfg, 11).plan(inputs)
    exact = in_float64(alg.objective)
    for i in range(5):
        noise = []
        for iteration in range(iterations):
            drawn = cfg.num_samples - 4 - (cfg.num_policy_samples if iteration else 0)
            shape = (drawn, cfg.horizon, inputs.mu.shape[1])
            noise.append(planner_noise(torch.tensor([11, 3, iteration]), inputs.env_ids[i : i + 1], shape)[0].double())
        row = [x[i].double() for x in (inputs.z, inputs.mu, inputs.sigma, inputs.shift)]
        with torch.no_grad():
            mean, gain = literal_plan(exact, cfg, *row, inputs.task[i], noise, inputs.action_mask[i])
        torch.testing.assert_close(found.mean[i].double(), mean, atol=1e-3, rtol=1e-3)
        assert found.gain[i].item() == pytest.approx(gain, abs=1e-2)


def random_inputs(alg, n):
    """Somewhere to plan from, with a gradient's plan inside the trust region."""
    stream = torch.Generator().manual_seed(5)
    dims, actions = sum(alg.objective.group_dims.values()), alg.tasks.action_mask.shape[1]
    task = torch.arange(n) % alg.tasks.count
    z = alg.model.encode(torch.randn(n, dims, generator=stream) * alg.model.own_dims[task], task).detach()
    mu, sigma = torch.randn(n, actions, generator=stream), torch.rand(n, actions, generator=stream) + 0.1
    mask = alg.tasks.action_mask[task]
    shift = 0.3 * torch.randn(n, actions, generator=stream).clamp(-1, 1) * mask
    return PlanInputs(z, mu, sigma, shift, task, torch.arange(n) + 50, torch.tensor(3), mask)


# -- against the gradient's plan ---------------------------------------------------------------------------------------


def test_a_plan_is_never_worse_than_the_gradients_and_says_its_gain():
    """Under the model, of what is executed and imagined after it."""
    cfg = replace(SMALL, num_iterations=1, max_acting_kl=0.125)
    alg = build()
    objective, planner = alg.objective, MPPIPlanner(alg.objective, cfg, 0)
    inputs = random_inputs(alg, 40)
    gradient = objective.gradient(inputs.z, inputs.mu, inputs.sigma, inputs.task)
    shift = 0.5 * gradient / gradient.norm(dim=-1, keepdim=True)
    with torch.no_grad():
        policy = objective.returns(inputs.z, inputs.mu, inputs.task)
        gradient = objective.returns(inputs.z, inputs.mu + inputs.sigma * shift, inputs.task)
    count = 0
    for step in range(5):
        inputs = replace(inputs, shift=shift, step=torch.tensor(step))
        plan = planner.plan(inputs)
        own = (plan.mean - (inputs.mu + inputs.sigma * shift)).abs().amax(-1) < 1e-6
        # The spread of the candidates' returns is the unit of the gain.
        predicted = plan.gain * spreads(planner, inputs)
        assert (predicted >= gradient - policy - 1e-4).all()
        torch.testing.assert_close(predicted[own], (gradient - policy)[own], atol=1e-4, rtol=1e-4)
        count += int(own.sum())
    assert 0 < count < 200  # both happen


def spreads(planner, inputs):
    """Std of the candidates' returns of a plan of one iteration, (n,)."""
    seen = []
    evaluate = planner.evaluate

    def spy(*args):
        seen.append(evaluate(*args))
        return seen[-1]

    planner.evaluate = spy
    planner.plan(inputs)
    return seen[0].std(1, unbiased=False)


def test_zero_iterations_are_the_gradients_plan():
    cfg = replace(CFG, num_iterations=0)
    shift = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
    inputs = inputs_of(shift=shift)
    plan = planner_of(LinearModel(), cfg).plan(inputs)
    torch.testing.assert_close(plan.mean, shift)
    inside = planner_of(LinearModel(), replace(cfg, max_acting_kl=0.02)).plan(inputs).mean
    torch.testing.assert_close(inside.norm(dim=-1), torch.full((6,), 0.2))
    still = planner_of(LinearModel(), cfg).plan(inputs_of())
    assert torch.equal(still.mean, inputs.mu)
    # The paper's execution draws around it as well.
    draws, _ = draw_elite(replace(plan, std=1e-4 * plan.std), torch.Generator().manual_seed(0))
    torch.testing.assert_close(draws, shift, atol=1e-3, rtol=0.0)


def test_the_gradients_lengths_and_the_policys_trajectories_are_candidates():
    cfg = replace(SMALL, num_iterations=1)
    shift = torch.full((3, 2), 0.25)
    inputs = inputs_of(3, shift=shift)
    u = planner_of(LinearModel(), cfg).plan(inputs).candidates
    for s, length in enumerate((0.0, 0.5, 1.0, 2.0)):
        assert torch.equal(u[:, s], length * shift)
    noise = planner_noise(torch.tensor([0, 7, 0]), inputs.env_ids, (8, cfg.horizon, 2))[:, :, 0].clamp(-3, 3)
    torch.testing.assert_close(u[:, 4:6], noise[:, :2])  # around the policy
    torch.testing.assert_close(u[:, 6:], (noise[:, 2:] + shift[:, None]).clamp(-3, 3))  # around the gradient's plan


# -- invariances -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.01, 100.0])
def test_scaling_all_rewards_leaves_the_plan_unchanged(scale):
    inputs = inputs_of(shift=torch.full((6, 2), 0.3))
    reference, scaled = (planner_of(LinearModel(factor), CFG).plan(inputs) for factor in (1.0, scale))
    torch.testing.assert_close(scaled.mean, reference.mean, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(scaled.gain, reference.gain, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kernels", ["torch", "warp"])
def test_the_temperature_sharpens_the_plan(kernels):
    """At 0 all elites weigh the same; at a very large one the best alone is the plan."""
    inputs = inputs_of(shift=torch.full((6, 2), 0.3))
    plans = {}
    for temperature in (0.0, 1.0, 1e5):
        cfg = replace(CFG, num_iterations=1, temperature=temperature, kernels=kernels)
        plans[temperature] = planner_of(LinearModel(), cfg).plan(inputs)
    weights = {t: plan.weights for t, plan in plans.items()}
    assert torch.allclose(weights[0.0].amax(1), torch.full((6,), 1 / 24))
    assert (weights[1e5].amax(1) > 0.9).all()
    assert (weights[0.0].amax(1) < weights[1.0].amax(1)).all()
    assert (weights[1.0].amax(1) < weights[1e5].amax(1) - 0.1).all()
    rows = torch.arange(6)
    best = plans[1e5].candidates[rows, weights[1e5].argmax(1)]
    off = [(plans[t].mean - best).norm(dim=-1).mean() for t in (0.0, 1.0, 1e5)]
    assert off[2] < off[1] < off[0]


def test_a_plan_does_not_depend_on_the_batch():
    alg = build()
    inputs, planner = random_inputs(alg, 5), MPPIPlanner(alg.objective, SMALL, 0)
    together = planner.plan(inputs).mean.clone()
    row = PlanInputs(**{k: v[3:4] if v.dim() else v for k, v in vars(inputs).items()})
    torch.testing.assert_close(planner.plan(row).mean, together[3:4], atol=1e-5, rtol=1e-5)
    for other in (replace(inputs, step=inputs.step + 1), replace(inputs, env_ids=inputs.env_ids + 1)):
        assert not torch.allclose(planner.plan(other).mean, together)


@pytest.mark.parametrize("kernels", ["torch", "warp"])
def test_warp_kernels_plan_as_torch_does(kernels):
    alg = build(several=True)
    inputs = random_inputs(alg, 20)
    reference, found = (
        MPPIPlanner(alg.objective, replace(SMALL, kernels=k), 0).plan(inputs) for k in ("torch", kernels)
    )
    for name in ("mean", "gain", "candidates", "weights", "std"):
        torch.testing.assert_close(getattr(found, name), getattr(reference, name), atol=1e-3, rtol=1e-3)


def test_bfloat16_ranks_candidates_as_float32_does():
    alg = build()
    inputs = random_inputs(alg, 32)
    u = torch.randn(32, 64, 3, 2, generator=torch.Generator().manual_seed(0))
    exact, rough = (
        MPPIPlanner(alg.objective, replace(SMALL, precision=p), 0).evaluate(inputs, u).detach()
        for p in ("float32", "bfloat16")
    )
    assert rough.dtype == torch.float32
    assert not torch.equal(exact, rough)
    pairs = [(x.unsqueeze(1) - x.unsqueeze(2)).sign() for x in (exact, rough)]
    assert (pairs[0] == pairs[1]).float().mean() > 0.95


# -- masks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernels", ["torch", "warp"])
@pytest.mark.parametrize("iterations", [0, 2])
def test_masked_dimensions_stay_zero_and_influence_nothing(iterations, kernels):
    class Padded(LinearModel):
        def policy(self, z, task):
            return torch.cat([-0.3 * z, torch.zeros_like(z)], dim=-1)

        def step(self, z, action, task):
            assert (action[..., 2:] == 0).all()
            return super().step(z, action[..., :2], task)

    mask = torch.tensor([True, True, False, False]).expand(3, 4)
    cfg = replace(SMALL, num_iterations=iterations, kernels=kernels)
    plans = []
    for junk in (0.0, 5.0):
        mu, shift = torch.zeros(3, 4), torch.full((3, 4), 0.3)
        mu[:, 2:] = shift[:, 2:] = junk
        inputs = replace(inputs_of(3), mu=mu, sigma=torch.ones(3, 4), shift=shift, action_mask=mask)
        plans.append(planner_of(Padded(), cfg).plan(inputs))
    for plan in plans:
        assert (plan.mean[:, 2:] == 0).all()
        assert (plan.candidates[..., 2:] == 0).all()
    assert torch.equal(plans[0].mean, plans[1].mean)
    assert torch.equal(plans[0].gain, plans[1].gain)


def test_an_elite_of_a_task_with_fewer_actions_has_a_density():
    """The others are exactly 0, and count in it as in the policy's own, with std 1."""
    mask = torch.tensor([True, True, False]).expand(4, 3)

    class Padded(LinearModel):
        def policy(self, z, task):
            return torch.zeros(len(z), 3)

        def step(self, z, action, task):
            return super().step(z, action[..., :2], task)

    inputs = replace(
        inputs_of(4), mu=torch.zeros(4, 3), sigma=torch.ones(4, 3), shift=torch.zeros(4, 3), action_mask=mask
    )
    plan = planner_of(Padded(), SMALL).plan(inputs)
    action, log_beta = draw_elite(plan, torch.Generator().manual_seed(0))
    assert (action[:, 2] == 0).all()
    mixture = gaussian_log_prob(action[:, None, :2], plan.candidates[..., :2], plan.std[:, None, :2])
    excess = torch.logsumexp(plan.weights.log() + mixture, dim=1) - gaussian_log_prob(
        action[:, :2], inputs.mu[:, :2], inputs.sigma[:, :2]
    )
    torch.testing.assert_close(log_beta - gaussian_log_prob(action, inputs.mu, inputs.sigma), excess)


# -- what is executed --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_kl", [0.01, 0.3, float("inf")])
def test_projection_respects_the_trust_region(max_kl):
    torch.manual_seed(0)
    mu, sigma, plan = torch.randn(50, 3), torch.rand(50, 3) + 0.1, torch.randn(50, 3) * 2
    m = torch.empty_like(mu)
    project_torch(m, mu, sigma, (plan - mu) / sigma, max_kl)
    kl = kl_divergence(Normal(m, sigma), Normal(mu, sigma)).sum(-1)
    assert (kl <= max_kl * (1 + 1e-5)).all()
    # Inside the region the plan is untouched; the direction, in stds, always is the plan's.
    torch.testing.assert_close(torch.cosine_similarity((m - mu) / sigma, (plan - mu) / sigma), torch.ones(50))
    if max_kl == float("inf"):
        torch.testing.assert_close(m, plan)


@pytest.mark.parametrize("iterations", [0, 1, 2])
def test_plans_keep_to_the_trust_region(iterations):
    cfg = replace(SMALL, num_iterations=iterations, max_acting_kl=0.05)
    inputs = inputs_of()
    plan = planner_of(LinearModel(), cfg).plan(replace(inputs, z=10 * inputs.z, shift=-0.2 * inputs.z.sign()))
    kl = 0.5 * plan.mean.square().sum(-1)
    assert (kl <= 0.05 * (1 + 1e-5)).all()
    assert kl.max() > 0.03


def test_plans_that_are_predicted_to_be_worse_than_the_policy_are_not_executed():
    """The gradient points down here, and so do all candidates around it."""
    mu, m = torch.zeros(3, 2), torch.ones(3, 2)
    accepted = Behaviour._accept(torch.tensor([-1.0, 0.0, 1e-3]), mu, m)
    assert accepted.tolist() == [[0, 0], [0, 0], [1, 1]]
    alg = build(planned_fraction=1.0, num_policy_samples=0, num_samples=4, num_elites=4)
    alg.gates.gain.fill_(1.0)
    alg.behaviour.rotate()
    obs = alg.storage.obs[0].clone()
    policy = alg.behaviour.sample(obs)
    gradient = alg.objective.gradient
    for sign, moved in ((-1.0, False), (1.0, True)):
        alg.objective.gradient = lambda *args, sign=sign: sign * gradient(*args)
        sample = alg.behaviour.plan(obs, policy)
        assert sample.planned.all()
        assert (sample.plan_gain > 0).all() == moved
        assert torch.equal(sample.actions, policy.actions) != moved
        assert torch.equal(sample.log_beta, policy.log_pi) != moved


@pytest.mark.parametrize("max_acting_kl", [0.02, float("inf")])
def test_the_gradients_plan_keeps_to_its_trust_region_and_is_finite_without_one(max_acting_kl):
    alg = build(planned_fraction=1.0, num_iterations=0, max_acting_kl=max_acting_kl)
    alg.gates.gradient_size.fill_(1e-9)
    obs = alg.storage.obs[0].clone()
    for gain, part in ((1e3, 1.0), (0.5 * alg.cfg.planner.full_gain, 0.5)):
        alg.gates.gain.fill_(gain)
        alg.behaviour.rotate()
        sample = alg.behaviour.plan(obs, alg.behaviour.sample(obs))
        assert sample.planned.all()
        length = ((sample.plan_mean - sample.mean) / sample.std).norm(dim=-1)
        radius = min((2.0 * max_acting_kl) ** 0.5, MAX_NOISE)
        torch.testing.assert_close(length, torch.full_like(length, part * radius), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(("worth", "part"), [(-1.0, 0.0), (0.0, 0.0), (0.5, 0.5), (3.0, 1.0)])
def test_played_plans_go_as_far_as_acting_on_them_was_worth(worth, part):
    alg = build(planned_fraction=1.0)
    alg.gates.gain.fill_(1e3)
    obs, played = alg.storage.obs[0].clone(), []
    for realised in (1.0, worth):
        alg.gates.realised.fill_(realised * FULL_REALISED)
        alg.behaviour.step.zero_()
        played.append(alg.behaviour.planner_policy(alg.actor)(obs))
    whole, found = (actions - alg.actor(obs) for actions in played)
    assert whole.abs().max() > 0.0
    torch.testing.assert_close(found, part * whole)


@pytest.mark.parametrize(
    ("budget", "waited", "kl"), [(1.0, 1, 0.06), (0.25, 1, 0.015), (0.25, 4, 0.015), (1e-3, 1, 6e-5)]
)
def test_played_plans_go_no_further_than_those_of_an_update(budget, waited, kl):
    """Of one rollout, however many the run waits for: a loaded checkpoint does not know that, and plays the same."""
    alg = build(planned_fraction=1.0, num_iterations=0)
    alg.gates.gradient_size.fill_(1e-9)  # so that all plans are as long as they may be
    alg.gates.gain.fill_(1e3)
    alg.gates.plan_budget.fill_(budget)
    alg.gates.waited = waited
    obs = alg.storage.obs[0].clone()
    mean, std = PolicyOutputs(alg.actor)(obs)
    moved = (alg.behaviour.planner_policy(alg.actor)(obs) - mean) / std
    torch.testing.assert_close(0.5 * moved.square().sum(-1), torch.full((len(mean),), kl), rtol=1e-2, atol=1e-7)


def test_gaussian_log_prob_is_torchs():
    x, mean, std = torch.randn(7, 3), torch.randn(7, 3), torch.rand(7, 3) + 0.1
    torch.testing.assert_close(gaussian_log_prob(x, mean, std), Normal(mean, std).log_prob(x).sum(-1))


def test_density_of_a_drawn_elite_against_monte_carlo():
    """The behaviour of paper execution: its log-density must be that of its draws."""
    n = 200_000
    cfg = replace(CFG, num_elites=3, num_iterations=1, num_samples=16)
    plan = planner_of(LinearModel(), cfg).plan(inputs_of(1, 1))
    plan = replace(
        plan,
        candidates=plan.candidates.expand(n, -1, -1),
        weights=plan.weights.expand(n, -1),
        std=plan.std.expand(n, -1),
    )
    action, log_beta = draw_elite(plan, torch.Generator().manual_seed(0))
    edges = torch.linspace(action.min().item(), action.max().item(), 41)
    counts = torch.histogram(action.flatten(), edges).hist / n
    width = (edges[1] - edges[0]).item()
    bins = torch.bucketize(action.flatten(), edges[1:-1])
    density = torch.zeros(40).index_add(0, bins, log_beta.exp()) / torch.zeros(40).index_add(0, bins, torch.ones(n))
    busy = counts > 0.005
    assert busy.sum() > 5
    torch.testing.assert_close(density[busy] * width, counts[busy], rtol=0.1, atol=0.002)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_elites": 100}, "exceeds"),
        ({"num_samples": 5}, "num_samples must be at least 6"),
        ({"horizon": 0}, "horizon must be at least 1"),
        ({"planned_fraction": -0.1}, "planned_fraction must lie in"),
        ({"planned_fraction": 2.0}, "planned_fraction must lie in"),
        ({"kernels": "cuda"}, "kernels must be one of torch, warp"),
        ({"precision": "float16"}, "precision must be one of"),
        ({"execution": "best"}, "execution must be one of projected, mppi"),
        ({"max_learning_kl": -0.1}, "max_learning_kl must not be negative"),
        ({"full_gain": 0.0}, "full_gain must be positive, got 0.0"),
        ({"num_states": -1}, "num_states must not be negative, got -1"),
        ({"max_acting_kl": -1.0}, "max_acting_kl must not be negative"),
        ({"num_iterations": -1}, "num_iterations must not be negative"),
    ],
)
def test_a_wrong_budget_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        validate(AlgorithmCfg(planner=replace(PlannerCfg(), **changes)), 16, 8)


def test_a_plan_equals_the_return_of_its_parts():
    """What is evaluated is the first action plus later noise, as the literal return has it."""
    alg = build()
    inputs = random_inputs(alg, 4)
    u = torch.randn(4, 3, 3, 2, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = MPPIPlanner(alg.objective, SMALL, 0).evaluate(inputs, u)
        for i in range(4):
            for s in range(3):
                noise = inputs.sigma[i] * u[i, s]
                expected = literal_return(alg.objective, inputs.z[i], inputs.mu[i] + noise[0], inputs.task[i], noise)
                assert found[i, s].item() == pytest.approx(expected, rel=1e-4, abs=1e-4)
