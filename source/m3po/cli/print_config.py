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

OPTIONS = ("--print_config", "--print-config")


def add_argument(parser: argparse._ActionsContainer) -> None:
    """Add ``--print_config``, as ``args.print_config``."""
    text = "Print the resolved configuration as YAML and exit; needs neither a GPU nor a run folder."
    parser.add_argument(*OPTIONS, action="store_true", help=text)


def kept_apart(argv: Sequence[str]) -> contextlib.AbstractContextManager[Any]:
    """With the option, what is printed within this context goes to standard error."""
    asked = any(option in argv for option in OPTIONS)
    return contextlib.redirect_stdout(sys.stderr) if asked else contextlib.nullcontext()


def show(
    args: argparse.Namespace, agent_entry: str, device: str, num_envs: Mapping[str, int], agent: Any, env: Any = None
) -> int:
    """Print a configuration; the paths below ``agent`` and ``env`` are those of overrides.

    Args:
        args: Options, ``algo`` among them.
        agent_entry: Entry point of the agent's configuration.
        device: Torch device.
        num_envs: Environments by name of the task.
        agent: Runner configuration.
        env: Configuration of the environment, where it can be overridden: that of a single Isaac Lab task.

    Returns:
        Exit code 0.
    """
    head = {"tasks": list(num_envs), "num_envs": num_envs, "algo": args.algo, "agent_entry": agent_entry}
    body = {"device": device, "agent": agent} | ({} if env is None else {"env": env})
    print(yaml.safe_dump(plain(head | body), sort_keys=False), end="")
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
