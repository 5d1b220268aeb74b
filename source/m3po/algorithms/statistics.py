"""Statistics over the steps of each task in all processes."""

from __future__ import annotations

import torch

from m3po import distributed


def mean_per_task(x: torch.Tensor, mask: torch.Tensor, task: torch.Tensor, num_tasks: int) -> torch.Tensor:
    """Mean of the masked elements of each task over all processes, 0 where there are none.

    Args:
        x: Elements, shape of ``task``, or (B, D) for B of them.
        mask: Those that count, shape of ``task``, boolean.
        task: Task ids, any shape.
        num_tasks: Tasks K.

    Returns:
        Means, (K,) or (K, D).
    """
    is_vector = x.dim() > task.dim()
    task, weight = task.flatten(), mask.flatten().to(x.dtype).unsqueeze(-1)
    values = x.reshape(len(task), x.shape[-1] if is_vector else 1)
    sums = torch.zeros(num_tasks, values.shape[1] + 1, dtype=x.dtype, device=x.device)
    sums = distributed.total(sums.index_add(0, task, torch.cat([values * weight, weight], dim=-1)))
    means = sums[:, :-1] / sums[:, -1:].clamp_min(1.0)
    return means if is_vector else means.squeeze(-1)


def count_per_task(mask: torch.Tensor, task: torch.Tensor, num_tasks: int) -> torch.Tensor:
    """Number of the masked elements of each task over all processes, (K,); both arguments have the same shape."""
    task, weight = task.flatten(), mask.flatten().to(torch.get_default_dtype())
    return distributed.total(torch.zeros(num_tasks, device=task.device).index_add(0, task, weight))


def explained_variance(
    predicted: torch.Tensor, target: torch.Tensor, mask: torch.Tensor, task: torch.Tensor, num_tasks: int
) -> torch.Tensor:
    """``1 - Var(target - predicted) / Var(target)`` over the masked elements of each task in all processes, (K,).

    0 where the target does not vary. All arguments have the same shape.
    """

    def variance(x: torch.Tensor) -> torch.Tensor:
        mean = mean_per_task(x, mask, task, num_tasks)
        return mean_per_task((x - mean[task]).square(), mask, task, num_tasks)

    spread = variance(target)
    explained = 1.0 - variance(target - predicted) / spread.clamp_min(1e-12)
    return torch.where(spread > 1e-12, explained, 0.0)
