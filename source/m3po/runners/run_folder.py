"""Which run a user means by ``--resume``, and its files as they were at a checkpoint."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from m3po.errors import UserError
from m3po.manifest import write_json
from m3po.runners.checkpoint import SELECTORS, numbered, read_checkpoint, read_newest
from m3po.runners.reporting import ENV_STEPS

MANIFEST = "run.json"
"""File of a run that says what it is."""

DROPPED = ".dropped.csv"
"""End of the name of what a table has lost when its run went back to an earlier checkpoint."""


def find_run(experiment: Path, wanted: str, belongs: Callable[[dict[str, Any]], bool]) -> tuple[Path, Path]:
    """Find a run and the checkpoint to continue it from.

    Args:
        experiment: Folder of the runs of an experiment.
        wanted: ``latest`` or ``best``: of the newest run that has one; the path of a checkpoint or of a run's folder;
            the name of a folder in ``experiment``; or the ``--run_name`` that it was given, of the newest such run.
        belongs: Whether a run with a given manifest is of the tasks and the algorithm that are about to run.

    Returns:
        Folder of the run, and the file in it.

    Raises:
        UserError: If there is no such run, or it is not one that belongs.
        CheckpointError: If none of its checkpoints can be read.
    """
    path = Path(wanted)
    if path.is_file():
        read_checkpoint(path, "cpu")
        _check(path.parent, belongs)
        return path.parent, path
    if wanted in SELECTORS:
        runs = [run for run in _runs(experiment) if _has(run, wanted) and belongs(read_manifest(run))]
    elif path.is_dir():
        runs = [path]
    else:
        found = _runs(experiment)
        runs = [run for run in found if run.name == wanted] or [run for run in found if run.name.endswith(f"_{wanted}")]
    if not runs:
        raise UserError(
            f"there is nothing to resume: '{wanted}' is neither a checkpoint nor a run of these tasks in "
            f"'{experiment}' that has one."
        )
    run = max(runs, key=lambda run: (run.stat().st_mtime, run.name))
    _check(run, belongs)
    if wanted == "best":
        read_checkpoint(run / SELECTORS["best"], "cpu")
        return run, run / SELECTORS["best"]
    return run, read_newest(run)[0]


def _runs(experiment: Path) -> list[Path]:
    """Folders of all runs of an experiment."""
    return [path.parent for path in experiment.glob(f"*/{MANIFEST}")]


def _has(run: Path, selector: str) -> bool:
    return (run / SELECTORS[selector]).exists() or (selector == "latest" and bool(numbered(run)))


def read_manifest(run: Path) -> dict[str, Any]:
    """What a run was; empty where its folder does not say."""
    try:
        return json.loads((run / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _check(run: Path, belongs: Callable[[dict[str, Any]], bool]) -> None:
    manifest = read_manifest(run)
    if not manifest:
        raise UserError(f"'{run}' is not the folder of a run: it has no {MANIFEST}. --checkpoint starts a new run.")
    if not belongs(manifest):
        tasks = ", ".join(manifest.get("tasks") or [str(manifest.get("task"))])
        raise UserError(
            f"the run '{run}' is not of these tasks and this algorithm, but of {tasks} with "
            f"{manifest.get('algorithm')} ({manifest.get('agent')})."
        )


def rewind(run: Path, iteration: int, env_steps: int) -> None:
    """Put a run's folder back to where an iteration had ended.

    Rows of later iterations move from its tables to files ``<table>.dropped.csv``, so that the continued tables neither
    repeat an iteration nor lose one; TensorBoard's files forget them; what a killed process has left half written is
    removed.

    Args:
        run: Folder of the run.
        iteration: Last iteration to keep.
        env_steps: Environment steps until then.
    """
    for leftover in run.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)
    for table in run.glob("*.csv"):
        if not table.name.endswith(DROPPED):
            _rewind_table(table, iteration)
    _rewind_events(run, iteration, env_steps)


def _rewind_table(table: Path, iteration: int) -> None:
    with open(table, newline="", encoding="utf-8") as file:
        header, *rows = list(csv.reader(file)) or [[]]
    if "iteration" not in header:
        return
    column = header.index("iteration")
    kept, dropped = [], []
    for row in rows:
        whole = len(row) == len(header)  # and not half written by a process that was killed
        (kept if whole and float(row[column]) <= iteration else dropped).append(row)
    if not dropped:
        return
    with open(table.with_suffix(DROPPED), "a", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(dropped)
    temporary = table.with_name(f".{table.name}.{os.getpid()}.tmp")
    with open(temporary, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *kept])
    os.replace(temporary, table)


def _rewind_events(run: Path, iteration: int, env_steps: int) -> None:
    """TensorBoard can drop what follows a step, but some steps here are iterations and others environment steps."""
    files = sorted(run.glob("events.out.tfevents.*"))
    events = [event for file in files for event in LegacyEventFileLoader(str(file)).Load() if event.HasField("summary")]

    def keep(event: Any) -> bool:
        by_env_steps = all(value.tag.endswith(ENV_STEPS) for value in event.summary.value)
        return event.step <= (env_steps if by_env_steps else iteration)

    kept = [event for event in events if keep(event)]
    if len(kept) == len(events):
        return
    writer = EventFileWriter(str(run), filename_suffix=".rewound")
    for event in kept:
        writer.add_event(event)
    writer.close()
    for file in files:
        file.unlink()


def record_resumption(run: Path, checkpoint: Path, command: list[str]) -> None:
    """Add to a run's manifest that a command goes on with it from a checkpoint."""
    manifest = read_manifest(run)
    entry = {"at": datetime.now(UTC).isoformat(), "checkpoint": checkpoint.name, "command": command}
    write_json(run / MANIFEST, manifest | {"resumed": [*manifest.get("resumed", []), entry]})
