"""Curves go to Weights & Biases or Neptune as well, if that is asked for and possible."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY, run_process
from toy_env import PointEnv, runner_cfg

from m3po.errors import UserError
from m3po.runners import M3PORunner, log_services

SMALL = ["--task", "walker-walk", "--device", "cpu", "--num_envs", "4", "--max_iterations", "2", "--eval_interval", "0"]
TINY = ["agent.num_steps_per_env=4", "agent.algorithm.num_mini_batches=1"]


def test_a_run_reaches_wandb_without_a_network(tmp_path: Path) -> None:
    env = os.environ | {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    command = [sys.executable, REPOSITORY / "scripts/train.py", *SMALL, *TINY, "--logger", "wandb"]
    result = run_process([*command, "--log_root", tmp_path], timeout=240, env=env, cwd=tmp_path)
    assert result.rc == 0, result.stdout[-2000:] + result.stderr[-2000:]
    (run,) = tmp_path.glob("m3po/walker-walk/*")
    assert list(run.glob("events.out.tfevents.*"))
    assert len((run / "progress.csv").read_text().splitlines()) == 3
    (record,) = run.glob("wandb/offline-run-*/run-*.wandb")
    content = record.read_bytes()
    for part in (b"Perf/mean_step_reward", b"Perf/env_steps", b"num_steps_per_env", b"model_last.pt"):
        assert part in content, part
    assert list(run.glob("wandb/offline-run-*/files/model_last.pt"))


@pytest.mark.parametrize(
    ("logger", "missing", "message"),
    [
        ("wandb", True, "--logger wandb needs its package: ./isaaclab.sh -p -m pip install wandb"),
        ("neptune", True, "--logger neptune needs its package: ./isaaclab.sh -p -m pip install neptune"),
        ("wandb", False, "--logger wandb needs a login: ./isaaclab.sh -p -m wandb login"),
        ("neptune", False, "--logger neptune needs a login: set NEPTUNE_API_TOKEN and NEPTUNE_USERNAME"),
    ],
)
def test_what_is_missing_is_told_with_what_mends_it(logger, missing, message, monkeypatch) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY", *log_services.NEPTUNE_VARIABLES):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(log_services.importlib.util, "find_spec", lambda name: None if missing else object())
    if logger == "wandb" and not missing:
        wandb = pytest.importorskip("wandb")
        monkeypatch.setattr(wandb, "login", lambda prompt: False)
    with pytest.raises(UserError) as error:
        log_services.check_logger(logger)
    assert message in str(error.value)


def test_offline_needs_no_login(monkeypatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    log_services.check_logger("wandb")
    log_services.check_logger("tensorboard")


def test_an_unknown_service_is_refused() -> None:
    with pytest.raises(UserError, match="unknown logger 'mlflow': use tensorboard, wandb, neptune"):
        log_services.check_logger("mlflow")


def test_tensorboard_alone_is_the_default(tmp_path: Path) -> None:
    runner = M3PORunner(PointEnv(num_envs=4), runner_cfg(), str(tmp_path), "cpu")
    runner.learn(1)
    assert list(tmp_path.glob("events.out.tfevents.*"))
    assert not (tmp_path / "wandb").exists()
