"""Environment steps per second of Meta-World tasks: the pool of processes against one environment in this process.

./isaaclab.sh -p -m benchmarks metaworld --tasks mw-reach mw-assembly --num_envs 32 --output benchmarks/metaworld

Both repeat an action for two simulator steps and take random actions; a round is one episode of each, with its reset,
one after the other, so that a change of the machine's pace meets both. The last row is all tasks at the same time, in
one pool. Medians of the rounds are printed, and stored with all rounds as ``<output>/<num_envs>.json``.
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
import psutil
import torch

from m3po.cli.arguments import Parser, at_least
from m3po.errors import UserError
from m3po.manifest import git_revision, package_versions, write_json
from m3po_tasks.metaworld import SUITE
from m3po_tasks.metaworld.env import MetaWorldVecEnv
from m3po_tasks.metaworld.tasks import ACTION_DIM, ACTION_REPEAT, EPISODE_LENGTH, metaworld_name

PLAIN_ENVS = 4
"""Environments made to measure the memory of a plain one."""

MIB = 2**20


def plain_env(task: str, seed: int) -> Any:
    """An environment as the package offers it, with new goals at each reset."""
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE

    env = ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE[f"{metaworld_name(task)}-goal-observable"](seed=seed)
    env._freeze_rand_vec = False
    return env


def plain_episode(env: Any, rng: np.random.Generator) -> None:
    """One episode of a plain environment."""
    env.reset()
    for action in rng.uniform(-1, 1, (EPISODE_LENGTH, ACTION_DIM)).astype(np.float32):
        for _ in range(ACTION_REPEAT):
            env.step(action)


def pool_episode(envs: list[MetaWorldVecEnv]) -> None:
    """One episode of all environments of some batches, which step at the same time."""
    for _ in range(EPISODE_LENGTH):
        for env in envs:
            env.step_async(2.0 * torch.rand(env.num_envs, ACTION_DIM) - 1.0)
        for env in envs:
            env.step_wait()


def workers() -> list[psutil.Process]:
    """The processes of the pool."""
    return psutil.Process().children()


def cpu_seconds() -> float:
    """CPU time of this process and the pool so far."""
    times = [process.cpu_times() for process in (psutil.Process(), *workers())]
    return sum(time.user + time.system for time in times)


def memory(processes: list[psutil.Process]) -> float:
    """Memory that belongs to processes alone, MiB."""
    return sum(process.memory_full_info().uss for process in processes) / MIB


def timed(play: Callable[[], None], num_envs: int) -> dict[str, float]:
    """Environment steps per second of an episode, per CPU second, and how many cores were busy."""
    start, cpu = time.perf_counter(), cpu_seconds()
    play()
    wall, cpu = time.perf_counter() - start, cpu_seconds() - cpu
    steps = num_envs * EPISODE_LENGTH
    return {"steps_per_s": steps / wall, "steps_per_cpu_s": steps / cpu, "busy_cores": cpu / wall}


def plain_memory(task: str, seed: int, rng: np.random.Generator) -> float:
    """Memory of a further plain environment of a task, MiB."""
    envs = [plain_env(task, seed)]
    plain_episode(envs[0], rng)
    before = memory([psutil.Process()])
    for _ in range(PLAIN_ENVS):
        envs.append(plain_env(task, seed))
        plain_episode(envs[-1], rng)
    return (memory([psutil.Process()]) - before) / PLAIN_ENVS


def pool_memory(task: str, options: argparse.Namespace) -> tuple[float, float]:
    """Memory of a worker with one environment of a task, and of each further environment, MiB."""
    used = []
    for num_envs in (options.num_workers, options.num_workers + options.num_envs):
        env = SUITE.make(task, num_envs, seed=options.seed, device="cpu", num_workers=options.num_workers)
        pool_episode([env])
        used.append(memory(workers()))
        env.close()
    return used[0] / options.num_workers, (used[1] - used[0]) / options.num_envs


def compare(label: str, contestants: dict[str, tuple[Callable[[], None], int]], rounds: int) -> dict[str, Any]:
    """Time contestants in turn, after one episode each that is not timed; returns all rounds and their medians."""
    for play, _ in contestants.values():
        play()
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, (play, num_envs) in contestants.items():
            runs[name].append(timed(play, num_envs))
    medians = {
        name: {key: statistics.median(run[key] for run in some) for key in some[0]} for name, some in runs.items()
    }
    return {"task": label, **medians, "rounds": runs}


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Each task alone, then all together; prints as it goes."""
    rng = np.random.default_rng(options.seed)

    def make(task: str) -> MetaWorldVecEnv:
        return SUITE.make(task, options.num_envs, seed=options.seed, device="cpu", num_workers=options.num_workers)

    rows = []
    for task in options.tasks:
        plain, env = plain_env(task, options.seed), make(task)
        contestants = {
            "plain": (lambda plain=plain: plain_episode(plain, rng), 1),
            "pool": (lambda env=env: pool_episode([env]), options.num_envs),
        }
        row = compare(task, contestants, options.rounds)
        env.close()
        worker, further = pool_memory(task, options)
        row["mib"] = {"plain": plain_memory(task, options.seed, rng), "worker": worker, "pool": further}
        rows.append(row)
        show(row)
    envs = [make(task) for task in options.tasks]
    together = {"pool": (lambda: pool_episode(envs), options.num_envs * len(envs))}
    rows.append(compare("all together", together, options.rounds))
    show(rows[-1])
    for env in envs:
        env.close()
    return rows


def show(row: dict[str, Any]) -> None:
    """Print a row."""
    plain, pool, mib = row.get("plain"), row["pool"], row.get("mib")
    text = f"{row['task']:24}{pool['steps_per_s']:12.0f}{pool['steps_per_cpu_s']:14.0f}{pool['busy_cores']:12.2f}"
    if plain and mib:
        text += f"{plain['steps_per_s']:13.0f}{plain['steps_per_cpu_s']:14.0f}"
        text += f"{mib['worker']:13.0f}{mib['pool']:10.2f}{mib['plain']:11.2f}"
    print(text, flush=True)


def parse(argv: list[str]) -> argparse.Namespace:
    """Read and check the command line.

    Raises:
        UserError: If a task is none of Meta-World's.
    """
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--tasks", nargs="+", default=["mw-reach", "mw-assembly", "mw-coffee-push"], help="Tasks of Meta-World.")
    add("--num_envs", type=at_least(1), default=32, help="Environments of a batch.")
    add("--num_workers", type=at_least(1), default=len(os.sched_getaffinity(0)), help="Processes of the pool.")
    add("--rounds", type=at_least(1), default=5, help="Episodes of each.")
    add("--seed", type=at_least(0), default=0, help="Seed of goals and actions.")
    add("--output", type=Path, default=None, help="Folder of the result; nothing is stored without it.")
    options = parser.parse_args(argv)
    unknown = [task for task in options.tasks if task not in SUITE.tasks()]
    if unknown:
        raise UserError(f"unknown Meta-World tasks: {', '.join(unknown)}.")
    return options


def main(argv: list[str]) -> int:
    """Time, print and store."""
    options = parse(argv)
    torch.manual_seed(options.seed)
    torch.set_num_threads(1)
    print(f"{options.num_envs} environments, {options.num_workers} workers, load {os.getloadavg()[0]:.1f}")
    print(
        f"{'task':24}{'pool [1/s]':>12}{'per CPU s':>14}{'busy cores':>12}{'plain [1/s]':>13}{'per CPU s':>14}"
        f"{'worker [MiB]':>13}{'pool env':>10}{'plain env':>11}"
    )
    rows = measure(options)
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        content = {
            "command": "-m benchmarks metaworld " + " ".join(argv),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": package_versions(("metaworld", "gymnasium", "numpy")),
            "git": git_revision(Path(__file__)),
            "settings": {key: value for key, value in vars(options).items() if key != "output"},
            "cores": len(os.sched_getaffinity(0)),
            "load": os.getloadavg()[0],
            "rows": rows,
        }
        path = options.output / f"{options.num_envs}.json"
        write_json(path, content)
        print(f"stored {path}")
    return 0
