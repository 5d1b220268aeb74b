"""Trains with every combination of some settings, on one machine or many, and reports the best. Needs Ray.

./isaaclab.sh -p scripts/sweep_ray.py --grid agent.algorithm.desired_kl=0.01,0.03 --output sweep -- --task walker-walk

What follows ``--`` goes to ``scripts/train.py`` as it is. Ray runs as many trainings at once as it has CPUs and GPUs
for; ``--address`` joins the machines of a cluster, each of which has this repository at the same place. What each trial
has reached is kept in ``results.json`` in the output folder, and a trial with a value there is not repeated. The runs
themselves lie below the same folder, on the machine that trained them.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from m3po.cli.arguments import Parser, at_least, guarded
from m3po.errors import UserError
from m3po.manifest import write_json

ROOT = Path(__file__).resolve().parents[1]

INSTALL = "uv pip install --python .venv --no-deps --require-hashes -r requirements-ray.txt"

FILES = {"progress": {}, "evaluations": {"policy": "prior"}}
"""Files of a run that a metric can come from, without ``.csv``, and which of their rows count."""

LOG_LINES = 20
"""Last lines of a failed training that are shown."""


def _parser() -> argparse.ArgumentParser:
    parser = Parser(description="Train with every combination of some settings and report the best.")
    parser.add_argument(
        "--grid",
        type=_axis,
        action="append",
        required=True,
        metavar="FIELD=VALUE,VALUE",
        help="An override and its values; several make a grid.",
    )
    parser.add_argument("--output", type=Path, required=True, help="Folder of the results and of all runs.")
    parser.add_argument(
        "--metric",
        type=_metric,
        default=("progress", "mean_return"),
        metavar="FILE:COLUMN",
        help="What is compared: the last value of a column of progress.csv or evaluations.csv.",
    )
    parser.add_argument("--mode", choices=("max", "min"), default="max", help="Whether more or less is better.")
    parser.add_argument("--cpus", type=at_least(1), default=1, help="CPU cores of a training.")
    parser.add_argument("--gpus", type=float, default=0.0, help="GPUs of a training; a fraction shares one.")
    parser.add_argument("--address", help="Address of a running Ray cluster, or auto (default: this machine alone).")
    parser.add_argument("train", nargs=argparse.REMAINDER, help="-- and the arguments of scripts/train.py.")
    return parser


def _axis(text: str) -> list[str]:
    """Argument type: overrides of one field, one per value."""
    field, equals, values = text.partition("=")
    if not (field and equals and all(values.split(","))):
        raise argparse.ArgumentTypeError(f"expected FIELD=VALUE,VALUE, got '{text}'")
    return [f"{field}={value}" for value in values.split(",")]


def _metric(text: str) -> tuple[str, str]:
    """Argument type: file and column."""
    file, _, column = text.partition(":")
    if file not in FILES or not column:
        raise argparse.ArgumentTypeError(f"expected {' or '.join(f'{name}:COLUMN' for name in FILES)}, got '{text}'")
    return file, column


def run_trial(command: list[str], root: str, folder: str, metric: tuple[str, str]) -> dict[str, Any]:
    """Train once, wherever Ray has put this call.

    Args:
        command: The training, without ``--log_root``.
        root: Folder of the repository.
        folder: Receives the run's folder.
        metric: File and column of the result.

    Returns:
        ``{"value": float, "run": str}``, or ``{"error": str}``.
    """
    done = subprocess.run(
        [sys.executable, *command, "--log_root", folder], cwd=root, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        lines = (done.stdout + done.stderr).splitlines()[-LOG_LINES:]
        return {"error": "\n".join([f"exit code {done.returncode}", *lines])}
    file, column = metric
    path = max(Path(folder).glob(f"**/{file}.csv"), key=lambda found: found.stat().st_mtime, default=None)
    if path is None:
        return {"error": f"the run has no {file}.csv"}
    with open(path, encoding="utf-8", newline="") as table:
        rows = [row for row in csv.DictReader(table) if all(row[k] == v for k, v in FILES[file].items())]
    values = [row[column] for row in rows if row.get(column)]
    return {"value": float(values[-1]), "run": str(path.parent)} if values else {"error": f"no value of {column}"}


def main(argv: list[str]) -> int:
    """Run the trials that have no result yet. Returns 1 if one of them failed."""
    args = _parser().parse_args(argv)
    train = args.train[1:] if args.train[:1] == ["--"] else args.train
    if not train:
        raise UserError("say what to train: -- --task TASK ...")
    trials = {" ".join(overrides): list(overrides) for overrides in itertools.product(*args.grid)}
    output = args.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    settings = {"train": train, "metric": list(args.metric)}
    results = _known(output / "results.json", settings)
    open_trials = {name: overrides for name, overrides in trials.items() if "value" not in results.get(name, {})}
    if open_trials:
        for name, result in _run_all(open_trials, train, output, args):
            results[name] = result
            write_json(output / "results.json", settings | {"trials": results})
            print(f"[m3po] {name}: {result.get('value', 'failed')}", flush=True)
    return _report({name: results[name] for name in trials}, args.mode)


def _known(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Results of an earlier call with the same training and metric."""
    if not path.exists():
        return {}
    stored = json.loads(path.read_text(encoding="utf-8"))
    if {name: stored[name] for name in settings} != settings:
        raise UserError(f"'{path}' holds results of another training or metric; choose another --output.")
    return stored["trials"]


def _run_all(trials: dict[str, list[str]], train: list[str], output: Path, args: argparse.Namespace) -> Any:
    """Names and results of trials, as they finish."""
    try:
        import ray
    except ImportError:
        raise UserError(f"sweeps need Ray, which is not installed: {INSTALL}") from None
    ray.init(address=args.address, log_to_driver=False)
    try:
        remote = ray.remote(run_trial).options(num_cpus=args.cpus, num_gpus=args.gpus, max_retries=3)
        running = {}
        for name, overrides in trials.items():
            command = [str(ROOT / "scripts" / "train.py"), *train, *overrides]
            folder = output / name.replace("/", "_").replace(" ", "+")
            running[remote.remote(command, str(ROOT), str(folder), args.metric)] = name
        while running:
            (first,), _ = ray.wait(list(running), num_returns=1)
            try:
                result = ray.get(first)
            except ray.exceptions.RayError as error:  # its machine is gone for good
                result = {"error": str(error)}
            yield running.pop(first), result
    finally:
        ray.shutdown()


def _report(results: dict[str, dict[str, Any]], mode: str) -> int:
    """Print all trials, the best first. Returns the exit code."""
    done = {name: result for name, result in results.items() if "value" in result}
    for name in sorted(done, key=lambda name: done[name]["value"], reverse=mode == "max"):
        print(f"{done[name]['value']:12.6g}  {name}")
    for name in results.keys() - done.keys():
        print(f"{'failed':>12}  {name}\n{results[name]['error']}", file=sys.stderr)
    if done:
        best = (max if mode == "max" else min)(done, key=lambda name: done[name]["value"])
        print(f"[m3po] best: {best} ({done[best]['value']:.6g}), {done[best]['run']}")
    return 0 if len(done) == len(results) else 1


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
