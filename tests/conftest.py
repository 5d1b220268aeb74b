"""What all tests share: the repository, and scripts run as a user runs them.

Isaac Lab allows one simulation per process, so a test that simulates runs a script in a process of its own.
"""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
_KINDS = {"unit", "sim", "learning"}


class Result(NamedTuple):
    """What a finished process left behind."""

    rc: int
    stdout: str
    stderr: str


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test that says nothing else of itself is a unit test."""
    for item in items:
        if not _KINDS & {mark.name for mark in item.iter_markers()}:
            item.add_marker(pytest.mark.unit)


def assert_adds_to_the_lock(name: str, package: str) -> None:
    """A lock has names, versions and hashes alone, a package among them, and none that the main lock has."""
    text, main = ((REPOSITORY / lock).read_text() for lock in (name, "requirements.txt"))
    names = re.findall(r"^(\S+)==", text, flags=re.MULTILINE)
    assert package in names
    for line in text.splitlines():
        assert re.fullmatch(r"[a-z0-9.-]+==[\w.+]+ \\|    --hash=sha256:[0-9a-f]{64}( \\)?", line), line
    assert not set(names) & set(re.findall(r"^(\S+)==", main, flags=re.MULTILINE))


def run_process(
    command: Sequence[str], timeout: float = 300.0, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> Result:
    """Run a command to its end. A timeout, in seconds, ends it with all its children and fails the test.

    ``env`` is the whole environment; that of this process by default.
    """
    process = subprocess.Popen(
        [str(part) for part in command],
        cwd=cwd or REPOSITORY,
        env={"OMP_NUM_THREADS": "1", **(os.environ if env is None else env)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        stdout, stderr = process.communicate()
        pytest.fail(f"{command} ran past {timeout} s\n{stdout[-2000:]}\n{stderr[-2000:]}")
    return Result(process.returncode, stdout, stderr)


@pytest.fixture
def repository() -> Path:
    """The root of the repository."""
    return REPOSITORY


@pytest.fixture
def float64() -> Iterator[None]:
    """Tensors and networks of a test are float64, which it asks for with ``pytest.mark.usefixtures``.

    For comparisons of two ways to one result. Each processor rounds otherwise, and thresholds make steps of that.
    """
    import torch

    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def run_script() -> Callable[..., Result]:
    """``run_script(["scripts/train.py", "--task", ...], timeout=60)`` runs a Python script of the repository.

    A first argument that starts with a dash (``-c``, ``-m``) goes to Python as it is. ``env`` holds variables to set on
    top of the environment. Returns ``(rc, stdout, stderr)``.
    """

    def run(
        args: Sequence[str], timeout: float = 300.0, env: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> Result:
        first = str(args[0]) if str(args[0]).startswith("-") else str(REPOSITORY / args[0])
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
        return run_process([sys.executable, first, *args[1:]], timeout, environment, cwd)

    return run
