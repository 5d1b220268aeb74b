"""The configuration that a checkpoint was trained with."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from m3po.cli.overrides import assign, parse_value
from m3po.errors import CheckpointError

CODE_FIELDS = ("class_name", "data_augmentation_func")
"""Fields of a runner configuration whose values rsl_rl imports and calls."""


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
