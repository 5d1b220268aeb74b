"""``--print_config``: the resolved configuration as YAML on standard output, instead of a training."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import enum
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from m3po.cli.job import Job

OPTIONS = ("--print_config", "--print-config")


def add_argument(parser: argparse._ActionsContainer) -> None:
    """Add ``--print_config``, as ``args.print_config``."""
    text = "Print the resolved configuration as YAML and exit; needs neither a GPU nor a run folder."
    parser.add_argument(*OPTIONS, action="store_true", help=text)


def kept_apart(argv: Sequence[str]) -> contextlib.AbstractContextManager[Any]:
    """With the option, what is printed within this context goes to standard error."""
    asked = any(option in argv for option in OPTIONS)
    return contextlib.redirect_stdout(sys.stderr) if asked else contextlib.nullcontext()


def show(job: Job, agent: dict[str, Any]) -> int:
    """Print a job's configuration; the paths below ``agent`` and ``env`` are those of overrides.

    Args:
        job: The checked request.
        agent: Its runner's configuration.

    Returns:
        Exit code 0.
    """
    num_envs = dict(zip(job.names, job.sizes, strict=True))
    head = {"tasks": job.names, "num_envs": num_envs, "algo": job.algo, "agent_entry": job.agent}
    env = job.about().get("configuration", {})  # where the environment can be overridden
    print(yaml.safe_dump(plain(head | {"device": job.device, "agent": agent} | env), sort_keys=False), end="")
    return 0


def plain(value: Any) -> Any:
    """Lists, dictionaries, numbers and strings that stand for a value; code becomes ``module:name``."""
    if isinstance(value, enum.Enum):
        return plain(value.value)
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):  # tensors, arrays and their numbers
        return plain(value.tolist())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if callable(value):
        code = value if hasattr(value, "__qualname__") else type(value)
        return f"{code.__module__}:{code.__qualname__}"
    return None if value is None else str(value)
