"""The two modes of one code path, as values of the same fields, and their sizes on a GPU."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

from m3po.config import (
    MAX_NAN_FRACTION,
    AlgorithmCfg,
    BonusCfg,
    CriticReplayCfg,
    PlannerCfg,
    WorldModelCfg,
)


def paper() -> AlgorithmCfg:
    """Paper mode: what it changes in the default mode (docs/algorithm.md).

    The latent is purely learnt, from the current rollout alone. Every environment acts by an MPPI plan without a trust
    region and without the gradient. The ratio is the policy's, and the bonus is (7) as written.
    """
    return AlgorithmCfg(
        lam=0.95,
        learning_rate=3e-4,
        schedule="fixed",
        ratio="prior",
        advantage="vtrace",
        value_loss_coef=1.0,
        std_learning_rate=0.0,
        policy_average_decay=0.0,
        world_model=WorldModelCfg(
            anchor=False,
            features=64,
            width=128,
            horizon=3,
            replay_transitions=0,
            steps_per_iteration=16,
            extra_steps=0,
            batch_size=256,
            learning_rate=3e-4,
        ),
        planner=PlannerCfg(
            average_horizons=False,
            max_learning_kl=0.0,
            max_acting_kl=math.inf,
            planned_fraction=1.0,
            execution="mppi",
            temperature=0.5,
            num_samples=32,
            num_policy_samples=4,
            num_elites=8,
        ),
        bonus=BonusCfg(size=1.0, num_functions=0, literal=True),
        critic_replay=CriticReplayCfg(steps_per_iteration=0),
    )


PLAIN_GROUPS = {"actor": ["policy"], "critic": ["policy"]}
"""Observation groups of tasks that bring no configuration of their own."""

FIRST_STD = 0.5
"""First std of the actions in the default mode, relative to that of a task's own agent for PPO."""

MODES = {"default": AlgorithmCfg, "paper": paper}
"""Mode -> makes its configuration, sized for a CPU."""


def sized(cfg: AlgorithmCfg, device: str) -> AlgorithmCfg:
    """The same algorithm with the sizes for a device; which parts run is the same everywhere.

    Args:
        cfg: Configuration of a mode, sized for a CPU.
        device: Torch device name.
    """
    if not device.startswith("cuda"):
        return cfg
    paper_mode = not cfg.world_model.anchor
    model = dataclasses.replace(
        cfg.world_model,
        features=512 if paper_mode else cfg.world_model.features,
        width=912 if paper_mode else 512,
        task_embedding_dim=96,
        batch_size=1024 if paper_mode else 8192,
        steps_per_iteration=64 if paper_mode else 30,
        extra_steps=0 if paper_mode else 150,
    )
    planner = dataclasses.replace(
        cfg.planner,
        num_states=max(cfg.planner.num_states, 32768),
        num_samples=512 if paper_mode else 64,
        num_policy_samples=24 if paper_mode else 8,
        num_iterations=6 if paper_mode else 1,
        num_elites=64 if paper_mode else 8,
        kernels="warp",
        precision="bfloat16",
    )
    steps = min(32, cfg.critic_replay.steps_per_iteration)
    critic = dataclasses.replace(cfg.critic_replay, batch_size=8192, steps_per_iteration=steps)
    return dataclasses.replace(cfg, world_model=model, planner=planner, critic_replay=critic)


def describe(algorithm: AlgorithmCfg, mode: str, device: str) -> str:
    """Three lines that say what a preset chose; ``mode`` and ``device`` are named in the first."""
    model, planner, critic = algorithm.world_model, algorithm.planner, algorithm.critic_replay
    parts = ["observation"] * model.anchor + [f"{model.features} features"] * (model.features > 0)
    where = "learning and acting" if planner.max_learning_kl > 0 else "acting"
    iterations = f"{planner.num_iterations} iteration{'' if planner.num_iterations == 1 else 's'}"
    return (
        f"[m3po] preset: {mode}, {device} (latent: {' and '.join(parts)}, width at most {model.width}; "
        f"{model.steps_per_iteration} model and {critic.steps_per_iteration} critic steps per rollout)\n"
        f"[m3po] planner: while {where}, horizon {planner.horizon}, {planner.num_samples} candidates x {iterations}, "
        f"at most {planner.planned_fraction:.0%} of the environments\n"
        f"[m3po] planner's arithmetic: {planner.kernels} kernels, {planner.precision}"
        f"{', one CUDA graph' if planner.cuda_graph else ''}"
    )


def runner_cfg(device: str = "cpu", mode: str = "default") -> dict[str, Any]:
    """What rsl_rl's ``OnPolicyRunner`` needs to train M3PO on any ``VecEnv`` of one task.

    Policy and critic read the observation group ``policy``; ``obs_groups`` names others.

    Args:
        device: Torch device name.
        mode: Key of :data:`MODES`.

    Returns:
        A dictionary to be changed at will, then given to the runner.
    """
    cfg = suite_runner_cfg(False, device, mode)
    return cfg | {"algorithm": dataclasses.asdict(cfg["algorithm"]) | {"class_name": "m3po.algorithms:M3PO"}}


def suite_runner_cfg(multi_task: bool, device: str, mode: str, algo: str = "m3po") -> dict[str, Any]:
    """Runner configuration for tasks that bring none of their own.

    Args:
        multi_task: Whether policy and critic are conditioned on the task.
        device: Torch device name.
        mode: Key of :data:`MODES`.
        algo: ``m3po``, or ``ppo``: rsl_rl's own, which has one mode.

    Returns:
        The configuration; ``algorithm`` is an :class:`~m3po.config.AlgorithmCfg`, or PPO's fields.
    """
    if algo == "ppo":
        return ppo_runner_cfg(multi_task, device)
    algorithm = MODES[mode]()
    if mode == "default":
        # 64 environments make rollouts of 512 steps, which several tasks multiply.
        batch = 512 if multi_task else 256
        algorithm.desired_kl, algorithm.std_learning_rate = 0.03, 1e-3
        # Small rollouts move the policy by what happens to be in them: more of them are averaged.
        algorithm.policy_average_decay = 0.95
        algorithm.world_model.steps_per_iteration, algorithm.world_model.extra_steps = 40, 100
        algorithm.world_model.batch_size = algorithm.critic_replay.batch_size = batch
    width = 256 if device.startswith("cpu") else 512
    network = {"class_name": "MLPModel", "hidden_dims": [width, width], "activation": "elu", "obs_normalization": True}
    noise = {"class_name": "GaussianDistribution", "init_std": 1.0, "std_type": "log"}
    return {
        "num_steps_per_env": 8 if mode == "default" else 16,
        "max_iterations": 500 if mode == "default" else 250,
        "save_interval": 50,
        "check_for_nan": True,
        "max_nan_fraction": MAX_NAN_FRACTION,
        "obs_groups": copy.deepcopy(PLAIN_GROUPS),
        "actor": {**network, "distribution_cfg": noise},
        "critic": dict(network),
        "algorithm": sized(algorithm, device),
    }


def ppo_runner_cfg(multi_task: bool, device: str) -> dict[str, Any]:
    """Runner configuration of rsl_rl's PPO for tasks that bring none of their own, with M3PO's networks.

    The critic's loss is not clipped: rsl_rl clips values to changes of 0.2 per update, and returns here are up to 200.

    Args:
        multi_task: Whether policy and critic are conditioned on the task (:mod:`m3po.baselines.ppo`).
        device: Torch device name.

    Returns:
        The configuration; ``algorithm`` holds fields of rsl_rl's PPO.
    """
    cfg = suite_runner_cfg(multi_task, device, "default", "m3po")
    cfg |= {"num_steps_per_env": 16, "max_iterations": 250}
    if multi_task:
        for name in ("actor", "critic"):
            cfg[name]["embedding_dim"] = 16 if device.startswith("cpu") else 96
    cfg["algorithm"] = {
        "num_learning_epochs": 5,
        "num_mini_batches": 4,
        "clip_param": 0.2,
        "gamma": 0.99,
        "lam": 0.95,
        "value_loss_coef": 1.0,
        "entropy_coef": 0.0,
        "learning_rate": 1e-3,
        "max_grad_norm": 1.0,
        "use_clipped_value_loss": False,
        "schedule": "adaptive",
        "desired_kl": 0.06 if multi_task else 0.03,
        "normalize_advantage_per_mini_batch": False,
    }
    return cfg
