"""An hour of training through kills, signals and exploding physics: nothing leaks, nothing is lost.

M3PO_TEST_SOAK=60 ./isaaclab.sh -p -m pytest -s tests/test_soak.py     # minutes
"""

import csv
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
from conftest import REPOSITORY

from m3po.runners.checkpoint import LAST, numbered, read_checkpoint

MINUTES = float(os.environ.get("M3PO_TEST_SOAK", "0"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.sim,
    pytest.mark.skipif(MINUTES == 0, reason="takes as many minutes as M3PO_TEST_SOAK says"),
]

TRAIN = """
import random, sys
from m3po.cli.train import run
from m3po_tasks.dmcontrol.env import MjcfVecEnv

rng, observe = random.Random(int(sys.argv[1])), MjcfVecEnv._observe

def explode(self, state):
    obs = observe(self, state)
    if len(obs) == self.num_envs and rng.random() < 0.003:
        obs[rng.randrange(len(obs)), rng.randrange(obs.shape[1])] = rng.choice([float("nan"), float("inf"), 1e30])
        print("[soak] exploded", flush=True)
    return obs

MjcfVecEnv._observe = explode
sys.exit(run(sys.argv[2:]))
"""
"""The training command, with a world that shows values that are not finite every now and then.

Not in MuJoCo's state: MuJoCo notices those itself and resets the world before anybody sees them.
"""

OPTIONS = ("--task", "cartpole-swingup,mw-reach", "--num_envs", "24", "--device", "cpu", "--run_name", "soak")
OPTIONS += ("--max_iterations", "1000000", "--eval_interval", "200", "--eval_envs", "2", "--keep_checkpoints", "3")
OPTIONS += ("agent.save_interval=5", "agent.algorithm.world_model.replay_transitions=4096")

ENDINGS = {
    "SIGKILL": -signal.SIGKILL,
    "SIGTERM": 75,
    "SIGUSR1": 75,
    "SIGINT": 130,
    "a worker killed": 1,
}
"""What ends a life of the training, and its exit code."""


def watch(process: psutil.Process, seconds: float) -> list[dict[str, float]]:
    """Memory and handles of a training, twice a second, from when it trains."""
    samples, end = [], time.monotonic() + seconds
    while time.monotonic() < end and process.is_running():
        family = [process, *process.children(recursive=True)]
        try:
            samples.append(
                {
                    "time": time.monotonic(),
                    "rss": process.memory_info().rss / 2**20,
                    "files": process.num_fds(),
                    "threads": process.num_threads(),
                    "processes": len(family),
                    "zombies": sum(member.status() == psutil.STATUS_ZOMBIE for member in family),
                }
            )
        except psutil.NoSuchProcess:
            break
        time.sleep(0.5)
    return samples


def start(log_root: Path, output: Path, life: int, resume: bool) -> subprocess.Popen:
    """Begin a life, and wait until it trains."""
    command = [sys.executable, "-c", TRAIN, str(life), *OPTIONS, "--log_root", str(log_root)]
    with open(output, "ab") as file:
        position = file.tell()
        process = subprocess.Popen(
            [*command, *(["--resume", "soak"] if resume else [])],
            cwd=REPOSITORY,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=file,
            stderr=subprocess.STDOUT,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    deadline = time.monotonic() + 300
    while output.read_bytes()[position:].count(b"] Iteration ") < 2:
        assert process.poll() is None, output.read_text()[-4000:]
        assert time.monotonic() < deadline, output.read_text()[-4000:]
        time.sleep(0.5)
    return process


def end(process: subprocess.Popen, how: str) -> None:
    """End a life, and check how it says so."""
    if how == "a worker killed":
        workers = [p for p in psutil.Process(process.pid).children() if "metaworld.worker" in " ".join(p.cmdline())]
        workers[0].kill()
    else:
        process.send_signal(getattr(signal, how))
    assert process.wait(120) == ENDINGS[how], how


def test_an_hour_of_kills_signals_and_explosions(tmp_path):
    rng, output, log_root = random.Random(0), tmp_path / "output.log", tmp_path / "logs"
    deadline, lives, counts = time.monotonic() + 60 * MINUTES, [], Counter()
    done = -1
    while time.monotonic() < deadline or len(lives) < 2:
        process = start(log_root, output, len(lives), resume=bool(lives))
        samples = watch(psutil.Process(process.pid), rng.uniform(20, 120))
        family = psutil.Process(process.pid).children(recursive=True)
        how = rng.choice(list(ENDINGS))
        end(process, how)
        counts[how] += 1
        (folder,) = log_root.glob("m3po/*/*_soak")
        last = read_checkpoint(folder / LAST)["iter"]
        for path in numbered(folder):
            read_checkpoint(path)
        assert last >= done, "an iteration that was saved is gone"
        with open(folder / "progress.csv", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        reached = [int(row["iteration"]) for row in rows]
        assert reached == list(range(len(reached))), "iterations are missing, or there twice"
        lost = reached[-1] - last
        assert lost <= (5 if ENDINGS[how] not in (75, 130) else 0), (how, lost)
        counts["iterations lost"] += lost
        done = last
        time.sleep(6.0)  # workers see the end of their pipes
        assert not [p for p in family if p.is_running()], "processes outlive the training"
        third = max(1, len(samples) // 3)
        life = {"ended by": how, "seconds": samples[-1]["time"] - samples[0]["time"], "iterations": last}
        for name in ("rss", "files", "threads", "processes"):
            life[name] = [statistics.median(s[name] for s in part) for part in (samples[:third], samples[-third:])]
        life["zombies"] = max(sample["zombies"] for sample in samples)
        lives.append(life)
        print(json.dumps(life), flush=True)
    text = output.read_text()
    counts |= {
        "explosions": text.count("[soak] exploded"),
        "NaN guard messages": text.count("[m3po] NaN guard at step"),
    }
    counts["invalid steps"] = sum(float(row["robust/invalid_steps"]) for row in rows)
    report = {"minutes": MINUTES, "lives": len(lives), "counts": dict(counts)}
    print(json.dumps(report), flush=True)
    if target := os.environ.get("M3PO_SOAK_REPORT"):
        Path(target).write_text(json.dumps(report | {"runs": lives}, indent=1) + "\n", encoding="utf-8")

    assert counts["explosions"] > 0
    assert counts["NaN guard messages"] > 0
    longest = sorted(lives, key=lambda life: life["seconds"])[-max(1, len(lives) // 2) :]
    growth = statistics.median(life["rss"][1] / life["rss"][0] for life in longest)
    assert growth < 1.03, f"memory grows within a life: {growth:.3f}"
    assert lives[-1]["rss"][0] < 1.1 * lives[1]["rss"][0], "memory grows from life to life"
    for life in lives:
        assert life["files"][1] <= life["files"][0] + 3
        assert life["processes"][1] <= life["processes"][0] + 3  # an evaluation with two workers of its own
        assert life["zombies"] == 0
