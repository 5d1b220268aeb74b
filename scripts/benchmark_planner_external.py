"""Planners of other packages, driven with our world model, and TD-MPC2's own code from a checkout of it."""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
import types
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from benchmark_planner_peers import Contestant, Inputs, Setup
from benchmark_planner_work import NATIVE_SIZES, Budget, Gemm, Unavailable, native_gemms, peer_gemms
from omegaconf import OmegaConf

from m3po.errors import UserError

INSTALL = "uv pip install --python .venv --no-deps --require-hashes -r requirements-benchmark.txt"


def _import(module: str, package: str) -> Any:
    """Import a peer quietly.

    Raises:
        Unavailable: If the package is not installed; the message holds the command that installs it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(module)
    except ImportError as error:
        missing = (error.name or "").split(".")[0] == module.split(".")[0]
        raise Unavailable(f"not installed: {INSTALL}" if missing else f"{package} fails to import: {error}") from None


class PytorchMppi(Contestant):
    """``MPPI_Batched`` of pytorch-mppi; dynamics and cost are callbacks into our model."""

    notes = (
        "no policy trajectories, no elites (softmax over all samples), one noise for all environments; "
        "the terminal value is part of the last step's cost"
    )

    def __init__(self, setup: Setup, n: int) -> None:
        """Build the planner for n environments."""
        module = _import("pytorch_mppi.mppi", "pytorch-mppi")
        if not hasattr(module, "MPPI_Batched"):
            raise Unavailable("this pytorch-mppi has no MPPI_Batched; 0.9.1 has")
        self.model, self.shapes, self.gamma = setup.model, setup.shapes, setup.budget.gamma
        self.iterations, self.n = setup.budget.iterations, n
        self.mppi = module.MPPI_Batched(
            self._dynamics,
            self._cost,
            nx=setup.shapes.latent,
            noise_sigma=torch.eye(setup.shapes.action),
            num_envs=n,
            num_samples=setup.budget.samples,
            horizon=setup.budget.horizon,
            device=setup.device,
            step_dependent_dynamics=True,
        )

    @property
    def budget(self) -> Budget:
        """Samples and horizon as the planner holds them."""
        return Budget(self.mppi.K, self.iterations, self.mppi.T, self.gamma)

    def _dynamics(self, z: torch.Tensor, action: torch.Tensor, k: int) -> torch.Tensor:
        z, reward, survives = self.model.step(z, action, self._e, self._task)
        self._reward, self._alive = self._alive * reward, self._alive * survives
        return z

    def _cost(self, z: torch.Tensor, action: torch.Tensor, k: int) -> torch.Tensor:
        cost = -(self.gamma**k) * self._reward
        if k == self.mppi.T - 1:
            cost = cost - self.gamma ** (k + 1) * self._alive * self.model.value(z, self._e)
        return cost

    def _start(self, x: Inputs, candidates: int) -> None:
        self._task = x.task.repeat_interleave(candidates)
        self._e = self.model.embed(x.task).repeat_interleave(candidates, dim=0)

    @torch.no_grad()
    def plan(self, x: Inputs) -> torch.Tensor:
        """Refine a plan of zeros ``iterations`` times."""
        self._start(x, self.mppi.K)
        self.mppi.U = x.z.new_zeros(self.n, self.mppi.T, self.mppi.nu)
        for _ in range(self.iterations):
            self._alive = 1.0
            action = self.mppi.command(x.z, shift_nominal_trajectory=False)
        return action

    @torch.no_grad()
    def returns(self, x: Inputs, actions: torch.Tensor) -> torch.Tensor:
        """Negative cost of candidates through the same callbacks."""
        self._start(x, actions.shape[1])
        self._alive, cost = 1.0, 0.0
        z = x.z.repeat_interleave(actions.shape[1], dim=0)
        for k in range(self.mppi.T):
            action = actions[:, :, k].flatten(0, 1)
            z = self._dynamics(z, action, k)
            cost = cost + self._cost(z, action, k)
        return -cost.unflatten(0, actions.shape[:2])

    def gemms(self, n: int) -> list[Gemm]:
        """Products of a plan."""
        return peer_gemms(n, self.shapes, self.budget)


class TorchRL(Contestant):
    """torchrl's ``MPPIPlanner`` on an environment that steps our model's latents."""

    notes = (
        "no policy trajectories; sampling starts at mean 0 and deviation 1; the advantage module is ours: discounted "
        "rewards plus the terminal value, evaluated once"
    )

    def __init__(self, setup: Setup) -> None:
        """Build environment and planner."""
        modules = _import("torchrl.modules", "torchrl")
        envs = _import("torchrl.envs.model_based", "torchrl")
        data = _import("torchrl.data", "torchrl")
        from tensordict import TensorDict

        model, b, shapes, device = setup.model, setup.budget, setup.shapes, setup.device

        class LatentEnv(envs.ModelBasedEnvBase):
            """Imagined steps; ``alive`` is the probability of having got this far."""

            def __init__(self) -> None:
                super().__init__(torch.nn.Identity(), device=device, batch_size=[])
                names = {"z": shapes.latent, "alive": 1, "e": shapes.embedding}
                self.observation_spec = data.Composite(
                    {k: data.Unbounded((d,), device=device) for k, d in names.items()}
                )
                self.state_spec = self.observation_spec.clone()
                self.action_spec = data.Unbounded((shapes.action,), device=device)
                self.reward_spec = data.Unbounded((1,), device=device)

            def _reset(self, tensordict: Any = None, **kwargs: Any) -> Any:
                raise NotImplementedError("Plans start from given latents.")

            def _step(self, td: Any) -> Any:
                task = torch.zeros(td.batch_size, dtype=torch.long, device=device)
                z, reward, survives = model.step(td["z"], td["action"], td["e"], task)
                alive, never = td["alive"], torch.zeros_like(td["alive"], dtype=torch.bool)
                step = {"z": z, "e": td["e"], "alive": alive * survives.unsqueeze(-1), "done": never}
                return TensorDict(
                    step | {"terminated": never, "reward": alive * reward.unsqueeze(-1)}, td.batch_size, device=device
                )

        class Return(torch.nn.Module):
            """Discounted rewards plus terminal value of trajectories (..., H), as the planner's advantage."""

            def forward(self, td: Any) -> Any:
                reward, last = td["next", "reward"], td["next"][..., -1]
                value = last["alive"] * model.value(last["z"], last["e"]).unsqueeze(-1)
                discount = b.gamma ** torch.arange(reward.shape[-2], device=device).unsqueeze(-1)
                returns = (discount * reward).sum(-2) + b.gamma ** reward.shape[-2] * value
                return td.set("advantage", returns.unsqueeze(-2).expand_as(reward))

        self.shapes, self.model, self.gamma = shapes, model, b.gamma
        self.env = LatentEnv()
        self.planner = modules.MPPIPlanner(
            self.env,
            Return(),
            temperature=0.5,
            planning_horizon=b.horizon,
            optim_steps=b.iterations,
            num_candidates=b.samples,
            top_k=b.elites,
        ).to(device)
        self._make = TensorDict

    @property
    def budget(self) -> Budget:
        """As the planner holds it."""
        p = self.planner
        return Budget(p.num_candidates, p.optim_steps, p.planning_horizon, self.gamma, elites=p.top_k)

    def _start(self, x: Inputs) -> Any:
        content = {"z": x.z, "e": self.model.embed(x.task), "alive": torch.ones_like(x.z[:, :1])}
        return self._make(content, [len(x)], device=x.z.device)

    @torch.no_grad()
    def plan(self, x: Inputs) -> torch.Tensor:
        """Plan once."""
        return self.planner.planning(self._start(x))

    @torch.no_grad()
    def returns(self, x: Inputs, actions: torch.Tensor) -> torch.Tensor:
        """Advantage of candidates through the same environment."""
        td = self._start(x).unsqueeze(-1).expand(*actions.shape[:2]).to_tensordict()
        steps = iter(actions.unbind(2))
        td = self.env.rollout(
            actions.shape[2],
            policy=lambda tensordict: tensordict.set("action", next(steps)),
            auto_reset=False,
            tensordict=td,
            break_when_any_done=False,
        )
        return self.planner.advantage_module(td)["advantage"][..., 0, 0]

    def gemms(self, n: int) -> list[Gemm]:
        """Products of a plan."""
        return peer_gemms(n, self.shapes, self.budget)


class _TorchOn:
    """The module ``torch``, whose ``device`` is always the given one: the official code names ``cuda:0`` throughout."""

    def __init__(self, device: torch.device) -> None:
        self.device = lambda *_: device

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _apply_to_parameters(ensemble: Any, function: Any, recurse: bool = True) -> Any:
    """Move an ensemble's parameters, and leave its template on the meta device, from where torch cannot move it."""
    if "params" in ensemble._modules:
        ensemble.params._apply(function)
    return ensemble


class Official(Contestant):
    """TD-MPC2's own code and networks, from a checkout; single-task, without terminations, random weights."""

    def __init__(self, setup: Setup, n: int, checkout: Path, compiled: bool = False) -> None:
        """Build an agent for n environments.

        Args:
            setup: Sizes and budget.
            n: Environments. The main branch plans one at a time, the branch ``vectorized_env`` any number.
            checkout: Root of the repository.
            compiled: Let the agent compile its plan, which is its own default.

        Raises:
            UserError: If the folder is not a checkout of TD-MPC2, or its code does not load.
            Unavailable: If it has no such size, or plans for one environment only.
        """
        folder = find_checkout(checkout)
        if setup.size not in NATIVE_SIZES:
            raise Unavailable(f"TD-MPC2 has no size {setup.size} (it has {', '.join(NATIVE_SIZES)})")
        batched = "num_envs" in (folder / "tdmpc2.py").read_text(encoding="utf-8")
        if n > 1 and not batched:
            raise Unavailable("this branch plans one environment at a time; vectorized_env plans batches")
        try:
            with _importing_from(folder), contextlib.redirect_stdout(io.StringIO()):
                self.agent = self._build(setup, n, folder, compiled)
        except Exception as error:  # someone else's code: whatever it raises is about the checkout
            raise UserError(f"--tdmpc2 {checkout}: {type(error).__name__}: {error}") from error
        self.size, self.shapes, self.obs_dim = setup.size, setup.shapes, setup.obs_dim
        branch = "vectorized_env" if batched else "main"
        self.notes = f"its own networks, random weights; {branch} branch, {'compiled' if compiled else 'eager'}"

    @staticmethod
    def _build(setup: Setup, n: int, folder: Path, compiled: bool) -> Any:
        agent, scale = importlib.import_module("tdmpc2"), importlib.import_module("common.scale")
        agent.torch = scale.torch = _TorchOn(setup.device)
        importlib.import_module("common.layers").Ensemble._apply = _apply_to_parameters
        cfg = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
        b = setup.budget
        cfg |= importlib.import_module("common").MODEL_SIZE[int(setup.size.removesuffix("M"))]
        cfg |= {"obs_shape": {"state": (setup.obs_dim,)}, "action_dim": setup.shapes.action, "episode_length": 500}
        cfg |= {"multitask": False, "task_dim": 0, "tasks": ["benchmark"], "episodic": False, "compile": compiled}
        cfg |= {"num_samples": b.samples, "num_pi_trajs": b.prior_samples, "num_elites": b.elites, "num_envs": n}
        cfg |= {"iterations": b.iterations, "horizon": b.horizon, "obs": "state"}
        cfg["bin_size"] = (cfg["vmax"] - cfg["vmin"]) / (cfg["num_bins"] - 1)
        config = types.SimpleNamespace(**cfg)
        built = agent.TDMPC2(config)
        config.iterations = b.iterations  # it adds two for 20 actions or more
        built.discount = b.gamma
        return built

    @property
    def budget(self) -> Budget:
        """As the agent holds it."""
        c = self.agent.cfg
        b = Budget(c.num_samples, c.iterations, c.horizon, self.agent.discount)
        return replace(b, elites=c.num_elites, prior_samples=c.num_pi_trajs)

    @torch.no_grad()
    def plan(self, x: Inputs) -> torch.Tensor:
        """Plan from the observations; encoding them is part of its plan."""
        return self.agent.plan(x.obs, t0=True, eval_mode=True).view(len(x), -1)

    def returns(self, x: Inputs, actions: torch.Tensor) -> None:
        """Not comparable: other networks."""
        return None

    def gemms(self, n: int) -> list[Gemm]:
        """Products of a plan."""
        return native_gemms(n, self.size, self.shapes.action, self.budget, self.obs_dim)


def find_checkout(path: Path) -> Path:
    """Folder of the code within a checkout of TD-MPC2.

    Raises:
        UserError: If the path holds no such code.
    """
    needed = ("tdmpc2.py", "config.yaml", "common/world_model.py")
    for folder in (path / "tdmpc2", path):
        if all((folder / name).is_file() for name in needed):
            return folder
    raise UserError(f"--tdmpc2 {path} is not a checkout of github.com/nicklashansen/tdmpc2: no tdmpc2/tdmpc2.py in it.")


@contextlib.contextmanager
def _importing_from(folder: Path) -> Iterator[None]:
    """Put a folder first on the import path for a while."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
