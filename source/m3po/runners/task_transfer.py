"""An agent of some tasks becomes an agent of others: what both know is kept, by name, and the rest starts afresh.

Everything that is kept per task (embedding, output layer, statistics, std of the actions, gates)
goes with its task. The networks are shared by all tasks and stay as they are; where the largest task has another size,
the layers at the observations and actions are cut, or extended by zeros: what nobody has seen yet has no influence yet.
Optimisers, counters and the model's memory start afresh. The networks of rsl_rl's PPO for several tasks are policy and
critic alone; what is said of the model and the planner is M3PO's.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rsl_rl.algorithms import PPO

from m3po.algorithms import M3PO
from m3po.envs.interface import M3POEnv
from m3po.errors import CheckpointError, UserError
from m3po.runners.checkpoint import check_compatible, network_states


@dataclass(frozen=True)
class TaskSizes:
    """A task as the networks see it."""

    name: str
    """Name of the task."""

    obs_dim: int | None
    """Observation dimensions; ``None`` where only the simulation knows."""

    action_dim: int | None
    """Action dimensions; ``None`` where only the simulation knows."""


# -- which task goes where --------------------------------------------------------------------------------------------


def describe_tasks(env: M3POEnv) -> dict[str, Any]:
    """What a checkpoint's description says of the tasks; nothing where policy and critic are not told the task."""
    if env.task_ids is None:
        return {}
    return {"tasks": env.task_names, "task_obs_dims": env.obs_dims, "task_action_dims": env.action_dims}


def checkpoint_tasks(path: str | Path, content: dict[str, Any]) -> list[TaskSizes]:
    """The tasks of a checkpoint, in order.

    Args:
        path: Its file, for messages.
        content: The checkpoint.

    Raises:
        CheckpointError: If its networks do not tell tasks apart, or it was not written by this project.
    """
    check_compatible(path, content)
    description = content["m3po"]
    if "tasks" not in description:
        raise CheckpointError(
            f"'{path}' has nothing to transfer: networks of a single task tell tasks apart only if they were trained "
            "with --multi_task."
        )
    return described_tasks(description)


def described_tasks(description: dict[str, list]) -> list[TaskSizes]:
    """The tasks that :func:`describe_tasks` described."""
    sizes = zip(*(description[name] for name in ("tasks", "task_obs_dims", "task_action_dims")), strict=True)
    return [TaskSizes(*task) for task in sizes]


def match_tasks(
    there: Sequence[TaskSizes], here: Sequence[TaskSizes], init_from: dict[str, str] | None = None
) -> dict[str, str]:
    """Where each task starts from. New tasks that start afresh are left out.

    Args:
        there: Tasks of the checkpoint.
        here: Tasks to be trained.
        init_from: New tasks that start as tasks of the checkpoint.

    Returns:
        Names of tasks here -> of tasks there.

    Raises:
        UserError: If a name is unknown, a task is not new, or the same task has other sizes.
    """
    theirs, ours = ({task.name: task for task in tasks} for tasks in (there, here))
    for name, task in ours.items():
        if name in theirs and not (_same_obs(theirs[name], task) and _same_actions(theirs[name], task)):
            old = theirs[name]
            raise UserError(
                f"task '{name}' has {old.obs_dim} observations and {old.action_dim} actions in the checkpoint, "
                f"{task.obs_dim} and {task.action_dim} here."
            )
    init_from = init_from or {}
    for new, old in init_from.items():
        if new not in ours:
            raise UserError(f"'{new}' is none of the tasks to be trained. {_closest(new, ours)}")
        if new in theirs:
            raise UserError(f"task '{new}' is in the checkpoint already; only a new one can start as another.")
        if old not in theirs:
            raise UserError(f"'{old}' is none of the checkpoint's tasks. {_closest(old, theirs)}")
    return {name: name for name in ours if name in theirs} | init_from


def _closest(name: str, known: Iterable[str]) -> str:
    """Known names like a mistyped one, or all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=5, cutoff=0.5)
    return f"Closest: {', '.join(close)}." if close else f"They are: {', '.join(known)}."


def _same_obs(old: TaskSizes, new: TaskSizes) -> bool:
    return None in (old.obs_dim, new.obs_dim) or old.obs_dim == new.obs_dim


def _same_actions(old: TaskSizes, new: TaskSizes) -> bool:
    return None in (old.action_dim, new.action_dim) or old.action_dim == new.action_dim


# -- which number goes where ------------------------------------------------------------------------------------------

_LAYOUTS = (
    (r"(actor|critic|world_model)\.task_embedding", ("task", "same")),
    (r"(actor|critic|world_model)\.obs_normalizer\.(mean|var)", ("task if same obs", "obs")),
    (r"world_model\.(changes\.(mean|var)|explained)", ("task if same obs", "obs")),
    (r"(actor|critic|world_model)\.obs_normalizer\.scale", ("task if same obs", "same")),
    (r"(actor|critic|world_model)\.(obs_normalizer|changes)\.count", ("task if same obs",)),
    (r"actor\.distribution\.(log_)?std_param", ("task if same actions", "actions")),
    (r"world_model\.(reward_normalizer|values)\.(mean|var)", ("same task", "same")),
    (r"world_model\.feature_change", ("task",)),
    (r"(gates|reward_units|world_model\.(terminations|reward_normalizer|values))\.\w+", ("same task",)),
    (r"(actor|critic)\.mlp\.first\.weight|world_model\.encoder\.0\.0\.weight", ("same", "obs, embedding")),
    (r"world_model\.transition\.0\.0\.weight", ("same", "latent, actions, embedding")),
    (r"world_model\.transition\.1\.weight", ("outputs", "same")),
    (r"world_model\.transition\.1\.bias", ("outputs",)),
    (r"actor\.task_head\.weight", ("task if same actions", "actions", "same")),
    (r"actor\.task_head\.bias", ("task if same actions", "actions")),
    (r"critic\.task_head\.weight", ("task", "same", "same")),
    (r"critic\.task_head\.bias", ("task", "same")),
    (r"(actor\.mlp\.last|world_model\.policy_head\.1)\.weight", ("actions", "same")),
    (r"(actor\.mlp\.last|world_model\.policy_head\.1)\.bias", ("actions",)),
)
"""Tensors that depend on the set of tasks -> what their axes stand for; see :func:`_axes`."""


@dataclass
class _Axis:
    """Where the entries along an axis of a tensor go."""

    source: list[int]
    """Positions in the checkpoint."""

    target: list[int]
    """Their positions here."""

    size: int
    """Entries here."""


def transferred(
    path: str | Path,
    content: dict[str, Any],
    fresh: dict[str, Any],
    here: Sequence[TaskSizes],
    init_from: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Fit a checkpoint to other tasks.

    A new task with an entry in ``init_from`` starts with the embedding of the other, and with its std of the
    actions and its statistics of the observations where these have the same dimensions. Its rewards are its own.

    Args:
        path: File of the checkpoint, for messages.
        content: The checkpoint, on the CPU.
        fresh: What the new algorithm saves.
        here: Its tasks.
        init_from: New tasks that start as tasks of the checkpoint.

    Returns:
        State dicts as in ``fresh``, on the CPU. Tensors that do not fit, because the networks themselves have other
        sizes, are the checkpoint's.

    Raises:
        UserError: If the tasks do not match, see :func:`match_tasks` and :func:`checkpoint_tasks`.
    """
    there = checkpoint_tasks(path, content)
    axes = _axes(there, here, match_tasks(there, here, init_from), fresh)
    result: dict[str, Any] = {}
    for network, state in network_states(fresh):
        old, layouts = content.get(network, {}), _layouts(network, state)
        result[network] = {
            name: _fit(old[name], state[name].cpu(), layouts[name], axes) for name in state if name in old
        }
    return result


def _layouts(network: str, state: Iterable[str]) -> dict[str, tuple[str, ...] | None]:
    """What the axes of a network's tensors stand for; ``None`` where they do not depend on the set of tasks."""
    layers = sorted({name.split(".")[1] for name in state if name.startswith("mlp.")}, key=int)
    ends = {f"mlp.{layers[0]}.": "mlp.first.", f"mlp.{layers[-1]}.": "mlp.last."} if layers else {}
    layouts = {}
    for name in state:
        label = name
        for end, word in ends.items():
            label = label.replace(end, word)
        layouts[name] = _layout(f"{network.removesuffix('_state_dict').removeprefix('average_')}.{label}")
    return layouts


def _layout(label: str) -> tuple[str, ...] | None:
    return next((layout for pattern, layout in _LAYOUTS if re.fullmatch(pattern, label)), None)


def _axes(
    there: Sequence[TaskSizes], here: Sequence[TaskSizes], source: dict[str, str], fresh: dict[str, Any]
) -> dict[str, Callable[[int], _Axis]]:
    """For each meaning of an axis, from its entries in the checkpoint to where they go.

    Args:
        there: Tasks of the checkpoint.
        here: Tasks to be trained.
        source: Names of tasks here -> of tasks there.
        fresh: What the new algorithm saves, for the sizes that do not depend on the tasks; PPO has no world model.
    """
    index = {task.name: k for k, task in enumerate(there)}

    def rows(copied: Callable[[TaskSizes, TaskSizes], bool]) -> Callable[[int], _Axis]:
        pairs = [
            (index[source[new.name]], k)
            for k, new in enumerate(here)
            if new.name in source and (new.name in index or copied(there[index[source[new.name]]], new))
        ]
        axis = _Axis([old for old, _ in pairs], [new for _, new in pairs], len(here))
        return lambda _: axis

    obs, actions = (
        (max(getattr(task, name) for task in there), max(getattr(task, name) for task in here))
        for name in ("obs_dim", "action_dim")
    )
    # What stays as it is has the same size on both sides; without the anchor there are no observations in a latent.
    model = fresh.get("world_model_state_dict", {})
    dims = fresh["actor_state_dict"]["task_embedding"].shape[1]
    embedding, features = ((size, size) for size in (dims, _features(model)))
    anchored = bool(model) and len(model["transition.1.bias"]) == obs[1] + features[1] + 2
    latent = (obs, features) if anchored else (features,)
    return {
        "task": rows(lambda old, new: True),
        "task if same obs": rows(_same_obs),
        "task if same actions": rows(_same_actions),
        "same task": rows(lambda old, new: False),
        "obs": partial(_columns, (obs,)),
        "obs, embedding": partial(_columns, (obs, embedding)),
        "actions": partial(_columns, (actions,)),
        "latent, actions, embedding": partial(_columns, (*latent, actions, embedding)),
        "outputs": partial(_columns, (*latent, (2, 2))),  # reward and termination follow the latent
        "same": lambda size: _columns(((size, size),), size),
    }


def _features(model: dict[str, torch.Tensor]) -> int:
    """Learnt dimensions of a world model's latent."""
    return len(model["encoder.1.bias"]) if "encoder.1.bias" in model else 0


def _columns(blocks: Sequence[tuple[int, int]], size: int) -> _Axis:
    """An axis of blocks one after another, each cut or extended at its end; one that fits nothing for another size.

    Args:
        blocks: Entries of each block in the checkpoint and here.
        size: Entries of the axis in the checkpoint.
    """
    if sum(there for there, _ in blocks) != size:
        return _Axis([], [], -1)
    source, target, first, end = [], [], 0, 0
    for there, here in blocks:
        shared = min(there, here)
        source += range(first, first + shared)
        target += range(end, end + shared)
        first, end = first + there, end + here
    return _Axis(source, target, end)


def _fit(
    old: torch.Tensor,
    new: torch.Tensor,
    layout: tuple[str, ...] | None,
    axes: dict[str, Callable[[int], _Axis]],
) -> torch.Tensor:
    """Entries of an old tensor where they belong in a new one; what is new there is fresh per task, and 0 elsewhere."""
    if layout is None or old.dim() != new.dim():
        return old
    along = [axes[meaning](size) for meaning, size in zip(layout, old.shape, strict=True)]
    if [axis.size for axis in along] != list(new.shape):
        return old
    result = new.clone() if "task" in layout[0] else torch.zeros_like(new)
    for dim, axis in enumerate(along):
        old = old.index_select(dim, torch.tensor(axis.source, dtype=torch.long))
    result[torch.meshgrid(*(torch.tensor(axis.target, dtype=torch.long) for axis in along), indexing="ij")] = old
    return result


# -- what is trained --------------------------------------------------------------------------------------------------


def train_embedding_only(algorithm: M3PO | PPO) -> None:
    """Freeze the networks: only the task embeddings and the stds of the actions are trained then.

    Statistics, which are not trained, go on.
    """
    model = [algorithm.model] if isinstance(algorithm, M3PO) else []
    for network in (algorithm.actor, algorithm.critic, *model):
        for name, parameter in network.named_parameters():
            if name not in ("task_embedding", "distribution.std_param", "distribution.log_std_param"):
                parameter.requires_grad_(False)
