"""Command-line overrides ``env.a.b=1 agent.c=2 physics=NAME``, checked before anything is built.

Isaac Lab resolves the presets (``physics=``, ``renderer=``, ``presets=`` and paths that select a named alternative).
It sets every other path without asking whether the field exists, so a misspelt field would be ignored in silence;
here such a path is an error that lists what exists.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from m3po.cli.overrides import assign, parse_value
from m3po.errors import UserError

_SELECTOR = re.compile(r"^(physics|renderer|presets)=.+$")
_ASSIGNMENT = re.compile(r"^(env|agent)(\.[A-Za-z0-9_\-]+)+=", re.ASCII)


def resolve_configurations(
    task: str, agent_entry: str, overrides: Sequence[str], play: bool = False
) -> tuple[Any, Any]:
    """Load a task's environment and agent configuration and apply the overrides.

    Args:
        task: Registered task id.
        agent_entry: Key of the agent's entry point in the task's specification.
        overrides: Tokens left over from the command line.
        play: Whether to apply the environment's own play mode.

    Returns:
        Environment and agent configuration.

    Raises:
        UserError: If a token is not an override, or names a preset or field that does not exist, or its value has the
            wrong type.
    """
    from isaaclab_tasks.utils import resolve_task_config
    from isaaclab_tasks.utils.hydra import collect_presets
    from isaaclab_tasks.utils.parse_cfg import load_cfg_from_registry

    for token in overrides:
        if not _SELECTOR.match(token) and not _ASSIGNMENT.match(token):
            raise UserError(
                f"'{token}' is neither an option (see --help) nor an override of the form env.FIELD=VALUE, "
                "agent.FIELD=VALUE, physics=NAME, renderer=NAME or presets=NAME."
            )
    # A string at a path that holds a named choice selects an alternative; that is Isaac Lab's to resolve.
    choices: set[str] = set()
    if any(_ASSIGNMENT.match(token) for token in overrides):
        choices |= set(collect_presets(load_cfg_from_registry(task, "env_cfg_entry_point"), "env"))
        choices |= set(collect_presets(load_cfg_from_registry(task, agent_entry), "agent"))
    selectors, assignments = [], []
    for token in overrides:
        key, text = token.split("=", 1)
        selects = _SELECTOR.match(token) or (key in choices and isinstance(parse_value(text), str))
        (selectors if selects else assignments).append(token)
    try:
        env_cfg, agent_cfg = resolve_task_config(task, agent_entry, play_mode=play, overrides=selectors)
    except ValueError as error:
        raise UserError(str(error)) from error
    roots = {"env": env_cfg, "agent": agent_cfg}
    for token in assignments:
        key, text = token.split("=", 1)
        section, path = key.split(".", 1)
        assign(roots[section], path, parse_value(text), section)
    return env_cfg, agent_cfg
