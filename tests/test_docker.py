"""The image, its services and the Kubernetes job: linted, every name resolved, and the image's steps run in order.

There is no container engine here. What needs one, or needs root, is left out and listed in ``docs/clusters.md``.
"""

import os
import re
import shlex
import shutil
import socket
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY, Result, run_process
from test_bootstrap import FAKE_PYTHON, TOOLS
from torch.utils.tensorboard import SummaryWriter

DOCKER = REPOSITORY / "docker"
SHELL_SCRIPTS = sorted([*DOCKER.glob("*.sh"), REPOSITORY / "isaaclab.sh", REPOSITORY / ".ci" / "run"])
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
PINS = dict(re.findall(r"^(\S+)==(\S+)", (REPOSITORY / "requirements.txt").read_text(), flags=re.MULTILINE))
ROOT = "/opt/m3po"
CACHE = "/home/m3po/.cache"
KUBERNETES = "1.31"


def read_stages() -> tuple[dict[str, str], dict[str, list[tuple[str, str]]]]:
    """Arguments before the first stage, and the instructions of each stage."""
    text = re.sub(r"^\s*#.*\n", "", (DOCKER / "Dockerfile").read_text(), flags=re.MULTILINE)
    arguments, stages, current = {}, {}, None
    for line in filter(str.strip, text.replace("\\\n", " ").splitlines()):
        name, rest = line.split(maxsplit=1)
        rest = " ".join(rest.split())
        if name == "FROM":
            base, stage = rest.split(" AS ")
            current = stages[stage] = [(name, base)]
        elif current is None:
            arguments.update([rest.split("=", 1)])
        else:
            current.append((name, rest))
    return arguments, stages


ARGUMENTS, STAGES = read_stages()
COMPOSE = yaml.safe_load((DOCKER / "compose.yaml").read_text())
CLAIM, JOB = yaml.safe_load_all((DOCKER / "kubernetes_job.yaml").read_text())
POD = JOB["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]


def settings(stage: str) -> dict[str, str]:
    """What ENV sets in a stage."""
    words = [word for name, rest in STAGES[stage] if name == "ENV" for word in shlex.split(rest)]
    return dict(word.split("=", 1) for word in words)


# -- linters ----------------------------------------------------------------------------------------------------------


def lint(tool: str, *arguments: object) -> Result:
    """Run a linter of the environment; all of them are in the lock."""
    command = shutil.which(tool, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    assert command is not None, f"{tool} is in the lock, but not installed"
    return run_process([command, *map(str, arguments)], timeout=60)


LINTERS = {
    "Dockerfile": (["hadolint"], [DOCKER / "Dockerfile"], "FROM ubuntu\nRUN cd /tmp\n"),
    "shell": (["shellcheck"], SHELL_SCRIPTS, "#!/bin/bash\nrm $1\n"),
    "compose": (
        ["check-jsonschema", "--builtin-schema", "vendor.compose-spec"],
        [DOCKER / "compose.yaml"],
        "services:\n  train:\n    imagee: m3po\n",
    ),
    "Kubernetes": (
        ["kubernetes-validate", "--strict", "--kubernetes-version", KUBERNETES],
        [DOCKER / "kubernetes_job.yaml"],
        "apiVersion: batch/v1\nkind: Job\nmetadata: {name: a}\nspec: {templat: {}}\n",
    ),
}
"""Kind of file -> command, files, and a bad file that the command must find."""


@pytest.mark.parametrize("kind", LINTERS)
def test_linter_is_content_with_our_files_and_not_with_a_bad_one(kind: str, tmp_path: Path) -> None:
    command, files, bad = LINTERS[kind]
    result = lint(*command, *files)
    assert result.rc == 0, result.stdout + result.stderr
    (tmp_path / "bad.yaml").write_text(bad)
    assert lint(*command, tmp_path / "bad.yaml").rc != 0


# -- names and versions -----------------------------------------------------------------------------------------------


def test_bases_are_those_of_the_locked_isaac_lab() -> None:
    version = PINS["isaaclab"]
    assert ARGUMENTS["BASE"] == f"nvcr.io/nvidia/isaac-lab:{version}-kitless"
    assert ARGUMENTS["ISAACSIM"] == f"nvcr.io/nvidia/isaac-lab:{version}"
    assert [stage[0][1] for stage in STAGES.values()] == ["${BASE}", "${ISAACSIM}", "${BASE}"]
    for service in COMPOSE["services"].values():
        for name, value in service["build"]["args"].items():
            assert value == f"${{{name}:-{ARGUMENTS[name]}}}"


def test_images_carry_the_version_of_the_project() -> None:
    tags = {service["image"] for service in COMPOSE["services"].values()} | {CONTAINER["image"]}
    assert tags == {f"{name}:{PROJECT['version']}" for name in ("m3po", "m3po-isaacsim")}
    header = (DOCKER / "Dockerfile").read_text()
    assert set(re.findall(r"--tag (\S+)", header)) == tags


def test_python_is_the_one_of_the_project() -> None:
    version = (REPOSITORY / ".python-version").read_text().strip()
    assert PROJECT["requires-python"] == f"=={version}.*"
    text = "\n".join(rest for stage in STAGES.values() for _, rest in stage)
    assert set(re.findall(r"python(\d[\d.]*)", text)) == {version}


def test_image_draws_with_what_the_tests_draw_with() -> None:
    wanted = re.search(r"gl_packages=\((.*)\)", (REPOSITORY / ".ci" / "run").read_text())[1].split()
    installed = next(rest for name, rest in STAGES["kitless"] if name == "RUN")
    assert set(wanted) <= set(installed.split())


def test_every_path_exists() -> None:
    for line in (DOCKER / "Dockerfile.dockerignore").read_text().splitlines():
        if line.startswith("!"):
            assert (REPOSITORY / line[1:]).exists(), line
    files = [DOCKER / "Dockerfile", DOCKER / "compose.yaml", DOCKER / "kubernetes_job.yaml", *SHELL_SCRIPTS]
    for file in files:
        text = re.sub(r"^\s*#.*\n", "", file.read_text(), flags=re.MULTILINE)
        for name in re.findall(r"\b(?:docker|scripts)/\w+\.\w+|\./isaaclab\.sh", text):
            assert (REPOSITORY / name).is_file(), f"{name} in {file.name}"
            assert name.endswith(("Dockerfile", ".py", ".yaml")) or os.access(REPOSITORY / name, os.X_OK), name
    for service in COMPOSE["services"].values():
        build = service["build"]
        assert (DOCKER / build["context"]).resolve() == REPOSITORY
        assert (REPOSITORY / build["dockerfile"]).is_file() and build["target"] in STAGES


# -- who runs, and where it may write ---------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["kitless", "isaacsim"])
def test_image_runs_as_a_user_who_owns_nothing_but_logs_and_caches(stage: str) -> None:
    names = [name for name, _ in STAGES[stage]]
    users = [rest for name, rest in STAGES[stage] if name == "USER"]
    # root prepares, uid 1000 runs; nothing is installed after that
    assert users == ["0", "1000:1000"]
    assert names[names.index("USER", names.index("USER") + 1) :] == ["USER", "HEALTHCHECK", "ENTRYPOINT", "CMD"]
    owned = [rest for name, rest in STAGES[stage] if "1000" in rest and name in ("COPY", "RUN")]
    assert not [rest for rest in owned if rest.startswith("--chown") and ROOT in rest]


def test_default_image_is_without_kit() -> None:
    assert list(STAGES)[-1] == "kitless"
    assert settings("kitless")["ISAACLAB_PATH"] == settings("builder")["ISAACLAB_PATH"] == ""


def test_caches_lie_in_the_volume() -> None:
    environment = settings("kitless")
    assert environment["HOME"] == CACHE.removesuffix("/.cache")
    for name, value in environment.items():
        assert value.startswith(f"{CACHE}/") or not re.search("CACHE|TMP", name), name
    mounts = {mount["mountPath"]: mount.get("subPath") for mount in CONTAINER["volumeMounts"]}
    assert mounts == {f"{ROOT}/logs": "logs", CACHE: "cache", "/dev/shm": None}
    for name, service in COMPOSE["services"].items():
        targets = dict(volume.split(":") for volume in service["volumes"])
        assert targets["logs"] == f"{ROOT}/logs"
        assert targets.keys() <= COMPOSE["volumes"].keys()
        assert name == "train-isaacsim" or targets["cache"] == CACHE


def test_services_run_the_scripts() -> None:
    for name, service in COMPOSE["services"].items():
        script = name.split("-")[0]
        assert service["entrypoint"] == ["./isaaclab.sh", "-p", f"scripts/{script}.py"]
        gpus = "deploy" in service
        assert service["profiles"] == ["cpu" if name.endswith("-cpu") else "isaacsim" if "isaacsim" in name else "gpu"]
        assert gpus == (service["profiles"] != ["cpu"])
        assert service["cap_drop"] == ["ALL"] and not {"privileged", "user", "ipc", "network_mode"} & service.keys()
        # the image's check is about a training
        assert service.get("healthcheck", {}).get("disable", False) == (script == "play")
        # nothing but Kit's two questions comes from the environment of who starts it
        assert set(service.get("environment", [])) <= {"ACCEPT_EULA", "PRIVACY_CONSENT"}


def test_kubernetes_job_goes_on_after_a_disturbance_and_runs_as_a_user() -> None:
    spec = JOB["spec"]
    # a failure policy is only accepted with these two
    assert POD["restartPolicy"] == "Never" and spec["podReplacementPolicy"] == "Failed"
    rules = spec["podFailurePolicy"]["rules"]
    codes = [rule.get("onExitCodes", {}) for rule in rules]
    assert [rule["action"] for rule in rules] == ["Ignore", "Ignore", "FailJob"]
    assert [code.get("values") for code in codes] == [[75], None, [2]]
    assert {code["containerName"] for code in codes if code} == {CONTAINER["name"]}
    assert POD["terminationGracePeriodSeconds"] >= 300
    security = POD["securityContext"]
    assert security["runAsNonRoot"] and {security[key] for key in ("runAsUser", "runAsGroup", "fsGroup")} == {1000}
    assert CONTAINER["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    assert CONTAINER["resources"]["limits"]["nvidia.com/gpu"] == 1
    (storage,) = (volume for volume in POD["volumes"] if volume["name"] == "storage")
    assert storage["persistentVolumeClaim"]["claimName"] == CLAIM["metadata"]["name"]
    for probe in ("startupProbe", "livenessProbe"):
        assert CONTAINER[probe]["exec"]["command"] == [f"{ROOT}/docker/healthcheck.sh"]


# -- health -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A folder with the health check and a run's folder."""
    (tmp_path / "docker").mkdir()
    shutil.copy(DOCKER / "healthcheck.sh", tmp_path / "docker")
    (tmp_path / "logs" / "m3po" / "ant" / "run").mkdir(parents=True)
    return tmp_path


def is_healthy(image: Path, host: str = socket.gethostname()) -> bool:
    environment = {"PATH": os.environ["PATH"], "HOSTNAME": host}
    return run_process([str(image / "docker" / "healthcheck.sh")], timeout=30, env=environment, cwd=Path("/")).rc == 0


def test_health_is_a_log_that_this_host_has_written_lately(image: Path) -> None:
    assert not is_healthy(image)
    run = image / "logs" / "m3po" / "ant" / "run"
    SummaryWriter(str(run)).close()
    assert is_healthy(image)
    assert not is_healthy(image, "another")
    (log,) = run.glob("events.*")
    os.utime(log, (time.time() - 3600,) * 2)
    assert not is_healthy(image)


# -- the image's steps ------------------------------------------------------------------------------------------------


class Build:
    """Runs the steps of an image in a folder in place of ``/``, as far as they need neither root nor an engine.

    Left out are the distribution's packages, the user, and the change of owner. An environment is tied to its path, so
    all stages are built in the same folder, which is moved away when the next one begins.
    """

    def __init__(self, folder: Path, env: dict[str, str]) -> None:
        self.folder, self.root, self.context = folder, folder / "image", folder / "context"
        self.base_env = env
        self.name = ""
        self.context.mkdir()
        for name in re.findall(r"^!(.*)$", (DOCKER / "Dockerfile.dockerignore").read_text(), flags=re.MULTILINE):
            source, target = REPOSITORY / name, self.context / name
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info", ".env"))
            else:
                shutil.copy(source, target)

    def stage(self, name: str) -> None:
        """Run a stage in a clean folder."""
        if self.root.exists():
            self.root.rename(self.folder / self.name)
        self.name, self.cwd, self.env = name, self.root, dict(self.base_env)
        self.root.mkdir()
        for instruction, rest in STAGES[name]:
            if instruction not in ("FROM", "USER", "HEALTHCHECK"):
                getattr(self, f"_{instruction.lower()}")(rest)

    def run(self, *arguments: str) -> Result:
        """Start the image."""
        return self._check([*self.entrypoint, *arguments])

    def _place(self, path: str) -> Path:
        return self.root / path.removeprefix("/") if path.startswith("/") else self.cwd / path

    def _env(self, rest: str) -> None:
        for word in shlex.split(rest):
            name, value = word.split("=", 1)
            self.env[name] = re.sub("^/", f"{self.root}/", value).replace("${PATH}", self.env["PATH"])
        Path(self.env["HOME"]).mkdir(parents=True, exist_ok=True)

    def _workdir(self, rest: str) -> None:
        self.cwd = self._place(rest)
        self.cwd.mkdir(parents=True, exist_ok=True)

    def _copy(self, rest: str) -> None:
        *options, source, target = rest.split()
        target = self._place(target)
        stage = next((option.removeprefix("--from=") for option in options if option.startswith("--from=")), None)
        if stage is not None:  # moved instead: it is eight gigabytes
            target.mkdir(parents=True, exist_ok=True)
            for entry in (self.folder / stage / source.removeprefix("/")).iterdir():
                entry.rename(target / entry.name)
        elif (self.context / source).is_dir():
            shutil.copytree(self.context / source, target, dirs_exist_ok=True)
        else:
            shutil.copy(self.context / source, target)

    def _run(self, rest: str) -> None:
        if not rest.startswith("apt-get "):
            self._check(["bash", "-c", rest.replace("--owner 1000 --group 1000 ", "")])

    def _entrypoint(self, rest: str) -> None:
        self.entrypoint = yaml.safe_load(rest)

    def _cmd(self, rest: str) -> None:
        self.run(*yaml.safe_load(rest))

    def _check(self, command: list[str]) -> Result:
        result = run_process(command, timeout=1500, env=self.env, cwd=self.cwd)
        assert result.rc == 0, f"{command}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
        return result


def make_tools(folder: Path, *more: str) -> Path:
    """A folder for PATH, as in the image: without uv, and without a Python yet."""
    folder.mkdir()
    for tool in (*TOOLS, "find", "grep", "install", *more):
        (folder / tool).symlink_to(shutil.which(tool))
    return folder


# As test_bootstrap's stand-in, but it leaves the folder of the assets behind.
BUILDING_PYTHON = FAKE_PYTHON.replace(
    'echo "python $*"', '[[ "$*" != *build_cache* ]] || mkdir -p "$HOME/.cache/m3po/assets"\necho "python $*"'
)


def test_steps_of_the_image_in_order_with_a_stand_in_for_python(tmp_path: Path) -> None:
    tools, calls = make_tools(tmp_path / "bin"), tmp_path / "calls"
    python = tools / "python3.12"
    python.write_text(BUILDING_PYTHON)
    python.chmod(0o755)
    build = Build(tmp_path, {"PATH": str(tools), "CALLS": str(calls), "FAKE_PYTHON": str(python)})
    build.stage("builder")
    install = "-m pip install --no-cache-dir --no-deps --require-hashes --requirement requirements.txt"
    lines = calls.read_text().splitlines()
    assert lines[:2] == ["python -m venv .venv", f"python {install}"]
    assert "assets.build_cache()" in lines[-2] and lines[-1] == "python -m compileall -q source exts tasks scripts"
    calls.unlink()
    build.stage("kitless")
    # the environment and the assets have arrived: nothing is installed or built again
    assert calls.read_text().splitlines() == ["python scripts/train.py --help"]
    assert (build.root / CACHE[1:] / "m3po" / "assets").is_dir() and (build.root / ROOT[1:] / "logs").is_dir()


@pytest.fixture
def large_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder that is not kept for people to look at."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif("M3PO_TEST_IMAGE" not in os.environ, reason="5-10 minutes and 9 GB; asked for by M3PO_TEST_IMAGE=1")
def test_steps_of_the_image_in_order(large_folder: Path) -> None:
    """With pip and the locked packages; then it trains."""
    tools = make_tools(large_folder / "bin", "g++", "git", "uname")
    (tools / "python3.12").symlink_to(sys._base_executable)
    of_pip = {key: value for key, value in os.environ.items() if key.startswith(("PIP_", "SSL_"))}
    build = Build(large_folder, of_pip | {"PATH": str(tools)})
    build.stage("builder")
    build.stage("kitless")
    options = ["--device", "cpu", "--num_envs", "16", "--max_iterations", "2", "--eval_interval", "0"]
    result = build.run("-p", "scripts/train.py", "--task", "Isaac-Cartpole-v0", "--algo", "m3po", *options)
    assert "trained for" in result.stdout and "installing" not in result.stderr
    assert run_process([str(build.cwd / "docker" / "healthcheck.sh")], timeout=30).rc == 0
    # the kernels have gone to the volume
    assert any((build.root / CACHE[1:] / "warp").iterdir())
