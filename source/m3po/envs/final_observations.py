"""Final observations: those before a reset, which tell what follows a time-out.

Isaac Lab makes them by computing the observations a second time in a step. Where observations have a memory (histories,
delays, filters, frames that a task stacks itself) that is wrong twice: what it gives is not what the policy would have
seen, and it may enter the memory. There they are not asked for, and time-outs are bootstrapped without them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from rsl_rl.env import VecEnv

DEPTH = 3
"""Levels of lists and of a user's own objects that are looked into for what an environment remembers."""

_FRAMEWORKS = ("isaaclab", "isaacsim", "omni", "newton", "warp", "torch", "numpy", "pxr", "gymnasium", "builtins")
"""Packages whose objects are not looked into, but for Isaac Lab's buffers."""

_REPORTS = ("extras", "obs_buf")
"""Attributes of an environment that say what happened, and which no observation depends on."""


def ask_for_final_observations(env: VecEnv) -> None:
    """Have an environment deliver final observations, if it can and they are right; else it is said why not.

    Args:
        env: Environment that reads ``cfg.compute_final_obs`` at every step, as Isaac Lab's do; any other is left alone.
    """
    cfg: Any = env.cfg
    if not hasattr(cfg, "compute_final_obs"):
        return
    reason = memory_of(env)
    cfg.compute_final_obs = reason is None
    if reason is not None:
        print(f"[m3po] final observations are not used, because {reason}", flush=True)


def memory_of(env: Any) -> str | None:
    """What the observations of an Isaac Lab environment remember; ``None`` for nothing that can be told.

    An environment of the direct workflow is asked for its observations twice, before training begins, and is reset if
    that changed it. The answer is kept.
    """
    raw = getattr(env, "unwrapped", env)
    raw = getattr(raw, "env", raw)  # a multi-agent environment seen as one of a single agent
    if "_m3po_memory" not in vars(raw):
        manager = getattr(raw, "observation_manager", None)
        if manager is not None:
            raw._m3po_memory = _memory_of_terms(manager)
        elif hasattr(raw, "_get_observations"):
            raw._m3po_memory = _changed_by(raw, raw._get_observations)
            if raw._m3po_memory is not None:
                env.reset()
        else:
            raw._m3po_memory = None
    return raw._m3po_memory


def _memory_of_terms(manager: Any) -> str | None:
    """The first observation term with a history, a delay or a filter."""
    for group, names in manager._group_obs_term_names.items():
        for name, term in zip(names, manager._group_obs_term_cfgs[group], strict=True):
            if term.history_length > 0:
                return f"observation {group}/{name} has a history"
            if getattr(term, "delay_max_lag", 0) > 0:
                return f"observation {group}/{name} has a delay"
            if any(hasattr(modifier.func, "reset") for modifier in term.modifiers or ()):
                return f"observation {group}/{name} has a filter"
    return None


def _changed_by(raw: Any, ask: Callable[[], Any]) -> str | None:
    """An attribute of an environment that is another after a second call; ``None`` if asking twice changes nothing."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices), torch.inference_mode():
        ask()
        before = _memory(raw)
        ask()
        after = _memory(raw)
    changed = [name for name, value in before.items() if not _same(value, after.get(name))]
    return f"asking for observations changes '{changed[0]}' of {type(raw).__name__}" if changed else None


def _memory(raw: Any) -> dict[str, Any]:
    return {name: _remembered(value, DEPTH) for name, value in vars(raw).items() if name not in _REPORTS}


def _remembered(value: Any, depth: int) -> Any:
    """A copy of what a value holds that an observation may depend on; ``None`` where it holds nothing of the kind."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, (bool, int, float)):
        return value
    if depth == 0:
        return None
    if isinstance(value, Mapping):
        parts = {key: _remembered(item, depth - 1) for key, item in value.items()}
    elif isinstance(value, (list, tuple)) or type(value).__name__ == "deque":
        parts = dict(enumerate(_remembered(item, depth - 1) for item in value))
    elif hasattr(value, "__dict__") and not callable(value) and _is_looked_into(type(value)):
        parts = {key: _remembered(item, depth - 1) for key, item in vars(value).items()}
    else:
        return None
    return parts if any(part is not None for part in parts.values()) else None


def _is_looked_into(kind: type) -> bool:
    package = kind.__module__
    return package.startswith("isaaclab.utils.buffers") or package.split(".")[0].split("_")[0] not in _FRAMEWORKS


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.shape == other.shape and torch.equal(one.nan_to_num(), other.nan_to_num())
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())
    return type(one) is type(other) and one == other
