"""The offline probe: what it records, what it measures, and what it refuses."""

import csv

import pytest
import torch

from benchmarks import model as benchmark_model
from m3po.errors import UserError

TINY = [
    "agent.algorithm.world_model.width=32",
    "agent.algorithm.world_model.extra_steps=0",
    "agent.algorithm.world_model.steps_per_iteration=2",
    "agent.algorithm.world_model.replay_transitions=400",
    "agent.algorithm.critic_replay.steps_per_iteration=2",
    "agent.actor.hidden_dims=[16]",
    "agent.critic.hidden_dims=[16]",
]


@pytest.mark.parametrize("tasks", ["cup-catch", "cup-catch,walker-walk"])
def test_a_recording_is_probed(tmp_path, monkeypatch, tasks):
    monkeypatch.setattr(benchmark_model, "UNSEEN_STEPS", 300)
    ring, output = tmp_path / "ring.pt", tmp_path / "probe.csv"
    argv = ["--task", tasks, "--device", "cpu", "--num_envs", "8", *TINY]
    assert benchmark_model.main(["--record", str(ring), "--iterations", "3", *argv]) == 0
    recording = benchmark_model.Recording(ring)
    assert recording.unseen["advantages"].numel() >= 300
    assert recording.unseen["advantages"].std() > 0.5  # standardised

    variants = ["anchored", "anchored, 32 features", "latent"]
    options = ["--steps", "2", "4", "--variants", *variants, "--output", str(output)]
    for _ in range(2):  # rows are added
        assert benchmark_model.main(["--probe", str(ring), *options]) == 0
    with open(output, encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["variant"] for row in rows] == 2 * [name for name in variants for _ in range(2)]
    assert rows[:6] != [] and all(float(row["gain_se"]) > 0.0 for row in rows)
    first, second = ([row | {"ms_per_step": ""} for row in part] for part in (rows[:6], rows[6:]))
    assert first == second  # the seed decides


def test_the_gain_is_that_of_the_advantages(tmp_path, monkeypatch):
    """Advantages of the opposite sign have the opposite gain."""
    monkeypatch.setattr(benchmark_model, "UNSEEN_STEPS", 300)
    ring = tmp_path / "ring.pt"
    argv = ["--task", "cup-catch", "--device", "cpu", "--num_envs", "8", *TINY]
    benchmark_model.main(["--record", str(ring), "--iterations", "2", *argv])
    recording = benchmark_model.Recording(ring)
    objective, policy, _ = recording.build(recording.cfg)
    torch.nn.init.normal_(objective.model.transition[-1].weight, std=0.1)
    gains = []
    for sign in (1.0, -1.0):
        st = recording.unseen
        noise = ((st["actions"] - st["mean"]) / st["std"]).sum(-1)
        st["advantages"] = sign * noise
        gains.append(benchmark_model.measure(recording, objective, policy)["gain"])
    assert gains[0] == pytest.approx(-gains[1], rel=1e-4)
    assert gains[0] != 0.0


def test_what_is_no_recording_is_refused(tmp_path):
    path = tmp_path / "other.pt"
    for content in ({"actor": {}}, [1, 2]):
        torch.save(content, path)
        with pytest.raises(UserError, match="no recording"):
            benchmark_model.Recording(path)
    with pytest.raises(UserError, match="no recording"):
        benchmark_model.Recording(tmp_path / "missing.pt")
    with pytest.raises(UserError, match="unknown options"):
        benchmark_model.main(["--probe", str(path), "--task", "walker-walk"])
