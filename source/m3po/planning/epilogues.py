"""What surrounds a matrix product in imagination: eager torch, compiled by torch's inductor, or fused Triton kernels.

All forms compute the same, and write into given tensors and into scratch of their own. What is allocated besides: on a
CPU, inductor's statistics of rows (one number per row) and the workspace of oneDNN's bfloat16 products, which does not
grow with the rows; on a GPU the intermediate results of inductor, which a CUDA graph holds.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Protocol

import torch

from m3po.models.layers import LATENT_FLOOR, LOGIT_BOUND
from m3po.models.two_hot import symexp
from m3po.planning.packed_model import PackedLayer, PackedModel


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
            The result, which is in one of the buffers; the other one is overwritten.
        """

    def simnorm(self, update: torch.Tensor, z: torch.Tensor, group: int, residual: bool) -> None:
        """``z <- SimNorm(log(z + floor) + update)``, or ``SimNorm(update)`` without ``residual``; both (R, Z)."""

    def two_hot(self, logits: torch.Tensor, bins: torch.Tensor, out: torch.Tensor) -> None:
        """``out <- symexp(softmax(logits) bins)``; logits (R, B), bins (B,), out (R,) float32."""


def make_epilogues(kind: str, rows: int, group: int, model: PackedModel) -> Epilogues:
    """Create the epilogues of a model.

    Args:
        kind: ``eager``, ``compiled`` or ``triton``.
        rows: Most rows that they will be given.
        group: Dimensions of a simplex of the latent.
        model: The model.
    """
    if kind == "triton":
        return TritonEpilogues()
    make = EagerEpilogues if kind == "eager" else CompiledEpilogues
    device = model.bins.device
    columns = scratch_columns(kind, model.dtype, device.type, model.latent_dim, model.width, model.num_bins)
    return make(rows, columns, model.latent_dim // group, device)


def scratch_columns(kind: str, dtype: torch.dtype, device: str, latent: int, width: int, bins: int) -> int:
    """Columns of each of the two scratch matrices: the widest that a form copies in float32."""
    if kind == "compiled":
        return 0 if device == "cuda" else latent
    return max(latent, bins) if dtype == torch.float32 else max(latent, bins, width)


class EagerEpilogues:
    """One torch operation after the other, in float32: in the given tensors where they are, else in scratch."""

    def __init__(self, rows: int, columns: int, groups: int, device: torch.device) -> None:
        """Allocate the scratch.

        Args:
            rows: Most rows.
            columns: See :func:`scratch_columns`.
            groups: Groups of a latent.
            device: Of all tensors.
        """
        self._scratch = [torch.empty(rows * columns, device=device) for _ in range(2)]
        self._sums = torch.empty(rows * groups, device=device)

    def _matrix(self, index: int, like: torch.Tensor) -> torch.Tensor:
        """Scratch of a matrix's shape."""
        rows, columns = like.shape
        return self._scratch[index].as_strided((rows, columns), (columns, 1))

    def linear_norm_mish(
        self, x: torch.Tensor, layer: PackedLayer, bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor
    ) -> torch.Tensor:
        """See :class:`Epilogues`."""
        rows, width = a.shape
        torch.mm(x, layer.weight.T, out=b)
        y, w = (b, a) if b.dtype == torch.float32 else (self._matrix(0, b), self._matrix(1, b))
        row = self._sums[:rows].unsqueeze(1)
        _grouped(y.copy_(b), bias).add_(bias.unsqueeze(1))
        y.sub_(torch.sum(y, -1, keepdim=True, out=row), alpha=1.0 / width)
        # One over the deviation is sqrt(width) / sqrt(|y|^2 + width eps).
        torch.linalg.vector_norm(y, dim=-1, keepdim=True, out=row).square_().add_(width * layer.eps).rsqrt_()
        torch.addcmul(layer.norm_bias, y.mul_(row), layer.norm_weight, value=width**0.5, out=y)
        # Mish is y tanh(log(1 + w)) = y - y / (1 + w + w^2 / 2) with w = exp(y), which may overflow.
        torch.exp(y, out=w)
        torch.addcmul(w, w, w, value=0.5, out=w).add_(1.0)
        return a.copy_(torch.addcdiv(y, y, w, value=-1.0, out=w))

    def simnorm(self, update: torch.Tensor, z: torch.Tensor, group: int, residual: bool) -> None:
        """See :class:`Epilogues`."""
        rows, latent = z.shape
        weight, base = self._matrix(0, update).copy_(update), self._matrix(1, z)
        weight.clamp_(-LOGIT_BOUND, LOGIT_BOUND).exp_()
        if residual:
            weight.mul_(base.copy_(z).add_(LATENT_FLOOR))
        grouped = weight.view(rows, -1, group)
        sums = self._sums.as_strided((rows, latent // group, 1), (latent // group, 1, 1))
        grouped.div_(torch.sum(grouped, -1, keepdim=True, out=sums))
        z.copy_(weight)

    def two_hot(self, logits: torch.Tensor, bins: torch.Tensor, out: torch.Tensor) -> None:
        """See :class:`Epilogues`."""
        p = torch.softmax(self._matrix(0, logits).copy_(logits), -1, out=self._matrix(1, logits))
        torch.mv(p, bins, out=out)
        torch.copysign(torch.abs(out, out=self._sums[: len(out)]).expm1_(), out, out=out)


def _grouped(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Rows (R, O) as (G, R / G, O) for the G rows of a bias."""
    return x.view(bias.shape[0], -1, x.shape[1])


def _stored(x: torch.Tensor) -> torch.Tensor:
    # A C++ loop would work a row's statistic out again for every number of the row; a stride makes inductor store it.
    return x if x.is_cuda else torch.as_strided(x, x.shape, x.stride())


def _norm_mish(
    product: torch.Tensor,
    bias: torch.Tensor,
    weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float,
    out: torch.Tensor,
) -> None:
    x = product.float() + bias
    x = x - _stored(x.mean(-1, keepdim=True))
    x = x * _stored(torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)) * weight + norm_bias
    # Mish by its rational form: one exponential instead of softplus and tanh.
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
    logits = logits.float()
    # The quotient of two sums, instead of a softmax, leaves no matrix to store.
    p = (logits - logits.amax(-1, keepdim=True)).exp()
    out.copy_(symexp((p * bins).sum(-1) / p.sum(-1)))


@cache
def _compiled(function: Callable[..., None]) -> Callable[..., None]:
    """Compile lazily: at the first call, and once more for all other numbers of rows."""
    # One process may plan in two precisions and for one and many environments: more than dynamo expects.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    options = {
        # What is made of more tensors than that and used twice would be stored: a matrix of a chunk.
        "realize_reads_threshold": 8,
        # Written into the kernels, but not into the key that inductor's cache on the disk finds them by, unless it is
        # set: a process with one thread would run kernels of another with two, several times slower.
        "cpp.threads": torch.get_num_threads(),
    }
    return torch.compile(function, fullgraph=True, options=options)


class CompiledEpilogues(EagerEpilogues):
    """Everything but the matrix product in a few loops, generated by torch's inductor (a C++ compiler on a CPU)."""

    def linear_norm_mish(
        self, x: torch.Tensor, layer: PackedLayer, bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor
    ) -> torch.Tensor:
        """See :class:`Epilogues`."""
        torch.mm(x, layer.weight.T, out=b)
        product, out = _grouped(b, bias), _grouped(a, bias)
        _compiled(_norm_mish)(product, bias.unsqueeze(1), layer.norm_weight, layer.norm_bias, layer.eps, out)
        return a

    def simnorm(self, update: torch.Tensor, z: torch.Tensor, group: int, residual: bool) -> None:
        """See :class:`Epilogues`."""
        if z.is_cuda:
            _compiled(_simnorm)(update, z, group, residual)
        else:  # here inductor's loops need a matrix of a chunk
            super().simnorm(update, z, group, residual)

    def two_hot(self, logits: torch.Tensor, bins: torch.Tensor, out: torch.Tensor) -> None:
        """See :class:`Epilogues`."""
        _compiled(_two_hot)(logits, bins, out)


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

        residual_simnorm(update, z if residual else None, group, z, LATENT_FLOOR)

    def two_hot(self, logits: torch.Tensor, bins: torch.Tensor, out: torch.Tensor) -> None:
        """See :class:`Epilogues`."""
        from m3po.kernels.two_hot_expectation import two_hot_expectation

        two_hot_expectation(logits, bins, out)
