"""An mp4 of a running environment, without Omniverse Kit, a GPU or a display.

Newton's OpenGL viewer renders off-screen through EGL; Mesa does it on the CPU (about 0.2 s for a frame of 1280 x 720).
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from typing import TYPE_CHECKING, Any

from m3po.errors import M3POError, UserError

if TYPE_CHECKING:
    import numpy as np
    from isaaclab_rl.rsl_rl import RslRlVecEnvWrapper

SIZE = (1280, 720)
"""Width and height of a frame [pixels]."""

CAMERA_OFFSET = (2.6, -2.6, 1.5)
"""Camera position relative to the robot that it follows [m]."""

LIBRARIES = {"libEGL.so.1": "libegl1", "libGL.so.1": "libgl1"}
"""Shared libraries that rendering loads, and the Debian packages that hold them."""

DRIVERS = ("libegl-mesa0", "libgl1-mesa-dri")
"""Debian packages with the driver behind these libraries, for rendering on the CPU."""

_PROBE = """
import pyglet
pyglet.options["headless"] = True
import pyglet.window
pyglet.window.Window(width=16, height=16, visible=False)
"""
"""What the viewer does first; in a process of its own, because a broken driver may take its process down."""


def require_rendering() -> None:
    """Check that off-screen rendering works on this machine.

    Raises:
        UserError: If it does not; the message names the missing library and the Debian packages to install.
    """
    packages = " ".join([*LIBRARIES.values(), *DRIVERS])
    remedy = f"On Debian or Ubuntu: apt-get install {packages}"
    for library, package in LIBRARIES.items():
        try:
            ctypes.CDLL(library)
        except OSError:
            raise UserError(
                f"--video cannot render: the system library {library} (package {package}) is missing. {remedy}"
            ) from None
    probe = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True, check=False)
    if probe.returncode != 0:
        reason = (probe.stderr.strip().splitlines() or [f"exit code {probe.returncode}"])[-1]
        raise UserError(
            f"--video cannot render: no OpenGL context through EGL ({reason}). Most likely the driver is missing; "
            f"that of the CPU is in the packages {' and '.join(DRIVERS)}. {remedy}"
        )


def add_camera(env_cfg: Any) -> None:
    """Add the off-screen viewer to an environment's configuration, before the simulation starts."""
    import pyglet
    from isaaclab_visualizers.newton import NewtonGLVisualizerCfg

    # A display that happens to be there is not used: the same picture everywhere, and no window pops up.
    pyglet.options["headless"] = True
    viewer = NewtonGLVisualizerCfg(headless=True, window_width=SIZE[0], window_height=SIZE[1], streaming_view=False)
    env_cfg.sim.visualizer_cfgs = [*_as_list(env_cfg.sim.visualizer_cfgs), viewer]
    if hasattr(env_cfg.sim.physics, "load_visual_shapes"):
        # Newton leaves the visual shapes out when nothing renders continuously; the frames would be empty.
        env_cfg.sim.physics.load_visual_shapes = True


class RobotCamera:
    """Films the robot of environment 0; a :class:`m3po.cli.film.Camera`."""

    size = SIZE

    def __init__(self, env: RslRlVecEnvWrapper) -> None:
        """Find the viewer.

        Args:
            env: An environment made from a configuration that :func:`add_camera` has seen.

        Raises:
            M3POError: If the simulation has no such viewer.
        """
        env = env.unwrapped
        self.frames_per_second = 1.0 / env.step_dt
        self._sim = env.sim
        self._viewer: Any = next((v for v in env.sim.visualizers if hasattr(v, "render_rgb_array")), None)
        if self._viewer is None:
            raise M3POError("The simulation started without the off-screen viewer; nothing can be recorded.")
        self._robot = next(iter(env.scene.articulations.values()), None)

    def frame(self) -> np.ndarray:
        """The present state."""
        if self._robot is not None:
            target = self._robot.data.root_pos_w.torch[0].tolist()
            self._viewer.set_camera_view([t + o for t, o in zip(target, CAMERA_OFFSET, strict=True)], target)
        if not self._sim.is_rendering:
            self._sim.forward()  # brings the poses of the links up to date
        return self._viewer.render_rgb_array()

    def __enter__(self) -> RobotCamera:
        """Return self."""
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing is open."""


def _as_list(value: Any) -> list:
    """Normalise Isaac Lab's "one, several or none" fields."""
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]
