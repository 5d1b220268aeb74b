"""Checks and assembly of an :class:`~m3po.algorithms.m3po.M3PO` from an environment and a runner's configuration."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from rsl_rl.env import VecEnv
from rsl_rl.models import MLPModel
from rsl_rl.modules.normalization import EmpiricalNormalization
from rsl_rl.utils import resolve_obs_groups
from tensordict import TensorDict
from torch import nn

from m3po.algorithms.tasks import Tasks
from m3po.class_names import resolve_class
from m3po.config import MAX_NAN_FRACTION, AlgorithmCfg, check_max_nan_fraction, from_dict
from m3po.envs.final_observations import ask_for_final_observations
from m3po.errors import UserError
from m3po.models import WorldModel
from m3po.models.normalizers import BoundedNormalization
from m3po.models.task_policy import TaskMLPModel
from m3po.storage import RolloutStorage
from m3po.validation import validate

LEAST_WIDTH = 64
"""Units of the world model's layers where the policy's are narrower."""


def parse_algorithm_cfg(values: dict[str, Any]) -> AlgorithmCfg:
    """The algorithm section of a runner configuration as a dataclass. Raises ``UserError`` on unknown fields."""
    try:
        own = {k: v for k, v in values.items() if k != "class_name" and (k, v) != ("rnd_cfg", None)}
        return from_dict(AlgorithmCfg, own)
    except (TypeError, ValueError) as error:
        raise UserError(str(error)) from error


def check_cfg(cfg: AlgorithmCfg, num_envs: int, num_steps: int, device: str, max_nan: float = MAX_NAN_FRACTION) -> None:
    """Check the configuration and the runner's ``max_nan_fraction``; what is wrong is a ``UserError``."""
    try:
        check_max_nan_fraction(max_nan)
        validate(cfg, num_envs, num_steps, device)
    except ValueError as error:
        raise UserError(str(error)) from error


def model_groups(
    obs: TensorDict, actor: MLPModel, critic: MLPModel, obs_groups: dict[str, list[str]]
) -> dict[str, int]:
    """Observation groups that the world model reads, with their dimensions.

    They are the set ``model``, by default the actor's, and all that policy and critic read: imagined states must be
    evaluated by both.

    Raises:
        UserError: If a group is not a vector.
    """
    groups = [*obs_groups.get("model", obs_groups["actor"]), *actor.obs_groups, *critic.obs_groups]
    for group in groups:
        shape = tuple(obs[group].shape[1:])
        if len(shape) != 1:
            raise UserError(
                f"M3PO's world model reads vector observations, but group '{group}' has shape {shape}. "
                "Choose vector groups with obs_groups, or train this task with --algo ppo."
            )
    return {group: obs[group].shape[1] for group in dict.fromkeys(groups)}


def build_networks(
    obs: TensorDict, env: VecEnv, train_cfg: dict[str, Any], cfg: AlgorithmCfg, tasks: Tasks, device: str
) -> tuple[MLPModel, MLPModel, WorldModel, dict[str, int]]:
    """Build policy, critic and world model, sized from the environment's spaces.

    For a single task, policy and critic are rsl_rl's own models, so that they match PPO's in every detail. Where they
    are conditioned on the task, they share one table of task embeddings with the world model.

    Returns:
        Actor, critic, world model, and the observation groups of the world model with their dimensions.
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
        network = network_class(obs, groups, name, outputs, **network_cfg)
        if type(getattr(network, "obs_normalizer", None)) is EmpiricalNormalization:
            network.obs_normalizer = BoundedNormalization(network.obs_dim)
        networks.append(network.to(device))
    actor, critic = networks
    if actor.is_recurrent or critic.is_recurrent:
        raise UserError("M3PO's policy and critic must not be recurrent; train this task with --algo ppo.")
    if actor.distribution is None or not hasattr(actor.distribution, "std_range"):
        raise UserError("M3PO's policy must have a Gaussian distribution (actor.distribution_cfg).")
    dims = model_groups(obs, actor, critic, groups)
    # The world model draws its initial weights from a stream of its own: adding it must not change the policy's.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(train_cfg.get("seed", 0) + 1)
        model_cfg = dataclasses.replace(cfg.world_model, width=_width(actor, cfg.world_model.width))
        model = WorldModel(sum(dims.values()), env.num_actions, tasks.count, model_cfg, tasks.obs_dims).to(device)
    if tasks.conditioned:
        actor.task_embedding = critic.task_embedding = model.task_embedding
    return actor, critic, model, dims


def _width(actor: MLPModel, most: int) -> int:
    """Units of the world model's layers: as many as the policy's widest hidden layer, in bounds."""
    widest = max([layer.out_features for layer in list(actor.mlp)[:-1] if isinstance(layer, nn.Linear)], default=most)
    return min(most, max(LEAST_WIDTH, widest))


def parts(obs: TensorDict, env: VecEnv, cfg: dict[str, Any], device: str) -> dict[str, Any]:
    """Arguments of :class:`~m3po.algorithms.m3po.M3PO` for an environment.

    Args:
        obs: Example observations, batch size (N,).
        env: Environment; sizes come from its spaces.
        cfg: Runner configuration as in rsl_rl.
        device: Torch device.

    Raises:
        UserError: If the configuration does not fit the environment.
    """
    algorithm, num_steps = parse_algorithm_cfg(cfg["algorithm"]), cfg["num_steps_per_env"]
    cfg["algorithm"].setdefault("rnd_cfg", None)  # rsl_rl's logger asks for it, before 5.5
    check_cfg(algorithm, env.num_envs, num_steps, device)
    tasks = Tasks.of(env, algorithm.gamma, device)
    actor, critic, model, dims = build_networks(obs, env, cfg, algorithm, tasks, device)
    ask_for_final_observations(env)
    groups = [*dims, "task"] if tasks.conditioned else list(dims)  # no network reads any others
    return {
        "actor": actor,
        "critic": critic,
        "model": model,
        "group_dims": dims,
        "storage": RolloutStorage(obs.select(*groups), groups, num_steps, env.num_actions, device),
        "tasks": tasks,
        "cfg": algorithm,
        "max_iterations": max(1, cfg.get("max_iterations", 1000)),
        "seed": cfg.get("seed", 0),
    }
