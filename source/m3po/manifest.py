"""What a run or a measurement was made with: versions, revision, and values as JSON."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

PACKAGES = ("m3po", "isaaclab", "torch", "warp-lang", "newton", "mujoco", "rsl-rl-lib")
"""Distributions whose versions are recorded."""

ENVIRONMENT = (
    "CUBLAS_WORKSPACE_CONFIG",
    "CUDA_VISIBLE_DEVICES",
    "MUJOCO_GL",
    "OMP_NUM_THREADS",
    "PYTORCH_ALLOC_CONF",
    "SLURM_JOB_ID",
    "WORLD_SIZE",
)
"""Environment variables that are recorded. No others are: among them are secrets."""


def write_json(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Write a file that a reader never sees half of. Returns what it holds, as :func:`jsonable` has reduced it."""
    content = jsonable(content)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)
    return content


def package_versions(more: tuple[str, ...] = ()) -> dict[str, str | None]:
    """Versions of Python, of the distributions that decide a result, and of more; ``None`` where not installed."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in (*PACKAGES, *more):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def environment_variables() -> dict[str, str]:
    """Those of :data:`ENVIRONMENT` that are set."""
    return {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}


def git_revision(file: Path) -> dict[str, Any] | None:
    """Revision of the checkout that tracks a file, and whether it has uncommitted changes.

    Returns:
        ``{"revision": str, "dirty": bool}``, or ``None`` if no checkout tracks the file (an installed wheel).
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(file.parent), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", file.name)  # a wheel inside someone else's checkout is not tracked by it
        return {"revision": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def jsonable(value: Any) -> Any:
    """Reduce a value to what JSON knows; non-finite numbers and foreign objects become strings."""
    if isinstance(value, dict):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, (bool, int, float)):
        return value
    return str(value)
