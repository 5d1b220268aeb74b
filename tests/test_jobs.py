"""Jobs that are preempted: what a job calls each time it starts, and the Slurm script among stand-ins for Slurm."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import REPOSITORY, Result, run_process

# Trains until it is told to stop; then it saves and ends with 75. When it is resumed, it has nothing left to do.
FAKE_TRAINING = """#!/usr/bin/env bash
echo "$*" >> calls
echo "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $MASTER_PORT" >> ranks
if [[ "$*" == *--resume* ]]; then exit 0; fi
if [[ "$*" == *--crash* ]]; then exit 3; fi
run="logs/m3po/ant/2026-01-31_12-00-00_${*: -1}"
trap 'sleep 0.5; mkdir -p "$run"; touch "$run/model_last.pt"; exit 75' USR1 TERM
touch started
while true; do sleep 0.05; done
"""

# The options up to the command are srun's own; the command becomes the one task.
FAKE_SRUN = """#!/usr/bin/env bash
while [[ "$1" == -* ]]; do shift; done
SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NTASKS=1 exec "$@"
"""

FAKE_SCONTROL = """#!/usr/bin/env bash
if [[ "$1" == show ]]; then printf '%s\\n' node-a node-b; else echo "scontrol $*" >> calls; fi
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout whose training is a stand-in, with Slurm's commands beside it."""
    shutil.copytree(REPOSITORY / "docker", tmp_path / "docker")
    (tmp_path / "logs").mkdir()
    (tmp_path / "bin").mkdir()
    for name, text in (
        ("isaaclab.sh", FAKE_TRAINING),
        ("bin/srun", FAKE_SRUN),
        ("bin/scontrol", FAKE_SCONTROL),
    ):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    return tmp_path


def environment(checkout: Path) -> dict[str, str]:
    return {
        "PATH": f"{checkout / 'bin'}:{os.environ['PATH']}",
        "TMPDIR": str(checkout / "cache" / "tmp"),
        "SLURM_JOB_ID": "30042",
        "SLURM_JOB_NODELIST": "node-[a-b]",
        "SLURM_CPUS_PER_TASK": "8",
    }


def calls(checkout: Path) -> list[str]:
    """What was called since the last look."""
    lines = (checkout / "calls").read_text().splitlines()
    (checkout / "calls").unlink()
    return lines


# -- the command of a job ---------------------------------------------------------------------------------------------


def start(checkout: Path, *arguments: str) -> Result:
    command = [str(checkout / "docker" / "resumable.sh"), *arguments]
    return run_process(command, timeout=30, env=environment(checkout), cwd=Path("/"))


def save(checkout: Path, run: str, checkpoint: str = "model_25.pt") -> None:
    folder = checkout / "logs" / "m3po" / "ant" / run
    folder.mkdir(parents=True, exist_ok=True)
    (folder / checkpoint).touch()


def test_job_starts_anew_until_something_is_saved(checkout: Path) -> None:
    asked = "-p scripts/train.py --crash --task Isaac-Ant-v0 --log_root logs --run_name ant-1"
    # no checkpoint, or only runs whose names end alike
    save(checkout, "2026-01-31_12-00-00_ant-1", "progress.csv")
    save(checkout, "2026-01-31_12-00-00_big_ant-1")
    save(checkout, "2026-01-31_12-00-00_ant-10")
    start(checkout, "ant-1", "--crash", "--task", "Isaac-Ant-v0")
    save(checkout, "2026-01-31_11-00-00_ant-1")
    save(checkout, "2026-01-31_12-00-00_ant-1")
    start(checkout, "ant-1", "--crash", "--task", "Isaac-Ant-v0")
    assert calls(checkout) == [asked, f"{asked} --resume logs/m3po/ant/2026-01-31_12-00-00_ant-1"]
    # an empty volume over the caches does not take away where Isaac Lab downloads to
    assert (checkout / "cache" / "tmp").is_dir()


def test_arguments_arrive_as_they_are(checkout: Path) -> None:
    (checkout / "isaaclab.sh").write_text("#!/usr/bin/env bash\nprintf '%s\\n' \"$@\"\n")
    odd = ["two words", "$(touch ran)", "*", ""]
    assert start(checkout, "a", *odd).stdout.splitlines()[2:-4] == odd
    assert not (checkout / "ran").exists()


@pytest.mark.parametrize("name", ["", "--task", "a b", "a*", "../a", "$(touch ran)", "-p"])
def test_name_of_a_run_is_checked(checkout: Path, name: str) -> None:
    result = start(checkout, name, "--task", "Isaac-Ant-v0")
    assert result.rc == 2 and len(result.stderr.splitlines()) == 1
    assert not (checkout / "calls").exists() and not (checkout / "ran").exists()


# -- Slurm ------------------------------------------------------------------------------------------------------------


def submit(checkout: Path, task: str, *arguments: str) -> subprocess.Popen:
    """Start the script as Slurm does: a copy of it, in the folder of the submission."""
    script = shutil.copy(checkout / "docker" / "slurm_job.sh", checkout / "spooled")
    command = ["bash", script, "--task", task, *arguments]
    return subprocess.Popen(command, cwd=checkout, env=environment(checkout), start_new_session=True)


def wait_for(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it has not come"
        time.sleep(0.02)


def tasks_of(job: subprocess.Popen) -> list[int]:
    """Processes that the script has started, except for those of its tasks."""
    listed = subprocess.run(["pgrep", "--parent", str(job.pid)], capture_output=True, text=True, check=True)
    return [int(pid) for pid in listed.stdout.split()]


@pytest.mark.parametrize("way", ["time limit", "preemption"])
def test_slurm_job_is_requeued_and_goes_on(checkout: Path, way: str) -> None:
    job = submit(checkout, "Isaac-Ant-v0")
    try:
        wait_for((checkout / "started").exists)
        if way == "time limit":
            job.send_signal(signal.SIGUSR1)  # to the script alone
        else:
            for pid in [job.pid, *tasks_of(job)]:
                os.kill(pid, signal.SIGTERM)
        assert job.wait(30) == 75
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
    asked = "-p scripts/train.py --task Isaac-Ant-v0 --log_root logs --run_name slurm-30042"
    assert calls(checkout) == [asked, "scontrol requeue 30042"]
    assert submit(checkout, "Isaac-Ant-v0").wait(30) == 0
    # it goes on, and is not requeued when it has finished
    assert calls(checkout) == [f"{asked} --resume logs/m3po/ant/2026-01-31_12-00-00_slurm-30042"]
    assert (checkout / "ranks").read_text().splitlines() == ["0 0 1 node-a 30042"] * 2


def test_slurm_job_that_crashes_is_not_requeued(checkout: Path) -> None:
    assert submit(checkout, "Isaac-Ant-v0", "--crash").wait(30) == 3
    assert not any("requeue" in call for call in calls(checkout))


def test_slurm_reads_its_options() -> None:
    lines = (REPOSITORY / "docker" / "slurm_job.sh").read_text().splitlines()
    # Slurm stops reading at the first command
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    options = [line.removeprefix("#SBATCH ") for line in lines[:first] if line.startswith("#SBATCH")]
    assert len(options) == sum("#SBATCH" in line for line in lines)
    assert "--requeue" in options and "--open-mode=append" in options
    (signalled,) = (option for option in options if option.startswith("--signal"))
    assert int(re.fullmatch(r"--signal=B:USR1@(\d+)", signalled)[1]) >= 60


# -- with a real training ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_slurm_job_trains_on_in_the_same_run(checkout: Path) -> None:
    """The contract between the scripts and the training: the same options again, run folders, signals, exit codes."""
    (checkout / "isaaclab.sh").write_text(
        f'#!/usr/bin/env bash\nexport OMP_NUM_THREADS=1\nexec {sys.executable} "{REPOSITORY}/$2" "${{@:3}}"\n'
    )
    options = "--device", "cpu", "--num_envs", "4", "--max_iterations", "8", "--eval_interval", "0"
    options += ("agent.algorithm.world_model.extra_steps=0",)  # seconds, of which nothing here depends on
    job = submit(checkout, "walker-walk", *options)
    try:
        wait_for(lambda: any(checkout.glob("logs/*/*/*/progress.csv")), 120)
        job.send_signal(signal.SIGUSR1)
        assert job.wait(60) == 75
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
    assert calls(checkout) == ["scontrol requeue 30042"]
    assert submit(checkout, "walker-walk", *options).wait(120) == 0
    (table,) = checkout.glob("logs/*/*/*_slurm-30042/progress.csv")
    iterations = [int(row["iteration"]) for row in csv.DictReader(table.open())]
    assert len(iterations) == 8 and iterations == list(range(iterations[0], iterations[0] + 8))
    assert len(json.loads((table.parent / "run.json").read_text())["resumed"]) == 1
