"""NVIDIA's heterogeneous scene as several tasks: its own environment class and terms, on a toy physics in torch."""

from __future__ import annotations

import dataclasses
import importlib.util
import json

import pytest
import torch
from conftest import REPOSITORY
from toy_scene import make_scene

from isaaclab_m3po.contrib import heterogeneous
from isaaclab_m3po.contrib.heterogeneous import HeterogeneousVecEnv, scene_tasks
from m3po.algorithms.tasks import Tasks
from m3po.envs.multi_task import task_discount
from m3po.errors import M3POError, UserError
from m3po.evaluation import evaluate_policies
from m3po.runners import M3PORunner

pytestmark = pytest.mark.unit
TASK = "IsaacContrib-Multitask-Manipulation"
NAMES, HEADS, LENGTHS = ["lift", "cabinet", "reach"], [8, 8, 6], [360, 480, 720]
COLUMNS = dict(zip(NAMES, (slice(0, 8), slice(8, 16), slice(16, 22)), strict=True))


def make_env(**options):
    torch.manual_seed(0)
    scene = make_scene(**options)
    return HeterogeneousVecEnv(scene, scene_tasks(TASK))


def interleaved(weights, num_clones):
    return torch.arange(num_clones).numpy() % len(weights)


# -- observations and actions -----------------------------------------------------------------------------------------


def test_the_scene_says_what_its_tasks_are():
    env = make_env()
    assert (env.task_names, env.num_tasks, env.heads, env.episode_lengths) == (NAMES, 3, HEADS, LENGTHS)
    assert env.task_ids.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert env.discounts.tolist() == pytest.approx([task_discount(length) for length in LENGTHS])
    assert env.max_episode_length.tolist() == [LENGTHS[k] for k in env.task_ids]
    assert (env.num_actions, env.score_ranges) == (22, [None] * 3)
    for name, columns in COLUMNS.items():
        mask = env.action_mask[env.task_ids == NAMES.index(name)]
        assert mask[:, columns].all()
        assert mask.sum(1).unique().tolist() == [columns.stop - columns.start]
    tasks = Tasks.of(env, 0.9, "cpu")
    assert tasks.action_mask.sum(1).tolist() == HEADS
    assert torch.equal(tasks.discounts, env.discounts)


def test_observations_keep_the_one_hot_and_name_the_task():
    env = make_env()
    for obs in (env.get_observations(), env.reset()[0], env.step(torch.zeros(12, 22))[0]):
        assert obs["task"].squeeze(-1).tolist() == env.task_ids.tolist()
        assert obs["task"].dtype == torch.int64
        assert torch.equal(obs["policy"][:, :3], torch.nn.functional.one_hot(env.task_ids, 3).float())
    assert obs["policy"].shape == (12, 95)
    terms = env.unwrapped.observation_manager.active_terms["policy"]
    assert terms[0] == "task_id"
    assert env.obs_dims == [95] * 3


def test_the_mask_is_what_moves_the_robots():
    """Column by column: exactly the rows that have an action dimension feel it."""

    def targets(actions):
        torch.manual_seed(0)
        scene = make_scene()
        torch.manual_seed(1)
        scene.reset()
        scene.step(actions)
        robots = [scene.unwrapped.scene[name] for name in ("robot", "robot_1", "robot_2")]
        return [robot.target.clone() for robot in robots]

    env, still = make_env(), targets(torch.zeros(12, 22))
    for column in range(22):
        actions = torch.zeros(12, 22)
        actions[:, column] = -1.0
        moved = torch.cat([(a != b).any(1) for a, b in zip(targets(actions), still, strict=True)])
        assert torch.equal(moved, env.action_mask[:, column]), column


def test_masked_actions_never_act_and_never_show():
    """Garbage in other tasks' columns changes nothing; in the bare scene, it shows in the last actions."""
    actions, garbage, outcomes = 0.1 * torch.randn(5, 12, 22), torch.randn(5, 12, 22), []
    for scale in (0.0, 100.0):
        env = make_env()
        noisy = torch.where(env.action_mask, actions, scale * garbage)
        outcomes.append([env.step(a)[:3] for a in noisy])
        shown = make_scene().step(noisy[0])[0]["policy"][:, -22:]
        assert bool((shown[~env.action_mask] != 0).any()) == (scale > 0)
    for (obs, rewards, dones), (obs_, rewards_, dones_) in zip(*outcomes, strict=True):
        assert torch.equal(obs["policy"], obs_["policy"])
        assert torch.equal(rewards, rewards_)
        assert torch.equal(dones, dones_)
        assert (obs["policy"][:, -22:][~env.action_mask] == 0).all()


def test_each_task_times_out_at_its_own_length():
    env = make_env()
    env.episode_length_buf = env.max_episode_length - 1 - torch.tensor([0, 1, 1, 1] * 3)
    obs, _, dones, extras = env.step(torch.zeros(12, 22))
    first = torch.tensor([True, False, False, False] * 3)
    assert torch.equal(dones, first)
    assert torch.equal(extras["time_outs"], first)
    final = extras["final_obs"]
    assert torch.equal(final["task"], obs["task"])
    assert (final["policy"][first] != obs["policy"][first]).any(1).all()  # before and after the reset
    assert env.step(torch.zeros(12, 22))[2].sum() == 9


# -- success ----------------------------------------------------------------------------------------------------------


def reach_the_goal(env, rows):
    """Put the goals of rows of the task ``reach`` where their hands are."""
    robot = env.unwrapped.scene["robot_2"].data.body_link_pose_w.torch[:, 0]
    root = env.unwrapped.scene["robot_2"].state["root_pose"]
    command = env.unwrapped.command_manager.get_command("reach_pose")
    command[rows, :3] = (robot - root)[torch.tensor(rows) - 8, :3]
    command[rows, 3:] = torch.tensor([0.0, 0.0, 0.0, 1.0])


def put_at_goal(env, rows):
    """Put the cubes of rows of the task ``lift`` where they shall go."""
    scene = env.unwrapped.scene
    goal = scene["robot"].state["root_pose"][:, :3] + env.unwrapped.command_manager.get_command("lift_pose")[:4, :3]
    scene["object"].state["root_pose"][rows, :3] = goal[rows]


def open_drawers(env, rows):
    """Open the drawers of rows of the task ``cabinet``, for good."""
    cabinet = env.unwrapped.scene["cabinet"]
    cabinet.target[torch.tensor(rows) - 4, 3] = 0.39
    cabinet.state["joint_pos"][torch.tensor(rows) - 4, 3] = 0.39


def test_success_is_known_of_each_episode():
    env, still = make_env(), torch.zeros(12, 22)
    assert env.step(still)[3]["success"].isnan().all()
    put_at_goal(env, [1])
    open_drawers(env, [4, 5])
    env.step(still)
    env.unwrapped.scene["object"].state["root_pose"][1, 2] = 0.05  # it falls: what counts is that it was there
    env.episode_length_buf = torch.where(env.task_ids < 2, env.max_episode_length - 1, 0)
    reach_the_goal(env, [10])
    _, _, dones, extras = env.step(still)
    assert dones.tolist() == [True] * 8 + [False, False, True, False]
    assert extras["time_outs"].tolist() == [True] * 8 + [False] * 4
    success = extras["success"]
    assert success[dones].tolist() == [0, 1, 0, 0, 1, 1, 0, 0, 1]
    assert success[~dones].isnan().all()
    assert extras["log"]["Metrics/lift_success_rate"] == 0.25  # the scene's own
    assert "success" not in env.unwrapped.extras


def test_a_success_in_the_last_step_counts():
    env = make_env()
    open_drawers(env, [4])
    env.step(torch.zeros(12, 22))
    open_drawers(env, [5])
    env.episode_length_buf = torch.where(env.task_ids == 1, env.max_episode_length - 1, 0)
    _, _, dones, extras = env.step(torch.zeros(12, 22))
    assert dones.tolist() == [False] * 4 + [True] * 4 + [False] * 4
    assert extras["success"][dones].tolist() == pytest.approx([1.0, 1 / 3, 1 / 3, 1 / 3])
    assert extras["success"][dones].mean() == extras["log"]["Metrics/cabinet_success_rate"]


def test_two_policies_in_one_evaluation_keep_their_own_success():
    env = make_env(seconds=(0.1, 0.15, 0.2))
    assert env.episode_lengths == [6, 9, 12]
    assert env.discounts[0] == pytest.approx(task_discount(360))  # the task's, whatever is watched
    calls = []

    def opening(obs):
        if len(calls) == 0:
            open_drawers(env, [4, 5])
        calls.append(obs["task"].squeeze(-1).tolist())
        return torch.zeros(len(obs), 22)

    results = evaluate_policies(env, {"opens": opening, "idles": lambda obs: torch.zeros(len(obs), 22)}, 2)
    assert calls[0] == [0, 0, 1, 1, 2, 2]
    assert results["opens"]["tasks"]["cabinet"]["success_rate"] == 1.0
    assert results["idles"]["tasks"]["cabinet"]["success_rate"] == 0.0
    assert results["idles"]["tasks"]["lift"]["length_mean"] == 6
    assert results["opens"]["score_mean"] == pytest.approx(1 / 3)


# -- learning ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def registry(monkeypatch):
    """The registry with M3PO's agents, for the CPU."""
    import gymnasium as gym
    import isaaclab_tasks  # noqa: F401

    from isaaclab_m3po import agents, registration

    monkeypatch.setattr(agents, "_device", "cpu")
    registration.attach()
    heterogeneous.attach(TASK)
    return gym.registry


def agent(key, **changes):
    """A registered agent as a dictionary, with little to do."""
    from isaaclab_rl.rsl_rl import handle_deprecated_rsl_rl_cfg
    from isaaclab_tasks.utils.parse_cfg import load_cfg_from_registry

    cfg = load_cfg_from_registry(TASK, key)
    values = handle_deprecated_rsl_rl_cfg(cfg, "5.5.1").to_dict() | {"num_steps_per_env": 8, "device": "cpu"}
    for name in ("actor", "critic"):
        values[name]["hidden_dims"] = [32]
    return values | changes


@pytest.mark.parametrize("clone_strategy", [None, interleaved])
def test_m3po_trains_the_scene(registry, tmp_path, clone_strategy):
    env = make_env(seconds=(0.1, 0.1, 0.1), clone_strategy=clone_strategy)
    assert agent("m3po_paper_cfg_entry_point")["actor"]["class_name"] == "MLPModel"
    cfg = agent("m3po_cfg_entry_point", save_interval=1, task=TASK)
    assert cfg["actor"]["class_name"] == cfg["critic"]["class_name"] == "MLPModel"
    assert cfg["algorithm"]["world_model"]["task_embedding_dim"] == 16
    # without the gradient's gate, the whole share acts by plans from the first step on
    cfg["algorithm"]["planner"] |= {"planned_fraction": 0.5, "max_learning_kl": 0.0, "num_samples": 8, "num_elites": 4}
    cfg["algorithm"]["world_model"] |= {"steps_per_iteration": 2, "batch_size": 32}
    if clone_strategy:
        assert env.task_ids.tolist() == [0, 1, 2] * 4
    rewards = []
    step = env.step

    def step_and_keep(actions):
        result = step(actions)
        rewards.append(result[1].clone())  # the scene has one buffer for them
        return result

    env.step = step_and_keep
    runner = M3PORunner(env, cfg, str(tmp_path), "cpu")
    runner.learn(1)
    storage, mask = runner.alg.storage, env.action_mask
    for field in (storage.actions, storage.mean, storage.plan_mean):
        assert (field[:, ~mask] == 0).all()
        assert (field[:, mask] != 0).all()
    assert storage.planned.any(0)[env.task_ids == 2].sum() == 2  # half of each task
    assert torch.equal(runner.alg.model.obs_normalizer.mean[:, :3].round(), torch.eye(3))
    collected = torch.stack(rewards)
    lines = (tmp_path / "tasks.csv").read_text(encoding="utf-8").splitlines()
    table = [dict(zip(lines[0].split(","), line.split(","), strict=True)) for line in lines[1:]]
    assert [row["task"] for row in table] == NAMES
    for k, row in enumerate(table):
        assert float(row["step_reward"]) == pytest.approx(collected[:, env.task_ids == k].mean().item(), rel=1e-4)
        assert float(row["episodes"]) == 4
        assert float(row["success"]) == 0.0
    again = M3PORunner(make_env(clone_strategy=clone_strategy), agent("m3po_cfg_entry_point", task=TASK), None, "cpu")
    again.load(str(tmp_path / "model_last.pt"), load_cfg={"actor": True})
    actions = again.inference_policy()(again.env.get_observations())
    assert (actions[~mask] == 0).all()


def test_the_scenes_own_agent_trains_unchanged(tmp_path):
    """NVIDIA's task-headed PPO checks the one-hot itself, and acts within the mask on its own."""
    env = make_env(seconds=(0.1, 0.1, 0.1))
    runner = M3PORunner(env, agent("rsl_rl_cfg_entry_point", save_interval=1, task=TASK), str(tmp_path), "cpu")
    runner.learn(1)
    actions = runner.alg.get_policy()(env.get_observations(), stochastic_output=True)
    assert torch.equal(actions != 0, env.action_mask)
    assert "cabinet" in (tmp_path / "tasks.csv").read_text(encoding="utf-8")


def test_other_tasks_keep_their_agents_and_environments(registry):
    before = dict(registry["Isaac-Ant"].kwargs)
    heterogeneous.attach("Isaac-Ant")
    env = object()
    assert registry["Isaac-Ant"].kwargs == before
    assert heterogeneous.per_task(env, "Isaac-Ant") is env
    assert heterogeneous.task_names("Isaac-Ant") is None
    assert heterogeneous.task_names(TASK) == NAMES


# -- what is refused --------------------------------------------------------------------------------------------------


def test_another_layout_is_refused():
    tasks = scene_tasks(TASK)
    with pytest.raises(M3POError, match=r"columns 1 to 3 .*'policy' are not the one-hot of the tasks lift, cabinet"):
        HeterogeneousVecEnv(make_scene(), dataclasses.replace(tasks, one_hot=slice(1, 4)))
    with pytest.raises(M3POError, match=r"\[8, 8\] do not add up to its 22 actions"):
        HeterogeneousVecEnv(make_scene(), dataclasses.replace(tasks, heads=[8, 8]))


def test_a_task_without_environments_or_time_limit_is_refused():
    with pytest.raises(UserError, match="no environment of the scene has the task cabinet; use more"):
        make_env(num_envs=2)
    scene = make_scene()
    scene.cfg.terminations.time_out = None
    with pytest.raises(UserError, match=r"keep env\.terminations\.time_out"):
        HeterogeneousVecEnv(scene, scene_tasks(TASK))


def test_rows_that_change_their_task_are_refused():
    env = make_env()
    env.task_ids = env.task_ids.flip(0)
    with pytest.raises(M3POError, match="has changed which environment has which task"):
        env.reset()


# -- the command line -------------------------------------------------------------------------------------------------

COMMANDS = """
import contextlib, sys
from types import SimpleNamespace

from isaaclab_m3po.assets import prepare_assets
prepare_assets("auto", TASK)
import isaaclab.app
import isaaclab_rl.entrypoints.common as common

sys.path.insert(0, TESTS)
import toy_scene

def create(task, cfg, *_, **__):
    cfg.terminations.time_out.params["episode_lengths_s"] = (0.1, 0.1, 0.1)
    return toy_scene.simulate(cfg)

isaaclab.app.launch_simulation = lambda *_: contextlib.nullcontext()
isaaclab.app.validate_launch = lambda *_: (SimpleNamespace(has_ovphysx_physics=False), [])
common.create_isaaclab_env, common.close_env = create, lambda env: None

from m3po.cli import play as play_m3po, train as train_m3po
task = ["--task", TASK, "--num_envs", "12", "--device", "cpu", "--log_root", LOGS]
small = ["agent.num_steps_per_env=8", "agent.actor.hidden_dims=[32]", "agent.algorithm.world_model.batch_size=32"]
train = [*task, *small, "--max_iterations", "1", "--eval_interval", "0"]
codes = [train_m3po.run(train), train_m3po.run([*train, "--checkpoint", "latest"])]
codes.append(play_m3po.run([*task, "--train_env_cfg", "--policy", "planner", "--output", RESULT]))
codes.append(train_m3po.run([*train[:8], "--algo", "ppo", *train[-4:]]))
print("codes", codes)
"""


def test_the_command_line_trains_resumes_and_plays(run_script, tmp_path):
    """``launch`` knows the scene: only the start of Isaac Sim is replaced."""
    result = tmp_path / "played.json"
    values = {"TASK": TASK, "TESTS": str(REPOSITORY / "tests"), "LOGS": str(tmp_path), "RESULT": str(result)}
    head = "".join(f"{name} = {value!r}\n" for name, value in values.items())
    rc, out, err = run_script(["-c", head + COMMANDS])
    assert rc == 0, err
    assert "codes [0, 0, 0, 0]" in out, out + err
    sizes = "lift: 4 environments, 8 actions, 6 steps; cabinet: 4 environments, 8 actions, 6 steps; reach: 4 env"
    assert out.count(f"[m3po] one scene of 3 tasks ({sizes}") == 4
    assert list(json.loads(result.read_text(encoding="utf-8"))["tasks"]) == NAMES


@pytest.mark.skipif(importlib.util.find_spec("isaacsim") is not None, reason="Isaac Sim is installed")
def test_without_isaac_sim_the_scene_is_refused_in_one_line(run_script):
    rc, _, err = run_script(["scripts/train.py", "--task", TASK, "--num_envs", "6", "--device", "cpu"])
    assert rc == 2
    assert err.splitlines()[-1] == (
        "error: this run needs Isaac Sim, which is not installed, for: Isaac Sim PhysX physics (`PhysxCfg`)."
    )
