"""Classes that a configuration names."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from rsl_rl.utils import resolve_callable


def resolve_class(cfg: Mapping[str, Any]) -> tuple[type, dict[str, Any]]:
    """The class of ``cfg["class_name"]``, and a copy of the rest: its arguments.

    rsl_rl has this function since 5.5; mjlab needs an older one.
    """
    arguments = copy.deepcopy(dict(cfg))
    found: Any = resolve_callable(arguments.pop("class_name"))  # rsl_rl types it as any function
    return found, arguments
