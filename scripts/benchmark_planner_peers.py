"""The planners that ours is measured against, each behind the same few methods.

"TD-MPC2 planner, re-stated" is written from the equations of arXiv 2310.16828 (section 3.3 and the appendix's table of
hyper-parameters) in plain torch; it is not the authors' code, which ``--tdmpc2 PATH`` times from a checkout of it
(``benchmark_planner_external.py``).
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from benchmark_planner_work import NATIVE_SIZES, Budget, Gemm, Shapes, Unavailable, native_gemms, peer_gemms
from torch import nn
from torch.nn import functional as F

from m3po.models import WorldModel
from m3po.models.two_hot import symexp


@dataclass
class Setup:
    """What all contestants share."""

    model: WorldModel
    budget: Budget
    shapes: Shapes
    size: str
    obs_dim: int
    seed: int
    device: torch.device


@dataclass
class Inputs:
    """What a plan starts from, for n environments."""

    obs: torch.Tensor
    """Observations, shape (n, O); only the official code reads them, the others start from the latents."""

    z: torch.Tensor
    """Latents, shape (n, Z)."""

    mu: torch.Tensor
    """Mean action of the executed policy, shape (n, A)."""

    sigma: torch.Tensor
    """Deviation of the executed policy, shape (n, A)."""

    task: torch.Tensor
    """Task ids, shape (n,)."""

    ids: torch.Tensor
    """Environment ids, shape (n,)."""

    def __len__(self) -> int:
        return self.z.shape[0]


class Contestant(ABC):
    """One planner, built for a number of environments."""

    notes: str = ""
    """What differs from the common budget, for the table."""

    dtype: str = "float32"
    """Type of its matrix products."""

    budget: Budget
    """What it really searches, read back from the planner where it can be."""

    @abstractmethod
    def plan(self, x: Inputs) -> torch.Tensor:
        """Plan once. Returns the actions to execute, shape (n, A)."""

    @abstractmethod
    def returns(self, x: Inputs, actions: torch.Tensor) -> torch.Tensor | None:
        """Predicted returns (n, S) of candidates (n, S, H, A); ``None`` where the networks are not ours."""

    @abstractmethod
    def gemms(self, n: int) -> list[Gemm]:
        """Matrix products of a plan of n environments."""

    def memory(self, n: int) -> int | None:
        """Bytes that a plan of n environments is known to need; ``None`` where only a measurement tells."""
        return None


class Block(nn.Module):
    """Linear, LayerNorm, Mish, on the weights of a layer of ours."""

    def __init__(self, linear: nn.Linear, norm: nn.LayerNorm) -> None:
        """Refer to the weights."""
        super().__init__()
        self.linear, self.norm = linear, norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shapes (..., in) -> (..., out)."""
        y = self.linear(x)
        return F.mish(F.layer_norm(y, y.shape[-1:], self.norm.weight, self.norm.bias, self.norm.eps))


def _plain(network: nn.Sequential) -> nn.Sequential:
    """The same layers with torch's own activations; a nested trunk is flattened."""
    layers: list[nn.Module] = []
    for layer in network:
        if isinstance(layer, nn.Linear):
            layers.append(layer)
        elif isinstance(layer[0], nn.Linear):
            layers.append(Block(layer[0], layer[1]))
        else:
            layers.extend(_plain(layer))
    return nn.Sequential(*layers)


class Networks(nn.Module):
    """Our world model's weights behind plain modules, with an ensemble of value heads."""

    def __init__(self, model: WorldModel, num_values: int) -> None:
        """Wrap a model.

        Args:
            model: World model, whose weights are shared.
            num_values: Value heads; each is a copy of the model's, so that the objective is the model's.
        """
        super().__init__()
        if model.cfg.terminal_reward or model.cfg.balance_terminations:
            raise ValueError("The re-stated planner knows neither terminal_reward nor balance_terminations.")
        self.residual, self.group = model.residual, model.cfg.simnorm_dim
        self.transition = _plain(model.transition)
        self.latent_head, self.reward_head = model.latent_head, model.reward_head
        self.termination_head = model.termination_head
        self.prior_net = _plain(model.prior_head)
        self.values = nn.ModuleList(_plain(copy.deepcopy(model.value_head)) for _ in range(num_values))
        self.bins = model.two_hot.bins

    def _decode(self, logits: torch.Tensor) -> torch.Tensor:
        return symexp((F.softmax(logits, dim=-1) * self.bins).sum(-1))

    def _latent(self, features: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        logits = self.latent_head(features)
        if self.residual:
            logits = logits + torch.log(z + 1e-3)
        return F.softmax(logits.unflatten(-1, (-1, self.group)), dim=-1).flatten(-2)

    def next(self, z: torch.Tensor, action: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        """Next latent. Shapes (..., Z), (..., A), (..., E) -> (..., Z)."""
        return self._latent(self.transition(torch.cat([z, action, e], dim=-1)), z)

    def step(
        self, z: torch.Tensor, action: torch.Tensor, e: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Next latent (..., Z), reward (...,) in the task's reward scale, probability of going on (...,)."""
        features = self.transition(torch.cat([z, action, e], dim=-1))
        alive = torch.sigmoid(-self.termination_head(features).squeeze(-1))
        return self._latent(features, z), self._decode(self.reward_head(features)), alive

    def prior(self, z: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        """Mean action of the latent prior, shape (..., A)."""
        return self.prior_net(torch.cat([z, e], dim=-1))

    def value(self, z: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        """Terminal value (...,): all heads are evaluated, two drawn at random are averaged."""
        return self._two_of(self.values, torch.cat([z, e], dim=-1))

    def _two_of(self, heads: nn.ModuleList, x: torch.Tensor) -> torch.Tensor:
        logits = torch.stack([head(x) for head in heads])
        drawn = torch.randperm(len(heads), device=x.device)[:2]
        return self._decode(logits[drawn]).mean(0)


class NativeNetworks(nn.Module):
    """Networks of TD-MPC2's own shapes with random weights: what its planner costs on the model it was made for."""

    def __init__(self, size: str, action_dim: int, group: int = 8, num_bins: int = 101) -> None:
        """Create the networks.

        Args:
            size: Row of :data:`NATIVE_SIZES`.
            action_dim: Action dimensions.
            group: Dimensions of a simplex of the latent.
            num_bins: Bins of reward and value, over [-10, 10] in symlog space.
        """
        super().__init__()
        self.latent_dim, width, num_q = NATIVE_SIZES[size]
        self.group = group
        pair = self.latent_dim + action_dim

        def network(inputs: int, outputs: int) -> nn.Sequential:
            first, second = (Block(nn.Linear(i, width), nn.LayerNorm(width)) for i in (inputs, width))
            return nn.Sequential(first, second, nn.Linear(width, outputs))

        self.dynamics, self.latent_norm = network(pair, self.latent_dim), nn.LayerNorm(self.latent_dim)
        self.reward, self.pi = network(pair, num_bins), network(self.latent_dim, 2 * action_dim)
        self.q = nn.ModuleList(network(pair, num_bins) for _ in range(num_q))
        self.register_buffer("bins", torch.linspace(-10.0, 10.0, num_bins))

    _decode, _two_of = Networks._decode, Networks._two_of

    def next(self, z: torch.Tensor, action: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        """Next latent, shape (..., Z). Its networks take no task embedding in a single task."""
        logits = self.latent_norm(self.dynamics(torch.cat([z, action], dim=-1)))
        return F.softmax(logits.unflatten(-1, (-1, self.group)), dim=-1).flatten(-2)

    def step(self, z: torch.Tensor, action: torch.Tensor, e: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Next latent (..., Z), reward (...,), and 1: without terminations."""
        return self.next(z, action, e), self._decode(self.reward(torch.cat([z, action], dim=-1))), 1.0

    def prior(self, z: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        """Action of the stochastic policy prior, squashed, shape (..., A)."""
        mean, log_std = self.pi(z).chunk(2, dim=-1)
        std = torch.exp(-10.0 + 6.0 * (torch.tanh(log_std) + 1.0))
        return torch.tanh(mean + std * torch.randn_like(mean))

    def value(self, z: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        """``Q(z, pi(z))`` (...,): all value functions are evaluated, two drawn at random are averaged."""
        return self._two_of(self.q, torch.cat([z, self.prior(z, e)], dim=-1))


class Search(NamedTuple):
    """Outcome of a search for n environments."""

    action: torch.Tensor
    """First action of an elite drawn by its weight, plus noise, shape (n, A)."""

    mean: torch.Tensor
    """Final mean of the sampling distribution, shape (n, H, A)."""

    std: torch.Tensor
    """Final deviation of the sampling distribution, shape (n, H, A)."""


class RestatedPlanner:
    """TD-MPC2's planner for a batch of environments: MPPI over action sequences with a share from the policy prior."""

    def __init__(
        self,
        networks: Any,
        budget: Budget,
        temperature: float = 0.5,
        std_range: tuple[float, float] = (0.05, 2.0),
        bound: float = 1.0,
    ) -> None:
        """Bind the planner to networks; the defaults are the paper's.

        Args:
            networks: Object with ``next``, ``step``, ``prior`` and ``value`` as those of :class:`Networks`.
            budget: What to search.
            temperature: Factor of the returns in an elite's weight.
            std_range: Least deviation after an update, and the first one; action units.
            bound: Largest absolute action.
        """
        self.networks, self.budget = networks, budget
        self.temperature, self.std_range, self.bound = temperature, std_range, bound

    def evaluate(self, z: torch.Tensor, actions: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        """Predicted return of every candidate.

        Args:
            z: Latents, shape (n, Z).
            actions: Candidates, shape (n, S, H, A).
            e: Task embeddings, shape (n, E).

        Returns:
            Discounted rewards plus terminal value, weighted by the probability of getting there, shape (n, S).
        """
        z, e = (x.unsqueeze(1).expand(-1, actions.shape[1], -1) for x in (z, e))
        returns, weight = 0.0, 1.0
        for k in range(self.budget.horizon):
            z, reward, alive = self.networks.step(z, actions[:, :, k], e)
            returns = returns + weight * reward
            weight = weight * alive * self.budget.gamma
        return returns + weight * self.networks.value(z, e)

    @torch.no_grad()
    def search(self, z: torch.Tensor, mu: torch.Tensor, sigma: torch.Tensor, e: torch.Tensor) -> Search:
        """Plan. ``mu`` and ``sigma`` (n, A) are the executed policy's, which the policy's trajectories start with."""
        b, n = self.budget, z.shape[0]
        num_policy = b.prior_samples or 0
        shape = (n, b.horizon, mu.shape[-1])
        candidates = mu.new_empty(n, b.samples, *shape[1:])
        if num_policy:
            candidates[:, :num_policy] = self._policy(z, mu, sigma, e, num_policy)
        low, high = self.std_range
        mean, std = mu.new_zeros(shape), mu.new_full(shape, high)
        for _ in range(b.iterations):
            noise = torch.randn_like(candidates[:, num_policy:])
            drawn = mean.unsqueeze(1) + std.unsqueeze(1) * noise
            candidates[:, num_policy:] = drawn.clamp(-self.bound, self.bound)
            best, where = self.evaluate(z, candidates, e).topk(b.elites, dim=1)
            weight = F.softmax(self.temperature * best, dim=1)[..., None, None]
            elites = candidates.take_along_dim(where[..., None, None], dim=1)
            mean = (weight * elites).sum(1)
            std = (weight * (elites - mean.unsqueeze(1)).square()).sum(1).sqrt().clamp(low, high)
        chosen = torch.multinomial(weight[..., 0, 0], 1)[..., None, None]
        action = elites.take_along_dim(chosen, dim=1)[:, 0, 0]
        action = action + std[:, 0] * torch.randn_like(action)
        return Search(action.clamp(-self.bound, self.bound), mean, std)

    def _policy(
        self, z: torch.Tensor, mu: torch.Tensor, sigma: torch.Tensor, e: torch.Tensor, count: int
    ) -> torch.Tensor:
        """Action sequences (n, count, H, A) of the policy prior, followed closed-loop with the policy's noise."""
        z, mu, sigma, e = (x.unsqueeze(1).expand(-1, count, -1) for x in (z, mu, sigma, e))
        actions: list[torch.Tensor] = []
        for k in range(self.budget.horizon):
            if k:
                z = self.networks.next(z, actions[-1], e)
            centre = self.networks.prior(z, e) if k else mu
            actions.append((centre + sigma * torch.randn_like(mu)).clamp(-self.bound, self.bound))
        return torch.stack(actions, dim=2)


class Restated(Contestant):
    """TD-MPC2's planner, re-stated, on our weights."""

    def __init__(self, setup: Setup, num_values: int = 5, compiled: bool = False) -> None:
        """Build the planner.

        Args:
            setup: Model and budget.
            num_values: Value heads.
            compiled: Pass the whole search through ``torch.compile``.
        """
        self.model, self.shapes, self.num_values = setup.model, setup.shapes, num_values
        self.planner = RestatedPlanner(Networks(setup.model, num_values), setup.budget)
        self._search = torch.compile(self.planner.search) if compiled else self.planner.search
        self.notes = f"{num_values} value head(s)" + (", torch.compile" if compiled else "")

    @property
    def budget(self) -> Budget:
        """The planner's own."""
        return self.planner.budget

    @torch.no_grad()
    def plan(self, x: Inputs) -> torch.Tensor:
        """Plan once."""
        return self._search(x.z, x.mu, x.sigma, self.model.embed(x.task)).action

    @torch.no_grad()
    def returns(self, x: Inputs, actions: torch.Tensor) -> torch.Tensor:
        """Evaluate as within a plan."""
        return self.planner.evaluate(x.z, actions, self.model.embed(x.task))

    def gemms(self, n: int) -> list[Gemm]:
        """Products of a plan."""
        return peer_gemms(n, self.shapes, self.budget, self.num_values)


class Native(Contestant):
    """TD-MPC2's planner, re-stated, on networks of TD-MPC2's own shapes."""

    notes = "its own networks, random weights: another objective"

    def __init__(self, setup: Setup) -> None:
        """Build the planner."""
        if setup.size not in NATIVE_SIZES:
            raise Unavailable(f"TD-MPC2 has no size {setup.size} (it has {', '.join(NATIVE_SIZES)})")
        networks = NativeNetworks(setup.size, setup.shapes.action).to(setup.device)
        if networks.latent_dim != setup.shapes.latent:
            raise Unavailable(f"latents of {networks.latent_dim} and {setup.shapes.latent} dimensions")
        self.size, self.action_dim = setup.size, setup.shapes.action
        self.planner, self.budget = RestatedPlanner(networks, setup.budget), setup.budget

    def plan(self, x: Inputs) -> torch.Tensor:
        """Plan once."""
        return self.planner.search(x.z, x.mu, x.sigma, x.z[:, :0]).action

    def returns(self, x: Inputs, actions: torch.Tensor) -> None:
        """Not comparable: other networks."""
        return None

    def gemms(self, n: int) -> list[Gemm]:
        """Products of a plan."""
        return native_gemms(n, self.size, self.action_dim, self.budget)
