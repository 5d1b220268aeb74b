"""An mp4 file of a simulation, from whatever takes its pictures."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np


class Camera(Protocol):
    """Films an environment, while it is entered as a context manager. A suite's ``camera(env)`` returns one."""

    size: tuple[int, int]
    """Width and height, pixels."""

    frames_per_second: float
    """Pictures per second that show the simulation in real time, one per step."""

    def frame(self) -> np.ndarray:
        """The environment as it is now, uint8 (height, width, 3)."""


@contextlib.contextmanager
def recorded(camera: Camera, path: Path, num_frames: int) -> Iterator[Callable[[], None]]:
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
