"""The library as a package: what a user of it installs, without Isaac Lab, and beside mjlab."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY, run_process
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from m3po import distributed
from m3po.errors import UserError

EXAMPLE = REPOSITORY / "examples" / "plain_vec_env.py"


def create_venv(folder: Path) -> Path:
    """A virtual environment with nothing in it; returns its site-packages."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    return folder / "lib" / f"python3.{sys.version_info[1]}" / "site-packages"


def closure(names: list[str]) -> set[str]:
    """Distributions and all that they need, as installed here."""
    found, left = set(), list(names)
    while left:
        requirement = Requirement(left.pop())
        name = canonicalize_name(requirement.name)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        distribution = importlib.metadata.distribution(name)
        assert requirement.specifier.contains(distribution.version, prereleases=True), requirement
        new = [f"{extra}:{name}" for extra in requirement.extras if f"{extra}:{name}" not in found]
        if name in found and not new:
            continue
        found |= {name, *new}
        for text in distribution.requires or []:
            inner = Requirement(text)
            if inner.marker is None or any(
                inner.marker.evaluate({"extra": extra}) for extra in (requirement.extras or {""})
            ):
                left.append(f"{inner.name}{f'[{",".join(inner.extras)}]' if inner.extras else ''}{inner.specifier}")
    return {name for name in found if ":" not in name}


def link(names: set[str], site: Path) -> None:
    """Make distributions of this environment importable in another one."""
    for name in names:
        for file in importlib.metadata.distribution(name).files or []:
            top, source = file.parts[0], Path(file.locate())
            place = site / top
            if top in ("..", "bin") or place.exists():
                continue
            for _ in file.parts[1:]:
                source = source.parent
            place.symlink_to(source)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of this tree."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for name in ("source", "exts", "tasks"):
        shutil.copytree(REPOSITORY / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, tree)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", out, tree], check=True)
    (path,) = out.glob("m3po-*.whl")
    return path


@pytest.fixture(scope="module")
def clean(wheel, tmp_path_factory) -> Path:
    """The ``bin`` folder of an environment that holds the wheel and the library's own dependencies alone."""
    folder = tmp_path_factory.mktemp("clean")
    site = create_venv(folder)
    link(closure([text for text in importlib.metadata.requires("m3po") if "extra" not in text]), site)
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, wheel], check=True)
    return folder / "bin"


def run(clean: Path, *command: object, timeout: float = 300.0):
    """Run a program of an environment outside of the repository."""
    own = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return run_process([clean / str(command[0]), *command[1:]], timeout, own, clean.parent)


def test_the_library_needs_no_isaac_lab(clean):
    names = ("isaaclab", "isaacsim", "mujoco", "newton", "dm_control", "metaworld", "mjlab", "matplotlib", "wandb")
    found = run(clean, "python", "-c", f"import importlib.util as u; print([n for n in {names} if u.find_spec(n)])")
    assert found.stdout.strip() == "[]", found.stderr


def test_without_isaac_lab_a_plain_vec_env_trains_under_the_stock_runner(clean):
    trained = run(clean, "python", EXAMPLE, 2)
    assert trained.rc == 0, trained.stderr[-3000:]
    assert "Learning iteration 1/2" in trained.stdout
    assert re.search(r"mean distance at the end of an episode: \d+\.\d+", trained.stdout)


@pytest.mark.learning
def test_the_example_learns(run_script):
    trained = run_script([EXAMPLE, "60"])
    assert trained.rc == 0, trained.stderr[-3000:]
    assert float(trained.stdout.split()[-1]) < 0.1  # it begins at 0.5 and further away


def test_the_console_command(clean):
    assert run(clean, "m3po", "--version").stdout == f"m3po {importlib.metadata.version('m3po')}\n"
    usage = run(clean, "m3po")
    assert (usage.rc, usage.stderr) == (0, "")
    for name in ("train", "play", "list", "replay"):
        assert re.search(rf"^  {name} ", usage.stdout, flags=re.MULTILINE)
        assert run(clean, "m3po", name, "--help").rc == 0
    wrong = run(clean, "m3po", "trian")
    assert wrong.rc == 2
    assert wrong.stderr.startswith("error: unknown command 'trian'")


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("Isaac-Ant-v0", "error: task 'Isaac-Ant-v0' needs isaaclab, which is not installed: pip install"),
        ("walker-walk", "error: task 'walker-walk' needs dmcontrol, which is not installed: pip install"),
        ("mw-reach", "error: task 'mw-reach' needs metaworld, which is not installed: pip install"),
        ("Mjlab-Cartpole-Balance", "error: task 'Mjlab-Cartpole-Balance' needs mjlab, which is not installed: pip"),
        ("walker-wlak", "error: unknown task 'walker-wlak'. Closest: walker-walk"),
    ],
)
@pytest.mark.parametrize("command", ["train", "play"])
def test_what_is_not_installed_is_named_with_what_installs_it(clean, command, task, message):
    result = run(clean, "m3po", command, "--task", task)
    assert (result.rc, result.stdout) == (2, "")
    assert result.stderr.startswith(message)
    assert result.stderr.count("\n") == 1


def test_tasks_are_listed_without_their_simulators(clean):
    listed = run(clean, "m3po", "list")
    assert listed.rc == 0, listed.stderr
    assert "dmcontrol: 39 tasks, not installed: pip install 'm3po[dmcontrol]'" in listed.stdout
    assert "isaaclab: 0 tasks, not installed: pip install 'm3po[isaaclab]'" in listed.stdout


@pytest.fixture(scope="module")
def mjlab(tmp_path_factory) -> Path:
    """The ``bin`` folder of an environment with mjlab, its MuJoCo and its rsl_rl before what is installed here."""
    folder = tmp_path_factory.mktemp("mjlab")
    site = create_venv(folder)
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--require-hashes", "--requirement", REPOSITORY / "requirements-mjlab.txt"], check=True)
    (site / "zz.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    folders = [REPOSITORY / name for name in ("source", "exts/m3po", "tasks")]
    (site / "aa.pth").write_text("\n".join(map(str, folders)))
    return folder / "bin"


def test_the_lock_for_mjlab_is_names_versions_and_hashes_and_differs_from_the_main_one_where_it_must():
    text, main = ((REPOSITORY / lock).read_text() for lock in ("requirements-mjlab.txt", "requirements.txt"))
    for line in text.splitlines():
        assert re.fullmatch(r"[a-z0-9.-]+==[\w.+]+ \\|    --hash=sha256:[0-9a-f]{64}( \\)?", line), line
    own, others = (dict(re.findall(r"^(\S+)==(\S+)", lock, flags=re.MULTILINE)) for lock in (text, main))
    assert own["mjlab"] == "1.6.0"
    assert {name for name in own if name in others} == {"decorator", "mujoco", "mujoco-warp", "rsl-rl-lib"}


@pytest.mark.slow
@pytest.mark.sim
def test_a_task_of_mjlab_trains_evaluates_resumes_and_plays(mjlab, tmp_path, monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "egl")
    task = ["--task", "Mjlab-Cartpole-Balance", "--log_root", tmp_path, "--device", "cpu"]
    options = [*task, "--num_envs", 16, "--eval_interval", 2, "--eval_envs", 2]
    command = [*("-m", "m3po.cli.main", "train"), *map(str, options), "--max_iterations"]
    trained = run(mjlab, "python", *command, 2, timeout=600)
    assert trained.rc == 0, trained.stderr[-3000:]
    assert re.search(r"evaluation after iteration 2: prior \d+\.\d+ \+- ", trained.stdout)
    resumed = run(mjlab, "python", *command, 3, "--resume", "latest", timeout=600)
    assert resumed.rc == 0, resumed.stderr[-3000:]
    assert "Iteration 3/3" in resumed.stdout
    watched = ("--num_envs", 2, "--num_episodes", 2, "--video", "--video_length", 3)
    played = run(mjlab, "python", "-m", "m3po.cli.main", "play", *task, *watched)
    assert played.rc == 0, played.stderr[-3000:]
    assert re.search(r"^Mjlab-Cartpole-Balance +\d+\.\d+ \+-", played.stdout, flags=re.MULTILINE)
    assert "(3 frames)" in played.stdout


@pytest.mark.slow
@pytest.mark.sim
def test_mjlabs_own_runner_trains_m3po(mjlab):
    trained = run(mjlab, "python", REPOSITORY / "examples" / "mjlab_task.py", "Mjlab-Cartpole-Balance", 2, timeout=600)
    assert trained.rc == 0, trained.stderr[-3000:]
    assert "Learning iteration 1/2" in trained.stdout


@pytest.mark.slow
@pytest.mark.sim
def test_final_observations_and_curricula_of_mjlab(mjlab):
    script = """
import torch
from m3po_tasks.mjlab import SUITE
from m3po.errors import UserError
env = SUITE.make("Mjlab-Velocity-Flat-Unitree-Go1", 4, seed=1, device="cpu")
before = env.get_observations()
env.episode_length_buf = torch.tensor([0, env.max_episode_length - 1, 5, 5])
obs, rewards, dones, extras = env.step(torch.zeros(4, env.num_actions))
assert dones.tolist() == extras["time_outs"].tolist() == [False, True, False, False], dones
final = extras["final_obs"]
for group in ("policy", "critic"):
    same = (final[group] == obs[group]).all(1)
    assert same.tolist() == [True, False, True, True], same
assert env.episode_length_buf.tolist() == [1, 0, 6, 6]
assert "Episode_Termination/time_out" in extras["log"], sorted(extras["log"])
assert env.curriculum_state() == 1
env.load_curriculum_state(1000)
assert env.curriculum_state() == 1000
obs = env.reset_envs(torch.tensor([2]))
assert env.episode_length_buf.tolist() == [1, 0, 0, 6]
try:
    SUITE.make("Mjlab-Lift-Cube-Yam-Rgb", 2, seed=1, device="cpu")
except UserError as error:
    assert "reads no images" in str(error)
else:
    raise AssertionError
print("good")
"""
    result = run(mjlab, "python", "-c", script, timeout=600)
    assert result.stdout.endswith("good\n"), result.stderr[-3000:]


def test_several_processes_need_rsl_rl_that_averages_over_them(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("importlib.metadata.version", lambda name: {"rsl-rl-lib": "5.4.2"}[name])
    with pytest.raises(UserError, match=r"needs rsl-rl-lib 5\.5: the normalisers of 5\.4\.2"):
        distributed.check_start(True)
