"""Overrides ``agent.a.b=1``: set a field of a configuration tree, after checking that it exists and the value fits."""

from __future__ import annotations

import ast
import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from m3po.config import replacement
from m3po.errors import UserError

TERMS = ("actions", "commands", "curriculum", "events", "observations", "recorders", "rewards", "terminations")
"""Sections of an Isaac Lab environment whose terms are switched off by ``null``."""

_LITERALS = {"true": True, "false": False, "none": None, "null": None}


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
        UserError: If the path does not exist or the value does not fit the present one. Of a field of an earlier
            version, the message says what replaces it.
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
        kind = "RunnerCfg" if isinstance(node, Mapping) else type(node).__name__
        hint = replacement(kind, name) or (f" Did you mean '{close[0]}'?" if close else "")
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
        is_term = where.startswith(tuple(f"env.{section}." for section in TERMS)) and dataclasses.is_dataclass(current)
        if is_term:
            return None
        if hasattr(current, "__dataclass_fields__"):
            raise expects(f"one of its fields to be set instead; it has: {', '.join(_fields(current))}")
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
