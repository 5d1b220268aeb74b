"""Learning curves: trainings of arms on experiments, every run a process of its own, resumable, stored as data.

./isaaclab.sh -p -m benchmarks run isaac --seeds 21 22 23
./isaaclab.sh -p -m benchmarks run dmcontrol DMC-MT6 --arms m3po ppo
./isaaclab.sh -p -m benchmarks run ablation --suite ablation
./isaaclab.sh -p -m benchmarks report

``arms.yaml`` says what there is. A run that is stored is not repeated, even if the code has changed since, so that an
interrupted benchmark goes on where it was. One that failed is stored as crashed, with the end of its output.
``learning/<experiment>/<arm>.csv`` holds the curves of all seeds. ``runs.jsonl`` beside it has a line for each run:
command, versions, and the noise-free evaluation at its end.
"""

from __future__ import annotations

import csv
import fcntl
import json
import os
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from benchmarks.processes import ROOT, run_python
from m3po.cli.arguments import Parser, at_least
from m3po.errors import UserError

DATA = ROOT / "benchmarks" / "learning"
ARMS = yaml.safe_load((ROOT / "benchmarks" / "arms.yaml").read_text(encoding="utf-8"))
"""What ``arms.yaml`` says."""

CURVES = {"env_steps": "env_steps", "seconds": "seconds", "mean_step_reward": "reward", "mean_return": "return"}
"""Column of ``progress.csv`` -> that of a stored curve."""

TASK_CURVES = {"task": "task", "env_steps": "env_steps", "seconds": "seconds", "step_reward": "reward"} | {
    name: name for name in ("return", "success")
}
"""Column of ``tasks.csv``, which runs of several tasks have -> that of a stored curve."""

DIAGNOSTICS = (
    "action_std", "plan/gain", "planner/planned_fraction", "planner/realised_gain", "gate/gain", "gate/ppo_budget",
    "gate/plan_budget", "update/ppo_kl", "update/plan_kl", "update/ppo_slope", "update/plan_slope", "model/dynamics_r2",
    "bonus/alpha",
)  # fmt: skip
"""Columns of ``progress.csv`` that are kept of a single task's runs."""

MOST_ROWS = 250
"""Rows of a curve; longer ones are thinned."""


def command(experiment: str, arm: str, seed: int) -> list[str]:
    """Arguments of Python that train an arm, but for the number of iterations."""
    setting, settings = ARMS["experiments"][experiment], ARMS["arms"][arm]
    words = ["scripts/train.py", "--task", setting.get("task", experiment), "--algo", settings.get("algo", "m3po")]
    words += ["--agent", settings["agent"]] if "agent" in settings else []
    words += ["--num_envs", str(setting["num_envs"]), "--seed", str(seed), "--device", "cpu"]
    return [*words, *settings.get("overrides", ()), *settings.get("only_on", {}).get(experiment, ())]


def runs_on(arm: str, experiment: str) -> bool:
    """Whether an arm is meant for an experiment."""
    return experiment in ARMS["arms"][arm].get("only_on", {experiment: ()})


def iterations(experiment: str, arm: str, words: list[str]) -> int:
    """Training iterations that fill the budget of an experiment; the command itself says how long its rollouts are."""
    shown = subprocess.run([sys.executable, *words, "--print_config"], cwd=ROOT, text=True, capture_output=True)
    if shown.returncode != 0:
        raise UserError(f"{' '.join(words)} cannot be trained: {shown.stderr[-1000:]}")
    num_steps = yaml.safe_load(shown.stdout)["agent"]["num_steps_per_env"]
    setting = ARMS["experiments"][experiment]
    budget = setting["env_steps"] * ARMS["arms"][arm].get("longer", 1)
    return max(1, budget // (setting["num_envs"] * num_steps))


def run(experiment: str, arm: str, seed: int) -> None:
    """Train one arm, evaluate what it has learnt without noise, and store both."""
    if any((record["arm"], record["seed"]) == (arm, seed) for record in read_records(DATA / experiment)):
        return
    print(f"[benchmark] {experiment} {arm} seed {seed}", flush=True)
    words = command(experiment, arm, seed)
    count = str(iterations(experiment, arm, words))
    episodes = 2 * ARMS["experiments"][experiment].get("episodes", 10)  # half of them act by plans
    words += ["--max_iterations", count, "--eval_interval", count, "--eval_envs", str(episodes)]
    record = {"arm": arm, "seed": seed, "command": " ".join(words), "num_envs": _value(words, "--num_envs")}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as logs:
        result = run_python([*words, "--log_root", logs])
        found = list(Path(logs).rglob("run.json"))
        if result.returncode != 0 or not found:
            record |= {"crashed": True, "return_code": result.returncode, "output": result.stdout[-2000:]}
            print(f"[benchmark] {experiment} {arm} seed {seed} CRASHED", flush=True)
        else:
            manifest = json.loads(found[0].read_text(encoding="utf-8"))
            record |= {key: manifest[key] for key in ("tasks", "versions", "git")}
            record["evaluation"] = _evaluation(found[0].parent, manifest["tasks"])
            rows = _curves(found[0].parent, manifest["tasks"])
    store(DATA / experiment, record, rows)


def _value(words: list[str], option: str) -> int:
    return int(words[words.index(option) + 1])


def _curves(folder: Path, tasks: list[str]) -> list[dict[str, Any]]:
    """What is kept of the training's tables, thinned."""
    several = (folder / "tasks.csv").is_file() and len(tasks) > 1
    names = TASK_CURVES if several else CURVES | {name: name for name in DIAGNOSTICS}
    rows = _read(folder / ("tasks.csv" if several else "progress.csv"))
    if not several and any(row.get("success") for row in rows) and not tasks[0].startswith("Isaac"):
        names |= {"success": "success"}  # Isaac Lab's tasks call many things so
    kept = []
    for task in tasks if several else [None]:
        own = [row for row in rows if task is None or row["task"] == task]
        step = -(-len(own) // MOST_ROWS)
        kept += [row for i, row in enumerate(own) if (len(own) - 1 - i) % step == 0]
    return [{new: short(row[old]) for old, new in names.items() if row.get(old)} for row in kept]


def _evaluation(folder: Path, tasks: list[str]) -> dict[str, dict[str, dict[str, float]]]:
    """Task -> policy -> figures of the last evaluation."""
    several = (folder / "task_evaluations.csv").is_file()
    names = ("return_mean", "return_std", "length_mean", "termination_rate", "success_rate", "num_episodes", "score")
    found: dict[str, dict[str, dict[str, float]]] = {}
    for row in _read(folder / ("task_evaluations.csv" if several else "evaluations.csv")):
        figures = {name: float(short(row[name])) for name in names if row.get(name)}
        found.setdefault(row.get("task", tasks[0]), {})[row["policy"]] = figures
    return found


def short(text: str) -> str:
    """A number with five digits, a whole number with all of its own, and any other text as it is."""
    try:
        value = float(text)
    except ValueError:
        return text
    return f"{value:.0f}" if value.is_integer() or abs(value) >= 1e5 else f"{value:.5g}"


def _read(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with open(path, encoding="utf-8") as file:
        return list(csv.DictReader(file))


# -- what is stored ---------------------------------------------------------------------------------------------------


def read_records(folder: Path) -> list[dict[str, Any]]:
    """Lines of an experiment's ``runs.jsonl``."""
    path = folder / "runs.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def read_curves(folder: Path, arm: str) -> list[dict[str, str]]:
    """Rows of an arm, of all seeds and tasks."""
    return _read(folder / f"{arm}.csv")


def store(folder: Path, record: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Add a run; several processes may do so at once."""
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        if rows:
            path = folder / f"{record['arm']}.csv"
            rows = _read(path) + [{"seed": str(record["seed"]), **row} for row in rows]
            columns = list(dict.fromkeys(name for row in rows for name in row))
            with open(path, "w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, columns, lineterminator="\n")
                writer.writeheader()
                writer.writerows(sorted(rows, key=lambda row: int(row["seed"])))
        with open(folder / "runs.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def main(argv: list[str]) -> int:
    """Run experiments."""
    parser = Parser(description=__doc__.splitlines()[0])
    known = {**ARMS["groups"], **{name: [name] for name in ARMS["experiments"]}}
    parser.add_argument("experiments", nargs="+", choices=known, metavar="EXPERIMENT", help=", ".join(known))
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--suite", choices=ARMS["suites"], help="Arms to run (default: m3po).")
    what.add_argument("--arms", nargs="+", choices=ARMS["arms"], metavar="ARM", help=", ".join(ARMS["arms"]))
    parser.add_argument("--seeds", nargs="+", type=at_least(0), default=[51, 52, 53])
    parser.add_argument("--processes", type=at_least(1), default=2, help="Runs at once; their order mixes the arms.")
    args = parser.parse_args(argv)
    arms = args.arms or ARMS["suites"].get(args.suite, ["m3po"])
    names = dict.fromkeys(name for wanted in args.experiments for name in known[wanted])
    jobs = [(name, arm, seed) for seed in args.seeds for name in names for arm in arms if runs_on(arm, name)]
    with ThreadPoolExecutor(args.processes) as pool:
        deque(pool.map(lambda job: run(*job), jobs), maxlen=0)
    return 0
