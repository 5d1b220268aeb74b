"""The fast planner against literal forms, in all its variants; its memory; its schedule."""

import copy
import os
import sys
from dataclasses import replace

import pytest
import torch
from conftest import run_process
from literal import LiteralImagination, fast_planner, literal_plan
from torch.profiler import ProfilerActivity, profile

from m3po.config import AlgorithmCfg, PlannerCfg, WorldModelCfg, planner_at
from m3po.kernels.sampling import planner_noise
from m3po.models import WorldModel
from m3po.planning import Imagination
from m3po.planning.imagination import Start
from m3po.planning.memory import check_memory, plan_bytes
from m3po.validation import validate

CFG = PlannerCfg(horizon=3, num_samples=9, num_prior_samples=2, num_iterations=2, num_elites=4, chunk_rows=25)
VARIANTS = {
    "eager": {},
    "compiled": {"epilogues": "compiled"},
    "warp": {"kernels": "warp"},
    "one chunk": {"chunk_rows": 10_000},
}


def make_model(num_tasks=1, size="tiny", obs_dim=6, action_dim=3, **cfg):
    torch.manual_seed(0)
    cfg = {"task_embedding_dim": 4, "terminal_reward": True, "balance_terminations": True} | cfg
    model = WorldModel(obs_dim, action_dim, num_tasks, WorldModelCfg(size=size, **cfg))
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.05 if "prior" in name else 0.15)
    model.rewards.rate.fill_(0.1)
    model.rewards.terminal.fill_(-2.0)
    return model


def make_start(model, n, masked=False):
    action_dim, num_tasks = model.prior_head[-1].out_features, model.task_embedding.shape[0]
    z = torch.softmax(torch.randn(n, model.latent_dim // 8, 8), -1).flatten(1)
    mask = None
    if masked:
        mask = torch.ones(n, action_dim, dtype=torch.bool)
        mask[::2, -1] = False
    ids = torch.arange(n) + 50
    return Start(
        z, torch.randn(n, action_dim), torch.rand(n, action_dim) + 0.1, torch.randint(num_tasks, (n,)), ids, mask
    )


def plan(model, cfg, start, step=3):
    planner = fast_planner(model, cfg, 0.97, 11)
    return planner.plan(start.z, start.mu, start.sigma, start.task, start.env_ids, step, start.action_mask)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("num_tasks", "masked"), [(1, False), (3, True)])
@pytest.mark.parametrize("dynamics", ["residual", "plain"])
def test_a_plan_equals_a_literal_loop_in_float64(variant, num_tasks, masked, dynamics):
    model = make_model(num_tasks, dynamics=dynamics)
    start = make_start(model, 5, masked)
    cfg = replace(CFG, **VARIANTS[variant])
    result = plan(model, cfg, start)
    exact = copy.deepcopy(model).double()
    shape = (cfg.num_samples, cfg.horizon, start.mu.shape[1])
    noise = [planner_noise(torch.tensor([11, 3, i]), start.env_ids, shape).double() for i in range(cfg.num_iterations)]
    for i in range(5):
        with torch.no_grad():
            mean, gain = literal_plan(
                exact,
                cfg,
                0.97,
                start.z[i].double(),
                start.mu[i].double(),
                start.sigma[i].double(),
                start.task[i],
                [x[i] for x in noise],
                None if start.action_mask is None else start.action_mask[i],
            )
        torch.testing.assert_close(result.mean[i].double(), mean, atol=2e-4, rtol=2e-4)
        torch.testing.assert_close(result.gain[i].double(), gain, atol=2e-3, rtol=2e-3)


def imagined(imagination, start, u):
    returns, actions = torch.full(u.shape[:2], float("nan")), torch.full((len(u), 3, *u.shape[2:]), float("nan"))
    with torch.no_grad():
        imagination.refresh()
        imagination.begin(start, u.shape[1])
        imagination.roll(u, returns, actions=actions)
    return returns, actions


@pytest.mark.parametrize("epilogues", ["eager", "compiled"])
def test_imagined_returns_follow_a_change_of_the_model(epilogues):
    """The weights are copies: an optimiser's step or a loaded checkpoint must reach them."""
    model = make_model()
    start = make_start(model, 4)
    imagination = Imagination(model, replace(CFG, epilogues=epilogues), 0.97)
    u = torch.randn(4, 5, 3, 3)
    u[:, 0] = 0.0
    before, _ = imagined(imagination, start, u)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    imagination.model_changed()
    after, actions = imagined(imagination, start, u)
    assert not torch.allclose(before, after)
    literal = LiteralImagination(model, 3, 0.97)
    expected, expected_actions = imagined(literal, start, u)
    torch.testing.assert_close(after, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(actions, expected_actions, atol=1e-5, rtol=1e-5)
    model.load_state_dict(make_model().state_dict())
    imagination.model_changed()
    torch.testing.assert_close(imagined(imagination, start, u)[0], before)


@pytest.mark.parametrize("epilogues", ["eager", "compiled"])
def test_bfloat16_ranks_candidates_as_float32_does(epilogues):
    model = make_model(size="1M", obs_dim=60, action_dim=8)
    for name, parameter in model.named_parameters():  # spread like a trained model's: see benchmarks/model
        if parameter.dim() > 1:
            torch.nn.init.trunc_normal_(parameter, std=parameter.shape[1] ** -0.5 * (0.3 if "prior" in name else 1.0))
    start = make_start(model, 32)
    u = torch.randn(32, 64, 3, 8)
    u[:, 0] = 0.0
    cfg = replace(CFG, epilogues=epilogues, chunk_rows=0)
    exact, _ = imagined(Imagination(model, cfg, 0.97), start, u)
    rough, _ = imagined(Imagination(model, replace(cfg, precision="bfloat16"), 0.97), start, u)
    pairs = (exact.unsqueeze(1) - exact.unsqueeze(2)).sign() == (rough.unsqueeze(1) - rough.unsqueeze(2)).sign()
    assert pairs.float().mean() > 0.95
    budget = replace(cfg, num_samples=64, num_elites=8)
    plans = [plan(model, replace(budget, precision=p), start).projected.clone() for p in ("float32", "bfloat16")]
    # What is executed differs by less than the trust region's own size: KL of one against the other.
    kl = 0.5 * ((plans[0] - plans[1]) / start.sigma).square().sum(-1)
    assert kl.mean() < cfg.max_kl


def allocations(planner, start, step):
    """Changes of the allocated bytes during a plan, in order, each with the operation that caused it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        planner.plan(start.z, start.mu, start.sigma, start.task, start.env_ids, step, start.action_mask)
    events = sorted(prof.profiler.kineto_results.events(), key=lambda e: e.start_ns())
    found, running = [], []
    for event in events:
        running = [e for e in running if e.start_ns() + e.duration_ns() >= event.start_ns()]
        if event.name() == "[memory]":
            found.append((event.nbytes(), running[-1].name() if running else ""))
        else:
            running.append(event)
    return found


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("epilogues", ["eager", "compiled"])
@pytest.mark.parametrize(("n", "samples", "horizon", "size"), [(300, 16, 4, "tiny"), (40, 64, 3, "1M")])
def test_peak_memory_of_a_plan_is_what_the_formula_says(n, samples, horizon, size, epilogues, precision):
    model = make_model(size=size, obs_dim=60, action_dim=8)
    cfg = PlannerCfg(
        horizon=horizon,
        num_samples=samples,
        num_iterations=2,
        num_elites=8,
        kernels="warp",
        epilogues=epilogues,
        precision=precision,
    )
    planner = fast_planner(model, cfg, 0.97, 0)
    planner.imagination.refresh()
    changes = [change for change, _ in allocations(planner, make_start(model, n), 0)]
    peak = torch.tensor([0, *changes]).cumsum(0).max().item()
    assert abs(peak / plan_bytes(n, 8, cfg, model.cfg, "cpu") - 1.0) < 0.1


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("epilogues", ["eager", "compiled"])
def test_a_plan_allocates_nothing_that_grows_with_its_size_after_the_first_call(epilogues, precision):
    rows = 128
    cfg = replace(CFG, num_elites=8, kernels="warp", epilogues=epilogues, precision=precision, chunk_rows=rows)
    # Eager operations wrap their numbers in tensors; inductor allocates one number per row of a chunk.
    allowed = 8 if epilogues == "eager" else 4 * rows
    workspaces = []
    for n, samples, num_tasks in ((20, 16, 1), (80, 16, 1), (20, 100, 1), (20, 16, 3)):
        model = make_model(num_tasks, obs_dim=60, action_dim=8)
        planner, start = fast_planner(model, replace(cfg, num_samples=samples), 0.97, 0), make_start(model, n)
        planner.plan(start.z, start.mu, start.sigma, start.task, start.env_ids, 0)
        for step in (1, 2):
            made = [(size, name) for size, name in allocations(planner, start, step) if size > 0]
            products = [size for size, name in made if name in ("aten::mm", "aten::addmm")]
            others = [(size, name) for size, name in made if name not in ("aten::mm", "aten::addmm")]
            assert [found for found in others if found[0] > allowed] == []
            workspaces.append(max(products, default=0))
    # oneDNN's blocks of a bfloat16 product do not grow with it.
    assert max(workspaces) < (256 * 1024 if precision == "bfloat16" else 64)


def test_a_budget_that_does_not_fit_is_refused_with_its_number():
    model = WorldModelCfg(size="5M")
    with pytest.raises(ValueError, match=r"needs [\d.]+ GiB.*planner.num_samples"):
        check_memory(10_000_000, 8, PlannerCfg(num_samples=512, share=1.0), model, "cpu")
    # The largest stage counts.
    later = PlannerCfg(share=0.0, stages=[[0.5, {"share": 1.0, "num_samples": 512}]])
    with pytest.raises(ValueError, match="GiB"):
        check_memory(10_000_000, 8, later, model, "cpu")
    check_memory(512, 8, PlannerCfg(), model, "cpu")


def test_stages_change_the_budget_and_nothing_else():
    cfg = PlannerCfg(share=1.0, stages=[[0.25, {"share": 0.5}], [0.5, {"num_samples": 8, "num_elites": 4}]])
    assert planner_at(cfg, 0.0) == cfg
    assert planner_at(cfg, 0.3) == replace(cfg, share=0.5)
    assert planner_at(cfg, 0.5) == replace(cfg, share=0.5, num_samples=8, num_elites=4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": [[0.5, {"sharee": 0.1}]]}, "cannot change sharee"),
        ({"stages": [[1.5, {"share": 0.1}]]}, "progress"),
        ({"stages": [0.5]}, "pairs"),
        ({"stages": [[0.5, {"num_samples": 4}]]}, "num_elites .8. exceeds"),
        ({"stages": [[0.5, {"share": 2.0}]]}, "share must lie in"),
        ({"num_elites": 100}, "exceeds"),
        ({"horizon": 0}, "horizon must be at least 1"),
        ({"share": -0.1}, "share must lie in"),
        ({"kernels": "cuda"}, "kernels must be one of torch, warp"),
        ({"epilogues": "fast"}, "epilogues must be one of"),
        ({"precision": "float16"}, "precision must be one of"),
        ({"epilogues": "triton"}, "needs a CUDA device"),
        ({"cuda_graph": True}, "needs a CUDA device"),
        ({"chunk_rows": -1}, "chunk_rows must not be negative"),
    ],
)
def test_a_wrong_budget_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        validate(AlgorithmCfg(planner=replace(PlannerCfg(), **changes)), 16, 8)


COMPILE = """
import torch
from m3po.planning.epilogues import _compiled, _two_hot
out = torch.empty(64)
_compiled(_two_hot)(torch.randn(64, 101), torch.linspace(-10, 10, 101), out)
print(torch.get_num_threads(), out.isfinite().all().item())
"""


def test_kernels_of_a_process_with_other_threads_are_not_reused(tmp_path):
    """Inductor's cache on the disk would hand a kernel for two threads to a process with one, where it is slow."""
    for threads, kernels in (("2", 1), ("1", 2)):
        env = os.environ | {"OMP_NUM_THREADS": threads, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
        result = run_process([sys.executable, "-c", COMPILE], env=env)
        assert result.stdout.split() == [threads, "True"], result.stderr
        sources = [path.read_text() for path in tmp_path.rglob("*.py")]
        assert sum('extern "C"' in source for source in sources) == kernels
    assert sum("num_threads(2)" in source for source in sources) == 1
