"""What a run shows and keeps: TensorBoard, ``progress.csv``, ``tasks.csv`` and the console block with ETA."""

from __future__ import annotations

import csv
import datetime
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from rsl_rl.utils import LogWriter
from torch.utils.tensorboard import SummaryWriter

from m3po.runners.checkpoint import BEST, LAST

COLUMNS = (
    "iteration",
    "env_steps",
    "seconds",
    "mean_step_reward",
    "mean_return",
    "mean_length",
    "success",
    "episodes",
    "steps_per_second",
    "time_collect",
    "time_plan",
    "time_physics",
    "time_update",
    "time_act",
    "time_policy",
    "time_model",
    "gpu_memory_mib",
    "learning_rate",
    "action_std",
)
"""Columns of ``progress.csv`` that every algorithm has; the algorithm's own follow."""

SCORE_COLUMNS = ("score_mean", "score_min", "score_tasks")
"""Columns between them in a run of several tasks."""

TASK_FIELDS = ("return", "length", "success", "score", "step_reward", "episodes", "nan_envs")
"""What ``tasks.csv`` and TensorBoard say of each task, as the statistics and the NaN guard name it."""

EVALUATION_FIELDS = ("return_mean", "return_std", "length_mean", "termination_rate", "success_rate", "num_episodes")
"""Columns of ``evaluations.csv``; ``task_evaluations.csv`` has them per task, and the score."""

MAX_TASK_ROWS = 20
"""Rows of the console's task table."""

TAGS = {
    "mean_return": "Train/mean_reward",
    "mean_length": "Train/mean_episode_length",
    "success": "Train/success",
    **{name: f"Train/{name}" for name in SCORE_COLUMNS},
}
"""TensorBoard's names of columns; rsl_rl's where it has one."""


ENV_STEPS = "/env_steps"
"""End of TensorBoard's names of curves over environment steps; all others are over iterations."""


class Reporter:
    """Writes one row per iteration everywhere it belongs."""

    _file: TextIO
    _csv: csv.DictWriter

    def __init__(self, log_dir: str | None, writer: Callable[[Path], SummaryWriter] = SummaryWriter) -> None:
        """Open nothing yet.

        Args:
            log_dir: Folder of the files; without one, only the console is written.
            writer: Makes the writer of the curves, once there is something to write.
        """
        self.log_dir: Any = Path(log_dir) if log_dir else None
        self._make_writer, self._iteration = writer, 0
        self._writer: Any = None

    def evaluated(self) -> set[int]:
        """Iterations in ``evaluations.csv``."""
        path = self.log_dir / "evaluations.csv"
        if not path.exists():
            return set()
        with open(path, newline="", encoding="utf-8") as file:
            return {int(row["iteration"]) for row in csv.DictReader(file)}

    def report(self, row: dict[str, float], losses: dict[str, float], metrics: dict[str, float]) -> None:
        """Write an iteration.

        Args:
            row: Values of :data:`COLUMNS`, of the environment's own log (names with a slash), and of several tasks'
                own, as :meth:`EpisodeStatistics.read` names them.
            losses: Mean losses of the update.
            metrics: The algorithm's measurements.
        """
        if self.log_dir is None:
            return
        tasks = _tasks_of(row)
        flat = {**row, **{f"loss/{k}": v for k, v in losses.items()}, **metrics}
        if self._writer is None:
            self._writer = self._make_writer(self.log_dir)
            self._file = open(self.log_dir / "progress.csv", "a+", newline="", encoding="utf-8")  # noqa: SIM115
            self._file.seek(0)
            columns = next(csv.reader(self._file), None)  # those of a run that goes on
            self._file.seek(0, os.SEEK_END)
            if columns is None:
                own = [k for k in flat if k not in COLUMNS and k not in row]
                columns = [*COLUMNS, *(SCORE_COLUMNS if tasks else ()), *own]
            self._csv = csv.DictWriter(self._file, columns, restval="", extrasaction="ignore")
            if self._file.tell() == 0:
                self._csv.writeheader()
        self._csv.writerow({k: _cell(v) for k, v in flat.items()})
        self._file.flush()
        step = self._iteration = int(row["iteration"])
        for name, value in flat.items():
            if name.startswith("task/"):
                continue
            tag = TAGS.get(name, name if "/" in name else f"Perf/{name}")
            self._writer.add_scalar(tag.replace("loss/", "Loss/"), value, step)
        for name in ("mean_return", "mean_step_reward"):
            if name in row and not isinstance(self._writer, LogWriter):  # services have one step for all curves
                self._writer.add_scalar(f"Train/{name}{ENV_STEPS}", row[name], int(row["env_steps"]))
        if tasks:
            self._report_tasks(row, tasks)

    def _report_tasks(self, row: dict[str, float], tasks: dict[str, dict[str, float]]) -> None:
        """One row per task in ``tasks.csv``; its ``env_steps`` are the task's own."""
        lines = []
        for name, task in tasks.items():
            steps = round(task["share"] * row["env_steps"])
            values = [_cell(task.get(field)) for field in TASK_FIELDS]
            lines.append((row["iteration"], steps, _cell(row["seconds"]), name, *values))
            for field in TASK_FIELDS:
                if field in task:
                    self._writer.add_scalar(f"Task/{name}/{field}", task[field], int(row["iteration"]))
        self._append("tasks.csv", ("iteration", "env_steps", "seconds", "task", *TASK_FIELDS), lines)

    def report_evaluation(self, result: dict) -> None:
        """Write the result of an evaluation to TensorBoard and ``evaluations.csv``.

        Where the results of the policies hold those of several ``tasks`` by name, ``task_evaluations.csv`` receives
        a row for each.
        """
        if self.log_dir is None:
            return
        rows, task_rows = [], []
        for policy in ("prior", "planner"):
            values = result.get(policy)
            if values is None:
                continue
            rows.append((result["iteration"], policy, *(values.get(name) for name in EVALUATION_FIELDS)))
            self._add_evaluation(f"Eval/{policy}", values, result["iteration"])
            for task, of_task in values.get("tasks", {}).items():
                cells = (of_task.get(name) for name in (*EVALUATION_FIELDS, "score"))
                task_rows.append((result["iteration"], policy, task, *cells))
                self._add_evaluation(f"Task/{task}/{policy}", of_task, result["iteration"])
        self._append("evaluations.csv", ("iteration", "policy", *EVALUATION_FIELDS), rows)
        if task_rows:
            fields = ("iteration", "policy", "task", *EVALUATION_FIELDS, "score")
            self._append("task_evaluations.csv", fields, task_rows)

    def _add_evaluation(self, prefix: str, values: dict, iteration: int) -> None:
        """The scalars of an evaluation that it knows, to TensorBoard."""
        if self._writer is None:
            return
        for name in ("return_mean", "length_mean", "success_rate", "score", "score_mean", "score_min"):
            if values.get(name) is not None:
                self._writer.add_scalar(f"{prefix}_{name}", values[name], iteration)

    def add_video(self, path: Path) -> None:
        """Send a film to the service that receives the curves, if there is one."""
        if isinstance(self._writer, LogWriter):
            self._writer.save_video(path, self._iteration)

    def _append(self, filename: str, header: tuple[str, ...], rows: list[tuple]) -> None:
        """Append rows to a file of the run; a new file gets the header first."""
        with open(self.log_dir / filename, "a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            if file.tell() == 0:
                writer.writerow(header)
            writer.writerows(rows)

    def close(self) -> None:
        """Close the files."""
        if self._writer is not None:
            if isinstance(self._writer, LogWriter):
                for path in (self.log_dir / name for name in (LAST, BEST)):
                    if path.exists():
                        self._writer.save_model(str(path), 0)
                self._writer.stop()
            self._writer.close()
            self._file.close()
            self._writer = None


def console_block(
    title: str, row: dict[str, float], losses: dict[str, float], metrics: dict[str, float], eta: float
) -> str:
    """The text printed after an iteration on a terminal. What is exactly 0 is off, or did not happen, and is left out.

    Args:
        title: First line.
        row: Values of :data:`COLUMNS`, of the environment's own log, and of several tasks' own.
        losses: Mean losses.
        metrics: The algorithm's measurements.
        eta: Estimated seconds until the end.
    """
    width, pad = 80, 44
    lines = ["#" * width, f"\033[1m{title.center(width)}\033[0m", ""]
    tasks = _tasks_of(row)
    which = f" (mean over {len(tasks)} tasks)" if tasks else ""

    def add(label: str, text: str) -> None:
        lines.append(f"{label + ':':>{pad}} {text}")

    add("Environment steps", f"{row['env_steps']:,}")
    add("Steps per second", f"{row['steps_per_second']:,.0f}")
    split = " / ".join(f"{row[f'time_{name}']:.2f}" for name in ("collect", "plan", "physics", "update"))
    add("Seconds collect / plan / physics / update", split)
    if "mean_return" in row:
        add("Mean return" + which, f"{row['mean_return']:.2f}")
        add("Mean episode length", f"{row['mean_length']:.1f}")
    if "success" in row:
        add("Success", f"{row['success']:.3f}")
    if "score_mean" in row:
        worst = min((name for name in tasks if "score" in tasks[name]), key=lambda name: tasks[name]["score"])
        add(f"Score, mean of {row['score_tasks']} tasks", f"{row['score_mean']:.3f}")
        add("Lowest score", f"{row['score_min']:.3f} ({worst})")
    add("Mean reward per step", f"{row['mean_step_reward']:.4f}")
    add("Action std", f"{row['action_std']:.3f}")
    add("Learning rate", f"{row['learning_rate']:.2e}")
    for name, value in {**{f"loss/{k}": v for k, v in losses.items()}, **metrics}.items():
        if value != 0.0:
            add(name, f"{value:.4f}")
    if tasks:  # their own logs are in TensorBoard; here they would be as many lines as tasks times entries
        lines += ["", *_task_table(tasks)]
    else:
        for name, value in row.items():
            if "/" in name and value != 0.0:
                add(name, f"{value:.4f}")
    lines.append("-" * width)
    add("Time elapsed", str(datetime.timedelta(seconds=int(row["seconds"]))))
    add("ETA", str(datetime.timedelta(seconds=int(eta))))
    return "\n".join(lines) + "\n"


def console_line(title: str, row: dict[str, float], eta: float) -> str:
    """The line printed instead of :func:`console_block` where nobody watches; the files of the run hold the rest."""
    parts = [f"{row['env_steps']:,} steps", f"{row['steps_per_second']:,.0f} steps/s"]
    names = {"mean_return": "return", "mean_length": "length", "success": "success", "score_mean": "score"}
    parts += [f"{label} {row[name]:.4g}" for name, label in names.items() if name in row]
    parts += [f"reward {row['mean_step_reward']:.4g}", f"{datetime.timedelta(seconds=int(eta))} left"]
    return f"[m3po] {title}: " + ", ".join(parts)


def _task_table(tasks: dict[str, dict[str, float]]) -> list[str]:
    """Lines with one aligned row per task; of many tasks those with the lowest scores."""
    shown = list(tasks)
    if len(shown) > MAX_TASK_ROWS:
        shown = sorted(shown, key=lambda name: tasks[name].get("score", math.inf))[:MAX_TASK_ROWS]
    columns = {
        "return": (10, ".2f"),
        "length": (8, ".1f"),
        "success": (8, ".3f"),
        "score": (7, ".3f"),
        "step_reward": (12, ".4f"),
    }
    wide = max(len("task"), *map(len, shown))
    lines = ["task".ljust(wide) + "".join(f"{field.replace('_', ' '):>{w}}" for field, (w, _) in columns.items())]
    for name in shown:
        cells = [
            f"{format(tasks[name][field], form) if field in tasks[name] else '-':>{w}}"
            for field, (w, form) in columns.items()
        ]
        lines.append(name.ljust(wide) + "".join(cells))
    if len(shown) < len(tasks):
        lines.append(f"{len(tasks) - len(shown)} tasks with higher scores, or none, are not shown.")
    return lines


def _tasks_of(row: dict[str, float]) -> dict[str, dict[str, float]]:
    """Values of each task by name and field, from the keys ``task/<name>/<field>`` of a row."""
    tasks: dict[str, dict[str, float]] = {}
    for key, value in row.items():
        if key.startswith("task/"):
            name, field = key.removeprefix("task/").rsplit("/", 1)
            tasks.setdefault(name, {})[field] = value
    return tasks


def _cell(value: float | None) -> float | str | None:
    """A number as CSV files show it."""
    return f"{value:.6g}" if isinstance(value, float) else value
