"""Tables and plots from the stored runs of ``benchmark_learning.py``."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np

COLOURS = {"m3po": "#c2410c", "m3po-0.1": "#fdba74", "ppo-tuned": "#1d4ed8", "ppo-shipped": "#6b7280"}
"""Arms that are drawn, ``m3po-0.1`` from stored data alone; the table has all that is stored."""

RIVALS = ("ppo-tuned", "ppo-shipped")
"""The first of them that a task has sets its thresholds."""

SHARES = (0.5, 0.75, 0.9)
"""Thresholds, as shares of what the rival reaches at the end of its budget."""

WINDOW = 40_000
"""Environment steps over which a learning curve is averaged before it is compared with a threshold."""

BOOTSTRAPS = 2000
"""Resamplings of the seeds for an interval (rliable's default is 50 000; three seeds have 27 resamplings)."""

Runs = dict[str, dict[str, dict[int, dict[str, Any]]]]
"""Task -> arm -> seed -> a stored run's record; ``curve`` maps its columns to arrays."""


def load(data: Path) -> Runs:
    """All stored runs."""
    runs: Runs = {}
    for path in sorted(data.glob("*/*/seed*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        if not record.get("crashed"):
            with open(path.with_suffix(".csv"), encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
            columns = rows[0].keys()
            record["curve"] = {c: np.array([float(r[c]) if r[c] else np.nan for r in rows]) for c in columns}
        runs.setdefault(record["task"], {}).setdefault(record["arm"], {})[record["seed"]] = record
    return runs


def smooth(curve: dict[str, np.ndarray]) -> np.ndarray:
    """Training reward per step, averaged over the last :data:`WINDOW` environment steps at each row.

    Rows stand for one rollout or several.
    """
    steps, reward = curve["env_steps"], curve["mean_step_reward"]
    first = np.searchsorted(steps, steps - WINDOW, side="right")
    taken = np.concatenate(([0.0], steps))
    sums = np.concatenate(([0.0], np.cumsum(reward * np.diff(taken))))
    last = np.arange(1, len(reward) + 1)
    return (sums[last] - sums[first]) / (taken[last] - taken[first])


def reached(curve: dict[str, np.ndarray], level: float) -> tuple[float, float]:
    """Environment steps and seconds after which the smoothed curve is first at a level; infinite if it never is.

    It counts from the first full window on: all episodes begin in the same good state, which nobody has learnt to hold.
    """
    steps = curve["env_steps"]
    above = (smooth(curve) >= level) & (steps >= min(WINDOW, steps[-1]))
    if not above.any():
        return np.inf, np.inf
    first = int(above.argmax())
    return float(steps[first]), float(curve["seconds"][first])


def summarise(record: dict[str, Any], half: float, levels: dict[float, float]) -> dict[str, float]:
    """Figures of one run.

    Args:
        record: A run that finished.
        half: Environment steps that ``area_half`` covers.
        levels: Share of the rival's end -> training reward per step.

    Returns:
        ``area``, the mean training reward per step over all environment steps (the area under the learning curve over
        its width; unlike the mean of finished episodes it has no lag); ``area_half``; ``area_seconds``, the same mean
        over the run's seconds; ``last``, the end of the smoothed curve; ``steps_50`` and ``seconds_50`` to half of the
        rival's end, and so on; ``ms_per_step``, the time of one step of all environments, everything included; and the
        noise-free ``eval_prior`` and ``eval_planner``.
    """
    curve = record["curve"]
    steps, seconds, reward = curve["env_steps"], curve["seconds"], curve["mean_step_reward"]
    num_envs, taken, early = record.get("num_envs", 512), np.diff(steps, prepend=0.0), steps <= half
    summary = {
        "area": float(np.average(reward, weights=taken)),
        "area_half": float(np.average(reward[early], weights=taken[early])),
        "area_seconds": float(np.average(reward, weights=np.diff(seconds, prepend=0.0))),
        "last": float(smooth(curve)[-1]),
        "mean_return": float(curve["mean_return"][-1]),
        "ms_per_step": float(1000 * seconds[-1] / (steps[-1] / num_envs)),
        "seconds": float(seconds[-1]),
    }
    for share, level in levels.items():
        name = f"{round(100 * share)}"
        summary[f"steps_{name}"], summary[f"seconds_{name}"] = reached(curve, level)
    for policy, values in record.get("evaluation", {}).items():
        summary[f"eval_{policy}"] = values.get("return_mean", float("nan"))
    return summary


def rival_levels(curves: list[dict[str, np.ndarray]]) -> dict[float, float]:
    """Share -> training reward per step that is this share of where the rival ends, on average over its runs.

    Where that is negative, it is a share of the rival's way there from its lowest point: an untrained policy begins
    with the rewards of a good first state, and then falls.
    """
    smoothed = [smooth(curve) for curve in curves]
    end, lowest = float(np.mean([c[-1] for c in smoothed])), float(np.mean([c.min() for c in smoothed]))
    return {share: share * end if end > 0 else lowest + share * (end - lowest) for share in SHARES}


def interval(values: list[float]) -> tuple[float, float, float]:
    """Interquartile mean over seeds with its bootstrapped 95 % interval (rliable, arXiv 2108.13264)."""
    from rliable import library, metrics

    scores = {"": np.array(values, dtype=float)[:, None]}
    aggregate = lambda x: np.array([metrics.aggregate_iqm(x)])  # noqa: E731
    point, bounds = library.get_interval_estimates(
        scores, aggregate, reps=BOOTSTRAPS, random_state=np.random.RandomState(0)
    )
    return float(point[""][0]), float(bounds[""][0, 0]), float(bounds[""][1, 0])


def write_report(data: Path) -> str:
    """Write ``summary.json`` and one plot per task below ``data``. Returns the tables as text."""
    summary: dict[str, Any] = {}
    lines: list[str] = []
    for task, arms in load(data).items():
        finished = {a: {s: r for s, r in seeds.items() if not r.get("crashed")} for a, seeds in arms.items()}
        rival = next((name for name in RIVALS if finished.get(name)), None)
        levels = rival_levels([r["curve"] for r in finished[rival].values()]) if rival else {}
        half = max((r["curve"]["env_steps"][-1] for s in finished.values() for r in s.values()), default=0.0) / 2
        figures = {a: {str(s): summarise(r, half, levels) for s, r in seeds.items()} for a, seeds in finished.items()}
        summary[task] = figures
        lines += _table(task, rival, {a: len(seeds) - len(finished[a]) for a, seeds in arms.items()}, figures)
        _plot(task, finished, data / f"{task}.png")
    (data / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return "\n".join(lines)


def _table(
    task: str, rival: str | None, crashed: dict[str, int], figures: dict[str, dict[str, dict[str, float]]]
) -> list[str]:
    """One task's arms: interquartile means with intervals, and what it took to get to the rival's level."""
    lines = [f"\n{task}: interquartile mean [95 % interval] over seeds; levels are shares of {rival}'s end"]
    lines.append(
        f"{'arm':24}{'seeds':>6}{'area x 1000':>24}{'end x 1000':>24}{'prior':>8}{'planner':>8}{'ms/step':>8}{'s':>6}"
        + "".join(f"{f'k steps (s) to {share:.0%}':>26}" for share in SHARES)
    )
    for arm, seeds in figures.items():
        if not seeds:
            lines.append(f"{arm:24} crashed ({crashed[arm]} seeds)")
            continue
        column = {name: [f.get(name, np.nan) for f in seeds.values()] for name in next(iter(seeds.values()))}
        text = f"{arm:24}{len(seeds):>6}"
        for name in ("area", "last"):
            mean, low, high = (1000 * x for x in interval(column[name]))
            text += f"{f'{mean:.2f} [{low:.2f}, {high:.2f}]':>24}"
        for name in ("eval_prior", "eval_planner"):
            text += f"{np.mean(column.get(name, [np.nan])):>8.1f}"
        text += f"{np.median(column['ms_per_step']):>8.1f}{np.median(column['seconds']):>6.0f}"
        for share in SHARES if rival else ():
            text += f"{_reaching(column, f'{round(100 * share)}'):>26}"
        lines.append(text + (f"  ({crashed[arm]} crashed)" if crashed[arm] else ""))
    return lines


def _reaching(column: dict[str, list[float]], name: str) -> str:
    """Steps and seconds to a level: those of the median seed, or how many seeds got there."""
    steps, seconds = column[f"steps_{name}"], column[f"seconds_{name}"]
    there = int(np.isfinite(steps).sum())
    missing = "" if there == len(steps) else f" {there}/{len(steps)}"
    middle = np.median(steps)
    return (f"{middle / 1000:.0f} ({np.median(seconds):.0f})" if np.isfinite(middle) else "-") + missing


def _plot(task: str, arms: dict[str, dict[int, dict[str, Any]]], path: Path) -> None:
    """Training reward against environment steps and against seconds: thin lines are seeds, thick ones their mean."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    for arm, colour in COLOURS.items():
        curves = [record["curve"] for record in arms.get(arm, {}).values()]
        if not curves:
            continue
        for axis, x in zip(axes, ("env_steps", "seconds"), strict=True):
            for curve in curves:
                axis.plot(curve[x], smooth(curve), color=colour, alpha=0.3, lw=0.8)
            grid = np.linspace(0, min(c[x][-1] for c in curves), 200)
            mean = np.mean([np.interp(grid, c[x], smooth(c)) for c in curves], axis=0)
            axis.plot(grid, mean, color=colour, lw=2, label=f"{arm} ({len(curves)} seeds)")
    axes[0].set(xlabel="environment steps", ylabel="training reward per step", title=task)
    axes[1].set(xlabel="seconds (2 shared CPU cores, 1 thread)", title="wall-clock")
    axes[0].legend()
    figure.savefig(path, dpi=90)
    plt.close(figure)
