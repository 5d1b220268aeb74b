"""The planner benchmark: equal work or no timing, the re-stated peer, and the script itself."""

import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import planner as benchmark
from benchmarks.planner_peers import Budget, PytorchMppi, Restated, Setup, TorchRL, Unavailable
from m3po.cli.arguments import guarded

REPOSITORY = Path(__file__).resolve().parents[1]
TINY = ["--samples", "8", "--elites", "2", "--policy_samples", "2", "--obs_dim", "5", "--action_dim", "3"]
TINY += ["--width", "16", "--features", "8", "--hidden", "16", "16"]
CPU = torch.device("cpu")


def setup():
    return benchmark.make_setup(benchmark.parse(TINY))


def build(setup, *keys):
    return {key: benchmark.CONTESTANTS[key](setup, 2) for key in keys}


def test_all_planners_judge_the_same_candidates_alike():
    common = setup()
    contestants = build(common, "ours", "ours-bf16", "tdmpc2")
    deviations = benchmark.assert_equal_work(contestants, common)
    assert deviations.pop("ours-bf16") < 0.3
    assert max(deviations.values()) < 1e-3
    for contestant in contestants.values():
        assert contestant.plan(benchmark.make_inputs(common, 2)).shape == (2, 3)


@pytest.mark.parametrize(("key", "package"), [("pytorch-mppi", "pytorch_mppi"), ("torchrl", "torchrl")])
def test_the_installed_peers_judge_the_same_candidates_alike(key, package):
    pytest.importorskip(package)
    common = setup()
    peers = build(common, key)
    assert max(benchmark.assert_equal_work(peers, common).values()) < 1e-3
    assert peers[key].plan(benchmark.make_inputs(common, 2)).shape == (2, 3)


def test_unequal_work_is_refused():
    common = setup()
    for name in ("horizon", "samples", "iterations"):
        value = getattr(common.budget, name) + 1
        longer = replace(common, budget=replace(common.budget, **{name: value}))
        for key in ("tdmpc2",) if name == "horizon" else ("ours", "tdmpc2"):  # ours has that of the objective
            with pytest.raises(benchmark.UnequalWork, match=f"{name} {value} instead of"):
                benchmark.assert_equal_work(build(longer, key), common)
    contestants = build(common, "ours", "tdmpc2")
    with torch.no_grad():
        benchmark.assert_equal_work(contestants, common)
    returns = contestants["ours"].returns
    contestants["ours"].returns = lambda inputs, candidates: 1.1 * returns(inputs, candidates)
    with pytest.raises(benchmark.UnequalWork, match=r"M3PO .* different returns"):
        benchmark.assert_equal_work(contestants, common)


class LinearNetworks:
    """z' = z + a, reward -|z'|^2, no terminations, no terminal value, and a policy that does not move."""

    def step(self, z, action):
        return z + action, -(z + action).square().sum(-1), 1.0

    def policy(self, z):
        return torch.zeros_like(z)

    def value(self, z):
        return torch.zeros_like(z[..., 0])


def restated(budget, networks):
    return Restated(Setup(None, budget, 2, 2, 0, CPU), 1, networks)


def test_restated_peer_moves_towards_a_higher_return():
    torch.manual_seed(0)
    planner = restated(Budget(256, 6, 2, 32, 8, 1.0), LinearNetworks())
    z = torch.rand(5, 2) - 0.5
    action, mean, std = planner.search(z, torch.zeros(5, 2), torch.full((5, 2), 0.3))
    # The optimum goes to 0 at once and stays: a_0 = -z, a_1 = 0, return 0; doing nothing returns -2 |z|^2.
    nothing, plan = (planner.evaluate(z, a.unsqueeze(1))[:, 0] for a in (torch.zeros_like(mean), mean))
    torch.testing.assert_close(nothing, -2 * z.square().sum(-1))
    assert (plan > 0.1 * nothing).all()
    torch.testing.assert_close(mean[:, 0], -z, atol=0.15, rtol=0.0)
    assert action.abs().max() <= 1.0
    assert std.min() >= 0.05


def test_restated_peer_follows_the_policy_closed_loop():
    class Drifting(LinearNetworks):
        def policy(self, z):
            return -0.5 * z

    planner = restated(Budget(4, 1, 3, 2, 1, 1.0), Drifting())
    z, mu = torch.tensor([[0.4]]), torch.tensor([[0.2]])
    actions = planner.follow_policy(z, mu, torch.zeros_like(mu), 1)
    # The executed policy's mean 0.2, to 0.6; then -0.3, to 0.3; then -0.15.
    torch.testing.assert_close(actions.flatten(), torch.tensor([0.2, -0.3, -0.15]))


def test_rounds_begin_with_another_contestant_each_time():
    called = []
    calls = {name: (lambda name=name: called.append(name), 1) for name in "abc"}
    times = benchmark.interleave(calls, 3, CPU)
    assert "".join(called) == "abcbcacab"
    assert {name: len(raw) for name, raw in times.items()} == {"a": 3, "b": 3, "c": 3}


def test_a_missing_peer_is_a_row_with_the_command_that_installs_it(monkeypatch):
    common = setup()
    for package, peer in (("pytorch_mppi", PytorchMppi), ("torchrl", TorchRL)):
        for name in [m for m in sys.modules if m.split(".")[0] == package]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(Unavailable, match=r"not installed: uv pip install .*requirements-benchmark.txt"):
            peer(common, 1)


def test_lock_of_the_peers_adds_to_the_main_lock_and_changes_nothing_of_it():
    text = (REPOSITORY / "requirements-benchmark.txt").read_text()
    names = re.findall(r"^(\S+)==\S+ \\$", text, flags=re.MULTILINE)
    assert {"pytorch-mppi", "torchrl"} <= set(names)
    for line in text.splitlines():
        assert re.fullmatch(r"[a-z0-9.-]+==[\w.+]+ \\|    --hash=sha256:[0-9a-f]{64}( \\)?", line), line
    main = re.findall(r"^(\S+)==", (REPOSITORY / "requirements.txt").read_text(), flags=re.MULTILINE)
    assert not set(names) & set(main)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--samples", "8", "--elites", "9"], "--elites (9) exceeds --samples (8)"),
        (["--samples", "8", "--policy_samples", "5"], "--samples (8) must be 4 more than --policy_samples"),
        (["--features", "9"], "--features must be a multiple of 8, got 9"),
        (["--horizon", "0"], "must be at least 1, got 0"),
        (["--num_envs", "0"], "must be at least 1, got 0"),
        (["--contestants", "mine"], "invalid choice: 'mine'"),
        (["--device", "tpu"], "--device must be cpu or a CUDA device"),
        (["--device", "meta"], "--device must be cpu or a CUDA device"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, capsys):
    assert guarded(benchmark.main, arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_without_cuda_is_an_error(capsys):
    assert guarded(benchmark.main, ["--device", "cuda:0"]) == 2
    assert "has no CUDA device" in capsys.readouterr().err


def test_script_end_to_end(run_script, tmp_path):
    command = ["-m", "benchmarks", "planner", *TINY, "--num_envs", "4", "1", "--rounds", "2", "--min_seconds", "0"]
    result = run_script([*command, "--output", tmp_path], timeout=120)
    assert result.rc == 0, result.stderr
    assert "TD-MPC2 planner, re-stated" in result.stdout
    stored = json.loads((tmp_path / "16-8x2x3-cpu.json").read_text())
    measured = {(row["contestant"], row["num_envs"]) for row in stored["rows"]}
    for key in ("ours", "ours-bf16", "tdmpc2"):
        assert {(key, 1), (key, 4)} <= measured
    for key in ("pytorch-mppi", "torchrl"):
        assert (key, 4) in measured or "not installed" in stored["not_measured"][key]
    for row in stored["rows"]:
        assert len(row["cpu_s"]) == len(row["wall_s"]) == 2
        assert all(math.isfinite(x) and x > 0 for x in (*row["cpu_s"], *row["wall_s"], row["time_s"])), row
    assert stored["contestants"]["ours"]["return_deviation"] < 1e-3
    assert stored["contestants"]["ours"]["budget"] == stored["contestants"]["tdmpc2"]["budget"]
    assert {"command", "date", "versions", "machine"} <= set(stored)
    assert stored["machine"]["threads"] == 1
