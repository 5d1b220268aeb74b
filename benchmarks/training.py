"""Speed of training: environment steps per second, where the time goes and peak memory, M3PO against PPO.

./isaaclab.sh -p -m benchmarks training --task Isaac-Ant-v0 --num_envs 64 128 256 512 1024 --rounds 3

Every run is a process of its own, one at a time; a round runs every algorithm and environment count once, each round
beginning elsewhere, so that a drift of the machine spreads over all of them. Both algorithms have rollouts of the same
length. How much M3PO plans is up to its gates; the column ``planned`` tells the share of the environments.

``<output>/<task>-<device>/<algorithm>-<num_envs>-<round>.json`` holds the times of every iteration of a run. A run that
is stored already is not repeated, even if the code has changed since; one that failed is stored as crashed, with the
end of its output. To repeat a run, delete its file. ``<output>/<task>-<device>.json`` and ``.png`` show the figures
that are printed: medians over the iterations of a run, and then over the runs.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shlex
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from benchmarks.processes import ROOT, run_python
from m3po.cli.arguments import Parser, at_least
from m3po.errors import UserError

ALGORITHMS = ("m3po", "ppo")
PARTS = {"physics": "#6b7280", "act": "#93c5fd", "policy": "#1d4ed8", "plan": "#c2410c", "model": "#fdba74"}
"""Parts of an iteration that ``progress.csv`` times in a column ``time_<part>`` -> colour; the rest is ``other``."""

OTHER = "other"
"""Storing, statistics, returns and all else; also a part that this version does not time apart."""

CRITERION = "planning + model learning cost no more than the rest of the iteration together"


class Job(NamedTuple):
    """One run to be made."""

    algorithm: str
    """Name of :data:`ALGORITHMS`."""

    num_envs: int
    """Environments simulated at once."""

    round: int
    """Round, counted from 1; also the seed."""

    command: tuple[str, ...]
    """Arguments of Python."""

    path: Path
    """Where the run is stored."""


def make_jobs(args: argparse.Namespace, folder: Path) -> list[Job]:
    """All runs in their order: every round runs every algorithm and count once, each round beginning elsewhere."""
    pairs = [(algorithm, num_envs) for num_envs in args.num_envs for algorithm in ALGORITHMS]
    jobs = []
    for index in range(args.rounds):
        start = index * len(pairs) // args.rounds
        for algorithm, num_envs in pairs[start:] + pairs[:start]:
            options = {
                "--task": args.task,
                "--algo": algorithm,
                "--num_envs": num_envs,
                "--max_iterations": args.iterations,
                "--device": args.device,
                "--seed": index + 1,
                "--eval_interval": 0,
            }
            own = args.overrides if algorithm == "m3po" else []
            command = ["scripts/train.py", *(str(part) for option in options.items() for part in option), *own]
            command.append(f"agent.num_steps_per_env={args.num_steps}")  # the last override of a field wins
            path = folder / f"{algorithm}-{num_envs}-{index + 1}.json"
            jobs.append(Job(algorithm, num_envs, index + 1, tuple(command), path))
    return jobs


def run(job: Job, num_steps: int) -> dict[str, Any]:
    """Make a run and store it, unless it is stored.

    Returns:
        The stored record.

    Raises:
        UserError: If the run was refused as a mistake, or another command's run is stored in its place.
    """
    command = shlex.join(job.command)
    if job.path.exists():
        record = json.loads(job.path.read_text(encoding="utf-8"))
        if record["command"] != command:
            raise UserError(f"'{job.path}' holds a run of another command; delete it or choose another --output.")
        return record
    print(f"[benchmark] {job.algorithm}, {job.num_envs} environments, round {job.round}", flush=True)
    record = {
        "algorithm": job.algorithm,
        "num_envs": job.num_envs,
        "num_steps": num_steps,
        "round": job.round,
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "load": os.getloadavg()[0],  # runs of somebody else on the same cores
        "cores": os.cpu_count(),
    }
    with tempfile.TemporaryDirectory() as folder:
        result = run_python([*job.command, "--log_root", folder])
        lines = result.stdout.splitlines()
        complaint = next((line for line in reversed(lines) if line.startswith("error: ")), None)
        if result.returncode == 2 and complaint is not None:
            raise UserError(complaint.removeprefix("error: "))
        found = next(Path(folder).rglob("progress.csv"), None)
        record |= {"return_code": result.returncode, "peak_memory_mib": round(result.peak_memory_mib, 1)}
        if result.returncode != 0 or found is None:
            record |= {"crashed": True, "output": result.stdout[-2000:]}
            print(f"[benchmark] CRASHED with exit code {result.returncode}, see {job.path}", flush=True)
        else:
            manifest = json.loads((found.parent / "run.json").read_text(encoding="utf-8"))
            kept = ("versions", "git", "device", "torch_threads", "physics")
            record["manifest"] = {name: manifest[name] for name in kept if name in manifest}
            record["preset"] = next((line for line in lines if line.startswith("[m3po] preset: ")), None)
            record["iterations"] = _read(found)
    job.path.parent.mkdir(parents=True, exist_ok=True)
    job.path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


def _read(path: Path) -> dict[str, list[float]]:
    """Columns of a ``progress.csv`` that say what an iteration cost, all iterations."""
    with open(path, encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    kept = [
        name for name in rows[0] if name.startswith("time_") or name in ("planner/planned_fraction", "gpu_memory_mib")
    ]
    return {name: [float(row[name]) for row in rows] for name in kept}


def figures(record: dict[str, Any], warmup: int) -> dict[str, Any]:
    """Medians of one run over its iterations, without the first ``warmup``."""
    columns = {name: values[warmup:] for name, values in record["iterations"].items()}
    totals = [collect + update for collect, update in zip(columns["time_collect"], columns["time_update"], strict=True)]
    parts = {part: columns[f"time_{part}"] for part in PARTS if f"time_{part}" in columns}
    parts[OTHER] = [total - sum(timed) for total, *timed in zip(totals, *parts.values(), strict=True)]
    to_ms_per_step = 1000 / record["num_steps"]
    return {
        "steps_per_second": record["num_envs"] * record["num_steps"] / median(totals),
        "ms_per_step": median(totals) * to_ms_per_step,
        "split_ms": {part: median(values) * to_ms_per_step for part, values in parts.items()},
        "planned": median(columns.get("planner/planned_fraction", [0.0])),
        "peak_memory_mib": record["peak_memory_mib"],
        "gpu_memory_mib": max(columns.get("gpu_memory_mib", [0.0])),
    }


def summarise(records: list[dict[str, Any]], warmup: int) -> list[dict[str, Any]]:
    """One row per environment count and algorithm: medians over the runs, and the largest memory."""
    groups: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault((record["num_envs"], record["algorithm"]), []).append(record)
    rows = []
    for (num_envs, algorithm), runs in sorted(groups.items()):
        good = [figures(run, warmup) for run in runs if not run.get("crashed")]
        row = {"algorithm": algorithm, "num_envs": num_envs, "runs": len(good), "crashed": len(runs) - len(good)}
        if good:
            speeds = [run["steps_per_second"] for run in good]
            split = {part: median(run["split_ms"][part] for run in good) for part in good[0]["split_ms"]}
            row |= {
                "steps_per_second": median(speeds),
                "slowest": min(speeds),
                "fastest": max(speeds),
                "ms_per_step": median(run["ms_per_step"] for run in good),
                "split_ms": split,
                "planned": median(run["planned"] for run in good),
                "peak_memory_mib": max(run["peak_memory_mib"] for run in good),
                "gpu_memory_mib": max(run["gpu_memory_mib"] for run in good),
            }
            if algorithm == "m3po" and "model" in split:
                extra = split["plan"] + split["model"]
                row["extra_to_rest"] = extra / (sum(split.values()) - extra)
        rows.append(row)
    ppo = {row["num_envs"]: row["steps_per_second"] for row in rows if row["algorithm"] == "ppo" and row["runs"]}
    for row in rows:
        if row["runs"] and row["num_envs"] in ppo:
            row["ratio_to_ppo"] = row["steps_per_second"] / ppo[row["num_envs"]]
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text: one line each, then whether :data:`CRITERION` holds."""
    names = [*PARTS, OTHER]
    head = f"{'envs':>6} {'algorithm':10}{'steps/s':>9}{'slowest-fastest':>17}{'ms/step':>9}{'x PPO':>7}"
    lines = [head + "".join(f"{name:>9}" for name in names) + f"{'planned':>9}{'MiB':>8}{'GPU MiB':>9}"]
    for row in rows:
        crashed = f"  ({row['crashed']} crashed)" if row["crashed"] else ""
        text = f"{row['num_envs']:>6} {row['algorithm']:10}"
        if row["runs"]:
            total = sum(row["split_ms"].values())
            shares = {name: value / total for name, value in row["split_ms"].items()}
            spread = f"{row['slowest']:.0f}-{row['fastest']:.0f}"
            ratio = f"{row['ratio_to_ppo']:.2f}" if "ratio_to_ppo" in row else "-"
            text += f"{row['steps_per_second']:>9.0f}{spread:>17}{row['ms_per_step']:>9.2f}{ratio:>7}"
            text += "".join(f"{shares[name]:>9.1%}" if name in shares else f"{'-':>9}" for name in names)
            gpu = f"{row['gpu_memory_mib']:.0f}" if row["gpu_memory_mib"] else "-"
            text += f"{row['planned']:>9.0%}{row['peak_memory_mib']:>8.0f}{gpu:>9}"
        lines.append(text + crashed)
    answers = [
        f"{row['num_envs']} environments {'yes' if row['extra_to_rest'] <= 1 else 'NO'} ({row['extra_to_rest']:.2f})"
        for row in rows
        if "extra_to_rest" in row
    ]
    lines.append(f"{CRITERION}: {', '.join(answers) or 'not measured'}")
    missing = [part for part in PARTS if any(part not in row["split_ms"] for row in rows if row["runs"])]
    if missing:
        lines.append(f"not timed apart by this version, contained in '{OTHER}': {', '.join(missing)}")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Speed against the number of environments, and what one environment step is spent on."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [row for row in rows if row["runs"]]
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), constrained_layout=True)
    for algorithm, colour in zip(ALGORITHMS, ("#c2410c", "#1d4ed8"), strict=True):
        own = [row for row in rows if row["algorithm"] == algorithm]
        x, y = [row["num_envs"] for row in own], [row["steps_per_second"] for row in own]
        spread = [[row["steps_per_second"] - row["slowest"] for row in own]]
        spread.append([row["fastest"] - row["steps_per_second"] for row in own])
        left.errorbar(x, y, spread, color=colour, marker="o", capsize=3, label=algorithm)
    left.set_xscale("log", base=2)
    counts = sorted({row["num_envs"] for row in rows})
    left.set_xticks(counts, counts)
    left.set(xlabel="environments", ylabel="environment steps/s", title=title, ylim=(0, None))
    left.legend()

    labels = [f"{row['algorithm']}\n{row['num_envs']}" for row in rows]
    bottom = [0.0] * len(rows)
    for part, colour in {**PARTS, OTHER: "#e5e7eb"}.items():
        heights = [1000 * row["split_ms"].get(part, 0.0) / row["num_envs"] for row in rows]
        right.bar(labels, heights, bottom=bottom, color=colour, label=part)
        bottom = [below + height for below, height in zip(bottom, heights, strict=True)]
    right.set(ylabel="microseconds per environment step", title="where they go")
    right.legend()
    figure.savefig(path, dpi=90)
    plt.close(figure)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    count = at_least(1)
    parser.add_argument("--task", required=True, help="Isaac Lab task, for example Isaac-Ant-v0.")
    parser.add_argument("--num_envs", nargs="+", type=count, default=[64, 128, 256, 512, 1024], metavar="N")
    parser.add_argument("--num_steps", type=count, default=16, help="Steps per rollout of both algorithms.")
    parser.add_argument("--iterations", type=count, default=20, help="Iterations of a run.")
    parser.add_argument(
        "--warmup",
        type=at_least(0),
        default=5,
        help="First iterations that do not count: kernels compile, and the planner is still off.",
    )
    parser.add_argument("--rounds", type=count, default=3, help="Runs of each algorithm and count, interleaved.")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N.")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "training", help="Folder of the results.")
    parser.add_argument("--overrides", nargs="+", default=[], metavar="FIELD=VALUE", help="Overrides of M3PO's runs.")
    return parser


def main(argv: list[str]) -> int:
    """Run what is not stored, and report."""
    args = _parser().parse_args(argv)
    if args.warmup >= args.iterations:
        raise UserError(f"--warmup ({args.warmup}) must be below --iterations ({args.iterations}).")
    try:
        args.output.mkdir(parents=True, exist_ok=True)  # before the first run, not after it
    except OSError as error:
        raise UserError(f"cannot write the folder '{args.output}': {error.strerror}.") from error
    args.num_envs = sorted(set(args.num_envs))
    name = f"{args.task}-{args.device.replace(':', '')}"
    records = [run(job, args.num_steps) for job in make_jobs(args, args.output / name)]
    rows = summarise(records, args.warmup)
    counted = f"iterations {args.warmup + 1}-{args.iterations} of {args.rounds} run(s)"
    title = f"{args.task}, {args.device}, {args.num_steps} steps per rollout, {counted}"
    preset = next((record["preset"] for record in records if record.get("preset")), None)
    versions = next((record["manifest"]["versions"] for record in records if "manifest" in record), None)
    report = {
        "title": title,
        "command": shlex.join(["-m benchmarks training", *argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions,
        "preset": preset,
        "warmup": args.warmup,
        "figures": rows,
    }
    (args.output / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    plot(rows, f"{args.task}, {args.device}", args.output / f"{name}.png")
    loads = [record["load"] for record in records]
    print(f"\n{title}\n{preset or ''}\n{table(rows)}")
    print(f"load of the machine when the runs began: {min(loads):.1f}-{max(loads):.1f}, {os.cpu_count()} cores")
    return 0
