"""The two modes of one code path, as values of the same fields, sized for the device."""

from __future__ import annotations

from typing import Any

from m3po.config import QUARANTINE_SHARE, AlgorithmCfg, BonusCfg, PlannerCfg, WorldModelCfg

SMALL_POLICY = 64
"""Widest hidden layer of the policies that get the smallest model."""


def default_preset(device: str, policy_width: int = 256) -> AlgorithmCfg:
    """Default mode: the algorithm with the settlements that paid in measurements, sized for the device.

    Args:
        device: Torch device name; a CPU gets a smaller model and planner.
        policy_width: Widest hidden layer of the task's policy. On a CPU the model is sized after it, so that planning
            costs about as much as the task's own physics and policy.
    """
    if device.startswith("cpu") and policy_width <= SMALL_POLICY:
        return AlgorithmCfg(
            lam=0.95,
            world_model=WorldModelCfg(size="micro", task_embedding_dim=8, batch_size=256, learning_rate=2e-3),
            planner=PlannerCfg(
                horizon=8, num_samples=4, num_prior_samples=0, num_iterations=1, num_elites=4, max_kl=0.5
            ),
        )
    if device.startswith("cpu"):
        return AlgorithmCfg(
            distill_coef=0.2,
            world_model=WorldModelCfg(
                size="tiny", task_embedding_dim=8, steps_per_iteration=10, batch_size=256, learning_rate=2e-3
            ),
            planner=PlannerCfg(
                horizon=4, num_samples=16, num_prior_samples=2, num_iterations=1, num_elites=16, share=0.25
            ),
        )
    return AlgorithmCfg(
        world_model=WorldModelCfg(steps_per_iteration=28, batch_size=4096),
        planner=PlannerCfg(kernels="warp", epilogues="compiled", precision="bfloat16"),
    )


def learn_values_on_the_ring(algorithm: AlgorithmCfg, steps: int, batch_size: int, learning_rate: float) -> None:
    """Let the critic learn on the ring alone, without planner and latent model, which added nothing beside it.

    (docs/experiments.md)

    Args:
        algorithm: Configuration that is changed.
        steps: Gradient steps of the critic per rollout.
        batch_size: Observations per gradient step.
        learning_rate: Their step size.
    """
    replay = algorithm.critic_replay
    replay.steps_per_iteration, replay.batch_size, replay.learning_rate = steps, batch_size, learning_rate
    algorithm.value_loss_coef = 0.0
    algorithm.world_model.steps_per_iteration = algorithm.world_model.extra_steps = 0
    algorithm.planner.share = algorithm.distill_coef = 0.0


def look_ahead_while_learning(
    algorithm: AlgorithmCfg,
    steps: int,
    extra_steps: int,
    batch_size: int,
    critic_batch_size: int,
    std_learning_rate: float,
) -> None:
    """Let the value gradient look ahead instead of the planner, with what it takes for it to pay.

    Values must be better than one rollout can tell, and the deviation must not be slowed down with the policy, which
    gives a part of the trust region away.

    Args:
        algorithm: Configuration that is changed.
        steps: Gradient steps of the model of observations per rollout.
        extra_steps: More of them in each of the first ten iterations.
        batch_size: Transitions per gradient step of that model.
        critic_batch_size: Observations per gradient step of the critic on the ring.
        std_learning_rate: Step size of the actions' deviation.
    """
    ahead = algorithm.value_gradient
    ahead.steps_per_iteration, ahead.extra_steps, ahead.batch_size = steps, extra_steps, batch_size
    learn_values_on_the_ring(algorithm, 64, critic_batch_size, 1e-3)
    algorithm.std_learning_rate = std_learning_rate


def paper_preset(device: str, policy_width: int = 256) -> AlgorithmCfg:
    """Paper mode: mean centring, the prior's ratio, every environment planned with TD-MPC2's budget.

    Args:
        device: Torch device name; a CPU gets a smaller model and fewer candidates, or one step would take minutes.
        policy_width: Widest hidden layer of the task's policy; the paper sizes its model independently of it.
    """
    cpu = device.startswith("cpu")
    return AlgorithmCfg(
        lam=0.95,
        learning_rate=3e-4,
        critic_min_learning_rate=0.0,
        schedule="fixed",
        ratio="prior",
        advantage="vtrace",
        distill_coef=0.0,
        world_model=WorldModelCfg(
            size="tiny" if cpu else "5M",
            dynamics="plain",
            value_target="returns",
            horizon=3,
            ring_transitions=0,
            steps_per_iteration=16 if cpu else 64,
            batch_size=256 if cpu else 1024,
            encoder_lr_scale=0.3,
            consistency_coef=20.0,
            reward_coef=0.1,
        ),
        planner=PlannerCfg(
            temperature=0.5,
            horizon=3,
            num_samples=32 if cpu else 512,
            num_prior_samples=4 if cpu else 24,
            num_iterations=1 if cpu else 6,
            num_elites=8 if cpu else 64,
            share=1.0,
            execution="mppi",
            min_skill=None,
            min_reward_ev=None,
        ),
        bonus=BonusCfg(alpha=1.0, anneal_fraction=1.0, centering="mean"),
    )


def describe(algorithm: AlgorithmCfg, mode: str, device: str) -> str:
    """Three lines that say what a preset chose; ``mode`` and ``device`` are named in the first."""
    model, planner, ahead = algorithm.world_model, algorithm.planner, algorithm.value_gradient
    imagined = f"1 to {ahead.horizon} steps, {ahead.steps_per_iteration} model steps per rollout"
    iterations = f"{planner.num_iterations} iteration{'' if planner.num_iterations == 1 else 's'}"
    return (
        f"[m3po] preset: {mode}, {device} (model {model.size}, {planner.num_samples} samples x {iterations}"
        f" x horizon {planner.horizon}, {planner.share:.0%} of the environments planned)\n"
        f"[m3po] planner: {planner.kernels} kernels, {planner.epilogues} epilogues, {planner.precision}"
        f"{', one CUDA graph' if planner.cuda_graph else ''}\n"
        f"[m3po] value gradient: {imagined if ahead.steps_per_iteration > 0 else 'off'}"
    )


def suite_runner_cfg(multi_task: bool, device: str, mode: str, algo: str) -> dict[str, Any]:
    """Runner configuration for tasks that bring none of their own.

    Args:
        multi_task: Whether policy and critic are conditioned on the task.
        device: Torch device name.
        mode: ``default`` or ``paper``.
        algo: ``m3po``, or ``ppo``: its PPO core alone, without model, planner and bonus.

    Returns:
        The configuration; ``algorithm`` is an :class:`~m3po.config.AlgorithmCfg`.
    """
    algorithm = {"default": default_preset, "paper": paper_preset}[mode](device)
    algorithm.normalize_values = True
    if mode == "default" and device.startswith("cpu"):
        # Few environments give small rollouts: larger steps of the policy, fewer of the model, a lighter distillation.
        algorithm.desired_kl = 0.03
        algorithm.distill_coef = 0.05
        algorithm.world_model.steps_per_iteration = 12
    if multi_task and mode == "default":
        # One critic for several tasks must be faster than one of its own: at 1e-3, that of a small task stood still.
        # The mean KL is that of the tasks with many actions; at half of it, a task with a single one hardly moved.
        algorithm.critic_min_learning_rate = 3e-3
        algorithm.desired_kl = 0.06
    # With the model, updates from rollouts of half the length are as good, and there are twice as many of them.
    looks_ahead = mode == "default" and device.startswith("cpu") and algo == "m3po" and not multi_task
    if looks_ahead:
        budget = {"steps": 40, "extra_steps": 100, "batch_size": 256, "critic_batch_size": 256}
        look_ahead_while_learning(algorithm, **budget, std_learning_rate=1e-3)
        # A rollout of few environments shows little of an episode; what it does not show is forgotten for a while.
        algorithm.value_gradient.stored_rollouts = 3
        algorithm.policy_average_decay = 0.95
    if multi_task:
        algorithm.world_model.task_embedding_dim = 96 if not device.startswith("cpu") else 16
    if algo == "ppo":
        algorithm.distill_coef = 0.0
        algorithm.world_model.steps_per_iteration = algorithm.world_model.extra_steps = 0
        algorithm.planner.share = 0.0
        algorithm.bonus.alpha = 0.0
    width = 256 if device.startswith("cpu") else 512
    network = {"class_name": "MLPModel", "hidden_dims": [width, width], "activation": "elu", "obs_normalization": True}
    noise = {"class_name": "GaussianDistribution", "init_std": 1.0, "std_type": "log"}
    return {
        "num_steps_per_env": 8 if looks_ahead else 16,
        "max_iterations": 500 if looks_ahead else 250,
        "save_interval": 50,
        "check_for_nan": True,
        "quarantine_share": QUARANTINE_SHARE,
        "obs_groups": {"actor": ["policy"], "critic": ["policy"]},
        "actor": {**network, "distribution_cfg": noise},
        "critic": dict(network),
        "algorithm": algorithm,
    }
