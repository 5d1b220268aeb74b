"""A run that stops and goes on is the run that never stopped."""

import csv
import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_train_cli import tensors
from toy_env import PointEnv, runner_cfg
from toy_gates import open_gates

from m3po.algorithms import M3PO
from m3po.cli.train import run as train_command
from m3po.envs.multi_task import MultiTaskVecEnv, TaskEnv
from m3po.errors import CheckpointError, UserError
from m3po.runners import M3PORunner
from m3po.runners.checkpoint import BEST, LAST, read_checkpoint
from m3po.runners.random_state import random_state, restore_random_state
from m3po.runners.run_folder import find_run, rewind

TIMES = ("seconds", "steps_per_second")


def ppo_cfg() -> dict:
    """rsl_rl's own PPO in the same harness."""
    return runner_cfg() | {"algorithm": {"class_name": "PPO", "schedule": "adaptive", "num_mini_batches": 2}}


def point() -> PointEnv:
    return PointEnv(16)


class Sparse(PointEnv):
    """The point, of which few are rewarded, so that the bonus stays on."""

    def step(self, actions):
        obs, reward, dones, extras = super().step(actions)
        return obs, (reward > -0.02).float(), dones, extras


def two_tasks() -> MultiTaskVecEnv:
    task_envs = [TaskEnv("near", PointEnv(8, edge=1.5), (-20.0, 0.0)), TaskEnv("far", PointEnv(8, dim=3, episode=30))]
    return MultiTaskVecEnv(task_envs, "cpu")


def ppo_of_several() -> dict:
    """The same, told the task."""
    cfg = ppo_cfg()
    for name in ("actor", "critic"):
        cfg[name] = cfg[name] | {"embedding_dim": 4}
    return cfg | {"algorithm": cfg["algorithm"] | {"class_name": "m3po.baselines.ppo:PPO", "gamma": 0.97}}


def everything(**algorithm: object) -> dict:
    """All parts on: plans to learn from and to act by, bonus, critic replay, world model, average."""
    planner = {"planned_fraction": 0.5, **algorithm.pop("planner", {})}
    model = {"extra_steps": 2, **algorithm.pop("world_model", {})}
    return runner_cfg(planner=planner, world_model=model, policy_average_decay=0.8, **algorithm)


CASES = {
    "m3po": (everything, point),
    "few rewards": (everything, lambda: Sparse(16)),
    "drawn elites": (lambda: everything(planner={"execution": "mppi", "num_iterations": 2}), point),
    "purely latent": (lambda: everything(world_model={"anchor": False, "horizon": 3}, std_learning_rate=0.0), point),
    "paper's bonus": (lambda: everything(bonus={"literal": True, "size": 1.0, "num_functions": 0}), point),
    "ppo": (ppo_cfg, point),
    "ppo, several tasks": (ppo_of_several, two_tasks),
    "several tasks": (everything, two_tasks),
}


def start(case: str, folder: Path, seed: int = 5) -> M3PORunner:
    """A runner as a new process would build it."""
    cfg, env = CASES[case]
    folder.mkdir(exist_ok=True)
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    runner = M3PORunner(env(), cfg() | {"max_iterations": 6}, str(folder), "cpu")
    if isinstance(runner.alg, M3PO):
        open_gates(runner.alg)
    return runner


def table(path: Path) -> list[dict[str, str]]:
    """Rows without what depends on the clock."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        return [{k: v for k, v in row.items() if k not in TIMES and not k.startswith("time_")} for row in rows]


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    """What TensorBoard shows."""
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_a_resume_with_other_optimisers_is_refused_before_anything_is_loaded(tmp_path):
    """The std's own step size is a group of its own."""
    start("m3po", tmp_path).learn(1)
    cfg = everything(std_learning_rate=0.0)
    runner = M3PORunner(point(), cfg | {"max_iterations": 6}, str(tmp_path), "cpu")
    before = [p.clone() for p in runner.alg.actor.parameters()]
    with pytest.raises(CheckpointError, match=r"optimizer has groups of .* std_learning_rate"):
        runner.resume(str(tmp_path / "model_last.pt"))
    assert all(map(torch.equal, before, runner.alg.actor.parameters()))


@pytest.mark.parametrize("case", CASES)
def test_n_and_m_iterations_equal_n_stop_resume_m_bit_for_bit(case, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    start(case, whole).learn(5, init_at_random_ep_len=True)
    start(case, parts).learn(2, init_at_random_ep_len=True)
    again = start(case, parts, seed=77)  # another process: nothing of the first is left
    again.env.reset()
    again.resume(str(parts / LAST))
    again.learn(3, init_at_random_ep_len=True)

    expected, found = (tensors(read_checkpoint(folder / LAST)) for folder in (whole, parts))
    assert found.keys() == expected.keys()
    assert len(found) > 30
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    assert table(parts / "progress.csv") == table(whole / "progress.csv")
    assert [row["iteration"] for row in table(parts / "progress.csv")] == ["0", "1", "2", "3", "4"]
    loss = "Loss/value" if case.startswith("ppo") else "Loss/critic_replay"
    for tag in ("Perf/mean_step_reward", loss, "Train/mean_step_reward/env_steps"):
        assert scalars(parts, tag) == scalars(whole, tag)
        assert len(scalars(parts, tag)) == 5
    ours, theirs = read_checkpoint(parts / LAST), read_checkpoint(whole / LAST)
    assert ours["resume"]["random"]["python"] == theirs["resume"]["random"]["python"]
    assert ours["runner_state"]["env_steps"] == theirs["runner_state"]["env_steps"] == 5 * 8 * 16
    if not case.startswith("ppo"):  # all parts took part
        rows = [{name: float(value) for name, value in row.items() if value} for row in table(parts / "progress.csv")]
        for name in ("planner/planned_fraction", "planner/kl", "plan/kl", "plan/cosine", "loss/critic_replay"):
            assert any(row[name] != 0.0 for row in rows[3:]), name
        bonus = [row["bonus/mean_abs"] != 0.0 for row in rows]
        assert bonus[0]
        assert bonus[4] == (case in ("few rewards", "paper's bonus"))
        assert not torch.equal(*(found[f"/{name}_state_dict/mlp.0.weight"] for name in ("average_actor", "actor")))
    if "several tasks" in case:
        assert table(parts / "tasks.csv") == table(whole / "tasks.csv")


def test_the_comparison_notices_a_stream_that_is_not_restored(tmp_path, monkeypatch):
    """Without the state of the replay buffer's generator, the model learns from other samples."""
    start("m3po", tmp_path / "whole").learn(3)
    run = start("m3po", tmp_path / "parts")
    run.learn(2)
    again = start("m3po", tmp_path / "parts", seed=77)
    again.resume(str(tmp_path / "parts" / LAST))
    again.alg.replay.generator.manual_seed(123)
    again.learn(1)
    expected, found = (tensors(read_checkpoint(tmp_path / name / LAST)) for name in ("whole", "parts"))
    assert any(not torch.equal(found[name], expected[name]) for name in expected)


def test_rows_after_the_checkpoint_are_dropped_and_written_once(tmp_path):
    """A process that was killed has reported iterations that no checkpoint holds, the last one by half."""
    run = start("m3po", tmp_path)
    run.learn(4)
    with open(tmp_path / "progress.csv", "a", encoding="utf-8") as file:
        file.write("4,640,1.")
    (tmp_path / f".{LAST}.4711.tmp").write_bytes(b"half a checkpoint")
    again = start("m3po", tmp_path)
    again.resume(str(tmp_path / "model_1.pt"))
    again.learn(4)
    assert [row["iteration"] for row in table(tmp_path / "progress.csv")] == ["0", "1", "2", "3", "4", "5"]
    dropped = (tmp_path / "progress.dropped.csv").read_text(encoding="utf-8").splitlines()
    assert [line.split(",")[0] for line in dropped] == ["2", "3", "4"]
    assert [step for step, _ in scalars(tmp_path, "Perf/mean_step_reward")] == [0, 1, 2, 3, 4, 5]
    by_env_steps = scalars(tmp_path, "Train/mean_step_reward/env_steps")
    assert [step for step, _ in by_env_steps] == [128 * i for i in range(1, 7)]
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_checkpoint_of_networks_alone_says_what_is_missing(tmp_path, capsys):
    start("m3po", tmp_path).learn(2)
    assert "resume" not in read_checkpoint(tmp_path / "model_1.pt")
    again = start("m3po", tmp_path)
    again.resume(str(tmp_path / "model_1.pt"))
    assert "holds networks, optimisers and counters alone" in capsys.readouterr().out
    assert again.current_learning_iteration == 2


def test_environments_that_do_not_tell_their_state_begin_anew(tmp_path, capsys, monkeypatch):
    monkeypatch.delattr(PointEnv, "state_dict")
    start("m3po", tmp_path).learn(2)
    again = start("m3po", tmp_path)
    again.resume(str(tmp_path / LAST))
    assert "do not tell their whole state; new episodes begin" in capsys.readouterr().out
    assert again.statistics._length.sum() == 0
    again.learn(1, init_at_random_ep_len=True)
    assert again.env.episode_length_buf.unique().numel() > 2  # at random points of their episodes


def test_other_settings_are_said_and_other_sizes_refused(tmp_path, capsys, monkeypatch):
    start("m3po", tmp_path).learn(2)
    monkeypatch.setitem(CASES, "m3po", (lambda: everything(gamma=0.9), point))
    start("m3po", tmp_path).resume(str(tmp_path / LAST))
    assert "[m3po] not as before: agent.algorithm.gamma was None and is 0.9" in capsys.readouterr().out
    monkeypatch.setitem(CASES, "m3po", (everything, lambda: PointEnv(32)))
    with open(tmp_path / "progress.csv", "a", encoding="utf-8") as file:
        file.write("2,384,1.0")
    before = (tmp_path / "progress.csv").read_bytes()
    with pytest.raises(CheckpointError, match=r"stored rollouts do not fit.*started with"):
        start("m3po", tmp_path).resume(str(tmp_path / LAST))
    assert (tmp_path / "progress.csv").read_bytes() == before


class SlowEvaluator:
    """Answers when it is told to."""

    def __init__(self) -> None:
        self.submitted: list[tuple[str, int]] = []
        self.results: list[dict] = []

    def submit(self, path: str, iteration: int) -> None:
        self.submitted.append((Path(path).name, iteration))

    def poll(self) -> list[dict]:
        results, self.results = self.results, []
        return results

    wait = poll

    def close(self) -> None: ...


def evaluation(folder: Path, iteration: int, value: float) -> dict:
    statistics = {"return_mean": value, "return_std": 0.0, "length_mean": 1.0, "termination_rate": 0.0}
    return {
        "iteration": iteration,
        "checkpoint": str(folder / f"model_{iteration}.pt"),
        "prior": statistics | {"success_rate": None, "num_episodes": 4},
        "planner": None,
    }


def test_evaluations_that_had_not_come_back_are_repeated_and_the_best_stays(tmp_path):
    run = start("m3po", tmp_path)
    run.cfg["eval_interval"], run.evaluator = 1, SlowEvaluator()
    run.learn(1)
    run.evaluator.results = [evaluation(tmp_path, 0, 3.0)]
    run.learn(1)  # iteration 0 again, as rsl_rl counts; its evaluation is recorded after the checkpoint was written
    assert run.best_return == 3.0
    again = start("m3po", tmp_path)
    again.evaluator = SlowEvaluator()
    again.resume(str(tmp_path / LAST))
    assert again.best_return == 3.0
    assert again.evaluator.submitted == []  # its row is there
    (tmp_path / "evaluations.csv").unlink()
    again = start("m3po", tmp_path)
    again.evaluator = SlowEvaluator()
    again.resume(str(tmp_path / LAST))
    assert again.evaluator.submitted == [("model_0.pt", 0)]
    again._record([evaluation(tmp_path, 0, 2.0)])
    assert again.best_return == 3.0
    assert read_checkpoint(tmp_path / BEST)["infos"]["quality"] == 3.0


def test_old_checkpoints_make_room_but_not_before_their_evaluation(tmp_path):
    run = start("m3po", tmp_path)
    run.cfg |= {"save_interval": 1, "keep_checkpoints": 2, "eval_interval": 4}
    run.evaluator = SlowEvaluator()
    run.learn(7)
    assert sorted(path.name for path in tmp_path.glob("model_*.pt")) == [
        "model_3.pt",  # not evaluated yet
        "model_5.pt",
        "model_6.pt",
        LAST,
    ]


def test_all_streams_of_random_numbers_are_restored():
    state = json.loads(json.dumps({k: v for k, v in random_state().items() if k == "python"}))
    draws = [(torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()) for _ in range(1)]
    assert state["python"][0] == 3
    before = random_state()
    first = (torch.rand(3).tolist(), np.random.randn(3).tolist(), random.gauss(0, 1))
    restore_random_state(before)
    assert (torch.rand(3).tolist(), np.random.randn(3).tolist(), random.gauss(0, 1)) == first
    assert draws


class TestFindingARun:
    """``--resume latest|best|PATH|RUN``."""

    @pytest.fixture
    def experiment(self, tmp_path: Path) -> Path:
        for name, task in (
            ("2026-01-01_00-00-00_first", "a"),
            ("2026-01-02_00-00-00", "a"),
            ("2026-01-03_00-00-00", "b"),
        ):
            folder = tmp_path / name
            run = start("m3po", folder)
            run.learn(2)
            (folder / "run.json").write_text(json.dumps({"task": task, "algorithm": "m3po", "agent": "default"}))
        return tmp_path

    @staticmethod
    def belongs(manifest: dict) -> bool:
        return manifest.get("task") == "a"

    def test_selectors_paths_and_names(self, experiment):
        first, second = experiment / "2026-01-01_00-00-00_first", experiment / "2026-01-02_00-00-00"
        assert find_run(experiment, "latest", self.belongs) == (second, second / LAST)
        assert find_run(experiment, "first", self.belongs) == (first, first / LAST)
        assert find_run(experiment, first.name, self.belongs) == (first, first / LAST)
        assert find_run(experiment, str(first), self.belongs) == (first, first / LAST)
        assert find_run(experiment, str(first / "model_1.pt"), self.belongs) == (first, first / "model_1.pt")
        (first / BEST).write_bytes((first / "model_1.pt").read_bytes())
        assert find_run(experiment, "best", self.belongs) == (first, first / BEST)

    @pytest.mark.parametrize("name", ["lr=[0.1]", "what?", "a*b", "[!x]", "two words"])
    def test_a_name_is_no_pattern(self, experiment, name):
        first, second = experiment / "2026-01-01_00-00-00_first", experiment / "2026-01-02_00-00-00"
        second.rename(experiment / f"{second.name}_{name}")
        run = experiment / f"{second.name}_{name}"
        first.rename(experiment / "2026-01-01_00-00-00_axb")
        assert find_run(experiment, name, self.belongs) == (run, run / LAST)
        assert find_run(experiment, run.name, self.belongs) == (run, run / LAST)

    @pytest.mark.parametrize("wanted", ["third", "best", "", "../..", "[", "/nowhere", "*", "a/b/../c"])
    def test_what_is_not_there_is_refused(self, experiment, wanted):
        for folder in experiment.iterdir():
            (folder / "run.json").unlink()
        with pytest.raises(UserError, match=r"nothing to resume|not the folder of a run"):
            find_run(experiment, wanted, self.belongs)

    def test_runs_of_others_are_refused(self, experiment):
        with pytest.raises(UserError, match="not of these tasks and this algorithm, but of b with m3po"):
            find_run(experiment, "2026-01-03_00-00-00", self.belongs)

    def test_an_unreadable_checkpoint_gives_way_to_the_one_before_and_is_said(self, experiment, capsys):
        run = experiment / "2026-01-02_00-00-00"
        content = (run / LAST).read_bytes()
        (run / LAST).write_bytes(content[: len(content) // 2])
        assert find_run(experiment, "latest", self.belongs) == (run, run / "model_1.pt")
        assert (
            f"The checkpoint '{run / LAST}' is truncated or corrupted. Using the one before it."
            in capsys.readouterr().out
        )
        for path in run.glob("model_*.pt"):
            path.write_bytes(b"")
        with pytest.raises(CheckpointError, match="no readable checkpoint"):
            find_run(experiment, str(run), self.belongs)

    def test_rewinding_to_the_end_changes_nothing(self, experiment):
        run = experiment / "2026-01-02_00-00-00"
        before = (run / "progress.csv").read_bytes()
        rewind(run, 1, 256)
        assert (run / "progress.csv").read_bytes() == before
        assert not list(run.glob("*.dropped.csv"))


DMC = ("--task", "cartpole-swingup", "--device", "cpu", "--num_envs", "8", "--eval_interval", "0", "--seed", "3")
DMC += (
    "agent.algorithm.world_model.replay_transitions=512",
    "agent.algorithm.world_model.steps_per_iteration=12",
    "agent.algorithm.world_model.extra_steps=0",
    "agent.algorithm.planner.planned_fraction=0.5",
    "agent.save_interval=1",
)


@pytest.mark.sim
def test_a_whole_training_on_cpu_physics_goes_on_exactly(tmp_path, capsys):
    """The command, DMControl's physics included: 4 iterations, and 2 and 2, compared bit for bit."""

    def train(*options: str) -> str:
        assert train_command([*DMC, "--log_root", str(tmp_path), *options]) == 0
        return capsys.readouterr().out

    train("--run_name", "whole", "--max_iterations", "4")
    train("--run_name", "parts", "--max_iterations", "4", "--keep_checkpoints", "1")
    (whole,) = tmp_path.glob("m3po/cartpole-swingup/*_whole")
    (parts,) = tmp_path.glob("m3po/cartpole-swingup/*_parts")
    assert table(parts / "progress.csv") == table(whole / "progress.csv")
    assert len(list(parts.glob("model_[0-9]*.pt"))) == 1

    stopped = train("--run_name", "stopped", "--max_iterations", "2")
    assert "Iteration 2/2" in stopped
    output = train("--resume", "stopped", "--max_iterations", "4")
    (stopped_run,) = tmp_path.glob("m3po/cartpole-swingup/*_stopped")
    assert f"resuming from {stopped_run / LAST}: 2 of 4 iterations are done" in output
    assert "agent.max_iterations was 2 and is 4" in output
    assert "do not tell their whole state" not in output
    expected, found = (tensors(read_checkpoint(run / LAST)) for run in (whole, stopped_run))
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    assert table(stopped_run / "progress.csv") == table(whole / "progress.csv")
    assert all(math.isfinite(float(row["loss/critic_replay"])) for row in table(stopped_run / "progress.csv"))
    manifest = json.loads((stopped_run / "run.json").read_text(encoding="utf-8"))
    assert [entry["checkpoint"] for entry in manifest["resumed"]] == [LAST]
    assert "the run is complete" in train("--resume", str(stopped_run), "--max_iterations", "4")
