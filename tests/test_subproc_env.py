"""Environments in worker processes: the same as in this process, at the same time, and their deaths."""

from __future__ import annotations

import copy
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from test_evaluation_worker import is_running, wait_until
from test_multi_task_env import flatten, random_actions, rows_of
from toy_tasks import ToyTask, echo

from m3po.envs.multi_task import MultiTaskVecEnv, TaskEnv
from m3po.envs.subproc_env import SubprocVecEnv, TaskEnvError

TOY = "toy_tasks:ToyTask"


@pytest.fixture
def start(tmp_path):
    """Start a worker with the toy environment; it is closed after the test."""
    started = []

    def start_env(name: str = "toy", factory: str = TOY, seed: int = 0, **arguments) -> SubprocVecEnv:
        started.append(SubprocVecEnv(name, factory, arguments, seed, tmp_path / f"{name}.log"))
        return started[-1]

    yield start_env
    for task_env in started:
        task_env.close()


def assert_equal(tensors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert tensors.keys() == expected.keys()
    for name, value in tensors.items():
        torch.testing.assert_close(value, expected[name].to(value.dtype), rtol=0, atol=0, equal_nan=True)


def test_is_the_same_as_in_this_process_and_results_outlive_the_next_step(start):
    env, twin = start(num_envs=5, dim=3, episode=9, seed=4).connect(), ToyTask(5, 3, 9, 4)
    assert (env.num_envs, env.num_actions, env.max_episode_length, env.device) == (5, 3, 9, "cpu")
    assert env.episode_length_buf.is_shared()
    twin.last_log, result, kept = twin.log, None, {}
    for step in range(40):
        if step == 20:
            env.episode_length_buf = twin.episode_length_buf = torch.tensor([8, 0, 8, 1, 2])
        if step == 30:
            assert torch.equal(env.reset()[0]["policy"], twin.reset()[0]["policy"])
        assert torch.equal(env.episode_length_buf, twin.episode_length_buf)
        assert torch.equal(env.get_observations()["policy"], twin.get_observations()["policy"])
        actions = random_actions(twin, step)
        previous, result, expected = result, env.step(actions), twin.step(actions)
        assert result[0]["policy"].is_shared()
        assert_equal(flatten(result), flatten(expected))
        if step not in (0, 30):  # a reset writes observations, too
            assert_equal(flatten(previous), kept)
        kept = {name: value.clone() for name, value in flatten(result).items()}
        # The log is passed on once, as means.
        is_new = expected[3]["log"] is not twin.last_log
        twin.last_log = expected[3]["log"]
        means = {key: torch.as_tensor(value).mean().item() for key, value in twin.last_log.items()}
        assert result[3].get("log", {}) == (means if is_new else {})
    env.close()
    assert_equal(flatten(result), kept)


def test_actions_belong_to_the_environment(start):
    env, twin = start(factory="toy_tasks:echo").connect(), echo()
    for step in range(4):
        actions = random_actions(twin, step)
        assert torch.equal(env.step(actions)[1], twin.step(actions.clone())[1])


def test_tasks_step_at_the_same_time(start):
    env = MultiTaskVecEnv([TaskEnv(name, start(name, sleep=0.2)) for name in ("a", "b")], "cpu")
    seconds = []
    for _ in range(3):  # the machine may be busy with something else
        begin = time.monotonic()
        env.step(torch.zeros(12, 2))
        seconds.append(time.monotonic() - begin)
    assert min(seconds) < 0.35


def test_a_construction_that_fails_is_named(start):
    envs = {"good": start("good"), "bad": start("bad", fail_at=0), "ugly": start("ugly", fail_at=0, failure="exit")}
    with pytest.raises(TaskEnvError, match=r"^task 'ugly': SystemExit: no physics today\n(.*\n)*.*toy_tasks\.py"):
        envs["ugly"].connect()
    with pytest.raises(TaskEnvError, match=r"^task 'bad': ZeroDivisionError: (.*\n)*.*toy_tasks\.py"):
        MultiTaskVecEnv([TaskEnv(name, env) for name, env in envs.items()], "cpu")
    assert not any(is_running(env._process.pid) for env in envs.values())


def test_an_exception_in_a_step_is_named(start):
    task_envs = [TaskEnv("good", start("good")), TaskEnv("bad", start("bad", fail_at=2))]
    env = MultiTaskVecEnv(task_envs, "cpu")
    env.step(torch.zeros(12, 2))
    with pytest.raises(TaskEnvError, match=r"^task 'bad': ZeroDivisionError: (.*\n)*.*toy_tasks\.py"):
        env.step(torch.zeros(12, 2))
    assert not any(is_running(task_env.env._process.pid) for task_env in task_envs)
    env.close()  # again, as a caller would


def test_a_killed_process_is_named_with_the_end_of_its_log(start):
    env = start(fail_at=1, failure="kill").connect()
    with pytest.raises(TaskEnvError, match=r"^task 'toy': its process was killed by SIGKILL\n") as caught:
        env.step(torch.zeros(6, 2))
    assert str(caught.value).endswith("toy.log:\nabout to kill")

    idle = start("idle").connect()
    os.kill(idle._process.pid, signal.SIGALRM)  # unlike SIGHUP, not ignored where the tests run under nohup
    idle._process.wait(60)
    with pytest.raises(TaskEnvError, match=r"^task 'idle': its process was killed by SIGALRM"):
        idle.step(torch.zeros(6, 2))


def test_what_a_cluster_sends_to_a_whole_job_is_left_to_the_parent(start):
    """It still needs the environments, to finish the iteration and save."""
    env = start().connect()
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        os.kill(env._process.pid, number)
    env.step(torch.zeros(env.num_envs, env.num_actions))
    assert env._process.poll() is None
    env.close()
    assert env._process.returncode == 0


@pytest.mark.parametrize("failure", ["raise", "kill"])
def test_a_restart_masks_the_invalid_step_and_spares_the_others(start, capsys, failure):
    fragile = start("fragile", num_envs=4, dim=1, fail_at=3, failure=failure)
    task_envs = [TaskEnv("good", start("good", dim=3)), TaskEnv("fragile", fragile), TaskEnv("here", ToyTask(dim=2))]
    env = MultiTaskVecEnv(task_envs, "cpu", restart_members=True)
    twins = [ToyTask(dim=3), None, copy.deepcopy(task_envs[2].env)]
    first = fragile._process.pid
    rows = rows_of(env, 1)
    for step in range(1, 6):
        if step == 4:  # the restarted one is as a new one with another seed
            twins[1] = ToyTask(4, 1, seed=1000)
        actions, last = random_actions(env, step), env.get_observations()["policy"].clone()
        obs, rewards, dones, extras = env.step(actions)
        for k, twin in enumerate(twins):
            if twin is not None:
                mine = rows_of(env, k)
                expected = twin.step(actions[mine, : env.action_dims[k]])
                assert torch.equal(obs["policy"][mine, : env.obs_dims[k]], expected[0]["policy"])
                assert torch.equal(rewards[mine], expected[1])
                assert torch.equal(dones[mine], expected[2].bool())
        assert ("invalid" in extras) == (step == 3)
        if step == 3:
            assert extras["invalid"].tolist() == [k == 1 for k in env.task_ids]
            assert not rewards[rows].any()
            assert dones[rows].all()
            assert extras["time_outs"][rows].all()
            assert torch.equal(extras["final_obs"]["policy"][rows], last[rows])
            assert torch.equal(obs["policy"][rows, :2], ToyTask(4, 1, seed=1000).state)
    output = capsys.readouterr().out
    reason = {"raise": "ZeroDivisionError: division by zero", "kill": "its process was killed by SIGKILL"}[failure]
    assert output == f"[m3po] restarting task 'fragile': {reason}\n"
    assert not is_running(first)


def test_a_task_that_keeps_dying_ends_the_run(start, capsys):
    fragile = start("fragile", fail_at=1, heals=False)
    env = MultiTaskVecEnv([TaskEnv("fragile", fragile)], "cpu", restart_members=True)
    for _ in range(2):
        assert env.step(torch.zeros(6, 2))[3]["invalid"].all()
    with pytest.raises(TaskEnvError, match=r"^task 'fragile': ZeroDivisionError: (.*\n)*.*toy_tasks\.py"):
        env.step(torch.zeros(6, 2))
    assert capsys.readouterr().out.count("restarting") == 2
    assert not is_running(fragile._process.pid)


def test_close_leaves_the_environment_and_no_process(start, tmp_path):
    marker = tmp_path / "marker"
    env = MultiTaskVecEnv([TaskEnv("a", start("a", "toy_tasks:in_context", marker=str(marker)))], "cpu")
    pid = env.task_envs[0].env._process.pid
    env.step(torch.zeros(6, 2))
    assert not marker.exists()
    env.close()
    assert marker.read_text() == "left"
    assert not is_running(pid)
    assert env.task_envs[0].env._process.returncode == 0


def test_ends_with_its_parent_even_in_a_step(run_script, tmp_path):
    # Without a guard for its main module, which a worker must not import again.
    script = tmp_path / "script.py"
    script.write_text(
        "import os, signal, sys, torch\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from m3po.envs.subproc_env import SubprocVecEnv\n"
        f"env = SubprocVecEnv('toy', {TOY!r}, {{'sleep': 1000}}, 0).connect()\n"
        "env.step_async(torch.zeros(6, 2))\n"
        "print(env._process.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n",
        encoding="utf-8",
    )
    result = run_script([script], timeout=60)
    assert result.rc == -signal.SIGKILL, result.stderr
    assert wait_until(lambda: not is_running(int(result.stdout)), 10)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_it_is_the_same_as_in_this_process(start):
    task_envs = [TaskEnv(name, start(name, "toy_tasks:on_gpu", dim=dim)) for name, dim in (("a", 2), ("b", 3))]
    env = MultiTaskVecEnv(task_envs, "cuda")
    twin = MultiTaskVecEnv([TaskEnv("a", ToyTask(dim=2)), TaskEnv("b", ToyTask(dim=3))], "cpu")
    for step in range(40):
        actions = random_actions(twin, step)
        result = env.step(actions.cuda())
        assert result[0]["policy"].is_cuda
        for name, value in flatten(twin.step(actions)).items():
            torch.testing.assert_close(flatten(result)[name].cpu(), value, equal_nan=True)
