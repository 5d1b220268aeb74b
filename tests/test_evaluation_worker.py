"""The evaluation process: it reports its own death, leaves no process behind, and never blocks the training.

That it evaluates is part of the end-to-end test in ``test_play.py``.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from m3po.cli.evaluate import evaluator
from m3po.errors import M3POError, UserError
from m3po.evaluation_process import EvaluationProcess, acting_cfg


def fake_job(task: str = "Isaac-Cartpole", algo: str = "m3po") -> SimpleNamespace:
    """As much of a training's job as the parent's side reads."""
    options = {"task": task, "algo": algo, "device": "cpu", "assets": "auto", "num_envs": 64, "seed": 1}
    return SimpleNamespace(
        order=lambda: {"suite": "isaaclab", "options": options, "overrides": []},
        train_cfg={"algorithm": {"world_model": {"steps_per_iteration": 4}} if algo == "m3po" else {}},
    )


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[EvaluationProcess]:
    worker = evaluator(fake_job(), 4, tmp_path / "evaluation.log")
    yield worker
    worker.close()


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def is_running(pid: int) -> bool:
    """Whether a process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_starts_with_the_first_checkpoint_and_never_blocks(worker: EvaluationProcess) -> None:
    assert worker._process is None
    assert worker.poll() == []
    assert worker.wait() == []  # nothing is outstanding
    start = time.monotonic()
    for iteration in range(500):  # far more than the child can read while it starts
        worker.submit("/runs/model.pt", iteration)
    assert worker.poll() == []
    assert time.monotonic() - start < 2.0
    pid = worker._process.pid
    worker.close()
    worker.close()  # harmless
    assert not Path(f"/proc/{pid}").exists(), "neither a process nor a zombie is left"
    worker.submit("/runs/model.pt", 500)
    assert worker.poll() == []


def test_a_killed_worker_is_reported_once(worker: EvaluationProcess) -> None:
    worker.submit("/runs/model.pt", 0)
    pid = worker._process.pid
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(M3POError, match="exit code -9"):
        worker.wait()
    assert worker.wait() == []
    assert worker.poll() == []
    worker.submit("/runs/model.pt", 1)
    assert not Path(f"/proc/{pid}").exists()


def test_a_killed_worker_can_be_started_anew(worker: EvaluationProcess) -> None:
    worker.submit("/runs/model.pt", 0)
    killed = worker._process.pid
    os.kill(killed, signal.SIGKILL)
    with pytest.raises(M3POError, match="exit code -9"):
        worker.wait()
    worker.restart()
    assert worker.poll() == []  # what was queued before is gone
    worker.submit("/runs/model.pt", 1)
    assert worker._process.pid != killed
    assert is_running(worker._process.pid)
    worker.close()
    assert not is_running(worker._process.pid)


def test_a_worker_that_fails_is_reported_with_its_own_words(tmp_path: Path) -> None:
    worker = evaluator(fake_job(task="Isaac-Cartpool"), 4, tmp_path / "evaluation.log")
    worker.submit("/runs/model.pt", 0)
    with pytest.raises(M3POError, match=r"(?s)exit code 2.*unknown task 'Isaac-Cartpool'.*Isaac-Cartpole"):
        worker.wait()


def test_a_worker_ends_with_its_parent(run_script: Callable, tmp_path: Path) -> None:
    """A training that is killed takes its evaluation with it, even while that is busy."""
    parent = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_evaluation_worker import evaluator, fake_job
worker = evaluator(fake_job(), 4, Path({str(tmp_path / "evaluation.log")!r}))
worker.submit("/runs/model.pt", 0)
print(worker._process.pid, flush=True)
os.kill(os.getpid(), 9)
"""
    result = run_script(["-c", parent])
    assert result.rc == -9, result.stderr
    assert wait_until(lambda: not is_running(int(result.stdout)))


def test_too_few_environments_are_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="prior and planner needs at least 2 environments, got 1"):
        evaluator(fake_job(), 1, tmp_path / "evaluation.log")
    evaluator(fake_job(algo="ppo"), 1, tmp_path / "evaluation.log")


def test_acting_needs_little_memory_and_leaves_the_training_alone() -> None:
    """The replay buffer and the mini-batches of the training are not for a process that only acts."""
    cfg = {"seed": 1, "algorithm": {"num_mini_batches": 64, "world_model": {"width": 64, "replay_transitions": 9}}}
    acting = acting_cfg(cfg)
    assert acting["algorithm"] == {"num_mini_batches": 1, "world_model": {"width": 64, "replay_transitions": 0}}
    assert cfg["algorithm"]["num_mini_batches"] == 64
    assert cfg["algorithm"]["world_model"]["replay_transitions"] == 9
    assert acting_cfg({"algorithm": {"num_mini_batches": 64}}) == {"algorithm": {"num_mini_batches": 1}}
