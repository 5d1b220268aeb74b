"""The planner on a GPU: the same plans as on the CPU, as one CUDA graph, without allocations or waits for the host."""

from dataclasses import replace

import pytest
import torch
from literal import fast_planner
from test_imagination import CFG, make_model, make_start

from m3po.planning.imagination import Start
from m3po.planning.memory import plan_bytes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

VARIANTS = {
    "eager": {},
    "warp": {"kernels": "warp"},
    "compiled": {"epilogues": "compiled", "kernels": "warp"},
    "triton": {"epilogues": "triton", "kernels": "warp"},
    "graph": {"epilogues": "triton", "kernels": "warp", "cuda_graph": True},
    "compiled graph": {"epilogues": "compiled", "kernels": "warp", "cuda_graph": True},
}


def on_gpu(start):
    return Start(**{k: None if v is None else v.cuda() for k, v in vars(start).items()})


def inputs(start, step):
    return start.z, start.mu, start.sigma, start.task, start.env_ids, step, start.action_mask


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("num_tasks", "masked"), [(1, False), (3, True)])
def test_a_plan_is_that_of_the_cpu(variant, num_tasks, masked):
    model = make_model(num_tasks)
    starts = [make_start(model, 40, masked) for _ in range(3)]
    reference = fast_planner(model, CFG, 0.97, 11)
    expected = [reference.plan(*inputs(s, i)).mean.clone() for i, s in enumerate(starts)]
    planner = fast_planner(model.cuda(), replace(CFG, **VARIANTS[variant]), 0.97, 11)
    for i, start in enumerate(starts):
        got = planner.plan(*inputs(on_gpu(start), i)).mean.cpu()
        torch.testing.assert_close(got, expected[i], atol=2e-3, rtol=2e-3)
    # A change of the model reaches a captured graph.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
    planner.imagination.model_changed()
    changed = planner.plan(*inputs(on_gpu(starts[0]), 0)).mean.cpu()
    assert not torch.allclose(changed, expected[0], atol=2e-3)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("epilogues", ["compiled", "triton"])
def test_a_captured_plan_allocates_nothing_and_waits_for_nothing(precision, epilogues):
    model = make_model(size="1M", obs_dim=60, action_dim=8).cuda()
    cfg = replace(
        CFG,
        num_samples=64,
        num_elites=8,
        kernels="warp",
        epilogues=epilogues,
        precision=precision,
        cuda_graph=True,
        chunk_rows=0,
    )
    start = on_gpu(make_start(model.cpu(), 512))
    planner = fast_planner(model.cuda(), cfg, 0.97, 0)
    planner.plan(*inputs(start, 0))
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(1, 4):
            planner.plan(*inputs(start, step))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


def test_memory_is_what_the_formula_says():
    model = make_model(size="1M", obs_dim=60, action_dim=8)
    cfg = replace(CFG, num_samples=64, num_elites=8, kernels="warp", epilogues="triton", chunk_rows=0)
    start = on_gpu(make_start(model, 1024))
    planner = fast_planner(model.cuda(), cfg, 0.97, 0)
    planner.imagination.refresh()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    planner.plan(*inputs(start, 0))
    peak = torch.cuda.max_memory_allocated() - before
    assert abs(peak / plan_bytes(1024, 8, cfg, model.cfg, "cuda") - 1.0) < 0.1
