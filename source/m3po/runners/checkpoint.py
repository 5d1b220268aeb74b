"""Checkpoints: written atomically, read without unpickling code, refused when they do not fit (docs/checkpoints.md)."""

from __future__ import annotations

import contextlib
import os
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from m3po.algorithms import policy_average
from m3po.errors import CheckpointError

FORMAT = 6
"""Version of the checkpoint's layout, stored under ``ckpt["m3po"]["format"]``; no other one is read."""

LAST, BEST = "model_last.pt", "model_best.pt"
"""The newest checkpoint of a run, which alone holds what an exact continuation needs, and the best evaluated one."""

SELECTORS = {"latest": LAST, "best": BEST}
"""What users call these checkpoints."""


def write_checkpoint(path: str | Path, content: dict[str, Any]) -> None:
    """Write to a temporary file, sync, and rename, so that a reader never sees half a checkpoint.

    Raises:
        CheckpointError: If it cannot be written; a file that was there before is still there.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # or the new name may not outlive a power cut
        finally:
            os.close(folder)
    except (OSError, RuntimeError) as error:  # torch wraps some of the former in the latter
        raise CheckpointError(f"The checkpoint '{path}' could not be written: {_first_line(error)}.") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _first_line(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0].rstrip(".")


def numbered(folder: Path) -> list[Path]:
    """The checkpoints ``model_<iteration>.pt`` of a run, newest first."""
    found = [path for path in folder.glob("model_*.pt") if path.stem.removeprefix("model_").isdigit()]
    return sorted(found, key=lambda path: int(path.stem.removeprefix("model_")), reverse=True)


def read_newest(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The newest readable checkpoint of a run; says which ones could not be read.

    Raises:
        CheckpointError: If none is readable.
    """
    failures = []
    for path in (folder / LAST, *numbered(folder)):
        if not path.exists():
            continue
        try:
            content = read_checkpoint(path, "cpu")
        except CheckpointError as error:
            failures.append(str(error))
            print(f"[m3po] {error} Using the one before it.", flush=True)
        else:
            return path, content
    raise CheckpointError(" ".join([f"'{folder}' has no readable checkpoint.", *failures]))


def read_checkpoint(path: str | Path, map_location: str | None = None) -> dict[str, Any]:
    """Read a checkpoint with ``weights_only=True``: tensors and plain values, never code.

    Args:
        path: File.
        map_location: Device to load to.

    Raises:
        CheckpointError: If the file is missing, truncated, corrupted, or not a checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"There is no checkpoint '{path}'.")
    try:
        content = torch.load(path, weights_only=True, map_location=map_location)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"'{path}' holds objects other than tensors and plain values; it is not loaded."
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"The checkpoint '{path}' is truncated or corrupted.") from error
    if not isinstance(content, dict) or "actor_state_dict" not in content:
        raise CheckpointError(f"'{path}' is not a checkpoint of M3PO or rsl_rl.")
    content.setdefault(policy_average.KEY, content["actor_state_dict"])
    return content


def check_compatible(
    path: str | Path,
    content: dict[str, Any],
    *,
    task: str | None = None,
    tasks: list[str] | None = None,
    algorithm: str | None = None,
    obs_dims: dict[str, int] | None = None,
    num_actions: int | None = None,
) -> None:
    """Compare a checkpoint's description with what is about to use it. ``None`` is not compared.

    Args:
        path: Its file, for messages.
        content: The checkpoint.
        task: Task name; of several, their names with commas between.
        tasks: Task names where policy and critic are conditioned on the task.
        algorithm: ``m3po`` or ``ppo``.
        obs_dims: Dimensions of each observation group.
        num_actions: Dimensions of an action.

    Raises:
        CheckpointError: Names everything that differs.
    """
    found = content.get("m3po")
    if found is None:
        raise CheckpointError(f"'{path}' carries no M3PO description; it was not written by M3PO's runner.")
    if found["format"] < FORMAT:
        raise CheckpointError(
            f"'{path}' has format {found['format']}: it was written by an earlier version, whose networks were "
            "different. Play it with that version, or train again."
        )
    if found["format"] > FORMAT:
        raise CheckpointError(f"'{path}' has format {found['format']}; this version reads format {FORMAT}.")
    if tasks is not None:
        _check_tasks(path, found, tasks, multi_task=True)
    elif task is not None and "tasks" in found:
        _check_tasks(path, found, [task], multi_task=False)
    expected = {"task": task, "algorithm": algorithm, "obs_dims": obs_dims, "num_actions": num_actions}
    labels = {"obs_dims": "observation sizes", "num_actions": "number of actions"}
    differences = [
        f"{labels.get(name, name)}: {found[name]} in the checkpoint, {value} here"
        for name, value in expected.items()
        if value is not None and found[name] is not None and found[name] != value
    ]
    if differences:
        raise CheckpointError(
            f"The checkpoint '{path}' does not fit (nothing was loaded). " + "; ".join(differences) + "."
        )


def _check_tasks(path: str | Path, found: dict[str, Any], ours: list[str], multi_task: bool) -> None:
    """Refuse a checkpoint of another set of tasks, and say what the sets have in common."""
    theirs = found.get("tasks") or (found["task"] or "a task without a name").split(",")
    if theirs == ours:
        if len(ours) == 1 and multi_task != ("tasks" in found):
            trained = "without --multi_task; leave it out" if multi_task else "with --multi_task; add it"
            raise CheckpointError(
                f"The checkpoint '{path}' does not fit (nothing was loaded). It was trained {trained}."
            )
        return
    sets = {
        "Only in the checkpoint": [name for name in theirs if name not in ours],
        "only here": [name for name in ours if name not in theirs],
        "common": [name for name in theirs if name in ours],
    }
    listing = "; ".join(f"{label}: {', '.join(names) or 'none'}" for label, names in sets.items())
    order = ", in another order" if set(theirs) == set(ours) else ""
    advice = "To load the common ones, train with --transfer instead of --checkpoint."
    if "tasks" not in found:
        advice = "A single task's networks serve others only if they were trained with --multi_task."
    raise CheckpointError(f"The checkpoint '{path}' is of other tasks (nothing was loaded). {listing}{order}. {advice}")


def network_states(content: dict[str, Any]) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Names and state dicts of the networks and statistics in what an algorithm saves; not of its optimisers."""
    for name, state in content.items():
        if name.endswith("_state_dict") and "optimizer" not in name:
            yield name, state


def check_shapes(content: dict[str, Any], expected: dict[str, Any]) -> None:
    """Compare the networks of a checkpoint with those about to be overwritten.

    Args:
        content: The checkpoint.
        expected: What the algorithm would save itself.

    Raises:
        CheckpointError: Names the first network that is missing or has other sizes; nothing was loaded.
    """
    for name, state in network_states(expected):
        found = {key: tuple(value.shape) for key, value in content.get(name, {}).items()}
        for key, value in state.items():
            if found.get(key) != tuple(value.shape):
                network = name.removesuffix("_state_dict")
                raise CheckpointError(
                    f"The checkpoint does not fit (nothing was loaded): {network} has {key} of shape "
                    f"{found.get(key, 'none')} in the checkpoint and {tuple(value.shape)} here. "
                    "Use the configuration that it was trained with."
                )


def check_optimizers(content: dict[str, Any], expected: dict[str, Any]) -> None:
    """Compare the parameter groups of a checkpoint's optimisers with those about to be overwritten.

    Args:
        content: The checkpoint; optimisers that it lacks start afresh.
        expected: What the algorithm would save itself.

    Raises:
        CheckpointError: Names the first optimiser with other groups; nothing was loaded.
    """
    for name in (name for name in expected if name.endswith("optimizer_state_dict") and name in content):
        there, here = ([len(g["params"]) for g in state[name]["param_groups"]] for state in (content, expected))
        if there != here:
            raise CheckpointError(
                f"The checkpoint does not fit (nothing was loaded): {name.removesuffix('_state_dict')} has groups of "
                f"{there} parameters in the checkpoint and {here} here, as where only one of them has a "
                "std_learning_rate. Use the configuration that it was trained with."
            )
