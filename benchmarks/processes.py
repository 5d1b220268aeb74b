"""What the benchmarks share that start the project's commands: every run is a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
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


# A process counts the memory of the one that forked it, up to its exec. So a small one stands in between, and it is the
# one that learns the peak from the kernel.
_WATCH = """
import resource, subprocess, sys
code = subprocess.call(sys.argv[2:])
with open(sys.argv[1], "w") as file:
    file.write(f"{code} {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss}")
"""


def run_python(arguments: list[str]) -> Finished:
    """Run this interpreter in the root of the repository, to the end."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report"
        process = subprocess.Popen(
            [sys.executable, "-IS", "-c", _WATCH, str(report), sys.executable, *arguments],
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        with process:
            try:
                output = process.stdout.read()
                process.wait()
            except BaseException:
                os.killpg(process.pid, signal.SIGKILL)
                raise
        code, peak = report.read_text().split()
    return Finished(int(code), output, int(peak) / 1024)
