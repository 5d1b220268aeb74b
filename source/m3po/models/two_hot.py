"""Two-hot regression in symlog space (arXiv 2301.04104, section "Critic learning"; used by TD-MPC2)."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


def symlog(x: torch.Tensor) -> torch.Tensor:
    """Symmetric logarithm ``sign(x) * log(1 + abs(x))``; any shape."""
    return torch.sign(x) * torch.log1p(torch.abs(x))


def symexp(x: torch.Tensor) -> torch.Tensor:
    """Inverse of :func:`symlog`; any shape."""
    return torch.sign(x) * torch.expm1(torch.abs(x))


class TwoHot(nn.Module):
    """A scalar as a categorical distribution over equally spaced bins in symlog space."""

    def __init__(self, num_bins: int, bin_range: tuple[float, float]) -> None:
        """Lay out the bins.

        Args:
            num_bins: Number of bins, at least 2.
            bin_range: First and last bin centre in symlog space.
        """
        super().__init__()
        self.num_bins = num_bins
        self.low, self.high = bin_range
        self.step = (self.high - self.low) / (num_bins - 1)
        self.register_buffer("bins", torch.linspace(self.low, self.high, num_bins), persistent=False)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Two-hot target of a scalar. Shape (...,) -> (..., num_bins). Values beyond the range are clamped."""
        lower, weight = self._position(x)
        target = torch.zeros(*x.shape, self.num_bins, device=x.device, dtype=x.dtype)
        target.scatter_(-1, lower.unsqueeze(-1), 1.0 - weight.unsqueeze(-1))
        return target.scatter_(-1, lower.unsqueeze(-1) + 1, weight.unsqueeze(-1))

    def _position(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Index of the bin below a scalar, and the weight of the bin above it; shapes of ``x``."""
        position = (symlog(x).clamp(self.low, self.high) - self.low) / self.step
        # NaN must come out as NaN: as an index it would end the process on a GPU.
        lower = position.nan_to_num(0.0).floor().clamp(max=self.num_bins - 2).long()
        return lower, position - lower

    def decode(self, logits: torch.Tensor) -> torch.Tensor:
        """Expected value of the distribution. Shape (..., num_bins) -> (...,)."""
        return symexp(F.softmax(logits, dim=-1) @ self.bins)

    def cross_entropy(self, logits: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of logits (..., num_bins) against a scalar target (...,). Returns (...,)."""
        lower, weight = self._position(x)
        at = logits.gather(-1, torch.stack([lower, lower + 1], dim=-1))
        return torch.logsumexp(logits, dim=-1) - torch.lerp(at[..., 0], at[..., 1], weight)
