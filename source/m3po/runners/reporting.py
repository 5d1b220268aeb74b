"""What a run shows and keeps: TensorBoard, ``progress.csv`` and the console block with ETA."""

from __future__ import annotations

import csv
import datetime
from pathlib import Path
from typing import TextIO

from torch.utils.tensorboard import SummaryWriter

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


class Reporter:
    """Writes one row per iteration everywhere it belongs."""

    def __init__(self, log_dir: str | None) -> None:
        """Open the files below ``log_dir``; without one, only the console is written."""
        self.log_dir = Path(log_dir) if log_dir else None
        self._writer: SummaryWriter | None = None
        self._file: TextIO | None = None
        self._csv: csv.DictWriter | None = None

    def report(self, row: dict[str, float], losses: dict[str, float], metrics: dict[str, float]) -> None:
        """Write an iteration.

        Args:
            row: Values of :data:`COLUMNS` and of the environment's own log (names with a slash).
            losses: Mean losses of the update.
            metrics: The algorithm's measurements.
        """
        if self.log_dir is None:
            return
        flat = {**row, **{f"loss/{k}": v for k, v in losses.items()}, **metrics}
        if self._writer is None:
            self._writer = SummaryWriter(str(self.log_dir), flush_secs=10)
            own = [k for k in flat if k not in COLUMNS and k not in row]
            self._file = open(self.log_dir / "progress.csv", "a", newline="", encoding="utf-8")  # noqa: SIM115
            self._csv = csv.DictWriter(self._file, [*COLUMNS, *own], restval="", extrasaction="ignore")
            if self._file.tell() == 0:
                self._csv.writeheader()
        self._csv.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in flat.items()})
        self._file.flush()
        step = int(row["iteration"])
        tags = {
            "mean_return": "Train/mean_reward",
            "mean_length": "Train/mean_episode_length",
            "success": "Train/success",
        }
        for name, value in flat.items():
            tag = tags.get(name, name if "/" in name else f"Perf/{name}")
            self._writer.add_scalar(tag.replace("loss/", "Loss/"), value, step)
        for name in ("mean_return", "mean_step_reward"):
            if name in row:
                self._writer.add_scalar(f"Train/{name}/env_steps", row[name], int(row["env_steps"]))

    def report_evaluation(self, result: dict) -> None:
        """Write the result of an evaluation to TensorBoard and ``evaluations.csv``."""
        if self.log_dir is None:
            return
        path = self.log_dir / "evaluations.csv"
        fields = ("return_mean", "return_std", "length_mean", "termination_rate", "success_rate", "num_episodes")
        with open(path, "a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            if file.tell() == 0:
                writer.writerow(("iteration", "policy", *fields))
            for policy in ("prior", "planner"):
                values = result.get(policy)
                if values is None:
                    continue
                writer.writerow((result["iteration"], policy, *(values.get(name) for name in fields)))
                if self._writer is not None:
                    for name in ("return_mean", "length_mean", "success_rate"):
                        if values.get(name) is not None:
                            self._writer.add_scalar(f"Eval/{policy}_{name}", values[name], result["iteration"])

    def close(self) -> None:
        """Close the files."""
        if self._writer is not None:
            self._writer.close()
            self._file.close()
            self._writer = None


def console_block(
    title: str, row: dict[str, float], losses: dict[str, float], metrics: dict[str, float], eta: float
) -> str:
    """The text printed after an iteration.

    Args:
        title: First line.
        row: Values of :data:`COLUMNS` and of the environment's own log.
        losses: Mean losses.
        metrics: The algorithm's measurements.
        eta: Estimated seconds until the end.
    """
    width, pad = 80, 44
    lines = ["#" * width, f"\033[1m{title.center(width)}\033[0m", ""]

    def add(label: str, text: str) -> None:
        lines.append(f"{label + ':':>{pad}} {text}")

    add("Environment steps", f"{row['env_steps']:,}")
    add("Steps per second", f"{row['steps_per_second']:,.0f}")
    split = " / ".join(f"{row[f'time_{name}']:.2f}" for name in ("collect", "plan", "physics", "update"))
    add("Seconds collect / plan / physics / update", split)
    if "mean_return" in row:
        add("Mean return", f"{row['mean_return']:.2f}")
        add("Mean episode length", f"{row['mean_length']:.1f}")
    if "success" in row:
        add("Success", f"{row['success']:.3f}")
    add("Mean reward per step", f"{row['mean_step_reward']:.4f}")
    add("Action std", f"{row['action_std']:.3f}")
    add("Learning rate", f"{row['learning_rate']:.2e}")
    for name, value in {**{f"loss/{k}": v for k, v in losses.items()}, **metrics}.items():
        add(name, f"{value:.4f}")
    for name, value in row.items():
        if "/" in name:
            add(name, f"{value:.4f}")
    lines.append("-" * width)
    add("Time elapsed", str(datetime.timedelta(seconds=int(row["seconds"]))))
    add("ETA", str(datetime.timedelta(seconds=int(eta))))
    return "\n".join(lines) + "\n"
