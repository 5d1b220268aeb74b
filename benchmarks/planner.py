"""One plan of N environments: our planner against TD-MPC2's, pytorch-mppi's and torchrl's on the same networks.

./isaaclab.sh -p -m benchmarks planner --samples 64 --iterations 2 --horizon 3
./isaaclab.sh -p -m benchmarks planner --device cuda:0

Before anything is timed, all planners must give the same candidates the same returns, and hold the same budget;
otherwise the script refuses. Then each round times every contestant once, in rotating order, so that a change of the
machine's pace meets all of them. The result goes to ``benchmarks/planner/<width>-<budget>-<device>.json``. CPU runs
report CPU time of the process, CUDA runs wall-clock time; both are stored. The gradient's plan is 0 here.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import re
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rsl_rl.models import MLPModel
from tensordict import TensorDict

from benchmarks.planner_peers import Budget, Candidates, Contestant, PytorchMppi, Restated, Setup, TorchRL, Unavailable
from benchmarks.planner_report import machine, write_table
from m3po.cli.arguments import Parser, at_least
from m3po.config import PlannerCfg, WorldModelCfg
from m3po.errors import M3POError, UserError
from m3po.manifest import git_revision, jsonable, package_versions
from m3po.models import WorldModel
from m3po.planning import MPPIPlanner, Objective, PlanInputs

OUTPUT = Path(__file__).resolve().parents[1] / "benchmarks" / "planner"
GAMMA = 0.99


class UnequalWork(M3POError):
    """Two contestants would not do the same; nothing is timed."""


class Ours(Contestant):
    """Our planner."""

    label, precision = "M3PO", "float32"
    notes = "candidates follow the policy closed-loop, which the peers' do not: the policy is evaluated in every step"

    def __init__(self, setup: Setup, n: int) -> None:
        """Build the planner."""
        cfg = planner_cfg(setup.budget, setup.device, precision=self.precision)
        self.planner, self.gamma = MPPIPlanner(setup.objective, cfg, setup.seed), setup.budget.gamma
        self.step = torch.zeros((), dtype=torch.int64, device=setup.device)

    @property
    def budget(self) -> dict[str, Any]:
        """As the planner holds it."""
        c = self.planner.cfg
        sizes = {"samples": c.num_samples, "iterations": c.num_iterations, "horizon": self.planner.objective.horizon}
        return sizes | {"elites": c.num_elites, "policy_samples": c.num_policy_samples, "gamma": self.gamma}

    def plan(self, inputs: PlanInputs) -> torch.Tensor:
        """Plan once; every plan draws new noise."""
        inputs.step += 1
        return self.planner.plan(inputs).mean

    @torch.no_grad()
    def returns(self, inputs: PlanInputs, candidates: Candidates) -> torch.Tensor:
        """Evaluate as within a plan."""
        return self.planner.evaluate(inputs, candidates.u)


class OursBfloat16(Ours):
    """The same with matrix products in bfloat16."""

    label, precision, low_precision = "M3PO, bfloat16", "bfloat16", True


CONTESTANTS: dict[str, type] = {
    "ours": Ours,
    "ours-bf16": OursBfloat16,
    "tdmpc2": Restated,
    "pytorch-mppi": PytorchMppi,
    "torchrl": TorchRL,
}
"""Classes by name."""


def planner_cfg(budget: Budget, device: torch.device, **fields: Any) -> PlannerCfg:
    """Planner that searches a budget; its return is that of H steps, as the peers' is."""
    cuda = {"cuda_graph": True, "kernels": "warp"} if device.type == "cuda" else {}
    return PlannerCfg(
        horizon=budget.horizon,
        average_horizons=False,
        num_samples=budget.samples,
        num_policy_samples=budget.policy_samples,
        num_iterations=budget.iterations,
        num_elites=budget.elites,
        **cuda | fields,
    )


def make_setup(options: argparse.Namespace) -> Setup:
    """Networks whose weights are not zero anywhere, so that candidates differ, and the common budget."""
    torch.manual_seed(options.seed)
    device, cfg = torch.device(options.device), WorldModelCfg(features=options.features, width=options.width)
    model = WorldModel(options.obs_dim, options.action_dim, 1, cfg)
    torch.nn.init.normal_(model.transition[-1].weight, std=options.width**-0.5)
    torch.nn.init.constant_(model.transition[-1].bias[-1], -3.0)  # about one step in twenty ends an episode
    obs = TensorDict({"policy": torch.zeros(1, options.obs_dim)}, [1])
    groups, noise = {"actor": ["policy"], "critic": ["policy"]}, {"class_name": "GaussianDistribution"}
    shared = (options.hidden, "elu", True)
    actor = MLPModel(obs, groups, "actor", options.action_dim, *shared, noise).to(device)
    critic = MLPModel(obs, groups, "critic", 1, *shared).to(device)
    budget = Budget(options.samples, options.iterations, options.horizon, options.elites, options.policy_samples, GAMMA)
    settings = ({"policy": options.obs_dim}, torch.full((1,), GAMMA, device=device), planner_cfg(budget, device))
    objective = Objective(model.to(device), actor, lambda obs, task: critic(obs).squeeze(-1), *settings)
    latent_dim = options.obs_dim + options.features
    return Setup(objective, budget, latent_dim, options.action_dim, options.seed, device)


@torch.no_grad()
def make_inputs(setup: Setup, n: int) -> PlanInputs:
    """Starts of n environments; each is the same whatever n is."""
    generator, device = torch.Generator().manual_seed(setup.seed), setup.device
    obs = torch.randn(n, setup.objective.model.anchor_dim, generator=generator).to(device)
    ids, task = torch.arange(n, device=device), torch.zeros(n, dtype=torch.long, device=device)
    z = setup.objective.encode(TensorDict({"policy": obs}, [n]), task)
    mu, step = setup.objective.policy(z, task), torch.zeros((), dtype=torch.int64, device=device)
    mask = torch.ones_like(mu, dtype=torch.bool)
    return PlanInputs(z, mu, torch.full_like(mu, 0.5), torch.zeros_like(mu), task, ids, step, mask)


@torch.no_grad()
def make_candidates(setup: Setup, inputs: PlanInputs, samples: int) -> Candidates:
    """Perturbations of the policy, and the actions that follow from them."""
    shape = (*inputs.mu.shape[:1], samples, setup.budget.horizon, setup.action_dim)
    u = torch.randn(shape, generator=torch.Generator().manual_seed(setup.seed + 1)).to(setup.device)
    noise = (u * inputs.sigma[:, None, None]).flatten(0, 1)
    z, action, task = (x.repeat_interleave(samples, 0) for x in (inputs.z, inputs.mu, inputs.task))
    actions: list[torch.Tensor] = []
    for k in range(setup.budget.horizon):
        if k:
            z = setup.objective.model.step(z, actions[-1], task)[0]
            action = setup.objective.policy(z, task)
        actions.append(action + noise[:, k])
    return Candidates(u, torch.stack(actions, dim=1).view(shape))


def assert_equal_work(contestants: dict[str, Contestant], setup: Setup) -> dict[str, float]:
    """Refuse unless all contestants, built for two environments, hold the same budget and judge candidates alike.

    Returns the largest difference of a return from the re-stated peer's, in stds of the candidates' returns.

    Raises:
        UnequalWork: Names the contestant and what differs.
    """
    inputs = make_inputs(setup, 2)
    candidates = make_candidates(setup, inputs, max(setup.budget.samples, 16))
    reference = Restated(setup, 2).returns(inputs, candidates)
    spread = reference.std(dim=1, keepdim=True)
    if not (spread > 0).all():
        raise UnequalWork("All candidates have the same return.")
    deviations: dict[str, float] = {}
    for key, contestant in contestants.items():
        for name, value in contestant.budget.items():
            if value != getattr(setup.budget, name):
                raise UnequalWork(f"{contestant.label} has {name} {value} instead of {getattr(setup.budget, name)}.")
        returns = contestant.returns(inputs, candidates).float()
        deviations[key] = ((returns - reference).abs() / spread).max().item()
        equal = deviations[key] < 1e-3
        if contestant.low_precision:  # what counts is that the candidates keep their order
            ranks = torch.stack((returns, reference)).argsort(-1).argsort(-1).float()
            equal = min(torch.corrcoef(ranks[:, i])[0, 1].item() for i in range(2)) > 0.95
        if not equal:
            gap = f"different returns, up to {deviations[key]:.3g} stds apart"
            raise UnequalWork(f"{contestant.label} and the re-stated TD-MPC2 planner give the same candidates {gap}.")
    return deviations


def clock(call: Callable[[], object], device: torch.device, repeats: int = 1) -> tuple[float, float]:
    """CPU and wall-clock seconds per call of this process, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(repeats):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.process_time() - cpu) / repeats, (time.perf_counter() - wall) / repeats


def interleave(calls: dict[str, tuple[Callable[[], Any], int]], rounds: int, device: torch.device) -> dict[str, list]:
    """Time calls, some times each, once per round, beginning with another one in each: their times by :func:`clock`."""
    times: dict[str, list] = {key: [] for key in calls}
    order = list(calls)
    for i in range(rounds):
        first = i % len(order)
        for key in order[first:] + order[:first]:
            times[key].append(clock(calls[key][0], device, calls[key][1]))
    return times


def measure(setup: Setup, options: argparse.Namespace, keys: list[str]) -> list[dict]:
    """Time contestants at every number of environments: a row each, with all raw times."""
    rows: list[dict] = []
    for n in options.num_envs:
        inputs, calls = make_inputs(setup, n), {}
        for key in keys:
            call = functools.partial(CONTESTANTS[key](setup, n).plan, inputs)
            call()
            seconds = clock(call, setup.device)[1]
            calls[key] = (call, max(1, math.ceil(options.min_seconds / seconds)))
        for key, raw in interleave(calls, options.rounds, setup.device).items():
            cpu, wall = ([pair[i] for pair in raw] for i in (0, 1))
            row = {"contestant": key, "num_envs": n, "repeats": calls[key][1], "cpu_s": cpu, "wall_s": wall}
            rows.append(row | {"time_s": statistics.median(cpu if setup.device.type == "cpu" else wall)})
        print(f"{n:>5} environments done", flush=True)
    return rows


def parse(argv: list[str]) -> argparse.Namespace:
    """Read and check the command line.

    Raises:
        UserError: Names the option and what is allowed.
    """
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, names = parser.add_argument, list(CONTESTANTS)
    add("--width", type=at_least(1), default=256, help="Units of the world model's layers.")
    add("--features", type=at_least(0), default=32, help="Features of the world model, a multiple of 8.")
    add("--hidden", type=at_least(1), nargs="+", default=[400, 200, 100], help="Units of policy and critic.")
    add("--obs_dim", type=at_least(1), default=60, help="Observation dimensions.")
    add("--action_dim", type=at_least(1), default=8, help="Action dimensions.")
    add("--num_envs", type=at_least(1), nargs="+", default=[1, 16, 64, 256, 1024], help="Environments per plan.")
    add("--samples", type=at_least(1), default=64, help="Candidates per environment and iteration.")
    add("--iterations", type=at_least(1), default=2, help="MPPI iterations.")
    add("--horizon", type=at_least(1), default=3, help="Planned steps.")
    add("--elites", type=at_least(1), default=8, help="Candidates that update the sampling distribution.")
    add("--policy_samples", type=at_least(0), default=8, help="Candidates that follow the policy with its noise.")
    add("--contestants", nargs="+", choices=names, default=names, metavar="NAME", help=f"Some of: {', '.join(names)}.")
    add("--rounds", type=at_least(1), default=7, help="Rounds; each times every contestant once.")
    add("--min_seconds", type=float, default=0.2, help="A timing repeats the plan until it has lasted about this long.")
    add("--device", default="cpu", help="cpu, or a CUDA device.")
    add("--seed", type=at_least(0), default=0, help="Seed of weights, inputs and noise.")
    add("--output", type=Path, default=OUTPUT, help="Folder of the results.")
    options = parser.parse_args(argv)
    if options.elites > options.samples:
        raise UserError(f"--elites ({options.elites}) exceeds --samples ({options.samples}).")
    if options.policy_samples + 4 > options.samples:
        raise UserError(
            f"--samples ({options.samples}) must be 4 more than --policy_samples, for the gradient's plans."
        )
    if options.features % 8:
        raise UserError(f"--features must be a multiple of 8, got {options.features}.")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", options.device):
        raise UserError(f"--device must be cpu or a CUDA device, got '{options.device}'.")
    if options.device != "cpu" and not torch.cuda.is_available():
        raise UserError(f"--device {options.device}: this machine has no CUDA device.")
    options.num_envs = sorted(set(options.num_envs))
    return options


def main(argv: list[str]) -> int:
    """Check, time, print and store."""
    options = parse(argv)
    setup = make_setup(options)
    ready: dict[str, Contestant] = {}
    missing: dict[str, str] = {}
    for key in options.contestants:
        try:
            ready[key] = CONTESTANTS[key](setup, 2)
        except Unavailable as error:
            missing[key] = str(error)
    deviations = assert_equal_work(ready, setup)
    print(f"same budget, and same returns of the same candidates: {', '.join(ready)}")
    rows = measure(setup, options, list(ready))
    result = {
        "command": "-m benchmarks planner " + " ".join(argv),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": package_versions(("tensordict", "torchrl", "pytorch-mppi", "numpy")),
        "git": git_revision(Path(__file__)),
        "machine": machine(setup.device),
        "basis": "cpu_s" if setup.device.type == "cpu" else "wall_s",
        "settings": {k: v for k, v in vars(options).items() if k != "output"} | {"gamma": GAMMA},
        "contestants": {
            key: {"label": c.label, "notes": c.notes, "budget": c.budget, "return_deviation": deviations[key]}
            for key, c in ready.items()
        },
        "not_measured": missing,
        "rows": rows,
    }
    print(write_table(result))
    options.output.mkdir(parents=True, exist_ok=True)
    budget = f"{options.samples}x{options.iterations}x{options.horizon}"
    path = options.output / f"{options.width}-{budget}-{setup.device.type}.json"
    path.write_text(json.dumps(jsonable(result), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    print(f"stored {path}")
    return 0
