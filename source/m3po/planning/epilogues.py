"""What surrounds a matrix product in imagination: eager torch, compiled by torch's inductor, or fused Triton kernels.

The three forms compute the same and write into given tensors. On a CPU the first two still allocate a temporary of
one chunk while they run, inside torch's LayerNorm and inductor's loops; the Triton kernels, and any form in a CUDA
graph, do not.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch.nn import functional as F

from m3po.models.two_hot import symexp
from m3po.planning.packed_model import PackedLayer

LATENT_FLOOR = 1e-3
"""Keeps latent dimensions that are nearly off within reach of a residual update; see ``WorldModel.predict``."""

LOGIT_BOUND = 20.0
"""Bound on latent logits, far beyond saturation; see ``SimNorm``."""


class Epilogues(Protocol):
    """The three steps of an imagined transition."""

    def linear_norm_mish(
        self, x: torch.Tensor, layer: PackedLayer, bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor
    ) -> torch.Tensor:
        """``Mish(LayerNorm(x W^T + bias))``.

        Args:
            x: Inputs, shape (R, I), any row stride.
            layer: Weights (O, I) and normalisation (O,). Its own bias is not used.
            bias: Shape (G, O) with G dividing R, float32: row r reads row ``r // (R / G)``.
            a: Buffer, shape (R, O); may be ``x``.
            b: Another buffer of that shape; not ``x``.

        Returns:
            The result, which is in one of the buffers.
        """

    def simnorm(self, update: torch.Tensor, z: torch.Tensor, group: int, residual: bool) -> None:
        """``z <- SimNorm(log(z + floor) + update)``, or ``SimNorm(update)`` without ``residual``; both (R, Z)."""

    def two_hot(self, logits: torch.Tensor, bins: torch.Tensor, out: torch.Tensor) -> None:
        """``out <- symexp(softmax(logits) bins)``; logits (R, B), bins (B,), out (R,) float32."""


class EagerEpilogues:
    """One torch operation after the other, in buffers of its own."""

    def __init__(self, rows: int, width: int, device: torch.device) -> None:
        """Allocate a buffer for at most ``rows`` rows of at most ``width`` columns."""
        self._buffer = torch.empty(rows * width, device=device)

    def _scratch(self, rows: int, width: int) -> torch.Tensor:
        return self._buffer[: rows * width].view(rows, width)

    def linear_norm_mish(
        self, x: torch.Tensor, layer: PackedLayer, bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor
    ) -> torch.Tensor:
        """See :class:`Epilogues`."""
        rows, width = a.shape
        s = self._scratch(rows, width)
        torch.mm(x, layer.weight.T, out=b)
        torch.add(_grouped(b, bias), bias.unsqueeze(1), out=_grouped(s, bias))
        normed = F.layer_norm(s, [width], layer.norm_weight, layer.norm_bias, layer.eps)
        # Mish by its rational form: tanh(log(1 + w)) with w = exp(x) is n / (n + 2) with n = w (w + 2).
        w = torch.clamp(normed, max=20.0, out=s).exp_()
        n = torch.addcmul(w, w, w, value=0.5, out=w).mul_(2.0)
        normed.mul_(n)
        return torch.div(normed, n.add_(2.0), out=a)

    def simnorm(self, update: torch.Tensor, z: torch.Tensor, group: int, residual: bool) -> None:
        """See :class:`Epilogues`."""
        weight = self._scratch(*z.shape).copy_(update).clamp_(-LOGIT_BOUND, LOGIT_BOUND).exp_()
        if residual:
            weight.mul_(z + LATENT_FLOOR)
        grouped = weight.unflatten(1, (-1, group))
        torch.div(grouped, grouped.sum(-1, keepdim=True), out=z.unflatten(1, (-1, group)))

    def two_hot(self, logits: torch.Tensor, bins: torch.Tensor, out: torch.Tensor) -> None:
        """See :class:`Epilogues`."""
        p = torch.softmax(logits.float(), -1)
        out.copy_(symexp(torch.mv(p, bins)))


def _grouped(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Rows (R, O) as (G, R / G, O) for the G rows of a bias."""
    return x.view(bias.shape[0], -1, x.shape[1])


def _norm_mish(
    product: torch.Tensor,
    bias: torch.Tensor,
    weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float,
    out: torch.Tensor,
) -> None:
    # Written out, so that inductor makes one loop of it: of its own LayerNorm and Mish it makes two and a temporary.
    x = product.float() + bias
    x = x - x.mean(-1, keepdim=True)
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight + norm_bias
    w = x.clamp(max=20.0).exp()
    n = w * (w + 2.0)
    out.copy_(x * n / (n + 2.0))


def _simnorm(update: torch.Tensor, z: torch.Tensor, group: int, residual: bool) -> None:
    weight = update.float().clamp(-LOGIT_BOUND, LOGIT_BOUND).exp()
    if residual:
        weight = weight * (z.float() + LATENT_FLOOR)
    grouped = weight.unflatten(1, (-1, group))
    z.copy_((grouped / grouped.sum(-1, keepdim=True)).flatten(1))


def _two_hot(logits: torch.Tensor, bins: torch.Tensor, out: torch.Tensor) -> None:
    p = torch.softmax(logits.float(), -1)
    out.copy_(symexp((p * bins).sum(-1)))


class CompiledEpilogues:
    """Everything but the matrix product in one loop each, generated by torch's inductor (a C++ compiler on a CPU)."""

    def __init__(self) -> None:
        """Compile lazily: at the first call, and once more for all other numbers of rows."""
        # One process may plan in two precisions and for one and many environments: more than dynamo expects.
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        self._norm_mish, self._simnorm, self._two_hot = (
            torch.compile(f, fullgraph=True) for f in (_norm_mish, _simnorm, _two_hot)
        )

    def linear_norm_mish(
        self, x: torch.Tensor, layer: PackedLayer, bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor
    ) -> torch.Tensor:
        """See :class:`Epilogues`."""
        torch.mm(x, layer.weight.T, out=b)
        product, out = _grouped(b, bias), _grouped(a, bias)
        self._norm_mish(product, bias.unsqueeze(1), layer.norm_weight, layer.norm_bias, layer.eps, out)
        return a

    def simnorm(self, update: torch.Tensor, z: torch.Tensor, group: int, residual: bool) -> None:
        """See :class:`Epilogues`."""
        self._simnorm(update, z, group, residual)

    def two_hot(self, logits: torch.Tensor, bins: torch.Tensor, out: torch.Tensor) -> None:
        """See :class:`Epilogues`."""
        self._two_hot(logits, bins, out)


class TritonEpilogues:
    """Fused CUDA kernels; the matrix product of a layer is part of its kernel."""

    def linear_norm_mish(
        self, x: torch.Tensor, layer: PackedLayer, bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor
    ) -> torch.Tensor:
        """See :class:`Epilogues`."""
        from m3po.kernels.linear_norm_mish import linear_norm_mish

        linear_norm_mish(x, layer.weight, bias, layer.norm_weight, layer.norm_bias, layer.eps, b)
        return b

    def simnorm(self, update: torch.Tensor, z: torch.Tensor, group: int, residual: bool) -> None:
        """See :class:`Epilogues`."""
        from m3po.kernels.residual_simnorm import residual_simnorm

        residual_simnorm(update, z if residual else None, group, z)

    def two_hot(self, logits: torch.Tensor, bins: torch.Tensor, out: torch.Tensor) -> None:
        """See :class:`Epilogues`."""
        from m3po.kernels.two_hot_expectation import two_hot_expectation

        two_hot_expectation(logits, bins, out)
