"""Checks and assembly of an :class:`~m3po.algorithms.m3po.M3PO` from an environment and a runner's configuration."""

from __future__ import annotations

from typing import Any

import torch
from rsl_rl.env import VecEnv
from rsl_rl.models import MLPModel
from rsl_rl.utils import resolve_class, resolve_obs_groups
from tensordict import TensorDict

from m3po.algorithms.tasks import Tasks
from m3po.config import QUARANTINE_SHARE, AlgorithmCfg, check_quarantine_share, from_dict
from m3po.errors import UserError
from m3po.models import WorldModel
from m3po.models.observation_model import ObservationModel
from m3po.models.task_policy import TaskMLPModel
from m3po.planning.memory import check_memory
from m3po.validation import validate


def parse_algorithm_cfg(values: dict[str, Any]) -> AlgorithmCfg:
    """The algorithm section of a runner configuration as a dataclass. Raises ``UserError`` on unknown fields."""
    try:
        return from_dict(AlgorithmCfg, {k: v for k, v in values.items() if k != "class_name"})
    except (TypeError, ValueError) as error:
        raise UserError(str(error)) from error


def check_cfg(
    cfg: AlgorithmCfg,
    num_envs: int,
    num_steps: int,
    device: str,
    action_dim: int = 1,
    share: float = QUARANTINE_SHARE,
) -> None:
    """Configuration, the runner's share, and that the planner's memory is there; what is wrong is a ``UserError``."""
    try:
        check_quarantine_share(share)
        validate(cfg, num_envs, num_steps, device)
        check_memory(num_envs, action_dim, cfg.planner, cfg.world_model, device)
    except ValueError as error:
        raise UserError(str(error)) from error


def model_obs_groups(obs: TensorDict, obs_groups: dict[str, list[str]]) -> list[str]:
    """Observation groups that the world model reads: the set ``model``, by default the actor's.

    Raises:
        UserError: If a group is not a vector.
    """
    groups = obs_groups.get("model", obs_groups["actor"])
    for group in groups:
        if obs[group].dim() != 2:
            shape = tuple(obs[group].shape[1:])
            raise UserError(
                f"M3PO's world model reads vector observations, but group '{group}' has shape {shape}. "
                "Choose vector groups with obs_groups['model'], or train this task with --algo ppo."
            )
    return groups


def build_networks(
    obs: TensorDict, env: VecEnv, train_cfg: dict[str, Any], cfg: AlgorithmCfg, tasks: Tasks, device: str
) -> tuple[MLPModel, MLPModel, WorldModel, list[str]]:
    """Build policy prior, critic and world model, sized from the environment's spaces.

    For a single task, policy and critic are rsl_rl's own models, so that they match PPO's in every detail. Where they
    are conditioned on the task, they share one table of task embeddings with the world model.

    Returns:
        Actor, critic, world model, and the observation groups of the world model.
    """
    train_cfg["obs_groups"] = resolve_obs_groups(obs, train_cfg["obs_groups"], ["actor", "critic"])
    groups = train_cfg["obs_groups"]
    networks = []
    for name, outputs in (("actor", env.num_actions), ("critic", 1)):
        network_class, network_cfg = resolve_class(train_cfg[name])
        if tasks.conditioned:
            if network_class is not MLPModel:
                raise UserError(f"the {name} of several tasks must be an MLPModel, got {network_class.__name__}.")
            network_class = TaskMLPModel
            network_cfg |= {
                "action_mask": tasks.action_mask.cpu(),
                "task_dims": tasks.obs_dims,
                "embedding_dim": cfg.world_model.task_embedding_dim,
            }
        networks.append(network_class(obs, groups, name, outputs, **network_cfg).to(device))
    actor, critic = networks
    if actor.is_recurrent or critic.is_recurrent:
        raise UserError("M3PO's policy and critic must not be recurrent; train this task with --algo ppo.")
    if actor.distribution is None or not hasattr(actor.distribution, "std_range"):
        raise UserError("M3PO's policy must have a Gaussian distribution (actor.distribution_cfg).")
    model_groups = model_obs_groups(obs, groups)
    obs_dim = sum(obs[group].shape[-1] for group in model_groups)
    # The world model draws its initial weights from a stream of its own: adding it must not change the policy's.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(train_cfg.get("seed", 0) + 1)
        model = WorldModel(obs_dim, env.num_actions, tasks.count, cfg.world_model, tasks.obs_dims).to(device)
    if tasks.conditioned:
        actor.task_embedding = critic.task_embedding = model.task_embedding
    return actor, critic, model, model_groups


def observation_model(
    obs: TensorDict, groups: list[str], action_dim: int, tasks: Tasks, cfg: AlgorithmCfg, seed: int, device: str
) -> tuple[ObservationModel, dict[str, int]]:
    """Build the value gradient's model; it changes no other network's draws.

    Args:
        obs: Example observations, any batch size.
        groups: Observation groups that policy, critic and latent model read.
        action_dim: Action dimensions A.
        tasks: Tasks of the environments.
        cfg: Configuration.
        seed: Seed of the initial weights.
        device: Torch device.

    Returns:
        The model, and the groups with their dimensions.

    Raises:
        UserError: If a group is not a vector.
    """
    dims = {}
    for group in dict.fromkeys(groups):
        shape = tuple(obs[group].shape[obs.batch_dims :])
        if len(shape) != 1:
            raise UserError(
                f"the value gradient's model predicts vectors, but policy or critic read group '{group}' of shape "
                f"{shape}: leave it out with agent.algorithm.value_gradient.steps_per_iteration=0."
            )
        dims[group] = shape[0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 2)
        width = cfg.value_gradient.width
        model = ObservationModel(sum(dims.values()), action_dim, tasks.count, width, tasks.obs_dims)
    return model.to(device), dims
