"""One run folder for all attempts of a training that torchrun restarts.

With ``torchrun --max_restarts N``, all processes are started again after one of them has died, perhaps fewer than
before. What they need to know of the attempts before them lies in a small file beside the run folders, named after the
launch: by the id given as ``--rdzv_id`` (or made up by ``--standalone``), and then a launch of that id goes on where
an earlier one was broken off; without an id, by the address at which the processes meet, and then restarts alone go on.
The file disappears when the training is finished. Several machines must see the same folder.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from m3po import distributed
from m3po.manifest import write_json
from m3po.runners.checkpoint import LAST, numbered, read_newest


class ElasticRun:
    """All attempts of a training. The first process decides, all of them know; a process of its own has one attempt."""

    def __init__(self, experiment_dir: Path, create_run_dir: Callable[[], Path]) -> None:
        """Find the run folder of earlier attempts, or create one.

        Args:
            experiment_dir: Folder that holds the run folders.
            create_run_dir: Creates a run folder in it; called in the first process of a first attempt.
        """
        self._record = _record_path(experiment_dir)
        known: Any = None
        if distributed.is_main():
            before = self._read()
            run_dir = Path(before["run_dir"]) if before else create_run_dir()
            self._write({"run_dir": str(run_dir)})
            left = before and ((run_dir / LAST).exists() or numbered(run_dir))
            known = run_dir, read_newest(run_dir)[0] if left else None
        self.run_dir, self.checkpoint = distributed.shared(known)
        """Folder of the run, and the checkpoint that an earlier attempt has left in it, if any."""

    def finish(self) -> None:
        """Nothing is left to do for a later attempt."""
        if self._record is not None and distributed.is_main():
            self._record.unlink(missing_ok=True)

    def _read(self) -> dict | None:
        restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
        if self._record is None or not self._record.exists() or not (restarted or _launch_id()):
            return None
        return json.loads(self._record.read_text(encoding="utf-8"))

    def _write(self, known: dict) -> None:
        if self._record is not None and distributed.is_main():
            write_json(self._record, known)


def _launch_id() -> str | None:
    """Id of torchrun's launch, if it has one of its own."""
    found = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return None if found == "none" else found


def _record_path(experiment_dir: Path) -> Path | None:
    """File of the launch that this process belongs to; ``None`` without torchrun."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or not distributed.is_connected():
        return None
    name = _launch_id() or f"{os.environ['MASTER_ADDR']}-{os.environ['MASTER_PORT']}"
    return experiment_dir / f".launch-{re.sub(r'[^A-Za-z0-9._-]', '_', name)}.json"
