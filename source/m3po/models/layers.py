"""Building blocks of the world model: SimNorm, Linear + LayerNorm + SiLU layers."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn

LOGIT_BOUND = 20.0
"""Bound on latent logits, far beyond saturation."""


class SimNorm(nn.Module):
    """Softmax over groups of dimensions, so that every group lies on a simplex (arXiv 2310.16828, section 3.1)."""

    def __init__(self, group_size: int) -> None:
        """Store the group size, which must divide the dimensions."""
        super().__init__()
        self.group_size = group_size

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        """Map logits (..., Y) to features (..., Y) whose groups each sum to 1.

        It is written out, because a softmax over eight numbers is slow on a CPU; the bound replaces the subtraction
        of the maximum.
        """
        weight = logits.clamp(-LOGIT_BOUND, LOGIT_BOUND).exp()
        grouped = weight.unflatten(-1, (-1, self.group_size))
        return (grouped / grouped.sum(-1, keepdim=True)).flatten(-2)


def linear_layers(network: nn.Sequential) -> list[nn.Linear]:
    """The linear layers of a network, in their order."""
    return [layer for layer in network if isinstance(layer, nn.Linear)]


def trunk(in_dim: int, hidden_dims: list[int]) -> nn.Sequential:
    """Stack of Linear, LayerNorm and SiLU of the given widths."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise([in_dim, *hidden_dims]):
        layers += [nn.Linear(inputs, outputs), nn.LayerNorm(outputs), nn.SiLU()]
    return nn.Sequential(*layers)


def head(in_dim: int, out_dim: int, zero: bool = False) -> nn.Linear:
    """Linear output; ``zero`` starts it at zero, so that it predicts "nothing yet"."""
    layer = nn.Linear(in_dim, out_dim)
    if zero:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return layer
