"""How much memory a plan needs, before anything is allocated."""

from __future__ import annotations

import torch

from m3po.config import MODEL_SIZES, PlannerCfg, WorldModelCfg, planner_at
from m3po.planning.epilogues import scratch_columns
from m3po.planning.imagination import CHUNK_ROWS, DTYPES
from m3po.planning.packed_model import padded


def plan_bytes(num_planned: int, action_dim: int, planner: PlannerCfg, model: WorldModelCfg, device: str) -> int:
    """Bytes of all buffers of a plan, and of what is allocated on top while it runs.

    With n environments, S samples, P of them from the prior, horizon H, A action dimensions, latent Z in G groups,
    width W, B bins, R rows of a chunk and b bytes per number of the chosen precision it is

    * per environment ``4 [2 (1 + S) + P + (S + 2 P + 4) H A + (S + 4) A + 5] + b (Z + W) + 4 W``,
    * per row of a chunk ``b (3 Z + 2 W + p(B + 1) + p(A) + A) + 4 A + 12``, where p rounds up to 8 on CUDA,
    * and without Triton's epilogues ``8 C + 4 G`` more, with C the columns of their scratch
      (:func:`~m3po.planning.epilogues.scratch_columns`), and, if they are compiled, ``12`` for statistics of rows on a
      CPU, or ``4 W + 8`` on CUDA.

    The workspace of a bfloat16 product on a CPU, a few hundred KiB whatever the numbers above, is not counted.

    Args:
        num_planned: Environments that are planned together, n.
        action_dim: Action dimensions A.
        planner: Budget.
        model: World model, of a single task.
        device: Torch device name; it chooses the rows of a chunk.

    Returns:
        Bytes.
    """
    n, a, s, p, h = num_planned, action_dim, planner.num_samples, planner.num_prior_samples, planner.horizon
    latent, width, _ = MODEL_SIZES[model.size]
    dtype, kind = DTYPES[planner.precision], device.split(":")[0]
    b = dtype.itemsize
    rows = max(planner.chunk_rows or CHUNK_ROWS[kind], 1 + s)
    per_env = 4 * (2 * (1 + s) + p + (s + 2 * p + 4) * h * a + (s + 4) * a + 5) + b * (latent + width) + 4 * width
    columns = padded(model.num_bins + 1, kind) + padded(a, kind) + a
    per_row = b * (3 * latent + 2 * width + columns) + 4 * a + 12
    if planner.epilogues != "triton":
        scratch = scratch_columns(planner.epilogues, dtype, kind, latent, width, model.num_bins)
        per_row += 8 * scratch + 4 * (latent // model.simnorm_dim)
    if planner.epilogues == "compiled":
        per_row += 4 * width + 8 if kind == "cuda" else 12
    return n * per_env + rows * per_row


def check_memory(num_envs: int, action_dim: int, planner: PlannerCfg, model: WorldModelCfg, device: str) -> None:
    """Refuse a budget that does not fit, at any stage of its schedule.

    Raises:
        ValueError: Names the formula's number, what is free, and the fields to lower.
    """
    budgets = [planner, *(planner_at(planner, begin) for begin, _ in planner.stages)]
    need = max(plan_bytes(round(b.share * num_envs), action_dim, b, model, device) for b in budgets)
    free = free_bytes(device)
    if need > free:
        raise ValueError(
            f"a plan of {num_envs} environments needs {need / 2**30:.1f} GiB, but {device} has {free / 2**30:.1f} GiB "
            "free: lower num_envs, planner.share, planner.num_samples, planner.horizon, planner.chunk_rows or "
            "world_model.size."
        )


def free_bytes(device: str) -> int:
    """Memory that can still be allocated on a device."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    with open("/proc/meminfo", encoding="ascii") as file:
        lines = dict(line.split(":") for line in file)
    return int(lines["MemAvailable"].split()[0]) * 1024
