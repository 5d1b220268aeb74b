"""Which files below the asset root a task's configuration names.

Run as ``python -m isaaclab_m3po.asset_files TASK``, in a process of its own: Isaac Lab reads the asset root once, when
it is imported, and which root is right is known only when the files are.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT_VARIABLE = "ISAACSIM_ASSET_ROOT"


def named_by(task: str, root: Path) -> list[str] | None:
    """Paths below the asset root that a task's configuration names; ``None`` where the task is not known.

    Args:
        task: The task id, as a user writes it.
        root: An asset root; nothing is read from it.
    """
    environment = os.environ | {ROOT_VARIABLE: str(root)}
    command = [sys.executable, "-m", __name__, task]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    lines = result.stdout.strip().splitlines()
    return json.loads(lines[-1]) if result.returncode == 0 and lines else None


def below(root: str, value: Any, seen: set[int] | None = None) -> Iterator[str]:
    """Paths below a root among the strings of a configuration tree."""
    seen = set() if seen is None else seen
    if isinstance(value, str):
        if value.startswith(f"{root}/"):
            yield value.removeprefix(f"{root}/")
    elif id(value) not in seen and not isinstance(value, type):
        seen.add(id(value))
        fields = value if isinstance(value, Mapping) else getattr(value, "__dict__", None)
        parts = fields.values() if fields is not None else value if isinstance(value, (list, tuple, set)) else ()
        for part in list(parts):
            yield from below(root, part, seen)


def _main(task: str) -> None:
    from isaaclab_tasks.utils.hydra import resolve_presets
    from isaaclab_tasks.utils.parse_cfg import load_cfg_from_registry

    from . import registration  # noqa: F401
    from .tasks import resolve_task

    cfg = resolve_presets(load_cfg_from_registry(resolve_task(task), "env_cfg_entry_point"))
    print(json.dumps(sorted(set(below(os.environ[ROOT_VARIABLE], cfg)))))


if __name__ == "__main__":
    _main(sys.argv[1])
