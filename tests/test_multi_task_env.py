"""Several tasks as one batch: padding, masks and bookkeeping, with tasks in this process."""

from __future__ import annotations

import copy

import pytest
import torch
from rsl_rl.runners import OnPolicyRunner
from toy_env import runner_cfg
from toy_tasks import ToyTask

from m3po.envs.multi_task import MultiTaskVecEnv, TaskEnv, task_discount
from m3po.envs.padding import Padding
from m3po.envs.subproc_env import TaskEnvError
from m3po.errors import UserError

SIZES = {"small": {"num_envs": 3, "dim": 1}, "large": {"num_envs": 5, "dim": 4, "episode": 11}, "middle": {"dim": 2}}


def make_task_envs(**changes) -> list[TaskEnv]:
    """One of each size; ``changes`` go to all of them."""
    return [
        TaskEnv(name, ToyTask(**size, seed=seed, **changes), reports_success=True)
        for seed, (name, size) in enumerate(SIZES.items())
    ]


def random_actions(env, seed: int) -> torch.Tensor:
    return torch.randn(env.num_envs, env.num_actions, generator=torch.Generator().manual_seed(seed))


def rows_of(env, k: int) -> slice:
    start = sum(task_env.env.num_envs for task_env in env.task_envs[:k])
    return slice(start, start + env.task_envs[k].env.num_envs)


def flatten(result) -> dict[str, torch.Tensor]:
    """All tensors of a step's result."""
    obs, rewards, dones, extras = result
    extras = {name: value["policy"] if name == "final_obs" else value for name, value in extras.items()}
    extras.pop("log", None)
    return {"obs": obs["policy"], "rewards": rewards, "dones": dones, **extras}


@pytest.mark.parametrize("kernel", [False, True], ids=["copies", "kernel"])
def test_padding_is_that_of_a_loop(kernel):
    num_envs, dims = [3, 1, 4], [2, 5, 1]
    pad = Padding(num_envs, dims, "cpu", kernel)
    for seed in range(4):
        stream = torch.Generator().manual_seed(seed)
        parts = [torch.randn(n, dim, generator=stream) for n, dim in zip(num_envs, dims, strict=True)]
        rows = [row.tolist() + [0.0] * (5 - len(row)) for part in parts for row in part]
        groups = pad(parts)
        assert groups["policy"].tolist() == rows
        assert groups["task"].flatten().tolist() == [0, 0, 0, 1, 2, 2, 2, 2]


def test_what_is_known_of_the_tasks():
    task_envs = make_task_envs()
    env = MultiTaskVecEnv([TaskEnv("first", task_envs[0].env, (1.0, 5.0)), *task_envs[1:]], "cpu")
    assert (env.num_envs, env.num_actions, env.num_tasks) == (14, 4, 3)
    assert env.task_names == ["first", "large", "middle"]
    assert env.obs_dims == [2, 8, 4]
    assert env.action_dims == [1, 4, 2]
    assert env.episode_lengths == [7, 11, 7]
    assert env.score_ranges == [(1.0, 5.0), None, None]
    assert env.task_ids.tolist() == [0] * 3 + [1] * 5 + [2] * 6
    assert env.max_episode_length.tolist() == [7] * 3 + [11] * 5 + [7] * 6
    assert env.action_mask.tolist() == [[column < (1, 4, 2)[k] for column in range(4)] for k in env.task_ids]
    assert env.discounts.tolist() == pytest.approx([0.95] * 3)
    obs = env.get_observations()
    assert obs["policy"].shape == (14, 8)
    assert obs["task"].dtype == torch.int64
    assert obs["task"].flatten().tolist() == env.task_ids.tolist()


@pytest.mark.parametrize(
    ("length", "gamma"), [(5, 0.95), (100, 0.95), (125, 0.96), (500, 0.99), (1000, 0.995), (5000, 0.995)]
)
def test_discount(length, gamma):
    assert task_discount(length) == pytest.approx(gamma)


def test_a_task_is_the_same_alone_and_composed():
    env = MultiTaskVecEnv(make_task_envs(), "cpu")
    alone = [copy.deepcopy(task_env.env) for task_env in env.task_envs]
    ends = 0
    for step in range(30):
        actions = random_actions(env, step)
        obs, rewards, dones, extras = env.step(actions)
        for k, twin in enumerate(alone):
            rows, dim = rows_of(env, k), env.obs_dims[k]
            its_obs, its_rewards, its_dones, its_extras = twin.step(actions[rows, : env.action_dims[k]])
            for group, expected in ((obs, its_obs), (extras["final_obs"], its_extras["final_obs"])):
                assert torch.equal(group["policy"][rows, :dim], expected["policy"])
                assert not group["policy"][rows, dim:].any()
            assert torch.equal(rewards[rows], its_rewards)
            assert torch.equal(dones[rows], its_dones.bool())
            assert torch.equal(extras["time_outs"][rows], its_extras["time_outs"])
            torch.testing.assert_close(extras["success"][rows], its_extras["success"], rtol=0, atol=0, equal_nan=True)
            assert torch.equal(env.episode_length_buf[rows], twin.episode_length_buf)
        assert torch.equal(env.get_observations()["policy"], obs["policy"])
        ends += int(dones.sum())
    assert ends > 40
    assert not {"invalid", "final_obs_valid"} & extras.keys()


def test_actions_beyond_a_task_do_not_reach_it():
    first, second = (MultiTaskVecEnv(make_task_envs(), "cpu") for _ in range(2))
    for step in range(10):
        actions = random_actions(first, step)
        result = first.step(actions.masked_fill(~first.action_mask, torch.nan))
        for name, value in flatten(second.step(actions)).items():
            torch.testing.assert_close(flatten(result)[name], value, rtol=0, atol=0, equal_nan=True)


def test_results_outlive_the_next_step():
    env = MultiTaskVecEnv(make_task_envs(), "cpu")
    start = env.get_observations()["policy"]
    kept = start.clone()
    result = env.step(random_actions(env, 0))
    assert torch.equal(start, kept)
    for step in range(1, 6):
        tensors = flatten(result)
        before = {name: value.clone() for name, value in tensors.items()}
        result = env.step(random_actions(env, step))
        for name, value in tensors.items():
            torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)
        assert not torch.equal(result[0]["policy"], tensors["obs"])


def test_episode_lengths_reach_the_tasks():
    env = MultiTaskVecEnv(make_task_envs(), "cpu")
    lengths = torch.tensor([6] + [0] * 6 + [10] + [1] * 6)
    env.episode_length_buf = lengths
    assert torch.equal(env.episode_length_buf, lengths)
    _, _, dones, extras = env.step(torch.zeros(14, 4))
    assert extras["time_outs"].nonzero().flatten().tolist() == [0, 7]
    assert torch.equal(extras["time_outs"], dones)
    assert env.episode_length_buf.tolist() == [0] + [1] * 6 + [0] + [2] * 6
    assert lengths.tolist() == [6] + [0] * 6 + [10] + [1] * 6  # tasks that count in place would change it


def test_reset():
    env = MultiTaskVecEnv(make_task_envs(), "cpu")
    before = env.get_observations()["policy"]
    kept = before.clone()
    obs, extras = env.reset()
    assert extras == {}
    assert not env.episode_length_buf.any()
    assert torch.equal(before, kept)
    for k, task_env in enumerate(env.task_envs):
        assert torch.equal(obs["policy"][rows_of(env, k), : env.obs_dims[k]], task_env.env.state)


def test_what_tasks_do_not_deliver():
    silent = MultiTaskVecEnv([TaskEnv("silent", ToyTask(optional=()))], "cpu")
    silent.episode_length_buf = torch.tensor([6, 0, 6, 0, 0, 0])
    _, _, dones, extras = silent.step(torch.zeros(6, 2))
    assert extras.keys() == {"time_outs"}
    assert dones.tolist() == [True, False, True, False, False, False]
    assert not extras["time_outs"].any()  # nobody said so: they are terminations

    env = MultiTaskVecEnv([TaskEnv("silent", ToyTask(optional=())), *make_task_envs()[:1]], "cpu")
    env.episode_length_buf = torch.tensor([6, 0, 0, 0, 0, 0, 6, 0, 0])
    _, _, _, extras = env.step(torch.zeros(9, 2))
    assert extras["final_obs_valid"].tolist() == [False] + [True] * 8
    assert extras["success"][:6].isnan().all()


def test_a_log_is_passed_on_once():
    env = MultiTaskVecEnv(make_task_envs(), "cpu")
    env.episode_length_buf = torch.tensor([4, 0, 0] + [0] * 11)
    logs = [env.step(torch.zeros(14, 4))[3].get("log") for _ in range(6)]
    assert logs[:2] == [None, None]
    assert logs[2].keys() == {"small/Metrics/ended", "small/steps"}
    assert logs[2]["small/steps"] == 3.0
    assert logs[3:5] == [None, None]


def test_tasks_with_two_halves_step_at_the_same_time():
    events = []

    class Halves(ToyTask):
        steps_beside = True

        def step_async(self, actions):
            events.append("start")
            self.actions = actions

        def step_wait(self):
            events.append("wait")
            return ToyTask.step(self, self.actions)

    class Whole(ToyTask):
        def step(self, actions):
            events.append("step")
            return super().step(actions)

    env = MultiTaskVecEnv([TaskEnv(str(k), kind()) for k, kind in enumerate((Whole, Halves, Whole, Halves))], "cpu")
    twin = MultiTaskVecEnv([TaskEnv(str(k), ToyTask()) for k in range(4)], "cpu")
    actions = random_actions(env, 0)
    assert torch.equal(env.step(actions)[0]["policy"], twin.step(actions)[0]["policy"])
    assert events == ["start", "start", "step", "step", "wait", "wait"]


def test_a_failure_names_the_task_and_closes_all():
    task_envs = [*make_task_envs()[:2], TaskEnv("fragile", ToyTask(fail_at=2))]
    env = MultiTaskVecEnv(task_envs, "cpu", restart_members=True)  # only processes can be restarted
    env.step(random_actions(env, 0))
    with pytest.raises(TaskEnvError, match=r"^task 'fragile': ZeroDivisionError") as caught:
        env.step(random_actions(env, 1))
    assert "toy_tasks.py" in str(caught.value)
    assert all(task_env.env.closed for task_env in task_envs)


@pytest.mark.parametrize("names", [[], ["a", "b", "a"]])
def test_names_are_checked(names):
    task_envs = [TaskEnv(name, ToyTask()) for name in names]
    with pytest.raises(UserError, match="different names"):
        MultiTaskVecEnv(task_envs, "cpu")
    assert all(task_env.env.closed for task_env in task_envs)


def test_the_stock_runner_trains_on_it():
    torch.manual_seed(0)
    env = MultiTaskVecEnv(make_task_envs(), "cpu")
    algorithm = {"class_name": "PPO", "num_learning_epochs": 1, "num_mini_batches": 2}
    runner = OnPolicyRunner(env, runner_cfg() | {"algorithm": algorithm}, log_dir=None, device="cpu")
    before = [parameter.clone() for parameter in runner.alg.actor.parameters()]
    runner.learn(2)
    assert any(not torch.equal(*pair) for pair in zip(before, runner.alg.actor.parameters(), strict=True))
