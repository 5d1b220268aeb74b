"""Learning curves on task suites and task sets: M3PO against rsl_rl's PPO, every run a process of its own.

./isaaclab.sh -p scripts/benchmark_suites.py dmcontrol --seeds 1 2 3
./isaaclab.sh -p scripts/benchmark_suites.py dmcontrol-multi classic-multi metaworld-multi
./isaaclab.sh -p scripts/benchmark_suites.py --report

Runs are stored below ``benchmarks/suites/<experiment>/<arm>``; one that is stored is not repeated, even if the code has
changed since, and one that failed is stored as crashed. The arm ``ppo-core`` is M3PO with its parts off; its stored
runs are of version 0.1, when ``--algo ppo`` meant that. ``STORED`` of the report names arms that exist as data alone.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from benchmark_arms import CORE, PARTS, TASKS
from benchmark_runs import ROOT, run_python

from m3po.cli.job import ALGORITHMS
from m3po.cli.suite_job import AGENTS
from m3po.presets import suite_runner_cfg

DATA = ROOT / "benchmarks" / "suites"
FILES = ("progress.csv", "tasks.csv", "evaluations.csv", "task_evaluations.csv", "embeddings.csv", "embeddings.png")
"""What is kept of a run's folder."""


@dataclass(frozen=True)
class Experiment:
    """One training, repeated for each arm and seed."""

    task: str
    """``--task``."""

    num_envs: int
    """Environments of all tasks together."""

    steps: int
    """Decision steps of each environment."""

    eval_envs: int = 20
    """Environments, and episodes, of the noise-free evaluation of each task, over both policies together."""

    name: str = ""
    """Folder of its runs, where it is not named after the task; those are not drawn beside other experiments."""


CLASSIC = ("Isaac-Cartpole-v0", "Isaac-Ant-v0", "Isaac-Humanoid-v0")
DMC_SINGLE = ("cartpole-swingup", "finger-spin", "walker-stand", "walker-walk", "cheetah-run")
DMC_MULTI = ("cartpole-swingup", "finger-spin", "walker-stand", "walker-walk", "cheetah-run", "cup-catch")

GROUPS = {
    # 0.5M frames each: 64 environments x 3920 steps x action repeat 2
    "dmcontrol": [Experiment(task, 64, 3920) for task in DMC_SINGLE],
    # 0.2M frames each: 16 environments x 6272 steps x action repeat 2
    "dmcontrol-few": [Experiment(task, 16, 6272, name=f"{task}-16-envs") for task in ("walker-walk", "cheetah-run")],
    "dmcontrol-sparse": [Experiment("cartpole-swingup-sparse", 64, 3920)],
    "dmcontrol-multi": [Experiment(",".join(DMC_MULTI), 6 * 32, 3920)],
    "classic": [Experiment(task, 256, 1568) for task in CLASSIC],
    "classic-multi": [Experiment("Isaac-Classic-MT3", 3 * 256, 1568)],
    "metaworld-multi": [Experiment("MT10", 10 * 16, 1920)],
}
"""Group -> its experiments."""


@dataclass(frozen=True)
class Arm:
    """One configuration of an algorithm."""

    algo: str
    """``--algo``."""

    overrides: tuple[str, ...] = ()
    """Overrides."""

    paper: bool = False
    """Whether the agent is that of the paper mode."""

    longer: int = 1
    """How many times as many environment steps as the experiment says."""

    @property
    def agent(self) -> str:
        """``--agent``."""
        return "m3po_paper_cfg_entry_point" if self.paper else ALGORITHMS[self.algo]


NOISE = "agent.actor.distribution_cfg.class_name"

ARMS = {name: Arm("m3po", overrides) for name, overrides in PARTS.items()} | {
    "m3po-paper": Arm("m3po", paper=True),
    "ppo-core": Arm("m3po", ("agent.num_steps_per_env=16", "agent.algorithm.lam=0.95", *CORE)),
    # what the bonus is to be better than
    "m3po-correlated-noise": Arm(
        "m3po", (*PARTS["m3po-no-bonus"], f"{NOISE}=m3po.baselines.correlated_noise:CorrelatedGaussian")
    ),
    "ppo": Arm("ppo"),
    # of 16 environments: as large as 64's
    "ppo-rollouts-of-64": Arm("ppo", ("agent.num_steps_per_env=64",)),
    "ppo-long": Arm("ppo", longer=5),
}


def rollouts(experiment: Experiment, arm: str) -> int:
    """Training iterations of an arm: its rollouts differ in length."""
    settings = ARMS[arm]
    several = "," in experiment.task or "MT" in experiment.task
    mode = AGENTS[settings.agent]
    if experiment.task.startswith("Isaac") and not several:
        own_length = TASKS[experiment.task].num_steps
        length = own_length[settings.algo if mode == "default" else "ppo"]  # paper mode keeps the task's
    else:
        length = suite_runner_cfg(several, "cpu", mode, settings.algo)["num_steps_per_env"]
    for override in settings.overrides:
        if override.startswith("agent.num_steps_per_env="):
            length = int(override.partition("=")[2])
    return settings.longer * experiment.steps // length


def folder(experiment: Experiment, arm: str, seed: int) -> Path:
    """Where a run is stored."""
    count = len(experiment.task.split(","))
    name = experiment.name or (experiment.task if count == 1 else f"DMC-MT{count}")
    return DATA / name / arm / f"seed{seed}"


def run(experiment: Experiment, arm: str, seed: int) -> None:
    """Train one arm and store it."""
    target = folder(experiment, arm, seed)
    if (target / "run.json").exists():
        return
    settings, iterations = ARMS[arm], str(rollouts(experiment, arm))
    command = ["scripts/train.py", "--task", experiment.task, "--algo", settings.algo, "--agent", settings.agent]
    command += ["--seed", str(seed), "--device", "cpu"]
    command += ["--num_envs", str(experiment.num_envs), "--max_iterations", iterations]
    command += ["--eval_interval", iterations, "--eval_envs", str(experiment.eval_envs)]
    command += settings.overrides
    print(f"[benchmark] {target.relative_to(DATA)}", flush=True)
    with tempfile.TemporaryDirectory() as logs:
        result = run_python([*command, "--log_root", logs])
        manifests = list(Path(logs).rglob("run.json"))
        record = {"command": " ".join(command), "return_code": result.returncode, "arm": arm, "seed": seed}
        record |= {"name": experiment.name} if experiment.name else {}
        target.mkdir(parents=True, exist_ok=True)
        if result.returncode != 0 or not manifests:
            record |= {"crashed": True, "output": result.stdout[-2000:]}
            print(f"[benchmark] {target.relative_to(DATA)} CRASHED", flush=True)
        else:
            manifest = json.loads(manifests[0].read_text(encoding="utf-8"))
            record |= {key: manifest[key] for key in ("num_envs", "device", "versions", "git")}
            record["tasks"] = manifest["tasks"] if "tasks" in manifest else [manifest["task"]]
            for name in FILES:
                if (manifests[0].parent / name).is_file():
                    shutil.copy(manifests[0].parent / name, target / name)
    (target / "run.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    """Run groups and print the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", choices=[[], *GROUPS], help="What to run; nothing makes the report only.")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=["m3po", "ppo"])
    parser.add_argument("--processes", type=int, default=2, help="Runs at once; their order interleaves the arms.")
    parser.add_argument("--report", action="store_true", help="Print the table and draw the plots of what is stored.")
    parser.add_argument("--reference", type=Path, metavar="CSV", help="Published curves to draw beside ours.")
    args = parser.parse_args()
    experiments = [experiment for group in args.groups for experiment in GROUPS[group]]
    jobs = [(experiment, arm, seed) for seed in args.seeds for experiment in experiments for arm in args.arms]
    with ThreadPoolExecutor(args.processes) as pool:
        deque(pool.map(lambda job: run(*job), jobs), maxlen=0)
    if args.report or args.groups:
        from benchmark_suites_report import write_report

        print(write_report(DATA, args.reference))
    return 0


if __name__ == "__main__":
    sys.exit(main())
