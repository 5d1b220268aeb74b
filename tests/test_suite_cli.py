"""Training, playing and listing tasks of suites from the command line: bad input, sizes, files, pictures."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import imageio.v3 as iio
import numpy as np
import pytest
import torch

from m3po.cli import list_tasks, play, suite_job, train
from m3po.envs.suite import TaskInfo, suites
from m3po.errors import UserError
from m3po.runners.checkpoint import FORMAT
from m3po_tasks.dmcontrol.rendering import SIZE, Camera

PAPER = "m3po_paper_cfg_entry_point"
WALKER = ("--task", "walker-walk", "--device", "cpu")
TWO = ("--task", "cheetah-run,cartpole-balance", "--device", "cpu")
ISAAC = ("--task", "Isaac-Cartpole-v0,Isaac-Ant-v0", "--device", "cpu")


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    """Isaac Lab is imported when its tasks are asked for, and may print then."""
    suites()["isaaclab"].tasks()


def make_job(*argv: str) -> suite_job.SuiteJob:
    return suite_job.make_job(*argv)


# -- a user's mistakes ------------------------------------------------------------------------------------------------

TRAIN_MISTAKES = {
    "unknown task in a list": (("--task", "walker-walk,walker-wlak"), "unknown task 'walker-wlak'. Closest: walker-w"),
    "unknown set": (("--task", "MT11"), "unknown task 'MT11'. Closest: MT10"),
    "unknown Isaac Lab task in a list": (("--task", "Isaac-Ant-v0,Isaac-Antt-v0"), "'Isaac-Antt-v0'. Closest: Isaac-A"),
    "nothing like it": (("--task", "xxxxxxxx"), "scripts/list_tasks.py lists all"),
    "empty name": (("--task", "walker-walk,,cheetah-run"), "empty task name"),
    "task twice": (
        ("--task", "walker-walk,dmc-walker-walk"),
        "more than once in 'walker-walk,dmc-walker-walk': walker",
    ),
    "task twice, once in a set": (("--task", "MT10,mw-reach"), "more than once in 'MT10,mw-reach': mw-reach"),
    "fewer environments than tasks": (("--task", "MT10", "--num_envs", "9"), "no environment for some of 10 tasks"),
    "environments counted twice": ((*TWO, "--num_envs", "4", "--num_envs_per_task", "2"), "not allowed with"),
    "two simulations in one process": ((*ISAAC, "--processes", "none"), "Isaac-Cartpole, Isaac-Ant cannot share"),
    "unknown processes": ((*TWO, "--processes", "some"), "choose from 'auto', 'all', 'none'"),
    "unknown option": ((*WALKER, "--max_iteration", "3"), "'--max_iteration' is neither an option"),
    "no override": ((*WALKER, "foo=5"), "'foo=5' is neither an option"),
    "override of the environment": ((*WALKER, "env.episode_length_s=5"), "env.* is for a single Isaac Lab task"),
    "unknown field": ((*WALKER, "agent.algorithm.planner.horizn=5"), "Did you mean 'horizon'?"),
    "field of an earlier version": (
        (*WALKER, "agent.algorithm.distill_coef=0.1"),
        "'distill_coef' was removed; it is replaced by the regression onto plans (planner.max_learning_kl).",
    ),
    "section of an earlier version": (
        (*TWO, "agent.algorithm.value_gradient.steps_per_iteration=0"),
        "'value_gradient' was removed; it is replaced by planner and world_model (planner.max_learning_kl=0 switches",
    ),
    "graph of a GPU on a CPU": ((*WALKER, "agent.algorithm.planner.cuda_graph=true"), "needs a CUDA device"),
    "wrong kind": ((*WALKER, "agent.algorithm.planner.horizon=x"), "expects an integer"),
    "wrong value": ((*WALKER, "agent.algorithm.planner.execution=foo"), "projected, mppi"),
    "too many mini-batches": ((*WALKER, "--num_envs", "1", "agent.algorithm.num_mini_batches=17"), "rollout, got 17"),
    "field of another algorithm": (
        (*WALKER, "--algo", "ppo", "agent.algorithm.planner.planned_fraction=0.5"),
        "unknown override 'agent.algorithm.planner'. agent.algorithm has: num_learning_epochs, num_mini_batches,",
    ),
    "agent of another algorithm": ((*WALKER, "--algo", "ppo", "--agent", PAPER), "is not one of algorithm 'ppo'"),
    "unknown agent": ((*WALKER, "--agent", "rsl_rl_cfg_entry_point"), "choose from 'm3po_cfg_entry_point'"),
    "unknown algorithm": ((*WALKER, "--algo", "sac"), "choose from 'm3po', 'ppo'"),
    "unknown device": (("--task", "walker-walk", "--device", "gpu"), "use cpu, cuda or cuda:N"),
    "absent device": (("--task", "walker-walk", "--device", "cuda:99"), "is not available"),
    "no iterations": ((*WALKER, "--max_iterations", "0"), "at least 1, got 0"),
    "negative seed": ((*WALKER, "--seed", "-2"), "at least -1, got -2"),
    "one environment for two policies": ((*WALKER, "--eval_envs", "1"), "at least 2, got 1"),
    "unwritable folder": ((*WALKER, "--log_root", "/dev/null/logs"), "cannot write the log folder"),
    "missing checkpoint": ((*WALKER, "--checkpoint", "missing.pt"), "There is no checkpoint 'missing.pt'"),
    "truncated checkpoint": ((*WALKER, "--checkpoint", "truncated.pt"), "'truncated.pt' is truncated or corrupted"),
    "no checkpoint": ((*WALKER, "--checkpoint", "text.pt"), "text.pt'"),
    "checkpoint of another task": (
        (*WALKER, "--checkpoint", "cheetah.pt"),
        "cheetah-run in the checkpoint",
    ),
    "no run yet": ((*WALKER, "--checkpoint", "best"), "has a model_best.pt; train first"),
}
"""What a user gets wrong in training -> command line, and what the message must say."""

CHEETAH = ("--task", "cheetah-run", "--device", "cpu", "--checkpoint", "cheetah.pt")
PLAY_MISTAKES = {
    "unknown task": (("--task", "walker-wlak"), "unknown task 'walker-wlak'. Closest: walker-w"),
    "no run yet": (WALKER, "has a model_last.pt; train first"),
    "unknown policy": ((*WALKER, "--policy", "random"), "choose from 'prior', 'planner'"),
    "no episodes": ((*WALKER, "--num_episodes", "0"), "at least 1, got 0"),
    "planner of an algorithm without": ((*WALKER, "--algo", "ppo", "--policy", "planner"), "'ppo' has no planner"),
    "film of a suite without camera": (("--task", "walker-walk,mw-reach", "--video"), "cannot film task 'mw-reach'"),
    "film of another process": ((*WALKER, "--video", "--processes", "all"), "leave out --processes all"),
    "truncated checkpoint": ((*WALKER, "--checkpoint", "truncated.pt"), "'truncated.pt' is truncated or corrupted"),
    "checkpoint of another task": (
        (*WALKER, "--checkpoint", "cheetah.pt"),
        "cheetah-run in the checkpoint",
    ),
    "checkpoint of another algorithm": ((*CHEETAH, "--algo", "ppo"), "algorithm: m3po in the checkpoint, ppo here"),
    "checkpoint without configuration": (CHEETAH, "does not carry the configuration"),
}
"""What a user gets wrong in playing -> command line, and what the message must say."""


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with bad checkpoints."""
    monkeypatch.chdir(tmp_path)
    about = {"format": FORMAT, "task": "cheetah-run", "algorithm": "m3po", "obs_dims": {"policy": 17}, "num_actions": 6}
    torch.save({"actor_state_dict": {"weight": torch.zeros(1000)}, "m3po": about}, "cheetah.pt")
    Path("truncated.pt").write_bytes(Path("cheetah.pt").read_bytes()[:2000])
    Path("text.pt").write_text("not a checkpoint")
    return tmp_path


def check_refused(run, argv, expected: str, capsys: pytest.CaptureFixture) -> None:
    """Exit code 2 and one line on stderr, before anything was written."""
    before = sorted(Path().iterdir())
    assert run(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert expected in line
    assert sorted(Path().iterdir()) == before


@pytest.mark.parametrize("mistake", TRAIN_MISTAKES)
def test_mistake_in_training_gets_one_line_and_exit_code_2(mistake, files, capsys):
    check_refused(train.run, *TRAIN_MISTAKES[mistake], capsys)


@pytest.mark.parametrize("mistake", PLAY_MISTAKES)
def test_mistake_in_playing_gets_one_line_and_exit_code_2(mistake, files, capsys):
    check_refused(play.run, *PLAY_MISTAKES[mistake], capsys)


@pytest.mark.parametrize(("run", "name"), [(train.run, "mw-reach"), (play.run, "walker-walk,mw-reach")])
def test_a_backend_that_is_not_installed_is_named_with_its_command(run, name, files, capsys, monkeypatch):
    monkeypatch.setattr(type(suites()["metaworld"]), "missing", lambda self: "pip install something")
    expected = "task 'mw-reach' needs metaworld, which is not installed: pip install something"
    check_refused(run, ("--task", name), expected, capsys)


def test_mistake_on_a_real_command_line(run_script):
    result = run_script(["scripts/train.py", "--task", "walker-walk,walker-wlak", "--headless"])
    assert result.rc == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: unknown task 'walker-wlak'. Closest: walker-walk")


# -- from a command line to a job -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (("--task", "Isaac-Ant-v0"), False),
        (("--task=isaac-ant", "--algo", "ppo"), False),
        (("--task", "my.module:Isaac-Ant"), False),
        (("--help",), False),
        (("--task", "Isaac-Ant-v0,Isaac-Cartpole-v0"), True),
        (("--task", "Isaac-Classic-MT3"), True),
        (("--task", "walker-walk"), True),
        (("--num_envs", "4", "--task=MT10"), True),
        (("--task", "a-task-of-a-users-package"), False),
        (("--task", "Template-Cartpole-MT-v0"), False),
    ],
)
def test_which_command_lines_are_for_suites(argv, expected):
    assert suite_job.is_suite_command(argv) is expected


@pytest.mark.parametrize(
    ("argv", "sizes"),
    [
        (("--num_envs", "10"), [4, 3, 3]),
        (("--num_envs", "3"), [1, 1, 1]),
        (("--num_envs_per_task", "5"), [5, 5, 5]),
        ((), [suite_job.NUM_ENVS["cpu"]] * 3),
    ],
)
def test_environments_are_split_evenly(argv, sizes):
    job = make_job("--task", "walker-walk,mw-reach,dmc-cup-catch", "--device", "cpu", *argv)
    assert job.names == ["walker-walk", "mw-reach", "cup-catch"]
    assert job.sizes == sizes


def test_a_drawn_seed_is_another_one_each_time_and_is_passed_on():
    first, second = (make_job(*TWO, "--seed", "-1") for _ in range(2))
    assert first.seed >= 0
    assert first.seed != second.seed
    copy = suite_job.from_order(json.loads(json.dumps(first.order())))
    assert (copy.seed, copy.sizes, copy.names) == (first.seed, first.sizes, first.names)
    assert copy.train_cfg["algorithm"] == first.train_cfg["algorithm"]


@pytest.mark.parametrize("mode", [(), ("--agent", PAPER)])
def test_the_same_parts_run_on_a_single_task_and_on_a_set(mode):
    """A set has larger batches, and discounts of its tasks instead of one."""
    alone, several = (make_job(*task, *mode).train_cfg["algorithm"] for task in (WALKER, TWO))
    batches = [
        (cfg["world_model"].pop("batch_size"), cfg["critic_replay"].pop("batch_size")) for cfg in (alone, several)
    ]
    assert batches == ([(256, 1024)] * 2 if mode else [(256, 256), (512, 512)])
    assert alone | {"gamma": several["gamma"]} == several


def test_suites_update_more_often_and_by_less():
    """Their rollouts are smaller than those of Isaac Lab's tasks."""
    cfg = make_job(*WALKER).train_cfg
    assert (cfg["num_steps_per_env"], cfg["algorithm"]["desired_kl"]) == (8, 0.03)
    model = cfg["algorithm"]["world_model"]
    assert (model["steps_per_iteration"], model["extra_steps"]) == (40, 100)
    paper = make_job(*WALKER, "--agent", PAPER).train_cfg
    assert (paper["num_steps_per_env"], paper["algorithm"]["planner"]["planned_fraction"]) == (16, 1.0)


@pytest.mark.parametrize(
    ("tasks", "stds", "own"),
    [
        ("Isaac-Classic-MT3", 0.5, 1.0),
        ("Isaac-Ant-v0,IsaacContrib-Navigation-Flat-AnymalC,walker-walk", [0.5, 0.25, 1.0], [1.0, 0.5, 1.0]),
    ],
)
def test_each_isaac_task_of_a_set_begins_with_the_noise_that_it_has_alone(tasks, stds, own):
    """Half of that of the task's own agent, with which PPO and paper mode begin; other suites' tasks have none."""
    for option, expected in (((), stds), (("--algo", "ppo"), own), (("--agent", PAPER), own)):
        job = make_job("--task", tasks, "--device", "cpu", *option)
        assert job.train_cfg["actor"]["distribution_cfg"]["init_std"] == expected


# -- lists ------------------------------------------------------------------------------------------------------------


def test_list_of_a_suite_whose_backend_is_not_installed(capsys, monkeypatch):
    monkeypatch.setattr(type(suites()["metaworld"]), "missing", lambda self: "pip install something")
    assert list_tasks.run(["--suite", "metaworld"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "metaworld: 50 tasks, not installed: pip install something"
    assert lines[1].split() == ["task", "observations", "actions", "steps", "score"]
    assert [line.split() for line in lines if "mw-pick-place " in line] == [
        ["mw-pick-place", *["39", "4", "100", "success"]]
    ]
    assert "set MT80  80 tasks: 30 of dmcontrol, 50 of metaworld" in lines


def test_list_of_a_set_across_suites(capsys):
    assert list_tasks.run(["--set", "MT80", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert {name: len(suite["tasks"]) for name, suite in content["suites"].items()} == {
        "dmcontrol": 30,
        "metaworld": 50,
    }
    assert [len(tasks) for tasks in content["sets"].values()] == [80]
    (walker,) = [task for task in content["suites"]["dmcontrol"]["tasks"] if task["name"] == "walker-walk"]
    assert TaskInfo(**walker | {"score_range": (0.0, 1000.0)}) == suites()["dmcontrol"].info("walker-walk")
    assert walker["score_range"] == [0.0, 1000.0]


def test_list_of_isaac_lab_is_not_mixed_with_what_it_prints(capsys, monkeypatch):
    """Its sizes are unknown; some of its configurations are a choice of several, of which the default counts."""
    names = ["Isaac-Cartpole", "Isaac-Open-Drawer-Franka", "Isaac-Reorient-Cube-Shadow"]
    monkeypatch.setattr(type(suites()["isaaclab"]), "tasks", lambda self: names)
    assert list_tasks.run(["--suite", "isaaclab"]) == 0
    title, _, *rows, empty, sets = capsys.readouterr().out.splitlines()
    assert title == "isaaclab: 3 tasks, installed"
    lengths = zip(names, ("300", "960", "600"), strict=True)
    assert [row.split() for row in rows] == [[name, "-", "-", length, "-"] for name, length in lengths]
    assert (empty, sets) == ("", "set Isaac-Classic-MT3   3 tasks: 3 of isaaclab")


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (("--suite", "dmcontrl"), "unknown suite 'dmcontrl'. There are: dmcontrol, isaaclab, metaworld, mjlab."),
        (("--set", "x"), "unknown set 'x'. There are: DMC-MT30, DMC39, Isaac-Classic-MT3, MT10, MT50, MT80."),
        (("--set", "MT10", "--suite", "metaworld"), "not allowed with"),
        (("--sets",), "unrecognized arguments: --sets"),
    ],
)
def test_mistake_in_listing(argv, expected, files, capsys):
    check_refused(list_tasks.run, argv, expected, capsys)


# -- pictures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "left", "right"),
    [
        ("reacher-easy", (-0.15, 0.0), (0.15, 0.0)),
        ("fish-swim", (-0.4, 0.0, 0.2), (0.4, 0.0, 0.2)),
        ("finger-turn-easy", (-0.13, 0.0), (0.13, 0.0)),
    ],
)
def test_pictures_show_the_target_where_it_is(task, left, right):
    env = suites()["dmcontrol"].make(task, 2, seed=0, device="cpu", num_threads=1)
    columns = []
    with suites()["dmcontrol"].camera(env) as camera:
        for target in (left, right):
            env.target = torch.tensor([target, [0.0] * len(target)], dtype=torch.float64)
            columns.append(red_column(camera.frame()))
    env.close()
    assert columns[0] < columns[1] - 40


def red_column(picture: np.ndarray) -> float:
    """Mean column of the pixels that have the targets' colour."""
    assert picture.shape == (SIZE[1], SIZE[0], 3)
    red, green, blue = picture.astype(int).transpose(2, 0, 1)
    rows, columns = np.nonzero((red > 100) & (red > 1.5 * green) & (blue > 0.8 * green))
    assert len(rows) > 100
    return columns.mean()


def test_pictures_show_the_world_as_it_is():
    env = suites()["dmcontrol"].make("cheetah-run", 2, seed=0, device="cpu", num_threads=1)
    with Camera(env) as first, Camera(env, row=1) as second:
        pictures = [camera.frame().astype(float) for camera in (first, second, first)]
        for _ in range(10):
            env.step(torch.ones(2, 6))
        pictures.append(first.frame().astype(float))
    env.close()
    assert first.frames_per_second == pytest.approx(50.0)
    assert np.array_equal(pictures[0], pictures[2])
    assert np.abs(pictures[0] - pictures[1]).mean() > 0.5, "two worlds look the same"
    assert np.abs(pictures[0] - pictures[3]).mean() > 0.5, "nothing has moved"


def test_worlds_on_a_gpu_are_refused():
    with pytest.raises(UserError, match="physics is on the CPU: --device cpu"):
        Camera(SimpleNamespace(backend=object()))


# -- from training to playing -----------------------------------------------------------------------------------------

SMALL = ("--num_envs_per_task", "4", "--max_iterations", "2", "--seed", "3")
FILES = {"model_1.pt", "model_last.pt", "run.json", "progress.csv"}


def read_run(logs: Path, experiment: str) -> Path:
    (run,) = (logs / "m3po" / experiment).iterdir()
    return run


@pytest.mark.sim
def test_two_tasks_train_evaluate_and_play(run_script, tmp_path, capsys):
    """All parts at once: evaluation of both policies beside the training, best checkpoint, table, files, pictures."""
    options = [*TWO, *SMALL, "--eval_interval", "2", "--eval_envs", "2", "--log_root", tmp_path]
    trained = run_script(["scripts/train.py", *map(str, options)], timeout=600)
    assert trained.rc == 0, trained.stderr[-3000:]
    run = read_run(tmp_path, "cheetah-run+cartpole-balance")
    written = {path.name for path in run.iterdir()}
    assert (
        FILES | {"model_best.pt", "tasks.csv", "evaluations.csv", "task_evaluations.csv", "embeddings.csv"} <= written
    )
    with open(run / "task_evaluations.csv", newline="") as file:
        rows = [(row["policy"], row["task"]) for row in csv.DictReader(file)]
    assert rows == [(kind, task) for kind in ("prior", "planner") for task in ("cheetah-run", "cartpole-balance")]

    again = [*TWO, "--num_episodes", "2", "--num_envs_per_task", "2", "--log_root", str(tmp_path)]
    results = []
    for extra in (("--export", "--video", "--video_length", "3"), ("--output", str(tmp_path / "new" / "again.json"))):
        assert play.run([*again, *extra]) == 0
        out = capsys.readouterr().out
        path = Path(next(line for line in out.splitlines() if line.startswith("[m3po] result: ")).split(": ")[1])
        results.append(json.loads(path.read_text()))
    assert path == tmp_path / "new" / "again.json"
    first, second = results
    assert first["checkpoint"] == str(run / "model_best.pt")
    assert (first["num_envs"], first["num_episodes"], first["seed"]) == ([2, 2], 2, 0)
    assert list(first["tasks"]) == ["cheetah-run", "cartpole-balance"]
    for name, task in first["tasks"].items():
        assert task["returns"] == second["tasks"][name]["returns"]
        assert task["num_episodes"] == 2
        assert task["score"] == pytest.approx(task["return_mean"] / 1000.0)
        row = next(line for line in out.splitlines() if line.startswith(f"{name} "))
        assert row.split()[1:] == [
            *f"{task['return_mean']:.2f} +- {task['return_std']:.2f} 500.0 0.0% - {task['score']:.3f}".split()
        ]
    scores = {name: task["score"] for name, task in first["tasks"].items()}
    assert first["score_min_task"] == min(scores, key=scores.get)
    assert first["score_min"] == min(scores.values())
    assert first["score_mean"] == pytest.approx(sum(scores.values()) / 2)
    assert f"lowest {first['score_min']:.3f} ({first['score_min_task']})" in out

    exported = sorted(str(path.relative_to(run / "exported")) for path in (run / "exported").rglob("*.*"))
    assert exported == [f"{task}/policy.{kind}" for task in sorted(scores) for kind in ("onnx", "pt")]
    sizes = {"cheetah-run": (17, 6), "cartpole-balance": (5, 1)}
    for task, (obs_dim, action_dim) in sizes.items():
        policy = torch.jit.load(run / "exported" / task / "policy.pt")
        assert policy(torch.zeros(3, obs_dim)).shape == (3, action_dim)
        film = iio.imread(run / f"play_model_best_prior_{task}.mp4")
        assert film.shape == (3, SIZE[1], SIZE[0], 3)
        assert film[-1].std() > 10.0


@pytest.mark.sim
def test_a_single_task_without_evaluations_plays_its_latest_checkpoint(tmp_path, capsys):
    logs = ("--log_root", str(tmp_path), "--device", "cpu")
    tiny = ("agent.actor.hidden_dims=[32,16]", "agent.num_steps_per_env=4")
    argv = ["--task", "pendulum-swingup", *SMALL, "--eval_interval", "0", *tiny, *logs]
    assert train.run(argv) == 0
    run = read_run(tmp_path, "pendulum-swingup")
    written = {path.name for path in run.iterdir()}
    assert written >= FILES
    assert "model_best.pt" not in written

    argv = ["--task", "dmc-pendulum-swingup", "--experiment_name", "pendulum-swingup", *logs]
    film = str(tmp_path / "film.mp4")
    options = ["--policy", "planner", "--num_episodes", "1", "--num_envs", "1", "--export", "--video", film]
    assert play.run([*argv, *options, "--video_length", "2"]) == 0
    result = json.loads((run / "play_model_last_planner.json").read_text())
    assert result["checkpoint"] == str(run / "model_last.pt")
    (task,) = result["tasks"].values()
    assert task["score"] == result["score_min"] == pytest.approx(task["return_mean"] / 1000.0)
    assert (task["num_episodes"], task["length_mean"]) == (1, 500.0)
    assert sorted(path.name for path in (run / "exported").iterdir()) == ["policy.onnx", "policy.pt"]
    assert len(iio.imread(film)) == 2


# -- names and seeds --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a/b", "..\\c", "", "a\nb"])
@pytest.mark.parametrize("task", ["walker-walk", "Isaac-Cartpole-v0"])
def test_names_of_runs_that_are_no_folders_are_refused(capsys, task, name):
    assert train.run(["--task", task, "--run_name", name]) == 2
    assert "--run_name: must be part of a folder's name" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option", [("--seed", "5000000000"), ("--seed", "-2"), ("agent.seed=5000000000",), ("agent.seed=x",)]
)
def test_impossible_seeds_are_refused_in_one_line(option):
    with pytest.raises(UserError, match=r"2147483647|at least -1|expects an integer"):
        make_job(*WALKER, *option)


@pytest.mark.parametrize("option", [("--seed", "-1"), ("agent.seed=-1",)])
def test_the_seed_that_was_drawn_is_recorded(option):
    jobs = [make_job(*WALKER, *option) for _ in range(2)]
    assert all(job.seed == job.train_cfg["seed"] >= 0 for job in jobs)
    assert jobs[0].seed != jobs[1].seed


def test_an_override_of_the_seed_is_that_of_the_environments_too():
    job = make_job(*WALKER, "--seed", "3", "agent.seed=8")
    assert job.seed == job.train_cfg["seed"] == 8
