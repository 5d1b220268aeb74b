"""Every task gets M3PO's agents; overrides reach every field and never vanish; the manifest says what ran."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import run_process

from m3po.cli.overrides import TERMS, assign, parse_value
from m3po.config import REMOVED, AlgorithmCfg, from_dict
from m3po.errors import UserError
from m3po.manifest import git_revision, jsonable, package_versions
from m3po.presets import paper, sized

FACTS = """
import contextlib, copy, io, json, sys, warnings
import isaaclab_tasks

agent_modules = {name for name in sys.modules if ".agents." in name}
from isaaclab_m3po import registration
imported_by_us = {name for name in sys.modules if ".agents." in name} - agent_modules

import gymnasium as gym
from isaaclab_m3po import agents

from isaaclab_rl.entrypoints import dispatch
from isaaclab_rl.rsl_rl import handle_deprecated_rsl_rl_cfg
from isaaclab_tasks.utils import resolve_task_config
from isaaclab_tasks.utils.hydra import resolve_presets
from isaaclab_tasks.utils.parse_cfg import load_cfg_from_registry
from isaaclab_m3po.tasks import resolve_task
from m3po.cli.overrides import assign
from m3po.errors import UserError

agents.set_device("cpu")
tasks = sorted(name for name, spec in gym.registry.items() if (spec.kwargs or {}).get("rsl_rl_cfg_entry_point"))
built, networks, noise = {}, {}, {}
with contextlib.redirect_stdout(io.StringIO()):
    for task in tasks:
        copy.deepcopy(gym.registry[task])
        for key in ("rsl_rl_cfg_entry_point", *registration.ENTRY_POINTS):
            cfg = copy.deepcopy(resolve_presets(load_cfg_from_registry(task, key)))
            cfg = handle_deprecated_rsl_rl_cfg(cfg, "5.5.1").to_dict()
            noise.setdefault(task, []).append(cfg["actor"]["distribution_cfg"]["init_std"])
            built[f"{task} {key}"] = cfg["algorithm"]
            networks[task] = [bool(cfg["actor"]), bool(cfg["critic"]), cfg["experiment_name"]]
    ant = resolve_presets(load_cfg_from_registry("Isaac-Ant", "m3po_cfg_entry_point")).to_dict()
    ppo = load_cfg_from_registry("Isaac-Ant", "rsl_rl_cfg_entry_point").to_dict()
    agents.set_device("cuda:0")
    cuda = load_cfg_from_registry("Isaac-Ant", "m3po_cfg_entry_point").to_dict()
    # a selected alternative of the task's agent is also selected in ours (Isaac Lab's own resolution)
    camera = resolve_task_config("Isaac-Cartpole-Camera", "m3po_cfg_entry_point", overrides=["presets=resnet18"])[1]
    # an override through Isaac Lab's own resolution, as in its stock command
    stock = resolve_task_config("Isaac-Ant", "m3po_cfg_entry_point", overrides=["agent.algorithm.planner.horizon=7"])[1]
refused = []
for path in json.loads(sys.argv[1]):
    try:
        assign(stock, path, 0, "agent")
    except UserError as error:
        refused.append(str(error))
backends = {action: dispatch._BACKEND_MODULES[action].get("m3po") for action in ("train", "play")}
del dispatch._BACKEND_MODULES
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    added = registration.add_backends()
print(json.dumps({
    "tasks": tasks, "built": built, "networks": networks, "ant": ant, "ppo": ppo, "cuda": cuda,
    "camera": camera.to_dict()["experiment_name"], "stock_horizon": stock.algorithm.planner.horizon,
    "noise": noise, "refused": refused,
    "backends": backends, "without_table": [added, str(caught[-1].message)],
    "imported_by_us": sorted(imported_by_us), "attached_again": registration.attach(),
    "v0": [resolve_task("Isaac-Ant-v0"), resolve_task("Isaac-Ant"), resolve_task("x:Isaac-Ant-v3")],
}, default=str))
"""

OF_TASK = ("gamma", "entropy_coef", "max_grad_norm", "num_learning_epochs", "num_mini_batches", "clip_param")
"""Fields of the algorithm that a task has tuned for itself."""

OLD = {
    "algorithm.value_gradient.steps_per_iteration": "planner and world_model (planner.max_learning_kl=0 switches",
    "algorithm.distill_coef": "replaced by the regression onto plans (planner.max_learning_kl)",
    "algorithm.planner.stages": "the fraction follows the realised gain",
    "algorithm.planner.share": "replaced by planned_fraction",
    "algorithm.world_model.ring_transitions": "replaced by replay_transitions",
    "algorithm.bonus.alpha": "replaced by size",
    "algorithm.critic_replay.lam": "it is 0.95",
    "quarantine_share": "replaced by max_nan_fraction",
}
"""Path of a field of an earlier version -> what the message must say."""


@pytest.fixture(scope="module")
def facts() -> dict:
    """What a process sees after the registration."""
    result = run_process([sys.executable, "-c", FACTS, json.dumps(list(OLD))], timeout=300)
    assert result.rc == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


def test_every_task_with_an_rsl_rl_agent_gets_both_modes(facts):
    assert len(facts["tasks"]) > 80
    assert facts["attached_again"] == len(facts["tasks"])
    for task in facts["tasks"]:
        for key in ("m3po_cfg_entry_point", "m3po_paper_cfg_entry_point"):
            algorithm = facts["built"][f"{task} {key}"]
            assert algorithm.pop("class_name") == "m3po.algorithms:M3PO"
            assert isinstance(from_dict(AlgorithmCfg, algorithm), AlgorithmCfg)
        actor, critic, experiment = facts["networks"][task]
        assert actor and critic and experiment, task


def test_attaching_imports_no_task_configuration(facts):
    assert facts["imported_by_us"] == []


def test_both_backends_are_in_isaac_labs_table(facts):
    assert facts["backends"] == {
        "train": "m3po.cli.train",
        "play": "m3po.cli.play",
    }


def test_agent_combines_the_tasks_configuration_with_the_preset(facts):
    ant, ppo, preset = facts["ant"], facts["ppo"], dataclasses.asdict(AlgorithmCfg())
    for name in ("obs_groups", "clip_actions", "experiment_name", "save_interval", "critic"):
        assert ant[name] == ppo[name]
    assert ant["actor"]["hidden_dims"] == ppo["actor"]["hidden_dims"]
    assert (ant["num_steps_per_env"], ant["max_iterations"], ant["device"]) == (8, 256, "cpu")
    algorithm = dict(ant["algorithm"])
    assert algorithm.pop("class_name") == "m3po.algorithms:M3PO"
    assert algorithm == preset | {name: ppo["algorithm"][name] for name in OF_TASK}


@pytest.mark.parametrize("key", ["m3po_cfg_entry_point", "m3po_paper_cfg_entry_point"])
def test_the_same_parts_run_on_every_task(facts, key):
    """Tasks choose numbers of PPO; neither their names nor their networks' widths choose parts."""
    preset = AlgorithmCfg() if key == "m3po_cfg_entry_point" else paper()
    same = {name: value for name, value in dataclasses.asdict(preset).items() if name not in OF_TASK}
    for task in facts["tasks"]:
        algorithm = facts["built"][f"{task} {key}"]
        assert {name: algorithm[name] for name in same} == same, task


def test_the_tasks_own_step_sizes_are_for_its_own_algorithm(facts):
    """KL target and value loss belong to PPO, whose critic learns from the newest rollout alone."""
    ant, ppo = facts["ant"]["algorithm"], facts["ppo"]["algorithm"]
    assert (ppo["desired_kl"], ppo["value_loss_coef"]) == (0.01, 1.0)
    assert (ant["desired_kl"], ant["value_loss_coef"]) == (0.06, 0.0)


def test_the_default_mode_begins_with_half_of_the_tasks_noise(facts):
    for task, (ppo, default, paper_mode) in facts["noise"].items():
        assert (default, paper_mode) == (0.5 * ppo, ppo), task
    assert facts["cuda"]["actor"]["distribution_cfg"]["init_std"] == facts["noise"]["Isaac-Ant"][1]


def test_a_cuda_device_keeps_the_tasks_rollout_and_gets_larger_sizes(facts):
    cuda, ppo, larger = facts["cuda"], facts["ppo"], dataclasses.asdict(sized(AlgorithmCfg(), "cuda:0"))
    assert cuda["device"] == "cuda:0"
    assert cuda["num_steps_per_env"] == ppo["num_steps_per_env"]
    assert cuda["max_iterations"] == ppo["max_iterations"]
    for name in ("planner", "world_model", "critic_replay", "bonus"):
        assert cuda["algorithm"][name] == larger[name]


def test_presets_of_the_tasks_agent_stay_selectable(facts):
    assert facts["camera"] == "cartpole_features"


def test_override_reaches_nested_fields_through_the_stock_command(facts):
    assert facts["stock_horizon"] == 7


def test_old_version_suffix_and_module_prefix_resolve(facts):
    assert facts["v0"] == ["Isaac-Ant"] * 3


def test_missing_table_of_backends_is_a_clear_warning(facts):
    added, message = facts["without_table"]
    assert added is False
    assert "`--rl_library m3po` is not available" in message


# -- overrides --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Leaf:
    number: float = 1.5
    written_as_int: float = 16
    count: int = 3
    flag: bool = True
    name: str = "a"
    dims: list = dataclasses.field(default_factory=lambda: [1, 2])
    pair: tuple = (0.0, 1.0)
    optional: float | None = 0.5


@dataclasses.dataclass
class Root:
    leaf: Leaf = dataclasses.field(default_factory=Leaf)
    table: dict = dataclasses.field(default_factory=lambda: {"stiffness": 2.0})


@pytest.mark.parametrize(
    ("path", "text", "expected"),
    [
        ("leaf.number", "2", 2.0),
        ("leaf.number", "-inf", float("-inf")),
        ("leaf.written_as_int", "8.5", 8.5),
        ("leaf.count", "7", 7),
        ("leaf.flag", "False", False),
        ("leaf.name", "b", "b"),
        ("leaf.dims", "[64,64]", [64, 64]),
        ("leaf.pair", "[1.0,2.0]", (1.0, 2.0)),
        ("leaf.optional", "none", None),
        ("table.stiffness", "1e-3", 1e-3),
    ],
)
def test_override_sets_a_value_of_the_right_kind(path, text, expected):
    root = Root()
    assign(root, path, parse_value(text), "agent")
    node = root
    for part in path.split("."):
        node = node[part] if isinstance(node, dict) else getattr(node, part)
    assert node == expected
    assert type(node) is type(expected)


@pytest.mark.parametrize(
    ("path", "text", "message"),
    [
        ("leaf.nmber", "2", "Did you mean 'number'?"),
        ("leaff.number", "2", "Did you mean 'leaf'?"),
        ("leaf.count.x", "2", "single value without fields"),
        ("leaf.count", "2.5", "expects an integer"),
        ("leaf.count", "true", "expects an integer"),
        ("leaf.count", "none", "expects a value like 3"),
        ("leaf.number", "many", "expects a number"),
        ("leaf.flag", "1", "expects true or false"),
        ("leaf.dims", "64", "expects a list"),
        ("leaf", "x", "it has: number"),
        ("table.damping", "1", "agent.table has: stiffness"),
    ],
)
def test_override_that_cannot_apply_says_why(path, text, message):
    with pytest.raises(UserError, match="override 'agent") as error:
        assign(Root(), path, parse_value(text), "agent")
    assert message in str(error.value)


@dataclasses.dataclass
class Terms:
    """A manager's section of an Isaac Lab environment."""

    height: Leaf | str = dataclasses.field(default_factory=Leaf)


@pytest.mark.parametrize("section", TERMS)
def test_null_switches_a_term_of_an_environment_off(section):
    root = {section: {"policy": Terms()}, "scene": Leaf()}
    assign(root, f"{section}.policy.height", None, "env")
    assert root[section]["policy"].height is None
    for path in ("scene", f"{section}.policy.height.number"):
        with pytest.raises(UserError, match="override 'env"):
            assign({section: {"policy": Terms()}, "scene": Leaf()}, path, None, "env")


def test_a_field_of_an_earlier_version_names_what_replaces_it(facts):
    """In the configclasses that Isaac Lab's registry has."""
    for (path, expected), message in zip(OLD.items(), facts["refused"], strict=True):
        *parents, name = path.split(".") if "value_gradient" not in path else ("algorithm", "value_gradient")
        where = ".".join(("agent", *parents))
        assert message.startswith(f"unknown override '{where}.{name}'. '{name}' was removed; it is ")
        assert expected in message
        assert f" {where} has: " in message


@pytest.mark.parametrize(
    ("section", "name"), [(cls, name) for cls, names in REMOVED.items() for name in names], ids="-".join
)
def test_every_field_of_an_earlier_version_is_refused_with_its_replacement(section, name):
    """In the dataclasses that the suites have, and where a checkpoint's configuration becomes one."""
    root = AlgorithmCfg()
    sections = {type(value).__name__: key for key, value in vars(root).items()} | {"AlgorithmCfg": ""}
    node = getattr(root, sections[section]) if sections[section] else root
    path = f"{sections[section]}.{name}".lstrip(".")
    with pytest.raises(UserError) as error:
        assign(root, path, 0, "agent.algorithm")
    assert f"agent.algorithm.{path}'. '{name}' was removed; it is replaced by {REMOVED[section][name]}." in str(
        error.value
    )
    assert "Did you mean" not in str(error.value)
    with pytest.raises(ValueError, match=f"'{name}' was removed"):
        from_dict(type(node), {name: 0})


# -- manifest ---------------------------------------------------------------------------------------------------------


def test_jsonable_keeps_plain_values_and_names_the_rest():
    value = {"a": (1, 2.5, float("-inf")), 3: {"slice": slice(None)}, "none": None, "flag": True}
    assert jsonable(value) == {
        "a": [1, 2.5, "-inf"],
        "3": {"slice": "slice(None, None, None)"},
        "none": None,
        "flag": True,
    }
    json.dumps(jsonable(value), allow_nan=False)


def test_versions_name_what_decides_a_result():
    versions = package_versions()
    assert {"python", "m3po", "isaaclab", "torch", "warp-lang", "newton", "mujoco", "rsl-rl-lib"} == set(versions)
    assert versions["isaaclab"] == "3.0.0"


def test_git_revision_is_that_of_a_tracking_checkout(tmp_path: Path):
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    tracked, untracked = tmp_path / "tracked.py", tmp_path / "untracked.py"
    tracked.write_text("1")
    untracked.write_text("2")
    assert git_revision(tracked) is None
    git("init", "--quiet")
    git("add", "tracked.py")
    git("commit", "--quiet", "-m", "first")
    untracked.unlink()
    assert git_revision(tracked) == {"revision": git("rev-parse", "HEAD"), "dirty": False}
    tracked.write_text("3")
    assert git_revision(tracked)["dirty"] is True
    assert git_revision(untracked) is None
