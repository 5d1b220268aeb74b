"""The world model's weights, laid out for imagination.

The first layer of every head is split into what all candidates of an environment share (its task embedding, and at the
first step its latent) and what is a candidate's own; latent, reward and termination heads become one matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn

from m3po.models import WorldModel


@dataclass
class PackedLayer:
    """Linear, LayerNorm, Mish."""

    weight: torch.Tensor
    """Shape (out, in)."""

    bias: torch.Tensor
    """Shape (1, out), or (K, out) with the task embedding's part, float32."""

    norm_weight: torch.Tensor
    """Shape (out,), float32."""

    norm_bias: torch.Tensor
    """Shape (out,), float32."""

    eps: float
    """Of the LayerNorm."""

    def columns(self, first: int) -> PackedLayer:
        """The layer on the inputs from column ``first`` on."""
        return replace(self, weight=self.weight[:, first:])


@dataclass
class PackedHead:
    """Two layers and a linear output."""

    first: PackedLayer
    second: PackedLayer
    weight: torch.Tensor
    """Shape (out, in)."""

    bias: torch.Tensor
    """Shape (out,)."""


class PackedModel:
    """Copies of a world model's weights in the planner's precision; set ``stale`` when the model has changed."""

    def __init__(self, model: WorldModel, dtype: torch.dtype) -> None:
        """Allocate the copies.

        Args:
            model: World model.
            dtype: Precision of the matrices; biases and normalisations stay float32.
        """
        self.model, self.dtype = model, dtype
        self.latent_dim = model.latent_dim
        self.num_bins = model.cfg.num_bins
        self.width, self.action_dim = model.transition[1][0].out_features, model.prior_head[-1].out_features
        self.num_tasks = model.task_embedding.shape[0]
        self.bins = model.two_hot.bins
        device = model.task_embedding.device.type
        self.input_dim = self.latent_dim + padded(self.action_dim, device)
        self.output_dim = self.latent_dim + padded(self.num_bins + 1, device)
        self._copies: list[tuple[torch.Tensor, Callable[[], torch.Tensor]]] = []
        self.stale = True

        outputs = (model.latent_head, model.reward_head, model.termination_head)
        self.transition = PackedHead(
            self._first(model.transition[0], self.latent_dim + self.action_dim, self.input_dim),
            self._second(model.transition[1]),
            self._keep(lambda: _pad_rows(torch.cat([o.weight for o in outputs]), self.output_dim), dtype),
            self._keep(lambda: _pad_rows(torch.cat([o.bias for o in outputs]), self.output_dim), dtype),
        )
        self.value = self._head(model.value_head)
        self.prior = self._head(model.prior_head)
        tasks = torch.arange(self.num_tasks, device=model.task_embedding.device)
        zero = torch.zeros_like(model.rewards.rate)
        balanced, fall = model.cfg.balance_terminations, model.cfg.terminal_reward
        self.termination_logit = self._keep(lambda: model.rewards.termination_logit(tasks) if balanced else zero)
        self.fall_reward = self._keep(lambda: model.rewards.terminal / model.rewards.scale(tasks) if fall else zero)

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the weights again if the model was said to have changed.

        Torch's own version counters would not do: fused optimisers do not touch them.
        """
        if self.stale:
            for target, source in self._copies:
                target.copy_(source())
            self.stale = False

    def _keep(self, source: Callable[[], torch.Tensor], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """A tensor that :meth:`refresh` fills from ``source``."""
        with torch.no_grad():
            target = torch.empty_like(source(), dtype=dtype, memory_format=torch.contiguous_format)
        self._copies.append((target, source))
        return target

    def _first(self, layer: nn.Sequential, own: int, width: int) -> PackedLayer:
        """First layer on ``[own inputs, task embedding]``: the embedding's part becomes a bias per task.

        The weights are padded from ``own`` to ``width`` columns.
        """
        linear, model = layer[0], self.model
        tasks = torch.arange(self.num_tasks, device=linear.weight.device)
        return self._layer(
            layer,
            self._keep(lambda: _pad_rows(linear.weight[:, :own].T, width).T, self.dtype),
            self._keep(lambda: model.embed(tasks) @ linear.weight[:, own:].T + linear.bias),
        )

    def _second(self, layer: nn.Sequential) -> PackedLayer:
        linear = layer[0]
        return self._layer(
            layer, self._keep(lambda: linear.weight, self.dtype), self._keep(lambda: linear.bias.unsqueeze(0))
        )

    def _layer(self, layer: nn.Sequential, weight: torch.Tensor, bias: torch.Tensor) -> PackedLayer:
        norm = layer[1]
        return PackedLayer(
            weight, bias, self._keep(lambda: norm.weight), self._keep(lambda: norm.bias), float(norm.eps)
        )

    def _head(self, head: nn.Sequential) -> PackedHead:
        layers, output = head
        return PackedHead(
            self._first(layers[0], self.latent_dim, self.latent_dim),
            self._second(layers[1]),
            self._keep(lambda: output.weight, self.dtype),
            self._keep(lambda: output.bias, self.dtype),
        )


def padded(columns: int, device: str) -> int:
    """Columns of a matrix on a type of device: a GPU loads rows of whole 16-byte words at once; what is added is 0."""
    return -(-columns // 8) * 8 if device == "cuda" else columns


def _pad_rows(x: torch.Tensor, rows: int) -> torch.Tensor:
    """Append rows of zeros up to a number."""
    return torch.cat([x, x.new_zeros(rows - x.shape[0], *x.shape[1:])])
