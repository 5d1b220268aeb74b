"""Learning curves of several algorithms on Isaac Lab tasks: every run a process of its own, resumable, stored as data.

./isaaclab.sh -p scripts/benchmark_learning.py --suite main
./isaaclab.sh -p scripts/benchmark_learning.py --suite ablation
./isaaclab.sh -p scripts/benchmark_learning.py --suite losses --tasks Isaac-Cartpole-v0
./isaaclab.sh -p scripts/benchmark_learning.py --report

A run that is stored already is not repeated; one that failed is stored as crashed, with the end of its output.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import tempfile
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmark_runs import ROOT
from benchmark_runs import run_python as _python

DATA = ROOT / "benchmarks" / "learning"
COLUMNS = (
    "iteration", "env_steps", "seconds", "mean_step_reward", "mean_return", "mean_length", "time_collect", "time_plan",
    "time_physics", "time_update", "planner/share", "planner/kl", "planner/gain", "model/skill_1", "model/skill_H",
    "model/reward_ev", "model/value_ev", "policy/effective_sample_size", "policy/value_ev", "bonus/mean_abs",
)  # fmt: skip
"""Columns of ``progress.csv`` that are kept; PPO has none with a slash."""

TASKS = {"Isaac-Cartpole-v0": 600_000, "Isaac-Ant-v0": 1_000_000}
"""Task -> environment steps of a run, with 512 environments."""

ABLATION_DIVISOR = {"Isaac-Cartpole-v0": 1, "Isaac-Ant-v0": 2}
"""An ablation on Ant runs for half of the steps; compare it with the same part of the main arm."""

SHARED = {
    "Isaac-Ant-v0": [
        "agent.num_steps_per_env=16",
        "agent.actor.distribution_cfg.init_std=0.5",
        "agent.algorithm.lam=0.9",
    ],
    "Isaac-Cartpole-v0": [],
}
"""What M3PO's default mode changes about a task's rollout, noise and lambda; the rival gets it too."""

ARMS = {
    "m3po": ["--algo", "m3po"],
    "ppo-tuned": ["--algo", "ppo"],
    "ppo-shipped": ["--algo", "ppo"],
    "m3po-no-planner": ["--algo", "m3po", "agent.algorithm.planner.share=0.0", "agent.algorithm.planner.stages=[]"],
    "m3po-no-distillation": ["--algo", "m3po", "agent.algorithm.distill_coef=0.0"],
    "m3po-bonus": ["--algo", "m3po", "agent.algorithm.bonus.alpha=0.3"],
    "m3po-no-critic-floor": ["--algo", "m3po", "agent.algorithm.critic_min_learning_rate=0.0"],
    "m3po-no-extra-steps": ["--algo", "m3po", "agent.algorithm.world_model.extra_steps=0"],
    "m3po-no-consistency": ["--algo", "m3po", "agent.algorithm.world_model.consistency_coef=0.0"],
    "m3po-no-reward-loss": ["--algo", "m3po", "agent.algorithm.world_model.reward_coef=0.0"],
    "m3po-no-value-loss": ["--algo", "m3po", "agent.algorithm.world_model.value_coef=0.0"],
    "m3po-no-continuation-loss": ["--algo", "m3po", "agent.algorithm.world_model.continuation_coef=0.0"],
    "m3po-no-prior-loss": ["--algo", "m3po", "agent.algorithm.world_model.prior_coef=0.0"],
}
SUITES = {
    "main": ["m3po", "ppo-tuned", "ppo-shipped"],
    "ablation": [
        "m3po-no-planner",
        "m3po-no-distillation",
        "m3po-bonus",
        "m3po-no-critic-floor",
        "m3po-no-consistency",
    ],
    "losses": [
        "m3po-no-extra-steps",
        "m3po-no-reward-loss",
        "m3po-no-value-loss",
        "m3po-no-continuation-loss",
        "m3po-no-prior-loss",
    ],
}


def run(task: str, arm: str, seed: int, episodes: int) -> None:
    """Train one arm, evaluate its last checkpoint without noise, and store both."""
    if arm == "ppo-tuned" and not SHARED[task]:
        return  # the same as ppo-shipped
    target = DATA / task / arm / f"seed{seed}.csv"
    if target.with_suffix(".json").exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    steps = 32 if (arm, task) == ("ppo-shipped", "Isaac-Ant-v0") else 16
    total = TASKS[task] // (1 if arm in SUITES["main"] else ABLATION_DIVISOR[task])
    iterations = round(total / (512 * steps))
    options = ["--num_envs", "512", "--seed", str(seed), "--max_iterations", str(iterations), "--device", "cpu"]
    overrides = SHARED[task] if arm == "ppo-tuned" else ARMS[arm][2:]
    command = ["scripts/train.py", "--task", task, *ARMS[arm][:2], *options, "--eval_interval", "0", *overrides]
    print(f"[benchmark] {task} {arm} seed {seed}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        result = _python([*command, "--log_root", folder])
        found = list(Path(folder).rglob("progress.csv"))
        record = {
            "task": task,
            "arm": arm,
            "seed": seed,
            "command": " ".join(command),
            "return_code": result.returncode,
        }
        if result.returncode != 0 or not found:
            record |= {"crashed": True, "output": result.stdout[-2000:]}
            print(f"[benchmark] {task} {arm} seed {seed} CRASHED", flush=True)
        else:
            manifest = json.loads((found[0].parent / "run.json").read_text(encoding="utf-8"))
            record["manifest"] = {k: v for k, v in manifest.items() if k in ("versions", "git", "device", "physics")}
            checkpoint = found[0].parent / "model_last.pt"
            policies = ["prior", "planner"] if arm.startswith("m3po") else ["prior"]
            record["evaluation"] = {p: _evaluate(task, arm, checkpoint, p, episodes) for p in policies if episodes > 0}
            with open(found[0], encoding="utf-8") as source, open(target, "w", newline="", encoding="utf-8") as sink:
                rows = csv.DictReader(source)
                writer = csv.DictWriter(sink, [c for c in COLUMNS if c in rows.fieldnames], extrasaction="ignore")
                writer.writeheader()
                writer.writerows(rows)
    target.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _evaluate(task: str, arm: str, checkpoint: Path, policy: str, episodes: int) -> dict:
    """Noise-free episodes of a checkpoint on a held-out seed."""
    output = checkpoint.with_name(f"{policy}.json")
    options = ["--num_episodes", str(episodes), "--num_envs", str(episodes), "--policy", policy, "--seed", "10007"]
    command = ["scripts/play.py", "--task", task, *ARMS[arm][:2], "--checkpoint", str(checkpoint), *options]
    result = _python([*command, "--device", "cpu", "--output", str(output)])
    if result.returncode != 0:
        return {"crashed": True, "output": result.stdout[-2000:]}
    values = json.loads(output.read_text(encoding="utf-8"))
    return {k: values[k] for k in ("return_mean", "return_std", "length_mean", "termination_rate", "num_episodes")}


def main() -> int:
    """Run suites and print the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=SUITES, help="Arms to run; without it, only the report is made.")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[21, 22, 23])
    parser.add_argument("--processes", type=int, default=2, help="Runs at once; their order interleaves the arms.")
    parser.add_argument("--eval_episodes", type=int, default=64, help="Noise-free episodes at the end of a run.")
    parser.add_argument("--report", action="store_true", help="Write summary.json and the plots from what is stored.")
    args = parser.parse_args()
    if args.suite:
        jobs = [(t, a, s, args.eval_episodes) for t in args.tasks for s in args.seeds for a in SUITES[args.suite]]
        with ThreadPoolExecutor(args.processes) as pool:
            deque(pool.map(lambda job: run(*job), jobs), maxlen=0)
    if args.report or args.suite:
        from benchmark_report import write_report

        print(write_report(DATA))
    return 0


if __name__ == "__main__":
    sys.exit(main())
