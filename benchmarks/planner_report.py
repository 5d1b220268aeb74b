"""What the planner benchmark says: the machine, and a table of times."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_tile", "amx_int8", "amx_bf16")


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


def write_table(result: dict[str, Any]) -> str:
    """The result as text: a row per contestant and number of environments, and what is missing."""
    rows, names = result["rows"], {key: c["label"] for key, c in result["contestants"].items()}
    ours = {row["num_envs"]: row["time_s"] for row in rows if row["contestant"] == "ours"}
    s, clock = result["settings"], {"cpu_s": "CPU time", "wall_s": "wall-clock time"}[result["basis"]]
    lines = [
        f"\n{s['samples']} samples x {s['iterations']} iterations, horizon {s['horizon']}, {s['elites']} elites, "
        f"{s['policy_samples']} policy trajectories; medians of {s['rounds']} rounds, {clock}",
        f"{'contestant':36}{'envs':>6}{'ms/env':>9}{'plans/s':>9}{'times ours':>12}",
    ]
    for row in rows:
        n, seconds = row["num_envs"], row["time_s"]
        ratio = format(seconds / ours[n], ".2f") if n in ours else "-"
        lines.append(f"{names[row['contestant']]:36}{n:>6}{1e3 * seconds / n:>9.3g}{n / seconds:>9.4g}{ratio:>12}")
    lines += [f"{names[key]}: {c['notes']}" for key, c in result["contestants"].items() if c["notes"]]
    lines += [f"not measured, {key}: {reason}" for key, reason in result["not_measured"].items()]
    return "\n".join(lines)
