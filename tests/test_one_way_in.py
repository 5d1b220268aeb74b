"""One Isaac Lab task and tasks of suites are started, evaluated and recorded by the same code."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, run_process
from toy_env import PointEnv

from m3po.cli import evaluate
from m3po.cli.job import _select
from m3po.cli.suite_job import from_order, make_job
from m3po.cli.train import fast_matrix_products
from m3po.envs.interface import M3POEnv, WrappedEnv, as_m3po_env
from m3po.envs.multi_task import MultiTaskVecEnv, TaskEnv
from m3po.errors import UserError
from m3po.runners import M3PORunner
from m3po_tasks.dmcontrol.suite import SUITE

WALKER = ("--task", "walker-walk", "--device", "cpu", "--num_envs", "8", "agent.num_steps_per_env=4")


@pytest.mark.sim
def test_both_kinds_of_run_say_the_same_of_themselves(tmp_path: Path) -> None:
    manifests = {}
    for task in ("Isaac-Cartpole-v0", "walker-walk"):
        command = [sys.executable, REPOSITORY / "scripts/train.py", "--task", task, "--num_envs", 8, "--seed", 3]
        command += ["--max_iterations", 1, "--eval_interval", 0, "--device", "cpu", "--log_root", tmp_path / task]
        result = run_process(command, timeout=240)
        assert result.rc == 0, result.stderr[-3000:]
        (path,) = (tmp_path / task).rglob("run.json")
        manifests[task] = json.loads(path.read_text())
    isaac, walker = manifests.values()
    assert isaac.keys() - walker.keys() == {"physics", "assets"}
    assert walker.keys() <= isaac.keys()
    assert isaac["configuration"].keys() - walker["configuration"].keys() == {"env"}
    for name in ("seed", "device", "algorithm", "agent", "num_envs", "version", "library", "processes"):
        assert isaac[name] == walker[name], name
    assert (isaac["task"], isaac["tasks"]) == ("Isaac-Cartpole", ["Isaac-Cartpole"])
    assert (walker["task"], walker["tasks"]) == ("walker-walk", ["walker-walk"])


def test_matrix_products_are_fast_while_training_and_as_before_afterwards() -> None:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.benchmark
    with fast_matrix_products():
        assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.benchmark) == (True, True)
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.benchmark) == before


def test_every_checkpoint_is_evaluated_on_the_same_initial_states(tmp_path: Path) -> None:
    job = make_job(*WALKER)
    with job.environments(job.sizes, job.seed) as env:
        runner = M3PORunner(env, job.runner_cfg(env), device="cpu")
        runner.save(str(tmp_path / "model.pt"))
    order = json.loads(json.dumps(job.order() | {"num_envs": 4}))
    with evaluate._build(order) as measure:
        first, second = (measure(str(tmp_path / "model.pt")) for _ in range(2))
    assert first["prior"]["returns"] == second["prior"]["returns"]
    assert first["prior"]["num_episodes"] == 2  # half of the environments of a task, for each of two policies


def test_a_job_goes_to_another_process_as_json() -> None:
    job = make_job(*WALKER, "--seed", "7", "agent.algorithm.gamma=0.9")
    order = json.loads(json.dumps(job.order()))
    copy = from_order(order)
    assert (copy.names, copy.sizes, copy.seed, copy.device) == (job.names, job.sizes, 7, "cpu")
    assert copy.train_cfg == job.train_cfg
    assert copy.train_cfg["algorithm"]["gamma"] == 0.9


# -- the interface of environments ------------------------------------------------------------------------------------


class Plain(PointEnv):
    """An environment that knows nothing of M3PO."""

    steps_of_mine = 3


def test_a_plain_environment_gets_the_defaults() -> None:
    plain = Plain(num_envs=4)
    assert not isinstance(plain, M3POEnv)
    env = as_m3po_env(plain)
    assert as_m3po_env(env) is env
    assert (env.task_ids, env.num_tasks, list(env.task_names), env.steps_beside) == (None, 1, [], False)
    assert (env.curriculum_state(), env.get_state()) == (None, {})
    assert env.reset_envs(torch.tensor([0])) is None
    assert env.set_state({}) is None
    env.seed(3)
    env.close()


def test_what_an_environment_has_is_its_own_to_be_read_and_set() -> None:
    plain = Plain(num_envs=4)
    plain.reset_envs = lambda ids: f"reset {ids}"
    env = as_m3po_env(plain)
    assert isinstance(env, WrappedEnv)
    assert env.reset_envs([2]) == "reset [2]"
    assert env.steps_of_mine == 3
    env.episode_length_buf = torch.tensor([1, 2, 3, 4])
    assert plain.episode_length_buf.tolist() == [1, 2, 3, 4]
    assert torch.equal(env.reset()[0]["policy"], env.get_observations()["policy"])
    with pytest.raises(AttributeError, match="no_such_thing"):
        env.no_such_thing  # noqa: B018


def test_an_environment_without_reset_says_what_needs_it() -> None:
    class NoReset(M3POEnv):
        def get_observations(self):
            return None

        def step(self, actions):
            return None

    with pytest.raises(NotImplementedError, match=r"NoReset has no reset.*evaluations"):
        NoReset().reset()


def test_a_seed_makes_resets_repeat_themselves() -> None:
    env = MultiTaskVecEnv(
        [
            TaskEnv(name, SUITE.make(name, 8, seed=k, device="cpu"))
            for k, name in enumerate(("walker-walk", "cup-catch"))
        ],
        "cpu",
    )
    observed = []
    for seed in (5, 5, 6):
        env.seed(seed)
        observed.append(env.reset()[0]["policy"].clone())
    env.close()
    assert torch.equal(observed[0], observed[1])
    assert not torch.equal(observed[0], observed[2])


PAPER = "m3po_paper_cfg_entry_point"


@pytest.mark.parametrize("agent", ["m3po_cfg_entry_point", PAPER])
def test_the_latest_checkpoint_is_of_the_same_tasks_algorithm_and_agent(agent: str, tmp_path: Path) -> None:
    found = make_job(*WALKER, "--log_root", str(tmp_path), "--agent", agent)
    same = {"tasks": ["walker-walk"], "algorithm": "m3po", "agent": agent}
    others = ({"tasks": ["walker-run"]}, {"algorithm": "ppo"}, {"agent": PAPER if agent != PAPER else "other"})
    for k, change in enumerate(({}, *others)):  # the right one is the oldest
        folder = found.experiment_dir / f"run_{k}"
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(json.dumps(same | change))
        (folder / "model_last.pt").touch()
        os.utime(folder / "model_last.pt", (k, k))
    assert _select(found, "model_last.pt") == found.experiment_dir / "run_0" / "model_last.pt"
    with pytest.raises(UserError, match=r"no run of task 'walker-walk' with agent .* has a model_best\.pt"):
        _select(found, "model_best.pt")
