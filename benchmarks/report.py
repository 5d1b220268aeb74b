"""Tables and plots of the stored learning curves.

./isaaclab.sh -p -m benchmarks report
./isaaclab.sh -p -m benchmarks report Isaac-Ant-v0 --reference published.csv

Writes a plot for each experiment, ``learning/<experiment>.png``, and all figures to ``learning/figures.csv``.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.runner import ARMS, DATA, read_curves, read_records
from m3po.cli.arguments import Parser

SHARES = (0.5, 0.75, 0.9)
"""Levels, as shares of what the rival reaches at the end of its budget."""

WINDOW = 40_000
"""Environment steps over which rewards per step are averaged before they are compared with a level."""

BOOTSTRAPS = 2000
"""Resamplings of the seeds for an interval (rliable's default is 50 000; three seeds have 27 resamplings)."""

PEER_COLOURS = {"tdmpc2": "#047857", "dreamerv3": "#7c3aed", "sac": "#78716c"}
"""Methods of a file of published curves -> colour."""

MEAN = "(mean)"
"""Row of an experiment's tasks together."""

Curve = dict[str, np.ndarray]
"""``steps`` of all environments of the task, ``seconds`` and ``value``."""


def load(folder: Path) -> list[dict[str, Any]]:
    """The runs of an experiment: their records, with ``curves``: task -> :data:`Curve`."""
    runs, tables = read_records(folder), {}
    for run in runs:
        arm = run["arm"]
        if arm not in tables:
            tables[arm] = read_curves(folder, arm)
        rows = [row for row in tables[arm] if row["seed"] == str(run["seed"])]
        run["curves"] = {task: _curve(task, rows, len(run["tasks"])) for task in run.get("tasks", ())}
        run["seconds"] = float(rows[-1]["seconds"]) if rows else float("nan")
    return runs


def _curve(task: str, rows: list[dict[str, str]], num_tasks: int) -> Curve:
    """A task's curve: success where it is told, rewards per step of a single Isaac Lab task, else returns."""
    rows = [row for row in rows if row.get("task", task) == task]
    name = "success" if any(row.get("success") for row in rows) and not task.startswith("Isaac") else "return"
    if is_reward(task, num_tasks):
        name = "reward"
    rows = [row for row in rows if row.get(name)]
    columns = {"steps": "env_steps", "seconds": "seconds", "value": name}
    return {key: np.array([float(row[column]) for row in rows]) for key, column in columns.items()}


def is_reward(task: str, num_tasks: int) -> bool:
    """Whether a task is judged by its training reward per step, which has no lag, instead of episodes."""
    return task.startswith("Isaac") and num_tasks == 1


def smooth(curve: Curve) -> np.ndarray:
    """Values, averaged over the last :data:`WINDOW` environment steps at each row.

    Rows stand for one rollout or several.
    """
    steps, value = curve["steps"], curve["value"]
    first = np.searchsorted(steps, steps - WINDOW, side="right")
    taken = np.concatenate(([0.0], steps))
    sums = np.concatenate(([0.0], np.cumsum(value * np.diff(taken))))
    last = np.arange(1, len(value) + 1)
    return (sums[last] - sums[first]) / (taken[last] - taken[first])


def drawn(curve: Curve, reward: bool) -> np.ndarray:
    """Values of a curve as they are drawn and compared: returns are averages over episodes already."""
    return smooth(curve) if reward else curve["value"]


def reached(curve: Curve, level: float, reward: bool) -> tuple[float, float]:
    """Environment steps and seconds after which a curve is first at a level; infinite if it never is.

    Rewards count from the first full window on: all episodes begin in the same good state, which nobody has learnt to
    hold.
    """
    steps = curve["steps"]
    above = (drawn(curve, reward) >= level) & (steps >= (min(WINDOW, steps[-1]) if reward else 0))
    if not above.any():
        return np.inf, np.inf
    first = int(above.argmax())
    return float(steps[first]), float(curve["seconds"][first])


def rival_levels(values: list[np.ndarray]) -> dict[float, float]:
    """Share -> value that is this share of where the rival's curves end, on average.

    Where that is negative, it is a share of the rival's way there from its lowest point: an untrained policy begins
    with the rewards of a good first state, and then falls.
    """
    end, lowest = float(np.mean([v[-1] for v in values])), float(np.mean([v.min() for v in values]))
    return {share: share * end if end > 0 else lowest + share * (end - lowest) for share in SHARES}


def figures_of(run: dict[str, Any], task: str, levels: dict[float, float]) -> dict[str, float]:
    """Figures of a run on a task.

    Args:
        run: A run that finished.
        task: One of its tasks.
        levels: Share of the rival's end -> value.

    Returns:
        ``area``, the mean value over all environment steps: the area under the learning curve over its width;
        ``area_seconds``, the same over the run's seconds; ``end``; ``steps_50`` and ``seconds_50`` to half of the
        rival's end, and so on; noise-free ``prior`` and ``planner``, success where it is told, else return;
        ``seconds`` and ``ms_per_step`` of the run, everything included.
    """
    curve, reward = run["curves"][task], is_reward(task, len(run["tasks"]))
    figures = {"seconds": run["seconds"]}
    if len(curve["steps"]):
        taken = {axis: np.diff(curve[axis], prepend=0.0) for axis in ("steps", "seconds")}
        figures |= {
            "area": float(np.average(curve["value"], weights=taken["steps"])),
            "area_seconds": float(np.average(curve["value"], weights=taken["seconds"])),
            "end": float(drawn(curve, reward)[-1]),
            "ms_per_step": 1000 * run["seconds"] * run["num_envs"] / len(run["tasks"]) / float(curve["steps"][-1]),
        }
        for share, level in levels.items():
            name = f"{round(100 * share)}"
            figures[f"steps_{name}"], figures[f"seconds_{name}"] = reached(curve, level, reward)
    for policy, values in run.get("evaluation", {}).get(task, {}).items():
        success = None if task.startswith("Isaac") else values.get("success_rate")
        figures[policy] = values.get("return_mean", np.nan) if success is None else success
    return figures


def interval(values: list[float]) -> tuple[float, float, float]:
    """Interquartile mean over seeds with its bootstrapped 95 % interval (rliable, arXiv 2108.13264)."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    from rliable import library, metrics

    scores = {"": np.array(values, dtype=float)[:, None]}
    point, bounds = library.get_interval_estimates(
        scores, lambda x: np.array([metrics.aggregate_iqm(x)]), reps=BOOTSTRAPS, random_state=np.random.RandomState(0)
    )
    return float(point[""][0]), float(bounds[""][0, 0]), float(bounds[""][1, 0])


def write_report(data: Path, names: list[str], reference: Path | None = None) -> str:
    """Write the plots of some experiments, and the figures of all. Returns the tables as text.

    Args:
        data: Folder of the experiments.
        names: Experiments to show; none: all.
        reference: Published curves to draw beside ours: a CSV file with columns task, method, step (frames) and mean.
    """
    published, lines, rows = _published(reference), [], []
    experiments = {path.parent.name: load(path.parent) for path in sorted(data.glob("*/runs.jsonl"))}
    for name, runs in experiments.items():
        good = [run for run in runs if not run.get("crashed")]
        tables = {task: _by_arm(good, task) for task in dict.fromkeys(task for run in good for task in run["tasks"])}
        if len(tables) > 1:
            tables[MEAN] = _means(tables)
        for task, arms in tables.items():
            rows += [
                {"experiment": name, "task": task, "arm": a, "seed": s, **f} for a in arms for s, f in arms[a].items()
            ]
        if names and name not in names:
            continue
        for task, arms in tables.items():
            lines += _table(name, "" if len(tables) == 1 else task, arms)
        lines += [f"{run['arm']} seed {run['seed']} CRASHED" for run in runs if run.get("crashed")]
        if good:
            alone = {} if len(tables) == 1 else {task: experiments.get(task, []) for task in tables}
            _plot(name, good, alone, published, data / f"{name}.png")
    with open(data / "figures.csv", "w", newline="", encoding="utf-8") as file:
        columns = list(dict.fromkeys(column for row in rows for column in row))
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    return "\n".join(lines)


def _by_arm(runs: list[dict[str, Any]], task: str) -> dict[str, dict[int, dict[str, float]]]:
    """Arm -> seed -> figures of a task, the arms in the order of ``arms.yaml``, those that are data alone last."""
    of_task = [run for run in runs if task in run["tasks"] and len(run["curves"][task]["steps"])]
    order = [*ARMS["arms"], *sorted({run["arm"] for run in of_task} - set(ARMS["arms"]))]
    rival = next((arm for arm in ARMS["rivals"] if any(run["arm"] == arm for run in of_task)), None)
    values = [drawn(r["curves"][task], is_reward(task, len(r["tasks"]))) for r in of_task if r["arm"] == rival]
    levels = rival_levels(values) if values else {}
    found = {arm: {r["seed"]: figures_of(r, task, levels) for r in of_task if r["arm"] == arm} for arm in order}
    return {arm: seeds for arm, seeds in found.items() if seeds}


def _means(tables: dict[str, dict[str, dict[int, dict[str, float]]]]) -> dict[str, dict[int, dict[str, float]]]:
    """Means over the tasks of a set."""
    names = ("area", "end", "prior", "planner", "seconds", "ms_per_step")
    arms: dict[str, dict[int, dict[str, float]]] = {}
    for arm in dict.fromkeys(arm for table in tables.values() for arm in table):
        for seed in dict.fromkeys(seed for table in tables.values() for seed in table.get(arm, ())):
            of_tasks = [table[arm][seed] for table in tables.values() if seed in table.get(arm, ())]
            means = {name: float(np.mean([f.get(name, np.nan) for f in of_tasks])) for name in names}
            arms.setdefault(arm, {})[seed] = means
    return arms


def _table(experiment: str, task: str, arms: dict[str, dict[int, dict[str, float]]]) -> list[str]:
    """Interquartile means with intervals, and what it took to get to the rival's level; ``task`` is one of a set."""
    leveled = any("steps_50" in figures for seeds in arms.values() for figures in seeds.values())
    scale = 1 if task or not experiment.startswith("Isaac") else 1000
    lines = [
        f"\n{experiment} {task}: interquartile mean [95 % interval] over seeds" + (", x 1000" if scale > 1 else "")
    ]
    head = f"{'arm':26}{'seeds':>6}{'area':>22}{'end':>22}{'prior':>9}{'planner':>9}{'ms/step':>9}{'s':>7}"
    lines.append(head + "".join(f"{f'k steps (s) to {share:.0%}':>24}" for share in SHARES if leveled))
    for arm, seeds in arms.items():
        names = dict.fromkeys(name for figures in seeds.values() for name in figures)
        column = {name: [f.get(name, np.nan) for f in seeds.values()] for name in names}
        text = f"{arm:26}{len(seeds):>6}"
        for name in ("area", "end"):
            mean, low, high = (scale * x for x in interval(column[name]))
            text += f"{f'{mean:.3g} [{low:.3g}, {high:.3g}]':>22}"
        text += "".join(f"{np.mean(column.get(name, [np.nan])):>9.3g}" for name in ("prior", "planner"))
        text += f"{np.median(column['ms_per_step']):>9.1f}{np.median(column['seconds']):>7.0f}"
        lines.append(text + "".join(f"{_reaching(column, f'{round(100 * s)}'):>24}" for s in SHARES if leveled))
    return lines


def _reaching(column: dict[str, list[float]], name: str) -> str:
    """Steps and seconds to a level: those of the median seed, or how many seeds got there."""
    steps, seconds = column[f"steps_{name}"], column[f"seconds_{name}"]
    there = int(np.isfinite(steps).sum())
    missing = "" if there == len(steps) else f" {there}/{len(steps)}"
    middle = np.median(steps)
    return (f"{middle / 1000:.0f} ({np.median(seconds):.0f})" if np.isfinite(middle) else "-") + missing


# -- plots ------------------------------------------------------------------------------------------------------------


def _published(path: Path | None) -> dict[tuple[str, str], Curve]:
    """Published curves, (task, method) -> frames and means."""
    rows: dict[tuple[str, str], list[tuple[float, float]]] = {}
    if path is not None:
        with open(path, encoding="utf-8") as file:
            for row in csv.DictReader(file):
                rows.setdefault((row["task"], row["method"]), []).append((float(row["step"]), float(row["mean"])))
    return {key: dict(zip(("steps", "value"), np.array(sorted(points)).T, strict=True)) for key, points in rows.items()}


def _plot(
    name: str,
    runs: list[dict[str, Any]],
    alone: dict[str, list[dict[str, Any]]],
    published: dict[tuple[str, str], Curve],
    path: Path,
) -> None:
    """One panel per task: training curves against frames; thin lines are seeds, thick ones their mean.

    An experiment of one task has a second panel, against seconds. Dotted beside a set: agents of the task ``alone``.
    """
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(task for run in runs for task in run["tasks"]))
    panels = max(2, len(tasks))
    columns = panels if panels < 4 else 3 if panels < 7 else 5
    figure = Figure(figsize=(1 + 3.8 * columns, 3.4 * -(-panels // columns)), layout="constrained")
    axes = figure.subplots(-(-panels // columns), columns, squeeze=False).flatten()
    scale = 1 if tasks[0].startswith("Isaac") else 2  # action repeat of DMControl and Meta-World
    for axis, task in zip(axes, tasks, strict=False):
        ours = [run["curves"][task]["steps"][-1] for run in runs if run["arm"] == "m3po" and task in run["tasks"]]
        limit = max(ours, default=np.inf)  # where M3PO's default ends
        for arm, colour in ARMS["colours"].items():
            _draw(axis, task, [run for run in runs if run["arm"] == arm], colour, "-", arm, scale, limit)
            single = [run for run in alone.get(task, ()) if run["arm"] == arm and not run.get("crashed")]
            _draw(axis, task, single, colour, ":", f"{arm}, alone", scale, limit)
        for method, colour in PEER_COLOURS.items():
            if (task, method) in published:
                curve = published[task, method]
                shown = curve["steps"] <= 1.05 * scale * limit
                axis.plot(curve["steps"][shown], curve["value"][shown], "o--", color=colour, ms=3, label=method)
        axis.set(title=task if len(tasks) > 1 else name, xlabel="environment steps" if scale == 1 else "frames")
        axis.legend(fontsize=6)
    if len(tasks) == 1:
        for arm, colour in ARMS["colours"].items():
            _draw(axes[1], tasks[0], [run for run in runs if run["arm"] == arm], colour, "-", arm, 1, np.inf, "seconds")
        axes[1].set(title=name, xlabel="seconds, as busy as the machine was")
    for axis in axes[panels:]:
        axis.remove()
    figure.savefig(path, dpi=90)


def _draw(
    axis: Any,
    task: str,
    runs: list[dict[str, Any]],
    colour: str,
    style: str,
    label: str,
    scale: int,
    limit: float,
    column: str = "steps",
) -> None:
    """Curves of a task against ``column``, and their mean, up to ``limit``."""
    found = [(run["curves"][task], len(run["tasks"])) for run in runs if task in run["curves"]]
    curves = [(curve, drawn(curve, is_reward(task, count))) for curve, count in found if len(curve[column])]
    if not curves:
        return
    end = min(min(curve[column][-1] for curve, _ in curves), 1.02 * limit)
    grid = np.linspace(max(curve[column][0] for curve, _ in curves), end, 300)
    for curve, value in curves:
        shown = curve[column] <= 1.02 * limit
        axis.plot(scale * curve[column][shown], value[shown], style, color=colour, alpha=0.3, lw=0.8)
    mean = np.mean([np.interp(grid, curve[column], value) for curve, value in curves], axis=0)
    axis.plot(scale * grid, mean, style, color=colour, lw=2, label=f"{label} ({len(curves)} seeds)")


def main(argv: list[str]) -> int:
    """Print tables, draw plots."""
    parser = Parser(description=__doc__.splitlines()[0])
    known = [path.parent.name for path in sorted(DATA.glob("*/runs.jsonl"))]
    parser.add_argument("experiments", nargs="*", choices=[[], *known], metavar="EXPERIMENT", help="Default: all.")
    parser.add_argument("--reference", type=Path, metavar="CSV", help="Published curves to draw beside ours.")
    args = parser.parse_args(argv)
    print(write_report(DATA, args.experiments, args.reference))
    return 0
