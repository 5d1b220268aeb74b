"""A training that does not depend on how its environments are shared among processes; see ``test_distributed.py``.

``python toy_ranks.py FOLDER PORT`` trains in one process and in two, and saves what each of them knows. Every
random number is drawn for all environments, and each process takes its share; mini-batches are the whole data, so that
their order does not matter, and all environments are planned.

What one process and two have learnt is compared in float64. Sums over all environments are rounded otherwise in two
processes, and otherwise on each processor. Thresholds (accepted plans, clipped ratios, step sizes) make steps of that.
In float64 the difference is too small to reach any of them.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing
from rsl_rl.env import VecEnv
from rsl_rl.modules.distribution import GaussianDistribution
from rsl_rl.runners import OnPolicyRunner
from toy_env import PointEnv, runner_cfg

from m3po import distributed
from m3po.cli.suite_job import with_empty
from m3po.envs.multi_task import MultiTaskVecEnv, TaskEnv
from m3po.envs.suite import TaskInfo
from m3po.runners import M3PORunner
from m3po.storage import ReplayBuffer, Sequences

TOTAL, ITERATIONS = 128, 5

OWN_NOISE = GaussianDistribution.sample


class SharedPoint(PointEnv):
    """Environments ``first`` to ``first + num_envs - 1`` of :data:`TOTAL`; their episodes end at different times."""

    def __init__(self, num_envs: int, first: int, edge: float = 1.3) -> None:
        self.first = first
        super().__init__(num_envs, edge=edge)
        self.episode_length_buf = (first + torch.arange(num_envs)) % 20

    def _reset(self, rows: torch.Tensor) -> None:
        own = slice(self.first, self.first + self.num_envs)
        position = 2 * torch.rand(TOTAL, self.dim, generator=self.generator)[own] - 1
        fresh = torch.cat((position, torch.zeros_like(position)), dim=1)
        self.state = torch.where(rows[:, None], fresh, self.state)
        self.episode_length_buf = torch.where(rows, 0, self.episode_length_buf)


def share_noise(num_envs: int, first: int) -> None:
    """Draw the noise of actions for all environments. What is drawn while learning is never used."""
    stream = torch.Generator().manual_seed(7)

    def sample(self: GaussianDistribution) -> torch.Tensor:
        if len(self.mean) != num_envs:
            return self.mean
        noise = torch.randn(TOTAL, self.mean.shape[1], generator=stream)
        return self.mean + self.std * noise[first : first + num_envs]

    GaussianDistribution.sample = sample


def config() -> dict[str, Any]:
    """Plans everywhere, has a bonus and normalisers, and takes all data at once."""
    # Every candidate is an elite: which of two equal ones is chosen, the rounding of sums would decide.
    planner = {"planned_fraction": 1.0, "num_samples": 16, "num_elites": 16, "full_gain": 0.01, "num_states": 0}
    cfg = runner_cfg(
        planner=planner,
        world_model={"steps_per_iteration": 20},
        critic_replay={"steps_per_iteration": 0, "horizon": 16},  # so that gains are known after two rollouts
        value_loss_coef=1.0,
        num_mini_batches=1,
    )
    for network in ("actor", "critic"):
        cfg[network]["obs_normalization"] = True
    return cfg


def two_tasks(num_envs: int, first: int) -> VecEnv:
    """Two tasks of half of the environments each: a process has both or one of them."""
    half = TOTAL // 2
    task_envs = [
        TaskEnv(name, SharedPoint(half, start, edge))
        for name, start, edge in (("wide", 0, 1.6), ("narrow", half, 1.1))
        if first <= start < first + num_envs
    ]
    infos = [TaskInfo(name, None, None, 20) for name in ("wide", "narrow")]
    return MultiTaskVecEnv(with_empty(task_envs, infos, "cpu"), "cpu")


def newest(replay: ReplayBuffer, horizon: int) -> Sequences:
    """Sub-sequences that start at the first step of the newest rollout, one per environment."""
    slots = replay.newest[:horizon]
    return replay._gather(slots.expand(replay.num_envs, -1), torch.arange(replay.num_envs).unsqueeze(1))


def train(env: VecEnv, first: int) -> dict[str, Any]:
    """Train on a share of the environments. Returns all that is learnt and reported."""
    torch.manual_seed(first)  # other initial weights in each process: those of the first must count
    share_noise(env.num_envs, first)
    run = M3PORunner(env, config(), device="cpu")
    replay, rows, gradients = run.alg.replay, [], []
    replay.sample = lambda batch_size, horizon: newest(replay, horizon)
    run.reporter.report = lambda row, losses, metrics: rows.append({**row, **losses, **metrics})
    step = run.alg.policy_learner.optimizer.step

    def keep_and_step() -> None:
        gradients.append(torch.cat([p.grad.flatten() for p in run.alg.actor.parameters()]))
        step()

    run.alg.policy_learner.optimizer.step = keep_and_step
    run.learn(ITERATIONS)
    state = run.alg.save()
    networks = {k: v for k, v in state.items() if k.endswith("state_dict") and "optimizer" not in k}
    return {"networks": networks, "rows": rows, "gradients": gradients, "learning_rate": run.alg.learning_rate}


class StockRunner(OnPolicyRunner):
    """rsl_rl's own, on the CPU: it would connect GPUs alone."""

    def _configure_multi_gpu(self) -> None:
        self.gpu_world_size, self.gpu_global_rank = distributed.world_size(), distributed.rank()
        self.is_distributed = True
        self.cfg["multi_gpu"] = {"global_rank": self.gpu_global_rank, "local_rank": 0, "world_size": 2}


def others(rank: int) -> dict[str, torch.Tensor]:
    """Policies of M3PO under rsl_rl's runner, and of rsl_rl's PPO under ours, for one task and for two."""
    ppo = {"class_name": "PPO", "num_mini_batches": 2}
    several = config() | {"algorithm": ppo | {"class_name": "m3po.baselines.ppo:PPO", "gamma": 0.97}}
    several |= {name: several[name] | {"embedding_dim": 4} for name in ("actor", "critic")}
    runs = {
        "M3PO, stock runner": StockRunner(SharedPoint(16, 16 * rank), config()),
        "PPO": M3PORunner(SharedPoint(16, 16 * rank), config() | {"algorithm": ppo}),
        "PPO, two tasks": M3PORunner(two_tasks(TOTAL // 2, rank * TOTAL // 2), several),
    }
    policies = {}
    for name, run in runs.items():
        run.learn(2)
        policies[name] = torch.cat([p.detach().flatten() for p in run.alg.get_policy().parameters()])
    return policies


def resumed(rank: int, folder: Path) -> dict[str, dict[str, Any]]:
    """All that a process knows after four iterations, and after two and two more in other objects."""
    GaussianDistribution.sample = OWN_NOISE
    states = {}
    for name, parts in (("whole", (4,)), ("parts", (2, 2))):
        torch.manual_seed(rank)
        (folder / name).mkdir(exist_ok=True)
        for k, iterations in enumerate(parts):
            cfg = runner_cfg(planner={"planned_fraction": 0.5})
            run = M3PORunner(PointEnv(16, seed=rank), cfg, str(folder / name))
            if k > 0:
                torch.manual_seed(99)
                run.resume(str(folder / name / "model_last.pt"))
            run.learn(iterations, init_at_random_ep_len=True)
        states[name] = {"learnt": run.alg.save(), "resume": run._resume_state()}
    return states


def work(rank: int, size: int, folder: str) -> None:
    """Everything that one process does."""
    if size > 1:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": sys.argv[2]}
    num_envs = TOTAL // size
    with distributed.group(size > 1, "cpu"):
        first = rank * num_envs
        torch.set_default_dtype(torch.float64)
        result = {
            "one task": train(SharedPoint(num_envs, first), first),
            "two tasks": train(two_tasks(num_envs, first), first),
        }
        torch.set_default_dtype(torch.float32)  # the rest is compared bit for bit
        if size > 1:
            result["others"] = others(rank)
            result["resumed"] = resumed(rank, Path(folder))
        torch.save(result, Path(folder) / f"{size}-{rank}.pt")


def main(folder: str) -> None:
    """One process, and two: forked, because each import of torch takes seconds."""
    for size in (1, 2):
        torch.multiprocessing.start_processes(work, (size, folder), size, start_method="fork")


if __name__ == "__main__":
    main(sys.argv[1])
