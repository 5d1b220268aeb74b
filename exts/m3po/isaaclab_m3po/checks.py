"""Checks of what a user asked for: device, agent, sizes. Each failure is a :class:`m3po.errors.UserError`."""

from __future__ import annotations

import importlib.metadata
from typing import Any

from m3po.errors import UserError

ALGORITHMS = {"m3po": "m3po_cfg_entry_point", "ppo": "rsl_rl_cfg_entry_point"}
"""Algorithm -> its default agent entry point."""


def choose_agent(task: str, algo: str, requested: str | None) -> str:
    """Entry point of the agent's configuration; a name that the task does not have is the user's mistake."""
    import gymnasium as gym

    entry = requested or ALGORITHMS[algo]
    kwargs = gym.registry[task].kwargs
    existing = sorted(key for key in kwargs if key.endswith("cfg_entry_point") and key != "env_cfg_entry_point")
    if entry not in existing:
        raise UserError(f"task '{task}' has no agent '{entry}'. It has: {', '.join(existing) or 'none'}.")
    return entry


def check_agent(agent_cfg: Any, algo: str, entry: str) -> Any:
    """Refuse an agent of another library or algorithm; bring an old rsl_rl configuration up to date."""
    from isaaclab_rl.rsl_rl import RslRlOnPolicyRunnerCfg, handle_deprecated_rsl_rl_cfg

    from . import agents

    if not isinstance(agent_cfg, RslRlOnPolicyRunnerCfg):
        raise UserError(f"agent '{entry}' is not a configuration of rsl_rl's on-policy runner.")
    is_m3po = str(agent_cfg.algorithm.class_name) == agents.ALGORITHM
    if is_m3po != (algo == "m3po"):
        raise UserError(
            f"agent '{entry}' is not one of algorithm '{algo}' (its class: {agent_cfg.algorithm.class_name})."
        )
    return handle_deprecated_rsl_rl_cfg(agent_cfg, importlib.metadata.version("rsl-rl-lib"))


def check_sizes(agent_cfg: Any, algo: str, num_envs: int, device: str) -> None:
    """Check the rollout and mini-batch sizes of both algorithms, and all fields of M3PO's configuration."""
    from m3po.algorithms.construction import check_cfg
    from m3po.config import QUARANTINE_SHARE, AlgorithmCfg

    from . import agents

    if algo == "m3po":
        cfg = agents.algorithm_cfg(agent_cfg)
    else:
        ppo = agent_cfg.algorithm
        cfg = AlgorithmCfg(num_learning_epochs=ppo.num_learning_epochs, num_mini_batches=ppo.num_mini_batches)
    share = getattr(agent_cfg, "quarantine_share", QUARANTINE_SHARE)  # rsl_rl's own agents do not have it
    check_cfg(cfg, num_envs, agent_cfg.num_steps_per_env, device, share=share)
    if agent_cfg.max_iterations < 1 or agent_cfg.save_interval < 1:
        raise UserError("max_iterations and save_interval must be at least 1.")
