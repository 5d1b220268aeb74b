"""How good a world model gets on data of a real task: rollouts are recorded once and replayed to each variant in order.

./isaaclab.sh -p scripts/benchmark_model.py --task Isaac-Ant-v0 --num_envs 512

After each rollout a variant is measured on it (held out), and then trains as it would online. No planner acts, so all
variants see the same data. The result goes to ``benchmarks/model/<task>.json``.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict

from isaaclab_m3po import launch
from m3po.algorithms.model_learning import ModelLearner
from m3po.cli.arguments import Parser, guarded
from m3po.config import WorldModelCfg
from m3po.manifest import package_versions
from m3po.models import WorldModel
from m3po.storage import RolloutRing, RolloutStorage

OUTPUT = Path(__file__).resolve().parents[1] / "benchmarks" / "model"
FIELDS = ("actions", "rewards", "returns", "terminated", "dones")
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "plain dynamics": {"dynamics": "plain"},
    "consistency 20": {"consistency_coef": 20.0},
    "balanced terminations, terminal reward": {"balance_terminations": True, "terminal_reward": True},
    "reward weight 0.1": {"reward_coef": 0.1},
    "learning rate 1e-3": {"learning_rate": 1e-3},
}


def record(argv: list[str], rollouts: int) -> tuple[list[dict[str, torch.Tensor]], WorldModelCfg, str]:
    """Train PPO (M3PO without its planner) for a number of iterations and keep every rollout."""
    from isaaclab_m3po import agents
    from m3po.runners import M3PORunner

    parser = Parser(description=__doc__)
    launch.add_common_arguments(parser)
    request = launch.parse(parser, [*argv, "agent.algorithm.planner.share=0.0"])
    job = launch.prepare(request)
    kept: list[dict[str, torch.Tensor]] = []
    with launch.environment(job) as env:
        runner = M3PORunner(env, job.train_cfg(), None, job.device)
        update = runner.alg.update

        def keep_and_update() -> dict[str, float]:
            st = runner.alg.storage
            rollout = {name: getattr(st, name).clone() for name in FIELDS}
            kept.append(rollout | {"obs": runner.alg.model_obs(st.obs), "next_obs": runner.alg.model_obs(st.next_obs)})
            return update()

        runner.alg.update = keep_and_update
        runner.learn(rollouts, init_at_random_ep_len=True)
    return kept, agents.algorithm_cfg(job.agent_cfg).world_model, job.task


def replay(rollouts: list[dict[str, torch.Tensor]], cfg: WorldModelCfg, seed: int) -> dict[str, Any]:
    """Measure a variant on each new rollout, then train it. The policy's and critic's targets are left out."""
    torch.manual_seed(seed)
    num_steps, num_envs, obs_dim = rollouts[0]["obs"].shape
    num_actions = rollouts[0]["actions"].shape[-1]
    storage = RolloutStorage(
        TensorDict({"obs": rollouts[0]["obs"][0]}, batch_size=[num_envs]), ["obs"], num_steps, num_actions, "cpu"
    )
    model = WorldModel(obs_dim, num_actions, 1, cfg)
    ring = RolloutRing(storage, max(1, round(cfg.ring_transitions / (num_envs * num_steps))))
    learner = ModelLearner(
        model,
        flatten_obs=lambda obs: obs["obs"],
        policy=lambda obs: (torch.zeros(obs.batch_size[0], num_actions), torch.ones(obs.batch_size[0], num_actions)),
        critic=lambda obs, task: torch.zeros(obs.batch_size[0]),
        action_mask=torch.ones(1, num_actions, dtype=torch.bool),
    )
    history, seconds = [], 0.0
    for rollout in rollouts:
        storage.obs["obs"].copy_(rollout["obs"])
        storage.next_obs["obs"].copy_(rollout["next_obs"])
        for name in FIELDS:
            getattr(storage, name).copy_(rollout[name])
        ring.add(storage)
        quality = learner.measure(ring.newest(cfg.horizon))
        history.append({name: value.item() for name, value in quality.items()})
        task = storage.task.flatten()
        model.obs_normalizer.update(rollout["obs"].flatten(0, 1), task)
        model.rewards.update(rollout["rewards"].flatten(), rollout["terminated"].flatten(), task)
        start = time.process_time()
        learner.train(ring, 0)
        seconds += time.process_time() - start
    return {"cpu_seconds_per_iteration": seconds / len(rollouts), "history": history}


def main() -> int:
    """Record, replay, print and store."""
    rollouts, seed = 28, 0
    data, cfg, task = record(sys.argv[1:], rollouts)
    # The critic is not replayed, so the value follows the recorded returns here.
    base = replace(cfg, value_target="returns")
    results = {}
    print(f"{'variant':42}{'s/iter':>8}{'skill_1':>9}{'skill_H':>9}{'reward_ev':>11}{'value_ev':>10}{'P(fall)':>9}")
    for name, changes in VARIANTS.items():
        results[name] = replay(data, replace(base, **changes), seed)
        last, cost = results[name]["history"][-1], results[name]["cpu_seconds_per_iteration"]
        text = f"{name:42}{cost:>8.2f}{last['skill_1']:>9.2f}{last['skill_H']:>9.2f}{last['reward_ev']:>11.2f}"
        print(text + f"{last['value_ev']:>10.2f}{last['fall_probability']:>9.3f}", flush=True)
    OUTPUT.mkdir(parents=True, exist_ok=True)
    content = {
        "command": "scripts/benchmark_model.py " + " ".join(sys.argv[1:]),
        "rollouts": rollouts,
        "seed": seed,
        "versions": package_versions(),
        "variants": results,
    }
    (OUTPUT / f"{task}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(guarded(lambda _: main(), []))
