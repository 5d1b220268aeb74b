"""Names, task sets and sizes of Meta-World: all that is known of it without the package."""

VERSION = "3.1.1"
"""Version of ``metaworld`` in the project's lock."""

OBS_DIM = 39
"""Hand, gripper and objects (18) now and one simulator step ago, and the goal (3)."""

ACTION_DIM = 4
"""Displacement of the hand in x, y and z, and the effort of the gripper, each in [-1, 1]."""

ACTION_REPEAT = 2
"""Simulator steps per decision; their rewards are summed. As in TD-MPC2 (arXiv 2310.16828)."""

EPISODE_LENGTH = 100
"""Decision steps per episode, as in TD-MPC2. Episodes never terminate earlier."""

NAMES = (
    "assembly",
    "basketball",
    "bin-picking",
    "box-close",
    "button-press-topdown",
    "button-press-topdown-wall",
    "button-press",
    "button-press-wall",
    "coffee-button",
    "coffee-pull",
    "coffee-push",
    "dial-turn",
    "disassemble",
    "door-close",
    "door-lock",
    "door-open",
    "door-unlock",
    "hand-insert",
    "drawer-close",
    "drawer-open",
    "faucet-open",
    "faucet-close",
    "hammer",
    "handle-press-side",
    "handle-press",
    "handle-pull-side",
    "handle-pull",
    "lever-pull",
    "pick-place-wall",
    "pick-out-of-hole",
    "pick-place",
    "plate-slide",
    "plate-slide-side",
    "plate-slide-back",
    "plate-slide-back-side",
    "peg-insert-side",
    "peg-unplug-side",
    "soccer",
    "stick-push",
    "stick-pull",
    "push",
    "push-wall",
    "push-back",
    "reach",
    "reach-wall",
    "shelf-place",
    "sweep-into",
    "sweep",
    "window-open",
    "window-close",
)
"""Meta-World's names without their version, in the order of its MT50."""

MT10_NAMES = (
    "reach",
    "push",
    "pick-place",
    "door-open",
    "drawer-open",
    "drawer-close",
    "button-press-topdown",
    "peg-insert-side",
    "window-open",
    "window-close",
)
"""Meta-World's MT10, in its order."""


def task_name(name: str) -> str:
    """Name on the command line of a task in :data:`NAMES`."""
    return f"mw-{name}"


def metaworld_name(task: str) -> str:
    """Meta-World's own name of a task on the command line."""
    return f"{task.removeprefix('mw-')}-v3"
