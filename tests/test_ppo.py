"""``--algo ppo`` is rsl_rl's PPO, also for tasks of suites and for several tasks at once."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from rsl_rl import algorithms
from rsl_rl.models import MLPModel
from test_task_transfer import SMALL, PointSuite
from toy_env import PointEnv

from m3po.baselines.ppo import PPO, check_ppo_cfg
from m3po.cli import play, suite_job
from m3po.cli.train import run
from m3po.envs import suite
from m3po.envs.multi_task import MultiTaskVecEnv, TaskEnv, task_discount
from m3po.errors import CheckpointError, UserError
from m3po.evaluation import evaluate
from m3po.evaluation_process import policies_of
from m3po.models.task_policy import TaskMLPModel
from m3po.presets import ppo_runner_cfg
from m3po.runners import M3PORunner
from m3po.runners.task_transfer import train_embedding_only

pytestmark = pytest.mark.unit


def make_job(*argv: str) -> suite_job.SuiteJob:
    return suite_job.make_job(*argv, "--algo", "ppo", "--device", "cpu")


def points(*dims: int, num_envs: int = 8) -> MultiTaskVecEnv:
    """Points in spaces of different dimensions."""
    task_envs = [
        TaskEnv(f"point-{dim}", PointEnv(num_envs, dim=dim, seed=k), (-20.0, 0.0)) for k, dim in enumerate(dims)
    ]
    return MultiTaskVecEnv(task_envs, "cpu")


def runner(env: MultiTaskVecEnv | PointEnv, log_dir: Path | None = None, **changes) -> M3PORunner:
    """A runner as a suite's command line would build it, with small networks."""
    torch.manual_seed(0)
    several = isinstance(env, MultiTaskVecEnv)
    cfg = ppo_runner_cfg(several, "cpu")
    for name in ("actor", "critic"):
        cfg[name] |= {"hidden_dims": [32, 32]}
    cfg["algorithm"] |= {"class_name": "m3po.baselines.ppo:PPO" if several else "PPO", "gamma": 0.95} | changes
    tasks = ",".join(getattr(env, "task_names", ["point"]))
    return M3PORunner(env, cfg | {"seed": 1, "algo": "ppo", "task": tasks}, log_dir and str(log_dir), "cpu")


def rollout(agent: M3PORunner) -> algorithms.PPO:
    """Collect a rollout, as the runner does."""
    alg, obs = agent.alg, agent.env.get_observations()
    with torch.inference_mode():
        for _ in range(16):
            obs, rewards, dones, extras = agent.env.step(alg.act(obs))
            alg.process_env_step(obs, rewards, dones, extras)
        alg.compute_returns(obs)
    return alg


# -- what is built ----------------------------------------------------------------------------------------------------


def test_a_single_task_is_trained_by_rsl_rls_own_class():
    alg = runner(PointEnv(8)).alg
    assert type(alg) is algorithms.PPO
    assert type(alg.actor) is type(alg.critic) is MLPModel


def test_of_several_tasks_only_the_networks_are_ours():
    alg = runner(points(1, 3)).alg
    assert isinstance(alg, algorithms.PPO)
    assert [name for name in vars(PPO) if not name.startswith("__")] == ["construct_algorithm"]
    assert isinstance(alg.actor, TaskMLPModel) and isinstance(alg.critic, TaskMLPModel)
    assert alg.actor.task_embedding.shape == (2, 16)
    assert alg.actor.task_embedding is not alg.critic.task_embedding
    parameters = [p for group in alg.optimizer.param_groups for p in group["params"]]
    assert len({id(p) for p in parameters}) == len(parameters)


def test_the_command_line_asks_for_it():
    alone, several = make_job("--task", "walker-walk"), make_job("--task", "walker-walk,cup-catch")
    assert [job.train_cfg["algorithm"]["class_name"] for job in (alone, several)] == ["PPO", "m3po.baselines.ppo:PPO"]
    assert [job.train_cfg["algorithm"]["desired_kl"] for job in (alone, several)] == [0.03, 0.06]
    assert [job.train_cfg["num_steps_per_env"] for job in (alone, several)] == [16, 16]
    assert policies_of(several.train_cfg) == ("prior",)
    copy = suite_job.from_order(several.order())
    assert copy.train_cfg == several.train_cfg
    multi = make_job("--task", "walker-walk", "--multi_task").train_cfg
    assert (multi["algorithm"]["class_name"], multi["actor"]["embedding_dim"]) == ("m3po.baselines.ppo:PPO", 16)
    changed = make_job("--task", "walker-walk", "agent.algorithm.desired_kl=0.01").train_cfg
    assert changed["algorithm"] == alone.train_cfg["algorithm"] | {"desired_kl": 0.01}


def test_several_tasks_have_the_mean_of_their_discounts():
    lengths = [suite.find_task(name)[0].info(name).episode_length for name in ("walker-walk", "mw-reach")]
    discounts = [task_discount(length) for length in lengths]
    assert discounts[0] != discounts[1]
    gamma = make_job("--task", "walker-walk,mw-reach").train_cfg["algorithm"]["gamma"]
    assert gamma == pytest.approx(sum(discounts) / 2)
    assert make_job("--task", "mw-reach").train_cfg["algorithm"]["gamma"] == discounts[1]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "planner.planned_fraction=0.5",
            r"override 'agent.algorithm.planner'\. agent.algorithm has: num_learning_epochs,",
        ),
        ("desired_k=0.5", "Did you mean 'desired_kl'"),
        ("class_name=M3PO", "unknown override 'agent.algorithm.class_name'"),
        ("num_mini_batches=1025", "num_mini_batches must lie between 1 and 1024 samples of a rollout, got 1025"),
        ("num_learning_epochs=0", "num_learning_epochs must be at least 1, got 0"),
        ("gamma=1.5", r"gamma must lie between 0 and 1, got 1\.5"),
        ("learning_rate=none", "learning_rate must be at least 0, got None"),
        ("schedule=fast", "schedule must be one of adaptive, fixed, got 'fast'"),
    ],
)
def test_wrong_overrides_are_refused(override, message):
    with pytest.raises(UserError, match=message):
        make_job("--task", "walker-walk", f"agent.algorithm.{override}")


def test_other_wrong_sizes_are_refused():
    for option, message in (
        ("num_steps_per_env=0", "must be at least 1, got 0"),
        ("max_nan_fraction=2.0", "must lie in"),
        ("quarantine_share=0.5", "'quarantine_share' was removed; it is replaced by max_nan_fraction"),
    ):
        with pytest.raises(UserError, match=message):
            make_job("--task", "walker-walk", f"agent.{option}")
    with pytest.raises(UserError, match=r"'m3po_paper_cfg_entry_point' is not one of algorithm 'ppo'"):
        make_job("--task", "walker-walk", "--agent", "m3po_paper_cfg_entry_point")
    check_ppo_cfg(make_job("--task", "walker-walk").train_cfg["algorithm"], 1, 16, 0.5)


def test_a_network_that_cannot_be_told_the_task_is_refused():
    env, cfg = points(1, 2), ppo_runner_cfg(True, "cpu") | {"multi_gpu": None}
    cfg["critic"]["class_name"] = "RNNModel"
    with pytest.raises(UserError, match="the critic of several tasks must be an MLPModel, got RNNModel"):
        PPO.construct_algorithm(env.get_observations(), env, cfg, "cpu")


# -- tasks of different sizes -----------------------------------------------------------------------------------------


def test_padded_actions_are_zero_and_do_not_count():
    env = points(1, 3)
    alg = rollout(runner(env))
    st, first = alg.storage, env.task_ids == 0
    assert (st.actions[:, first, 1:] == 0).all() and (st.actions[:, ~first] != 0).all()
    mean, std = st.distribution_params
    one = torch.distributions.Normal(mean[:, first, 0], std[:, first, 0]).log_prob(st.actions[:, first, 0])
    torch.testing.assert_close(st.actions_log_prob[:, first, 0], one)
    alg.actor(st.observations[0], stochastic_output=True)
    actions = st.actions[0].clone()
    before = alg.actor.get_output_log_prob(actions)
    actions[first, 1:] = 7.0  # what is not there may be anything
    assert torch.equal(alg.actor.get_output_log_prob(actions), before)
    entropy = alg.actor.output_entropy.detach()
    assert entropy[0] == pytest.approx(entropy[-1].item() / 3)
    moved = (mean[0] + 0.5 * std[0] * env.action_mask, std[0])
    kl = alg.actor.get_kl_divergence((mean[0], std[0]), moved)
    torch.testing.assert_close(kl, 0.125 * env.action_mask.sum(1))


def test_each_task_has_statistics_and_a_std_of_its_own():
    env = points(1, 3)
    alg = rollout(runner(env))
    alg.update()
    assert alg.actor.obs_normalizer.count.tolist() == [16 * 8, 16 * 8]
    std = alg.actor.distribution.std_of(torch.tensor([0, 1]))
    assert std[0, 0] != std[1, 0] and (std[0, 1:] == 1).all()


def test_several_tasks_are_saved_resumed_reported_and_evaluated(tmp_path):
    agent = runner(points(1, 3), tmp_path)
    agent.learn(3, init_at_random_ep_len=True)
    written = {path.name for path in tmp_path.iterdir()}
    assert {"model_last.pt", "model_2.pt", "progress.csv", "tasks.csv", "embeddings.csv"} <= written
    with open(tmp_path / "tasks.csv", newline="", encoding="utf-8") as file:
        assert [row["task"] for row in csv.DictReader(file)] == 3 * ["point-1", "point-3"]
    again = runner(points(1, 3), tmp_path)
    again.resume(str(tmp_path / "model_last.pt"))
    assert (again.current_learning_iteration, again.alg.learning_rate) == (3, agent.alg.learning_rate)
    obs = agent.env.get_observations()
    assert torch.equal(again.inference_policy()(obs), agent.inference_policy()(obs))
    assert set(evaluate(again.env, again.inference_policy(), 8)["tasks"]) == {"point-1", "point-3"}
    with pytest.raises(CheckpointError, match="in another order"):
        runner(points(3, 1)).load(str(tmp_path / "model_last.pt"))


def test_a_task_goes_on_in_another_set(tmp_path):
    old = runner(points(1, 2), tmp_path)
    old.learn(2)
    new = runner(points(3, 1))
    new.transfer(str(tmp_path / "model_last.pt"), {"point-3": "point-2"})
    first, second = old.env.get_observations()[:8], new.env.get_observations()[8:]
    second["policy"][:, :2] = first["policy"][:, :2]
    for network in ("actor", "critic"):
        answers = [getattr(agent.alg, network)(obs)[:, :1] for agent, obs in ((old, first), (new, second))]
        torch.testing.assert_close(*answers, rtol=1e-5, atol=1e-6)
    assert torch.equal(new.alg.actor.task_embedding[0], old.alg.actor.task_embedding[1])
    train_embedding_only(new.alg)
    before = {name: p.detach().clone() for name, p in new.alg.actor.named_parameters()}
    new.learn(1)
    changed = {name for name, p in new.alg.actor.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"task_embedding", "distribution.log_std_param"}


@pytest.mark.learning
def test_learning_improves_every_task():
    agent = runner(points(1, 3, num_envs=64))
    before = evaluate(agent.env, agent.inference_policy(), 64)["tasks"]
    agent.learn(30)
    after = evaluate(agent.env, agent.inference_policy(), 64)["tasks"]
    for name, task in after.items():
        assert task["return_mean"] > 0.75 * before[name]["return_mean"]  # costs


# -- the command line -------------------------------------------------------------------------------------------------


@pytest.fixture
def only_points(monkeypatch: pytest.MonkeyPatch) -> None:
    """No other suite than the points."""
    monkeypatch.setattr(suite, "suites", lambda: {"points": PointSuite()})
    monkeypatch.setattr("m3po.cli.transfer.suites", suite.suites)


def test_from_training_to_playing_on_the_command_line(only_points, tmp_path, capsys):
    log = ("--algo", "ppo", "--log_root", str(tmp_path))
    assert run(["--task", "line,plane", *SMALL, "--run_name", "first", *log]) == 0
    longer = [*SMALL[:4], "--max_iterations", "2", "--eval_interval", "0"]
    assert run(["--task", "line,plane", *longer, "--resume", "first", *log]) == 0
    assert "1 of 2 iterations are done" in capsys.readouterr().out
    (folder,) = (tmp_path / "ppo" / "line+plane").iterdir()
    rows = list(csv.DictReader((folder / "progress.csv").read_text(encoding="utf-8").splitlines()))
    assert [row["iteration"] for row in rows] == ["0", "1"]
    assert play.run(["--task", "line,plane", "--device", "cpu", "--num_episodes", "2", *log]) == 0
    assert (folder / "play_model_last_prior.json").is_file()
    assert run(["--task", "plane", "--transfer", str(folder / "model_last.pt"), *SMALL, *log]) == 0
    assert "transferring 1 of 2 tasks" in capsys.readouterr().out
    assert run(["--task", "plane", "--transfer", str(folder / "model_last.pt"), *SMALL, *log[2:]]) == 2
    assert "algorithm: ppo in the checkpoint, m3po here" in capsys.readouterr().err
