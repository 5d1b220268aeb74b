"""The planner: noise, optimum, invariances, trust region."""

from dataclasses import replace

import pytest
import torch
from literal import fast_planner, literal_planner
from torch.distributions import Normal, kl_divergence

from m3po.config import PlannerCfg, WorldModelCfg
from m3po.kernels.elites import project_torch
from m3po.kernels.sampling import philox4x32, planner_noise
from m3po.models import WorldModel
from m3po.planning.trust_region import draw_elite, gaussian_log_prob


class LinearModel:
    """z' = z + a, reward -|z'|^2 - 0.1 |a|^2 (scaled), no falls, no terminal value, a prior that does nothing."""

    def __init__(self, scale=1.0):
        self.scale = scale

    def embed(self, task):
        return torch.zeros(*task.shape, 1)

    def prior(self, z, e):
        return torch.zeros_like(z)

    def step(self, z, action, e, task):
        z = z + action
        return z, -self.scale * (z.square().sum(-1) + 0.1 * action.square().sum(-1)), torch.ones_like(z[..., 0])

    def value(self, z, e):
        return torch.zeros_like(z[..., 0])


CFG = PlannerCfg(horizon=2, num_samples=256, num_prior_samples=0, num_iterations=8, num_elites=24, temperature=2.0)


def run(model, cfg=CFG, n=6, dim=2, ids=None, mask=None, seed=0):
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(8, dim, generator=generator)
    ids = torch.arange(n) if ids is None else ids
    z, mu, sigma = z[ids], torch.zeros(len(ids), dim), torch.ones(len(ids), dim)
    plan = literal_planner(model, cfg, 1.0, seed).plan(z, mu, sigma, torch.zeros_like(ids), ids, 7, mask)
    return z, mu, sigma, plan


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


def test_planner_finds_the_optimum_of_a_linear_quadratic_problem():
    # Backward: after the last step V_1(z) = min_a |z + a|^2 + 0.1 a^2 = z^2 / 11, at a = -10/11 z.
    # First action: min_a (1 + 1/11) |z + a|^2 + 0.1 a^2  ->  a = -(12/11) / (12/11 + 0.1) z
    z, _, _, plan = run(LinearModel())
    torch.testing.assert_close(plan.mean, -(12 / 11) / (12 / 11 + 0.1) * z, atol=0.05, rtol=0.0)
    assert (plan.gain > 0).all()


def test_zero_iterations_are_the_prior_bit_for_bit():
    _, mu, _, plan = run(LinearModel(), replace(CFG, num_iterations=0))
    assert torch.equal(plan.mean, mu)
    assert torch.equal(plan.projected, mu)


@pytest.mark.parametrize("scale", [0.01, 100.0])
def test_scaling_all_rewards_leaves_the_plan_unchanged(scale):
    reference = run(LinearModel())[3]
    scaled = run(LinearModel(scale))[3]
    torch.testing.assert_close(scaled.mean, reference.mean, atol=1e-4, rtol=1e-4)


def test_a_plan_does_not_depend_on_the_batch():
    model = WorldModel(4, 2, 1, WorldModelCfg(size="tiny", task_embedding_dim=4))
    for head in (model.latent_head, model.reward_head, model.value_head[-1]):
        torch.nn.init.normal_(head.weight, std=0.1)
    cfg = PlannerCfg(horizon=3, num_samples=16, num_prior_samples=4, num_iterations=2, num_elites=4)
    z = torch.softmax(torch.randn(5, 8, 8), -1).flatten(1)
    mu, sigma, task, ids = torch.randn(5, 2), torch.ones(5, 2), torch.zeros(5, dtype=torch.long), torch.arange(5)
    planner = fast_planner(model, cfg, 0.99, 0)
    together = planner.plan(z, mu, sigma, task, ids, 0).mean.clone()
    alone = planner.plan(z[3:4], mu[3:4], sigma[3:4], task[3:4], ids[3:4], 0).mean
    torch.testing.assert_close(alone, together[3:4], atol=1e-5, rtol=1e-5)
    other_step = planner.plan(z, mu, sigma, task, ids, 1).mean
    assert not torch.allclose(other_step, together)


def test_masked_dimensions_stay_zero_and_influence_nothing():
    class Padded(LinearModel):
        def prior(self, z, e):
            return torch.full((*z.shape[:-1], 4), 0.3)

        def step(self, z, action, e, task):
            assert (action[..., 2:] == 0).all()
            return super().step(z, action[..., :2], e, task)

    z = torch.randn(3, 2)
    mask = torch.tensor([True, True, False, False]).expand(3, 4)
    ids, task = torch.arange(3), torch.zeros(3, dtype=torch.long)
    cfg = replace(CFG, num_prior_samples=4)
    plans = []
    for junk in (0.0, 5.0):
        mu = torch.zeros(3, 4)
        mu[:, 2:] = junk
        plans.append(literal_planner(Padded(), cfg, 1.0, 0).plan(z, mu, torch.ones(3, 4), task, ids, 0, mask))
    for plan in plans:
        assert (plan.mean[:, 2:] == 0).all()
    assert torch.equal(plans[0].mean, plans[1].mean)


@pytest.mark.parametrize("max_kl", [0.01, 0.3, float("inf")])
def test_projection_respects_the_trust_region(max_kl):
    torch.manual_seed(0)
    mu, sigma, plan = torch.randn(50, 3), torch.rand(50, 3) + 0.1, torch.randn(50, 3) * 2
    m = torch.empty_like(mu)
    project_torch(m, mu, sigma, (plan - mu) / sigma, max_kl)
    kl = kl_divergence(Normal(m, sigma), Normal(mu, sigma)).sum(-1)
    assert (kl <= max_kl * (1 + 1e-5)).all()
    # Inside the region the plan is untouched; the direction always is the plan's.
    torch.testing.assert_close(torch.cosine_similarity(m - mu, plan - mu), torch.ones(50))
    if max_kl == float("inf"):
        torch.testing.assert_close(m, plan)


def test_gaussian_log_prob_is_torchs():
    x, mean, std = torch.randn(7, 3), torch.randn(7, 3), torch.rand(7, 3) + 0.1
    torch.testing.assert_close(gaussian_log_prob(x, mean, std), Normal(mean, std).log_prob(x).sum(-1))


def test_density_of_a_drawn_elite_against_monte_carlo():
    """The behaviour of paper execution: its log-density must be that of its draws."""
    n = 200_000
    _, _, _, plan = run(LinearModel(), replace(CFG, num_elites=3, num_iterations=1, num_samples=16), n=1, dim=1)
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
