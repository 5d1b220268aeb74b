"""What ``benchmark_learning.py`` trains: tasks with their budgets, arms by name, and suites of arms.

``benchmark_suites.py`` shares the arms of :data:`PARTS`. Other arms of the data are of version 0.1 and before;
they are stored, and cannot be run again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Setting:
    """How long a task is trained, with how many environments."""

    num_envs: int
    """Environments."""

    env_steps: int
    """Environment steps of a run, all environments together."""

    num_steps: dict[str, int]
    """``--algo`` -> steps of a rollout: M3PO's default on a CPU, and PPO as shipped."""


TASKS = {
    "Isaac-Cartpole-v0": Setting(512, 600_000, {"m3po": 8, "ppo": 16}),
    "Isaac-Ant-v0": Setting(512, 1_000_000, {"m3po": 8, "ppo": 32}),
    "Isaac-Humanoid-v0": Setting(512, 500_000, {"m3po": 8, "ppo": 32}),
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
        return TASKS[task].num_steps[self.algo]


_A = "agent.algorithm."
_NO_REPLAY = (f"{_A}critic_replay.steps_per_iteration=0", f"{_A}value_loss_coef=1.0")
_NO_PLANNER, _NO_GRADIENT = (f"{_A}planner.share=0.0",), (f"{_A}planner.max_learning_kl=0.0",)
_NO_BONUS = (f"{_A}bonus.size=0.0",)

CORE = (
    *_NO_REPLAY,
    *_NO_PLANNER,
    *_NO_GRADIENT,
    *_NO_BONUS,
    f"{_A}world_model.steps_per_iteration=0",
    f"{_A}schedule=adaptive",
    f"{_A}std_learning_rate=0.0",
    f"{_A}policy_average_decay=0.0",
)
"""M3PO's PPO core alone: no world model, plans, bonus, training on the replay buffer or average of the policy."""

PARTS = {
    "m3po": (),
    "m3po-no-planner": _NO_PLANNER,
    "m3po-no-gradient": _NO_GRADIENT,
    "m3po-no-bonus": _NO_BONUS,
    "m3po-no-critic-replay": _NO_REPLAY,
    "m3po-adaptive": (f"{_A}schedule=adaptive",),
    "m3po-features": (f"{_A}world_model.features=32",),
    "m3po-latent": (f"{_A}world_model.anchor=false", f"{_A}world_model.features=64"),
    "m3po-ratio-4": (f"{_A}replay_ratio=4.0",),
    "m3po-ratio-16": (f"{_A}replay_ratio=16.0",),
}
"""Arm of M3PO -> overrides: the default, and the default with one thing taken away or changed."""

_LOCOMOTION = (
    "agent.num_steps_per_env=8",
    f"{_A}desired_kl=0.06",
    f"{_A}lam=0.9",
    "agent.actor.distribution_cfg.init_std=0.5",
)

ARMS = {name: Arm("m3po", overrides) for name, overrides in PARTS.items()} | {
    "ppo-core": Arm("m3po", CORE),
    # rsl_rl's PPO: as the task ships it, and with every setting it can have that helped while M3PO was tuned; it had
    # fewer trials of its own than M3PO (docs/experiments.md)
    "ppo-shipped": Arm("ppo"),
    "ppo-tuned": Arm(
        "ppo",
        by_task={
            "Isaac-Cartpole-v0": ("agent.num_steps_per_env=8",),
            "Isaac-Ant-v0": _LOCOMOTION,
            "Isaac-Humanoid-v0": _LOCOMOTION,
        },
    ),
}

SUITES = {
    "main": ["m3po", "ppo-tuned", "ppo-shipped"],
    "ablation": [*(name for name in PARTS if name != "m3po"), "ppo-core"],
}
