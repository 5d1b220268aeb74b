"""The imagined return of many candidates: what :class:`Objective` computes, with less work around the matrices.

The task embedding's part of a first layer is a bias of each task. The start's part of the first transition is computed
once for all candidates of an environment. Statistics are gathered once, and activations change in place.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from rsl_rl.models import MLPModel
from rsl_rl.modules.distribution import GaussianDistribution
from torch import nn

from m3po.models.task_policy import TaskGaussian, TaskMLPModel, embed
from m3po.models.world_model import INPUT_BOUND, PREDICTABLE
from m3po.planning.objective import Objective

Tensors = dict[str, torch.Tensor]


def unsupported(objective: Objective) -> str | None:
    """Why an objective has no fused form; ``None`` if it has."""
    if not objective.model.cfg.anchor:
        return "the latent has no anchor"
    if objective.critic is None or objective.units is None:
        return "the critic behind the values is not known"
    for name, network in (("policy", objective.actor), ("critic", objective.critic)):
        if type(network) not in (MLPModel, TaskMLPModel):
            return f"the {name} is a {type(network).__name__}"
        if not isinstance(network.mlp[-1], nn.Linear):
            return f"the {name}'s output is not linear"
    if type(objective.actor.distribution) not in (GaussianDistribution, TaskGaussian):
        return f"the policy has a {type(objective.actor.distribution).__name__}"
    return None


class FusedReturns:
    """Imagined returns (2) by copies of weights and statistics, which are made anew after :meth:`refresh`.

    Torch's own version counters would not tell a change: fused optimisers do not touch them. The copies keep their
    places in memory, so that a CUDA graph which reads them stays valid.
    """

    def __init__(self, objective: Objective, precision: str) -> None:
        """Bind to an objective that is not :func:`unsupported`; nothing is copied yet.

        Args:
            objective: The imagined return.
            precision: ``bfloat16``: the type of matrices and activations; ``float32``: they keep the model's.
        """
        self.objective, model = objective, objective.model
        dtype = torch.bfloat16 if precision == "bfloat16" else model.task_embedding.dtype
        inputs = model.transition[0][0].in_features - model.cfg.task_embedding_dim
        latent_dim = model.anchor_dim + model.cfg.features
        self._state, self._action = slice(latent_dim), slice(latent_dim, inputs)
        self._transition = _Layers(model.transition, inputs, dtype)
        self._actor = _Network(objective.actor, objective.group_dims, dtype)
        self._critic = _Network(objective.critic, objective.group_dims, dtype)
        self._tables: Tensors = {}
        self._stale = True

    def refresh(self) -> None:
        """Say that weights or statistics are not those of the last plan any more."""
        self._stale = True

    def pack(self) -> None:
        """Copy weights and statistics if they are stale; to be called before a CUDA graph is captured or replayed."""
        if not self._stale:
            return
        objective, model = self.objective, self.objective.model
        # Tensors that were made in inference mode could not be changed outside it.
        with torch.inference_mode(False), torch.no_grad():
            tasks = torch.arange(model.num_tasks, device=model.task_embedding.device)
            predicted = model.own_dims * (model.explained / PREDICTABLE).clamp(0.0, 1.0)
            tables = {
                "mean": model.obs_normalizer.mean.unsqueeze(1),
                "deviation": (model.obs_normalizer.deviation() / model.obs_normalizer.scale).unsqueeze(1),
                "change": (model.changes.deviation() * predicted).unsqueeze(1),
                "reward_mean": model.reward_normalizer.mean,
                "reward_deviation": model.reward_normalizer.deviation() / model.reward_normalizer.scale,
                "fall": model.falls.terminal.unsqueeze(1),
                "gamma": objective.discounts.unsqueeze(1),
                "units": objective.units(tasks).unsqueeze(1),
            }
            for name, table in tables.items():
                _keep(self._tables, name, table)
            last = model.transition[-1]
            self._transition.pack(model.embed(tasks), last.weight, last.bias)
            self._actor.pack(tasks)
            self._critic.pack(tasks)
        self._stale = False

    def __call__(self, z: torch.Tensor, mu: torch.Tensor, noise: torch.Tensor, task: torch.Tensor) -> torch.Tensor:
        """Imagined returns, as :meth:`Objective.returns` defines them, of S candidates in each of n environments.

        Args:
            z: Latents, (n, Z).
            mu: Mean action of the policy in them, (n, A).
            noise: What is added to the policy's actions, (n, S, H, A), action units.
            task: Task ids, (n,).

        Returns:
            Returns in reward units, (n, S).
        """
        self.pack()
        model, horizon, average = self.objective.model, self.objective.horizon, self.objective.average
        samples, dims, features = noise.shape[1], model.anchor_dim, model.cfg.features
        at = {name: table[task] for name, table in self._tables.items()}
        actor, critic, bias = self._actor.of(task), self._critic.of(task), self._transition.bias(task)
        x, y, action = z[:, None, :dims], z[:, None, dims:], mu.unsqueeze(1) + noise[:, :, 0]
        earned, survival, ends = torch.zeros_like(noise[:, :, 0, 0]), torch.ones_like(noise[:, :, 0, 0]), []
        for k in range(horizon):
            if k > 0:
                action = actor(x) + noise[:, :, k]
            bounded = ((x - at["mean"]) / at["deviation"]).clamp_(-INPUT_BOUND, INPUT_BOUND)
            if k == 0:  # candidates differ by their actions alone: the state's part is a bias of the environment
                first = self._transition.first(torch.cat([bounded, y], dim=-1), bias, self._state)
                out = self._transition(action, first, self._action)
                x = x.repeat_interleave(samples, 1)
            else:
                out = self._transition(torch.cat([bounded, y, action], dim=-1), bias)
            change, logits, reward, termination = out.split([dims, features, 1, 1], dim=-1)
            alive = torch.sigmoid(-termination.squeeze(-1))
            reward = at["reward_mean"] + reward.squeeze(-1) * at["reward_deviation"]
            earned = earned + survival * (alive * reward + (1.0 - alive) * at["fall"])
            survival = survival * at["gamma"] * alive
            x.addcmul_(change, at["change"])
            if k + 1 < horizon:
                y = model.simnorm(logits) if features > 0 else logits
            if average or k + 1 == horizon:
                ends.append(earned + survival * (critic(x).squeeze(-1) * at["units"]))
        return torch.stack(ends).mean(0)


class _Layers:
    """Copies of linear layers, each but the last with an activation and maybe a LayerNorm behind it."""

    def __init__(self, network: nn.Sequential, inputs: int, dtype: torch.dtype) -> None:
        """Find the layers.

        Args:
            network: The layers, maybe nested.
            inputs: Inputs before the task embedding.
            dtype: Type of the copies.
        """
        self.inputs, self.dtype, self.tensors = inputs, dtype, {}
        self._linear: list[nn.Linear] = []
        self._between: list[list[nn.Module]] = []
        for module in _leaves(network):
            if isinstance(module, nn.Linear):
                self._linear.append(module)
                self._between.append([])
                continue
            if hasattr(module, "inplace"):
                module = copy.copy(module)
                module.inplace = True
            self._between[-1].append(module)

    def pack(self, embeddings: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> None:
        """Copy the weights.

        Args:
            embeddings: Task embeddings, (K, E), whose part becomes a bias of each task.
            weight: Weights of the last layer, (outputs, W).
            bias: Its biases, (outputs,).
        """
        layers = [(linear.weight, linear.bias) for linear in self._linear[:-1]] + [(weight, bias)]
        first, shared = layers[0]
        layers[0] = (first[:, : self.inputs], shared + embeddings @ first[:, self.inputs :].T)
        for i, (weight, bias) in enumerate(layers):
            _keep(self.tensors, f"weight {i}", weight.T.to(self.dtype))
            _keep(self.tensors, f"bias {i}", bias.to(self.dtype))
            for norm in self._between[i]:
                if isinstance(norm, nn.LayerNorm):
                    _keep(self.tensors, f"scale {i}", norm.weight.to(self.dtype))
                    _keep(self.tensors, f"shift {i}", norm.bias.to(self.dtype))

    def bias(self, task: torch.Tensor) -> torch.Tensor:
        """Bias of the first layer by task: (n,) -> (n, W)."""
        return self.tensors["bias 0"][task]

    def first(self, x: torch.Tensor, bias: torch.Tensor, inputs: slice = slice(None)) -> torch.Tensor:
        """First product by the weights of some inputs, plus biases (n, W): (n, S, I) -> (n S, W)."""
        bias = bias.repeat_interleave(x.shape[1], 0)
        return bias.addmm_(x.flatten(0, 1).to(self.dtype), self.tensors["weight 0"][inputs])

    def __call__(self, x: torch.Tensor, bias: torch.Tensor, inputs: slice = slice(None)) -> torch.Tensor:
        """All layers, see :meth:`first`: (n, S, I) -> (n, S, outputs), in the type of the inputs."""
        hidden = self.first(x, bias, inputs)
        for i, modules in enumerate(self._between[:-1]):
            for module in modules:
                if isinstance(module, nn.LayerNorm):
                    scale, shift = self.tensors[f"scale {i}"], self.tensors[f"shift {i}"]
                    hidden = nn.functional.layer_norm(hidden, hidden.shape[-1:], scale, shift, module.eps)
                else:
                    hidden = module(hidden)
            hidden = torch.addmm(self.tensors[f"bias {i + 1}"], hidden, self.tensors[f"weight {i + 1}"])
        return hidden.to(x.dtype).view(*x.shape[:2], -1)


class _Network:
    """Policy or critic on the raw observations of the world model."""

    def __init__(self, network: MLPModel, group_dims: dict[str, int], dtype: torch.dtype) -> None:
        """Find the observations that the network reads among those of the world model."""
        self.network, self.layers = network, _Layers(network.mlp, network.obs_dim, dtype)
        self._tables: Tensors = {}
        every = torch.arange(sum(group_dims.values()))
        columns = dict(zip(group_dims, every.split(list(group_dims.values())), strict=True))
        own = torch.cat([columns[group] for group in network.obs_groups])
        self._columns = None if torch.equal(own, every) else own.to(network.mlp[-1].weight.device)

    def pack(self, tasks: torch.Tensor) -> None:
        """Copy weights and statistics, of all tasks (K,)."""
        network, normalizer = self.network, self.network.obs_normalizer
        mean = network.mlp[0].weight.new_zeros(1, network.obs_dim)
        deviation, embeddings = torch.ones_like(mean), mean[:, :0]
        if isinstance(network, TaskMLPModel):
            mean, deviation = normalizer.mean, normalizer.deviation() / normalizer.scale
            embeddings = embed(network.task_embedding, tasks)
        elif network.obs_normalization:
            mean, deviation = normalizer.mean.unsqueeze(0), normalizer.std.unsqueeze(0) + normalizer.eps
        for name, table in (("mean", mean), ("deviation", deviation)):
            _keep(self._tables, name, table.expand(len(tasks), -1).unsqueeze(1))
        weight, bias = network.mlp[-1].weight, network.mlp[-1].bias
        if isinstance(network, TaskMLPModel):  # the output layers of all tasks, one below the other
            mask = network.distribution.action_mask if network.distribution is not None else bias.new_ones(1, 1)
            weight = ((weight + network.task_head.weight) * mask.unsqueeze(-1)).flatten(0, 1)
            bias = ((bias + network.task_head.bias) * mask).flatten()
        self.layers.pack(embeddings.expand(len(tasks), -1), weight, bias)

    def of(self, task: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        """The network for environments of tasks (n,): observations (n, S, O) -> outputs (n, S, outputs)."""
        mean, deviation, bias = self._tables["mean"][task], self._tables["deviation"][task], self.layers.bias(task)

        def apply(x: torch.Tensor) -> torch.Tensor:
            x = x if self._columns is None else x.index_select(2, self._columns)
            out = self.layers((x - mean).div_(deviation), bias)
            if not isinstance(self.network, TaskMLPModel):
                return out
            out = out.unflatten(-1, (-1, self.network.mlp[-1].out_features))
            return out.take_along_dim(task.view(-1, 1, 1, 1), dim=2).squeeze(2)

        return apply


def _leaves(network: nn.Sequential) -> list[nn.Module]:
    """Modules of nested sequences, in order; a module that occurs twice is there twice."""
    return [leaf for m in network for leaf in (_leaves(m) if isinstance(m, nn.Sequential) else [m])]


def _keep(tensors: Tensors, name: str, value: torch.Tensor) -> None:
    """Store a copy, at the place of an older one."""
    if name in tensors:
        tensors[name].copy_(value)
    else:
        tensors[name] = value.clone(memory_format=torch.contiguous_format)
