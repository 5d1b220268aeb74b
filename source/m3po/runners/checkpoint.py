"""Checkpoints: written atomically, read without unpickling code, refused when they do not fit."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from m3po.errors import CheckpointError

FORMAT = 1
"""Version of the checkpoint's layout, stored under ``ckpt["m3po"]["format"]``."""


def write_checkpoint(path: str | Path, content: dict[str, Any]) -> None:
    """Write to a temporary file, sync, and rename, so that a reader never sees half a checkpoint."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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
    return content


def check_compatible(
    path: str | Path,
    content: dict[str, Any],
    *,
    task: str | None = None,
    algorithm: str | None = None,
    obs_dims: dict[str, int] | None = None,
    num_actions: int | None = None,
) -> None:
    """Compare a checkpoint's description with what is about to use it. ``None`` is not compared.

    Args:
        path: Its file, for messages.
        content: The checkpoint.
        task: Task name.
        algorithm: ``m3po`` or ``ppo``.
        obs_dims: Dimensions of each observation group.
        num_actions: Dimensions of an action.

    Raises:
        CheckpointError: Names everything that differs.
    """
    found = content.get("m3po")
    if found is None:
        raise CheckpointError(f"'{path}' carries no M3PO description; it was not written by M3PO's runner.")
    if found["format"] != FORMAT:
        raise CheckpointError(f"'{path}' has format {found['format']}; this version reads format {FORMAT}.")
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


def check_shapes(content: dict[str, Any], expected: dict[str, Any]) -> None:
    """Compare the networks of a checkpoint with those about to be overwritten.

    Args:
        content: The checkpoint.
        expected: What the algorithm would save itself.

    Raises:
        CheckpointError: Names the first network that is missing or has other sizes; nothing was loaded.
    """
    for name, state in expected.items():
        if not name.endswith("_state_dict") or "optimizer" in name:
            continue
        found = {key: tuple(value.shape) for key, value in content.get(name, {}).items()}
        for key, value in state.items():
            if found.get(key) != tuple(value.shape):
                network = name.removesuffix("_state_dict")
                raise CheckpointError(
                    f"The checkpoint does not fit (nothing was loaded): {network} has {key} of shape "
                    f"{found.get(key, 'none')} in the checkpoint and {tuple(value.shape)} here. "
                    "Use the configuration that it was trained with."
                )
