"""The planners that ours is measured against, each behind the same few methods, all on the same networks.

"TD-MPC2 planner, re-stated" is written from the equations of arXiv 2310.16828 (section 3.3 and the appendix's table of
hyper-parameters) in plain torch; it is not the authors' code.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from m3po.planning import Objective, PlanInputs

INSTALL = "uv pip install --python .venv --no-deps --require-hashes -r requirements-benchmark.txt"


class Unavailable(Exception):
    """A contestant cannot run here; the message says why."""


@dataclass(frozen=True)
class Budget:
    """What a planner searches."""

    samples: int
    iterations: int
    horizon: int
    elites: int
    policy_samples: int
    gamma: float


@dataclass
class Setup:
    """What all contestants share."""

    objective: Objective
    budget: Budget
    latent_dim: int
    action_dim: int
    seed: int
    device: torch.device


class Candidates(NamedTuple):
    """Perturbations of the policy in its stds, and the actions that follow from them, (n, S, H, A) each."""

    u: torch.Tensor
    actions: torch.Tensor


class Contestant(ABC):
    """One planner, built for a number of environments."""

    label: str = ""
    notes: str = ""
    """What differs from the common budget."""

    low_precision: bool = False
    """Whether its matrix products are in bfloat16."""

    @property
    @abstractmethod
    def budget(self) -> dict[str, Any]:
        """Fields of :class:`Budget` that it has, read back from the planner."""

    @abstractmethod
    def plan(self, inputs: PlanInputs) -> torch.Tensor:
        """Plan once. Returns the actions to execute, (n, A)."""

    @abstractmethod
    def returns(self, inputs: PlanInputs, candidates: Candidates) -> torch.Tensor:
        """Imagined returns of candidates, (n, S), as within a plan."""


class Networks:
    """The common objective's networks, for rows of latents (R, Z) of a single task."""

    def __init__(self, objective: Objective) -> None:
        """Bind to an objective."""
        self.objective = objective

    def step(self, z: torch.Tensor, action: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Next latents (R, Z), rewards (R,), probabilities (R,) that the episode goes on."""
        return self.objective.model.step(z, action, _task(z))

    def policy(self, z: torch.Tensor) -> torch.Tensor:
        """Mean actions, (R, A)."""
        return self.objective.policy(z, _task(z))

    def value(self, z: torch.Tensor) -> torch.Tensor:
        """Terminal values, (R,)."""
        return self.objective.value(z, _task(z))


def _task(z: torch.Tensor) -> torch.Tensor:
    return torch.zeros(len(z), dtype=torch.long, device=z.device)


class Restated(Contestant):
    """TD-MPC2's planner, re-stated with the paper's constants: MPPI over action sequences."""

    label = "TD-MPC2 planner, re-stated"
    notes = "one value head"
    temperature, std_range, bound = 0.5, (0.05, 2.0), 1.0

    def __init__(self, setup: Setup, n: int, networks: Any = None) -> None:
        """Build the planner, by default on the common networks; others have the methods of :class:`Networks`."""
        self.networks, self.b = networks or Networks(setup.objective), setup.budget

    @property
    def budget(self) -> dict[str, Any]:
        """The planner's own."""
        return asdict(self.b)

    def plan(self, inputs: PlanInputs) -> torch.Tensor:
        """Plan once."""
        return self.search(inputs.z, inputs.mu, inputs.sigma)[0]

    @torch.no_grad()
    def returns(self, inputs: PlanInputs, candidates: Candidates) -> torch.Tensor:
        """Evaluate as within a plan."""
        return self.evaluate(inputs.z, candidates.actions)

    def evaluate(self, z: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        """Imagined returns (n, S) of candidates (n, S, H, A) from latents (n, Z)."""
        shape, actions = actions.shape[:2], actions.flatten(0, 1)
        z, returns, weight = z.repeat_interleave(shape[1], 0), 0.0, 1.0
        for k in range(self.b.horizon):
            z, reward, alive = self.networks.step(z, actions[:, k])
            returns = returns + weight * reward
            weight = weight * alive * self.b.gamma
        return (returns + weight * self.networks.value(z)).view(shape)

    @torch.no_grad()
    def search(self, z: torch.Tensor, mu: torch.Tensor, sigma: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Plan from latents (n, Z), where the policy's mean and std are (n, A).

        Returns an elite's first action, drawn by weight, plus noise; and mean and std of the plan, (n, H, A).
        """
        share, shape, (low, high) = self.b.policy_samples, (len(z), self.b.horizon, mu.shape[-1]), self.std_range
        candidates = mu.new_empty(len(z), self.b.samples, *shape[1:])
        if share:
            candidates[:, :share] = self.follow_policy(z, mu, sigma, share)
        mean, std = mu.new_zeros(shape), mu.new_full(shape, high)
        for _ in range(self.b.iterations):
            noise = torch.randn_like(candidates[:, share:])
            candidates[:, share:] = (mean.unsqueeze(1) + std.unsqueeze(1) * noise).clamp(-self.bound, self.bound)
            best, where = self.evaluate(z, candidates).topk(self.b.elites, dim=1)
            weight = F.softmax(self.temperature * best, dim=1)[..., None, None]
            elites = candidates.take_along_dim(where[..., None, None], dim=1)
            mean = (weight * elites).sum(1)
            std = (weight * (elites - mean.unsqueeze(1)).square()).sum(1).sqrt().clamp(low, high)
        chosen = torch.multinomial(weight[..., 0, 0], 1)[..., None, None]
        action = elites.take_along_dim(chosen, dim=1)[:, 0, 0]
        action = action + std[:, 0] * torch.randn_like(action)
        return action.clamp(-self.bound, self.bound), mean, std

    def follow_policy(self, z: torch.Tensor, mu: torch.Tensor, sigma: torch.Tensor, count: int) -> torch.Tensor:
        """Action sequences (n, count, H, A) of the policy with its noise, closed-loop."""
        z, centre, sigma = (x.repeat_interleave(count, 0) for x in (z, mu, sigma))
        actions: list[torch.Tensor] = []
        for k in range(self.b.horizon):
            if k:
                z = self.networks.step(z, actions[-1])[0]
                centre = self.networks.policy(z)
            actions.append((centre + sigma * torch.randn_like(sigma)).clamp(-self.bound, self.bound))
        return torch.stack(actions, dim=1).unflatten(0, (-1, count))


class PytorchMppi(Contestant):
    """``MPPI_Batched`` of pytorch-mppi; dynamics and cost are callbacks into the networks."""

    label = "pytorch-mppi MPPI_Batched"
    notes = "no policy trajectories, no elites (softmax over all samples), one noise for all environments"

    def __init__(self, setup: Setup, n: int) -> None:
        """Build the planner for n environments."""
        try:
            from pytorch_mppi import mppi
        except ImportError:
            raise Unavailable(f"not installed: {INSTALL}") from None
        b = setup.budget
        self.networks, self.gamma, self.iterations, self.n = Networks(setup.objective), b.gamma, b.iterations, n
        self.mppi = mppi.MPPI_Batched(
            self._dynamics,
            self._cost,
            nx=setup.latent_dim,
            noise_sigma=torch.eye(setup.action_dim),
            num_envs=n,
            num_samples=b.samples,
            horizon=b.horizon,
            device=setup.device,
            step_dependent_dynamics=True,
        )

    @property
    def budget(self) -> dict[str, Any]:
        """Samples and horizon as the planner holds them."""
        return {"samples": self.mppi.K, "horizon": self.mppi.T, "iterations": self.iterations, "gamma": self.gamma}

    def _dynamics(self, z: torch.Tensor, action: torch.Tensor, k: int) -> torch.Tensor:
        z, reward, alive = self.networks.step(z, action)
        self._reward, self._alive = self._alive * reward, self._alive * alive
        return z

    def _cost(self, z: torch.Tensor, action: torch.Tensor, k: int) -> torch.Tensor:
        cost = -(self.gamma**k) * self._reward
        if k == self.mppi.T - 1:
            cost = cost - self.gamma ** (k + 1) * self._alive * self.networks.value(z)
        return cost

    @torch.no_grad()
    def plan(self, inputs: PlanInputs) -> torch.Tensor:
        """Refine a plan of zeros ``iterations`` times."""
        self.mppi.U = inputs.z.new_zeros(self.n, self.mppi.T, self.mppi.nu)
        for _ in range(self.iterations):
            self._alive = 1.0
            action = self.mppi.command(inputs.z, shift_nominal_trajectory=False)
        return action

    @torch.no_grad()
    def returns(self, inputs: PlanInputs, candidates: Candidates) -> torch.Tensor:
        """Negative cost of candidates through the same callbacks."""
        actions = candidates.actions
        z, cost, self._alive = inputs.z.repeat_interleave(actions.shape[1], 0), 0.0, 1.0
        for k in range(self.mppi.T):
            action = actions[:, :, k].flatten(0, 1)
            z = self._dynamics(z, action, k)
            cost = cost + self._cost(z, action, k)
        return -cost.view(actions.shape[:2])


class TorchRL(Contestant):
    """torchrl's ``MPPIPlanner`` on an environment that steps the latents."""

    label = "torchrl MPPIPlanner"
    notes = "no policy trajectories; sampling starts at mean 0 and std 1; the advantage module is ours"

    def __init__(self, setup: Setup, n: int) -> None:
        """Build environment and planner."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                from torchrl.data import Composite, Unbounded
                from torchrl.envs.model_based import ModelBasedEnvBase
                from torchrl.modules import MPPIPlanner
        except ImportError:
            raise Unavailable(f"not installed: {INSTALL}") from None
        from tensordict import TensorDict

        networks, b, device = Networks(setup.objective), setup.budget, setup.device

        def rows(function: Any, *tensors: torch.Tensor) -> Any:
            """Call a function of rows with tensors of any batch shape."""
            shape = tensors[0].shape[:-1]
            out = function(*(x.flatten(0, -2) for x in tensors))
            return [x.unflatten(0, shape) for x in out] if isinstance(out, tuple) else out.unflatten(0, shape)

        class LatentEnv(ModelBasedEnvBase):
            """Imagined steps; ``alive`` is the probability of having got this far."""

            def __init__(self) -> None:
                super().__init__(torch.nn.Identity(), device=device, batch_size=[])
                sizes = {"z": setup.latent_dim, "alive": 1}
                self.observation_spec = Composite({k: Unbounded((d,), device=device) for k, d in sizes.items()})
                self.state_spec = self.observation_spec.clone()
                self.action_spec = Unbounded((setup.action_dim,), device=device)
                self.reward_spec = Unbounded((1,), device=device)

            def _reset(self, tensordict: Any = None, **kwargs: Any) -> Any:
                raise NotImplementedError("Plans start from given latents.")

            def _step(self, td: Any) -> Any:
                z, reward, alive = rows(networks.step, td["z"], td["action"])
                before, never = td["alive"], torch.zeros_like(td["alive"], dtype=torch.bool)
                step = {"z": z, "alive": before * alive.unsqueeze(-1), "reward": before * reward.unsqueeze(-1)}
                return TensorDict(step | {"done": never, "terminated": never}, td.batch_size, device=device)

        class Return(torch.nn.Module):
            """Discounted rewards plus terminal value of trajectories (..., H), as the planner's advantage."""

            def forward(self, td: Any) -> Any:
                reward, last = td["next", "reward"], td["next"][..., -1]
                value = last["alive"] * rows(networks.value, last["z"]).unsqueeze(-1)
                discount = b.gamma ** torch.arange(reward.shape[-2], device=device).unsqueeze(-1)
                returns = (discount * reward).sum(-2) + b.gamma ** reward.shape[-2] * value
                return td.set("advantage", returns.unsqueeze(-2).expand_as(reward))

        self.env, self.gamma, self._dict = LatentEnv(), b.gamma, TensorDict
        sizes = {"planning_horizon": b.horizon, "optim_steps": b.iterations, "num_candidates": b.samples}
        self.planner = MPPIPlanner(self.env, Return(), temperature=0.5, top_k=b.elites, **sizes).to(device)

    @property
    def budget(self) -> dict[str, Any]:
        """As the planner holds it."""
        p = self.planner
        sizes = {"samples": p.num_candidates, "iterations": p.optim_steps, "horizon": p.planning_horizon}
        return sizes | {"elites": p.top_k, "gamma": self.gamma}

    def _inputs(self, inputs: PlanInputs) -> Any:
        content = {"z": inputs.z, "alive": torch.ones_like(inputs.z[:, :1])}
        return self._dict(content, [len(inputs.z)], device=inputs.z.device)

    @torch.no_grad()
    def plan(self, inputs: PlanInputs) -> torch.Tensor:
        """Plan once."""
        return self.planner.planning(self._inputs(inputs))

    @torch.no_grad()
    def returns(self, inputs: PlanInputs, candidates: Candidates) -> torch.Tensor:
        """Advantage of candidates through the same environment."""
        actions = candidates.actions
        td = self._inputs(inputs).unsqueeze(-1).expand(*actions.shape[:2]).to_tensordict()
        steps = iter(actions.unbind(2))
        td = self.env.rollout(
            actions.shape[2],
            policy=lambda tensordict: tensordict.set("action", next(steps)),
            auto_reset=False,
            tensordict=td,
            break_when_any_done=False,
        )
        return self.planner.advantage_module(td)["advantage"][..., 0, 0]
