"""What the benchmarks share that start the project's commands: every run is a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Finished(NamedTuple):
    """What a finished process leaves behind."""

    returncode: int
    """Exit code; negative is the signal that ended it."""

    stdout: str
    """Everything it printed, errors included."""

    peak_memory_mib: float
    """Peak resident set of the largest process of its tree, MiB; a training without evaluations is one process."""


def run_python(arguments: list[str]) -> Finished:
    """Run this interpreter in the root of the repository, to the end."""
    process = subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    with process:
        try:
            output = process.stdout.read()
            # instead of Popen.wait, because only the kernel knows the peak, and tells it only whoever reaps the process
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            raise
        process.returncode = os.waitstatus_to_exitcode(status)
    return Finished(process.returncode, output, usage.ru_maxrss / 1024)
