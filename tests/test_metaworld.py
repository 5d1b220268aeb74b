"""Meta-World in a pool of processes against Meta-World itself, one plain environment after the other."""

import importlib.metadata
import os
import pickle
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch

from m3po.envs.suite import TaskInfo
from m3po.errors import M3POError, UserError
from m3po.evaluation import evaluate
from m3po_tasks.metaworld import SUITE, tasks
from m3po_tasks.metaworld.env import MetaWorldCfg
from m3po_tasks.metaworld.pool import POOL

pytest.importorskip("metaworld")

from metaworld.env_dict import ALL_V3_ENVIRONMENTS, MT10_V3, MT50_V3
from metaworld.policies import ENV_POLICY_MAP
from metaworld.types import Task

pytestmark = pytest.mark.filterwarnings("ignore:Constant.s. may be too high")


@pytest.fixture(autouse=True)
def _no_process_stays():
    yield
    assert not POOL._workers


@pytest.fixture(scope="module")
def one_worker():
    """One worker for all tests that ask for it, so that it starts once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "sched_getaffinity", lambda pid: {0})
        env = SUITE.make("mw-reach", 1, seed=0, device="cpu")
        kept, POOL._workers = POOL._workers, []
        yield kept[0]
        POOL._workers = kept
        env.close()


@pytest.fixture
def warm(one_worker):
    """The pool holds :func:`one_worker`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "sched_getaffinity", lambda pid: {0})
        POOL._workers = [one_worker]
        yield
        assert POOL._workers == [one_worker]
        POOL._workers = []


def _seeds(seed, num_envs):
    return np.random.SeedSequence(seed).generate_state(num_envs, np.uint64).tolist()


class Plain:
    """The episodes of one environment, each played by a new environment of Meta-World's, through ``set_task``."""

    def __init__(self, task, seed):
        self.name = tasks.metaworld_name(task)
        self.dice = self._new(None)
        self.dice.seeded_rand_vec, self.dice._freeze_rand_vec = True, False
        self.dice.seed(seed)

    def _new(self, vector):
        cls = ALL_V3_ENVIRONMENTS[self.name]
        env = cls()
        facts = {"env_cls": cls, "rand_vec": vector, "partially_observable": False}
        env.set_task(Task(self.name, pickle.dumps(facts)))
        return env

    def reset(self):
        self.dice.reset_model()
        self.env = self._new(self.dice._last_rand_vec)
        return torch.tensor(self.env.reset()[0], dtype=torch.float32)

    def step(self, action):
        action = action.clamp(-1, 1).numpy()
        _, first, _, _, _ = self.env.step(action)
        obs, second, _, _, info = self.env.step(action)
        return torch.tensor(obs, dtype=torch.float32), first + second, info["success"]


# -- suite ------------------------------------------------------------------------------------------------------------


def test_names_and_sets_are_those_of_the_package():
    def named(names):
        return tuple(f"mw-{name.removesuffix('-v3')}" for name in names)

    sets = SUITE.sets()
    assert tuple(SUITE.tasks()) == named(ALL_V3_ENVIRONMENTS)
    assert sets["MT10"] == named(MT10_V3)
    assert sets["MT50"] == named(MT50_V3)
    assert len(set(sets["MT80"])) == 80
    assert sets["MT80"][30:] == sets["MT50"]
    assert {"walker-walk", "cup-spin", "reacher-three-hard"} < set(sets["MT80"][:30])


def test_the_version_is_that_of_the_lock(repository):
    extras = tomllib.loads((repository / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras["metaworld"] == [f"metaworld=={tasks.VERSION}"]


@pytest.mark.parametrize("name", ["mw-pick-place", "pick-place-v3", "mw-pick-place-v3"])
def test_names_that_mean_a_task(name):
    assert SUITE.resolve(name) == "mw-pick-place"


@pytest.mark.parametrize("name", ["pick-place", "pick-place-v2", "mw-", "mw-walker-walk", "Isaac-Ant-v3"])
def test_names_that_mean_none(name):
    assert SUITE.resolve(name) is None


def test_the_command_that_installs_it(monkeypatch):
    assert SUITE.missing() is None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert SUITE.missing() == f"pip install --no-deps metaworld=={tasks.VERSION}"


def test_what_is_known_before_anything_starts():
    assert SUITE.info("mw-reach") == TaskInfo("mw-reach", 39, 4, 100, score_range=None, reports_success=True)


def test_suite_and_worker_import_neither_torch_nor_metaworld(run_script):
    code = "import sys, m3po_tasks.metaworld.worker; print({'torch', 'metaworld'} & set(sys.modules))"
    path = os.pathsep.join(sys.path)
    assert run_script(["-c", code], env={"PYTHONPATH": path}).stdout.strip() == "set()"


def test_mistakes_of_the_user():
    for num_envs, num_workers in ((0, None), (1, 0)):
        with pytest.raises(UserError, match="mw-reach"):
            SUITE.make("mw-reach", num_envs, seed=0, device="cpu", num_workers=num_workers)


# -- environments -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", SUITE.tasks())
def test_equals_plain_environments(task, warm):
    """Two environments that share a model, over the end of an episode, bit for bit.

    The first follows Meta-World's scripted policy, so that objects are touched and moved.
    """
    env = SUITE.make(task, 2, seed=7, device="cpu")
    plain = [Plain(task, seed) for seed in _seeds(7, 2)]
    policy = ENV_POLICY_MAP[tasks.metaworld_name(task)]()
    noise = torch.Generator().manual_seed(0)
    expected = torch.stack([each.reset() for each in plain])
    assert torch.equal(env.get_observations()["policy"], expected)
    for step in range(50):
        if step == 11:
            env.episode_length_buf = torch.tensor([40, 99])
        actions = 1.5 * torch.randn(2, 4, generator=noise)
        actions[0] = torch.tensor(policy.get_action(expected[0].double().numpy()))
        obs, rewards, dones, extras = env.step(actions)
        results = [each.step(action) for each, action in zip(plain, actions, strict=True)]
        expected = torch.stack([result[0] for result in results])
        assert rewards.tolist() == torch.tensor([float(result[1]) for result in results]).tolist()
        assert extras["success"].tolist() == [result[2] for result in results]
        assert dones.tolist() == [False, step == 11]
        if step == 11:
            assert torch.equal(extras["final_obs"]["policy"][1], expected[1])
            expected[1] = plain[1].reset()
        assert torch.equal(obs["policy"], expected)
    env.close()


def test_episodes_end_after_100_steps_by_truncation(warm):
    env = SUITE.make("mw-reach", 3, seed=0, device="cpu")
    assert (env.num_envs, env.num_actions, env.max_episode_length) == (3, 4, 100)
    first = env.get_observations()["policy"].clone()
    env.episode_length_buf = torch.tensor([0, 30, 99])
    ends = [[], [], []]
    for step in range(1, 131):
        before = env.get_observations()["policy"]
        kept = before.clone()
        obs, rewards, dones, extras = env.step(torch.zeros(3, 4))
        assert torch.equal(before, kept)  # not overwritten
        assert torch.equal(extras["time_outs"], dones)
        assert (rewards.shape, rewards.dtype) == ((3,), torch.float32)
        assert (dones.shape, dones.dtype) == ((3,), torch.bool)
        for row in dones.nonzero().flatten().tolist():
            ends[row].append(step)
            assert env.episode_length_buf[row] == 0
            assert not torch.equal(obs["policy"][row], extras["final_obs"]["policy"][row])
            assert not torch.equal(obs["policy"][row, -3:], first[row, -3:])  # a new goal
            assert torch.equal(obs["policy"][row, :18], obs["policy"][row, 18:36])
    assert ends == [[100], [70], [1, 101]]
    obs, _ = env.reset()
    assert env.episode_length_buf.tolist() == [0, 0, 0]
    assert torch.equal(obs["policy"], env.get_observations()["policy"])
    env.close()


def _trajectory(seed, num_envs, num_workers):
    env = SUITE.make("mw-push", num_envs, seed=seed, device="cpu", num_workers=num_workers)
    noise = torch.Generator().manual_seed(1)
    parts = [env.reset()[0]["policy"][:3]]
    env.episode_length_buf += 96
    for _ in range(6):
        obs, rewards, _, _ = env.step(torch.randn(num_envs, 4, generator=noise)[:1].expand(num_envs, 4))
        parts += [obs["policy"][:3], rewards[:3, None]]
    env.close()
    return torch.cat(parts, dim=1)


def test_the_seed_alone_decides():
    first = _trajectory(seed=5, num_envs=3, num_workers=1)
    assert torch.equal(first, _trajectory(seed=5, num_envs=3, num_workers=2))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, _trajectory(seed=6, num_envs=3, num_workers=1))


def test_a_seed_begins_anew():
    env = SUITE.make("mw-reach", 4, seed=3, device="cpu", num_workers=2)
    first = env.get_observations()["policy"].clone()
    env.reset()
    env.seed(3)
    assert torch.equal(env.reset()[0]["policy"], first)
    env.close()


def test_success_is_that_of_the_last_step(warm):
    """Drawer-close is solved by closing the drawer; pushing on keeps it solved. Doing nothing does not solve it."""
    env = SUITE.make("mw-drawer-close", 2, seed=0, device="cpu")
    policy = ENV_POLICY_MAP["drawer-close-v3"]()
    obs = env.get_observations()
    for step in range(100):
        actions = torch.zeros(2, 4)
        actions[0] = torch.tensor(policy.get_action(obs["policy"][0].double().numpy()))
        obs, _, dones, extras = env.step(actions)
        if step == 0:
            assert extras["success"].tolist() == [0, 0]
    assert dones.all()
    assert extras["success"].tolist() == [1, 0]
    env.close()


def test_versions_are_recorded(warm):
    env = SUITE.make("mw-reach", 1, seed=3, device="cpu")
    versions = [importlib.metadata.version(name) for name in ("metaworld", "mujoco")]
    assert env.cfg == MetaWorldCfg("mw-reach", 3, 1, 2, *versions)
    env.close()


def test_it_can_be_evaluated(warm):
    env = SUITE.make("mw-reach", 2, seed=0, device="cpu")
    result = evaluate(env, lambda obs: torch.zeros(len(obs), 4), 2)
    assert result["length_mean"] == 100
    assert result["termination_rate"] == 0
    assert result["success_rate"] == 0
    env.close()


# -- pool -------------------------------------------------------------------------------------------------------------


def _processes(env):
    return [worker._process for worker, _ in env._batch._shares]


def test_batches_share_workers_and_step_at_the_same_time(monkeypatch):
    """Two batches of a task on two workers: together as alone, in whatever order they are waited for."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    seeds, actions = (1, 2), torch.full((3, 4), 0.5)
    alone = []
    for seed in seeds:
        env = SUITE.make("mw-door-open", 3, seed=seed, device="cpu")
        alone.append([env.step(actions)[0]["policy"] for _ in range(3)])
        env.close()
    envs = [SUITE.make("mw-door-open", 3, seed=seed, device="cpu") for seed in seeds]
    assert len({process.pid for env in envs for process in _processes(env)}) == 2
    for step in range(3):
        for env in envs:
            env.step_async(actions)
        for env, expected in reversed(list(zip(envs, alone, strict=True))):
            assert torch.equal(env.step_wait()[0]["policy"], expected[step])
    envs[0].close()
    envs[1].step(actions)
    envs[1].close()


def test_small_batches_go_to_the_workers_with_least_to_do(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    envs = [SUITE.make("mw-reach", n, seed=0, device="cpu") for n in (1, 1, 3)]
    assert [worker.num_envs for worker in POOL._workers] in ([2, 3], [3, 2])
    for env in envs:
        env.close()


def test_a_worker_is_light_and_ends_with_its_last_environment():
    env = SUITE.make("mw-reach", 1, seed=0, device="cpu")
    process = _processes(env)[0]
    assert b"OMP_NUM_THREADS=1" in Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
    assert "torch" not in Path(f"/proc/{process.pid}/maps").read_text()
    env.close()
    env.close()
    assert process.poll() is not None
    with pytest.raises(M3POError, match="'mw-reach': closed"):
        env.step(torch.zeros(1, 4))


def test_a_step_is_not_begun_twice(warm):
    env = SUITE.make("mw-reach", 1, seed=0, device="cpu")
    env.step_async(torch.zeros(1, 4))
    with pytest.raises(M3POError, match="under way"):
        env.step_async(torch.zeros(1, 4))
    env.step_wait()
    env.close()


def test_an_exception_in_a_worker_arrives_with_its_traceback():
    """Meta-World refuses to step beyond its own 500 simulator steps."""
    env = SUITE.make("mw-reach", 1, seed=0, device="cpu")
    with pytest.raises(M3POError, match="mw-reach") as caught:
        for _ in range(251):
            env.episode_length_buf = torch.zeros(1, dtype=torch.long)
            env.step(torch.zeros(1, 4))
    assert "Traceback" in str(caught.value)
    assert "You must reset the env manually" in str(caught.value)
    with pytest.raises(M3POError, match="You must reset"):
        env.reset()
    env.close()


def test_a_killed_worker_is_an_error_for_all_that_need_it(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    envs = [SUITE.make(name, 2, seed=0, device="cpu") for name in ("mw-reach", "mw-push")]
    victim = _processes(envs[0])[1]
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    for env, task in zip(envs, ("mw-reach", "mw-push"), strict=True):
        with pytest.raises(M3POError, match=f"'{task}': its worker process {victim.pid} ended with exit code -9"):
            env.step(torch.zeros(2, 4))
    again = SUITE.make("mw-reach", 2, seed=0, device="cpu")
    assert victim.pid not in [process.pid for process in _processes(again)]
    again.step(torch.zeros(2, 4))
    for env in (*envs, again):
        env.close()


def test_what_cannot_be_created_leaves_nothing_behind():
    with pytest.raises(M3POError, match=r"'mw-nothing'.*\n(.*\n)*.*KeyError: 'nothing-v3'"):
        SUITE.make("mw-nothing", 1, seed=0, device="cpu")


def test_workers_end_when_the_parent_is_killed():
    code = (
        "from m3po_tasks.metaworld import SUITE\n"
        "env = SUITE.make('mw-reach', 2, seed=0, device='cpu', num_workers=2)\n"
        "print(*(worker._process.pid for worker, _ in env._batch._shares), flush=True)\n"
        "input()\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as parent:
        workers = [Path("/proc") / pid for pid in parent.stdout.readline().split()]
        assert len(workers) == 2
        parent.kill()
    deadline = time.monotonic() + 10
    while any(_runs(worker) for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _runs(process):
    """Whether a process exists and is no zombie; nobody may be there to reap an orphan."""
    try:
        return (process / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


# -- physics ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_meta_worlds_own_policies_solve_the_tasks():
    """Physics end to end: the scripted policies know Meta-World under the MuJoCo that it was written for.

    They were written for 500 simulator steps and to reach the goal once, so solved means at any step here.
    """
    num_envs, rates = 4, {}
    for task in SUITE.tasks():
        env = SUITE.make(task, num_envs, seed=0, device="cpu")
        policy = ENV_POLICY_MAP[tasks.metaworld_name(task)]()
        obs, solved = env.get_observations(), torch.zeros(num_envs)
        for _ in range(100):
            rows = obs["policy"].double().numpy()
            obs, _, _, extras = env.step(torch.tensor(np.array([policy.get_action(row) for row in rows])).float())
            solved = torch.maximum(solved, extras["success"])
        rates[task] = solved.mean().item()
        env.close()
    assert min(rates.values()) > 0, rates
    assert np.mean(list(rates.values())) > 0.93, rates
