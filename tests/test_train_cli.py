"""Training from the command line: bad input, the three ways in, the manifest, Ctrl-C and continuing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, Result, run_process

from m3po.config import AlgorithmCfg
from m3po.presets import describe
from m3po.runners.checkpoint import FORMAT

# Many command lines in one process, because each costs the start of Isaac Lab. The asset root is fixed from outside:
# a process can choose its assets only once, and none of these lines gets as far as loading any.
ASK = """
import contextlib, io, json, sys
from m3po.cli.train import run

answers = []
for argv in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        rc = run(argv)
    answers.append([rc, out.getvalue(), err.getvalue()])
print(json.dumps(answers))
"""

ANT = ("--task", "Isaac-Ant-v0", "--device", "cpu")
UNTRAINED = "agent.algorithm.world_model.steps_per_iteration=0"
MISTAKES = {
    "no task": ((), "--task"),
    "unknown task": (("--task", "Isaac-Antt-v0"), "Closest: Isaac-Ant,"),
    "task of another library": (("--task", "Ant-v4"), "Closest: Isaac-Ant,"),
    "unknown algorithm": ((*ANT, "--algo", "sac"), "choose from 'm3po', 'ppo'"),
    "unknown agent": ((*ANT, "--agent", "foo"), "It has: m3po_cfg_entry_point, m3po_paper_cfg_entry_point,"),
    "agent of the other algorithm": (
        (*ANT, "--algo", "ppo", "--agent", "m3po_cfg_entry_point"),
        "not one of algorithm",
    ),
    "agent of another library": ((*ANT, "--agent", "skrl_cfg_entry_point"), "not a configuration of rsl_rl"),
    "unknown option": ((*ANT, "--max_iteration", "3"), "Closest: --max_iterations"),
    "unknown field": ((*ANT, "agent.algorithm.planner.horizn=5"), "Did you mean 'horizon'?"),
    "unknown field of the environment": ((*ANT, "env.foo=5"), "env has:"),
    "no override": ((*ANT, "foo=5"), "env.FIELD=VALUE"),
    "unknown physics": ((*ANT, "physics=foo"), "newton_mjwarp"),
    "wrong kind": ((*ANT, "agent.algorithm.planner.horizon=x"), "expects an integer"),
    "wrong value": ((*ANT, "agent.algorithm.planner.execution=foo"), "projected, mppi"),
    "graph of a GPU on a CPU": ((*ANT, "agent.algorithm.planner.cuda_graph=true"), "needs a CUDA device"),
    "unknown kernels": ((*ANT, "agent.algorithm.planner.kernels=cuda"), "one of torch, warp"),
    "field of an earlier version": (
        (*ANT, "agent.algorithm.planner.stages=[[0.5,{{'share':0.1}}]]"),
        "'stages' was removed; it is replaced by nothing: the fraction follows the realised gain.",
    ),
    "section of an earlier version": (
        (*ANT, "agent.algorithm.value_gradient.steps_per_iteration=0"),
        "'value_gradient' was removed; it is replaced by planner and world_model (planner.max_learning_kl=0 switches",
    ),
    "plans without a trained model": ((*ANT, UNTRAINED), "set, for example, world_model.steps_per_iteration=40"),
    "a planner without a trained model": (
        (*ANT, UNTRAINED, "agent.algorithm.planner.max_learning_kl=0.0"),
        "planner.planned_fraction is 0.25, but the world model that it needs is not trained",
    ),
    "a bonus without a trained model": (
        (
            *ANT,
            UNTRAINED,
            "agent.algorithm.planner.max_learning_kl=0.0",
            "agent.algorithm.planner.planned_fraction=0.0",
        ),
        "bonus.size is 0.15, but the world model that it needs is not trained",
    ),
    "no environments": ((*ANT, "--num_envs", "0"), "at least 1, got 0"),
    "negative environments": ((*ANT, "--num_envs", "-4"), "at least 1, got -4"),
    "no environments by override": ((*ANT, "env.scene.num_envs=0"), "num_envs must be at least 1"),
    "negative iterations": ((*ANT, "--max_iterations", "-1"), "at least 1, got -1"),
    "too many mini-batches": (
        (*ANT, "--num_envs", "1", "agent.algorithm.num_mini_batches=17"),
        "the 8 samples of a rollout, got 17",
    ),
    "too many mini-batches for PPO": (
        (*ANT, "--algo", "ppo", "--num_envs", "1", "agent.algorithm.num_mini_batches=33"),
        "the 32 samples of a rollout, got 33",
    ),
    "distributed alone": ((*ANT, "--distributed"), "torch.distributed.run"),
    "unknown device": (("--task", "Isaac-Ant", "--device", "gpu"), "use cpu, cuda or cuda:N"),
    "absent device": (("--task", "Isaac-Ant", "--device", "cuda:99"), "is not available"),
    "Kit without Isaac Sim": ((*ANT, "--viz", "kit"), "needs Isaac Sim"),
    "physics that is not installed": ((*ANT, "physics=ovphysx"), "not installed"),
    "unwritable folder": ((*ANT, "--log_root", "/dev/null/logs"), "cannot write the log folder"),
    "missing checkpoint": ((*ANT, "--checkpoint", "missing.pt"), "There is no checkpoint 'missing.pt'"),
    "truncated checkpoint": (
        (*ANT, "--checkpoint", "{folder}/truncated.pt"),
        "truncated.pt' is truncated or corrupted",
    ),
    "no checkpoint": ((*ANT, "--checkpoint", "{folder}/text.pt"), "text.pt'"),
    "checkpoint of another task": (
        (*ANT, "--checkpoint", "{folder}/cartpole.pt"),
        "task: Isaac-Cartpole in the checkpoint, Isaac-Ant here",
    ),
    "checkpoint of another algorithm": (
        (*ANT, "--algo", "ppo", "--checkpoint", "{folder}/cartpole.pt"),
        "algorithm: m3po in the checkpoint, ppo here",
    ),
    "no run yet": ((*ANT, "--checkpoint", "best", "--log_root", "{folder}"), "has a model_best.pt"),
}
"""What a user gets wrong -> command line, and what the message must say."""


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """Answer to each of the mistakes."""
    folder = tmp_path_factory.mktemp("mistakes")
    about = {
        "format": FORMAT,
        "task": "Isaac-Cartpole",
        "algorithm": "m3po",
        "obs_dims": {"policy": 4},
        "num_actions": 1,
    }
    torch.save({"actor_state_dict": {}, "m3po": about}, folder / "cartpole.pt")
    (folder / "truncated.pt").write_bytes((folder / "cartpole.pt").read_bytes()[:600])
    (folder / "text.pt").write_text("not a checkpoint")
    lines = [[part.format(folder=folder) for part in line] for line, _ in MISTAKES.values()]
    env = os.environ | {"ISAACSIM_ASSET_ROOT": str(folder)}
    result = run_process([sys.executable, "-c", ASK, json.dumps(lines)], timeout=180, env=env, cwd=folder)
    assert result.rc == 0, result.stderr[-3000:]
    found = json.loads(result.stdout.splitlines()[-1])
    assert not (folder / "logs").exists()
    return dict(zip(MISTAKES, (Result(*answer) for answer in found), strict=True))


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_gets_one_message_and_exit_code_2(answers, mistake):
    answer, expected = answers[mistake], MISTAKES[mistake][1]
    assert answer.rc == 2
    assert answer.stderr.startswith("error: ")
    assert expected in answer.stderr
    assert "Traceback" not in answer.stderr + answer.stdout
    assert "Completed setting up the environment" not in answer.stdout


@pytest.mark.parametrize("command", [("scripts/train.py",), ("-m", "isaaclab", "train", "--rl_library", "m3po")])
def test_mistake_on_a_real_command_line(command):
    result = run_process([sys.executable, *command, "--task", "Isaac-Antt-v0", "--headless"], timeout=60)
    assert result.rc == 2
    assert result.stderr.splitlines()[-1].startswith("error: unknown task 'Isaac-Antt-v0'. Closest: Isaac-Ant,")
    assert "Traceback" not in result.stderr


PREPARE = """
import json, sys
from isaaclab_m3po.isaac_job import IsaacJob
from m3po.cli import arguments, job as jobs_module
from m3po.cli.suite_job import from_order

jobs = []
for argv in json.loads(sys.argv[1]):
    parser = arguments.Parser()
    jobs_module.add_task_arguments(parser)
    job = IsaacJob.read(parser, argv)
    copy = from_order(json.loads(json.dumps(job.order())))
    assert copy.train_cfg == job.train_cfg
    assert copy.env_cfg.to_dict() == job.env_cfg.to_dict()
    jobs.append({
        "num_envs": job.env_cfg.scene.num_envs, "seed": job.seed, "env_seed": job.env_cfg.seed,
        "devices": [job.device, job.agent_cfg.device, job.env_cfg.sim.device], "agent": job.train_cfg,
    })
print(json.dumps(jobs, default=str))
"""


def test_defaults_and_overrides_of_both_algorithms():
    lines = [
        [*ANT],
        [*ANT, "--algo", "ppo"],
        [*ANT, "--algo", "ppo", "env.scene.num_envs=8", "agent.algorithm.lam=0.9", "--seed", "7"],
        [*ANT, "--agent", "m3po_paper_cfg_entry_point", "--num_envs", "4", "--seed", "-1"],
    ]
    result = run_process([sys.executable, "-c", PREPARE, json.dumps(lines)], timeout=120)
    assert result.rc == 0, result.stderr[-3000:]
    m3po, ppo, changed, paper = json.loads(result.stdout.splitlines()[-1])
    assert [job["num_envs"] for job in (m3po, ppo, changed, paper)] == [512, 512, 8, 4]
    assert (m3po["agent"]["num_steps_per_env"], m3po["agent"]["max_iterations"]) == (8, 256)
    assert (ppo["agent"]["num_steps_per_env"], ppo["agent"]["max_iterations"]) == (32, 1000)
    assert ppo["agent"]["algorithm"]["class_name"] == "PPO"
    assert changed["agent"]["algorithm"] == ppo["agent"]["algorithm"] | {"lam": 0.9}
    assert changed["seed"] == changed["env_seed"] == 7
    assert paper["agent"]["algorithm"]["ratio"] == "prior"
    assert paper["seed"] == paper["env_seed"] >= 0
    assert m3po["devices"] == ["cpu"] * 3
    assert m3po["agent"]["task"] == "Isaac-Ant"


# -- runs -------------------------------------------------------------------------------------------------------------

SMALL = ("--num_envs", "16", "--max_iterations", "2", "--device", "cpu", "--seed", "3")
# without the gradient's gate, all environments act by plans from the first step on
PLANNING = (
    "agent.algorithm.planner.planned_fraction=1.0",
    "agent.algorithm.planner.max_learning_kl=0.0",
    "agent.algorithm.world_model.steps_per_iteration=4",
    "agent.algorithm.world_model.extra_steps=20",
)
OURS = ("scripts/train.py", "--task", "Isaac-Cartpole-v0", "--algo", "m3po", "--headless", "--eval_interval", "0")
STOCK = ("-m", "isaaclab", "train", "--task", "Isaac-Cartpole", "--rl_library")
WAYS = {
    "m3po, our script": (*OURS, *SMALL, *PLANNING),
    "m3po, stock command": (*STOCK, "rsl_rl", "--agent", "m3po_cfg_entry_point", *SMALL, *PLANNING),
    "ppo, our backend": (*STOCK, "m3po", "--algo", "ppo", "--eval_interval", "0", *SMALL),
    "ppo, stock command": (*STOCK, "rsl_rl", *SMALL, "agent.device=cpu"),
}
"""Commands that train for two iterations."""


class Run:
    """A finished training."""

    def __init__(self, command: tuple[str, ...], folder: Path) -> None:
        first = str(REPOSITORY / command[0]) if command[0].endswith(".py") else command[0]
        self.result = run_process([sys.executable, first, *command[1:]], timeout=240, cwd=folder)
        assert self.result.rc == 0, self.result.stderr[-3000:]
        (manifest,) = folder.glob("logs/*/cartpole/*/run.json")
        self.folder, self.manifest = manifest.parent, json.loads(manifest.read_text())
        self.checkpoint = torch.load(self.folder / "model_1.pt", weights_only=True)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """One run of each way in."""
    return {name: Run(command, tmp_path_factory.mktemp("run")) for name, command in WAYS.items()}


def tensors(value: object, path: str = "") -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint by their path."""
    if isinstance(value, torch.Tensor):
        return {path: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    return {name: tensor for key, item in items for name, tensor in tensors(item, f"{path}/{key}").items()}


@pytest.mark.sim
@pytest.mark.parametrize(
    ("first", "second"),
    [("m3po, our script", "m3po, stock command"), ("ppo, our backend", "ppo, stock command")],
)
def test_all_ways_in_give_the_same_result_bit_for_bit(runs, first, second):
    ours, theirs = tensors(runs[first].checkpoint), tensors(runs[second].checkpoint)
    assert ours.keys() == theirs.keys()
    assert len(ours) > 10
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different


@pytest.mark.sim
def test_the_planner_took_part_in_the_compared_runs(runs):
    header, *rows = (runs["m3po, our script"].folder / "progress.csv").read_text().splitlines()
    assert float(rows[-1].split(",")[header.split(",").index("planner/planned_fraction")]) > 0.0


@pytest.mark.sim
def test_launcher_prints_what_it_chose(runs):
    m3po, ppo = runs["m3po, our script"].result.stdout, runs["ppo, our backend"].result.stdout
    preset = AlgorithmCfg()
    preset.planner.planned_fraction, preset.planner.max_learning_kl, preset.world_model.steps_per_iteration = (
        1.0,
        0.0,
        4,
    )
    assert describe(preset, "default", "cpu") in m3po
    for stdout, num_steps in ((m3po, 8), (ppo, 16)):
        assert "[m3po] device: cpu, torch threads: 1 (OMP_NUM_THREADS)" in stdout
        assert "[m3po] assets: embedded" in stdout
        assert f"[m3po] environments: 16, steps per rollout: {num_steps}" in stdout
    assert "preset" not in ppo
    assert "[m3po] preset: default, cpu" in runs["m3po, stock command"].result.stdout


@pytest.mark.sim
def test_manifest_records_the_run(runs):
    manifest = runs["m3po, our script"].manifest
    assert manifest["task"] == "Isaac-Cartpole"
    assert manifest["algorithm"] == "m3po"
    assert manifest["agent"] == "m3po_cfg_entry_point"
    assert manifest["seed"] == 3
    assert manifest["device"] == "cpu"
    assert (manifest["tasks"], manifest["num_envs"]) == (["Isaac-Cartpole"], [16])
    assert manifest["physics"] == {"config": "NewtonCfg", "solver": "MJWarpSolverCfg"}
    assert manifest["assets"]["mode"] == "embedded"
    assert manifest["versions"]["isaaclab"] == "3.0.0"
    assert manifest["command"][1:3] == ["--task", "Isaac-Cartpole-v0"]
    assert manifest["overrides"] == list(PLANNING)
    assert manifest["configuration"]["agent"]["algorithm"]["planner"]["max_learning_kl"] == 0.0
    assert manifest["configuration"]["env"]["scene"]["num_envs"] == 16
    assert "environ" not in json.dumps(manifest["command"])


@pytest.mark.sim
def test_manifest_has_the_keys_of_isaac_labs_own(runs):
    ours, theirs = runs["m3po, our script"].manifest, runs["m3po, stock command"].manifest
    assert theirs.keys() <= ours.keys()
    assert ours["version"] == theirs["version"]
    assert ours["metadata"]["agent"] == theirs["metadata"]["agent"]


@pytest.mark.sim
def test_training_continues_from_latest_and_saves_when_interrupted(runs):
    run = runs["m3po, our script"]
    log_root = run.folder.parents[2]
    options = ("--num_envs", "16", "--device", "cpu", "--checkpoint", "latest", "--run_name", "more")
    with subprocess.Popen(
        [sys.executable, *OURS, *options, "--log_root", str(log_root)],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # where the tests run in the background of a shell, it has made them ignore Ctrl-C, and children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if "Iteration 3/" in line:  # the first one after the two of the checkpoint
                process.send_signal(signal.SIGINT)
                break
        output = "".join(lines) + process.communicate(timeout=180)[0]
    assert process.returncode == 130, output[-3000:]
    assert "Traceback" not in output
    assert f"[m3po] continuing from {run.folder / 'model_last.pt'}" in output
    (saved,) = log_root.glob("m3po/cartpole/*_more/model_last.pt")
    assert f"[m3po] interrupted; saved {saved}" in output
    assert torch.load(saved, weights_only=True)["iter"] >= 2


@pytest.mark.sim
def test_a_run_that_was_stopped_goes_on_in_its_folder(runs):
    """The one that the test above has interrupted; Isaac Lab's episodes begin anew, its counters go on."""
    log_root = runs["m3po, our script"].folder.parents[2]
    (folder,) = log_root.glob("m3po/cartpole/*_more")
    before = torch.load(folder / "model_last.pt", weights_only=True)
    done = before["iter"] + 1 - 2  # it began with the two of the checkpoint
    total = done + 2
    options = ("--num_envs", "16", "--device", "cpu", "--resume", "more", "--max_iterations", str(total))
    result = run_process([sys.executable, *OURS, *options, "--log_root", str(log_root)])
    assert result.rc == 0, result.stderr[-3000:]
    assert f"resuming from {folder / 'model_last.pt'}: {done} of {total} iterations" in result.stdout
    assert "do not tell their whole state; new episodes begin" in result.stdout
    _, *rows = (folder / "progress.csv").read_text().splitlines()
    assert [int(row.split(",")[0]) for row in rows] == list(range(2, 2 + total))
    after = torch.load(folder / "model_last.pt", weights_only=True)
    steps = {
        name: saved["resume"]["environment"]["common_step_counter"] for name, saved in {"a": before, "b": after}.items()
    }
    assert steps["b"] - steps["a"] >= 2 * 8
    assert after["runner_state"]["env_steps"] == (2 + total) * 8 * 16
    assert len(json.loads((folder / "run.json").read_text())["resumed"]) == 1
