"""Rolling candidates out in the world model (2), in chunks of rows that stay in the cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from m3po.config import PlannerCfg
from m3po.models import WorldModel
from m3po.planning.epilogues import Epilogues, make_epilogues
from m3po.planning.packed_model import PackedHead, PackedLayer, PackedModel

CHUNK_ROWS = {"cpu": 2048, "cuda": 32768}
"""Rows that are imagined together: what keeps the activations near a core's cache, or fills a GPU once (untested)."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""Precisions of the matrices and activations; sums, normalisations and returns are always float32."""


@dataclass
class Start:
    """Where imagination starts."""

    z: torch.Tensor
    """Latents, shape (n, Z)."""

    mu: torch.Tensor
    """Prior mean, shape (n, A)."""

    sigma: torch.Tensor
    """Prior deviation, shape (n, A)."""

    task: torch.Tensor
    """Task ids, shape (n,), int64."""

    env_ids: torch.Tensor
    """Environment ids that key the noise, shape (n,), int64."""

    action_mask: torch.Tensor | None
    """Valid action dimensions, shape (n, A), boolean."""


class Imagination:
    """Predicted returns of candidate action sequences.

    Against evaluating ``WorldModel.step`` on every candidate it saves work at equal results: the task embedding goes
    through every first layer once per task, the latent at the start once per environment, and the prior's own
    trajectories are evaluated by the caller once, not in every iteration.
    """

    def __init__(self, model: WorldModel, cfg: PlannerCfg, gamma: float | torch.Tensor) -> None:
        """Bind imagination to a model.

        Args:
            model: World model.
            cfg: Planner: precision, epilogues and chunk size.
            gamma: Discount per step, one number or one for each task (K,).
        """
        self.cfg = cfg
        self.device = model.task_embedding.device
        self.gamma = torch.as_tensor(gamma, dtype=torch.float32, device=self.device).expand(len(model.task_embedding))
        self.model = PackedModel(model, DTYPES[cfg.precision])
        self.residual, self.group = model.residual, model.cfg.simnorm_dim
        self.max_rows = cfg.chunk_rows or CHUNK_ROWS[self.device.type]
        self._epilogues: Epilogues | None = None
        self._buffers: dict[str, torch.Tensor] = {}
        self._shared: dict[str, torch.Tensor] = {}

    def model_changed(self) -> None:
        """Say that the world model's weights or statistics are not those of the last plan any more."""
        self.model.stale = True

    def refresh(self) -> None:
        """Take over a change of the model; to be called before :meth:`begin`."""
        self.model.refresh()

    def begin(self, start: Start, samples: int) -> None:
        """Prepare for a plan: what all candidates of an environment share.

        Args:
            start: Where the candidates start.
            samples: Most candidates per environment that :meth:`roll` will be given.
        """
        model = self.model
        self._allocate(max(self.max_rows, samples))
        n = start.z.shape[0]
        if self._shared.get("first", self.bins).shape[0] != n:
            self._shared = allocate(shared_layout(n, model), self.device)
        shared = self._shared
        torch.index_select(model.termination_logit, 0, start.task, out=shared["termination"])
        torch.index_select(model.fall_reward, 0, start.task, out=shared["fall"])
        torch.index_select(self.gamma, 0, start.task, out=shared["gamma"])
        if start.action_mask is not None:
            shared["mask"].copy_(start.action_mask)
        layer = model.transition.first
        latent_weight = layer.weight[:, : model.latent_dim]
        shared["z"].copy_(start.z)
        torch.mm(shared["z"], latent_weight.T, out=shared["product"])
        # Operations on two types of numbers would allocate; a copy from one to the other does not.
        shared["first"].copy_(shared["product"]).add_(_task_bias(layer, start.task, shared["bias"]))
        self._start = start

    def roll(
        self,
        u: torch.Tensor,
        returns: torch.Tensor,
        nominal: torch.Tensor | None = None,
        actions: torch.Tensor | None = None,
    ) -> None:
        """Roll candidates out and add up their predicted return (2).

        Args:
            u: Perturbations in whitened coordinates, shape (n, S, H, A).
            returns: Receives the returns, shape (n, S), in units of the task's reward scale.
            nominal: Actions that are perturbed, shape (n, H, A). ``None``: those of candidate 0, which the prior
                chooses closed-loop in its own imagined states.
            actions: Without ``nominal``: receives the actions of the first C candidates, shape (n, C, H, A), all of
                which the prior answers closed-loop.
        """
        n, samples = returns.shape
        size = max(1, self.max_rows // samples)
        for i in range(0, n, size):
            part = slice(i, min(n, i + size))
            self._roll_chunk(
                part,
                u[part],
                returns[part],
                None if nominal is None else nominal[part],
                None if actions is None else actions[part],
            )

    def _roll_chunk(
        self,
        part: slice,
        u: torch.Tensor,
        returns: torch.Tensor,
        nominal: torch.Tensor | None,
        actions: torch.Tensor | None,
    ) -> None:
        """:meth:`roll` for the environments of ``part``."""
        model, start, shared = self.model, self._start, self._shared
        n, samples, horizon, dims = u.shape
        rows, latent = n * samples, model.latent_dim
        x, a = self._buffers["x"][:rows], self._buffers["actions"][:rows].view(n, samples, dims)
        z, xa = x[:, :latent], x[:, latent : latent + dims].unflatten(0, (n, samples))
        out = self._buffers["out"][:rows]
        end = latent + model.num_bins
        logits, fall_logit = out[:, latent:end], out[:, end].view(n, samples)
        value, alive, chance = (self._buffers[name][:rows] for name in ("value", "alive", "chance"))
        total, alive_view, chance_view = returns, alive.view(n, samples), chance.view(n, samples)
        value_view = value.view(n, samples)
        rate, fall, gamma = (shared[name][part, None] for name in ("termination", "fall", "gamma"))
        sigma = start.sigma[part, None]

        z.view(n, samples, latent).copy_(shared["z"][part, None])
        total.zero_()
        alive.fill_(1.0)  # and discounted
        for k in range(horizon):
            if nominal is not None:
                a.copy_(nominal[:, None, k])
            elif k == 0:
                a.copy_(start.mu[part, None])
            else:
                own = self._prior(part, x.view(n, samples, -1)[:, : actions.shape[1], :latent])
                a[:, : own.shape[1]] = own
                a[:, own.shape[1] :] = own[:, :1]
                if start.action_mask is not None:
                    a.mul_(shared["mask"][part, None])
            xa.copy_(a.addcmul_(sigma, u[:, :, k]))
            if nominal is None:
                actions[:, :, k] = a[:, : actions.shape[1]]
            self._transition(x, out, shared["first"][part] if k == 0 else None, start.task[part])
            self._epilogues.two_hot(logits, self.bins, value)
            chance_view.copy_(fall_logit).add_(rate).neg_().sigmoid_()  # of going on
            if self.model.model.cfg.terminal_reward:
                value_view.addcmul_(chance_view, fall, value=-1.0).add_(fall)
            total.addcmul_(alive_view, value_view)
            alive_view.mul_(chance_view.mul_(gamma))
            self._epilogues.simnorm(out[:, :latent], z, self.group, self.residual)
        logits = out[:, : model.num_bins]
        self._apply(model.value, z, start.task[part], logits)
        self._epilogues.two_hot(logits, self.bins, value)
        total.addcmul_(alive_view, value_view)

    def _transition(self, x: torch.Tensor, out: torch.Tensor, first: torch.Tensor | None, task: torch.Tensor) -> None:
        """Raw predictions of a step; at the start only the actions' part of the first layer is left to do."""
        head, latent = self.model.transition, self.model.latent_dim
        if first is None:
            self._apply(head, x, task, out)
        else:
            own = PackedHead(head.first.columns(latent), head.second, head.weight, head.bias)
            self._apply(own, x[:, latent:], task, out, first)

    def _prior(self, part: slice, z: torch.Tensor) -> torch.Tensor:
        """Mean action of the latent prior in latents (n, C, Z), shape (n, C, A)."""
        n, count, _ = z.shape
        own = self._buffers["own"][: n * count]
        latents = self._buffers["prior"][: n * count]
        latents.view(z.shape).copy_(z)
        self._apply(self.model.prior, latents, self._start.task[part], own)
        return own.view(n, count, -1)

    def _apply(
        self,
        head: PackedHead,
        x: torch.Tensor,
        task: torch.Tensor,
        out: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> None:
        """Three layers: x (R, I) -> out (R, O). ``bias`` (n, W) of the first layer replaces the task's."""
        rows = x.shape[0]
        hidden = [self._buffers[name][:rows] for name in ("hidden_1", "hidden_2")]
        if bias is None:
            bias = _task_bias(head.first, task, self._buffers["bias"])
        h = self._epilogues.linear_norm_mish(x, head.first, bias, *hidden)
        other = hidden[1] if h is hidden[0] else hidden[0]
        h = self._epilogues.linear_norm_mish(h, head.second, head.second.bias, h, other)
        torch.addmm(head.bias, h, head.weight.T, out=out)

    @property
    def bins(self) -> torch.Tensor:
        """Centres of the two-hot bins, shape (B,)."""
        return self.model.bins

    def _allocate(self, rows: int) -> None:
        """Make the buffers of a chunk, once."""
        if self._epilogues is not None and self._buffers["x"].shape[0] >= rows:
            return
        self._buffers = allocate(chunk_layout(rows, self.model), self.device)
        self._buffers["x"].zero_()  # its padding is read
        self._epilogues = make_epilogues(self.cfg.epilogues, rows, self.group, self.model)


def _task_bias(layer: PackedLayer, task: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
    """Bias of a first layer by task: (1, W) if there is one task only, else (n, W) in a buffer of at least n rows."""
    return layer.bias if len(layer.bias) == 1 else torch.index_select(layer.bias, 0, task, out=buffer[: len(task)])


Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Names, shapes and types of buffers."""


def allocate(layout: Layout, device: torch.device) -> dict[str, torch.Tensor]:
    """Make uninitialised buffers."""
    return {name: torch.empty(shape, dtype=dtype, device=device) for name, (shape, dtype) in layout.items()}


def chunk_layout(rows: int, model: PackedModel) -> Layout:
    """Buffers of one chunk: inputs, two hidden layers, outputs, and the prior's."""
    return {
        "x": ((rows, model.input_dim), model.dtype),
        "hidden_1": ((rows, model.width), model.dtype),
        "hidden_2": ((rows, model.width), model.dtype),
        "out": ((rows, model.output_dim), model.dtype),
        "prior": ((rows, model.latent_dim), model.dtype),
        "own": ((rows, model.action_dim), model.dtype),
        "actions": ((rows, model.action_dim), torch.float32),
        "bias": ((rows if model.num_tasks > 1 else 0, model.width), torch.float32),
        "value": ((rows,), torch.float32),
        "alive": ((rows,), torch.float32),
        "chance": ((rows,), torch.float32),
    }


def shared_layout(n: int, model: PackedModel) -> Layout:
    """Buffers of what the candidates of an environment share."""
    return {
        "z": ((n, model.latent_dim), model.dtype),
        "product": ((n, model.width), model.dtype),
        "first": ((n, model.width), torch.float32),
        "termination": ((n,), torch.float32),
        "fall": ((n,), torch.float32),
        "gamma": ((n,), torch.float32),
        "bias": ((n if model.num_tasks > 1 else 0, model.width), torch.float32),
        "mask": ((n, model.action_dim), torch.float32),
    }
