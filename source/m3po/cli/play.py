"""``scripts/play.py`` for task suites and several tasks."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from rsl_rl.env import VecEnv

import m3po
from m3po.cli import playing, suite_job
from m3po.cli.arguments import Parser, at_least, guarded
from m3po.cli.train import SUITE_PACKAGES
from m3po.envs.suite import find_task, suites
from m3po.errors import CheckpointError, UserError
from m3po.evaluation import capped_score, evaluate
from m3po.evaluation_process import SEED_OFFSET, acting_cfg
from m3po.export import export_policy
from m3po.manifest import git_revision, package_versions, write_json
from m3po.runners import M3PORunner
from m3po.runners.checkpoint import BEST, check_compatible, read_checkpoint

NUM_EPISODES = 10
"""Episodes of each task, and environments that play them, unless the command line says otherwise."""


class Camera(Protocol):
    """What a suite's ``camera(env)`` returns, a context manager: it films the first environment of a batch."""

    size: tuple[int, int]
    """Width and height, pixels."""

    frames_per_second: float
    """Pictures per second that show the simulation in real time, one per step."""

    def frame(self) -> np.ndarray:
        """The environment as it is now, uint8 (height, width, 3)."""


def run(argv: Sequence[str]) -> int:
    """Play as the command line says.

    Args:
        argv: Arguments without the program's name.

    Returns:
        Exit code: 0, 2 for a user's mistake, 130 when interrupted.
    """
    return guarded(_main, argv)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(description="Evaluate, export or record a policy that was trained on tasks of any suite.")
    suite_job.add_common_arguments(parser)
    parser.set_defaults(num_envs_per_task=NUM_EPISODES)
    playing.add_arguments(parser)
    parser.add_argument("--num_episodes", type=at_least(1), default=NUM_EPISODES, help="Episodes of each task.")
    parser.add_argument("--video_length", type=at_least(1), help="Frames of the video (default: one episode).")
    return parser


def _main(argv: list[str]) -> int:
    """Check everything, then simulate."""
    job = suite_job.prepare(_parser(), argv)
    args = job.args
    if args.policy == "planner" and args.algo != "m3po":
        raise UserError(f"algorithm '{args.algo}' has no planner; use --policy prior.")
    if args.export is not None:
        playing.require("--export", "export", "onnx", "onnxruntime")
    if args.video is not None:
        playing.require("--video", "video", "imageio_ffmpeg")
        _require_cameras(job)
    checkpoint = (suite_job.resolve_checkpoint(job, args.checkpoint) if args.checkpoint else _newest(job)).resolve()
    content = read_checkpoint(checkpoint, "cpu")
    check_compatible(checkpoint, content, algorithm=args.algo)
    agent = playing.trained_agent(content, job.train_cfg, job.overrides)
    if agent is None:
        raise CheckpointError(f"'{checkpoint}' does not carry the configuration of its networks.")
    train_cfg = acting_cfg(agent | {name: job.train_cfg[name] for name in ("task", "algo")} | {"seed": job.seed})
    playing.check_policy(args.policy, train_cfg)
    outputs = playing.choose_outputs(args, checkpoint)
    tasks = ", ".join(f"{name} x {size}" for name, size in zip(job.names, job.sizes, strict=True))
    print(f"[m3po] tasks ({len(job.names)}): {tasks}")
    print(f"[m3po] algorithm: {args.algo}, policy: {args.policy}, seed: {job.seed}, device: {job.device}")
    print(f"[m3po] checkpoint: {checkpoint}")
    _play(job, checkpoint, train_cfg, outputs)
    return 0


def _newest(job: suite_job.SuiteJob) -> Path:
    """Best checkpoint of the newest run, or its latest where nothing was evaluated."""
    latest = suite_job.resolve_checkpoint(job, "latest")
    best = latest.with_name(BEST)
    return best if best.is_file() else latest


def _require_cameras(job: suite_job.SuiteJob) -> None:
    """Check that all tasks can be filmed, before any is started."""
    for name in job.names:
        suite, _ = find_task(name)
        if not hasattr(suite, "camera"):
            able = ", ".join(suite.name for suite in suites().values() if hasattr(suite, "camera"))
            raise UserError(f"--video cannot film task '{name}': of the suites, only these have a camera: {able}.")
    if job.args.processes == "all":
        raise UserError("--video films tasks in this process; leave out --processes all.")


def _play(job: suite_job.SuiteJob, checkpoint: Path, train_cfg: dict[str, Any], outputs: playing.Outputs) -> None:
    """Simulate, and do what was asked for with the policy."""
    args = job.args
    with contextlib.ExitStack() as stack:
        env = stack.enter_context(
            suite_job.environments(job, job.sizes, job.seed + SEED_OFFSET, log_dir=outputs.result.parent)
        )
        runner = M3PORunner(env, train_cfg, log_dir=None, device=job.device)
        runner.load(str(checkpoint), load_cfg={"actor": True})
        if outputs.export is not None:
            for name, difference in export_policy(runner, outputs.export).items():
                print(f"[m3po] exported {outputs.export / name}: largest difference from torch {difference:.1e}")
        hooks = []
        if outputs.video is not None:
            hooks = [stack.enter_context(film) for film in _films(job, env, outputs.video)]
        policy = runner.inference_policy(args.policy)
        result = evaluate(env, policy, args.num_episodes, lambda: [hook() for hook in hooks])
    result = _with_scores(job, result)
    _print(result, args)
    _write(outputs.result, job, checkpoint, result)


def _with_scores(job: suite_job.SuiteJob, result: dict[str, Any]) -> dict[str, Any]:
    """Reduce the result to what holds for several tasks and for one: the tasks' own, and the scores over them."""
    if "tasks" in result:
        tasks = result["tasks"]
    else:
        (info,) = job.infos
        tasks = {info.name: {name: value for name, value in result.items() if name != "steps_per_second"}}
        if result["success_rate"] is not None:
            tasks[info.name]["score"] = result["success_rate"]
        elif info.score_range is not None:
            tasks[info.name]["score"] = capped_score(result["return_mean"], info.score_range)
    summary: dict[str, Any] = {"steps_per_second": result["steps_per_second"]}
    scores = {name: task["score"] for name, task in tasks.items() if "score" in task}
    if scores:
        worst = min(scores, key=scores.__getitem__)
        summary |= {"score_mean": sum(scores.values()) / len(scores)}
        summary |= {"score_min": scores[worst], "score_min_task": worst, "score_tasks": len(scores)}
    return {**summary, "tasks": tasks}


def _print(result: dict[str, Any], args: argparse.Namespace) -> None:
    """Print one row per task, and the scores over them."""
    tasks = result["tasks"]
    print(f"[m3po] {args.policy}, {args.num_episodes} episodes of each task (return: mean +- standard deviation)")
    wide = max(len("task"), *map(len, tasks))
    print(f"{'task':<{wide}}{'return':>24}{'length':>9}{'success':>9}{'score':>8}")
    for name, task in tasks.items():
        returns = f"{task['return_mean']:.2f} +- {task['return_std']:.2f}"
        success = "-" if task["success_rate"] is None else f"{task['success_rate']:.1%}"
        score = f"{task['score']:.3f}" if "score" in task else "-"
        print(f"{name:<{wide}}{returns:>24}{task['length_mean']:>9.1f}{success:>9}{score:>8}")
    if "score_mean" in result:
        lowest = f"lowest {result['score_min']:.3f} ({result['score_min_task']})"
        print(f"[m3po] mean score of {result['score_tasks']} tasks {result['score_mean']:.3f}, {lowest}")
    print(f"[m3po] speed: {result['steps_per_second']:,.0f} environment steps/s", flush=True)


def _write(path: Path, job: suite_job.SuiteJob, checkpoint: Path, result: dict[str, Any]) -> None:
    """Write the result with what it takes to repeat it."""
    args = job.args
    content = {
        "command": sys.orig_argv[1:],
        "algorithm": args.algo,
        "policy": args.policy,
        "checkpoint": str(checkpoint),
        "num_episodes": args.num_episodes,
        "num_envs": job.sizes,
        "seed": job.seed,
        "device": job.device,
        "overrides": job.overrides,
        "versions": package_versions(SUITE_PACKAGES),
        "git": git_revision(Path(m3po.__file__)),
        **result,
    }
    write_json(path, content)
    print(f"[m3po] result: {path}", flush=True)


# -- video ------------------------------------------------------------------------------------------------------------


def _films(
    job: suite_job.SuiteJob, env: VecEnv, path: Path
) -> Iterator[contextlib.AbstractContextManager[Callable[[], None]]]:
    """A film of the first environment of each task; of several tasks, their names are appended to the files' name."""
    batches = [member.env for member in env.members] if job.multi_task else [env]
    for info, batch in zip(job.infos, batches, strict=True):
        suite, _ = find_task(info.name)
        file = path.with_stem(f"{path.stem}_{info.name}") if len(batches) > 1 else path
        # The state after the last step of an episode is the first of the next one.
        yield _film(suite.camera(batch), file, job.args.video_length or info.episode_length - 1)


@contextlib.contextmanager
def _film(camera: Camera, path: Path, num_frames: int) -> Iterator[Callable[[], None]]:
    """Write an mp4 file; yields what appends the present picture, and does nothing after ``num_frames``."""
    import imageio_ffmpeg

    count = 0

    def capture() -> None:
        nonlocal count
        if count < num_frames:
            file.send(camera.frame().tobytes())
            count += 1

    with camera:
        file = imageio_ffmpeg.write_frames(str(path), camera.size, fps=camera.frames_per_second, quality=7)
        file.send(None)
        try:
            yield capture
        finally:
            file.close()
    print(f"[m3po] video: {path} ({count} frames)")
