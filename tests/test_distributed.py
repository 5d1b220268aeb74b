"""Several processes: one result, one report."""

from __future__ import annotations

import math
import socket
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, run_process
from test_train_cli import tensors

from m3po import distributed
from m3po.cli import suite_job, train
from m3po.errors import UserError


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


TRAININGS = ("one task", "two tasks")

CLOSE = 1e-8
"""Relative difference in float64: 10,000 times what was measured, and less than any rounding to float32."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[str, dict]:
    """What one process with all environments has learnt, and each of two with half of them."""
    folder = tmp_path_factory.mktemp("ranks")
    result = run_process([sys.executable, REPOSITORY / "tests/toy_ranks.py", folder, free_port()], timeout=300)
    assert result.rc == 0, result.stderr[-3000:]
    assert result.stdout.count("Iteration 5/5") == 4  # of two processes one prints
    assert "holds networks, optimisers and counters alone" not in result.stdout
    return {path.stem: torch.load(path, weights_only=True) for path in Path(folder).glob("*.pt")}


@pytest.mark.parametrize("which", TRAININGS)
def test_two_processes_learn_what_one_learns(trained, which):
    """Networks, gates and all normalisers after five iterations; the gradients of every policy step."""
    one, first, second = (trained[key][which] for key in ("1-0", "2-0", "2-1"))
    for name, network in one["networks"].items():
        for key, value in network.items():
            torch.testing.assert_close(first["networks"][name][key], value, rtol=CLOSE, atol=1e-10, msg=f"{name} {key}")
    for here, there in zip(first["gradients"], one["gradients"], strict=True):
        assert (here - there).norm() < CLOSE * there.norm()
    assert first["learning_rate"] == pytest.approx(one["learning_rate"])
    assert one["rows"][-1]["planner/planned_fraction"] >= 0.5  # where the gates let plans act
    assert one["rows"][0]["bonus/mean_abs"] > 0.0
    assert max(row["plan/kl"] for row in one["rows"]) > 0.0
    for name, network in first["networks"].items():
        for key, value in network.items():
            assert torch.equal(second["networks"][name][key], value), f"{name} {key}"


@pytest.mark.parametrize("which", TRAININGS)
def test_two_processes_report_what_one_reports(trained, which):
    """Of two tasks, each of two processes has one; both report both."""
    one, first, second = (trained[key][which]["rows"] for key in ("1-0", "2-0", "2-1"))
    assert sum(row["episodes"] for row in one) > 100
    if which == "two tasks":
        assert first[-1]["task/wide/share"] == first[-1]["task/narrow/share"] == 0.5
        assert first[-1]["task/wide/length"] > first[-1]["task/narrow/length"]
    for rows in zip(one, first, second, strict=True):
        assert len({frozenset(row) for row in rows}) == 1
        for key, value in rows[0].items():
            if not key.startswith(("time_", "seconds", "steps_per_second", "gpu_memory")):
                assert rows[1][key] == pytest.approx(value, rel=CLOSE, abs=1e-10), key
                assert rows[2][key] == rows[1][key], key


def test_m3po_under_rsl_rls_runner_and_ppo_under_ours_stay_the_same_in_all_processes(trained):
    first, second = trained["2-0"]["others"], trained["2-1"]["others"]
    assert set(first) == {"M3PO, stock runner", "PPO", "PPO, two tasks"}
    for name, policy in first.items():
        assert torch.equal(policy, second[name]), name


def test_each_of_two_processes_goes_on_exactly(trained):
    """Rings, random numbers and episodes are those of each process."""
    for key in ("2-0", "2-1"):
        whole, parts = (tensors(trained[key]["resumed"][name]) for name in ("whole", "parts"))
        assert len(whole) > 30 and whole.keys() == parts.keys()
        assert [name for name, value in whole.items() if not torch.equal(parts[name], value)] == []
    first, second = (tensors(trained[key]["resumed"]["whole"]) for key in ("2-0", "2-1"))
    assert any(not torch.equal(second[name], value) for name, value in first.items())


def test_one_process_exchanges_nothing():
    x = torch.rand(4, 2)
    assert distributed.total(x) is x and distributed.mean(x, 3.0) is x and distributed.gather(x) is x
    assert distributed.shared("a") == "a" and distributed.collected("a") == ["a"]
    assert (distributed.world_size(), distributed.rank(), distributed.rows_before(4, "cpu")) == (1, 0, 0)
    count, mean, var = distributed.moments(x[:0])
    assert count == 0 and mean.tolist() == var.tolist() == [0.0, 0.0]
    assert math.isclose(distributed.moments(x)[2][0].item(), x[:, 0].var(unbiased=False).item())


def test_a_wrong_start_is_refused(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    distributed.check_start(False)
    with pytest.raises(UserError, match=r"torch\.distributed\.run --nproc_per_node N"):
        distributed.check_start(True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    distributed.check_start(True)
    with pytest.raises(UserError, match="add --distributed"):
        distributed.check_start(False)


def test_the_command_refuses_to_be_distributed_alone(monkeypatch, capsys):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert train.run(["--task", "walker-walk", "--distributed", "--device", "cpu"]) == 2
    assert "torch.distributed.run" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert train.run(["--task", "walker-walk", "--device", "cpu"]) == 2
    assert "add --distributed" in capsys.readouterr().err


def test_each_process_has_the_gpu_of_its_number(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert distributed.local_device("cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert distributed.local_device("cuda:0") == "cuda:1"
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="3 processes on this machine need a GPU each, but torch sees 2"):
        distributed.local_device("cuda:0")


def test_processes_of_our_own_are_not_of_the_group(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("KEPT", "1")
    environment = distributed.child_environment()
    assert "WORLD_SIZE" not in environment and environment["KEPT"] == "1"


def torchrun(*arguments: object) -> list[object]:
    return [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", *arguments]


def test_tasks_are_dealt_out(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    split = ["--task", "walker-walk,cup-catch,mw-reach", "--distributed", "--split_tasks", "--device", "cpu"]
    for count, sizes in (("--num_envs_per_task", [0, 8, 0]), ("--num_envs", [0, 8, 0])):
        assert suite_job.SuiteJob.read(train._parser(), [*split, count, "8"]).sizes == sizes
    monkeypatch.setenv("RANK", "0")
    assert suite_job.SuiteJob.read(train._parser(), [*split, "--num_envs", "7"]).sizes == [4, 0, 3]
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(UserError, match="3 tasks cannot be split over 4 processes"):
        suite_job.SuiteJob.read(train._parser(), split)


def test_the_stock_launcher_offers_m3po(run_script):
    command = ["-m", "isaaclab", "train_multigpu", "--rl_library", "m3po", "--num_gpus", "cpu", "--dry_run"]
    result = run_script([*command, "--task", "Isaac-Ant"], timeout=120)
    assert result.rc == 0, result.stderr[-2000:]
    assert "--rl_library m3po --task Isaac-Ant" in result.stdout and result.stdout.rstrip().endswith("--distributed")


def test_a_killed_process_is_restarted_and_training_goes_on_from_the_last_checkpoint(tmp_path):
    """The second process dies in iteration 5 (counted from 0); the last checkpoint is that after iteration 3."""
    options = ("--max_restarts", "1", "--master_port", free_port())
    result = run_process(torchrun(*options, REPOSITORY / "tests/toy_elastic.py", tmp_path, "1", "5"), timeout=400)
    assert result.rc == 0, result.stderr[-3000:]
    starts = [line for line in result.stdout.splitlines() if "processes from" in line]
    assert starts == ["2 processes from iteration 0", "2 processes from iteration 4"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run_0"]  # the launch's own file is gone
    last = torch.load(tmp_path / "run_0/model_last.pt", weights_only=True)
    assert last["iter"] == 7
    assert last["runner_state"]["env_steps"] == 8 * 8 * 16  # iterations, steps, environments of both processes
