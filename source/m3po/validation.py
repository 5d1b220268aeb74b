"""Checks of a configuration against the run that it is for, before any simulation starts."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from m3po.config import AlgorithmCfg

UNBOUNDED = ("max_grad_norm", "planner.max_learning_kl", "planner.max_acting_kl")
"""Numbers that may be infinite: no limit."""


def validate(cfg: AlgorithmCfg, num_envs: int, num_steps: int, device: str = "cpu") -> None:
    """Check a configuration against the rollout it will run on, before any simulation starts.

    Args:
        cfg: The algorithm's configuration.
        num_envs: Environments N.
        num_steps: Steps per rollout T.
        device: Torch device name that it will run on.

    Raises:
        ValueError: Names the field, its value and what is allowed.
    """
    model, planner, bonus, replay = cfg.world_model, cfg.planner, cfg.bonus, cfg.critic_replay
    _check_types(cfg)

    def require(ok: bool, message: str) -> None:
        if not ok:
            raise ValueError(message)

    require(num_envs >= 1, f"num_envs must be at least 1, got {num_envs}.")
    require(num_steps >= 1, f"num_steps_per_env must be at least 1, got {num_steps}.")
    samples = num_envs * num_steps
    require(cfg.num_learning_epochs >= 1, f"num_learning_epochs must be at least 1, got {cfg.num_learning_epochs}.")
    require(
        1 <= cfg.num_mini_batches <= samples,
        f"num_mini_batches must lie between 1 and the {samples} samples of a rollout, got {cfg.num_mini_batches}.",
    )
    choices = (
        ("planner.execution", planner.execution, ("projected", "mppi")),
        ("planner.kernels", planner.kernels, ("torch", "warp")),
        ("planner.precision", planner.precision, ("float32", "bfloat16")),
        ("ratio", cfg.ratio, ("decoupled", "prior")),
        ("advantage", cfg.advantage, ("gae", "vtrace")),
        ("schedule", cfg.schedule, ("measured", "adaptive", "fixed")),
    )
    for name, value, allowed in choices:
        require(value in allowed, f"{name} must be one of {', '.join(allowed)}, got '{value}'.")
    on_cuda = device.startswith("cuda")
    require(on_cuda or not planner.cuda_graph, f"planner.cuda_graph needs a CUDA device, but the run is on {device}.")
    at_least_one = (
        ("world_model.width", model.width),
        ("world_model.task_embedding_dim", model.task_embedding_dim),
        ("world_model.horizon", model.horizon),
        ("world_model.batch_size", model.batch_size),
        ("planner.horizon", planner.horizon),
        ("planner.num_elites", planner.num_elites),
        ("planner.num_samples", planner.num_samples),
        ("critic_replay.horizon", replay.horizon),
        ("critic_replay.batch_size", replay.batch_size),
    )
    for name, value in at_least_one:
        require(value >= 1, f"{name} must be at least 1, got {value}.")
    at_least_zero = (
        ("world_model.features", model.features),
        ("world_model.steps_per_iteration", model.steps_per_iteration),
        ("world_model.extra_steps", model.extra_steps),
        ("world_model.replay_transitions", model.replay_transitions),
        ("world_model.learning_rate", model.learning_rate),
        ("planner.max_learning_kl", planner.max_learning_kl),
        ("planner.max_acting_kl", planner.max_acting_kl),
        ("planner.num_states", planner.num_states),
        ("planner.num_policy_samples", planner.num_policy_samples),
        ("planner.num_iterations", planner.num_iterations),
        ("bonus.size", bonus.size),
        ("bonus.num_functions", bonus.num_functions),
        ("critic_replay.steps_per_iteration", replay.steps_per_iteration),
        ("critic_replay.learning_rate", replay.learning_rate),
        ("value_loss_coef", cfg.value_loss_coef),
        ("std_learning_rate", cfg.std_learning_rate),
        ("replay_ratio", cfg.replay_ratio),
        ("entropy_coef", cfg.entropy_coef),
        ("learning_rate", cfg.learning_rate),
    )
    for name, value in at_least_zero:
        require(value >= 0, f"{name} must not be negative, got {value}.")
    positive = (
        ("clip_param", cfg.clip_param),
        ("desired_kl", cfg.desired_kl),
        ("max_grad_norm", cfg.max_grad_norm),
        ("planner.full_gain", planner.full_gain),
        ("planner.temperature", planner.temperature),
    )
    for name, value in positive:
        require(value > 0, f"{name} must be positive, got {value}.")
    require(model.features % 8 == 0, f"world_model.features must be a multiple of 8, got {model.features}.")
    require(model.anchor or model.features > 0, "world_model.features must be positive without the anchor, got 0.")
    require(
        0.0 <= planner.planned_fraction <= 1.0,
        f"planner.planned_fraction must lie in [0, 1], got {planner.planned_fraction}.",
    )
    fewest = 4 + planner.num_policy_samples
    require(
        planner.num_samples >= fewest or planner.num_iterations == 0,
        f"planner.num_samples must be at least {fewest}, four of the gradient and planner.num_policy_samples of the "
        f"policy; got {planner.num_samples}.",
    )
    require(
        planner.num_elites <= planner.num_samples,
        f"planner.num_elites ({planner.num_elites}) exceeds planner.num_samples ({planner.num_samples}).",
    )
    learns_values = cfg.value_loss_coef > 0 or round(cfg.replay_ratio * replay.steps_per_iteration) > 0
    require(
        learns_values,
        "the critic would learn nothing: value_loss_coef is 0 and so is critic_replay.steps_per_iteration.",
    )
    if model.steps_per_iteration == 0:
        learning_kl = ("planner.max_learning_kl", planner.max_learning_kl)
        for name, value in (
            learning_kl,
            ("planner.planned_fraction", planner.planned_fraction),
            ("bonus.size", bonus.size),
        ):
            message = f"{name} is {value}, but the world model that it needs is not trained: set, for example, "
            require(value == 0, f"{message}world_model.steps_per_iteration=40.")
    require(
        model.horizon <= num_steps,
        f"world_model.horizon ({model.horizon}) exceeds the {num_steps} steps of a rollout (num_steps_per_env).",
    )
    for name, value in (("gamma", cfg.gamma), ("lam", cfg.lam)):
        require(0.0 <= value <= 1.0, f"{name} must lie in [0, 1], got {value}.")
    decay = cfg.policy_average_decay
    require(0.0 <= decay < 1.0, f"policy_average_decay must lie in [0, 1), got {decay}.")


def _check_types(cfg: Any, prefix: str = "") -> None:
    """Check that numbers are numbers, whole where they count something, and switches are switches.

    Raises:
        ValueError: Names the field and its value.
    """
    for field in dataclasses.fields(cfg):
        name, value = prefix + field.name, getattr(cfg, field.name)
        kind = getattr(field.type, "__name__", field.type)
        if dataclasses.is_dataclass(value):
            _check_types(value, f"{name}.")
        elif kind == "bool" and not isinstance(value, bool):
            raise ValueError(f"{name} must be true or false, got {value!r}.")
        elif kind in ("int", "float"):
            what = "a whole number" if kind == "int" else "a number"
            kinds = int if kind == "int" else (int, float)
            if not isinstance(value, kinds) or isinstance(value, bool) or math.isnan(value):
                raise ValueError(f"{name} must be {what}, got {value!r}.")
            if math.isinf(value) and name not in UNBOUNDED:
                raise ValueError(f"{name} must be finite, got {value}.")
