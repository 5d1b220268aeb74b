"""What both training commands share: how a training starts, goes on, and ends."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from m3po.cli.arguments import at_least
from m3po.runners import M3PORunner
from m3po.runners.checkpoint import LAST
from m3po.stopping import INTERRUPTED, Stop


def add_start_arguments(group: argparse._MutuallyExclusiveGroup) -> None:
    """Add the options that say what a training begins with."""
    group.add_argument(
        "--checkpoint", metavar="latest|best|PATH", help="Start a new run with what this checkpoint has learnt."
    )
    group.add_argument(
        "--resume",
        metavar="latest|best|PATH|RUN",
        help="Go on with a run in its own folder, up to --max_iterations in all. RUN is a folder or a --run_name.",
    )


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of what is printed, evaluated and kept."""
    parser.add_argument(
        "--quiet",
        action=argparse.BooleanOptionalAction,
        help="One line per iteration; by default where the output is not a terminal.",
    )
    parser.add_argument(
        "--eval_interval",
        type=at_least(0),
        default=25,
        help="Evaluate every so many iterations, in a process of its own; 0 never does, and keeps no model_best.pt.",
    )
    parser.add_argument(
        "--keep_checkpoints",
        type=at_least(1),
        default=M3PORunner.KEPT,
        help="Newest numbered checkpoints to keep, besides model_last.pt and model_best.pt.",
    )


def report_settings(args: argparse.Namespace) -> dict[str, Any]:
    """These options as fields of a runner's configuration."""
    settings = {name: getattr(args, name) for name in ("eval_interval", "keep_checkpoints")}
    return settings if args.quiet is None else settings | {"quiet": args.quiet}


def train(runner: M3PORunner, run_dir: Path, iterations: int, resumed: Path | None, init_at_random_ep_len: bool) -> int:
    """Train to the end or to a signal, and say which.

    Args:
        runner: Runner.
        run_dir: Folder of the run.
        iterations: Iterations of the run, those before it was resumed included.
        resumed: Checkpoint to resume the run from.
        init_at_random_ep_len: As in :meth:`M3PORunner.learn`.

    Returns:
        Exit code.
    """
    if resumed is not None:
        runner.resume(str(resumed))
        done = runner.current_learning_iteration - runner.first_iteration
        print(f"[m3po] resuming from {resumed}: {done} of {iterations} iterations are done", flush=True)
        if done >= iterations:
            print("[m3po] the run is complete; a larger --max_iterations would go on", flush=True)
        iterations = max(0, iterations - done)
    start = time.perf_counter()
    try:
        runner.learn(iterations, init_at_random_ep_len)
    except Stop as stop:
        path = run_dir / LAST
        word = "interrupted" if stop.exit_code == INTERRUPTED else f"stopped by {stop.signal.name}"
        print(f"\n[m3po] {word}; " + (f"saved {path}" if path.exists() else "nothing was learnt yet"), flush=True)
        return stop.exit_code
    print(f"[m3po] trained for {time.perf_counter() - start:.1f} s; checkpoints in {run_dir}")
    return 0
