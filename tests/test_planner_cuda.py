"""The planner on a GPU: the same plans as on the CPU, as one CUDA graph, without allocations or waits for the host."""

import copy
from dataclasses import replace

import pytest
import torch
from test_objective import build
from test_planner import SMALL, random_inputs

from m3po.planning import MPPIPlanner, PlanInputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

VARIANTS = {
    "torch": {},
    "warp": {"kernels": "warp"},
    "graph": {"kernels": "warp", "cuda_graph": True},
    "graph of torch": {"cuda_graph": True},
}


def on_gpu(inputs):
    return PlanInputs(**{name: value.cuda() for name, value in vars(inputs).items()})


def objective_on_gpu(alg):
    """A copy whose networks are on the GPU."""
    objective = copy.deepcopy(alg.objective)
    objective.model.cuda()
    objective.actor.cuda()
    estimator = objective.values.__self__
    estimator.critic.cuda()
    estimator.rewards.cuda()
    objective.discounts = estimator.tasks.discounts = objective.discounts.cuda()
    objective.action_mask = objective.action_mask.cuda()
    return objective


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("several", [False, True])
def test_a_plan_is_that_of_the_cpu(variant, several):
    alg = build(several)
    inputs = random_inputs(alg, 40)
    batches = [replace(inputs, z=inputs.z + 0.1 * i, step=torch.tensor(i)) for i in range(3)]
    reference = MPPIPlanner(alg.objective, SMALL, 11)
    expected = [reference.plan(s).mean for s in batches]
    objective = objective_on_gpu(alg)
    planner = MPPIPlanner(objective, replace(SMALL, **VARIANTS[variant]), 11)
    for s, mean in zip(batches, expected, strict=True):
        torch.testing.assert_close(planner.plan(on_gpu(s)).mean.cpu(), mean, atol=2e-3, rtol=2e-3)
    # A change of the model reaches a captured graph.
    with torch.no_grad():
        for parameter in objective.model.parameters():
            parameter.mul_(0.5)
    assert not torch.allclose(planner.plan(on_gpu(batches[0])).mean.cpu(), expected[0], atol=2e-3)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_captured_plan_allocates_nothing_and_waits_for_nothing(precision):
    alg = build()
    cfg = replace(SMALL, num_samples=64, num_elites=8, kernels="warp", precision=precision, cuda_graph=True)
    inputs = on_gpu(random_inputs(alg, 512))
    planner = MPPIPlanner(objective_on_gpu(alg), cfg, 0)
    planner.plan(inputs)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            planner.plan(inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


def test_another_number_of_environments_is_captured_anew():
    alg = build()
    planner = MPPIPlanner(objective_on_gpu(alg), replace(SMALL, kernels="warp", cuda_graph=True), 0)
    for n in (40, 24):
        inputs = random_inputs(alg, n)
        expected = MPPIPlanner(alg.objective, SMALL, 0).plan(inputs).mean
        torch.testing.assert_close(planner.plan(on_gpu(inputs)).mean.cpu(), expected, atol=2e-3, rtol=2e-3)
