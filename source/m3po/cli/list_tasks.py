"""``scripts/list_tasks.py``: every task and task set of every suite, without starting any."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from m3po.cli.arguments import Parser, guarded
from m3po.envs.suite import Suite, TaskInfo, named_sets, suites
from m3po.errors import M3POError, UserError


def run(argv: Sequence[str]) -> int:
    """List what the command line asks for.

    Args:
        argv: Arguments without the program's name.

    Returns:
        Exit code: 0, 2 for a user's mistake.
    """
    return guarded(_main, argv)


def _main(argv: list[str]) -> int:
    parser = Parser(description="List all tasks and task sets: sizes, length of an episode, score, installed or not.")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--suite", metavar="NAME", help="Only this suite.")
    which.add_argument("--set", metavar="NAME", help="Only the tasks of this set.")
    parser.add_argument("--json", action="store_true", help="Print JSON.")
    args = parser.parse_args(argv)
    if args.suite is not None:
        _check_name("suite", args.suite, suites())
    if args.set is not None:
        _check_name("set", args.set, named_sets())
    content = catalogue(args.suite, args.set)
    print(json.dumps(content, indent=2) if args.json else "\n".join(_lines(content)))
    return 0


def catalogue(only_suite: str | None = None, only_set: str | None = None) -> dict[str, Any]:
    """All tasks and sets, or those of one suite or of one set. Nothing is started; backends may be missing.

    Returns:
        ``suites``: by name, ``install``: the command that installs the backend, ``None`` where it is installed, and
        ``tasks``: the fields of :class:`~m3po.envs.suite.TaskInfo` for each. ``sets``: names of tasks by name of the
        set.
    """
    sets = {only_set: named_sets()[only_set]} if only_set else named_sets()
    chosen = suites()
    if only_suite is not None:
        chosen = {only_suite: chosen[only_suite]}
        sets = chosen[only_suite].sets()
    names = {name: suite.tasks() for name, suite in chosen.items()} if only_set is None else _by_suite(sets[only_set])
    listed = {
        name: {"install": suites()[name].missing(), "tasks": _infos(suites()[name], names[name])} for name in names
    }
    return {"suites": listed, "sets": {name: list(tasks) for name, tasks in sets.items()}}


def _by_suite(tasks: Iterable[str]) -> dict[str, list[str]]:
    """Canonical names of a set's tasks by suite."""
    names: dict[str, list[str]] = {}
    for name in tasks:
        suite, task = _find(name)
        names.setdefault(suite.name, []).append(task)
    return names


def _find(name: str) -> tuple[Suite, str]:
    """Suite and canonical name of a task; unlike :func:`m3po.envs.suite.find_task`, its backend may be missing."""
    for suite in suites().values():
        if (task := suite.resolve(name)) is not None:
            return suite, task
    raise M3POError(f"a set names the task '{name}', which no suite knows.")


def _infos(suite: Suite, tasks: Iterable[str]) -> list[dict[str, Any]]:
    """What is known of tasks. Isaac Lab prints and warns while it reads theirs; none of that is ours to show."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [dataclasses.asdict(suite.info(task)) for task in tasks]


def _check_name(kind: str, name: str, known: Iterable[str]) -> None:
    if name not in known:
        raise UserError(f"unknown {kind} '{name}'. There are: {', '.join(sorted(known))}.")


def _lines(content: dict[str, Any]) -> Iterable[str]:
    """The text: a table per suite, then the sets."""
    for name, suite in content["suites"].items():
        state = "installed" if suite["install"] is None else f"not installed: {suite['install']}"
        yield f"{name}: {len(suite['tasks'])} tasks, {state}"
        if suite["tasks"]:
            yield from _table([TaskInfo(**task) for task in suite["tasks"]])
        yield ""
    wide = max(map(len, content["sets"]), default=0)
    for name, tasks in content["sets"].items():
        parts = ", ".join(f"{len(names)} of {suite}" for suite, names in _by_suite(tasks).items())
        yield f"set {name:<{wide}}{len(tasks):>4} tasks: {parts}"


def _table(tasks: Sequence[TaskInfo]) -> Iterable[str]:
    wide = max(len("task"), *(len(task.name) for task in tasks))
    yield f"  {'task':<{wide}}{'observations':>14}{'actions':>9}{'steps':>7}  score"
    for task in tasks:
        obs, actions = ("-" if size is None else size for size in (task.obs_dim, task.action_dim))
        yield f"  {task.name:<{wide}}{obs:>14}{actions:>9}{task.episode_length:>7}  {_score(task)}"


def _score(task: TaskInfo) -> str:
    if task.reports_success:
        return "success"
    return "-" if task.score_range is None else "return {:g} to {:g}".format(*task.score_range)
