"""Films of a training: when they begin and end, and that pictures are in them."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import imageio.v3 as iio
import pytest
from conftest import REPOSITORY, run_process

from m3po.cli.film import TrainingFilms


class Recorder:
    """Stands in for the films of two tasks; a file's text is the number of its frames."""

    def __init__(self) -> None:
        self.steps, self.finished = 0, []

    @contextlib.contextmanager
    def film(self, path):
        frames = []
        yield lambda: frames.append(self.steps)
        path.write_text(str(frames))

    def films(self, path):
        return [self.film(path.with_stem(f"{path.stem}_{task}")) for task in ("a", "b")]


def run(folder: Path, steps: int, interval: int, length: int) -> Recorder:
    recorder = Recorder()
    films = TrainingFilms(recorder.films, folder / "videos", interval, length, recorder.finished.append)
    for recorder.steps in range(steps):
        films()
    films.close()
    films.close()  # harmless
    return recorder


def test_a_film_begins_every_so_many_steps_and_is_finished_at_the_end(tmp_path):
    recorder = run(tmp_path, steps=8, interval=5, length=2)
    videos = tmp_path / "videos"
    assert sorted(path.name for path in videos.iterdir()) == [
        "step_0_a.mp4",
        "step_0_b.mp4",
        "step_5_a.mp4",
        "step_5_b.mp4",
    ]
    assert (videos / "step_0_a.mp4").read_text() == "[0, 1]"
    assert (videos / "step_5_b.mp4").read_text() == "[5, 6]"
    assert sorted(recorder.finished) == sorted(videos.iterdir())


def test_a_film_that_the_end_cuts_short_is_kept(tmp_path):
    run(tmp_path, steps=6, interval=5, length=4)
    assert (tmp_path / "videos" / "step_5_a.mp4").read_text() == "[5]"


def test_a_resumed_run_leaves_the_films_before_it_alone(tmp_path):
    run(tmp_path, steps=2, interval=5, length=2)
    run(tmp_path, steps=1, interval=5, length=2)
    assert (tmp_path / "videos" / "step_0_a.mp4").read_text() == "[0, 1]"
    assert len(list((tmp_path / "videos").iterdir())) == 4


@pytest.mark.parametrize("task", ["walker-walk", pytest.param("Isaac-Cartpole-v0", marks=pytest.mark.sim)])
def test_training_is_filmed(task, tmp_path):
    command = [sys.executable, REPOSITORY / "scripts/train.py", "--task", task, "--num_envs", 4, "--device", "cpu"]
    command += ["--max_iterations", 2, "--eval_interval", 0, "--log_root", tmp_path]
    command += ["--video", "--video_length", 5, "--video_interval", 10]
    command += ["agent.num_steps_per_env=8", "agent.algorithm.num_mini_batches=1"]
    result = run_process(command, timeout=300)
    assert result.rc == 0, result.stdout[-2000:] + result.stderr[-3000:]
    films = sorted(tmp_path.glob("m3po/*/*/videos/*.mp4"))
    assert [path.name for path in films] == ["step_0.mp4", "step_10.mp4"]
    for path in films:
        frames = iio.imread(path).astype(float)
        assert len(frames) == 5
        assert frames.std() > 5.0
