"""``./isaaclab.sh -p -m benchmarks COMMAND [OPTIONS]``, from the root of the repository."""

from __future__ import annotations

import importlib
import sys

from m3po.cli.arguments import guarded

COMMANDS = {
    "run": "runner",
    "report": "report",
    "training": "training",
    "planner": "planner",
    "model": "model",
    "dmcontrol": "dmcontrol",
    "metaworld": "metaworld",
    "composition": "composition",
}
"""Command -> module of this package with ``main(argv)``."""


def main(argv: list[str]) -> int:
    """Run a command; without one, list them all with the first line of their documentation."""
    if argv and argv[0] in COMMANDS:
        return guarded(importlib.import_module(f"benchmarks.{COMMANDS[argv[0]]}").main, argv[1:])
    for name, module in COMMANDS.items():
        doc = importlib.import_module(f"benchmarks.{module}").__doc__ or ""
        print(f"{name:<12} {doc.splitlines()[0]}")
    if argv and argv[0] not in ("-h", "--help"):
        print(f"error: unknown benchmark '{argv[0]}'", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
