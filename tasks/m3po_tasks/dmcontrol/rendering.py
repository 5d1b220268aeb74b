"""Pictures of a world, drawn by MuJoCo off-screen through EGL: without a display, and without a GPU where Mesa is."""

from __future__ import annotations

import copy
from typing import Self

import mujoco
import numpy as np

from m3po.errors import UserError
from m3po_tasks.dmcontrol.domains.finger import Spin, Turn
from m3po_tasks.dmcontrol.domains.fish import Fish
from m3po_tasks.dmcontrol.domains.reacher import Reacher
from m3po_tasks.dmcontrol.env import MjcfVecEnv
from m3po_tasks.dmcontrol.rollout_backend import RolloutBackend
from m3po_tasks.dmcontrol.sampling import split_states
from m3po_tasks.dmcontrol.suite import ACTION_REPEAT
from m3po_tasks.dmcontrol.task import Task

SIZE = (640, 480)
"""Width and height of a picture, pixels."""

VIEWS = ("side", "y", "fixed_top")
"""Cameras of dm_control's models that show a robot best; others are seen by the first of their cameras."""

MAX_GEOMS = 2000
"""Most shapes in a picture."""

PACKAGES = ("libegl1", "libegl-mesa0", "libgl1-mesa-dri")
"""Debian packages with EGL and its driver for CPUs."""


class Camera:
    """Films one world of a batch whose physics is on the CPU."""

    size = SIZE

    def __init__(self, env: MjcfVecEnv, row: int = 0) -> None:
        """Open a camera.

        Args:
            env: The worlds.
            row: The world to film.

        Raises:
            UserError: If the physics is not on the CPU, or this machine cannot draw.
        """
        if not isinstance(env.backend, RolloutBackend):
            raise UserError("DMControl's worlds can be filmed where their physics is on the CPU: --device cpu.")
        self.env, self.row, self._backend = env, row, env.backend
        self.frames_per_second = 1.0 / (env.task.model.opt.timestep * env.task.sub_steps * ACTION_REPEAT)
        self._model = _model(env.task)
        self._data = mujoco.MjData(self._model)
        self._scene = mujoco.MjvScene(self._model, MAX_GEOMS)
        self._options, self._view = mujoco.MjvOption(), _view(self._model)
        self._rectangle = mujoco.MjrRect(0, 0, *SIZE)
        self._picture = np.empty((SIZE[1], SIZE[0], 3), dtype=np.uint8)
        try:
            # Not mujoco.Renderer: what that draws with is fixed by the environment when mujoco is imported.
            from mujoco.egl import GLContext

            self._gl = GLContext(*SIZE)
            self._gl.make_current()
            self._context = mujoco.MjrContext(self._model, mujoco.mjtFontScale.mjFONTSCALE_100.value)
        except Exception as error:  # a missing library, driver or device: PyOpenGL and MuJoCo raise all kinds
            raise UserError(
                f"cannot draw off-screen through EGL ({error}). On Debian or Ubuntu: apt-get install "
                + " ".join(PACKAGES)
            ) from error
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN.value, self._context)

    def frame(self) -> np.ndarray:
        """The world as it is now, uint8 (height, width, 3)."""
        data = self._data
        _, qpos, _, _ = split_states(self._model, self._backend.state)
        data.qpos[:] = qpos[self.row]
        mujoco.mj_fwdPosition(self._model, data)
        _place_target(self.env.task, data, self.env.target[self.row].cpu().numpy())
        everything = mujoco.mjtCatBit.mjCAT_ALL.value
        mujoco.mjv_updateScene(self._model, data, self._options, None, self._view, everything, self._scene)
        self._gl.make_current()
        mujoco.mjr_render(self._rectangle, self._scene, self._context)
        mujoco.mjr_readPixels(self._picture, None, self._rectangle, self._context)
        return self._picture[::-1].copy()  # OpenGL's first row is at the bottom

    def close(self) -> None:
        """Free what belongs to the driver."""
        self._context.free()
        self._gl.free()

    def __enter__(self) -> Self:
        """Return self."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close."""
        self.close()


def _view(model: mujoco.MjModel) -> mujoco.MjvCamera:
    """The model's camera to look through."""
    names = [model.camera(index).name for index in range(model.ncam)]
    view = mujoco.MjvCamera()
    view.type = mujoco.mjtCamera.mjCAMERA_FIXED
    view.fixedcamid = next((names.index(name) for name in VIEWS if name in names), 0)
    return view


def _model(task: Task) -> mujoco.MjModel:
    """A task's model as it is to look: room for the picture, the target in its size, nothing that the task ignores."""
    model = copy.copy(task.model)
    model.vis.global_.offwidth, model.vis.global_.offheight = SIZE
    if isinstance(task, Turn):
        model.site("target").size[0] = task.target_radius
    elif isinstance(task, Reacher):
        model.geom("target").size[0] = task.reach - model.geom("finger").size[0]
    elif isinstance(task, Spin):
        for site in ("target", "tip"):
            model.site(site).rgba[3] = 0.0
    return model


def _place_target(task: Task, data: mujoco.MjData, target: np.ndarray) -> None:
    """Move the target, which the tasks keep apart from the physics, in the picture; ``target`` has shape (K,)."""
    if isinstance(task, Turn):
        data.site("target").xpos[[0, 2]] = data.body("spinner").xpos[[0, 2]] + target
    elif isinstance(task, Reacher):
        data.geom("target").xpos[:2] = target
    elif isinstance(task, Fish):
        data.geom("target").xpos[:] = target
