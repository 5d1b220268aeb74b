"""The command ``m3po``: one word that names what is done, then that command's own options."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from collections.abc import Sequence

COMMANDS = {
    "train": "train M3PO or PPO on tasks of any suite",
    "play": "evaluate, export, film or show a trained policy",
    "list_tasks": "list every task and task set",
    "replay_nonfinite": "show what a run recorded when its values ceased to be finite",
}
"""Module of :mod:`m3po.cli` with ``run(argv)`` -> what it does."""

SHORT = {"list": "list_tasks", "replay": "replay_nonfinite"}
"""Shorter names."""


def run(argv: Sequence[str]) -> int:
    """Run a command.

    Args:
        argv: Arguments without the program's name; the first one names the command.

    Returns:
        Exit code of the command; 2 if there is no such command.
    """
    names = {module: name for name, module in SHORT.items()}
    usage = "usage: m3po COMMAND [OPTIONS]; m3po COMMAND --help lists the options\n" + "\n".join(
        f"  {names.get(module, module):<8} {what}" for module, what in COMMANDS.items()
    )
    if not argv or argv[0] in ("-h", "--help"):
        print(usage)
        return 0
    if argv[0] == "--version":
        print(f"m3po {importlib.metadata.version('m3po')}")
        return 0
    module = SHORT.get(argv[0], argv[0])
    if module not in COMMANDS:
        print(f"error: unknown command '{argv[0]}'\n{usage}", file=sys.stderr)
        return 2
    return importlib.import_module(f"m3po.cli.{module}").run(list(argv[1:]))


def main() -> None:
    """Entry point of the console command."""
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
