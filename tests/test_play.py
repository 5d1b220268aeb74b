"""``scripts/play.py`` from trained checkpoints to numbers, files and pictures, and its answers to a user's mistakes."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from conftest import REPOSITORY, Result, run_process

from isaaclab_m3po import video
from m3po.cli.play import check_policy
from m3po.errors import UserError
from m3po.evaluation_process import policies_of
from m3po.runners.checkpoint import FORMAT

CPU = ["--device", "cpu"]
NO_EVALUATION = ["--eval_interval", 0]
EVALUATION = {"return_mean", "return_std", "length_mean", "length_std", "termination_rate"}


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of all runs of this module."""
    return tmp_path_factory.mktemp("logs")


def script(name: str, task: str, logs: Path, *options: object) -> Result:
    command = [sys.executable, REPOSITORY / "scripts" / name, "--task", task, "--log_root", logs, *CPU, *options]
    result = run_process(command, timeout=600)
    assert result.rc == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result


@pytest.fixture(scope="module")
def cartpole_run(logs: Path) -> Path:
    """A run with a planner that was evaluated beside its training."""
    options = ["--num_envs", 16, "--max_iterations", 3, "--eval_interval", 3, "--eval_envs", 8]
    options += ["agent.algorithm.world_model.steps_per_iteration=4", "agent.algorithm.world_model.extra_steps=0"]
    script("train.py", "Isaac-Cartpole-v0", logs, *options)
    return read_run(logs, "cartpole")


def read_run(logs: Path, experiment: str) -> Path:
    (run,) = (logs / "m3po" / experiment).iterdir()
    return run


def check_evaluation(path: Path, expected: dict[str, Any]) -> dict[str, Any]:
    content = json.loads(path.read_text())
    assert expected.items() <= content.items()
    assert content["steps_per_second"] > 0.0
    (result,) = content["tasks"].values()
    assert all(np.isfinite(result[name]) for name in EVALUATION)
    assert len(result["returns"]) == expected["num_episodes"]
    assert np.mean(result["returns"]) == pytest.approx(result["return_mean"])
    return result


# -- from training to playing, in the real simulation -----------------------------------------------------------------


@pytest.mark.sim
def test_cartpole_trains_evaluates_and_plays(logs: Path, cartpole_run: Path) -> None:
    """All parts at once: both policies evaluated beside the training, best checkpoint, numbers, exported files."""
    run = cartpole_run
    assert {"model_2.pt", "model_last.pt", "model_best.pt", "run.json", "progress.csv"} <= {
        p.name for p in run.iterdir()
    }
    with open(run / "evaluations.csv", newline="") as file:
        evaluations = list(csv.DictReader(file))
    assert [(row["policy"], row["num_episodes"]) for row in evaluations] == [("prior", "4"), ("planner", "4")]
    for row in evaluations:  # success means survival here
        assert float(row["success_rate"]) == pytest.approx(1.0 - float(row["termination_rate"]))

    played = script("play.py", "Isaac-Cartpole-v0", logs, "--num_envs", 4, "--num_episodes", 6, "--export")
    for line in ("prior, 6 episodes", "return ", "length ", "terminated", "success", "environment steps/s"):
        assert line in played.stdout
    expected = {
        "algorithm": "m3po",
        "policy": "prior",
        "checkpoint": str(run / "model_best.pt"),
        "num_envs": [4],
        "num_episodes": 6,
        "seed": 42,
    }
    result = check_evaluation(run / "play_model_best_prior.json", expected)
    assert result["success_rate"] == pytest.approx(1.0 - result["termination_rate"])
    assert played.stdout.count("largest difference from torch") == 2
    assert sorted(path.name for path in (run / "exported").iterdir()) == ["policy.onnx", "policy.pt"]


@pytest.mark.sim
def test_ant_trains_and_the_planner_plays_on_video(logs: Path) -> None:
    """Pictures without Kit, a GPU or a display: they show something, and it moves."""
    script("train.py", "Isaac-Ant-v0", logs, "--num_envs", 16, "--max_iterations", 2, *NO_EVALUATION)
    run = read_run(logs, "ant")
    options = ["--num_envs", 4, "--num_episodes", 1, "--policy", "planner", "--video", "--video_length", 12]
    played = script("play.py", "Isaac-Ant-v0", logs, *options, "--checkpoint", "latest", "--headless")
    path = run / "play_model_last_planner.mp4"
    assert f"{path} (12 frames)" in played.stdout
    check_evaluation(path.with_suffix(".json"), {"policy": "planner", "num_episodes": 1})

    frames = iio.imread(path).astype(float)
    assert frames.shape == (12, 720, 1280, 3)
    assert all(frame.std() > 10.0 for frame in frames), "a frame is (nearly) constant"
    # The camera follows the first ant: in the middle there are its shaded side and its shadow, elsewhere bright ground.
    last = frames[-1].mean(axis=-1)
    assert (last[260:460, 540:740] < 130.0).mean() > 0.02, "there is no robot in the middle of the picture"
    assert (last[520:700, 40:400] < 130.0).mean() == 0.0
    assert np.abs(frames[-1] - frames[0]).mean() > 0.5, "nothing moves"


@pytest.mark.sim
def test_humanoid_trains_and_plays(logs: Path) -> None:
    """The third of the embedded robots; a checkpoint by its path, a result where the user wants it."""
    script("train.py", "Isaac-Humanoid-v0", logs, "--num_envs", 16, "--max_iterations", 2, *NO_EVALUATION)
    checkpoint = read_run(logs, "humanoid") / "model_1.pt"
    output = logs / "elsewhere" / "result.json"
    options = ["--num_envs", 4, "--checkpoint", checkpoint, "--output", output]
    script("play.py", "Isaac-Humanoid-v0", logs, *options)
    check_evaluation(output, {"checkpoint": str(checkpoint), "num_episodes": 4})


@pytest.mark.sim
def test_viser_shows_the_simulation_in_a_browser(logs: Path, cartpole_run: Path) -> None:
    """The live view answers on its port while the policy plays."""
    with socket.socket() as probe:
        if probe.connect_ex(("localhost", 8080)) == 0:
            pytest.skip("port 8080 is taken by another program")
    options = ["--num_envs", 2, "--num_episodes", 400, "--viz", "viser", "--output", logs / "viser.json", *CPU]
    checkpoint = cartpole_run / "model_last.pt"
    command = [
        sys.executable,
        REPOSITORY / "scripts/play.py",
        "--task",
        "Isaac-Cartpole-v0",
        "--checkpoint",
        checkpoint,
    ]
    with open(logs / "viser.log", "w") as log:
        process = subprocess.Popen(
            [str(part) for part in [*command, *options]], stdout=log, stderr=log, cwd=REPOSITORY, start_new_session=True
        )
    try:
        page, end = "", time.monotonic() + 240
        while "<html" not in page.lower() and process.poll() is None and time.monotonic() < end:
            time.sleep(1.0)
            with contextlib.suppress(OSError), urllib.request.urlopen("http://localhost:8080", timeout=5) as answer:
                page = answer.read().decode()
        assert "<html" in page.lower(), (logs / "viser.log").read_text()[-3000:]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.sim
def test_isaac_labs_own_play_command_plays_our_checkpoints(cartpole_run: Path) -> None:
    """``isaaclab play`` with rsl_rl's stock runner exports and records."""
    checkpoint = cartpole_run / "model_2.pt"
    command = [Path(sys.executable).with_name("isaaclab"), "play", "--rl_library", "rsl_rl", "--task", "Isaac-Cartpole"]
    command += ["--agent", "m3po_cfg_entry_point", "--checkpoint", checkpoint, "--num_envs", 4, *CPU]
    result = run_process([*command, "--video", "--video_length", 3, "--viz", "newton_gl"], timeout=600)
    assert result.rc == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert (checkpoint.parent / "exported" / "policy.onnx").is_file()
    (clip,) = checkpoint.parent.glob("videos/play/*.mp4")
    assert iio.imread(clip)[-1].std() > 10.0


# -- a user's mistakes ------------------------------------------------------------------------------------------------

CARTPOLE = {
    "format": FORMAT,
    "task": "Isaac-Cartpole",
    "algorithm": "m3po",
    "obs_dims": {"policy": 4},
    "num_actions": 1,
}
MISTAKES = {
    ("--checkpoint", "missing.pt"): "There is no checkpoint 'missing.pt'",
    ("--checkpoint", "truncated.pt"): "'truncated.pt' is truncated or corrupted",
    ("--checkpoint", "code.pt"): "'code.pt' holds objects other than tensors and plain values; it is not loaded",
    ("--checkpoint", "ant.pt"): "task: Isaac-Ant in the checkpoint, Isaac-Cartpole here",
    ("--checkpoint", "cartpole.pt", "--algo", "ppo"): "algorithm: m3po in the checkpoint, ppo here",
    ("--checkpoint", "cartpole.pt", "--output", "cartpole.pt/x.json"): "cannot create the folder 'cartpole.pt'",
    ("--algo", "ppo", "--policy", "planner"): "algorithm 'ppo' has no planner",
    (): "no run of task 'Isaac-Cartpole' with agent 'm3po_cfg_entry_point'",
    ("--policy", "random"): "invalid choice: 'random' (choose from 'prior', 'planner')",
    ("--num_episodes", "0"): "must be at least 1, got 0",
    ("--num_envs", "-3"): "must be at least 1, got -3",
}


def test_mistakes_are_answered_in_one_line_before_the_simulation_starts(run_script: Callable, tmp_path: Path) -> None:
    content = {"actor_state_dict": {"weight": torch.zeros(1000)}, "m3po": CARTPOLE}
    torch.save(content, tmp_path / "cartpole.pt")
    torch.save({**content, "m3po": {**CARTPOLE, "task": "Isaac-Ant"}}, tmp_path / "ant.pt")
    torch.save({**content, "infos": Path("code")}, tmp_path / "code.pt")
    (tmp_path / "truncated.pt").write_bytes((tmp_path / "cartpole.pt").read_bytes()[:2000])
    program = """
import json, sys
from m3po.cli.play import run
for options in json.loads(sys.argv.pop()):
    try:
        code = run(["--task", "Isaac-Cartpole-v0", "--device", "cpu", *options])
    except SystemExit as error:  # argparse
        code = error.code
    print(f"exit code {code}", file=sys.stderr, flush=True)
"""
    result = run_script(["-c", program, json.dumps(list(MISTAKES))], cwd=tmp_path)
    assert result.rc == 0, result.stderr
    assert "Traceback" not in result.stderr
    assert "Completed setting up the environment" not in result.stdout
    answers = [answer.splitlines() for answer in result.stderr.split("exit code 2\n")]
    assert len(answers) == len(MISTAKES) + 1, result.stderr
    for (options, expected), answer in zip(MISTAKES.items(), answers, strict=False):
        assert expected in answer[-1], f"{options}: {answer}"


def algorithm(steps: int) -> dict:
    """A runner configuration whose world model is trained as said."""
    return {"algorithm": {"world_model": {"steps_per_iteration": steps}}}


def test_the_planner_is_there_where_its_model_is_trained() -> None:
    """The model can be switched off, and rsl_rl's PPO has none."""
    assert policies_of(algorithm(10)) == ("prior", "planner")
    assert policies_of(algorithm(0)) == policies_of({"algorithm": {}}) == ("prior",)
    check_policy("prior", algorithm(0))
    check_policy("planner", algorithm(10))
    with pytest.raises(UserError, match=r"trained no world model.*--policy prior"):
        check_policy("planner", algorithm(0))


# -- rendering that is not there --------------------------------------------------------------------------------------


def test_a_missing_library_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "LIBRARIES", {"libEGL_that_is_not_there.so.1": "libegl1"})
    with pytest.raises(
        UserError, match=r"libEGL_that_is_not_there\.so\.1 \(package libegl1\).*apt-get install libegl1"
    ):
        video.require_rendering()


def test_a_missing_driver_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "LIBRARIES", {})
    monkeypatch.setattr(video, "_PROBE", "raise RuntimeError('no EGL display')")
    with pytest.raises(UserError, match=r"RuntimeError: no EGL display.*libegl-mesa0 and libgl1-mesa-dri"):
        video.require_rendering()
