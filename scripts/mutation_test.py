"""Whether the tests notice a changed equation: mutmut changes the central modules, one place at a time.

./isaaclab.sh -p scripts/mutation_test.py                    # all modules; about an hour on one core
./isaaclab.sh -p scripts/mutation_test.py returns gates      # some of them

It works on a copy, prints each change that no test noticed, and fails where more than one in twenty was not.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from m3po.cli.arguments import guarded
from m3po.errors import UserError

ROOT = Path(__file__).resolve().parents[1]

INSTALL = "uv pip install --python .venv --no-deps --require-hashes -r requirements-mutation.txt"

MODULES = {
    "returns": ("algorithms/returns", "returns"),
    "policy_loss": ("algorithms/policy_loss", "policy_loss"),
    "bonus": ("algorithms/bonus", "bonus"),
    "objective": ("planning/objective", "objective imagined_returns plan_learning"),
    "planner": ("planning/mppi", "planner"),
    "gates": ("algorithms/gates", "gates hindsight"),
    "hindsight": ("algorithms/hindsight", "hindsight gates plan_learning"),
    "newest_update": ("algorithms/newest_update", "hindsight resume"),
    "plans": ("algorithms/plan_learning", "plan_learning"),
    "model_losses": ("algorithms/model_learning", "world_model"),
    "replay": ("storage/replay", "storage critic_replay"),
    "rollout": ("storage/rollout", "storage"),
}
"""Name -> module below ``source/m3po``, and the tests that are to notice a change."""

MOST_SURVIVORS = 0.05
"""Largest share of changes that may go unnoticed."""

CONFIGURATION = """
[tool.mutmut]
source_paths = ["src"]
only_mutate = ["src/m3po/{module}.py"]
also_copy = ["src", "tests", "exts", "tasks", "scripts"]
pytest_add_cli_args_test_selection = [{tests}]
pytest_add_cli_args = ["-m", "not sim and not learning", "-x"]
"""


def survivors(name: str, folder: Path) -> tuple[int, list[str]]:
    """Mutate a module in an empty folder.

    Args:
        name: Key of :data:`MODULES`.
        folder: Where the copy goes.

    Returns:
        Number of changes, and those that no test noticed, as lines of a diff.

    Raises:
        UserError: If mutmut fails, for example because the tests fail without a change.
    """
    module, tests = MODULES[name]
    # mutmut finds a package by its path below src.
    shutil.copytree(ROOT / "source", folder / "src", ignore=shutil.ignore_patterns("__pycache__"))
    for part in ("tests", "exts", "tasks", "scripts"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    selected = ", ".join(f'"tests/test_{test}.py"' for test in tests.split())
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    configuration = CONFIGURATION.format(module=module, tests=selected)
    (folder / "pyproject.toml").write_text(text + configuration, encoding="utf-8")

    def mutmut(*command: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "mutmut", *command], cwd=folder, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise UserError(f"mutmut {command[0]} failed on {module}:\n{(done.stdout + done.stderr)[-2000:]}")
        return done.stdout

    progress = mutmut("run", "--max-children", str(os.cpu_count()))
    total = int(re.findall(r"(\d+)/\d+ ", progress)[-1])
    left = re.findall(r"(\S+): (?:survived|no tests)", mutmut("results"))
    return total, [f"{key}\n{_changed(mutmut('show', key))}" for key in left]


def _changed(diff: str) -> str:
    """The changed lines of a diff, without its head."""
    return "\n".join(line for line in diff.splitlines() if re.match(r"[-+](?![-+])", line))


def main(argv: list[str]) -> int:
    """Mutate modules one after the other. Returns 1 where too many changes went unnoticed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", help=f"Modules; all by default: {', '.join(MODULES)}.")
    args = parser.parse_args(argv)
    unknown = sorted(set(args.modules) - set(MODULES))
    if unknown:
        raise UserError(f"unknown module {', '.join(unknown)}. There are: {', '.join(MODULES)}.")
    if importlib.util.find_spec("mutmut") is None:
        raise UserError(f"mutmut is not installed: {INSTALL}")
    totals = []
    for name in args.modules or MODULES:
        with tempfile.TemporaryDirectory() as folder:
            total, left = survivors(name, Path(folder))
        totals.append((total, len(left)))
        print(f"{name}: {total} changes, {len(left)} unnoticed", flush=True)
        for text in left:
            print(f"  {text.replace(chr(10), chr(10) + '    ')}", flush=True)
    total, left = (sum(column) for column in zip(*totals, strict=True))
    print(f"all: {total} changes, {left} unnoticed")
    return int(left > MOST_SURVIVORS * total)


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
