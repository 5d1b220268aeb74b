"""Exported policies agree with torch, and a file that does not is refused."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest
import torch
from toy_env import PointEnv, runner_cfg
from toy_tasks import ToyTask

from m3po import export
from m3po.envs.multi_task import MultiTaskVecEnv, TaskEnv
from m3po.errors import M3POError
from m3po.runners import M3PORunner


@pytest.fixture
def runner() -> M3PORunner:
    """A runner whose policy has a normaliser that is not the identity."""
    cfg = runner_cfg()
    cfg["actor"]["obs_normalization"] = True
    runner = M3PORunner(PointEnv(), cfg, log_dir=None, device="cpu")
    obs = runner.env.get_observations()
    obs["policy"] = 2.0 + 5.0 * obs["policy"]
    runner.alg.actor.update_normalization(obs)
    runner.alg.eval_mode()
    return runner


def test_both_files_agree_with_torch(runner: M3PORunner, tmp_path: Path) -> None:
    differences = export.export_policy(runner, tmp_path / "new" / "folder")
    assert set(differences) == {"policy.pt", "policy.onnx"}
    assert max(differences.values()) < 1e-5
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == ["policy.onnx", "policy.pt"]

    # the files alone, by hand, on a real observation
    obs = runner.env.get_observations()
    expected = runner.alg.actor(obs)[:1].detach()
    torch.testing.assert_close(torch.jit.load(tmp_path / "new" / "folder" / "policy.pt")(obs["policy"])[:1], expected)
    session = onnxruntime.InferenceSession(tmp_path / "new" / "folder" / "policy.onnx")
    for count in (1, 3, len(obs["policy"])):  # any number of observations at once
        onnx = session.run(None, {"obs": obs["policy"][:count].numpy()})[0]
        expected = runner.alg.actor(obs)[:count].detach()
        torch.testing.assert_close(torch.from_numpy(onnx), expected, atol=1e-5, rtol=0.0)


@pytest.mark.parametrize("error", [1e-3, float("nan")])
def test_a_file_that_differs_is_an_error(
    runner: M3PORunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: float
) -> None:
    honest = export._run_onnx
    monkeypatch.setattr(export, "_run_onnx", lambda file, vector: honest(file, vector) + error)
    with pytest.raises(M3POError, match=r"policy\.onnx' differs from torch"):
        export.export_policy(runner, tmp_path)


def test_each_of_several_tasks_gets_a_policy_of_its_own(tmp_path: Path) -> None:
    """From plain observations to a task's own actions, whatever the padding holds for the others."""
    torch.manual_seed(0)
    dims = {"small": 1, "large": 3}
    env = MultiTaskVecEnv([TaskEnv(name, ToyTask(dim=dim, seed=dim)) for name, dim in dims.items()], "cpu")
    runner = M3PORunner(env, runner_cfg(), log_dir=None, device="cpu")
    obs = env.get_observations()
    actor = runner.alg.actor
    for scale in (1.0, 3.0):
        shifted = obs.clone()
        shifted["policy"] = scale * obs["policy"] + (1.0 + obs["task"])  # also where observations are padding
        actor.update_normalization(shifted)
    differences = export.export_policy(runner, tmp_path)
    assert set(differences) == {f"{name}/policy.{kind}" for name in dims for kind in ("pt", "onnx")}
    expected = actor(obs).detach()
    assert max(differences.values()) < 2e-6 * expected.abs().max()  # actions of 10 and more, in float32
    for task, (name, dim) in enumerate(dims.items()):
        rows = env.task_ids == task
        plain = obs["policy"][rows][:, : 2 * dim]
        actions = torch.jit.load(tmp_path / name / "policy.pt")(plain)
        torch.testing.assert_close(actions, expected[rows][:, :dim], atol=1e-6, rtol=1e-5)
        session = onnxruntime.InferenceSession(tmp_path / name / "policy.onnx")
        (first,) = session.run(None, {"obs": plain[:1].numpy()})
        torch.testing.assert_close(torch.from_numpy(first), actions[:1], atol=1e-5, rtol=0.0)
