"""One plan of N environments: our planner against TD-MPC2's, pytorch-mppi, torchrl, and the machine's matmul peak.

./isaaclab.sh -p scripts/benchmark_planner.py --size 5M --samples 64 --iterations 2 --horizon 3
./isaaclab.sh -p scripts/benchmark_planner.py --device cuda:0 --size 1M

Before anything is timed, all planners that use our weights must give the same candidates the same returns, and hold the
same budget; otherwise the script refuses. Then each round times every contestant once, in rotating order, so that a
change of the machine's pace meets all of them. The result goes to ``benchmarks/planner/<size>-<budget>-<device>.json``
and ``.png``. The CPU runs report CPU time of the process, CUDA runs wall-clock time; both are stored.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch._inductor.config
from benchmark_planner_external import Official, PytorchMppi, TorchRL, find_checkout
from benchmark_planner_peers import Contestant, Inputs, Native, Restated, Setup
from benchmark_planner_report import figures, machine, targets, versions, write_picture, write_table
from benchmark_planner_work import (
    Budget,
    Gemm,
    Shapes,
    Unavailable,
    bandwidth,
    measure,
    our_gemms,
)

from m3po.cli.arguments import Parser, at_least, guarded
from m3po.config import MODEL_SIZES, PlannerCfg, WorldModelCfg
from m3po.errors import M3POError, UserError
from m3po.manifest import git_revision, jsonable
from m3po.models import WorldModel
from m3po.planning import Imagination, MPPIPlanner
from m3po.planning.imagination import Start
from m3po.planning.memory import plan_bytes

OUTPUT = Path(__file__).resolve().parents[1] / "benchmarks" / "planner"
GAMMA = 0.99


class Variant(NamedTuple):
    """A form of our planner: fields of ``PlannerCfg`` everywhere, and those set on CUDA only."""

    label: str
    fields: dict[str, Any]
    on_cuda: dict[str, Any] = {}  # noqa: RUF012 - never changed
    cuda_only: bool = False


_CUDA = {"cuda_graph": True, "kernels": "warp"}
VARIANTS = {
    "ours-eager": Variant("M3PO eager f32", {"epilogues": "eager", "precision": "float32"}),
    "ours-compiled": Variant("M3PO compiled f32", {"epilogues": "compiled", "precision": "float32"}, _CUDA),
    "ours-bf16": Variant("M3PO compiled bf16", {"epilogues": "compiled", "precision": "bfloat16"}, _CUDA),
    "ours-triton": Variant("M3PO Triton bf16", {"epilogues": "triton", "precision": "bfloat16"}, _CUDA, True),
}
"""Our variants, by name."""

PEERS = {
    "tdmpc2": "TD-MPC2 planner, re-stated",
    "tdmpc2-1head": "TD-MPC2 re-stated, 1 value head",
    "tdmpc2-compiled": "TD-MPC2 re-stated, compiled",
    "tdmpc2-native": "TD-MPC2 re-stated, own networks",
    "pytorch-mppi": "pytorch-mppi MPPI_Batched",
    "torchrl": "torchrl MPPIPlanner",
    "official": "TD-MPC2 official",
    "official-compiled": "TD-MPC2 official, compiled",
}
LABELS = {key: variant.label for key, variant in VARIANTS.items()} | PEERS


class UnequalWork(M3POError):
    """Two contestants would not do the same; nothing is timed."""


class Ours(Contestant):
    """Our planner in one of its variants."""

    def __init__(self, setup: Setup, variant: Variant, chunk_rows: int = 0) -> None:
        """Build the planner; ``chunk_rows`` 0 leaves the choice to it.

        Raises:
            Unavailable: If this machine cannot run the variant.
        """
        cuda = setup.device.type == "cuda"
        if variant.cuda_only and not cuda:
            raise Unavailable("needs CUDA")
        b = setup.budget
        cfg = PlannerCfg(
            horizon=b.horizon,
            num_samples=b.samples,
            num_prior_samples=b.prior_samples,
            num_iterations=b.iterations,
            num_elites=b.elites,
            chunk_rows=chunk_rows,
            **variant.fields | (variant.on_cuda if cuda else {}),
        )
        self.imagination = Imagination(setup.model, cfg, b.gamma)
        self.planner = MPPIPlanner(self.imagination, cfg, setup.seed)
        self.setup, self.dtype, self.step = setup, cfg.precision, 0

    @property
    def budget(self) -> Budget:
        """As the planner holds it."""
        c, gamma = self.planner.cfg, round(self.imagination.gamma.item(), 6)  # it is a tensor by task, in float32
        return Budget(c.num_samples, c.num_iterations, c.horizon, gamma, True, c.num_elites, c.num_prior_samples)

    def plan(self, x: Inputs) -> torch.Tensor:
        """Plan once; every plan draws new noise."""
        self.step += 1
        return self.planner.plan(x.z, x.mu, x.sigma, x.task, x.ids, self.step).mean

    @torch.no_grad()
    def returns(self, x: Inputs, actions: torch.Tensor) -> torch.Tensor:
        """Evaluate candidates as within a plan: as perturbations of zeros by one deviation of one."""
        returns = actions.new_empty(actions.shape[:2])
        start = Start(x.z, torch.zeros_like(x.mu), torch.ones_like(x.sigma), x.task, x.ids, None)
        self.imagination.refresh()
        self.imagination.begin(start, actions.shape[1])
        self.imagination.roll(actions, returns, nominal=torch.zeros_like(actions[:, 0]))
        return returns

    def gemms(self, n: int) -> list[Gemm]:
        """Products of a plan."""
        return our_gemms(n, self.setup.shapes, self.budget)

    def memory(self, n: int) -> int:
        """Bytes of a plan by the planner's own formula."""
        s = self.setup
        return plan_bytes(n, s.shapes.action, self.planner.cfg, s.model.cfg, s.device.type)


def build(key: str, setup: Setup, n: int, options: argparse.Namespace) -> Contestant:
    """Create a contestant for n environments.

    Raises:
        Unavailable: If it cannot run here.
    """
    if key in VARIANTS:
        return Ours(setup, VARIANTS[key], options.chunk_rows)
    if key.startswith("official"):
        if options.tdmpc2 is None:
            raise Unavailable("needs --tdmpc2 PATH, a checkout of github.com/nicklashansen/tdmpc2")
        return Official(setup, n, options.tdmpc2, compiled=key.endswith("compiled"))
    makers: dict[str, Callable[[], Contestant]] = {
        "tdmpc2": lambda: Restated(setup),
        "tdmpc2-1head": lambda: Restated(setup, num_values=1),
        "tdmpc2-compiled": lambda: Restated(setup, compiled=True),
        "tdmpc2-native": lambda: Native(setup),
        "pytorch-mppi": lambda: PytorchMppi(setup, n),
        "torchrl": lambda: TorchRL(setup),
    }
    return makers[key]()


def make_setup(options: argparse.Namespace) -> Setup:
    """World model with weights that are not zero anywhere, so that candidates differ, and the common budget."""
    # Part of the key of inductor's cache only if it is set; all compiled contestants run with the threads of now.
    torch._inductor.config.cpp.threads = torch.get_num_threads()
    torch.manual_seed(options.seed)
    cfg = WorldModelCfg(size=options.size, dynamics=options.dynamics)
    model = WorldModel(options.obs_dim, options.action_dim, 1, cfg)
    width = MODEL_SIZES[options.size][1]
    for head in (model.latent_head, model.reward_head, model.value_head[-1], model.prior_head[-1]):
        torch.nn.init.normal_(head.weight, std=2.0 * width**-0.5)
    torch.nn.init.normal_(model.termination_head.weight, std=0.5 * width**-0.5)
    torch.nn.init.constant_(model.termination_head.bias, -3.0)  # about one step in twenty ends an episode
    device = torch.device(options.device)
    budget = Budget(
        options.samples, options.iterations, options.horizon, GAMMA, True, options.elites, options.prior_samples
    )
    shapes = Shapes.of(cfg, options.action_dim)
    return Setup(model.to(device), budget, shapes, options.size, options.obs_dim, options.seed, device)


def make_inputs(setup: Setup, n: int) -> Inputs:
    """Starts of n environments; each is the same whatever n is."""
    generator = torch.Generator().manual_seed(setup.seed)
    draw = torch.randn(n, setup.obs_dim + setup.shapes.action, generator=generator).to(setup.device)
    task = torch.zeros(n, dtype=torch.long, device=setup.device)
    obs, mu = draw.split([setup.obs_dim, setup.shapes.action], dim=1)
    with torch.no_grad():
        z = setup.model.encode(obs, task)
    ids = torch.arange(n, device=setup.device)
    return Inputs(obs.contiguous(), z, 0.5 * mu, torch.full_like(mu, 0.5), task, ids)


def assert_equal_work(contestants: dict[str, Contestant], setup: Setup) -> dict[str, float | None]:
    """Refuse unless all contestants search the same budget and judge candidates alike.

    Args:
        contestants: Built for the environments of :func:`make_inputs` with n = 2.
        setup: The common budget and model.

    Returns:
        Largest difference of a return from the re-stated peer's, in deviations of the candidates' returns; ``None`` for
        a contestant with networks of its own.

    Raises:
        UnequalWork: Names the contestant and what differs.
    """
    x, b = make_inputs(setup, 2), setup.budget
    generator = torch.Generator().manual_seed(setup.seed + 1)
    actions = torch.randn(2, max(b.samples, 16), b.horizon, setup.shapes.action, generator=generator).clamp(-1, 1)
    actions = actions.to(setup.device)
    reference = Restated(setup).returns(x, actions)
    spread = reference.std(dim=1, keepdim=True)
    if not (spread > 0).all():
        raise UnequalWork("All candidates have the same return: nothing would be compared.")
    deviations: dict[str, float | None] = {}
    for key, contestant in contestants.items():
        for field in dataclasses.fields(Budget):
            mine, common = getattr(contestant.budget, field.name), getattr(b, field.name)
            if mine is not None and mine != common:
                raise UnequalWork(f"{LABELS[key]} has {field.name} {mine} instead of {common}.")
        returns = contestant.returns(x, actions)
        deviations[key] = None
        if returns is None:
            continue
        deviations[key] = ((returns.float() - reference).abs() / spread).max().item()
        if contestant.dtype == "float32":
            equal = deviations[key] < 1e-3
        else:  # half the digits: what counts is that the candidates keep their order
            ranks = torch.stack([r.float().argsort(1).argsort(1).float() for r in (returns, reference)])
            correlations = [torch.corrcoef(ranks[:, i])[0, 1].item() for i in range(2)]
            equal = min(correlations) > 0.95
        if not equal:
            raise UnequalWork(
                f"{LABELS[key]} and the re-stated TD-MPC2 planner give the same candidates different returns: "
                f"up to {deviations[key]:.3g} deviations apart."
            )
    return deviations


def parse(argv: list[str]) -> argparse.Namespace:
    """Read and check the command line.

    Raises:
        UserError: Names the option and what is allowed.
    """
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--size", default="5M", choices=list(MODEL_SIZES), help="Size of the world model.")
    add("--dynamics", default="plain", choices=("plain", "residual"), help="Form of the dynamics; plain is TD-MPC2's.")
    add("--obs_dim", type=at_least(1), default=60, help="Observation dimensions.")
    add("--action_dim", type=at_least(1), default=8, help="Action dimensions.")
    add("--num_envs", type=at_least(1), nargs="+", default=[1, 16, 64, 256, 1024, 4096], help="Environments per plan.")
    add("--samples", type=at_least(1), default=64, help="Candidates per environment and iteration.")
    add("--iterations", type=at_least(1), default=2, help="MPPI iterations.")
    add("--horizon", type=at_least(1), default=3, help="Planned steps.")
    add("--elites", type=at_least(1), default=8, help="Candidates that update the sampling distribution.")
    add("--prior_samples", type=at_least(0), default=8, help="Candidates that follow the policy.")
    add("--contestants", nargs="+", choices=list(LABELS), metavar="NAME", help=f"Some of: {', '.join(LABELS)}.")
    add("--chunk_rows", type=at_least(0), default=0, help="Rows per chunk of our planner; 0: its own choice.")
    add("--tdmpc2", type=Path, metavar="PATH", help="Checkout of github.com/nicklashansen/tdmpc2, timed as well.")
    add("--rounds", type=at_least(1), default=7, help="Rounds; each times every contestant once.")
    add("--min_seconds", type=float, default=0.2, help="A timing repeats the plan until it has lasted about this long.")
    add("--time_limit", type=float, default=60.0, help="Leave out what is expected to take longer per plan, seconds.")
    add(
        "--memory_limit",
        type=float,
        help="Leave out what is expected to need more, GiB (default: half of what is free).",
    )
    add("--peak_sizes", type=at_least(1), nargs="+", help="Sides of the square products tried for the matmul peak.")
    add("--device", default="cpu", help="cpu, or a CUDA device.")
    add("--seed", type=at_least(0), default=0, help="Seed of weights, inputs and noise.")
    add("--output", type=Path, default=OUTPUT, help="Folder of the results.")
    options = parser.parse_args(argv)
    for name in ("elites", "prior_samples"):
        if getattr(options, name) > options.samples:
            raise UserError(f"--{name} ({getattr(options, name)}) exceeds --samples ({options.samples}).")
    try:
        device = torch.device(options.device)
    except RuntimeError:
        raise UserError(f"--device must be cpu or a CUDA device, got '{options.device}'.") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device must be cpu or a CUDA device, got '{options.device}'.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {options.device}: this machine has no CUDA device.")
    if options.tdmpc2 is not None:
        find_checkout(options.tdmpc2)
    if options.contestants is None:  # the official code compiles anew for every number of environments: on request
        options.contestants = [key for key in LABELS if key != "official-compiled"]
    options.num_envs = sorted(set(options.num_envs))
    options.peak_sizes = options.peak_sizes or ([1024, 2048] if device.type == "cpu" else [4096, 8192, 16384])
    options.memory_limit = options.memory_limit or free_memory(device) / 2 / 2**30
    return options


def free_memory(device: torch.device) -> float:
    """Bytes that are free on the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def main(argv: list[str]) -> int:
    """Check, time, print and store."""
    options = parse(argv)
    torch._dynamo.config.recompile_limit = 64  # per function: many sizes and types meet in this process
    setup = make_setup(options)
    ready: dict[str, Contestant] = {}
    missing: dict[str, str] = {}
    for key in options.contestants:
        try:
            # Two environments for the check; a planner of one environment is built for one, and has other networks.
            ready[key] = build(key, setup, 1 if key.startswith("official") else 2, options)
        except Unavailable as error:
            missing[key] = str(error)
    deviations = assert_equal_work(ready, setup)
    equal = [key for key, deviation in deviations.items() if deviation is not None]
    print(f"same budget: {', '.join(ready)}\nsame returns of the same candidates: {', '.join(equal)}")
    rows = measure(
        setup.device,
        options,
        lambda key, n: build(key, setup, n, options),
        lambda n: make_inputs(setup, n),
        list(ready),
        missing,
    )
    bytes_per_second = bandwidth(setup.device, 8 if max(options.peak_sizes) < 1024 else 256)
    basis = "cpu_s" if setup.device.type == "cpu" else "wall_s"
    figures(rows, basis)
    result = {
        "command": "scripts/benchmark_planner.py " + " ".join(argv),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "git": git_revision(Path(__file__)),
        "machine": machine(setup.device),
        "basis": basis,
        "bandwidth_bytes_per_s": bytes_per_second,
        "settings": {k: v for k, v in vars(options).items() if k not in ("output", "tdmpc2")} | {"gamma": GAMMA},
        "contestants": {
            key: {
                "label": LABELS[key],
                "notes": ready[key].notes if key in ready else "",
                "budget": dataclasses.asdict(ready[key].budget) if key in ready else None,
                "return_deviation": deviations.get(key),
            }
            for key in options.contestants
        },
        "not_measured": missing,
        "rows": rows,
        "targets": targets(rows, options, machine(setup.device)),
    }
    print(write_table(result))
    options.output.mkdir(parents=True, exist_ok=True)
    name = f"{options.size}-{options.samples}x{options.iterations}x{options.horizon}-{setup.device.type}"
    path = options.output / f"{name}.json"
    path.write_text(json.dumps(jsonable(result), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    drawn = write_picture(result, path.with_suffix(".png"))
    print(f"stored {path}" + (f" and {path.with_suffix('.png').name}" if drawn else " (no picture: needs matplotlib)"))
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
