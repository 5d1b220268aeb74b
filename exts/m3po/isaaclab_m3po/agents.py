"""M3PO's agent configurations, one per task, made from the task's own rsl_rl configuration.

The configclasses are derived from the dataclasses of :mod:`m3po.config`, so that Isaac Lab's overrides
(``agent.algorithm.planner.horizon=5``) reach every field and no field is written down twice.

The registry refers to a task's configuration as ``isaaclab_m3po.agents:default[Isaac-Ant]`` (or ``paper[...]``), which
this module resolves on first use: attaching agents to all tasks imports none of their modules.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import re
from typing import Any

import torch
from isaaclab.utils import configclass
from isaaclab_rl.rsl_rl import RslRlOnPolicyRunnerCfg

from m3po.config import COMPONENTS, MAX_NAN_FRACTION, AlgorithmCfg, from_dict
from m3po.errors import UserError
from m3po.presets import FIRST_STD, MODES, describe, sized

CPU_NUM_ENVS = 512
"""Environments of a run on the CPU, unless the command line says otherwise."""

CPU_NUM_STEPS = 8
"""Steps per rollout of the default mode on the CPU."""

CPU_MAX_ITERATIONS = 256
"""Training iterations of the default mode on the CPU: 1M environment steps with the two numbers above."""

ALGORITHM = "m3po.algorithms:M3PO"
"""Class that rsl_rl's runner constructs."""

_FROM_TASK = (
    "gamma",
    "entropy_coef",
    "max_grad_norm",
    "num_learning_epochs",
    "num_mini_batches",
    "clip_param",
)
"""PPO fields that a task has tuned for itself. The others come from the preset."""

_RUNNER_FIELDS = (
    "seed",
    "num_steps_per_env",
    "init_at_random_ep_len",
    "max_iterations",
    "empirical_normalization",
    "obs_groups",
    "clip_actions",
    "check_for_nan",
    "save_interval",
    "experiment_name",
    "actor",
    "critic",
    "policy",
)
"""Fields of the task's runner configuration that do not depend on the algorithm."""

_device: str | None = None


def _mirror(source: Any, **head: Any) -> type:
    """Make the Isaac Lab configclass of a dataclass: same fields, defaults and documentation.

    Args:
        source: Dataclass whose fields all have defaults.
        **head: Fields that exist only in the configclass.
    """
    defaults = head | {
        field.name: _as_configclass(getattr(source(), field.name)) for field in dataclasses.fields(source)
    }
    annotations = {name: type(value).__name__ for name, value in head.items()}
    annotations |= {field.name: field.type for field in dataclasses.fields(source)}
    body = {"__doc__": source.__doc__, "__module__": __name__, "__annotations__": annotations}
    return configclass(type(f"M3PO{source.__name__}", (), body | defaults))


def _as_configclass(value: Any) -> Any:
    """Convert an instance of a mirrored dataclass to its configclass; leave any other value alone."""
    mirror = _MIRRORS.get(type(value))
    if mirror is None:
        return value
    return mirror(**{field.name: _as_configclass(getattr(value, field.name)) for field in dataclasses.fields(value)})


_MIRRORS: dict[type, Any] = {}
for _source in COMPONENTS.values():
    _MIRRORS[_source] = _mirror(_source)
_MIRRORS[AlgorithmCfg] = _mirror(AlgorithmCfg, class_name=ALGORITHM)

M3POAlgorithmCfg = _MIRRORS[AlgorithmCfg]


@configclass
class M3PORunnerCfg(RslRlOnPolicyRunnerCfg):
    """Runner configuration of M3PO, understood by Isaac Lab's stock rsl_rl commands as well."""

    algorithm: M3POAlgorithmCfg = M3POAlgorithmCfg()  # ty: ignore[invalid-type-form]  # a class made at run time
    """The algorithm's configuration."""

    max_nan_fraction: float = MAX_NAN_FRACTION
    """Fraction of the environments that may give values that are not finite within one rollout before the run stops."""


def set_device(device: str) -> None:
    """Choose the device that the presets are made for, instead of CUDA where available.

    Args:
        device: Torch device name, for example ``cpu`` or ``cuda:0``.
    """
    global _device
    _device = device


def algorithm_cfg(agent_cfg: M3PORunnerCfg) -> AlgorithmCfg:
    """The library's configuration dataclass of an agent."""
    values = agent_cfg.algorithm.to_dict()
    values.pop("class_name")
    return from_dict(AlgorithmCfg, values)


def runner_cfg(task_cfg: Any, mode: str, device: str) -> Any:
    """Make M3PO's runner configuration from a task's rsl_rl configuration.

    Args:
        task_cfg: The task's runner configuration, or its named alternatives (a ``PresetCfg``), which stay alternatives.
        mode: Key of :data:`m3po.presets.MODES`.
        device: Torch device name.

    Raises:
        UserError: If the task's agent belongs to another runner (distillation).
    """
    from isaaclab_tasks.utils.hydra import PresetCfg, collect_presets, preset

    if isinstance(task_cfg, PresetCfg):
        alternatives = collect_presets(task_cfg)[""]
        return preset(**{name: runner_cfg(choice, mode, device) for name, choice in alternatives.items()})

    if not isinstance(task_cfg, RslRlOnPolicyRunnerCfg):
        kind = type(task_cfg).__name__
        raise UserError(f"M3PO needs a task whose rsl_rl agent is one of the on-policy runner, not a {kind}.")
    algorithm = MODES[mode]()
    for name in _FROM_TASK:
        value = getattr(task_cfg.algorithm, name, dataclasses.MISSING)
        if value is not dataclasses.MISSING:
            setattr(algorithm, name, value)
    shared = {name: copy.deepcopy(getattr(task_cfg, name)) for name in _RUNNER_FIELDS}
    cfg = M3PORunnerCfg(device=device, algorithm=_as_configclass(sized(algorithm, device)), **shared)
    if mode == "default":
        if device.startswith("cpu"):
            cfg.num_steps_per_env = CPU_NUM_STEPS
            cfg.max_iterations = CPU_MAX_ITERATIONS
        place = _noise(cfg)
        if place is not None:
            setattr(*place, first_noise(cfg))
    return cfg


def first_noise(task_cfg: Any) -> float:
    """First std of the actions in the default mode, for a task whose own runner configuration this is."""
    return FIRST_STD * ppo_noise(task_cfg)


def ppo_noise(task_cfg: Any) -> float:
    """First std of the actions of a task's own agent, whose runner configuration this is."""
    place = _noise(task_cfg)
    return 1.0 if place is None else getattr(*place)


def _noise(cfg: Any) -> tuple[Any, str] | None:
    """Where a runner configuration holds the first std of the actions: object and field; ``None``: nowhere."""
    actor = getattr(cfg.actor, "distribution_cfg", None)
    places = ((actor, "init_std"), (cfg.policy, "init_noise_std"))  # the second one as in older versions of rsl_rl
    return next((place for place in places if isinstance(getattr(*place, None), (int, float))), None)


def _load(task: str, mode: str) -> Any:
    """Configuration of a task's M3PO agent, as the registry asks for it."""
    from isaaclab_tasks.utils.parse_cfg import load_cfg_from_registry

    device = _device or ("cuda:0" if torch.cuda.is_available() else "cpu")
    cfg = runner_cfg(load_cfg_from_registry(task, "rsl_rl_cfg_entry_point"), mode, device)
    if _device is None and isinstance(cfg, M3PORunnerCfg):  # a stock command; our own launcher prints after overrides
        print(describe(cfg.algorithm, mode, device))
    return cfg


def __getattr__(name: str) -> Any:
    """Resolve the names that :func:`isaaclab_m3po.registration.attach` puts into the registry."""
    match = re.fullmatch(r"(\w+)\[(.+)\]", name)
    if match is None or match[1] not in MODES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return functools.partial(_load, match[2], match[1])
