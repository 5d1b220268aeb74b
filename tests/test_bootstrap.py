"""The launcher `isaaclab.sh` and the lock.

Nothing is installed: a copy of the launcher meets stand-ins for uv and Python that write down how they were called.
"""

import re
import shutil
import subprocess
import time
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from conftest import REPOSITORY, Result, run_process
from packaging.requirements import Requirement

# Answers the launcher's question for its version, makes environments like itself, and shows how it was called.
FAKE_PYTHON = """#!/usr/bin/env bash
if [[ "$1" == -c && "$2" == *version_info* ]]; then exit 0; fi
if [[ "$1" == -c && "$2" == *_base_executable* ]]; then echo "$FAKE_PYTHON"; exit; fi
echo "python $*" >> "$CALLS"
if [[ "$1 $2" == "-m venv" ]]; then mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; exit; fi
printf '%s\\n' "pid=$$" "VIRTUAL_ENV=${VIRTUAL_ENV:-}" "OMP_NUM_THREADS=$OMP_NUM_THREADS" "$@"
"""

FAKE_UV = """#!/usr/bin/env bash
if [[ "$1" == --version ]]; then exit 0; fi
echo "uv $*" >> "$CALLS"
if [[ "$1" == venv ]]; then mkdir -p "${@: -1}/bin"; cp "$FAKE_PYTHON" "${@: -1}/bin/python"; fi
if [[ "$2" == sync ]]; then sleep 0.5; fi
if [[ "$2" == sync && -e "$CALLS.fail" ]]; then rm "$CALLS.fail"; exit 1; fi
"""

BROKEN_SHIM = "#!/usr/bin/env bash\necho 'command not found' >&2\nexit 127\n"

TOOLS = ("bash", "cat", "cp", "dirname", "env", "flock", "mkdir", "readlink", "rm", "sha256sum", "sleep")


class Machine:
    """A bare machine: a folder of tools for PATH, an empty home, and a copy of the project."""

    def __init__(self, folder: Path):
        self.project = folder / "project"
        self.home = folder / "home"
        self.bin = folder / "bin"
        self.calls_file = folder / "calls"
        for new in (self.project, self.home, self.bin):
            new.mkdir()
        for name in ("isaaclab.sh", "requirements.txt", "pyproject.toml", ".python-version"):
            shutil.copy(REPOSITORY / name, self.project / name)
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool))
        self.python = self.executable(folder / "fake_python", FAKE_PYTHON)
        self.env = {
            "PATH": str(self.bin),
            "HOME": str(self.home),
            "CALLS": str(self.calls_file),
            "FAKE_PYTHON": str(self.python),
        }

    def executable(self, path: Path, text: str) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
        return path

    def with_uv(self) -> "Machine":
        self.executable(self.bin / "uv", FAKE_UV)
        return self

    def launch(self, *args: str, cwd: Path | None = None, **env: str) -> Result:
        command = [str(self.project / "isaaclab.sh"), *args]
        return run_process(command, timeout=30, env={**self.env, **env}, cwd=cwd or self.home)

    def calls(self) -> list[str]:
        """What was called since the last look."""
        lines = self.calls_file.read_text().splitlines() if self.calls_file.exists() else []
        self.calls_file.unlink(missing_ok=True)
        return lines


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_lock_holds_names_versions_and_hashes_only() -> None:
    lines = (REPOSITORY / "requirements.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith(" ")]
    assert len(pins) > 100
    for line in pins:
        assert re.fullmatch(r"[a-z0-9.-]+==[\w.+]+ \\", line), line
    for line, following in zip(lines, [*lines[1:], "end"], strict=True):
        if line.startswith(" "):
            continued = r" \\" if following.startswith(" ") else ""
            assert re.fullmatch(rf"    --hash=sha256:[0-9a-f]{{64}}{continued}", line), line
        else:
            assert following.startswith("    --hash="), line


def test_lock_fulfils_the_project_and_is_what_runs_here() -> None:
    pins = dict(re.findall(r"^(\S+)==(\S+)", (REPOSITORY / "requirements.txt").read_text(), flags=re.MULTILINE))
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    asked = project["dependencies"] + [name for extra in project["optional-dependencies"].values() for name in extra]
    for requirement in map(Requirement, asked):
        assert requirement.specifier.contains(pins[requirement.name]), requirement
    for name in ("isaaclab", "rsl-rl-lib", "torch", "warp-lang", "newton", "mujoco", "numpy"):
        assert metadata.version(name) == pins[name]


def test_kit_extension_describes_this_project() -> None:
    folder = REPOSITORY / "exts" / "m3po"
    extension = tomllib.loads((folder / "config" / "extension.toml").read_text())
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert extension["package"]["version"] == project["version"]
    (module,) = extension["python"]["module"]
    assert (folder / Path(*module["name"].split("."))).with_suffix(".py").is_file()
    # omni exists inside Kit only, so nothing else may import it
    sources = (folder / "isaaclab_m3po").rglob("*.py")
    importing = [
        path.name for path in sources if re.search(r"^\s*(import|from) omni\b", path.read_text(), re.MULTILINE)
    ]
    assert importing == ["extension.py"]


def test_first_call_installs_the_lock_and_the_second_is_fast(machine: Machine) -> None:
    machine.with_uv()
    arguments = ("-p", "scripts/train.py", "--task", "Isaac-Ant-v0", "--help", "two words", "*", "")
    first = machine.launch(*arguments)
    assert first.rc == 0, first.stderr
    venv = machine.project / ".venv"
    calls = machine.calls()
    assert calls[0] == f"uv venv --quiet --python 3.12 {venv}"
    assert calls[1] == f"uv pip sync --compile-bytecode --python {venv}/bin/python --require-hashes requirements.txt"
    assert calls[2] == f"uv pip install --python {venv}/bin/python --no-deps --no-build-isolation --editable ."
    assert "assets.build_cache()" in calls[3]
    assert "installing the locked packages took" in first.stderr

    start = time.monotonic()
    second = machine.launch(*arguments)
    assert time.monotonic() - start < 1.0
    assert second.rc == 0 and second.stderr == ""
    assert second.stdout.splitlines()[1:] == [f"VIRTUAL_ENV={venv}", "OMP_NUM_THREADS=1", *arguments[1:]]
    assert not [call for call in machine.calls() if call.startswith("uv")]


def test_everything_but_python_goes_to_isaac_labs_command_line(machine: Machine) -> None:
    machine.with_uv().launch("--help")
    out = machine.launch("train", "--rl_library", "m3po", OMP_NUM_THREADS="3").stdout.splitlines()
    assert out[2:] == ["OMP_NUM_THREADS=3", "-P", "-m", "isaaclab", "train", "--rl_library", "m3po"]


@pytest.mark.parametrize("option", ["--install", "-i"])
def test_asked_to_install_it_does_that_and_no_more(machine: Machine, option: str) -> None:
    result = machine.with_uv().launch(option)
    assert result.rc == 0 and result.stdout == ""
    assert result.stderr.splitlines()[-1].endswith(f"packages of the lock are installed in {machine.project / '.venv'}")
    assert any(call.startswith("uv pip sync") for call in machine.calls())


def test_python_replaces_the_launcher_so_that_signals_reach_it(machine: Machine) -> None:
    machine.with_uv().launch("--help")
    command = [str(machine.project / "isaaclab.sh"), "-p", "x.py"]
    process = subprocess.Popen(command, env=machine.env, stdout=subprocess.PIPE, text=True)
    assert process.communicate(timeout=30)[0].splitlines()[0] == f"pid={process.pid}"


def test_launcher_works_from_any_folder_and_through_a_link(machine: Machine) -> None:
    machine.with_uv()
    link = machine.bin / "lab"
    link.symlink_to(machine.project / "isaaclab.sh")
    result = run_process([str(link), "-p", "x.py"], timeout=30, env=machine.env, cwd=Path("/"))
    assert result.rc == 0 and f"VIRTUAL_ENV={machine.project}/.venv" in result.stdout
    assert list(machine.home.iterdir()) == []


def test_interrupted_installation_starts_over(machine: Machine) -> None:
    machine.with_uv()
    Path(f"{machine.calls_file}.fail").touch()
    broken = machine.launch("-p", "x.py")
    assert broken.rc == 1 and "installing the locked packages failed" in broken.stderr and broken.stdout == ""
    half = machine.project / ".venv" / "half_a_package"
    half.touch()
    machine.calls()
    assert machine.launch("-p", "x.py").rc == 0
    assert not half.exists()
    assert machine.calls()[0].startswith("uv venv")


def test_environment_that_is_active_can_be_replaced(machine: Machine) -> None:
    machine.with_uv().launch("--help")
    machine.calls()
    (machine.project / ".venv" / ".m3po").write_text("incomplete\n")
    (machine.bin / "python3.12").symlink_to(machine.project / ".venv" / "bin" / "python")
    assert machine.launch("-p", "x.py").rc == 0
    assert machine.calls()[0] == f"uv venv --quiet --python {machine.python} {machine.project}/.venv"


def test_changed_lock_is_installed_into_the_same_environment(machine: Machine) -> None:
    machine.with_uv().launch("--help")
    machine.calls()
    with (machine.project / "requirements.txt").open("a") as lock:
        lock.write("\n")
    assert machine.launch("--help").rc == 0
    assert machine.calls()[0].startswith("uv pip sync")


def test_of_two_first_calls_one_installs_and_the_other_waits(machine: Machine) -> None:
    machine.with_uv()
    command = [str(machine.project / "isaaclab.sh"), "-p", "x.py"]
    both = [
        subprocess.Popen(command, env=machine.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    messages = [process.communicate(timeout=30)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sum("waiting for it" in message for message in messages) == 1
    assert sum(call.startswith("uv pip sync") for call in machine.calls()) == 1


def test_without_python_and_uv_it_says_so(machine: Machine) -> None:
    for shim in ("python3.12", "python3", "uv"):
        machine.executable(machine.bin / shim, BROKEN_SHIM)
    result = machine.launch("-p", "x.py")
    assert result.rc == 2 and result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert "neither Python 3.12 nor uv was found" in result.stderr


def test_without_uv_a_python_kept_by_pyenv_and_pip_do(machine: Machine) -> None:
    machine.executable(machine.bin / "python3.12", BROKEN_SHIM)
    python = machine.home / ".pyenv" / "versions" / "3.12.9" / "bin" / "python3.12"
    machine.executable(python, FAKE_PYTHON)
    result = machine.launch("-p", "x.py")
    assert result.rc == 0, result.stderr
    calls = machine.calls()
    assert calls[0] == f"python -m venv {machine.project}/.venv"
    assert "install --no-input --no-deps --require-hashes --requirement requirements.txt" in calls[1]
    assert calls[2].endswith("--no-deps --no-build-isolation --editable .")


def test_isaaclab_path_uses_that_checkout(machine: Machine) -> None:
    checkout = machine.home / "IsaacLab"
    machine.executable(checkout / "isaaclab.sh", '#!/usr/bin/env bash\necho "checkout $*" >> "$CALLS"\n')
    arguments = ("-p", "scripts/train.py", "--task", "Isaac-Ant-v0")
    for _ in range(2):
        result = machine.launch(*arguments, ISAACLAB_PATH=str(checkout))
        assert result.rc == 0, result.stderr
    # the project is installed by the first call only
    assert machine.calls() == [
        f"checkout -p -m pip install --no-deps --editable {machine.project}",
        "checkout " + " ".join(arguments),
        "checkout " + " ".join(arguments),
    ]
    assert not (machine.project / ".venv").exists()


@pytest.mark.parametrize("place", ["nowhere", "home", "project"])
def test_isaaclab_path_without_a_checkout_is_an_error(machine: Machine, place: str) -> None:
    result = machine.launch("-p", "x.py", ISAACLAB_PATH=str(machine.home.parent / place))
    assert result.rc == 2 and "is not an Isaac Lab checkout" in result.stderr
    assert len(result.stderr.splitlines()) == 1
