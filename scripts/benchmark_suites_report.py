"""Tables and plots from the stored runs of ``benchmark_suites.py``."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np

ARM_COLOURS = {
    "m3po": "#c2410c",
    "m3po-0.1": "#fb923c",
    "ppo": "#15803d",
    "ppo-rollouts-of-64": "#166534",
    "ppo-long": "#86efac",
    "ppo-core": "#1d4ed8",
    "ppo-core-rollouts-of-64": "#1e3a8a",
    "ppo-core-long": "#60a5fa",
    "m3po-no-planner": "#f59e0b",
    "m3po-no-gradient": "#a16207",
    "m3po-no-bonus": "#facc15",
    "m3po-correlated-noise": "#4d7c0f",
    "m3po-no-critic-replay": "#e11d48",
    "m3po-features": "#9f1239",
    "m3po-adaptive": "#4c1d95",
    "m3po-latent": "#7e22ce",
    "m3po-ratio-4": "#0d9488",
    "m3po-ratio-16": "#115e59",
    "m3po-paper": "#0891b2",
    "m3po-0.1-paper": "#67e8f9",
    "m3po-no-value-gradient": "#d97706",
    "m3po-newest-states": "#fdba74",
    "m3po-1": "#78716c",
    "m3po-1-bonus": "#be185d",
}
STORED = (
    "m3po-0.1",
    "m3po-0.1-paper",
    "m3po-no-value-gradient",
    "m3po-newest-states",
    "m3po-1",
    "m3po-1-bonus",
    "ppo-core-rollouts-of-64",
    "ppo-core-long",
)
"""Arms that exist as stored data alone: algorithms of version 0.1 and before it."""

DEFAULTS = ("m3po", "m3po-0.1")
"""Defaults of M3PO; the first one that an experiment has sets how far its plot goes."""

PEER_COLOURS = {"tdmpc2": "#047857", "dreamerv3": "#7c3aed", "sac": "#6b7280"}
FRAMES_PER_STEP = 2
"""Action repeat of DMControl and Meta-World; published curves count frames."""

Curve = dict[str, np.ndarray]
"""``steps``, ``seconds`` and ``value`` of a task's training curve."""


def load(data: Path) -> list[dict[str, Any]]:
    """All stored runs: the fields of ``run.json``, the experiment, and the rows of each CSV file under its name."""
    runs = []
    for path in sorted(data.glob("*/*/seed*/run.json")):
        run = json.loads(path.read_text(encoding="utf-8")) | {"experiment": path.parts[-4], "files": {}}
        for file in path.parent.glob("*.csv"):
            with open(file, encoding="utf-8") as source:
                run["files"][file.stem] = list(csv.DictReader(source))
        runs.append(run)
    return runs


def training_curves(run: dict[str, Any]) -> dict[str, Curve]:
    """Mean success where a task reports it, else mean return, of the last hundred training episodes, by task."""
    files, result = run["files"], {}
    for task in run["tasks"]:
        if "tasks" in files:
            rows, names = [row for row in files["tasks"] if row["task"] == task], ("success", "return")
        else:
            rows, names = files["progress"], ("success", "mean_return")
        name = names[0] if any(row.get(names[0]) for row in rows) and not task.startswith("Isaac") else names[1]
        rows = [row for row in rows if row.get(name)]
        columns = {"steps": "env_steps", "seconds": "seconds", "value": name}
        result[task] = {key: np.array([float(row[column]) for row in rows]) for key, column in columns.items()}
    return result


def final_evaluations(run: dict[str, Any]) -> dict[tuple[str, str], float]:
    """Noise-free result at the end, (task, policy) -> success where a task reports it, else return."""
    files = run["files"]
    rows = files.get("task_evaluations") or [row | {"task": run["tasks"][0]} for row in files.get("evaluations", [])]
    result = {}
    for row in rows:  # in order of time: the last one counts
        success = row.get("success_rate") if not row["task"].startswith("Isaac") else None
        result[row["task"], row["policy"]] = float(success or row["return_mean"])
    return result


def write_report(data: Path, reference: Path | None = None) -> str:
    """Write a plot for each experiment below ``data``, and ``summary.json``.

    Args:
        data: Folder of the runs.
        reference: Published curves to draw beside ours: a CSV file with columns task, method, step (frames) and mean.

    Returns:
        The table as text: for each task and arm, means over seeds and each seed's own value.
    """
    runs = load(data)
    published = _published(reference)
    summary: dict[str, Any] = {}
    header = (
        f"{'experiment':30}{'task':25}{'arm':24}{'seeds':>6}{'training':>10}{'prior':>8}{'planner':>9}{'seconds':>9}"
    )
    lines = [header + "   seed: prior"]
    for experiment in dict.fromkeys(run["experiment"] for run in runs):
        mine = [run for run in runs if run["experiment"] == experiment]
        good = [run for run in mine if not run.get("crashed")]
        lines += [f"{experiment:30}{run['arm']} seed {run['seed']} CRASHED" for run in mine if run.get("crashed")]
        for task in dict.fromkeys(task for run in good for task in run["tasks"]):
            for arm in ARM_COLOURS:
                figures = {run["seed"]: _figures(run, task) for run in good if run["arm"] == arm}
                if not figures:
                    continue
                summary.setdefault(experiment, {}).setdefault(task, {})[arm] = figures
                mean = {k: _mean([f[k] for f in figures.values()]) for k in ("training", "prior", "planner", "seconds")}
                text = f"{experiment:30}{task:25}{arm:24}{len(figures):>6}"
                text += f"{mean['training']:>10.3g}{mean['prior']:>8.3g}{mean['planner']:>9.3g}{mean['seconds']:>9.0f}"
                lines.append(text + "".join(f"{seed:>5}: {f['prior']:.3g}" for seed, f in figures.items()))
        if good:
            several = len(good[0]["tasks"]) > 1
            alone = [run for run in runs if not run.get("crashed") and len(run["tasks"]) == 1 and not run.get("name")]
            single = alone if several else []
            _plot(experiment, good, single, published, data / f"{experiment}.png")
    (data / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return "\n".join(lines)


def _figures(run: dict[str, Any], task: str) -> dict[str, float | None]:
    """Last training value, final evaluation of both policies, and seconds of a run."""
    curve, final = training_curves(run)[task], final_evaluations(run)
    return {
        "training": float(curve["value"][-1]) if len(curve["value"]) else None,
        "prior": final.get((task, "prior")),
        "planner": final.get((task, "planner")),
        "seconds": float(run["files"]["progress"][-1]["seconds"]),
    }


def _mean(values: list[float | None]) -> float:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else float("nan")


def _published(path: Path | None) -> dict[tuple[str, str], Curve]:
    """Published curves, (task, method) -> frames and means."""
    rows: dict[tuple[str, str], list[tuple[float, float]]] = {}
    if path is not None:
        with open(path, encoding="utf-8") as file:
            for row in csv.DictReader(file):
                rows.setdefault((row["task"], row["method"]), []).append((float(row["step"]), float(row["mean"])))
    return {key: dict(zip(("steps", "value"), np.array(sorted(points)).T, strict=True)) for key, points in rows.items()}


def _plot(
    experiment: str,
    runs: list[dict[str, Any]],
    single: list[dict[str, Any]],
    published: dict[tuple[str, str], Curve],
    path: Path,
) -> None:
    """One panel per task: training curves against environment steps; thin lines are seeds, thick ones their mean.

    Of a run of several tasks, the agents of ``single`` are drawn beside it, which were trained on the task alone. A run
    of one task has a second panel, against seconds; the first one ends where M3PO's default does (:data:`DEFAULTS`).
    """
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(task for run in runs for task in run["tasks"]))
    panels = max(2, len(tasks))
    columns = panels if panels < 4 else 3 if panels < 7 else 5
    figure = Figure(figsize=(1 + 3.6 * columns, 3.4 * -(-panels // columns)), layout="constrained")
    axes = figure.subplots(-(-panels // columns), columns, squeeze=False).flatten()
    scale = 1 if tasks[0].startswith("Isaac") else FRAMES_PER_STEP
    for axis, task in zip(axes, tasks, strict=False):
        end, limit = 0.0, np.inf
        for arm, colour in ARM_COLOURS.items():
            of_task = [run for run in runs if run["arm"] == arm]
            end = max(end, _draw(axis, task, of_task, scale, colour, "-", arm, limit))
            limit = end if arm in DEFAULTS and of_task else limit
        for arm, colour in ARM_COLOURS.items():
            alone = [run for run in single if run["arm"] == arm and run["tasks"] == [task]]
            _draw(axis, task, alone, scale, colour, ":", f"{arm}, this task alone", end)
        for method, colour in PEER_COLOURS.items():
            if (task, method) in published:
                curve = published[task, method]
                shown = curve["steps"] <= 1.05 * end
                axis.plot(curve["steps"][shown], curve["value"][shown], "o--", color=colour, ms=3, label=method)
        axis.set(title=task if len(tasks) > 1 else experiment, xlabel="environment steps" if scale == 1 else "frames")
        axis.legend(fontsize=6)
    if len(tasks) == 1:
        for arm, colour in ARM_COLOURS.items():
            _draw(axes[1], tasks[0], [run for run in runs if run["arm"] == arm], 1, colour, "-", arm, column="seconds")
        axes[1].set(title=experiment, xlabel="seconds, as busy as the machine was")
    for axis in axes[panels:]:
        axis.remove()
    if len(tasks) > 1:
        figure.suptitle(experiment)
    figure.savefig(path, dpi=90)


def _draw(
    axis: Any,
    task: str,
    runs: list[dict[str, Any]],
    scale: int,
    colour: str,
    style: str,
    label: str,
    limit: float = np.inf,
    column: str = "steps",
) -> float:
    """Curves of a task against ``column``, and their mean, up to ``limit``. Returns where the mean ends."""
    curves = [training_curves(run)[task] for run in runs]
    curves = [curve for curve in curves if len(curve[column])]
    if not curves:
        return 0.0
    grid = np.linspace(max(c[column][0] for c in curves), min(c[column][-1] for c in curves), 400)
    grid = grid[scale * grid <= 1.02 * limit]
    for curve in curves:
        shown = scale * curve[column] <= 1.02 * limit
        axis.plot(scale * curve[column][shown], curve["value"][shown], style, color=colour, alpha=0.3, lw=0.8)
    mean = np.mean([np.interp(grid, c[column], c["value"]) for c in curves], axis=0)
    axis.plot(scale * grid, mean, style, color=colour, lw=2, label=f"{label} ({len(curves)} seeds)")
    return scale * grid[-1]
