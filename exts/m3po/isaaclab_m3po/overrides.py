"""Command-line overrides ``env.a.b=1 agent.c=2 physics=NAME``, checked before anything is built.

Isaac Lab resolves the presets (``physics=``, ``renderer=``, ``presets=`` and paths that select a named alternative).
It sets every other path without asking whether the field exists, so a misspelt field would be ignored in silence;
here such a path is an error that lists what exists.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from m3po.errors import UserError

_SELECTOR = re.compile(r"^(physics|renderer|presets)=.+$")
_ASSIGNMENT = re.compile(r"^(env|agent)(\.[A-Za-z0-9_\-]+)+=", re.ASCII)
_LITERALS = {"true": True, "false": False, "none": None, "null": None}


def resolve_configurations(
    task: str, agent_entry: str, overrides: Sequence[str], play: bool = False
) -> tuple[Any, Any]:
    """Load a task's environment and agent configuration and apply the overrides.

    Args:
        task: Registered task id.
        agent_entry: Key of the agent's entry point in the task's specification.
        overrides: Tokens left over from the command line.
        play: Whether to apply the environment's own play mode.

    Returns:
        Environment and agent configuration.

    Raises:
        UserError: If a token is not an override, or names a preset or field that does not exist, or its value has the
            wrong type.
    """
    from isaaclab_tasks.utils import resolve_task_config
    from isaaclab_tasks.utils.hydra import collect_presets
    from isaaclab_tasks.utils.parse_cfg import load_cfg_from_registry

    for token in overrides:
        if not _SELECTOR.match(token) and not _ASSIGNMENT.match(token):
            raise UserError(
                f"'{token}' is neither an option (see --help) nor an override of the form env.FIELD=VALUE, "
                "agent.FIELD=VALUE, physics=NAME, renderer=NAME or presets=NAME."
            )
    # A string at a path that holds a named choice selects an alternative; that is Isaac Lab's to resolve.
    choices: set[str] = set()
    if any(_ASSIGNMENT.match(token) for token in overrides):
        choices |= set(collect_presets(load_cfg_from_registry(task, "env_cfg_entry_point"), "env"))
        choices |= set(collect_presets(load_cfg_from_registry(task, agent_entry), "agent"))
    selectors, assignments = [], []
    for token in overrides:
        key, text = token.split("=", 1)
        selects = _SELECTOR.match(token) or (key in choices and isinstance(parse_value(text), str))
        (selectors if selects else assignments).append(token)
    try:
        env_cfg, agent_cfg = resolve_task_config(task, agent_entry, play_mode=play, overrides=selectors)
    except ValueError as error:
        raise UserError(str(error)) from error
    roots = {"env": env_cfg, "agent": agent_cfg}
    for token in assignments:
        key, text = token.split("=", 1)
        section, path = key.split(".", 1)
        assign(roots[section], path, parse_value(text), section)
    return env_cfg, agent_cfg


def parse_value(text: str) -> Any:
    """Read a Python literal, ``true``/``false``/``none``/``null`` in any case, or else the text itself."""
    if text.lower() in _LITERALS:
        return _LITERALS[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def assign(root: Any, path: str, value: Any, section: str) -> None:
    """Set an existing field of a configuration tree.

    Args:
        root: Configuration object or dictionary.
        path: Dotted path below it.
        value: New value.
        section: Name of the root, for messages.

    Raises:
        UserError: If the path does not exist or the value does not fit the present one.
    """
    *parents, leaf = path.split(".")
    node, where = root, section
    for name in parents:
        node, where = _child(node, name, where), f"{where}.{name}"
    current = _child(node, leaf, where)
    value = _fit(current, value, _annotation(node, leaf), f"{where}.{leaf}")
    if isinstance(node, dict):
        node[leaf] = value
    else:
        setattr(node, leaf, value)


def _fields(node: Any) -> list[str]:
    """Names below a node of a configuration tree."""
    if isinstance(node, Mapping):
        return [str(key) for key in node]
    return [name for name in getattr(node, "__dict__", {}) if not name.startswith("_")]


def _child(node: Any, name: str, where: str) -> Any:
    """Value below a node; a missing name is the user's mistake."""
    names = _fields(node)
    if name not in names:
        if not names:
            raise UserError(f"unknown override '{where}.{name}': {where} is a single value without fields.")
        close = difflib.get_close_matches(name, names, n=1)
        hint = f" Did you mean '{close[0]}'?" if close else ""
        raise UserError(f"unknown override '{where}.{name}'.{hint} {where} has: {', '.join(names)}.")
    return node[name] if isinstance(node, Mapping) else getattr(node, name)


def _annotation(node: Any, name: str) -> str:
    """Text of a field's annotation; empty for a dictionary's entry, which has none."""
    annotation = getattr(type(node), "__annotations__", {}).get(name, "")
    return getattr(annotation, "__name__", None) or str(annotation)


def _fit(current: Any, value: Any, annotation: str, where: str) -> Any:
    """Convert a value to the kind that the field holds, or say what it expects."""

    def expects(kind: str) -> UserError:
        return UserError(f"override '{where}' expects {kind}, got {value!r}.")

    if value is None:
        if current is not None and annotation and "None" not in annotation and "Optional" not in annotation:
            raise expects(f"a value like {current!r}")
        return None
    if current is None or current is dataclasses.MISSING:
        return value
    if isinstance(current, bool):
        if not isinstance(value, bool):
            raise expects("true or false")
    elif isinstance(current, int) and "float" not in annotation:  # 16 is a legal default of a float field
        if isinstance(value, bool) or not isinstance(value, int):
            raise expects("an integer")
    elif isinstance(current, (int, float)):
        if isinstance(value, str):  # float() also reads inf and nan, which are no Python literals
            try:
                return float(value)
            except ValueError:
                raise expects("a number") from None
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise expects("a number")
        return float(value)
    elif isinstance(current, str):
        if not isinstance(value, str):
            return str(value)
    elif isinstance(current, (list, tuple)):
        if not isinstance(value, (list, tuple)):
            raise expects(f"a list like {list(current)}")
        return type(current)(value)
    elif isinstance(current, Mapping) and isinstance(value, Mapping):
        return value
    elif isinstance(current, Mapping) or hasattr(current, "__dataclass_fields__"):
        raise expects(f"one of its fields to be set instead; it has: {', '.join(_fields(current))}")
    return value
