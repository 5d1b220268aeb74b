"""Tables and plots from the stored runs of ``benchmark_learning.py``."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np

COLOURS = {"m3po": "#c2410c", "ppo-tuned": "#1d4ed8", "ppo-shipped": "#6b7280"}


def load(data: Path) -> dict[str, dict[str, dict[int, dict[str, Any]]]]:
    """All stored runs as ``task -> arm -> seed -> {record fields, column name -> array}``."""
    runs: dict[str, dict[str, dict[int, dict[str, Any]]]] = {}
    for path in sorted(data.glob("*/*/seed*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        if not record.get("crashed"):
            with open(path.with_suffix(".csv"), encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
            columns = rows[0].keys()
            record["curve"] = {c: np.array([float(r[c]) if r[c] else np.nan for r in rows]) for c in columns}
        runs.setdefault(record["task"], {}).setdefault(record["arm"], {})[record["seed"]] = record
    return runs


def summarise(record: dict[str, Any], half: float) -> dict[str, float]:
    """Figures of one run; ``area_half`` covers the first ``half`` environment steps.

    ``area`` is the mean training reward per step over all environment steps (the area under the learning curve divided
    by its width): it has no lag, unlike the mean of finished episodes. ``ms_per_step`` is the time of one step of 512
    environments, everything included.
    """
    curve = record["curve"]
    summary = {
        "area": float(curve["mean_step_reward"].mean()),
        "area_half": float(curve["mean_step_reward"][curve["env_steps"] <= half].mean()),
        "last": float(curve["mean_step_reward"][-5:].mean()),
        "mean_return": float(curve["mean_return"][-1]),
        "ms_per_step": float(1000 * curve["seconds"][-1] / (curve["env_steps"][-1] / 512)),
        "seconds": float(curve["seconds"][-1]),
    }
    for policy, values in record.get("evaluation", {}).items():
        summary[f"eval_{policy}"] = values.get("return_mean", float("nan"))
    return summary


def write_report(data: Path) -> str:
    """Write ``summary.json`` and one plot per task below ``data``. Returns the table as text."""
    runs = load(data)
    summary: dict[str, Any] = {}
    lines = []
    for task, arms in runs.items():
        lines += [f"\n{task}", f"{'arm':24}{'seeds':>6}{'area':>10}{'half':>10}{'last':>10}{'return':>9}"]
        lines[-1] += f"{'prior':>9}{'planner':>9}{'ms/step':>9}{'seconds':>9}   seed: area"
        longest = max(r["curve"]["env_steps"][-1] for a in arms.values() for r in a.values() if not r.get("crashed"))
        for arm, seeds in arms.items():
            good = {s: summarise(r, longest / 2) for s, r in seeds.items() if not r.get("crashed")}
            summary.setdefault(task, {})[arm] = {str(s): v for s, v in good.items()}
            if not good:
                lines.append(f"{arm:24} crashed")
                continue
            names = ("area", "area_half", "last", "mean_return", "eval_prior", "eval_planner", "ms_per_step", "seconds")
            mean = {k: np.mean([v.get(k, np.nan) for v in good.values()]) for k in names}
            text = f"{arm:24}{len(good):>6}{mean['area']:>10.4f}{mean['area_half']:>10.4f}{mean['last']:>10.4f}"
            text += f"{mean['mean_return']:>9.2f}{mean['eval_prior']:>9.2f}{mean['eval_planner']:>9.2f}"
            text += f"{mean['ms_per_step']:>9.1f}"
            text += f"{mean['seconds']:>9.0f}" + "".join(f"{seed:>5}: {v['area']:.4f}" for seed, v in good.items())
            crashed = len(seeds) - len(good)
            lines.append(text + (f"  ({crashed} crashed)" if crashed else ""))
        _plot(task, arms, data / f"{task}.png")
    (data / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return "\n".join(lines)


def _plot(task: str, arms: dict[str, dict[int, dict[str, Any]]], path: Path) -> None:
    """Training reward against environment steps and against seconds: thin lines are seeds, thick ones their mean."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    for arm, colour in COLOURS.items():
        seeds = arms.get("m3po", arms.get(arm, {}))  # the same for all arms
        curves = [r["curve"] for seed, r in arms.get(arm, {}).items() if seed in seeds and not r.get("crashed")]
        if not curves:
            continue
        for axis, x in zip(axes, ("env_steps", "seconds"), strict=True):
            for curve in curves:
                axis.plot(curve[x], curve["mean_step_reward"], color=colour, alpha=0.25, lw=0.8)
            grid = np.linspace(0, min(c[x][-1] for c in curves), 200)
            mean = np.mean([np.interp(grid, c[x], c["mean_step_reward"]) for c in curves], axis=0)
            axis.plot(grid, mean, color=colour, lw=2, label=f"{arm} ({len(curves)} seeds)")
    axes[0].set(xlabel="environment steps", ylabel="mean training reward per step", title=task)
    axes[1].set(xlabel="seconds (2 shared CPU cores, 1 thread)", title="wall-clock")
    axes[0].legend()
    figure.savefig(path, dpi=90)
    plt.close(figure)
