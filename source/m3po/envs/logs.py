"""Logs of environments, which most of them repeat at every step until they have something new to say."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch


def number(value: Any) -> float:
    """An entry of a log as a number: the mean of several; NaN of anything that holds none."""
    try:
        return float(torch.as_tensor(value).float().mean())
    except (TypeError, ValueError, RuntimeError):
        return math.nan


class NewLogs:
    """Tells new logs from repeated ones.

    Manager-based tasks of Isaac Lab put another dictionary into their extras at a reset, direct tasks other values into
    the same one. Both are new; neither needs the host to wait for the device.
    """

    def __init__(self) -> None:
        """Start without a log."""
        self._last: dict[str, Any] = {}

    def take(self, log: Mapping[str, Any] | None) -> dict[str, Any]:
        """A copy of a log that is new, and nothing where it holds the very values of the last one."""
        found = dict(log or {})
        if found.keys() == self._last.keys() and all(found[key] is self._last[key] for key in found):
            return {}
        self._last = found or self._last
        return found
