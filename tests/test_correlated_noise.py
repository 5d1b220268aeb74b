"""The control arm of the bonus: noise that is correlated in time, with the policy's own distribution at each step."""

import pytest
import torch
from toy_env import PointEnv, runner_cfg

from benchmarks.runner import ARMS
from m3po.baselines.correlated_noise import CorrelatedGaussian
from m3po.runners import M3PORunner


def draw(distribution: CorrelatedGaussian, num_steps: int, num_envs: int = 2000) -> torch.Tensor:
    """Noise of consecutive steps, stds, (T, N, A)."""
    distribution.update(torch.full((num_envs, 2), 3.0))
    return torch.stack([(distribution.sample() - 3.0) / distribution.std for _ in range(num_steps)]).detach()


@pytest.mark.parametrize("correlation", [0.0, 0.9])
def test_each_step_is_the_policys_and_steps_are_correlated(correlation):
    torch.manual_seed(0)
    with torch.no_grad():
        noise = draw(CorrelatedGaussian(2, correlation=correlation, init_std=0.5), 12)
    assert noise.mean().abs() < 0.05
    for step in (0, 11):
        assert noise[step].std() == pytest.approx(1.0, abs=0.05)
    for lag in (1, 3):
        assert (noise[lag:] * noise[:-lag]).mean() == pytest.approx(correlation**lag, abs=0.03)


def test_draws_of_an_update_are_independent_and_leave_the_process_alone():
    torch.manual_seed(0)
    distribution = CorrelatedGaussian(2, correlation=0.99)
    with torch.no_grad():
        before = draw(distribution, 1)[0]
    drawn = draw(distribution, 2)
    assert (drawn[0] * drawn[1]).mean().abs() < 0.05
    with torch.no_grad():
        after = draw(distribution, 1)[0]
    assert (before * after).mean() == pytest.approx(0.99, abs=0.05)


def test_m3po_trains_with_it():
    overrides = dict(override.split("=") for override in ARMS["arms"]["m3po-correlated-noise"]["overrides"])
    cfg = runner_cfg(bonus={"size": float(overrides["agent.algorithm.bonus.size"])})
    cfg["actor"]["distribution_cfg"]["class_name"] = overrides["agent.actor.distribution_cfg.class_name"]
    runner = M3PORunner(PointEnv(32), cfg, None, "cpu")
    runner.learn(2)
    assert isinstance(runner.alg.actor.distribution, CorrelatedGaussian)
    assert runner.alg.metrics["bonus/mean_abs"] == 0.0


@pytest.mark.parametrize("correlation", [-0.1, 1.0])
def test_impossible_correlations_are_refused(correlation):
    with pytest.raises(ValueError, match="must lie in"):
        CorrelatedGaussian(2, correlation=correlation)
