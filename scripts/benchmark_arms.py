"""What ``benchmark_learning.py`` trains: tasks with their budgets, arms by name, and suites of arms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

M3PO_NUM_STEPS = 8
"""Steps of a rollout in M3PO's default mode on a CPU (``isaaclab_m3po.agents.CPU_NUM_STEPS``, which imports Isaac Lab)."""


@dataclass(frozen=True)
class Setting:
    """How long a task is trained, with how many environments."""

    num_envs: int
    """Environments."""

    env_steps: int
    """Environment steps of a run, all environments together."""

    shipped_num_steps: int
    """Steps of a rollout of PPO as shipped."""


TASKS = {
    "Isaac-Cartpole-v0": Setting(512, 600_000, 16),
    "Isaac-Ant-v0": Setting(512, 1_000_000, 32),
    "Isaac-Humanoid-v0": Setting(512, 1_000_000, 32),
}


@dataclass(frozen=True)
class Arm:
    """One configuration of an algorithm."""

    algo: str
    """``--algo``."""

    overrides: tuple[str, ...] = ()
    """Overrides on every task."""

    by_task: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Task -> more overrides; where there are any, the arm runs on these tasks alone."""

    share: float = 1.0
    """Share of the task's budget; an ablation may stop earlier than what it is compared with."""

    def runs_on(self, task: str) -> bool:
        """Whether the arm is meant for a task."""
        return not self.by_task or task in self.by_task

    def overrides_on(self, task: str) -> tuple[str, ...]:
        """All overrides on a task."""
        return (*self.overrides, *self.by_task.get(task, ()))

    def num_steps(self, task: str) -> int:
        """Steps of a rollout."""
        for override in reversed(self.overrides_on(task)):
            if override.startswith("agent.num_steps_per_env="):
                return int(override.partition("=")[2])
        return M3PO_NUM_STEPS if self.algo == "m3po" else TASKS[task].shipped_num_steps


_A = "agent.algorithm."
_NO_PLANNER = (f"{_A}planner.share=0.0", f"{_A}planner.stages=[]")
_FIRST = (f"{_A}desired_kl=0.01", "agent.num_steps_per_env=16")

ARMS = {
    "m3po": Arm("m3po"),
    # rsl_rl's PPO: as the task ships it, and with the best of as many trials as M3PO had (docs/experiments.md)
    "ppo-shipped": Arm("ppo"),
    "ppo-tuned": Arm("ppo", by_task={}),
    # M3PO as it was before, for comparison
    "m3po-1": Arm("m3po", _FIRST),
    # one thing taken away or added
    "m3po-no-planner": Arm("m3po", _NO_PLANNER),
    "m3po-no-distillation": Arm("m3po", (f"{_A}distill_coef=0.0",)),
    "m3po-bonus": Arm("m3po", (f"{_A}bonus.alpha=0.3",)),
    "m3po-no-critic-floor": Arm("m3po", (f"{_A}critic_min_learning_rate=0.0",)),
    "m3po-no-extra-steps": Arm("m3po", (f"{_A}world_model.extra_steps=0",)),
    "m3po-no-consistency": Arm("m3po", (f"{_A}world_model.consistency_coef=0.0",)),
    "m3po-no-reward-loss": Arm("m3po", (f"{_A}world_model.reward_coef=0.0",)),
    "m3po-no-value-loss": Arm("m3po", (f"{_A}world_model.value_coef=0.0",)),
    "m3po-no-continuation-loss": Arm("m3po", (f"{_A}world_model.continuation_coef=0.0",)),
    "m3po-no-prior-loss": Arm("m3po", (f"{_A}world_model.prior_coef=0.0",)),
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
