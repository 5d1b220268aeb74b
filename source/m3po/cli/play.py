"""Playing: ``scripts/play.py`` and ``isaaclab play --rl_library m3po``."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import m3po
from m3po.cli.arguments import Parser, at_least, guarded
from m3po.cli.film import require_packages
from m3po.cli.job import Job, add_task_arguments, resolve_checkpoint
from m3po.cli.suite_job import kind_of_job
from m3po.cli.trained_agent import trained_agent
from m3po.errors import CheckpointError, UserError
from m3po.evaluation import capped_score, evaluate
from m3po.evaluation_process import SEED_OFFSET, acting_cfg, policies_of
from m3po.export import export_policy
from m3po.manifest import git_revision, package_versions, write_json
from m3po.runners import M3PORunner
from m3po.runners.checkpoint import BEST, read_checkpoint


def run(argv: Sequence[str], kind: type[Job] | None = None) -> int:
    """Play as the command line says.

    Args:
        argv: Arguments without the program's name.
        kind: Kind of the job; ``None``: what the tasks need.

    Returns:
        Exit code: 0, 2 for a user's mistake, 130 when interrupted.
    """
    return guarded(lambda arguments: _main(arguments, kind or kind_of_job(arguments)), argv)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(description="Evaluate, export, record or show a trained policy.")
    add_task_arguments(parser)
    _add_arguments(parser)
    parser.add_argument(
        "--num_episodes",
        type=at_least(1),
        help="Episodes of each task, spread evenly over its environments (default: one each; --viz: until Ctrl-C).",
    )
    parser.add_argument("--train_env_cfg", action="store_true", help="Keep what the task switches off for playing.")
    parser.add_argument("--video_length", type=at_least(1), help="Frames of the video (default: up to one episode).")
    return parser


class Outputs(NamedTuple):
    """Where the results go; ``None`` for what was not asked for."""

    result: Path
    """JSON file of the evaluation."""

    export: Path | None
    """Folder of the exported policy."""

    video: Path | None
    """mp4 file."""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that :func:`_choose_outputs` reads, and those that say which policy acts."""
    parser.add_argument(
        "--checkpoint",
        metavar="latest|best|PATH",
        help="Of the newest run of the task: its best checkpoint where it has one, else its latest (default).",
    )
    parser.add_argument("--policy", choices=("prior", "planner"), default="prior", help="Policy that acts.")
    parser.add_argument("--output", type=Path, metavar="PATH", help="JSON file of the result.")
    parser.add_argument("--export", nargs="?", const="", metavar="DIR", help="Write the prior as TorchScript and ONNX.")
    parser.add_argument("--video", nargs="?", const="", metavar="PATH", help="Record an mp4.")


def _choose_outputs(args: argparse.Namespace, checkpoint: Path) -> Outputs:
    """Choose where everything goes, beside the checkpoint by default, and check that it can be written.

    Args:
        args: Options of :func:`_add_arguments`.
        checkpoint: File of the checkpoint.

    Raises:
        UserError: If a folder cannot be created or written to.
    """
    stem = f"play_{checkpoint.stem}_{args.policy}"
    outputs = Outputs(
        result=args.output or checkpoint.with_name(f"{stem}.json"),
        export=None if args.export is None else Path(args.export or checkpoint.with_name("exported")),
        video=None if args.video is None else Path(args.video or checkpoint.with_name(f"{stem}.mp4")),
    )
    folders = [outputs.result.parent, outputs.export, outputs.video and outputs.video.parent]
    for folder in filter(None, folders):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot create the folder '{folder}': {error.strerror}.") from error
        if not os.access(folder, os.W_OK):
            raise UserError(f"cannot write to the folder '{folder}'.")
    return outputs


def check_policy(policy: str, train_cfg: dict[str, Any]) -> None:
    """Raise ``UserError`` if a runner configuration has no such policy to play."""
    if policy not in policies_of(train_cfg):
        raise UserError(
            "this run trained no world model, so that there is no planner; use --policy prior, or train with "
            "--algo m3po."
        )


def _main(argv: list[str], kind: type[Job]) -> int:
    """Check everything, then simulate."""
    job = kind.read(_parser(), argv, play=True)
    args = job.args
    if args.policy == "planner" and job.algo != "m3po":
        raise UserError(f"algorithm '{job.algo}' has no planner; use --policy prior.")
    if args.export is not None:
        require_packages("--export", "export", "onnx", "onnxruntime")
    if args.video is not None:
        require_packages("--video", "video", "imageio_ffmpeg")
        job.require_video()
    checkpoint = (resolve_checkpoint(job, args.checkpoint) if args.checkpoint else _newest(job)).resolve()
    outputs = _choose_outputs(args, checkpoint)
    agent = trained_agent(read_checkpoint(checkpoint, "cpu"), job.train_cfg, job.overrides)
    if agent is None:
        raise CheckpointError(f"'{checkpoint}' does not carry the configuration of its networks.")
    own = {name: job.train_cfg[name] for name in ("task", "algo", "seed")}
    job.train_cfg = acting_cfg(agent | own | {"device": job.device})
    check_policy(args.policy, job.train_cfg)
    tasks = ", ".join(f"{name} x {size}" for name, size in zip(job.names, job.sizes, strict=True))
    print(f"[m3po] tasks ({len(job.names)}): {tasks}")
    print(f"[m3po] algorithm: {job.algo}, policy: {args.policy}, seed: {job.seed}, device: {job.device}")
    for line in job.chosen():
        print(f"[m3po] {line}")
    print(f"[m3po] checkpoint: {checkpoint}")
    _play(job, checkpoint, outputs)
    return 0


def _newest(job: Job) -> Path:
    """Best checkpoint of the newest run, or its latest where nothing was evaluated."""
    latest = resolve_checkpoint(job, "latest")
    best = latest.with_name(BEST)
    return resolve_checkpoint(job, str(best)) if best.is_file() else latest


def _play(job: Job, checkpoint: Path, outputs: Outputs) -> None:
    """Simulate, and do what was asked for with the policy; with a viewer and no number of episodes, until Ctrl-C."""
    args = job.args
    viewer = getattr(args, "visualizer", None)
    with contextlib.ExitStack() as stack:
        env = stack.enter_context(job.environments(job.sizes, job.seed + SEED_OFFSET, outputs.result.parent))
        runner = M3PORunner(env, job.runner_cfg(env), log_dir=None, device=job.device)
        runner.load(str(checkpoint), load_cfg={"actor": True})
        if outputs.export is not None:
            for name, difference in export_policy(runner, outputs.export).items():
                print(f"[m3po] exported {outputs.export / name}: largest difference from torch {difference:.1e}")
        hooks = []
        if outputs.video is not None:
            hooks = [stack.enter_context(film) for film in job.films(env, outputs.video)]
        if viewer:
            hooks.append(_pace(env.unwrapped.step_dt))
        policy = runner.inference_policy(args.policy)
        episodes = args.num_episodes or max(job.sizes)
        while True:
            result = _with_scores(job, evaluate(env, policy, episodes, lambda: [hook() for hook in hooks]))
            _print(result, args.policy, episodes)
            _write(outputs.result, job, checkpoint, result, episodes)
            if args.num_episodes or not viewer:
                return


def _pace(seconds: float) -> Callable[[], None]:
    """Make a hook that holds the simulation back to real time for people who watch.

    Args:
        seconds: Simulated time of a step.
    """
    due = time.monotonic()

    def wait() -> None:
        nonlocal due
        due = max(due + seconds, time.monotonic())
        time.sleep(due - time.monotonic() if due > time.monotonic() else 0.0)

    return wait


def _with_scores(job: Job, result: dict[str, Any]) -> dict[str, Any]:
    """Reduce the result to what holds for several tasks and for one: the tasks' own, and the scores over them."""
    if "tasks" in result:
        tasks = result["tasks"]
    else:
        info = job.infos[0]
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


def _print(result: dict[str, Any], policy: str, episodes: int) -> None:
    """Print one row per task, and the scores over them."""
    tasks = result["tasks"]
    print(f"[m3po] {policy}, {episodes} episodes of each task (return: mean +- std)")
    wide = max(len("task"), *map(len, tasks))
    print(f"{'task':<{wide}}{'return':>24}{'length':>9}{'terminated':>12}{'success':>9}{'score':>8}")
    for name, task in tasks.items():
        returns = f"{task['return_mean']:.2f} +- {task['return_std']:.2f}"
        success = "-" if task["success_rate"] is None else f"{task['success_rate']:.1%}"
        score = f"{task['score']:.3f}" if "score" in task else "-"
        ended = f"{task['termination_rate']:.1%}"
        print(f"{name:<{wide}}{returns:>24}{task['length_mean']:>9.1f}{ended:>12}{success:>9}{score:>8}")
    if "score_mean" in result:
        lowest = f"lowest {result['score_min']:.3f} ({result['score_min_task']})"
        print(f"[m3po] mean score of {result['score_tasks']} tasks {result['score_mean']:.3f}, {lowest}")
    print(f"[m3po] speed: {result['steps_per_second']:,.0f} environment steps/s", flush=True)


def _write(path: Path, job: Job, checkpoint: Path, result: dict[str, Any], episodes: int) -> None:
    """Write the result with what it takes to repeat it."""
    about = {name: value for name, value in job.about().items() if name != "configuration"}
    content = {
        "command": sys.orig_argv[1:],
        "algorithm": job.algo,
        "policy": job.args.policy,
        "checkpoint": str(checkpoint),
        "num_episodes": episodes,
        "num_envs": job.sizes,
        "seed": job.seed,
        "device": job.device,
        "overrides": job.overrides,
        "train_env_cfg": job.args.train_env_cfg,
        "versions": package_versions(job.versions),
        "git": git_revision(Path(m3po.__file__)),
        **about,
        **result,
    }
    write_json(path, content)
    print(f"[m3po] result: {path}", flush=True)
