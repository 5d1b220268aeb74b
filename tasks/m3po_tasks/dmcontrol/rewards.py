"""The reward function that dm_control's tasks are made of (arXiv 1801.00690, section "Reward")."""

from __future__ import annotations

import math

import torch


def tolerance(
    x: torch.Tensor,
    bounds: tuple[float, float] = (0.0, 0.0),
    margin: float = 0.0,
    sigmoid: str = "gaussian",
    value_at_margin: float = 0.1,
) -> torch.Tensor:
    """1 within the bounds, falling to ``value_at_margin`` at a distance of ``margin`` from them.

    Args:
        x: Any shape.
        bounds: Lowest and highest value with a reward of 1; may be infinite.
        margin: Distance from the bounds; 0 gives 0 outside of them.
        sigmoid: ``gaussian``, ``linear`` or ``quadratic``.
        value_at_margin: Value at the margin.

    Returns:
        Values in [0, 1], shaped like ``x``.
    """
    lower, upper = bounds
    if margin == 0.0:
        return ((lower <= x) & (x <= upper)).to(x.dtype)
    distance = torch.maximum(lower - x, x - upper).clamp(min=0.0) / margin
    if sigmoid == "gaussian":
        return torch.exp(math.log(value_at_margin) * distance.square())
    if sigmoid == "linear":
        return (1.0 - (1.0 - value_at_margin) * distance).clamp(min=0.0)
    if sigmoid == "quadratic":
        return (1.0 - (1.0 - value_at_margin) * distance.square()).clamp(min=0.0)
    raise ValueError(f"unknown sigmoid '{sigmoid}'")
