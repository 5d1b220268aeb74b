"""Signals, kills and full disks: what was learnt is on the disk, and readable."""

import contextlib
import csv
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, run_process
from toy_env import PointEnv, runner_cfg

from m3po.cli.train import learn
from m3po.errors import CheckpointError
from m3po.runners import M3PORunner
from m3po.runners.checkpoint import LAST, read_checkpoint, read_newest, write_checkpoint
from m3po.stopping import SAVED, Stop, StopSignals


def make_runner(folder: Path, stop: StopSignals | None = None) -> M3PORunner:
    """A run that saves after every iteration."""
    torch.manual_seed(1)
    cfg = runner_cfg() | {"save_interval": 1, "keep_checkpoints": 2}
    return M3PORunner(PointEnv(16), cfg, str(folder), "cpu", stop=stop)


def test_a_process_killed_at_random_moments_never_leaves_an_unreadable_checkpoint(tmp_path):
    """50 times SIGKILL: half of them at any moment of rollouts and updates, half in the midst of a write."""
    result = run_process([sys.executable, REPOSITORY / "tests/toy_kills.py", tmp_path, "50"], timeout=400)
    assert result.rc == 0, result.stderr[-3000:]
    kills, during_a_write, iterations = map(int, result.stdout.split())
    assert kills == 50
    assert during_a_write >= 20
    runner = make_runner(tmp_path)
    runner.resume(str(tmp_path / LAST))
    assert runner.current_learning_iteration == iterations
    with open(tmp_path / "progress.csv", encoding="utf-8") as file:
        assert [int(row["iteration"]) for row in csv.DictReader(file)] == list(range(iterations))
    assert not list(tmp_path.glob(".*.tmp"))


SCRIPT = """
import sys, time
from pathlib import Path
from m3po.cli.train import learn
from m3po.stopping import StopSignals
from test_nothing_lost import make_runner
folder, resumed = Path(sys.argv[1]), Path(sys.argv[3]) if len(sys.argv) > 3 else None
stop = StopSignals()
with stop.caught():
    runner = make_runner(folder, stop)
    runner.cfg["save_interval"] = 10**9
    step = runner.env.step
    runner.env.step = lambda actions: (time.sleep(float(sys.argv[2])), step(actions))[1]
    sys.exit(learn(runner, folder, 100_000, resumed, True))
"""


def start_script(*arguments: object, step_seconds: float = 0.02) -> subprocess.Popen:
    """A training in a process of its own; returns when its second iteration of 8 steps is done."""
    path = os.pathsep.join([str(REPOSITORY / "tests"), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(arguments[0]), str(step_seconds), *map(str, arguments[1:])],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    seen = 0
    for line in process.stdout:
        seen += "Iteration " in line
        if seen == 2:
            return process
    raise AssertionError(process.wait())


@pytest.mark.parametrize(
    ("number", "code", "words"),
    [
        (signal.SIGTERM, 75, "stopped by SIGTERM; saved"),
        (signal.SIGUSR1, 75, "stopped by SIGUSR1; saved"),
        (signal.SIGINT, 130, "interrupted; saved"),
    ],
)
def test_signals_finish_the_iteration_save_and_exit_with_a_distinct_code(number, code, words, tmp_path):
    process = start_script(tmp_path)
    process.send_signal(number)
    time.sleep(0.01)
    process.send_signal(number)  # a cluster sends it to a job and to what has launched the job
    output = process.communicate(timeout=60)[0]
    assert process.returncode == code, output
    assert f"[m3po] {number.name}: finishing the iteration, then saving" in output
    assert f"[m3po] {words} {tmp_path / LAST}" in output
    assert "Traceback" not in output
    content = read_checkpoint(tmp_path / LAST)
    with open(tmp_path / "progress.csv", encoding="utf-8") as file:
        assert int(list(csv.DictReader(file))[-1]["iteration"]) == content["iter"] >= 1
    assert content["resume"]["environment"] is not None

    if number == signal.SIGTERM:  # and it goes on
        process = start_script(tmp_path, tmp_path / LAST)
        process.send_signal(number)
        assert process.wait(60) == 75
        assert read_checkpoint(tmp_path / LAST)["iter"] > content["iter"]


def test_a_second_signal_exits_at_once(tmp_path):
    process = start_script(tmp_path, step_seconds=0.5)
    process.send_signal(signal.SIGTERM)
    for line in process.stdout:
        if "finishing the iteration" in line:
            break
    start = time.monotonic()
    process.send_signal(signal.SIGUSR1)
    assert process.wait(60) == -signal.SIGUSR1
    assert time.monotonic() - start < 3.0  # an iteration takes longer than 8 x 0.5 s
    process.stdout.close()
    assert not (tmp_path / LAST).exists()


def test_a_signal_before_the_first_iteration_has_nothing_to_save(tmp_path, capsys):
    stop = StopSignals()
    runner = make_runner(tmp_path, stop)
    runner.learn = lambda *_: (_ for _ in ()).throw(Stop(signal.SIGTERM))
    assert learn(runner, tmp_path, 5, None, False) == SAVED
    assert "stopped by SIGTERM; nothing was learnt yet" in capsys.readouterr().out


def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    with StopSignals().caught():
        assert signal.getsignal(signal.SIGTERM) != before[1]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == before


def test_a_late_copy_of_the_signal_does_not_change_the_exit_code():
    script = """
import os, signal, sys
from m3po.stopping import Stop, StopSignals
try:
    with StopSignals().caught():
        os.kill(os.getpid(), signal.SIGTERM)
except Stop as stop:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        os.kill(os.getpid(), number)
    sys.exit(stop.exit_code)
"""
    assert run_process([sys.executable, "-c", script], timeout=60).rc == SAVED


@contextlib.contextmanager
def full_disk(size: int):
    """A limit on the size of files that this process writes: what a full disk does, to the writer.

    Only around what is tested: pytest's own output may go to a file as well, and may be larger.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_costs_a_checkpoint_not_the_run(tmp_path, capsys):
    runner = make_runner(tmp_path)
    runner.learn(1)
    before = (tmp_path / LAST).read_bytes()
    runner.current_learning_iteration = 1
    checkpoint = runner._checkpoint
    runner._checkpoint = lambda *args, last: checkpoint(*args, last=False)
    with full_disk(40_000):
        runner.learn(2)
    output = capsys.readouterr().out
    assert output.count("could not be written: File too large. Training goes on") == 2
    assert (tmp_path / LAST).read_bytes() == before
    assert [path.name for path in tmp_path.glob("model_*.pt")] in (["model_0.pt", LAST], [LAST, "model_0.pt"])
    assert not list(tmp_path.glob(".*.tmp"))
    runner._checkpoint = checkpoint
    runner.current_learning_iteration = 3
    runner.learn(1)  # there is room again
    assert read_newest(tmp_path)[1]["iter"] == 3


def test_the_last_checkpoint_must_be_written(tmp_path):
    runner = make_runner(tmp_path)
    with full_disk(40_000), pytest.raises(CheckpointError, match=r"model_0.pt' could not be written: File too large"):
        runner.learn(1)


def test_a_folder_that_cannot_be_written_is_said(tmp_path):
    """Root may write read-only folders; one that is gone is refused to everybody."""
    with pytest.raises(CheckpointError, match="could not be written: No such file or directory"):
        write_checkpoint(tmp_path / "gone" / LAST, {"actor_state_dict": {}})


def test_a_read_only_folder_leaves_the_checkpoint_before(tmp_path):
    """As another user where this one is root, whom no permission stops."""
    make_runner(tmp_path).learn(1)
    content = read_checkpoint(tmp_path / LAST)
    with tempfile.TemporaryDirectory() as name:  # not below tmp_path, which others may not even enter
        path = Path(name) / LAST
        write_checkpoint(path, content)
        before = path.read_bytes()
        Path(name).chmod(0o555)
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                if os.geteuid() == 0:
                    os.seteuid(65534)
                write_checkpoint(path, content)
            except CheckpointError as error:
                os.write(writer, str(error).encode())
            os._exit(0)
        os.close(writer)
        os.waitpid(pid, 0)
        message = os.read(reader, 1000).decode()
        os.close(reader)
        Path(name).chmod(0o755)
        assert "could not be written: Permission denied" in message
        assert path.read_bytes() == before
