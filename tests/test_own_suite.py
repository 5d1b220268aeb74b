"""A suite of a user's own, as the documentation shows it, and what such suites do differently."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch

from m3po.cli import suite_job, train, transfer
from m3po.envs import suite as suites_module

ROOT = Path(__file__).resolve().parents[1]
TRAIN = ("--task", "my-reach", "--num_envs", "16", "--device", "cpu", "--eval_interval", "0")


def example() -> str:
    text = (ROOT / "docs" / "multi_task.md").read_text(encoding="utf-8")
    return re.search(r"```python\n(# my_suite\.py.*?)```", text, re.DOTALL).group(1)


@pytest.fixture
def module(monkeypatch, tmp_path) -> ModuleType:
    """The example, its suite known to every command of this process."""
    found = ModuleType("my_suite")
    exec(compile(example(), "my_suite.py", "exec"), vars(found))
    known = suites_module.suites() | {"mine": found.SUITE}
    for place in (suites_module, suite_job, transfer):
        monkeypatch.setattr(place, "suites", lambda: known, raising=False)
    monkeypatch.chdir(tmp_path)
    return found


def test_the_documented_suite_trains_evaluates_and_plays_as_a_package(run_script, tmp_path):
    (tmp_path / "my_suite.py").write_text(example(), encoding="utf-8")
    info = tmp_path / "my_suite-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-suite\nVersion: 0.1\n", encoding="utf-8")
    (info / "entry_points.txt").write_text("[m3po.suites]\nmine = my_suite:SUITE\n", encoding="utf-8")
    env = {"PYTHONPATH": str(tmp_path)}
    options = ["--task", "my-reach", "--num_envs", "32", "--device", "cpu", "--seed", "1"]
    line = ["scripts/train.py", *options, "--max_iterations", "30", "--eval_interval", "15"]
    result = run_script(line, env=env, cwd=tmp_path)
    assert result.rc == 0, result.stderr[-3000:]
    assert "evaluation after iteration 30: prior" in result.stdout
    assert re.search(r"critic :  \['critic'\]", result.stdout)
    result = run_script(["scripts/play.py", "--task", "my-reach", "--device", "cpu"], env=env, cwd=tmp_path)
    assert result.rc == 0, result.stderr[-3000:]
    mixed = ["scripts/train.py", "--task", "my-reach,cup-catch", "--num_envs", "8", "--max_iterations", "2"]
    result = run_script([*mixed, "--device", "cpu", "--eval_interval", "0"], env=env, cwd=tmp_path)
    assert result.rc == 0, result.stderr[-3000:]
    assert "does not read the group 'critic' of: my-reach" in result.stdout


def run(*options: str) -> int:
    return train.run([*TRAIN, "--max_iterations", "2", *options])


@pytest.mark.parametrize("several", [(), ("--multi_task",)])
def test_make_may_return_a_context(module, several):
    ended = []

    @contextlib.contextmanager
    def make(task, num_envs, *, seed, device):
        yield module.Reach(num_envs, seed, device)
        ended.append(task)

    module.MySuite.make = staticmethod(make)
    assert run(*several) == 0
    assert ended == ["my-reach"]


def test_environments_are_closed_where_they_can_be(module):
    closed = []
    module.Reach.close = lambda self: closed.append(self.num_envs)
    assert run() == 0
    assert closed == [16]


def lacking_reset(module) -> None:
    original = module.Reach.reset
    module.Reach.__init__ = lambda self, *args: None
    del module.Reach.reset
    assert original


def other_group(module) -> None:
    original = module.Reach.get_observations
    module.Reach.get_observations = lambda self: original(self).rename_key_("policy", "state")


def no_vec_env(module) -> None:
    module.MySuite.make = staticmethod(lambda *args, **kwargs: contextlib.nullcontext(3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lacking_reset, "the environments of task 'my-reach' need reset() -> (observations, extras)"),
        (other_group, "have no observation group 'policy', only: "),
        (no_vec_env, "the environments of task 'my-reach' are a int, not an rsl_rl VecEnv."),
    ],
)
def test_what_a_suite_lacks_is_said_in_one_line(module, change, message, capsys):
    change(module)
    assert run() == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert message in lines[0]


def test_a_wrong_setting_is_a_line_and_no_traceback(module, capsys):
    assert run('agent.obs_groups={"actor": ["policy"], "critic": ["nowhere"]}') == 2
    assert "Observation 'nowhere' in observation set 'critic' not found" in capsys.readouterr().err


def test_the_critic_of_a_single_task_reads_its_group(module):
    env = module.Reach(4, 0, "cpu")
    cfg = {"obs_groups": {"actor": ["policy"], "critic": ["policy"]}}
    assert suite_job.with_groups(cfg, env)["obs_groups"] == {"actor": ["policy"], "critic": ["critic"]}
    chosen = {"obs_groups": {"actor": ["policy"], "critic": ["policy", "critic"]}}
    assert suite_job.with_groups(chosen, env) is chosen
    assert torch.equal(env.get_observations()["critic"], env.x)
