"""Checks of a configuration against the run that it is for, before any simulation starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from m3po.config import MODEL_SIZES, STAGE_FIELDS, AlgorithmCfg, PlannerCfg, planner_at


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
    wm, planner, bonus = cfg.world_model, cfg.planner, cfg.bonus
    replay, ahead = cfg.critic_replay, cfg.value_gradient

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
    require(wm.size in MODEL_SIZES, f"world_model.size must be one of {', '.join(MODEL_SIZES)}, got '{wm.size}'.")
    choices = (
        ("world_model.dynamics", wm.dynamics, ("residual", "plain")),
        ("world_model.value_target", wm.value_target, ("critic", "returns")),
        ("planner.execution", planner.execution, ("projected", "mppi")),
        ("planner.kernels", planner.kernels, ("torch", "warp")),
        ("planner.epilogues", planner.epilogues, ("eager", "compiled", "triton")),
        ("planner.precision", planner.precision, ("float32", "bfloat16")),
        ("bonus.centering", bonus.centering, ("mean", "robust")),
        ("ratio", cfg.ratio, ("decoupled", "prior")),
        ("advantage", cfg.advantage, ("gae", "vtrace")),
        ("schedule", cfg.schedule, ("adaptive", "fixed")),
        ("value_gradient.policy_schedule", ahead.policy_schedule, ("adaptive", "fixed")),
    )
    for name, value, allowed in choices:
        require(value in allowed, f"{name} must be one of {', '.join(allowed)}, got '{value}'.")
    if not device.startswith("cuda"):
        for name, wrong in (("epilogues=triton", planner.epilogues == "triton"), ("cuda_graph", planner.cuda_graph)):
            require(not wrong, f"planner.{name} needs a CUDA device, but the run is on {device}.")
    at_least_one = (
        ("world_model.horizon", wm.horizon),
        ("world_model.batch_size", wm.batch_size),
        ("world_model.extra_iterations", wm.extra_iterations),
        ("critic_replay.horizon", replay.horizon),
        ("critic_replay.batch_size", replay.batch_size),
        ("value_gradient.extra_iterations", ahead.extra_iterations),
        ("value_gradient.batch_size", ahead.batch_size),
        ("value_gradient.width", ahead.width),
        ("value_gradient.horizon", ahead.horizon),
        ("value_gradient.num_epochs", ahead.num_epochs),
        ("restore_after", cfg.restore_after),
    )
    for name, value in at_least_one:
        require(value >= 1, f"{name} must be at least 1, got {value}.")
    at_least_zero = (
        ("planner.chunk_rows", planner.chunk_rows),
        ("planner.max_kl", planner.max_kl),
        ("world_model.steps_per_iteration", wm.steps_per_iteration),
        ("world_model.extra_steps", wm.extra_steps),
        ("world_model.ring_transitions", wm.ring_transitions),
        ("distill_coef", cfg.distill_coef),
        ("value_loss_coef", cfg.value_loss_coef),
        ("critic_min_learning_rate", cfg.critic_min_learning_rate),
        ("bonus.alpha", bonus.alpha),
        ("bonus.floor", bonus.floor),
        ("critic_replay.steps_per_iteration", replay.steps_per_iteration),
        ("critic_replay.learning_rate", replay.learning_rate),
        ("value_gradient.steps_per_iteration", ahead.steps_per_iteration),
        ("value_gradient.extra_steps", ahead.extra_steps),
        ("value_gradient.stored_rollouts", ahead.stored_rollouts),
        ("value_gradient.learning_rate", ahead.learning_rate),
        ("value_gradient.max_kl", ahead.max_kl),
        ("value_gradient.policy_learning_rate", ahead.policy_learning_rate),
        ("std_learning_rate", cfg.std_learning_rate),
    )
    for name, value in at_least_zero:
        require(value >= 0, f"{name} must not be negative, got {value}.")
    require(
        cfg.value_loss_coef > 0 or replay.steps_per_iteration > 0,
        "the critic would learn nothing: value_loss_coef is 0 and so is critic_replay.steps_per_iteration.",
    )
    require(ahead.full_slope > 0, f"value_gradient.full_slope must be positive, got {ahead.full_slope}.")
    _validate_budget(planner, require)
    for stage in planner.stages:
        ok = isinstance(stage, (list, tuple)) and len(stage) == 2 and isinstance(stage[1], Mapping)
        require(ok, f"planner.stages must hold pairs [progress, {{field: value}}], got {stage!r}.")
        begin, changes = stage
        ok = isinstance(begin, (int, float)) and 0.0 <= begin <= 1.0
        require(ok, f"planner.stages: a stage begins at a progress in [0, 1], got {begin!r}.")
        unknown = sorted(set(changes) - set(STAGE_FIELDS))
        require(not unknown, f"planner.stages cannot change {', '.join(unknown)}; only {', '.join(STAGE_FIELDS)}.")
        _validate_budget(planner_at(planner, begin), require)
    if wm.steps_per_iteration == wm.extra_steps == 0:
        budgets = [planner, *(planner_at(planner, stage[0]) for stage in planner.stages)]
        share = max((budget.share for budget in budgets if budget.num_iterations > 0), default=0.0)
        for name, value in (("bonus.alpha", bonus.alpha), ("planner.share", share)):
            message = f"{name} is {value}, but the latent model that it needs is not trained: set, for example, "
            require(value == 0, f"{message}world_model.steps_per_iteration=10.")
    require(
        wm.horizon <= num_steps,
        f"world_model.horizon ({wm.horizon}) exceeds the {num_steps} steps of a rollout (num_steps_per_env).",
    )
    for name, value in (("gamma", cfg.gamma), ("lam", cfg.lam), ("critic_replay.lam", replay.lam)):
        require(0.0 <= value <= 1.0, f"{name} must lie in [0, 1], got {value}.")
    decay = cfg.policy_average_decay
    require(0.0 <= decay < 1.0, f"policy_average_decay must lie in [0, 1), got {decay}.")


def _validate_budget(planner: PlannerCfg, require: Callable[[bool, str], None]) -> None:
    """Check the fields that a stage may change."""
    for name in ("horizon", "num_samples", "num_elites"):
        value = getattr(planner, name)
        require(value >= 1, f"planner.{name} must be at least 1, got {value}.")
    for name in ("num_iterations", "num_prior_samples"):
        value = getattr(planner, name)
        require(value >= 0, f"planner.{name} must not be negative, got {value}.")
    require(0.0 <= planner.share <= 1.0, f"planner.share must lie in [0, 1], got {planner.share}.")
    for name in ("num_elites", "num_prior_samples"):
        value = getattr(planner, name)
        require(
            value <= planner.num_samples,
            f"planner.{name} ({value}) exceeds planner.num_samples ({planner.num_samples}).",
        )
