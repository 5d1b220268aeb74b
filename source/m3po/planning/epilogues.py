"""What surrounds a matrix product in imagination: eager torch, compiled by torch's inductor, or fused Triton kernels.

The three forms compute the same and write into given tensors; none allocates after its first call.
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

    def linear_norm_mish(self, x: torch.Tensor, layer: PackedLayer, bias: torch.Tensor, out: torch.Tensor) -> None:
        """``out = Mish(LayerNorm(x W^T + bias))``.

        Args:
            x: Inputs, shape (R, I), any row stride.
            layer: Weights (O, I) and normalisation (O,). Its own bias is not used.
            bias: Shape (G, O) with G dividing R, float32: row r reads row ``r // (R / G)``.
            out: Receives the result, shape (R, O).
        """

    def simnorm(self, update: torch.Tensor, z: torch.Tensor, group: int, residual: bool) -> None:
        """``z <- SimNorm(log(z + floor) + update)``, or ``SimNorm(update)`` without ``residual``; both (R, Z)."""

    def two_hot(self, logits: torch.Tensor, bins: torch.Tensor, out: torch.Tensor) -> None:
        """``out <- symexp(softmax(logits) bins)``; logits (R, B), bins (B,), out (R,) float32."""


class EagerEpilogues:
    """One torch operation after the other, in buffers of its own."""

    def __init__(self, rows: int, width: int, device: torch.device) -> None:
        """Allocate buffers for at most ``rows`` rows of at most ``width`` columns."""
        self._buffers = [torch.empty(rows * width, device=device) for _ in range(2)]
        self._moments = [torch.empty(rows, 1, device=device) for _ in range(2)]

    def _scratch(self, rows: int, width: int) -> list[torch.Tensor]:
        return [b[: rows * width].view(rows, width) for b in self._buffers]

    def linear_norm_mish(self, x: torch.Tensor, layer: PackedLayer, bias: torch.Tensor, out: torch.Tensor) -> None:
        """See :class:`Epilogues`."""
        rows, width = out.shape
        s, t = self._scratch(rows, width)
        torch.mm(x, layer.weight.T, out=out)
        torch.add(_grouped(out, bias), bias.unsqueeze(1), out=_grouped(s, bias))
        mean, inverse = (m[:rows] for m in self._moments)
        torch.ops.aten.native_layer_norm.out(
            s, [width], layer.norm_weight, layer.norm_bias, layer.eps, out0=t, out1=mean, out2=inverse
        )
        # Mish by its rational form: tanh(log(1 + w)) with w = exp(x) is n / (n + 2) with n = w (w + 2).
        w = torch.clamp(t, max=20.0, out=s).exp_()
        n = torch.addcmul(w, w, w, value=0.5, out=w).mul_(2.0)
        t.mul_(n)
        torch.div(t, n.add_(2.0), out=out)

    def simnorm(self, update: torch.Tensor, z: torch.Tensor, group: int, residual: bool) -> None:
        """See :class:`Epilogues`."""
        rows, width = z.shape
        weight, base = self._scratch(rows, width)
        weight.copy_(update).clamp_(-LOGIT_BOUND, LOGIT_BOUND).exp_()
        if residual:
            weight.mul_(torch.add(z, LATENT_FLOOR, out=base))
        grouped = weight.view(rows, -1, group)
        total = self._buffers[1][: rows * width // group].view(rows, -1, 1)
        torch.sum(grouped, -1, keepdim=True, out=total)
        torch.div(grouped, total, out=z.unflatten(1, (-1, group)))

    def two_hot(self, logits: torch.Tensor, bins: torch.Tensor, out: torch.Tensor) -> None:
        """See :class:`Epilogues`."""
        p, wide = self._scratch(*logits.shape)
        torch.softmax(wide.copy_(logits), -1, out=p)
        torch.mv(p, bins, out=out)
        sign = torch.sign(out, out=wide.view(-1)[: len(out)])
        out.abs_().expm1_().mul_(sign)


def _grouped(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Rows (R, O) as (G, R / G, O) for the G rows of a bias."""
    return x.view(bias.shape[0], -1, x.shape[1])


def _norm_mish(h: torch.Tensor, bias: torch.Tensor, weight: torch.Tensor, norm_bias: torch.Tensor, eps: float) -> None:
    x = _grouped(h, bias).float() + bias.unsqueeze(1)
    h.copy_(F.mish(F.layer_norm(x, weight.shape, weight, norm_bias, eps)).view_as(h))


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
        """Compile lazily, once for all numbers of rows."""
        self._norm_mish, self._simnorm, self._two_hot = (
            torch.compile(f, fullgraph=True, dynamic=True) for f in (_norm_mish, _simnorm, _two_hot)
        )

    def linear_norm_mish(self, x: torch.Tensor, layer: PackedLayer, bias: torch.Tensor, out: torch.Tensor) -> None:
        """See :class:`Epilogues`."""
        torch.mm(x, layer.weight.T, out=out)
        self._norm_mish(out, bias, layer.norm_weight, layer.norm_bias, layer.eps)

    def simnorm(self, update: torch.Tensor, z: torch.Tensor, group: int, residual: bool) -> None:
        """See :class:`Epilogues`."""
        self._simnorm(update, z, group, residual)

    def two_hot(self, logits: torch.Tensor, bins: torch.Tensor, out: torch.Tensor) -> None:
        """See :class:`Epilogues`."""
        self._two_hot(logits, bins, out)


class TritonEpilogues:
    """Fused CUDA kernels; the matrix product of a layer is part of its kernel."""

    def linear_norm_mish(self, x: torch.Tensor, layer: PackedLayer, bias: torch.Tensor, out: torch.Tensor) -> None:
        """See :class:`Epilogues`."""
        from m3po.kernels.linear_norm_mish import linear_norm_mish

        linear_norm_mish(x, layer.weight, bias, layer.norm_weight, layer.norm_bias, layer.eps, out)

    def simnorm(self, update: torch.Tensor, z: torch.Tensor, group: int, residual: bool) -> None:
        """See :class:`Epilogues`."""
        from m3po.kernels.residual_simnorm import residual_simnorm

        residual_simnorm(update, z if residual else None, group, z)

    def two_hot(self, logits: torch.Tensor, bins: torch.Tensor, out: torch.Tensor) -> None:
        """See :class:`Epilogues`."""
        from m3po.kernels.two_hot_expectation import two_hot_expectation

        two_hot_expectation(logits, bins, out)
