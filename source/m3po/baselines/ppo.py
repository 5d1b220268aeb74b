"""rsl_rl's PPO for several tasks: policy and critic are told the task, and the update is rsl_rl's own code.

rsl_rl's PPO has one discount for all tasks, the mean of theirs (:mod:`m3po.cli.suite_job`). It has no unit of reward
for each task either: the task with the largest rewards weighs most in the critic's loss. The advantages are
standardised over all tasks together, so that it weighs most in the policy's loss as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import inf
from typing import Any

from rsl_rl import algorithms
from rsl_rl.env import VecEnv
from rsl_rl.models import MLPModel
from tensordict import TensorDict

from m3po.algorithms.tasks import Tasks
from m3po.class_names import resolve_class
from m3po.config import check_max_nan_fraction
from m3po.errors import UserError
from m3po.models.task_policy import TaskMLPModel

BOUNDS = {
    "num_learning_epochs": (1, inf),
    **dict.fromkeys(("gamma", "lam"), (0, 1)),
    **dict.fromkeys(("clip_param", "value_loss_coef", "entropy_coef"), (0, inf)),
    **dict.fromkeys(("learning_rate", "max_grad_norm", "desired_kl"), (0, inf)),
}
"""Fields of rsl_rl's PPO -> least and largest value."""


class PPO(algorithms.PPO):
    """rsl_rl's PPO; its networks are :class:`~m3po.models.task_policy.TaskMLPModel`, sized by the environment.

    Each network has a table of task embeddings of its own. One table for both would be twice in rsl_rl's optimiser.
    """

    @staticmethod
    def construct_algorithm(obs: TensorDict, env: VecEnv, cfg: dict[str, Any], device: str) -> algorithms.PPO:
        """Build the algorithm for an environment of several tasks, or of one that is told to the networks.

        Args:
            obs: Example observations, batch size (N,), with the group ``task``.
            env: Environment as :class:`~m3po.envs.multi_task.MultiTaskVecEnv`.
            cfg: Runner configuration as in rsl_rl; networks have ``embedding_dim`` besides.
            device: Torch device.

        Raises:
            UserError: If a network is another one than rsl_rl's ``MLPModel``.
        """
        tasks = Tasks.of(env, cfg["algorithm"]["gamma"], device)
        networks = {}
        for name in ("actor", "critic"):
            network_class, network_cfg = resolve_class(cfg[name])
            if network_class is not MLPModel:
                raise UserError(f"the {name} of several tasks must be an MLPModel, got {network_class.__name__}.")
            sizes = {"action_mask": tasks.action_mask.cpu(), "task_dims": tasks.obs_dims}
            networks[name] = {**network_cfg, **sizes, "class_name": TaskMLPModel}
        return algorithms.PPO.construct_algorithm(obs, env, cfg | networks, device)


def check_ppo_cfg(cfg: Mapping[str, Any], num_envs: int, num_steps: int, max_nan: float) -> None:
    """Check PPO's fields against the rollout that it will run on, before any simulation starts.

    Args:
        cfg: Fields of rsl_rl's PPO.
        num_envs: Environments N.
        num_steps: Steps per rollout T.
        max_nan: The runner's ``max_nan_fraction``.

    Raises:
        UserError: Names the field, its value and what is allowed.
    """
    try:
        check_max_nan_fraction(max_nan)
    except ValueError as error:
        raise UserError(str(error)) from error
    bounds = {"num_steps_per_env": (1, inf), **BOUNDS, "num_mini_batches": (1, num_envs * num_steps)}
    for name, (low, high) in bounds.items():
        value = num_steps if name == "num_steps_per_env" else cfg[name]
        if value is None or not low <= value <= high:
            what = f"be at least {low:g}" if high == inf else f"lie between {low:g} and {high:g}"
            of = " samples of a rollout" if name == "num_mini_batches" else ""
            raise UserError(f"{name} must {what}{of}, got {value}.")
    if cfg["schedule"] not in ("adaptive", "fixed"):
        raise UserError(f"schedule must be one of adaptive, fixed, got '{cfg['schedule']}'.")
