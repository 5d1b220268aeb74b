"""Learning curves of several algorithms on Isaac Lab tasks: every run a process of its own, resumable, stored as data.

./isaaclab.sh -p scripts/benchmark_learning.py --suite main
./isaaclab.sh -p scripts/benchmark_learning.py --suite ablation
./isaaclab.sh -p scripts/benchmark_learning.py --arms m3po ppo-tuned --tasks Isaac-Cartpole-v0 --seeds 31 32 33
./isaaclab.sh -p scripts/benchmark_learning.py --report

Tasks, arms and suites are in ``benchmark_arms.py``. A run that is stored already is not repeated, so an interrupted
benchmark goes on where it was; one that failed is stored as crashed, with the end of its output.
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

from benchmark_arms import ARMS, SUITES, TASKS
from benchmark_runs import ROOT
from benchmark_runs import run_python as _python

from m3po.evaluation_process import policies_of

DATA = ROOT / "benchmarks" / "learning"
COLUMNS = (
    "iteration", "env_steps", "seconds", "mean_step_reward", "mean_return", "mean_length", "time_collect", "time_plan",
    "time_physics", "time_update", "plan/gain", "plan/max_kl", "plan/kl", "plan/cosine", "planner/share", "planner/kl",
    "planner/gain", "planner/realised_gain", "planner/lasting_gain", "update/ppo_slope", "update/ppo_kl",
    "update/plan_slope", "update/plan_kl", "gate/gain", "gate/realised", "gate/rewarded", "gate/ppo_budget",
    "gate/plan_budget", "gate/rollouts", "model/skill",
    "model/reward_ev", "policy/effective_sample_size", "policy/value_ev", "bonus/alpha", "bonus/mean_abs",
    "loss/model_steps", "action_std",
)  # fmt: skip
"""Columns of ``progress.csv`` that are kept; PPO has none with a slash."""


def run(task: str, arm: str, seed: int, episodes: int) -> None:
    """Train one arm, evaluate its last checkpoint without noise, and store both."""
    target = DATA / task / arm / f"seed{seed}.csv"
    if target.with_suffix(".json").exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    setting, settings = TASKS[task], ARMS[arm]
    iterations = round(setting.env_steps / (setting.num_envs * settings.num_steps(task)))
    command = ["scripts/train.py", "--task", task, "--algo", settings.algo, "--num_envs", str(setting.num_envs)]
    command += ["--seed", str(seed), "--max_iterations", str(iterations), "--device", "cpu", "--eval_interval", "0"]
    command += settings.overrides_on(task)
    print(f"[benchmark] {task} {arm} seed {seed}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        result = _python([*command, "--log_root", folder])
        found = list(Path(folder).rglob("progress.csv"))
        record = {
            "task": task,
            "arm": arm,
            "seed": seed,
            "num_envs": setting.num_envs,
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
            policies = policies_of(manifest["configuration"]["agent"])
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
    command = ["scripts/play.py", "--task", task, "--algo", ARMS[arm].algo, "--checkpoint", str(checkpoint), *options]
    result = _python([*command, "--device", "cpu", "--output", str(output)])
    if result.returncode != 0:
        return {"crashed": True, "output": result.stdout[-2000:]}
    (values,) = json.loads(output.read_text(encoding="utf-8"))["tasks"].values()
    return {k: values[k] for k in ("return_mean", "return_std", "length_mean", "termination_rate", "num_episodes")}


def main() -> int:
    """Run suites and print the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--suite", choices=SUITES, help="Arms to run; without arms, only the report is made.")
    what.add_argument("--arms", nargs="+", choices=ARMS, metavar="ARM", help=f"Arms to run, of: {', '.join(ARMS)}.")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[51, 52, 53])
    parser.add_argument("--processes", type=int, default=2, help="Runs at once; their order interleaves the arms.")
    parser.add_argument("--eval_episodes", type=int, default=64, help="Noise-free episodes at the end of a run.")
    parser.add_argument("--report", action="store_true", help="Write summary.json and the plots from what is stored.")
    args = parser.parse_args()
    names = args.arms or SUITES.get(args.suite, [])
    jobs = [(t, a, s, args.eval_episodes) for t in args.tasks for s in args.seeds for a in names if ARMS[a].runs_on(t)]
    with ThreadPoolExecutor(args.processes) as pool:
        deque(pool.map(lambda job: run(*job), jobs), maxlen=0)
    if args.report or names:
        from benchmark_report import write_report

        print(write_report(DATA))
    return 0


if __name__ == "__main__":
    sys.exit(main())
