"""How good a world model's gradient gets on data of a real task, without training a policy.

./isaaclab.sh -p -m benchmarks model --record ant.pt --task Isaac-Ant-v0 --num_envs 512 --iterations 60
./isaaclab.sh -p -m benchmarks model --probe ant.pt walker.pt --steps 300 600 1500

A recording holds the replay buffer, the policy and the critic of a training, and rollouts that came after it. The probe
trains each variant of the world model on the buffer, and asks how much the advantages of the unseen rollouts rise along
its gradient. The table goes to ``benchmarks/model/probe.csv``.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from rsl_rl.env import VecEnv
from tensordict import TensorDict

from m3po.algorithms.construction import build_networks, parse_algorithm_cfg
from m3po.algorithms.critic_replay import LAMBDA
from m3po.algorithms.gates import Gates
from m3po.algorithms.hindsight import LATER
from m3po.algorithms.model_learning import ModelLearner
from m3po.algorithms.plan_learning import LARGEST_SHIFT
from m3po.algorithms.policy_outputs import PolicyOutputs
from m3po.algorithms.returns import gae
from m3po.algorithms.statistics import mean_per_task
from m3po.algorithms.tasks import Tasks
from m3po.config import AlgorithmCfg
from m3po.errors import UserError
from m3po.planning import Objective
from m3po.runners import M3PORunner
from m3po.storage import ReplayBuffer, RolloutStorage

OUTPUT = Path(__file__).resolve().parents[1] / "benchmarks" / "model" / "probe.csv"

UNSEEN_STEPS = 24_576
"""Steps that are recorded after the training, so that a gain is told to 0.006."""

FIELDS = ("next_obs_valid", "rewards", "terminated", "dones", "invalid", "actions", "mean", "std", "advantages", "task")
"""What is kept of each unseen rollout, beside the observations."""

ACTING_KL = 0.3
"""KL of the plans whose realised gain is estimated, nats."""

VARIANTS: dict[str, dict[str, Any]] = {
    "anchored": {"features": 0},
    "anchored, 32 features": {"features": 32},
    "anchored, 3 steps": {"features": 0, "horizon": 3},
    "anchored, width 512": {"features": 0, "width": 512},
    "latent": {"anchor": False, "features": 64},
    "latent, 256 features": {"anchor": False, "features": 256},
    "latent, 256 features, 3 steps": {"anchor": False, "features": 256, "horizon": 3},
}
"""Variant -> fields of its world model; the others are those of the recorded run."""


@contextlib.contextmanager
def environment(argv: list[str]) -> Iterator[tuple[VecEnv, dict[str, Any], str]]:
    """The environments and the runner configuration that a training command would have, and the name of its tasks."""
    from m3po.cli.arguments import Parser
    from m3po.cli.job import add_task_arguments
    from m3po.cli.suite_job import kind_of_job

    parser = Parser()
    add_task_arguments(parser)
    job = kind_of_job(argv).read(parser, argv)
    with job.environments(job.sizes, job.seed) as env:
        yield env, job.runner_cfg(env), job.train_cfg["task"]


def record(path: Path, argv: list[str], iterations: int) -> None:
    """Train for a number of iterations, then collect unseen rollouts, and write both."""
    with environment(argv) as (env, train_cfg, task):
        runner = M3PORunner(env, train_cfg, None, "cpu")
        runner.learn(iterations, init_at_random_ep_len=True)
        alg, st = runner.alg, runner.alg.storage
        obs, parts = env.get_observations(), []
        with torch.inference_mode():
            for _ in range(-(-UNSEEN_STEPS // (st.num_envs * st.num_steps))):
                for _ in range(st.num_steps):
                    obs = runner._step(obs, runner.statistics, alg.stopwatch)
                alg.compute_returns(obs)
                alg.estimator.estimate(st)
                part = {name: getattr(st, name).clone() for name in FIELDS}
                groups = {name: dict(getattr(st, name).clone().items()) for name in ("obs", "next_obs")}
                parts.append(part | groups)
                st.clear()
        names = ("obs", "next_obs")
        unseen = {name: torch.cat([part[name] for part in parts]) for name in FIELDS}
        unseen |= {n: {g: torch.cat([part[n][g] for part in parts]) for g in parts[0][n]} for n in names}
        tasks = alg.tasks
        content = {
            "task": task,
            "iterations": iterations,
            "train_cfg": train_cfg,
            "size": (st.num_steps, st.num_envs),
            "tasks": (tasks.ids, tasks.discounts, tasks.action_mask, tasks.obs_dims, tasks.conditioned),
            "actor": alg.actor.state_dict(),
            "critic": alg.critic.state_dict(),
            "units": alg.estimator.units(torch.arange(tasks.count)),
            "replay": alg.replay.state_dict(),
            "unseen": unseen,
        }
        torch.save(content, path)
    print(f"[benchmark] {path}: {task}, {alg.replay.size * st.num_envs} steps, {UNSEEN_STEPS} unseen")


class Recording:
    """A recording with its networks and its replay buffer."""

    def __init__(self, path: Path) -> None:
        """Read a recording.

        Raises:
            UserError: If the file is not one.
        """
        try:
            self.content = torch.load(path, weights_only=True)
            self.unseen = self.content["unseen"]
        except (OSError, RuntimeError, KeyError, TypeError) as error:
            raise UserError(f"'{path}' is no recording of this command: {error}.") from error
        self.tasks = Tasks(*self.content["tasks"])
        self.cfg = parse_algorithm_cfg(self.content["train_cfg"]["algorithm"])

    def build(self, cfg: AlgorithmCfg, seed: int = 0) -> tuple[Objective, PolicyOutputs, ReplayBuffer]:
        """Objective with a fresh world model, policy, and the replay buffer, whose draws a seed decides."""
        unseen, (num_steps, num_envs) = self.unseen, self.content["size"]
        obs = TensorDict({group: x[0] for group, x in unseen["obs"].items()}, batch_size=[num_envs])
        env = SimpleNamespace(num_actions=unseen["actions"].shape[-1])
        train_cfg = dict(self.content["train_cfg"]) | {"seed": seed}
        networks = {name: dict(train_cfg[name]) for name in ("actor", "critic")}
        built = build_networks(obs, env, train_cfg | networks, cfg, self.tasks, "cpu")
        actor, critic, model, dims = built
        embedding = {} if not self.tasks.conditioned else {"task_embedding": self.content["actor"]["task_embedding"]}
        actor.load_state_dict(self.content["actor"])
        critic.load_state_dict(self.content["critic"])
        model.load_state_dict(embedding, strict=False)
        units = self.content["units"]
        for p in (*actor.parameters(), *critic.parameters()):
            p.requires_grad_(False)

        def values(obs: TensorDict, task: torch.Tensor) -> torch.Tensor:
            return critic(obs).squeeze(-1) * units[task]

        objective = Objective(model, actor, values, dims, self.tasks.discounts, cfg.planner)
        storage = RolloutStorage(obs, list(unseen["next_obs"]), num_steps, env.num_actions, "cpu")
        fields = self.content["replay"]["fields"]
        replay = ReplayBuffer(storage, fields["rewards"].shape[0] // num_steps)
        replay.load_state_dict(self.content["replay"])
        replay.generator.manual_seed(seed)
        return objective, PolicyOutputs(actor), replay


def probe(recording: Recording, variant: dict[str, Any], steps: list[int], seed: int) -> list[dict[str, float]]:
    """Train a variant, and measure it after each number of steps.

    Returns:
        ``gain``: rise of the standardised advantage along the gradient, per std of the action, mean over the tasks, and
        its standard error ``gain_se``; ``far_gain``: the same with advantages along all unseen steps instead of the
        few of a rollout, which end in the critic's own values; ``realised``: advantage that plans of :data:`ACTING_KL`
        would have, by importance sampling; ``dynamics_r2`` of the prediction; ``ms_per_step`` of training.
    """
    cfg = replace(recording.cfg, world_model=replace(recording.cfg.world_model, **variant))
    objective, policy, replay = recording.build(cfg, seed)
    learner = ModelLearner(objective, policy, Gates(recording.tasks.count), recording.tasks, cfg)
    learner._update_statistics(SimpleNamespace(**replay.latest(replay.size)))
    results, seconds, done = [], 0.0, 0
    for count in steps:
        start = time.process_time()
        for _ in range(count - done):
            losses = learner.losses(replay.sample(cfg.world_model.batch_size, cfg.world_model.horizon))
            learner.guard.step(torch.stack(list(losses.values())).sum())
        seconds, done = seconds + time.process_time() - start, count
        measured = measure(recording, objective, policy)
        results.append({"steps": count, **measured, "ms_per_step": 1000.0 * seconds / count})
    return results


def measure(recording: Recording, objective: Objective, policy: PolicyOutputs) -> dict[str, float]:
    """Gain, realised gain and ``dynamics_r2`` on the unseen rollouts; see :func:`probe`."""
    st, tasks = recording.unseen, recording.tasks
    task, kept = st["task"].flatten(), ~st["invalid"].flatten()
    groups = {group: x.flatten(0, 1) for group, x in st["obs"].items()}
    obs = TensorDict(groups, batch_size=task.shape)
    next_groups = {group: x.flatten(0, 1) for group, x in st["next_obs"].items()}
    target = objective.vector(TensorDict(next_groups, batch_size=task.shape))
    mean, std = policy(obs)
    z = objective.encode(obs, task).detach()
    mask = tasks.action_mask[task]
    gradients = [objective.gradient(z[i], mean[i], std[i], task[i]) for i in torch.arange(len(task)).split(8192)]
    gradient = torch.cat(gradients) * mask
    size = mean_per_task(gradient.square().sum(-1), kept, task, tasks.count).sqrt().clamp_min(1e-12)
    direction = gradient / size[task].unsqueeze(-1)
    direction = direction * (LARGEST_SHIFT / direction.norm(dim=-1, keepdim=True).clamp_min(LARGEST_SHIFT))
    noise = ((st["actions"] - st["mean"]) / st["std"]).flatten(0, 1)
    advantages = st["advantages"].flatten()
    along = (direction * noise).sum(-1) * advantages
    shift = direction / direction.norm(dim=-1, keepdim=True).clamp_min(1.0) * (2.0 * ACTING_KL) ** 0.5
    ratio = torch.exp((shift * noise).sum(-1) - 0.5 * shift.square().sum(-1))
    result = {}
    far, known_far = _far_advantages(recording, objective)
    judged = (("gain", along, kept), ("far_gain", (direction * noise).sum(-1) * far, kept & known_far))
    for name, x, rows in (*judged, ("realised", advantages * (ratio - 1.0), kept)):
        mean_x = mean_per_task(x, rows, task, tasks.count)
        spread = mean_per_task((x - mean_x[task]).square(), rows, task, tasks.count)
        count = torch.bincount(task[rows], minlength=tasks.count)
        result[name] = mean_x.mean().item()
        result[f"{name}_se"] = ((spread / count).sum().sqrt() / tasks.count).item()
    with torch.no_grad():
        known = kept & st["next_obs_valid"].flatten()
        predicted = objective.model.step(z, st["actions"].flatten(0, 1), task)[0]
        if objective.model.anchor_dim:
            unit = objective.model.changes.stds()[task]
            off, change = (
                x / unit for x in (objective.model.observation(predicted) - target, z[:, : target.shape[1]] - target)
            )
        else:
            encoded = objective.model.encode(target, task)
            off, change = predicted - encoded, z - encoded
        error, still = (
            mean_per_task(x.clamp(-5, 5).square().mean(-1), known, task, tasks.count) for x in (off, change)
        )
    return result | {"dynamics_r2": (1.0 - error / still.clamp_min(1e-12)).mean().item()}


@torch.no_grad()
def _far_advantages(recording: Recording, objective: Objective) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages along all unseen steps, standardised per task, and which of them are judged, (B,) each."""
    st, tasks = recording.unseen, recording.tasks
    shape, task = st["task"].shape, st["task"].flatten()
    parts = [{group: x.flatten(0, 1) for group, x in st[name].items()} for name in ("obs", "next_obs")]
    values, next_values = (
        objective.values(TensorDict(groups, batch_size=task.shape), task).view(shape) for groups in parts
    )
    ends = (st["terminated"], st["dones"] | st["invalid"])
    gamma = tasks.discounts[st["task"][0]]
    _, far = gae(st["rewards"], values, next_values.nan_to_num(), *ends, gamma, LAMBDA)
    judged = (torch.arange(shape[0]) < max(1, shape[0] - LATER)).unsqueeze(1).expand(shape)
    rows = (judged & ~st["invalid"]).flatten()
    far = far.flatten() - mean_per_task(far.flatten(), rows, task, tasks.count)[task]
    std = mean_per_task(far.square(), rows, task, tasks.count).sqrt().clamp_min(1e-12)
    return far / std[task], rows


def main(argv: list[str]) -> int:
    """Record, or probe and store the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--record", type=Path, metavar="RING", help="Train, and write a recording; see also train.py.")
    what.add_argument("--probe", type=Path, nargs="+", metavar="RING", help="Recordings that variants are tried on.")
    parser.add_argument("--iterations", type=int, default=60, help="With --record: training iterations.")
    parser.add_argument(
        "--steps", type=int, nargs="+", default=[300, 600, 1500], help="Gradient steps to measure after."
    )
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="World models.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="Seeds of weights and batches.")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="CSV file that rows are added to.")
    args, rest = parser.parse_known_args(argv)
    if args.record:
        record(args.record, rest, args.iterations)
        return 0
    if rest:
        raise UserError(f"unknown options with --probe: {' '.join(rest)}.")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    new = not args.output.exists()
    with open(args.output, "a", newline="", encoding="utf-8") as file:
        writer = None
        for path in args.probe:
            recording = Recording(path)
            for variant in args.variants:
                for seed in args.seeds:
                    for row in probe(recording, VARIANTS[variant], sorted(args.steps), seed):
                        row = {"task": recording.content["task"], "variant": variant, "seed": seed} | row
                        if writer is None:
                            writer = csv.DictWriter(file, list(row))
                            if new:
                                writer.writeheader()
                        writer.writerow({k: f"{v:.4f}" if isinstance(v, float) else v for k, v in row.items()})
                        file.flush()
                        print(
                            f"{row['task'][:24]:25}{variant:32}{row['steps']:>6}"
                            f"{row['gain']:>8.3f} +-{row['gain_se']:.3f}"
                            f"{row['far_gain']:>8.3f} +-{row['far_gain_se']:.3f}"
                            f"{row['realised']:>8.3f} +-{row['realised_se']:.3f}{row['dynamics_r2']:>7.2f}"
                            f"{row['ms_per_step']:>7.1f} ms",
                            flush=True,
                        )
    return 0
