"""Curricula: a checkpoint says how hard its task was, and whoever loads it sees the task as hard."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from toy_env import PointEnv, runner_cfg

from isaaclab_m3po.vec_env import IsaacVecEnv
from m3po.envs.multi_task import MultiTaskVecEnv, TaskEnv
from m3po.runners import M3PORunner
from m3po.runners.checkpoint import read_checkpoint


class Hardening(PointEnv):
    """Falls ever closer to the origin, the more steps were taken."""

    steps = 0

    def step(self, actions):
        self.steps += 1
        self.edge = 3.0 / (1.0 + self.steps)
        return super().step(actions)

    def curriculum_state(self):
        return {"steps": self.steps}

    def load_curriculum_state(self, state):
        self.steps = state["steps"]


def runner_of(env) -> M3PORunner:
    return M3PORunner(env, runner_cfg() | {"algo": "m3po", "task": "toy"}, None, "cpu")


def test_a_checkpoint_carries_the_curriculum_to_any_number_of_environments(tmp_path):
    runner = runner_of(Hardening(8))
    runner.learn(2)
    path = str(tmp_path / "model.pt")
    runner.save(path)
    assert read_checkpoint(path)["curriculum"] == {"steps": 16}
    other = runner_of(Hardening(3))
    for _ in range(2):  # the same each time it is loaded
        other.load(path, load_cfg={"actor": True})
        assert other.env.steps == 16
        other.env.step(torch.zeros(3, 2))


def test_an_environment_without_curricula_has_none(tmp_path):
    runner, path = runner_of(PointEnv(4)), str(tmp_path / "model.pt")
    runner.save(path)
    assert read_checkpoint(path)["curriculum"] is None
    runner.load(path)


def test_tasks_have_their_own():
    hard, plain = Hardening(4), PointEnv(4)
    env = MultiTaskVecEnv([TaskEnv("hard", hard, None, False), TaskEnv("plain", plain, None, False)], "cpu")
    hard.steps = 7
    state = env.curriculum_state()
    assert state == [{"steps": 7}, None]
    hard.steps = 0
    env.load_curriculum_state(state)
    assert hard.steps == 7


def isaac_env(levels: int, upper: float = 1.0) -> IsaacVecEnv:
    """As much of an environment of Isaac Lab as curricula touch."""
    terrain = SimpleNamespace(
        terrain_levels=torch.zeros(levels, dtype=torch.long),
        terrain_types=torch.zeros(levels, dtype=torch.long),
        terrain_origins=torch.arange(10.0).view(10, 1, 1).expand(10, 1, 3).clone(),
        env_origins=torch.zeros(levels, 3),
    )
    term = SimpleNamespace(cfg=SimpleNamespace(ranges=SimpleNamespace(lin_vel_x=(-1.0, upper), kind="uniform")))
    commands = SimpleNamespace(active_terms=["velocity"], get_term=lambda name: term)
    raw = SimpleNamespace(common_step_counter=0, scene=SimpleNamespace(terrain=terrain), command_manager=commands)
    env = IsaacVecEnv.__new__(IsaacVecEnv)
    env.env = SimpleNamespace(unwrapped=raw)
    return env


@pytest.mark.parametrize("count", [2, 4, 8])
def test_counters_levels_and_command_ranges_of_isaac_lab(count):
    trained, other = isaac_env(4, upper=2.5), isaac_env(count)
    trained.unwrapped.common_step_counter = 1234
    trained.unwrapped.scene.terrain.terrain_levels[:] = torch.tensor([3, 0, 9, 5])
    other.load_curriculum_state(trained.curriculum_state())
    raw = other.unwrapped
    assert raw.common_step_counter == 1234
    expected = {2: [0, 5], 4: [3, 0, 9, 5], 8: [0, 0, 3, 3, 5, 5, 9, 9]}[count]
    assert raw.scene.terrain.terrain_levels.tolist() == expected
    assert raw.scene.terrain.env_origins[:, 0].tolist() == [float(level) for level in expected]
    assert raw.command_manager.get_term("velocity").cfg.ranges.lin_vel_x == (-1.0, 2.5)
