"""What a training made of its tasks: the nearest tasks of each, as a table, and a picture of their embeddings."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.nn import functional as F

NEAREST = 3
"""Nearest tasks in the files and on the console."""


def nearest_tasks(names: Sequence[str], embedding: torch.Tensor, count: int = NEAREST) -> list[list[tuple[str, float]]]:
    """The most similar tasks of each task, most similar first.

    Args:
        names: Names of the K tasks.
        embedding: Task embeddings, (K, E).
        count: Tasks to name, at most K - 1 of them.

    Returns:
        Names and cosine similarities, ``min(count, K - 1)`` for each task.
    """
    directions = F.normalize(embedding.detach().double().cpu(), dim=1)
    similarity = (directions @ directions.T).fill_diagonal_(-torch.inf)
    best = similarity.topk(min(count, len(names) - 1), dim=1)
    rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [[(names[k], value) for k, value in zip(*row, strict=True)] for row in rows]


def project(embedding: torch.Tensor) -> torch.Tensor:
    """Coordinates of the tasks on their first two principal components, largest first.

    The sign of a component is free; here its largest entry is positive, so that equal embeddings give equal pictures.

    Args:
        embedding: Task embeddings, (K, E), K and E at least 2.

    Returns:
        Coordinates, (K, 2).
    """
    centred = embedding.detach().double().cpu()
    centred = centred - centred.mean(0)
    _, _, components = torch.linalg.svd(centred, full_matrices=False)
    components = components[:2]
    largest = components.gather(1, components.abs().argmax(1, keepdim=True))
    return (centred @ (components * largest.sign()).T).float()


def nearest_table(names: Sequence[str], embedding: torch.Tensor) -> str:
    """The nearest tasks of each task as text, one line each.

    Args:
        names: Names of the K tasks, at least two.
        embedding: Task embeddings, (K, E).
    """
    wide = max(len(name) for name in names)
    lines = [f"{'task'.ljust(wide)}  nearest tasks by their embeddings (cosine similarity)"]
    for name, near in zip(names, nearest_tasks(names, embedding), strict=True):
        lines.append(f"{name.ljust(wide)}  " + ", ".join(f"{other} ({value:.2f})" for other, value in near))
    return "\n".join(lines)


def write_embedding_report(folder: str | Path, names: Sequence[str], embedding: torch.Tensor) -> list[Path]:
    """Write ``embeddings.csv`` and, where matplotlib is installed, ``embeddings.png``; nothing for a single task.

    Args:
        folder: Folder of the run; older files are replaced.
        names: Names of the K tasks.
        embedding: Task embeddings, (K, E).

    Returns:
        The files written.
    """
    if len(names) < 2:
        return []
    table, picture = Path(folder) / "embeddings.csv", Path(folder) / "embeddings.png"
    norms, places = embedding.detach().norm(dim=1).tolist(), project(embedding).tolist()
    nearest = nearest_tasks(names, embedding)
    header = [f"{column}_{i + 1}" for i in range(len(nearest[0])) for column in ("nearest", "similarity")]
    with open(table, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("task", "norm", "x", "y", *header))
        for name, norm, place, near in zip(names, norms, places, nearest, strict=True):
            cells = [cell for other, value in near for cell in (other, f"{value:.6g}")]
            writer.writerow((name, *(f"{number:.6g}" for number in (norm, *place)), *cells))
    if not _draw(picture, names, embedding):
        print(
            "[m3po] the picture of the task embeddings needs matplotlib, which the extra m3po[plots] installs.",
            flush=True,
        )
        return [table]
    return [table, picture]


def _draw(path: Path, names: Sequence[str], embedding: torch.Tensor) -> bool:
    """Draw the projection. Returns whether there is a matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    places = project(embedding)
    spread = (embedding - embedding.mean(0)).detach().double().cpu().square().sum()
    shares = (places.square().sum(0) / spread.clamp_min(1e-12)).tolist()
    figure = Figure(figsize=(9, 7), layout="constrained")
    axis = figure.add_subplot()
    axis.scatter(places[:, 0], places[:, 1], s=18)
    for name, place in zip(names, places.tolist(), strict=True):
        axis.annotate(name, place, xytext=(4, 3), textcoords="offset points", fontsize=7)
    labels = [f"principal component {i + 1} ({share:.0%} of the variance)" for i, share in enumerate(shares)]
    axis.set(title=f"Embeddings of {len(names)} tasks", xlabel=labels[0], ylabel=labels[1])
    axis.margins(0.15)
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    return True
