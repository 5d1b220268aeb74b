"""Environment steps per second of DMControl tasks: a batch of worlds against one environment of dm_control itself.

./isaaclab.sh -p -m benchmarks dmcontrol --tasks cheetah-run walker-walk --num_envs 1024 --num_threads 2

Both repeat an action for two control steps and take random actions; observations, rewards and resets are included. Each
round times both, one after the other, so that a change of the machine's pace meets both. The medians of the rounds are
printed and stored as ``<output>/<device>-<num_envs>.json``.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from m3po.cli.arguments import Parser, at_least
from m3po.errors import UserError
from m3po.manifest import git_revision, package_versions, write_json
from m3po_tasks.dmcontrol import SUITE

OUTPUT = Path(__file__).resolve().parents[1] / "benchmarks" / "dmcontrol"

DOMAINS = {"cup": "ball_in_cup"}
"""Domains that dm_control calls differently."""


def batch_of(task: str, options: argparse.Namespace) -> Callable[[], None]:
    """One step of our batch, every world in a phase of its own, as after the start of training."""
    env = SUITE.make(task, options.num_envs, seed=options.seed, device=options.device, num_threads=options.num_threads)
    env.episode_length_buf = torch.randint_like(env.episode_length_buf, env.max_episode_length)
    shape = (env.num_envs, env.num_actions)
    return lambda: env.step(2.0 * torch.rand(shape, device=env.device) - 1.0)


def single(task: str, options: argparse.Namespace) -> Callable[[], None]:
    """One step of dm_control's environment with an action repeat of 2."""
    from dm_control import suite

    domain, name = task.split("-", 1)
    env = suite.load(DOMAINS.get(domain, domain), name.replace("-", "_"), {"random": options.seed})
    spec = env.action_spec()
    rng = np.random.default_rng(options.seed)
    env.reset()

    def step() -> None:
        action = rng.uniform(spec.minimum, spec.maximum)
        reward = 0.0
        for _ in range(2):
            result = env.step(action)
            reward += result.reward or 0.0
            if result.last():
                env.reset()
                break
        np.concatenate([np.ravel(value) for value in result.observation.values()]).astype(np.float32)

    return step


def timed(step: Callable[[], None], steps_per_call: int, seconds: float, device: str) -> tuple[float, float]:
    """Environment steps per second of wall-clock time and of this process's CPU time."""
    calls, start, cpu = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - start < seconds:
        step()
        calls += 1
    if device != "cpu":
        torch.cuda.synchronize(device)
    steps = calls * steps_per_call
    return steps / (time.perf_counter() - start), steps / (time.process_time() - cpu)


def compare(task: str, options: argparse.Namespace) -> dict[str, Any]:
    """Time both in turn; returns all rounds, the medians and their ratio."""
    contestants = {"batch": (batch_of(task, options), options.num_envs), "dm_control": (single(task, options), 1)}
    for step, _ in contestants.values():
        for _ in range(options.warm_up):
            step()
    rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    for _ in range(options.rounds):
        for name, (step, count) in contestants.items():
            rounds[name].append(timed(step, count, options.seconds, options.device))
    wall, cpu = ({name: statistics.median(r[i] for r in runs) for name, runs in rounds.items()} for i in range(2))
    return {
        "task": task,
        "steps_per_s": wall,
        "steps_per_cpu_s": cpu,
        "ratio": statistics.median(b[0] / s[0] for b, s in zip(rounds["batch"], rounds["dm_control"], strict=True)),
        "rounds": rounds,
    }


def parse(argv: list[str]) -> argparse.Namespace:
    """Read and check the command line.

    Raises:
        UserError: If a task is unknown or is none of dm_control's.
    """
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--tasks", nargs="+", default=["cheetah-run", "walker-walk"], help="Tasks of dm_control.")
    add("--num_envs", type=at_least(1), default=1024, help="Worlds of a batch.")
    add("--num_threads", type=at_least(1), default=len(os.sched_getaffinity(0)), help="Threads of the CPU backend.")
    add("--device", default="cpu", help="cpu, or a CUDA device: mujoco_warp then.")
    add("--rounds", type=at_least(1), default=5, help="Rounds; each times both once.")
    add("--seconds", type=float, default=3.0, help="Seconds of a timing.")
    add("--warm_up", type=at_least(0), default=20, help="Steps of both before anything is timed.")
    add("--seed", type=at_least(0), default=0, help="Seed of initial states and actions.")
    add("--output", type=Path, default=OUTPUT, help="Folder of the results.")
    options = parser.parse_args(argv)
    for task in options.tasks:
        if task not in SUITE.tasks():
            raise UserError(f"unknown DMControl task '{task}'.")
    return options


def main(argv: list[str]) -> int:
    """Time, print and store."""
    options = parse(argv)
    torch.manual_seed(options.seed)
    torch.set_num_threads(1)  # the threads are the physics'
    print(f"{options.num_envs} worlds, {options.num_threads} threads, load {os.getloadavg()[0]:.1f}, {options.device}")
    print(f"{'task':24}{'batch [steps/s]':>18}{'dm_control':>14}{'ratio':>8}{'per CPU second':>18}{'dm_control':>14}")
    rows = []
    for task in options.tasks:
        row = compare(task, options)
        wall, cpu = row["steps_per_s"], row["steps_per_cpu_s"]
        print(
            f"{task:24}{wall['batch']:18.0f}{wall['dm_control']:14.0f}{row['ratio']:8.2f}"
            f"{cpu['batch']:18.0f}{cpu['dm_control']:14.0f}",
            flush=True,
        )
        rows.append(row)
    path = options.output / f"{options.device.replace(':', '')}-{options.num_envs}.json"
    options.output.mkdir(parents=True, exist_ok=True)
    write_json(
        path,
        {
            "command": "-m benchmarks dmcontrol " + " ".join(argv),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": package_versions(("mujoco", "mujoco-warp", "dm-control")),
            "git": git_revision(Path(__file__)),
            "settings": {key: value for key, value in vars(options).items() if key != "output"},
            "cores": len(os.sched_getaffinity(0)),
            "load": os.getloadavg()[0],
            "rows": rows,
        },
    )
    print(f"stored {path}")
    return 0
