"""Attaches M3PO to every Isaac Lab task and to Isaac Lab's command line.

Isaac Lab imports this module before each of its commands (entry-point group ``isaaclab.tasks``); our own scripts import
it themselves. After it, with any registered task that has an rsl_rl configuration,

* ``isaaclab train --rl_library rsl_rl --task TASK --agent m3po_cfg_entry_point`` runs under the stock runner, and
* ``isaaclab train --rl_library m3po --task TASK`` runs under :class:`m3po.runners.M3PORunner`, and so does
  ``isaaclab train_multigpu``.

A task that is registered later, by code of your own, is attached with ``isaaclab_m3po.registration.attach()``.
"""

from __future__ import annotations

import warnings

from . import assets

ENTRY_POINTS = {"m3po_cfg_entry_point": "default", "m3po_paper_cfg_entry_point": "paper"}
"""Key in a task's specification -> mode."""

BACKENDS = {
    "train": "m3po.cli.train",
    "play": "m3po.cli.play",
}
"""Command of Isaac Lab -> module with ``run(argv)``."""


def attach() -> int:
    """Add M3PO's agents to every registered task that has an rsl_rl configuration.

    Returns:
        The number of tasks that carry them now.
    """
    import gymnasium as gym

    count = 0
    for task, spec in gym.registry.items():
        if spec.kwargs and spec.kwargs.get("rsl_rl_cfg_entry_point") is not None:
            for key, mode in ENTRY_POINTS.items():
                # resolved by the module's __getattr__ on first use, so that nothing is imported here
                spec.kwargs.setdefault(key, f"isaaclab_m3po.agents:{mode}[{task}]")
            count += 1
    return count


def add_backends() -> bool:
    """Make ``--rl_library m3po`` known to Isaac Lab's command line.

    Returns:
        Whether this Isaac Lab has the table of backends; the table is private, so another version may not.
    """
    from isaaclab_rl.entrypoints import api, dispatch

    table = getattr(dispatch, "_BACKEND_MODULES", None)
    if not isinstance(table, dict) or not all(isinstance(table.get(action), dict) for action in BACKENDS):
        warnings.warn(
            "this version of Isaac Lab keeps its reinforcement-learning backends elsewhere: `--rl_library m3po` is not "
            "available. scripts/train.py and `--rl_library rsl_rl --agent m3po_cfg_entry_point` work without it.",
            stacklevel=2,
        )
        return False
    for action, module in BACKENDS.items():
        table[action]["m3po"] = module
    # Read when train_multigpu starts, which is after the task packages have been imported.
    api.MULTI_GPU_BACKENDS = (*dict.fromkeys((*getattr(api, "MULTI_GPU_BACKENDS", ()), "m3po")),)
    return True


def _register() -> None:
    """Run once, on import: prepare the assets, load all task packages, attach."""
    assets.prepare_for_stock_command()  # first: Isaac Lab reads the asset root when it is imported

    import isaaclab_tasks  # noqa: F401
    from isaaclab.cli import load_external_tasks

    load_external_tasks()  # other packages' tasks must be registered before we attach to them
    attach()
    add_backends()


_register()
