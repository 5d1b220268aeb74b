"""Checks of what a user asked for: device, agent, sizes. Each failure is a :class:`m3po.errors.UserError`."""

from __future__ import annotations

import importlib.metadata
from typing import Any

from m3po.cli.job import ALGORITHMS
from m3po.errors import UserError


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


def check_actions(task: str, env_cfg: Any) -> None:
    """Refuse tasks whose actions are not vectors of numbers; manager-based ones always are."""
    import gymnasium as gym
    from isaaclab.envs.utils.spaces import spec_to_gym_space

    spec = getattr(env_cfg, "action_space", None)
    specs = getattr(env_cfg, "action_spaces", None) or ({} if spec is None else {"": spec})
    for spec in specs.values():
        space = spec_to_gym_space(spec)
        if not isinstance(space, gym.spaces.Box):
            raise UserError(
                f"task '{task}' has actions of kind {type(space).__name__}. M3PO and rsl_rl's PPO act with vectors of "
                "numbers (Box) alone; skrl and Stable-Baselines3 have PPO for discrete actions."
            )


RUNNER_SETTINGS = ("class_name", "logger", "resume", "load_run", "load_checkpoint", "torch_compile_mode")
"""Fields of rsl_rl's runner that our commands do not read: they have options, folders and loggers of their own."""

PPO_SETTINGS = (
    *("rnd_cfg", "symmetry_cfg", "optimizer", "normalize_advantage_per_mini_batch", "share_cnn_encoders"),
    "use_mixed_precision",
)
"""Fields of rsl_rl's PPO that M3PO does not have."""


def ignored_settings(agent_cfg: Any, task_agent_cfg: Any) -> list[str]:
    """Settings that somebody has chosen and that have no effect.

    Args:
        agent_cfg: Runner configuration that is used.
        task_agent_cfg: The task's own one for rsl_rl, which M3PO's is made from; ``None``: it is used as it is.

    Returns:
        Names of the fields that differ from their defaults.
    """
    from isaaclab_rl.rsl_rl import RslRlOnPolicyRunnerCfg, RslRlPpoAlgorithmCfg

    places = [(agent_cfg, RslRlOnPolicyRunnerCfg(), RUNNER_SETTINGS, "")]
    if task_agent_cfg is not None:
        places.append((task_agent_cfg.algorithm, RslRlPpoAlgorithmCfg(), PPO_SETTINGS, "algorithm."))
    return [
        f"{section}{name}"
        for cfg, plain, names, section in places
        for name in names
        if hasattr(plain, name) and getattr(cfg, name, getattr(plain, name)) != getattr(plain, name)
    ]


def check_sizes(agent_cfg: Any, algo: str, num_envs: int, device: str) -> None:
    """Check the rollout and mini-batch sizes of both algorithms, and all fields of M3PO's configuration."""
    from m3po.algorithms.construction import check_cfg
    from m3po.config import MAX_NAN_FRACTION, AlgorithmCfg

    from . import agents

    if algo == "m3po":
        cfg = agents.algorithm_cfg(agent_cfg)
    else:
        ppo = agent_cfg.algorithm
        cfg = AlgorithmCfg(num_learning_epochs=ppo.num_learning_epochs, num_mini_batches=ppo.num_mini_batches)
    max_nan = getattr(agent_cfg, "max_nan_fraction", MAX_NAN_FRACTION)  # rsl_rl's own agents do not have it
    check_cfg(cfg, num_envs, agent_cfg.num_steps_per_env, device, max_nan=max_nan)
    if agent_cfg.max_iterations < 1 or agent_cfg.save_interval < 1:
        raise UserError("max_iterations and save_interval must be at least 1.")
