"""Kills a training again and again, and reads what it leaves: ``toy_kills.py FOLDER KILLS``.

Prints kills, those in the midst of a write, and iterations. In a process of its own, which has never used autograd:
its forked children could not use it otherwise, and to start Python anew for each of them would take minutes.
"""

import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from toy_env import PointEnv, runner_cfg

from m3po.runners import M3PORunner
from m3po.runners.checkpoint import LAST, read_checkpoint, read_newest


def train_until_killed(folder: Path, first: int) -> None:
    """The child: go on from the newest checkpoint, if there is one, and save after every iteration."""
    os.dup2(os.open(folder / "output.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    torch.manual_seed(1)
    cfg = runner_cfg() | {"save_interval": 1, "keep_checkpoints": 2}
    runner = M3PORunner(PointEnv(16), cfg, str(folder), "cpu")
    if first:
        runner.resume(str(read_newest(folder)[0]))
    runner.learn(10_000)


def main(folder: Path, kills: int) -> None:
    """Kill every other child at any moment, and the others while they write."""
    rng, context = random.Random(0), multiprocessing.get_context("fork")
    iterations, during_a_write = 0, 0
    for kill in range(kills):
        child = context.Process(target=train_until_killed, args=(folder, iterations))
        child.start()
        deadline = time.monotonic() + 60
        newest = (folder / LAST).stat().st_mtime_ns if iterations else 0
        while not (folder / LAST).exists() or (folder / LAST).stat().st_mtime_ns == newest:
            assert child.is_alive(), "the training has ended by itself"
            assert time.monotonic() < deadline
            time.sleep(0.002)
        if kill % 2:
            while not list(folder.glob(".model_*.tmp")):
                assert child.is_alive(), "the training has ended by itself"
                assert time.monotonic() < deadline
        else:
            time.sleep(rng.uniform(0.0, 0.15))
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        during_a_write += bool(list(folder.glob(".model_*.tmp")))
        content = read_checkpoint(folder / LAST)  # raises if it is not readable
        assert content["iter"] >= iterations, "an iteration that was saved is gone"
        assert content["resume"]["algorithm"]["replay"]["size"] > 0
        for path in folder.glob("model_*.pt"):
            read_checkpoint(path)
        iterations = content["iter"] + 1
    print(kills, during_a_write, iterations)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
