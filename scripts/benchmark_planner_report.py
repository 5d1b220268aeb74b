"""What the planner benchmark says: figures from raw times, the issue's targets, a table and a roofline picture."""

from __future__ import annotations

import os
import platform
import re
import statistics
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from m3po.manifest import package_versions

Row = dict[str, Any]
PACKAGES = ("tensordict", "torchrl", "pytorch-mppi", "triton", "numpy")
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_tile", "amx_int8", "amx_bf16")
OURS_F32 = ("ours-compiled", "ours-eager")
OURS_BF16 = ("ours-triton", "ours-bf16")
RIVALS = ("tdmpc2", "tdmpc2-compiled", "tdmpc2-native", "official")
SPEEDUPS = {"float32": {16: 2.5, 256: 3.5}, "bfloat16": {16: 5.0, 256: 7.5}}
"""Targets: how many times faster than TD-MPC2's batched planner in float32, by environments."""


def versions() -> dict[str, str | None]:
    """Versions of everything that decides a time."""
    return package_versions(PACKAGES)


def machine(device: torch.device) -> dict[str, Any]:
    """Processor, its matrix instructions, threads, and how busy it is; the accelerator's name."""
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    flags = re.search(r"^flags\s*: (.*)$", text, re.MULTILINE)
    known = set(flags[1].split()) if flags else set()
    return {
        "cpu": model[1] if model else platform.processor(),
        "flags": [flag for flag in FLAGS if flag in known],
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "accelerator": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }


def figures(rows: list[Row], basis: str) -> None:
    """Add to each row what follows from its median time.

    Args:
        rows: Rows of ``measure``; those of the matmul peak at the same number of environments set the limit.
        basis: ``cpu_s`` or ``wall_s``, the clock that counts.
    """
    for row in rows:
        row["time_s"] = statistics.median(row[basis])
        row["flop_per_s"] = row["flops"] / row["time_s"]
    limits = {(r["contestant"], r["num_envs"]): r["flop_per_s"] for r in rows}
    for row in rows:
        if row["contestant"].startswith("matmul"):
            continue
        row["ms_per_env"] = 1e3 * row["time_s"] / row["num_envs"]
        row["env_plans_per_s"] = row["num_envs"] / row["time_s"]
        row["intensity"] = row["flops"] / row["bytes"]
        row["peak_fraction"] = row["flop_per_s"] / limits[f"matmul-{row['dtype']}", row["num_envs"]]


def targets(rows: list[Row], options: Namespace, machine: dict[str, Any]) -> list[Row]:
    """Hold the figures against the issue's targets.

    Args:
        rows: Rows with figures.
        options: The command line; the targets are set for one model and budget.
        machine: The machine; the bfloat16 targets need AMX.

    Returns:
        Per target its text, what is required, what was measured (``None`` if it was not) and the verdict.
    """
    at = {(r["contestant"], r["num_envs"]): r for r in rows}
    found: list[Row] = []

    def add(text: str, required: float, measured: float | None, at_most: bool = False, applies: bool = True) -> None:
        verdict = "not measured"
        if measured is not None:
            verdict = "reached" if (measured <= required if at_most else measured >= required) else "missed"
            verdict = verdict if applies else f"would be {verdict}, does not apply here"
        found.append({"target": text, "required": required, "measured": measured, "verdict": verdict})

    def best(names: tuple[str, ...], n: int) -> Row | None:
        return next((at[name, n] for name in names if (name, n) in at), None)

    budget = (options.samples, options.iterations, options.horizon)
    if options.device != "cpu":
        row = best((*OURS_BF16, *OURS_F32), 4096)
        applies = options.size == "1M" and budget == (64, 2, 3)
        add("ms per step of 4096 environments, 1M, 64 x 2", 10.0, row and 1e3 * row["time_s"], True, applies)
        return found
    applies = options.size == "5M" and budget == (64, 2, 3)
    for dtype, names in (("float32", OURS_F32), ("bfloat16", OURS_BF16)):
        amx = dtype == "float32" or "amx_bf16" in machine["flags"]
        for n, required in SPEEDUPS[dtype].items():
            mine = best(names, n)
            for rival in RIVALS:
                other = at.get((rival, n))
                if rival == "tdmpc2" or other:
                    ratio = other["time_s"] / mine["time_s"] if mine and other else None
                    note = "" if amx else " (target needs AMX)"
                    add(f"{dtype} against {rival} at {n}{note}, times", required, ratio, applies=applies and amx)
    for n in (16, 256):
        row = best(OURS_F32, n)
        add(f"float32 at {n}, share of the sgemm peak", 0.6, row and row["peak_fraction"], applies=applies)
    name = next((name for name in OURS_F32 if (name, 16) in at and (name, 1024) in at), None)
    per_env = [r["ms_per_env"] for (key, n), r in at.items() if key == name and 16 <= n <= 1024]
    flatness = max(per_env) / min(per_env) - 1.0 if per_env else None
    add("time per environment from 16 to 1024, spread", 0.15, flatness, at_most=True, applies=applies)
    return found


def write_table(result: dict[str, Any]) -> str:
    """The result as text: a row per contestant and number of environments, ratios, targets, and what is missing."""
    rows, names = result["rows"], {key: c["label"] for key, c in result["contestants"].items()}
    at = {(r["contestant"], r["num_envs"]): r for r in rows}
    s, clock = result["settings"], {"cpu_s": "CPU time", "wall_s": "wall-clock time"}[result["basis"]]
    lines = [
        f"\n{s['size']} model, {s['samples']} samples x {s['iterations']} iterations, horizon {s['horizon']}, "
        f"{s['elites']} elites, {s['prior_samples']} policy trajectories; medians of {s['rounds']} rounds, {clock}",
        f"{'contestant':36}{'envs':>6}{'ms/env':>9}{'plans/s':>9}{'MFLOP/env':>11}{'GFLOP/s':>9}{'of peak':>9}"
        f"{'MiB':>9}",
    ]
    for row in rows:
        key, n = row["contestant"], row["num_envs"]
        if key in names:
            text = f"{names[key]:36}{n:>6}{row['ms_per_env']:>9.3g}{row['env_plans_per_s']:>9.4g}"
            text += f"{1e-6 * row['flops'] / n:>11.4g}{1e-9 * row['flop_per_s']:>9.4g}{row['peak_fraction']:>9.1%}"
            lines.append(text + f"{row['peak_bytes'] / 2**20:>9.4g}")
        else:
            label = f"{key}, {row['side']} cubed"
            lines.append(f"{label:36}{n:>6}{'':>29}{1e-9 * row['flop_per_s']:>9.4g}")
    ours = [key for key in names if key.startswith("ours")]
    others = [key for key in names if any((key, n) in at for n in s["num_envs"])]
    lines.append(f"\n{'times faster than':20}{'envs':>6}" + "".join(f"{key:>18}" for key in others))
    for n in s["num_envs"]:
        for mine in (at[key, n] for key in ours if (key, n) in at):
            cells = (at[key, n]["time_s"] / mine["time_s"] if (key, n) in at else None for key in others)
            text = "".join(f"{'-' if cell is None else format(cell, '.2f'):>18}" for cell in cells)
            lines.append(f"{mine['contestant']:20}{n:>6}{text}")
    lines.append(f"\n{'target':58}{'required':>9}{'measured':>10}  verdict")
    for t in result["targets"]:
        measured = "-" if t["measured"] is None else format(t["measured"], ".3g")
        lines.append(f"{t['target']:58}{t['required']:>9g}{measured:>10}  {t['verdict']}")
    if any("does not apply" in t["verdict"] for t in result["targets"]):
        lines.append(
            "The targets are set for a 5M model (on a GPU 1M) at 64 x 2, horizon 3; bfloat16 for a CPU with AMX."
        )
    lines.append("")
    lines += [f"{names[key]}: {c['notes']}" for key, c in result["contestants"].items() if c["notes"]]
    lines += [f"not measured, {key}: {reason}" for key, reason in result["not_measured"].items()]
    return "\n".join(lines)


def write_picture(result: dict[str, Any], path: Path) -> bool:
    """Draw the roofline and the time per environment.

    Args:
        result: The stored result.
        path: Image to write.

    Returns:
        Whether there was a matplotlib to draw it.
    """
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows, names = result["rows"], {key: c["label"] for key, c in result["contestants"].items()}
    figure, (roof, cost) = plt.subplots(1, 2, figsize=(13, 5.2), constrained_layout=True)
    grid = [2.0 ** (k / 8) for k in range(-16, 97)]
    for dtype, style in (("float32", "-"), ("bfloat16", "--")):
        peak = statistics.median(r["flop_per_s"] for r in rows if r["contestant"] == f"matmul-{dtype}")
        limit = [1e-9 * min(peak, x * result["bandwidth_bytes_per_s"]) for x in grid]
        roof.plot(grid, limit, "k", ls=style, lw=1, label=f"{dtype} matmul peak, copy bandwidth")
    for i, key in enumerate(names):
        mine = sorted((r for r in rows if r["contestant"] == key), key=lambda r: r["num_envs"])
        if not mine:
            continue
        style = {"color": f"C{i % 10}", "marker": "o" if key.startswith("ours") else "^", "label": names[key]}
        style["lw"] = 2.0 if key.startswith("ours") else 1.0
        roof.plot([r["intensity"] for r in mine], [1e-9 * r["flop_per_s"] for r in mine], ms=4, **style)
        cost.plot([r["num_envs"] for r in mine], [r["ms_per_env"] for r in mine], ms=4, **style)
    roof.set(xscale="log", yscale="log", xlabel="FLOP per byte that the matrix products must move", ylabel="GFLOP/s")
    cost.set(xscale="log", yscale="log", xlabel="environments", ylabel="ms per environment-plan")
    s = result["settings"]
    roof.set_title(f"{s['size']} model, {s['samples']} x {s['iterations']}, horizon {s['horizon']}")
    cost.set_title(
        result["machine"]["accelerator"] or f"{result['machine']['cpu']}, {result['machine']['threads']} thread(s)"
    )
    roof.legend(fontsize=7)
    for axis in (roof, cost):
        axis.grid(alpha=0.3, which="both", lw=0.4)
    figure.savefig(path, dpi=90)
    plt.close(figure)
    return True
