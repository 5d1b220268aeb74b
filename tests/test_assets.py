"""The embedded assets: what is built, when they are chosen, and that the tasks they cover run on them."""

import sys
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from isaaclab_m3po import asset_builder, asset_files, assets
from m3po.errors import M3POError, UserError

# Steps a task with random actions and prints what its robot ended up with.
STEP = """
import argparse, sys
from isaaclab_m3po.assets import prepare_assets
task = sys.argv.pop(1)
print("root", prepare_assets("embedded", task).root)
import gymnasium as gym
import torch
import isaaclab_tasks
from isaaclab.app import add_launcher_args, launch_simulation
from isaaclab_tasks.utils import resolve_task_config, setup_preset_cli
parser = argparse.ArgumentParser()
add_launcher_args(parser)
args, _ = setup_preset_cli(parser, ["--device", "cpu"])
env_cfg, _ = resolve_task_config(task, "rsl_rl_cfg_entry_point")
with launch_simulation(env_cfg, args):
    env_cfg.scene.num_envs, env_cfg.seed, env_cfg.sim.device = 16, 1, "cpu"
    env = gym.make(task, cfg=env_cfg)
    env.reset()
    actions = torch.zeros(env.action_space.shape)
    for _ in range(20):
        obs, reward, *_ = env.step(actions.uniform_(-1.0, 1.0))
    (robot,) = env.unwrapped.scene.articulations.values()
    print("finite", all(x.isfinite().all().item() for x in (*obs.values(), reward)))
    print("shape", *obs["policy"].shape, actions.shape[1])
    print("joints", *robot.joint_names)
    env.close()
"""

ANT_JOINTS = {
    f"{leg}_{part}" for leg in ("front_left", "front_right", "left_back", "right_back") for part in ("leg", "foot")
}
HUMANOID_JOINTS = {f"lower_waist:{i}" for i in range(2)} | {"pelvis"}
for side in ("left", "right"):
    HUMANOID_JOINTS |= {f"{side}_upper_arm:{i}" for i in range(2)} | {f"{side}_lower_arm", f"{side}_shin"}
    HUMANOID_JOINTS |= {f"{side}_thigh:{i}" for i in range(3)} | {f"{side}_foot:{i}" for i in range(2)}


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As in a process that has chosen nothing and imported no Isaac Lab, with a cache of its own."""
    monkeypatch.setenv("M3PO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ISAACSIM_ASSET_ROOT", "to be restored")
    monkeypatch.delenv("ISAACSIM_ASSET_ROOT")
    monkeypatch.delitem(sys.modules, "isaaclab.utils.assets", raising=False)
    monkeypatch.setattr(assets, "_chosen", None)


def root_of_environment() -> str | None:
    return assets.os.environ.get("ISAACSIM_ASSET_ROOT")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("assets")
    asset_builder.build(folder)
    return folder


@pytest.mark.parametrize("name", asset_builder.FILES)
def test_every_file_opens_and_has_its_default_prim(built: Path, name: str) -> None:
    from pxr import Usd

    stage = Usd.Stage.Open(str(built / name))
    assert stage.GetDefaultPrim().IsValid()


def test_cartpole_default_prim_is_the_articulation(built: Path) -> None:
    from pxr import Usd, UsdPhysics

    stage = Usd.Stage.Open(str(built / asset_builder.CARTPOLE))
    prim = stage.GetDefaultPrim()
    assert prim.GetName() == "cartpole" and prim.HasAPI(UsdPhysics.ArticulationRootAPI)


def test_humanoid_joints_have_isaac_labs_names(built: Path) -> None:
    from pxr import Usd

    stage = Usd.Stage.Open(str(built / asset_builder.HUMANOID))
    names = {prim.GetName() for prim in stage.GetPrimAtPath("/nv_humanoid/joints").GetChildren()}
    assert set(asset_builder.HUMANOID_JOINTS.values()) <= names
    assert not set(asset_builder.HUMANOID_JOINTS) & names


def test_ground_is_a_plane_that_collides_and_is_drawn(built: Path) -> None:
    from pxr import Usd, UsdGeom, UsdPhysics

    stage = Usd.Stage.Open(str(built / asset_builder.GROUND))
    (plane,) = stage.GetDefaultPrim().GetChildren()
    assert plane.GetTypeName() == "Plane" and plane.HasAPI(UsdPhysics.CollisionAPI)
    assert UsdGeom.Imageable(plane).ComputePurpose() == "default"


@pytest.mark.parametrize(
    ("task", "covered"),
    [
        ("Isaac-Ant", True),
        ("Isaac-Ant-v0", True),
        ("Isaac-Humanoid-Direct-v3", True),
        ("some.module:Isaac-Cartpole", True),
        ("Isaac-Cartpole-Camera", False),
        ("Isaac-Velocity-Flat-AnymalD-v0", False),
        ("Isaac-Ant-v0-Mine", False),
    ],
)
def test_covered_tasks(task: str, covered: bool) -> None:
    assert assets.is_covered(task) is covered


def test_auto_takes_embedded_assets_for_a_covered_task() -> None:
    choice = assets.prepare_assets("auto", "Isaac-Ant-v0")
    assert choice.mode == "embedded" and choice.root == root_of_environment() == str(assets.cache_folder())
    assert all((Path(choice.root) / name).is_file() for name in asset_builder.FILES)
    # a child process inherits the variable, and must not take it for a wish of the user
    assert assets.prepare_assets("auto", "Isaac-Ant-v0") == choice
    assert str(choice).startswith(f"embedded ({choice.root})")


def test_auto_leaves_other_tasks_to_isaac_lab() -> None:
    choice = assets.prepare_assets("auto", "Isaac-Velocity-Flat-AnymalD")
    assert (choice.mode, choice.root, root_of_environment()) == ("remote", None, None)


def test_auto_respects_a_root_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISAACSIM_ASSET_ROOT", "/data/mirror")
    choice = assets.prepare_assets("auto", "Isaac-Ant")
    assert (choice.mode, choice.root, root_of_environment()) == ("custom", "/data/mirror", "/data/mirror")


def test_a_flag_overrides_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISAACSIM_ASSET_ROOT", "/data/mirror")
    assert assets.prepare_assets("embedded", "Isaac-Ant").root == root_of_environment() != "/data/mirror"
    assert assets.prepare_assets("remote", "Isaac-Ant").mode == "remote"
    assert root_of_environment() is None


def test_wrong_wishes_are_refused() -> None:
    with pytest.raises(UserError, match="do not cover 'Isaac-Reach-Franka', only: Isaac-Cartpole, "):
        assets.prepare_assets("embedded", "Isaac-Reach-Franka")
    with pytest.raises(UserError, match="choose from: auto, embedded, remote"):
        assets.prepare_assets("local", "Isaac-Ant")


def test_a_choice_that_comes_too_late_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "isaaclab.utils.assets", types.ModuleType("assets"))
    with pytest.raises(M3POError, match="before Isaac Lab is imported"):
        assets.prepare_assets("auto", "Isaac-Ant")
    assert assets.prepare_for_stock_command() is None


def test_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("M3PO_CACHE", "/dev/null/cache")
    with pytest.raises(UserError, match="set M3PO_CACHE to a writable folder"):
        assets.prepare_assets("auto", "Isaac-Ant")


def test_cache_built_by_several_at_once_and_repaired() -> None:
    with ThreadPoolExecutor(3) as pool:
        folders = {future.result() for future in [pool.submit(assets.build_cache) for _ in range(3)]}
    (folder,) = folders
    assert list(folder.parent.iterdir()) == [folder]
    (folder / asset_builder.GROUND).unlink()
    assert assets.build_cache() == folder
    assert (folder / asset_builder.GROUND).is_file()
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize(
    ("arguments", "mode"),
    [
        (["train", "--rl_library", "rsl_rl", "--task", "Isaac-Ant", "--device", "cpu"], "embedded"),
        (["play", "--task=Isaac-Cartpole"], "embedded"),
        (["train", "--task", "Isaac-Reach-Franka"], "remote"),
        (["train", "--task"], None),
        (["list_envs"], None),
    ],
)
def test_stock_command(monkeypatch: pytest.MonkeyPatch, arguments: list[str], mode: str | None) -> None:
    monkeypatch.setattr(sys, "argv", ["isaaclab", *arguments])
    choice = assets.prepare_for_stock_command()
    assert (choice and choice.mode) == mode
    assert (root_of_environment() is not None) == (mode == "embedded")


def test_stock_command_leaves_an_earlier_choice_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assets.prepare_assets("remote", "Isaac-Ant")
    monkeypatch.setattr(sys, "argv", ["train.py", "--task", "Isaac-Ant", "--assets", "remote"])
    assert assets.prepare_for_stock_command() is None
    assert root_of_environment() is None


# the manager-based tasks are trained on embedded assets by other tests
@pytest.mark.sim
@pytest.mark.parametrize(
    ("task", "shape", "joints"),
    [
        ("Isaac-Cartpole-Direct", "16 4 1", {"slider_to_cart", "cart_to_pole"}),
        ("Isaac-Ant-Direct", "16 60 8", ANT_JOINTS),
        ("Isaac-Humanoid-Direct", "16 87 21", HUMANOID_JOINTS),
    ],
)
def test_task_steps_on_embedded_assets(run_script, task: str, shape: str, joints: set[str]) -> None:
    result = run_script(["-c", STEP, task], timeout=300)
    assert result.rc == 0, result.stderr[-2000:]
    printed = dict(line.split(" ", 1) for line in result.stdout.splitlines() if " " in line)
    assert printed["root"] == str(assets.cache_folder())
    assert printed["finite"] == "True"
    assert printed["shape"] == shape
    assert set(printed["joints"].split()) == joints


# -- tasks that are not known to be covered ---------------------------------------------------------------------------

ROBOT, LACKING = asset_builder.CARTPOLE, "Isaac/Robots/Other/other.usd"


@pytest.mark.parametrize(
    ("files", "mode", "set_to_cache", "chosen"),
    [
        ([ROBOT], "auto", False, "embedded"),
        ([ROBOT, asset_builder.GROUND], "embedded", False, "embedded"),
        ([ROBOT, LACKING], "auto", False, "remote"),
        ([], "auto", False, "remote"),  # what its code loads cannot be told
        ([], "embedded", False, "embedded"),
        (None, "auto", False, "remote"),
        ([ROBOT], "auto", True, "embedded"),
        ([ROBOT], "remote", True, "remote"),
    ],
)
def test_a_users_task_is_judged_by_its_files(monkeypatch, files, mode, set_to_cache, chosen) -> None:
    monkeypatch.setattr(assets, "named_by", lambda task, root: files)
    if set_to_cache:
        monkeypatch.setenv("ISAACSIM_ASSET_ROOT", str(assets.cache_folder()))
    choice = assets.prepare_assets(mode, "My-Task")
    assert choice.mode == chosen
    assert root_of_environment() == (str(assets.cache_folder()) if chosen == "embedded" else None)


@pytest.mark.parametrize("asked", ["option", "variable"])
def test_a_missing_file_is_named_where_embedded_assets_are_asked_for(monkeypatch, asked) -> None:
    monkeypatch.setattr(assets, "named_by", lambda task, root: [ROBOT, LACKING])
    if asked == "variable":
        monkeypatch.setenv("ISAACSIM_ASSET_ROOT", str(assets.cache_folder()))
    with pytest.raises(UserError, match=f"'My-Task' needs {LACKING}$"):
        assets.prepare_assets("embedded" if asked == "option" else "auto", "My-Task")


def test_the_files_that_a_configuration_names() -> None:
    nested = types.SimpleNamespace(path="/assets/a.usd", other="/elsewhere/b.usd", number=3)
    tree = {"x": nested, "again": nested, "list": ["/assets/c/d.usd", ("/assets/e.usd",)], "cls": dict}
    tree["itself"] = tree
    assert sorted(asset_files.below("/assets", tree)) == ["a.usd", "c/d.usd", "e.usd"]


def test_the_files_of_real_tasks() -> None:
    root = assets.cache_folder()
    assert asset_files.named_by("Isaac-Ant-v0", root) == [asset_builder.ANT]
    assert asset_files.named_by("no-such-task", root) is None
