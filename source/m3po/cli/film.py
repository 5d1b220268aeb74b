"""An mp4 file of a simulation, from whatever takes its pictures."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import Protocol

import numpy as np

from m3po.errors import UserError


class Camera(contextlib.AbstractContextManager, Protocol):
    """Films an environment, while it is entered as a context manager. A suite's ``camera(env)`` returns one."""

    size: tuple[int, int]
    """Width and height, pixels."""

    frames_per_second: float
    """Pictures per second that show the simulation in real time, one per step."""

    def frame(self) -> np.ndarray:
        """The environment as it is now, uint8 (height, width, 3)."""


def require_packages(option: str, extra: str, *modules: str) -> None:
    """Check that the packages of an optional dependency are installed, before anything is simulated."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise UserError(f"{option} needs {' and '.join(missing)}, which the extra m3po[{extra}] installs.")


@contextlib.contextmanager
def recorded(camera: Camera, path: Path, num_frames: int) -> Generator[Callable[[], None]]:
    """Write an mp4 file; yields what appends the present picture, and does nothing after ``num_frames``."""
    import imageio_ffmpeg

    count = 0

    def capture() -> None:
        nonlocal count
        if count < num_frames:
            file.send(camera.frame().tobytes())
            count += 1

    with camera:
        file = imageio_ffmpeg.write_frames(str(path), camera.size, fps=camera.frames_per_second, quality=7)
        file.send(None)
        try:
            yield capture
        finally:
            file.close()
    print(f"[m3po] video: {path} ({count} frames)")


class TrainingFilms:
    """Films of a training: one begins every so many steps. To be called after each step."""

    def __init__(
        self,
        films: Callable[[Path], Iterable[contextlib.AbstractContextManager[Callable[[], None]]]],
        folder: Path,
        interval: int,
        length: int,
        done: Callable[[Path], None],
    ) -> None:
        """Begin with the next step.

        Args:
            films: Films of a file's name, as :meth:`m3po.cli.job.Job.films`.
            folder: Receives ``step_<number>.mp4``; created if need be.
            interval: Steps from the beginning of one to that of the next.
            length: Steps of each.
            done: Told of each finished file.
        """
        self._films, self._folder, self._interval, self._length, self._done = films, folder, interval, length, done
        self._step, self._hooks, self._open = 0, [], contextlib.ExitStack()

    def __call__(self) -> None:
        """Film the state after a step, if it is time to."""
        if self._step % self._interval == 0:
            self.close()
            self._folder.mkdir(exist_ok=True)
            taken = len(list(self._folder.glob(f"step_{self._step}[_.]*")))  # by the run before it was resumed
            self._path = self._folder / f"step_{self._step}{f'_{taken + 1}' if taken else ''}.mp4"
            self._hooks = [self._open.enter_context(film) for film in self._films(self._path)]
        for hook in self._hooks:
            hook()
        self._step += 1
        if self._hooks and self._step % self._interval >= self._length:
            self.close()

    def close(self) -> None:
        """Finish the film that is being made."""
        self._open.close()
        if self._hooks:
            self._hooks = []
            for path in self._folder.glob(f"{self._path.stem}*.mp4"):
                self._done(path)
