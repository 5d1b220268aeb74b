"""What composing tasks costs: the batch of several tasks against each task stepped alone, as tasks are added.

./isaaclab.sh -p -m benchmarks composition --step_ms 5 --num_envs 64 --output benchmarks/composition.json

Without ``--tasks`` they are synthetic, of different sizes, with a physics of about ``--step_ms`` each. For 1, 2,
4, ... tasks it times the step of all of them in four ways, in this process and in worker processes: by hand, one call
after the other (workers: all started, then all waited for), and composed. Rounds are interleaved; times are medians
over them. The overhead is the time that the composed step spends outside of the tasks' own steps over the time
inside, both of the same step, so that it hardly depends on who else uses the machine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
from rsl_rl.env import VecEnv
from tensordict import TensorDict

from benchmarks.planner_report import machine
from m3po.cli.arguments import Parser, at_least
from m3po.envs.multi_task import MultiTaskVecEnv, TaskEnv
from m3po.envs.subproc_env import SubprocVecEnv
from m3po.envs.suite import expand, find_task
from m3po.manifest import git_revision, package_versions

WAYS = ("alone", "composed", "workers", "workers composed")
"""How the tasks' steps are timed, in this order."""

PHYSICS_WIDTH = 64
"""Columns of the synthetic physics' state."""


class SyntheticEnv(VecEnv):
    """Environments whose physics is a number of matrix products; episodes have 500 steps."""

    def __init__(self, num_envs: int, obs_dim: int, num_actions: int, work: int, seed: int, device: str) -> None:
        """Create the environments.

        Args:
            num_envs: Number of environments.
            obs_dim: Observation dimensions, at most :data:`PHYSICS_WIDTH`.
            num_actions: Action dimensions, at most :data:`PHYSICS_WIDTH`.
            work: Matrix products per step.
            seed: Seed of the physics and of where in their episodes the environments are.
            device: Torch device.
        """
        self.num_envs, self.num_actions, self.device = num_envs, num_actions, device
        self.obs_dim, self.work, self.max_episode_length, self.cfg = obs_dim, work, 500, SimpleNamespace()
        generator = torch.Generator().manual_seed(seed)
        self.matrix = (torch.randn(PHYSICS_WIDTH, PHYSICS_WIDTH, generator=generator) / PHYSICS_WIDTH**0.5).to(device)
        self.state = torch.zeros(num_envs, PHYSICS_WIDTH, device=device)
        self.episode_length_buf = torch.randint(500, (num_envs,), generator=generator).to(device)

    def get_observations(self) -> TensorDict:
        """Group ``policy``, (N, O)."""
        return TensorDict({"policy": self.state[:, : self.obs_dim]}, batch_size=[self.num_envs])

    def step(self, actions: torch.Tensor) -> tuple[TensorDict, torch.Tensor, torch.Tensor, dict[str, Any]]:
        """Move on, and reset the environments whose episode is over."""
        state = self.state.clone()
        state[:, : self.num_actions] += actions
        for _ in range(self.work):
            state = torch.tanh(state @ self.matrix)
        self.episode_length_buf += 1
        dones = self.episode_length_buf >= self.max_episode_length
        final = TensorDict({"policy": state[:, : self.obs_dim]}, batch_size=[self.num_envs])
        self.state = state.masked_fill(dones[:, None], 0.0)
        self.episode_length_buf.masked_fill_(dones, 0)
        return self.get_observations(), state[:, 0], dones, {"time_outs": dones, "final_obs": final}

    def close(self) -> None:
        """Nothing is held."""


def make_task(task: str, num_envs: int, seed: int, device: str) -> VecEnv:
    """A suite's task; the factory of its workers."""
    suite, name = find_task(task)
    return suite.make(name, num_envs, seed=seed, device=device)


def calibrate(step_ms: float, num_envs: int, device: str) -> int:
    """Matrix products that last about as long as asked for."""
    work, seconds, clock = 1, 0.0, Clock(device)
    while seconds < 0.02:
        work *= 2
        env = SyntheticEnv(num_envs, 1, 1, work, 0, device)
        actions = torch.zeros(num_envs, 1, device=device)
        seconds = min(clock.time(lambda env=env, actions=actions: env.step(actions), 1)[0] for _ in range(3))
    return max(1, round(work * step_ms / 1e3 / seconds))


def specifications(options: argparse.Namespace) -> list[tuple[str, str, dict[str, Any]]]:
    """Name, factory and arguments of each task."""
    common = {"num_envs": options.num_envs, "device": options.device}
    if options.tasks:
        names = expand(",".join(options.tasks))
        return [(name, "benchmarks.composition:make_task", {"task": name, **common}) for name in names]
    work = calibrate(options.step_ms, options.num_envs, options.device)
    return [
        (
            f"synthetic-{k}",
            "benchmarks.composition:SyntheticEnv",
            {"obs_dim": 12 + 8 * (k % 4), "num_actions": 2 + k % 4, "work": work, **common},
        )
        for k in range(options.max_tasks)
    ]


class Clock:
    """Time spent in the tasks' own steps."""

    def __init__(self, device: str) -> None:
        """Start at 0."""
        self.device, self.seconds = device, 0.0

    def watch(self, env: VecEnv) -> None:
        """Count the steps of an environment."""
        for name in ("step_async", "step_wait") if hasattr(env, "step_async") else ("step",):
            setattr(env, name, self._watched(getattr(env, name)))

    def _watched(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            start = time.perf_counter()
            result = function(*arguments)
            self._synchronize()
            self.seconds += time.perf_counter() - start
            return result

        return call

    def time(self, step: Callable[[], Any], count: int) -> tuple[float, float]:
        """Seconds per call, and of these the seconds in the tasks' own steps."""
        self.seconds, start = 0.0, time.perf_counter()
        for _ in range(count):
            step()
        self._synchronize()
        return (time.perf_counter() - start) / count, self.seconds / count

    def _synchronize(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize()


@contextlib.contextmanager
def task_envs(specs: list[tuple[str, str, dict[str, Any]]]) -> Iterator[tuple[list[VecEnv], list[SubprocVecEnv]]]:
    """All tasks, in this process and in workers."""
    factories = {"SyntheticEnv": SyntheticEnv, "make_task": make_task}
    with contextlib.ExitStack() as stack:
        workers = [SubprocVecEnv(name, factory, values, seed=k) for k, (name, factory, values) in enumerate(specs)]
        for worker in workers:
            stack.callback(worker.close)
            stack.callback(worker.stop)  # the last callback comes first: all are told before one is waited for
        here = [factories[factory.split(":")[1]](**values, seed=k) for k, (_, factory, values) in enumerate(specs)]
        for env in here:
            stack.callback(env.close)
        yield here, [worker.connect() for worker in workers]


def make_steps(here: list[VecEnv], workers: list[SubprocVecEnv], device: str) -> dict[str, Callable[[], Any]]:
    """What is timed, by way."""
    batches = [
        MultiTaskVecEnv([TaskEnv(str(k), env) for k, env in enumerate(envs)], device) for envs in (here, workers)
    ]
    actions = 2 * torch.rand(batches[0].num_envs, batches[0].num_actions, device=device) - 1
    parts = actions.split([env.num_envs for env in here])
    parts = [part[:, : env.num_actions].contiguous() for part, env in zip(parts, here, strict=True)]

    def step_alone() -> None:
        for env, part in zip(here, parts, strict=True):
            env.step(part)

    def step_workers() -> None:
        for env, part in zip(workers, parts, strict=True):
            env.step_async(part)
        for env in workers:
            env.step_wait()

    composed = [lambda batch=batch: batch.step(actions) for batch in batches]
    return dict(zip(WAYS, (step_alone, composed[0], step_workers, composed[1]), strict=True))


def measure(
    steps: dict[str, Callable[[], Any]], num_tasks: int, clock: Clock, options: argparse.Namespace
) -> dict[str, Any]:
    """Times of all ways."""
    seconds: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    with torch.inference_mode():
        for step in steps.values():
            clock.time(step, 5)
        for index in range(options.rounds):
            start = index % len(WAYS)
            for way in WAYS[start:] + WAYS[:start]:
                seconds[way].append(clock.time(steps[way], options.steps))
    result: dict[str, Any] = {"num_tasks": num_tasks}
    result |= {f"{way} [ms]": 1e3 * median(wall for wall, _ in values) for way, values in seconds.items()}
    for way in ("composed", "workers composed"):
        result[f"{way} overhead"] = median(wall / inside - 1 for wall, inside in seconds[way])
        result[f"{way} per task [us]"] = 1e6 * median(wall - inside for wall, inside in seconds[way]) / num_tasks
    return result | {"seconds": seconds}


def print_row(row: dict[str, Any]) -> None:
    """A line of the table."""
    text = f"{row['num_tasks']:5}"
    for base, way, width in (("alone", "composed", 10), ("workers", "workers composed", 12)):
        text += f"{row[f'{base} [ms]']:{width}.3f}{row[f'{way} [ms]']:10.3f}"
        text += f"{row[f'{way} overhead']:10.1%}{row[f'{way} per task [us]']:9.0f}"
    print(text, flush=True)


def main(argv: list[str]) -> int:
    """Time, print and store."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--tasks", nargs="+", metavar="TASK", help="Tasks or sets of the installed suites, instead of synthetic ones.")
    add("--step_ms", type=float, default=5.0, help="Duration of a synthetic task's step, milliseconds.")
    add("--max_tasks", type=at_least(1), default=8, help="Largest number of synthetic tasks.")
    add("--num_envs", type=at_least(1), default=64, help="Environments of each task.")
    add("--steps", type=at_least(1), default=4, help="Steps of a timing.")
    add("--rounds", type=at_least(1), default=51, help="Rounds; each times every way once.")
    add("--device", default="cpu", help="cpu, or a CUDA device.")
    add("--output", type=Path, help="File of the results, as JSON.")
    options = parser.parse_args(argv)
    specs, rows = specifications(options), []
    counts = [2**i for i in range(len(specs).bit_length())]
    print(f"{'tasks':>5}{'alone':>10}{'composed':>10}{'overhead':>10}{'us/task':>9}", end="")
    print(f"{'workers':>12}{'composed':>10}{'overhead':>10}{'us/task':>9}   (ms per step of all tasks)")
    clock = Clock(options.device)
    with task_envs(specs) as (here, workers):
        for env in (*here, *workers):
            clock.watch(env)
        for count in counts:
            steps = make_steps(here[:count], workers[:count], options.device)
            rows.append(measure(steps, count, clock, options))
            print_row(rows[-1])
    if options.output is not None:
        result = {
            "command": "-m benchmarks composition " + " ".join(argv),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": package_versions(),
            "git": git_revision(Path(__file__)),
            "machine": machine(torch.device(options.device)),
            "tasks": [name for name, _, _ in specs],
            "rows": rows,
        }
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0
