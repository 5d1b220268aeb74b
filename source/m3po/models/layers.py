"""Building blocks of the world model: SimNorm, LayerNorm + Mish layers (arXiv 2310.16828, section 3.1)."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F

LATENT_FLOOR = 1e-3
"""Keeps latent dimensions that are nearly off within reach of a residual update."""

LOGIT_BOUND = 20.0
"""Bound on latent logits, far beyond saturation."""


class SimNorm(nn.Module):
    """Softmax over groups of latent dimensions, so that every group lies on a simplex."""

    def __init__(self, group_size: int) -> None:
        """Store the group size, which must divide the latent dimensions."""
        super().__init__()
        self.group_size = group_size

    def forward(self, logits: torch.Tensor, base: torch.Tensor | None = None) -> torch.Tensor:
        """Map logits to a latent whose groups each sum to 1.

        Written out, because a softmax over eight numbers is slow on a CPU; the bound replaces its subtraction of the
        maximum, and is far beyond saturation.

        Args:
            logits: Logits, shape (..., Z).
            base: Unnormalised latent that the logits multiply, shape (..., Z): ``softmax(log base + logits)``.

        Returns:
            Latent, shape (..., Z).
        """
        weight = logits.clamp(-LOGIT_BOUND, LOGIT_BOUND).exp()
        if base is not None:
            weight = weight * base
        grouped = weight.unflatten(-1, (-1, self.group_size))
        return (grouped / grouped.sum(-1, keepdim=True)).flatten(-2)


class Mish(nn.Module):
    """``x * tanh(softplus(x))``; without gradients by its rational form, which is three times as fast on a CPU."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the activation to any shape."""
        if torch.is_grad_enabled() or x.is_cuda:
            return F.mish(x)
        # tanh(log(1 + w)) with w = exp(x) is n / (n + 2) with n = w (w + 2); beyond 20 it is 1 in float32.
        w = x.clamp(max=20.0).exp_()
        n = (w + 2.0).mul_(w)
        return (n + 2.0).reciprocal_().mul_(n).mul_(x)


class NormedLinear(nn.Sequential):
    """Linear, LayerNorm, Mish."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        """Create the three layers."""
        super().__init__(nn.Linear(in_dim, out_dim), nn.LayerNorm(out_dim), Mish())


def trunk(in_dim: int, hidden_dims: list[int]) -> nn.Sequential:
    """Stack of :class:`NormedLinear` layers of the given widths."""
    dims = [in_dim, *hidden_dims]
    layers = [NormedLinear(a, b) for a, b in pairwise(dims)]
    for layer in layers:
        _init_linear(layer[0])
    return nn.Sequential(*layers)


def head(in_dim: int, out_dim: int, zero: bool = False) -> nn.Linear:
    """Linear output; ``zero`` starts it at zero, so that it predicts "nothing yet"."""
    layer = nn.Linear(in_dim, out_dim)
    _init_linear(layer)
    if zero:
        nn.init.zeros_(layer.weight)
    return layer


def _init_linear(layer: nn.Linear) -> None:
    nn.init.trunc_normal_(layer.weight, std=layer.in_features**-0.5)
    nn.init.zeros_(layer.bias)
