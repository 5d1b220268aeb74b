"""``run.json``: what a run was, written into its folder before it starts.

The file extends Isaac Lab's own manifest of the same name (same keys, same version), so that Isaac Lab's checkpoint
selectors understand the folder. It records no environment variables.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import m3po

if TYPE_CHECKING:
    from .launch import Job

LIBRARY = "m3po"
"""Owner of our run folders, in Isaac Lab's sense of ``--rl_library``."""

PACKAGES = ("m3po", "isaaclab", "torch", "warp-lang", "newton", "mujoco", "rsl-rl-lib")
"""Distributions whose versions are recorded."""


def write_manifest(job: Job, run_dir: Path) -> dict[str, Any]:
    """Write ``run.json``.

    Args:
        job: The checked request.
        run_dir: Existing folder of the run.

    Returns:
        The manifest.
    """
    from isaaclab.utils import to_dict
    from isaaclab_rl.entrypoints.common import RUN_MANIFEST_FILENAME, RUN_MANIFEST_VERSION

    physics = job.env_cfg.sim.physics
    manifest = {
        "version": RUN_MANIFEST_VERSION,
        "library": LIBRARY,
        "task": job.task,
        "created_at": datetime.now(UTC).isoformat(),
        "metadata": {"agent": job.agent_entry, "algorithm": job.algo},
        "command": sys.orig_argv[1:],
        "algorithm": job.algo,
        "agent": job.agent_entry,
        "seed": job.agent_cfg.seed,
        "device": job.device,
        "torch_threads": torch.get_num_threads(),
        "num_envs": job.env_cfg.scene.num_envs,
        "overrides": job.overrides,
        "physics": {"config": type(physics).__name__, "solver": type(getattr(physics, "solver_cfg", None)).__name__},
        "assets": dataclasses.asdict(job.assets),
        "versions": package_versions(),
        "git": git_revision(Path(m3po.__file__)),
        "configuration": {"env": to_dict(job.env_cfg), "agent": to_dict(job.agent_cfg)},
    }
    manifest = jsonable(manifest)
    temporary = run_dir / f".{RUN_MANIFEST_FILENAME}.{os.getpid()}.tmp"  # a reader never sees half a file
    temporary.write_text(json.dumps(manifest, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(temporary, run_dir / RUN_MANIFEST_FILENAME)
    return manifest


def package_versions(more: tuple[str, ...] = ()) -> dict[str, str | None]:
    """Versions of Python, of the distributions that decide a result, and of more; ``None`` where not installed."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in (*PACKAGES, *more):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


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
