"""What playing a single Isaac Lab task and playing tasks of suites share: where results go, and whose networks act."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from m3po.cli.overrides import assign, parse_value
from m3po.errors import CheckpointError, UserError
from m3po.evaluation_process import policies_of

CODE_FIELDS = ("class_name", "data_augmentation_func")
"""Fields of a runner configuration whose values rsl_rl imports and calls."""


class Outputs(NamedTuple):
    """Where the results go; ``None`` for what was not asked for."""

    result: Path
    """JSON file of the evaluation."""

    export: Path | None
    """Folder of the exported policy."""

    video: Path | None
    """mp4 file."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that :func:`choose_outputs` reads, and those that say which policy acts."""
    parser.add_argument(
        "--checkpoint",
        metavar="latest|best|PATH",
        help="Of the newest run of the task: its best checkpoint where it has one, else its latest (default).",
    )
    parser.add_argument("--policy", choices=("prior", "planner"), default="prior", help="Policy that acts.")
    parser.add_argument("--output", type=Path, metavar="PATH", help="JSON file of the result.")
    parser.add_argument("--export", nargs="?", const="", metavar="DIR", help="Write the prior as TorchScript and ONNX.")
    parser.add_argument("--video", nargs="?", const="", metavar="PATH", help="Record an mp4.")


def choose_outputs(args: argparse.Namespace, checkpoint: Path) -> Outputs:
    """Choose where everything goes, beside the checkpoint by default, and check that it can be written.

    Args:
        args: Options of :func:`add_arguments`.
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


def require(option: str, extra: str, *modules: str) -> None:
    """Check that the packages of an optional dependency are installed, before anything is simulated."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise UserError(f"{option} needs {' and '.join(missing)}, which the extra m3po[{extra}] installs.")


def check_policy(policy: str, train_cfg: dict[str, Any]) -> None:
    """Raise ``UserError`` if a runner configuration has no such policy to play."""
    if policy not in policies_of(train_cfg):
        raise UserError(
            "this run trained no world model, so that there is no planner; use --policy prior, or train with "
            "--algo m3po."
        )


def trained_agent(content: dict[str, Any], own: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any] | None:
    """Runner configuration of the run that wrote a checkpoint, with a command line's ``agent.`` overrides on top.

    That run may have used other overrides than the command line, or another device's preset.

    Args:
        content: The checkpoint.
        own: Runner configuration that the command line asks for.
        overrides: Tokens ``agent.X=VALUE``; others are ignored.

    Returns:
        The configuration, or ``None`` if the checkpoint does not carry it.

    Raises:
        CheckpointError: If the checkpoint names code that is neither rsl_rl's nor named by ``own``: a file from
            elsewhere must not choose what is imported here.
    """
    text = content.get("m3po", {}).get("agent")
    if text is None:
        return None
    agent = json.loads(text)
    # a plain name is one of rsl_rl's own; others say which module is imported
    foreign = {name for name in _code_names(agent) if not name.isidentifier()} - set(_code_names(own))
    if foreign:
        names = ", ".join(f"'{name}'" for name in sorted(foreign))
        raise CheckpointError(f"The checkpoint names code that this agent does not use: {names}. It needs its --agent.")
    for token in overrides:
        key, text = token.split("=", 1)
        if key.startswith("agent."):
            assign(agent, key.removeprefix("agent."), parse_value(text), "agent")
    return agent


def _code_names(values: Any) -> Iterator[str]:
    """Names of code anywhere in a configuration."""
    if isinstance(values, dict):
        for key, value in values.items():
            if key in CODE_FIELDS and value is not None:
                yield str(value)
            else:
                yield from _code_names(value)
