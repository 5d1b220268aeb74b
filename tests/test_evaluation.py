"""Evaluation against hand-computed numbers on a scripted environment."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from rsl_rl.env import VecEnv
from tensordict import TensorDict

from m3po.envs.multi_task import MultiTaskVecEnv, TaskEnv
from m3po.errors import UserError
from m3po.evaluation import CHECK_INTERVAL, evaluate, evaluate_policies

pytestmark = pytest.mark.unit


Success = Callable[[torch.Tensor], torch.Tensor]


def survival(time_outs: torch.Tensor) -> torch.Tensor:
    return time_outs


def goal(time_outs: torch.Tensor) -> torch.Tensor:
    """A task whose episodes end when the goal is reached."""
    return ~time_outs


class ScriptedEnv(VecEnv):
    """Environment i ends its k-th episode after ``script[i][k]`` steps (cyclic); the reward is the action.

    A negative length means a true termination, a positive one a time-out. Success is reported the way Isaac Lab does:
    one mean over the environments that reset, in a dictionary that stays until the next reset. ``success`` maps the
    time-outs of the environments that reset to their successes.
    """

    def __init__(self, script: list[list[int]], success: Success | None = None, finite_horizon: bool = False) -> None:
        self.script, self.success, self.finite_horizon = script, success, finite_horizon
        self.num_envs, self.num_actions, self.device, self.cfg = len(script), 1, "cpu", {}
        self.max_episode_length = max(abs(length) for lengths in script for length in lengths)
        self.num_resets = 0
        self.episode_length_buf = torch.full((self.num_envs,), 7)
        self.log: dict = {}

    def reset(self) -> tuple[TensorDict, dict]:
        self.episode_length_buf = torch.zeros(self.num_envs, dtype=torch.long)
        self.episode = [0] * self.num_envs
        self.num_resets += 1
        return self.get_observations(), {}

    def get_observations(self) -> TensorDict:
        index = torch.arange(self.num_envs).float().unsqueeze(-1)
        return TensorDict({"policy": index}, batch_size=[self.num_envs])

    def step(self, actions: torch.Tensor) -> tuple[TensorDict, torch.Tensor, torch.Tensor, dict]:
        self.episode_length_buf += 1
        length = torch.tensor([row[k % len(row)] for row, k in zip(self.script, self.episode, strict=True)])
        dones = self.episode_length_buf >= length.abs()
        time_outs = dones & (length > 0)
        for i in dones.nonzero().flatten().tolist():
            self.episode[i] += 1
            self.episode_length_buf[i] = 0
        if dones.any() and self.success is not None:
            success = self.success(time_outs[dones]).float().mean()
            self.log = {"Episode_Reward/success_rate": 99.0, "Metrics/success_rate": success}
        extras = {"log": self.log} if self.finite_horizon else {"log": self.log, "time_outs": time_outs}
        return self.get_observations(), actions[:, 0], dones.long(), extras


def ones(obs: TensorDict) -> torch.Tensor:
    """Act 1 everywhere, so that an episode's return is its length."""
    return torch.ones(obs.batch_size[0], 1)


def test_short_episodes_are_not_over_represented() -> None:
    """One environment always terminates after 1 step, the other always survives 10: the mean is that of both."""
    result = evaluate(ScriptedEnv([[-1], [10]]), ones, num_episodes=4)
    assert result["num_episodes"] == 4
    assert sorted(result["returns"]) == [1.0, 1.0, 10.0, 10.0]
    assert result["return_mean"] == 5.5  # (2 * 1 + 2 * 10) / 4; the first 4 to finish would give 1.0
    assert result["return_std"] == 4.5  # every episode is 4.5 away from the mean
    assert (result["length_mean"], result["length_std"]) == (5.5, 4.5)
    assert result["termination_rate"] == 0.5
    assert result["success_rate"] is None


def test_remainder_goes_to_the_first_environments() -> None:
    """Five episodes on three environments: two, two and one, whatever their lengths."""
    result = evaluate(ScriptedEnv([[-3, 4], [5, -6], [-1]]), ones, num_episodes=5)
    assert result["returns"] == [3.0, 4.0, 5.0, 6.0, 1.0]
    assert result["return_mean"] == pytest.approx(19 / 5)
    assert result["termination_rate"] == pytest.approx(3 / 5)


def test_fewer_episodes_than_environments() -> None:
    """Environments without a share are stepped but not counted."""
    result = evaluate(ScriptedEnv([[4], [-2], [-2]]), ones, num_episodes=1)
    assert result["returns"] == [4.0]
    assert result["termination_rate"] == 0.0


def test_success_belongs_to_the_step_that_reports_it() -> None:
    """The stale log must not be read again, and reward terms of the same name are not success."""
    # Env 0 reaches the goal at step 2 and times out at 6; env 1 times out at 4 and reaches the goal at 6.
    # Reports: step 2: 1, step 4: 0, step 6: the mean 0.5 for both. Successes: (1 + 0 + 0.5 + 0.5) / 4.
    result = evaluate(ScriptedEnv([[-2, 4], [4, -2]], goal), ones, num_episodes=4)
    assert result["success_rate"] == 0.5
    assert evaluate(ScriptedEnv([[-2], [-3]], goal), ones, num_episodes=4)["success_rate"] == 1.0


def test_survival_is_known_for_each_episode() -> None:
    """One that terminates in its second, uncounted episode must not spoil the success of one that survives."""
    # Step 4: the time-out of env 0 and the second termination of env 1, mean 0.5.
    env = ScriptedEnv([[4], [-2, -2]], survival)
    assert evaluate(env, ones, num_episodes=2)["success_rate"] == 0.5  # (1 + 0) / 2, not (0.5 + 0) / 2


def test_without_time_out_flags_every_end_is_a_termination() -> None:
    """Tasks with a finite horizon report no time-outs."""
    assert evaluate(ScriptedEnv([[3]], finite_horizon=True), ones, num_episodes=2)["termination_rate"] == 1.0


def test_policies_act_on_their_own_slice() -> None:
    """Each policy sees and steers its own environments only; rewards and ends are attributed to it."""
    env = ScriptedEnv([[2], [4], [-3], [-5]], survival)
    seen = {}

    def first(obs: TensorDict) -> torch.Tensor:
        seen["first"] = obs["policy"].flatten().tolist()
        return ones(obs)

    def second(obs: TensorDict) -> torch.Tensor:
        seen["second"] = obs["policy"].flatten().tolist()
        return 10 * ones(obs)

    results = evaluate_policies(env, {"first": first, "second": second}, num_episodes=2)
    assert seen == {"first": [0.0, 1.0], "second": [2.0, 3.0]}
    assert results["first"]["returns"] == [2.0, 4.0]
    assert results["second"]["returns"] == [30.0, 50.0]
    assert (results["first"]["termination_rate"], results["second"]["termination_rate"]) == (0.0, 1.0)
    assert (results["first"]["success_rate"], results["second"]["success_rate"]) == (1.0, 0.0)


def test_success_of_several_policies_that_end_together() -> None:
    """Survival, and a mean of 0 or 1, can be attributed; any other mean of episodes of several policies cannot."""

    def success(env: ScriptedEnv) -> list[float | None]:
        return [result["success_rate"] for result in evaluate_policies(env, {"a": ones, "b": ones}, 1).values()]

    assert success(ScriptedEnv([[4], [-4]], survival)) == [1.0, 0.0]
    assert success(ScriptedEnv([[4], [-4]], lambda time_outs: torch.full_like(time_outs, 1.0))) == [1.0, 1.0]
    # Step 2 shows that success is not survival. In step 4 one of two succeeds, and nobody says which.
    assert success(ScriptedEnv([[4], [-2, -2]], goal)) == [None, 1.0]


def test_starts_from_a_reset_calls_back_every_step_and_resets_memory() -> None:
    """The reset comes first; the hook runs once a step; a policy with a memory hears of every episode's end."""
    env = ScriptedEnv([[2], [3]])
    steps = []

    class WithMemory:
        def __init__(self) -> None:
            self.dones: list[list[bool]] = []

        def __call__(self, obs: TensorDict) -> torch.Tensor:
            return ones(obs)

        def reset(self, dones: torch.Tensor) -> None:
            self.dones.append(dones.bool().tolist())

    policy = WithMemory()
    evaluate(env, policy, num_episodes=2, on_step=lambda: steps.append(env.num_resets))
    assert set(steps) == {1}
    assert len(steps) <= CHECK_INTERVAL
    assert policy.dones[:4] == [[True, True], [False, False], [True, False], [False, True]]


def test_bad_requests() -> None:
    """Impossible requests are refused."""
    with pytest.raises(UserError, match="at least 1, got 0"):
        evaluate(ScriptedEnv([[2]]), ones, num_episodes=0)
    with pytest.raises(UserError, match="2 policies need at least as many environments, got 1"):
        evaluate_policies(ScriptedEnv([[2]]), {"a": ones, "b": ones}, 1)


def test_an_episode_that_goes_on_ends_at_the_time_limit() -> None:
    """A task that ignores its own time limit cannot hang an evaluation: what it has by then counts."""
    env = ScriptedEnv([[50], [3, 50]])
    env.max_episode_length = 10
    result = evaluate(env, ones, num_episodes=4)
    assert sorted(result["returns"]) == [3.0, 11.0, 11.0, 11.0]
    assert (result["num_episodes"], result["termination_rate"]) == (4, 0.0)


def test_success_of_each_of_several_tasks() -> None:
    """Every task's own log says what success means there; one without says nothing, and has no score."""
    task_envs = {
        "balance": ScriptedEnv([[4], [-4]], survival),
        "reach": ScriptedEnv([[5], [-2], [-3]], goal),
        "walk": ScriptedEnv([[3], [-3]]),
    }
    env = MultiTaskVecEnv([TaskEnv(name, task_env) for name, task_env in task_envs.items()], "cpu")
    tasks = evaluate(env, ones, num_episodes=3)["tasks"]
    assert {name: task["success_rate"] for name, task in tasks.items()} == {
        "balance": pytest.approx(2 / 3),
        "reach": pytest.approx(2 / 3),
        "walk": None,
    }
    assert tasks["reach"]["score"] == tasks["reach"]["success_rate"]
    assert "score" not in tasks["walk"]
    assert tasks["walk"]["termination_rate"] == pytest.approx(1 / 3)
