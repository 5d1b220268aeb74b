"""Chooses where Isaac Lab finds its robots: the assets embedded in the newton wheel, or Isaac Lab's remote root.

Isaac Lab reads ``ISAACSIM_ASSET_ROOT`` once, when ``isaaclab.utils.assets`` is imported, so the choice is made before
that. It goes through the environment so that child processes (ranks, the evaluation worker) inherit it.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from isaaclab_m3po.asset_builder import FILES, FORMAT
from isaaclab_m3po.asset_files import ROOT_VARIABLE, named_by
from m3po.errors import M3POError, UserError

MODES = ("auto", "embedded", "remote")
"""Values of ``--assets``."""

COVERED_TASKS = (
    "Isaac-Cartpole",
    "Isaac-Cartpole-Direct",
    "Isaac-Ant",
    "Isaac-Ant-Direct",
    "Isaac-Humanoid",
    "Isaac-Humanoid-Direct",
)
"""Tasks whose every asset is embedded; of others the files are looked up, which takes some seconds."""


@dataclass(frozen=True)
class AssetChoice:
    """Which assets a process uses, and why."""

    mode: str
    """``embedded``, ``remote`` (Isaac Lab's default root) or ``custom`` (a root the user has set)."""

    root: str | None
    """The asset root; None for ``remote``, where Isaac Lab knows it."""

    reason: str
    """Why, in words for the person at the keyboard."""

    def __str__(self) -> str:
        """One line for the console."""
        return f"{self.mode}{f' ({self.root})' if self.root else ''}: {self.reason}"


_chosen: AssetChoice | None = None


def is_covered(task: str) -> bool:
    """Whether a task is one of those that are known to run on embedded assets alone.

    Args:
        task: A task id as a user writes it: ``Isaac-Ant``, ``Isaac-Ant-v0`` or ``package.module:Isaac-Ant``.
    """
    return re.sub(r"-v\d+$", "", task.split(":")[-1]) in COVERED_TASKS


def prepare_assets(mode: str, task: str) -> AssetChoice:
    """Choose the assets of this process and set ``ISAACSIM_ASSET_ROOT`` accordingly, before Isaac Lab reads it.

    ``auto`` respects a root the user has set. Otherwise it takes the embedded assets for tasks whose files they all
    hold, and the remote root for all others. ``embedded`` and ``remote`` override the environment.

    Args:
        mode: One of :data:`MODES`.
        task: The task id.

    Returns:
        What was chosen. The caller prints and records it.

    Raises:
        UserError: If the embedded assets are asked for and lack a file of the task, or the cache cannot be written.
        M3POError: If Isaac Lab has already read another root, or newton's assets are not what they were.
    """
    global _chosen
    if mode not in MODES:
        raise UserError(f"unknown assets '{mode}', choose from: {', '.join(MODES)}")
    current = os.environ.get(ROOT_VARIABLE)
    if mode == "auto" and current and Path(current).resolve() != cache_folder().resolve():
        choice = AssetChoice("custom", current, f"{ROOT_VARIABLE} is set")
    elif mode == "remote":
        choice = AssetChoice("remote", None, "as asked; Isaac Lab downloads from its own asset root")
    elif is_covered(task):
        why = "as asked" if mode == "embedded" else f"they cover {task}"
        choice = AssetChoice("embedded", str(build_cache()), f"{why}; made from the newton package")
    else:
        choice = _by_files(mode, task, asked=mode == "embedded" or bool(current))
    _apply(choice)
    _chosen = choice
    return choice


def _by_files(mode: str, task: str, asked: bool) -> AssetChoice:
    """The choice for a task that is not known to be covered, by the files that its configuration names."""
    root = build_cache()
    files = named_by(task, root)
    if files is None:  # an unknown task, which is reported where tasks are looked up
        return AssetChoice("embedded" if asked else "remote", str(root) if asked else None, f"{task} is not known")
    missing = [name for name in files if not (root / name).is_file()]
    if asked and missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        known = ", ".join(COVERED_TASKS)
        raise UserError(f"the embedded assets do not cover '{task}', only: {known}; '{task}' needs {missing[0]}{more}")
    if asked or (files and not missing):
        why = f"as asked ({mode})" if asked else f"they hold all {len(files)} files that {task} names"
        return AssetChoice("embedded", str(root), f"{why}; made from the newton package")
    lacking = f"they lack {missing[0]}" if missing else f"the configuration of {task} names no files"
    return AssetChoice("remote", None, f"{lacking}; Isaac Lab downloads from its own asset root")


def prepare_for_stock_command() -> AssetChoice | None:
    """Choose the assets for Isaac Lab's own commands; of those, only our backend knows ``--assets``.

    Called when Isaac Lab loads the ``isaaclab.tasks`` entry points: before the command imports any task.

    Returns:
        What was chosen, by ``auto`` without ``--assets``. None where there is nothing to choose: an earlier
        :func:`prepare_assets` stands, the command line names no task, or Isaac Lab has already read its root.
    """
    task = _option("--task", sys.argv[1:])
    if _chosen is not None or task is None or _isaaclab_has_read_the_root():
        return None
    mode = _option("--assets", sys.argv[1:])
    return prepare_assets(mode if mode in MODES else "auto", task)


def cache_folder() -> Path:
    """The asset root of the embedded assets. Versioned, so that another newton or format never meets an old cache."""
    base = Path(os.environ.get("M3PO_CACHE") or "~/.cache/m3po").expanduser().absolute()
    return base / "assets" / f"newton-{importlib.metadata.version('newton')}-format-{FORMAT}"


def build_cache() -> Path:
    """Build the embedded assets unless they are there.

    They are built aside and renamed into place, so that no process, killed or concurrent, leaves or sees half of them.

    Returns:
        The asset root.

    Raises:
        UserError: If the cache folder cannot be written.
        M3POError: If the newton package does not hold what is expected of it.
    """
    folder = cache_folder()
    if _complete(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise UserError(f"cannot write the asset cache: {error}; set M3PO_CACHE to a writable folder") from error
    try:
        command = [sys.executable, "-m", "isaaclab_m3po.asset_builder", str(aside)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            last_line = (result.stderr.strip().splitlines() or ["no message"])[-1]
            raise M3POError(f"the embedded assets could not be built: {last_line}")
        aside.chmod(0o755)
        if folder.exists() and not _complete(folder):
            shutil.rmtree(folder, ignore_errors=True)
        try:
            aside.rename(folder)
        except OSError as error:
            # another process may have been first, and its files are as good
            if not _complete(folder):
                raise UserError(f"cannot write the asset cache: {error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def _complete(folder: Path) -> bool:
    """Whether every file is there."""
    return all((folder / name).is_file() for name in FILES)


def _apply(choice: AssetChoice) -> None:
    """Set the environment, and refuse where that comes too late."""
    if os.environ.get(ROOT_VARIABLE) == choice.root:
        return
    if _isaaclab_has_read_the_root():
        raise M3POError("the assets must be chosen before Isaac Lab is imported")
    if choice.root is None:
        del os.environ[ROOT_VARIABLE]
    else:
        os.environ[ROOT_VARIABLE] = choice.root


def _isaaclab_has_read_the_root() -> bool:
    """Whether a change of the environment would no longer be seen."""
    return "isaaclab.utils.assets" in sys.modules


def _option(name: str, argv: list[str]) -> str | None:
    """The value of an option on a command line."""
    for index, argument in enumerate(argv):
        if argument.startswith(f"{name}="):
            return argument.partition("=")[2]
        if argument == name and index + 1 < len(argv):
            return argv[index + 1]
    return None
