"""``run.json``: what a run was, written into its folder before it starts.

The file extends Isaac Lab's own manifest of the same name (same keys, same version), so that Isaac Lab's checkpoint
selectors understand the folder.
"""

from __future__ import annotations

import dataclasses
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import m3po
from m3po import distributed
from m3po.manifest import environment_variables, git_revision, package_versions, write_json

if TYPE_CHECKING:
    from .launch import Job

LIBRARY = "m3po"
"""Owner of our run folders, in Isaac Lab's sense of ``--rl_library``."""


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
        "environment": environment_variables(),
        "num_envs": job.env_cfg.scene.num_envs,
        "processes": distributed.world_size(),
        "overrides": job.overrides,
        "physics": {"config": type(physics).__name__, "solver": type(getattr(physics, "solver_cfg", None)).__name__},
        "assets": dataclasses.asdict(job.assets),
        "versions": package_versions(),
        "git": git_revision(Path(m3po.__file__)),
        "configuration": {"env": to_dict(job.env_cfg), "agent": to_dict(job.agent_cfg)},
    }
    return write_json(run_dir / RUN_MANIFEST_FILENAME, manifest)
