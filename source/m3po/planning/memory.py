"""How much memory a plan needs, before anything is allocated."""

from __future__ import annotations

import torch

from m3po.config import MODEL_SIZES, PlannerCfg, WorldModelCfg, planner_at
from m3po.planning.imagination import CHUNK_ROWS, DTYPES
from m3po.planning.packed_model import padded


def plan_bytes(num_planned: int, action_dim: int, planner: PlannerCfg, model: WorldModelCfg, device: str) -> int:
    """Bytes of all buffers of a plan, and of what epilogues other than Triton's allocate on top while they run.

    With n environments, S samples, P of them from the prior, horizon H, A action dimensions, latent Z, width W, B bins,
    R rows of a chunk and b bytes per number of the chosen precision it is

    * per environment ``4 [2 (1 + S) + 2 P + (1 + S + 1 + 2 P + 2) H A + (S + 3) A + 6] + b (Z + W) + 4 W``,
    * per chunk ``R [b (3 Z + 2 W + p(B + 1) + p(A) + A) + 12]``, where p rounds up to 8 on CUDA,
    * and without Triton's epilogues ``R (4 W + 8)`` for a temporary that they allocate while they run, and
      ``4 R max(W, Z, B)`` for the eager ones' buffer.

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
    b = DTYPES[planner.precision].itemsize
    kind = device.split(":")[0]
    rows = max(planner.chunk_rows or CHUNK_ROWS[kind], 1 + s)
    per_env = 4 * (2 * (1 + s) + 2 * p + (1 + s + 1 + 2 * p + 2) * h * a + (s + 3) * a + 6) + b * (latent + width)
    columns = padded(model.num_bins + 1, kind) + padded(a, kind) + a
    per_row = b * (3 * latent + 2 * width + columns) + 12
    if planner.epilogues != "triton":
        per_row += 4 * width + 8
    if planner.epilogues == "eager":
        per_row += 4 * max(width, latent, model.num_bins)
    return n * (per_env + 4 * width) + rows * per_row


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
