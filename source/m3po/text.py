"""Words for messages."""

from __future__ import annotations

from collections.abc import Sequence

MOST = 8
"""Most environments that a message names."""


def listed(environments: Sequence[int]) -> str:
    """Environments by number, the first few of many: ``environments 3, 8 and 12 more``."""
    names = ", ".join(str(index) for index in environments[:MOST])
    more = f" and {len(environments) - MOST} more" if len(environments) > MOST else ""
    return f"environment{'' if len(environments) == 1 else 's'} {names}{more}"
