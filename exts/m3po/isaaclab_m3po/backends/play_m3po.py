"""Playing: ``scripts/play.py`` and ``isaaclab play --rl_library m3po``."""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from m3po.cli import playing
from m3po.cli.arguments import at_least, guarded
from m3po.errors import UserError

from .. import launch, video

DEFAULT_NUM_ENVS = 32
"""Environments, unless the command line says otherwise."""


def run(argv: Sequence[str]) -> int:
    """Play as the command line says.

    Args:
        argv: Arguments without the program's name.

    Returns:
        Exit code: 0, 2 for a user's mistake, 130 when interrupted.
    """
    return guarded(_main, argv)


def _parser() -> argparse.ArgumentParser:
    """Options of playing; those shared with training come from :mod:`isaaclab_m3po.launch`."""
    parser = argparse.ArgumentParser(description="Evaluate, export, record or show a trained policy.")
    launch.add_common_arguments(parser)
    playing.add_arguments(parser)
    parser.add_argument(
        "--num_episodes",
        type=at_least(1),
        help="Episodes, spread evenly over the environments (default: one each; with --viz, until Ctrl-C).",
    )
    parser.add_argument("--train_env_cfg", action="store_true", help="Keep what the task switches off for playing.")
    parser.add_argument("--video_length", type=at_least(1), default=300, help="Frames of the video.")
    return parser


def _main(argv: list[str]) -> int:
    """Check everything, then simulate."""
    request = launch.parse(_parser(), argv)
    num_envs, request.args.num_envs = request.args.num_envs, None  # the training's sizes are checked, not this one
    job = launch.prepare(request, play=not request.args.train_env_cfg)
    args = job.args
    if num_envs is None and not any(token.startswith("env.scene.num_envs=") for token in job.overrides):
        num_envs = DEFAULT_NUM_ENVS
    if num_envs is not None:
        job.env_cfg.scene.num_envs = num_envs
    if args.policy == "planner" and job.algo != "m3po":
        raise UserError(f"algorithm '{job.algo}' has no planner; use --policy prior.")
    checkpoint = (launch.resolve_checkpoint(job, args.checkpoint) if args.checkpoint else _newest(job)).resolve()
    train_cfg = _train_cfg(job, checkpoint)
    playing.check_policy(args.policy, train_cfg)
    outputs = playing.choose_outputs(args, checkpoint)
    if args.export is not None:
        playing.require("--export", "export", "onnx", "onnxruntime")
    if args.video is not None:
        playing.require("--video", "video", "imageio_ffmpeg")
        video.require_rendering()
        video.add_camera(job.env_cfg)
    print(f"[m3po] task: {job.task}, algorithm: {job.algo}, policy: {args.policy}, seed: {job.agent_cfg.seed}")
    print(f"[m3po] device: {job.device}, environments: {job.env_cfg.scene.num_envs}")
    print(f"[m3po] assets: {job.assets}")
    print(f"[m3po] checkpoint: {checkpoint}")
    return _play(job, checkpoint, train_cfg, outputs)


def _newest(job: launch.Job) -> Path:
    """Best checkpoint of the newest run, or its latest where nothing was evaluated."""
    from m3po.runners.checkpoint import BEST

    latest = launch.resolve_checkpoint(job, "latest")
    best = latest.with_name(BEST)
    return launch.resolve_checkpoint(job, str(best)) if best.is_file() else latest


def _train_cfg(job: launch.Job, checkpoint: Path) -> dict[str, Any]:
    """Runner configuration whose networks are those of the checkpoint; see :func:`.playing.trained_agent`."""
    from m3po.evaluation_process import acting_cfg
    from m3po.runners.checkpoint import read_checkpoint

    agent = playing.trained_agent(read_checkpoint(checkpoint, "cpu"), job.train_cfg(), job.overrides)
    if agent is None:
        print(f"[m3po] the checkpoint does not carry its configuration: its agent is assumed to be {job.agent_entry}")
        return acting_cfg(job.train_cfg())
    job.agent_cfg.clip_actions = agent["clip_actions"]
    own = {"task": job.task, "algo": job.algo, "device": job.device, "seed": job.agent_cfg.seed}
    return acting_cfg(agent | own)


def _play(job: launch.Job, checkpoint: Path, train_cfg: dict[str, Any], outputs: playing.Outputs) -> int:
    """Simulate, and do what was asked for with the policy."""
    from m3po.runners import M3PORunner

    with launch.environment(job) as env:
        runner = M3PORunner(env, train_cfg, log_dir=None, device=job.device)
        runner.load(str(checkpoint), load_cfg={"actor": True})
        if outputs.export is not None:
            _export(runner, outputs.export)
        frames = contextlib.nullcontext()
        if outputs.video is not None:
            frames = video.VideoWriter(env, outputs.video, job.args.video_length)
        with frames as recorder:
            _evaluate(job, runner, checkpoint, recorder, outputs.result)
        if recorder is not None:
            print(f"[m3po] video: {recorder.path} ({recorder.count} frames)")
    return 0


def _evaluate(job: launch.Job, runner: Any, checkpoint: Path, recorder: video.VideoWriter | None, output: Path) -> None:
    """Run the episodes, print and write the result; with a viewer and no number of episodes, until interrupted."""
    from m3po.evaluation import evaluate

    args, env = job.args, runner.env
    policy = runner.inference_policy(args.policy)
    hooks = [recorder.capture] if recorder is not None else []
    if args.visualizer:
        hooks.append(_pace(env.unwrapped.step_dt))
    while True:
        result = evaluate(env, policy, args.num_episodes or env.num_envs, lambda: [hook() for hook in hooks])
        _print(result, args.policy)
        _write(output, job, checkpoint, result)
        if args.num_episodes or not args.visualizer:
            return


def _export(runner: Any, folder: Path) -> None:
    """Export the prior and say how well the files agree with torch."""
    from m3po.export import export_policy

    for name, difference in export_policy(runner, folder).items():
        print(f"[m3po] exported {folder / name}: largest difference from torch {difference:.1e}")


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


def _print(result: dict[str, Any], policy: str) -> None:
    """Print the statistics of an evaluation."""
    success = "not reported" if result["success_rate"] is None else f"{result['success_rate']:.1%}"
    print(f"[m3po] {policy}, {result['num_episodes']} episodes (mean +- standard deviation)")
    print(f"  return       {result['return_mean']:.3f} +- {result['return_std']:.3f}")
    print(f"  length       {result['length_mean']:.1f} +- {result['length_std']:.1f} steps")
    print(f"  terminations {result['termination_rate']:.1%}")
    print(f"  success      {success}")
    print(f"  speed        {result['steps_per_second']:,.0f} environment steps/s", flush=True)


def _write(path: Path, job: launch.Job, checkpoint: Path, result: dict[str, Any]) -> None:
    """Write the result with what it takes to repeat it."""
    from m3po.manifest import package_versions, write_json

    content = {
        "task": job.task,
        "algorithm": job.algo,
        "policy": job.args.policy,
        "checkpoint": str(checkpoint),
        "seed": job.agent_cfg.seed,
        "device": job.device,
        "num_envs": job.env_cfg.scene.num_envs,
        "overrides": job.overrides,
        "train_env_cfg": job.args.train_env_cfg,
        "assets": job.assets.mode,
        "versions": package_versions(),
        **result,
    }
    write_json(path, content)
    print(f"[m3po] result: {path}", flush=True)
