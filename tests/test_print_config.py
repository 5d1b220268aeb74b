"""``train.py --print_config``: YAML and nothing else on standard output, with neither a simulation nor a GPU."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass

import numpy as np
import pytest
import yaml

from m3po.cli import train
from m3po.cli.arguments import check_device
from m3po.cli.print_config import plain
from m3po.errors import UserError

OVERRIDES = ("agent.algorithm.gamma=0.875", "agent.num_steps_per_env=24")
SIMULATORS = {"newton", "mujoco", "mujoco_warp", "dm_control", "pxr"}
TWO = "walker-walk,cup-catch"


def check(stdout: str, num_envs: dict[str, int], device: str, algo: str) -> dict:
    """Standard output is a configuration with :data:`OVERRIDES`, of Isaac Lab's tasks with ``env``: the agent's."""
    config = yaml.safe_load(stdout)
    head = {"tasks": list(num_envs), "num_envs": num_envs, "algo": algo, "device": device}
    assert {key: config[key] for key in head} == head
    isaac = {"env"} if next(iter(num_envs)).startswith("Isaac-") else set()
    assert set(config) - set(head) == {"agent_entry", "agent"} | isaac
    if isaac:
        assert (config["env"]["scene"]["num_envs"], config["env"]["episode_length_s"]) == (
            num_envs["Isaac-Cartpole"],
            7,
        )
    agent = config["agent"]
    assert (agent["algorithm"]["gamma"], agent["num_steps_per_env"], agent["algo"]) == (0.875, 24, algo)
    assert agent["actor"]["hidden_dims"]
    return agent


@pytest.mark.parametrize(
    ("task", "num_envs", "device", "algo"),
    [
        ("Isaac-Cartpole-v0", {"Isaac-Cartpole": 10}, "cuda:0", "m3po"),
        ("Isaac-Cartpole-v0", {"Isaac-Cartpole": 10}, "cpu", "ppo"),
        ("walker-walk", {"walker-walk": 10}, "cuda:0", "m3po"),
        (TWO, {"walker-walk": 5, "cup-catch": 5}, "cuda:0", "m3po"),
    ],
)
def test_a_real_command_line_prints_yaml_and_starts_nothing(
    run_script, repository, tmp_path, task, num_envs, device, algo
):
    script = ["-X", "importtime", str(repository / "scripts" / "train.py")]
    options = ["--print_config", "--task", task, "--device", device, "--algo", algo, "--num_envs", "10"]
    overrides = [*OVERRIDES, "env.episode_length_s=7"] if task.startswith("Isaac-") else OVERRIDES
    result = run_script([*script, *options, *overrides], cwd=tmp_path)
    assert result.rc == 0, result.stderr[-3000:]
    agent = check(result.stdout, num_envs, device, algo)
    assert algo == "ppo" or any(isinstance(section, dict) for section in agent["algorithm"].values())
    rows = [line.split("|") for line in result.stderr.splitlines() if line.startswith("import time:")]
    imported = {row[-1].strip().split(".")[0] for row in rows}
    assert "torch" in imported
    assert not imported & SIMULATORS
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", ["--print_config", "--print-config"])
@pytest.mark.parametrize("device", ["cpu", "cuda:99"])
@pytest.mark.parametrize("algo", ["m3po", "ppo"])
@pytest.mark.parametrize(
    ("task", "num_envs"), [("walker-walk", {"walker-walk": 10}), (TWO, {"walker-walk": 5, "cup-catch": 5})]
)
def test_tasks_of_suites(capsys, tmp_path, monkeypatch, option, device, algo, task, num_envs):
    monkeypatch.chdir(tmp_path)
    line = [option, "--task", task, "--device", device, "--algo", algo, "--num_envs", "10", "--seed", "7", *OVERRIDES]
    assert train.run(line) == 0
    agent = check(capsys.readouterr().out, num_envs, device, algo)
    assert agent["seed"] == 7
    assert list(tmp_path.iterdir()) == []


MISTAKES = {
    "unknown task": (("--task", "walker-walk,walker-wlak"), "unknown task 'walker-wlak'. Closest: walker-w"),
    "unknown field": (("--task", TWO, "agent.algorithm.gama=1"), "Did you mean 'gamma'?"),
    "field of an earlier version": (
        ("--task", TWO, "agent.algorithm.normalize_values=true"),
        "'normalize_values' was removed; it is replaced by nothing: values are always in units of the task.",
    ),
    "wrong kind": (("--task", TWO, "agent.algorithm.gamma=x"), "expects a number"),
    "wrong value": (("--task", TWO, "agent.algorithm.gamma=2.0"), "gamma must lie in [0, 1]"),
    "malformed device": (("--task", TWO, "--device", "gpu7"), "unknown device 'gpu7': use cpu, cuda or cuda:N."),
    "missing checkpoint": (("--task", TWO, "--checkpoint", "missing.pt"), "There is no checkpoint 'missing.pt'"),
    "no run yet": (("--task", TWO, "--resume", "latest", "--log_root", "logs"), "there is nothing to resume"),
    "several processes": (("--task", TWO, "--distributed"), "not allowed with argument"),
}
"""What a user gets wrong -> command line, and what the message must say."""


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_gets_one_line_and_exit_code_2(capsys, tmp_path, monkeypatch, mistake):
    monkeypatch.chdir(tmp_path)
    line, expected = MISTAKES[mistake]
    assert train.run(["--print_config", *line]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1].startswith("error: ")
    assert expected in err
    assert list(tmp_path.iterdir()) == []


def test_mistake_with_a_task_of_isaac_lab(run_script):
    options = ["--print_config", "--task", "Isaac-Cartpole-v0", "--device", "cuda:0", "agent.algorithm.gama=1"]
    result = run_script(["scripts/train.py", *options])
    assert (result.rc, result.stdout) == (2, "")
    assert result.stderr.splitlines()[-1].startswith("error: unknown override 'agent.algorithm.gama'.")


def test_a_device_may_be_absent_but_not_malformed():
    assert check_device("cuda:99", present=False) == "cuda:99"
    assert check_device("cuda", present=False) == "cuda:0"
    with pytest.raises(UserError, match="unknown device 'gpu7'"):
        check_device("gpu7", present=False)


def test_values_become_plain():
    class Colour(enum.Enum):
        RED = (1, 2)

    class Name(str):
        pass

    @dataclass
    class Section:
        function: object = math.sqrt
        kind: type = yaml.YAMLError
        pair: tuple = (1, None)

    shared = [1.0, np.float32(0.5)]
    config = {
        "section": Section(),
        Name("name"): Name("text"),
        "colour": Colour.RED,
        "array": np.arange(2),
        "lists": (shared, shared),
        "path": plain,
        "flag": True,
    }
    text = yaml.safe_dump(plain(config), sort_keys=False)
    assert "!" not in text
    assert "&" not in text
    assert yaml.safe_load(text) == {
        "section": {"function": "math:sqrt", "kind": "yaml.error:YAMLError", "pair": [1, None]},
        "name": "text",
        "colour": [1, 2],
        "array": [0, 1],
        "lists": [[1.0, 0.5], [1.0, 0.5]],
        "path": "m3po.cli.print_config:plain",
        "flag": True,
    }
