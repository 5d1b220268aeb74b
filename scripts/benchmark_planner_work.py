"""The yardsticks of the planner benchmark: work counted from shapes, time, memory, and what the machine can do."""

from __future__ import annotations

import gc
import itertools
import math
import os
import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from m3po.config import MODEL_SIZES, WorldModelCfg

PEAK_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""Types whose matmul peak is measured."""

NATIVE_SIZES: dict[str, tuple[int, int, int]] = {
    "1M": (128, 384, 2),
    "5M": (512, 512, 5),
    "19M": (768, 1024, 5),
    "48M": (768, 1792, 5),
}
"""TD-MPC2's own sizes (arXiv 2310.16828, appendix, table of model sizes): latent, hidden width, value functions."""


class Unavailable(Exception):
    """A contestant cannot run here; the message is its row of the table."""


@dataclass(frozen=True)
class Budget:
    """What a planner searches. Fields that a planner does not have are ``None``."""

    samples: int
    iterations: int
    horizon: int
    gamma: float
    terminal_value: bool = True
    elites: int | None = None
    prior_samples: int | None = None


@dataclass(frozen=True)
class Shapes:
    """Dimensions of the world model's networks."""

    latent: int
    embedding: int
    action: int
    width: int
    bins: int

    @classmethod
    def of(cls, cfg: WorldModelCfg, action_dim: int) -> Shapes:
        """Shapes of a configured model."""
        latent, width, _ = MODEL_SIZES[cfg.size]
        return cls(latent, cfg.task_embedding_dim, action_dim, width, cfg.num_bins)


class Gemm(NamedTuple):
    """Matrix product of (rows, inner) by (inner, columns), ``times`` times."""

    rows: int
    inner: int
    columns: int
    times: int = 1


class Work(NamedTuple):
    """Floating-point operations and the bytes that the matrix products alone must move, of one plan."""

    flops: float
    bytes: float


def total(gemms: Iterable[Gemm], itemsize: int = 4) -> Work:
    """Sum up products: ``2 rows inner columns`` operations; both operands are read and the result written once.

    Args:
        gemms: Matrix products.
        itemsize: Bytes per number.

    Returns:
        The work. The bytes are a lower bound: activations and normalisations between the products come on top.
    """
    flops = bytes_ = 0.0
    for rows, inner, columns, times in gemms:
        flops += 2.0 * rows * inner * columns * times
        bytes_ += itemsize * (rows * inner + inner * columns + rows * columns) * times
    return Work(flops, bytes_)


def mlp(rows: int, dims: list[int], times: int = 1) -> list[Gemm]:
    """Products of a network whose layers have the given widths, input first."""
    return [Gemm(rows, a, b, times) for a, b in itertools.pairwise(dims)]


def peer_gemms(n: int, s: Shapes, b: Budget, num_values: int = 1) -> list[Gemm]:
    """Products of a peer on our networks: concatenated inputs, every candidate evaluated in every iteration.

    Args:
        n: Environments.
        s: Dimensions.
        b: Budget; ``prior_samples`` trajectories of the policy are rolled out first.
        num_values: Value heads evaluated at the end of each candidate.
    """
    x = s.latent + s.embedding
    rows, policy = n * b.samples, n * (b.prior_samples or 0)
    step = [x + s.action, s.width, s.width, s.latent + s.bins + 1]  # dynamics, reward and termination read one trunk
    candidate = mlp(rows, step, b.horizon) + mlp(rows, [x, s.width, s.width, s.bins], num_values)
    gemms = [g._replace(times=g.times * b.iterations) for g in candidate]
    gemms += mlp(policy, [*step[:-1], s.latent], b.horizon - 1)
    return gemms + mlp(policy, [x, s.width, s.width, s.action], b.horizon - 1)


def native_gemms(n: int, size: str, action_dim: int, b: Budget, obs_dim: int = 0) -> list[Gemm]:
    """Products of TD-MPC2's planner on its own networks: separate dynamics and reward, ``Q(z, a)``.

    Args:
        n: Environments.
        size: Row of :data:`NATIVE_SIZES`.
        action_dim: Action dimensions.
        b: Budget.
        obs_dim: Observation dimensions of the official code, whose plan includes the encoder (width 256) and the
            policy's first action; 0 for the re-stated planner, which is given both.
    """
    latent, width, num_q = NATIVE_SIZES[size]
    rows, policy, hidden = n * b.samples, n * (b.prior_samples or 0), [width, width]
    bins = WorldModelCfg().num_bins
    dynamics, pi = [latent + action_dim, *hidden, latent], [latent, *hidden, 2 * action_dim]
    candidate = mlp(rows, dynamics, b.horizon) + mlp(rows, [latent + action_dim, *hidden, bins], b.horizon + num_q)
    gemms = [g._replace(times=g.times * b.iterations) for g in candidate + mlp(rows, pi)]
    gemms += mlp(policy, pi, b.horizon - (not obs_dim)) + mlp(policy, dynamics, b.horizon - 1)
    return gemms + (mlp(n, [obs_dim, 256, latent]) if obs_dim else [])


def our_gemms(n: int, s: Shapes, b: Budget) -> list[Gemm]:
    """Products of our planner, which needs fewer than :func:`peer_gemms` for the same returns.

    One value head; the policy's trajectories evaluated once; of the first layer, the part of ``z_0`` computed once per
    environment, and that of the task embedding not at all, as it is a bias per task.

    Args:
        n: Environments.
        s: Dimensions.
        b: Budget.
    """
    prior, outputs, hidden = b.prior_samples or 0, s.latent + s.bins + 1, [s.width, s.width]
    gemms = [Gemm(n, s.latent, s.width), *mlp(n * (1 + prior), [s.latent, *hidden, s.action], b.horizon - 1)]
    # The policy's mean and all candidates; then all but the policy's trajectories; at last the plan that was found.
    for candidates in (1 + b.samples, *[b.samples - prior] * (b.iterations - 1), 1):
        rows = n * candidates
        gemms += mlp(rows, [s.action, *hidden, outputs])
        gemms += mlp(rows, [s.latent + s.action, *hidden, outputs], b.horizon - 1)
        gemms += mlp(rows, [s.latent, *hidden, s.bins])
    return gemms


class MatmulPeak:
    """One large square product, timed among the planners as the machine's limit of the same minutes."""

    def __init__(self, dtype: torch.dtype, device: torch.device, sizes: list[int]) -> None:
        """Keep the size that runs fastest per operation.

        Args:
            dtype: Type of the operands.
            device: Where to multiply.
            sizes: Side lengths to try.
        """
        self.device = device
        best = float("inf")
        for size in sizes:
            a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
            out = torch.empty_like(a)
            torch.mm(a, b, out=out)
            seconds = min(clock(lambda x=a, y=b, z=out: torch.mm(x, y, out=z), device)[1] for _ in range(3))
            if seconds / size**3 < best:
                best, self.size, self._operands, self._out = seconds / size**3, size, (a, b), out
        self.flops = 2.0 * self.size**3

    def __call__(self) -> None:
        """Multiply once."""
        torch.mm(*self._operands, out=self._out)


def bandwidth(device: torch.device, mebibytes: int) -> float:
    """Bytes per second of a large copy, read plus written; the best of five."""
    source = torch.ones(mebibytes * 2**18, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    seconds = min(clock(lambda: target.copy_(source), device)[1] for _ in range(5))
    return 2.0 * source.nbytes / seconds


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


def peak_memory(call: Callable[[], object], device: torch.device) -> int:
    """Bytes that a call allocates at its peak, on top of what was there before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it complains of every missing GPU
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
        call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = (e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    return max(0, *itertools.accumulate(changes, initial=0))


def fits(seconds: float, peak: float, options: Namespace) -> str | None:
    """Reason why a plan of this expected duration (s) and memory (bytes) is left out, or ``None``."""
    if peak > options.memory_limit * 2**30:
        return f"would need about {peak / 2**30:.1f} GiB (--memory_limit {options.memory_limit:.3g})"
    if seconds > options.time_limit:
        return f"would take about {seconds:.0f} s per plan (--time_limit {options.time_limit:g})"
    return None


def measure(
    device: torch.device,
    options: Namespace,
    build: Callable[[str, int], Any],
    inputs: Callable[[int], Any],
    contestants: list[str],
    missing: dict[str, str],
) -> list[dict[str, Any]]:
    """Time all contestants at every number of environments.

    Args:
        device: Where they plan.
        options: The command line.
        build: Creates a contestant for a number of environments.
        inputs: Creates what plans start from.
        contestants: Names of those that can run.
        missing: Filled with why a contestant was left out at a number of environments.

    Returns:
        A row per contestant and number of environments: all raw times, memory, and counted work.
    """
    peaks = {name: MatmulPeak(dtype, device, options.peak_sizes) for name, dtype in PEAK_TYPES.items()}
    costs: dict[str, tuple[int, float, float]] = {}  # environments, seconds and bytes of the last plan
    rows: list[dict[str, Any]] = []
    for n in dict.fromkeys((1, *options.num_envs)):  # one environment always, for the forecast
        x = inputs(n)
        calls: dict[str, tuple[Callable[[], Any], int]] = {}
        facts: dict[str, dict[str, Any]] = {}
        for key in contestants:
            before, seconds, memory = costs.get(key, (n, 0.0, 0.0))
            try:
                contestant = build(key, n)
                seconds *= n / before
                reason = fits(seconds, contestant.memory(n) or memory * n / before, options)
                if reason is None:
                    call = _bind(contestant, x)
                    memory = peak_memory(call, device)
                    if seconds <= options.min_seconds:  # else one call per timing is certain to do
                        seconds = clock(call, device)[1]
            except torch.OutOfMemoryError:
                reason = "out of memory"
            except Unavailable as error:
                reason = str(error)
            except Exception as error:  # one that breaks must not cost the hours of the others
                reason = f"failed: {type(error).__name__}: {error}".splitlines()[0]
            if reason is not None:
                missing[f"{key} at {n}"] = reason
                continue
            costs[key] = (n, seconds, memory)
            calls[key] = (call, max(1, math.ceil(options.min_seconds / seconds)))
            work = total(contestant.gemms(n), itemsize=PEAK_TYPES[contestant.dtype].itemsize)
            facts[key] = {"dtype": contestant.dtype, "peak_bytes": memory, **work._asdict()}
            if (formula := contestant.memory(n)) is not None:
                facts[key]["formula_bytes"] = formula
        if n not in options.num_envs:
            continue
        for name, peak in peaks.items():
            calls[f"matmul-{name}"] = (peak, 1)
            facts[f"matmul-{name}"] = {"dtype": name, "side": peak.size, "flops": peak.flops}
        times = interleave(calls, options.rounds, device)
        for key, raw in times.items():
            cpu, wall = ([pair[i] for pair in raw] for i in (0, 1))
            row = {"contestant": key, "num_envs": n, **facts[key], "repeats": calls[key][1]}
            rows.append(row | {"cpu_s": cpu, "wall_s": wall})
        medians = {key: statistics.median(wall for _, wall in raw) for key, raw in times.items()}
        costs |= {key: (n, medians[key], costs[key][2]) for key in costs.keys() & medians.keys()}
        print(f"{n:>5} environments, ms: " + ", ".join(f"{k} {1e3 * v:.3g}" for k, v in medians.items()), flush=True)
        del calls
        gc.collect()
    return rows


def _bind(contestant: Any, x: Any) -> Callable[[], torch.Tensor]:
    return lambda: contestant.plan(x)


def interleave(
    calls: dict[str, tuple[Callable[[], Any], int]], rounds: int, device: torch.device
) -> dict[str, list[tuple[float, float]]]:
    """Time every call once per round, beginning with another one in each.

    Args:
        calls: What to call, and how many times per timing, by name.
        rounds: Rounds.
        device: Where the calls work.

    Returns:
        CPU and wall-clock seconds per call of each round, by name.
    """
    times: dict[str, list[tuple[float, float]]] = {key: [] for key in calls}
    order = list(calls)
    for i in range(rounds):
        first = i % len(order)
        for key in order[first:] + order[:first]:
            call, repeats = calls[key]
            times[key].append(clock(call, device, repeats))
    return times
