"""A file from elsewhere runs no code, the sources contain no way to, and no secret of the environment is written."""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY, run_process
from toy_env import PointEnv, runner_cfg

from m3po.cli import play, train
from m3po.cli.suite_job import make_job
from m3po.cli.trained_agent import trained_agent
from m3po.errors import CheckpointError
from m3po.manifest import ENVIRONMENT
from m3po.runners import M3PORunner
from m3po.runners.checkpoint import read_checkpoint

# -- malicious checkpoints --------------------------------------------------------------------------------------------


class Bomb:
    """Calls something when it is unpickled."""

    def __init__(self, function: Callable, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


def saved(content: object, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def as_script(content: object) -> bytes:
    """A checkpoint of plain tensors that looks as if it held a program, too, whose constants are pickled."""
    file = io.BytesIO(saved({"actor_state_dict": {"weight": torch.zeros(2)}}))
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("archive/constants.pkl", pickle.dumps(content))
        archive.writestr("archive/code/module.py", "raise SystemExit\n")
    return file.getvalue()


def checkpoint_with(bomb: Bomb) -> dict:
    """All that our checkpoints have, and more."""
    return {"actor_state_dict": {"weight": torch.zeros(2)}, "m3po": {"format": 1}, "iter": 1, "infos": bomb}


FORMATS = {
    "in a dictionary": lambda bomb: saved(checkpoint_with(bomb)),
    "alone": saved,
    "as a key": lambda bomb: saved({"actor_state_dict": {bomb: 1}}),
    "in the old format": lambda bomb: saved(checkpoint_with(bomb), _use_new_zipfile_serialization=False),
    "as a plain pickle": pickle.dumps,
    "as a module of TorchScript": as_script,
}
"""How a bomb gets into a file."""


def bombs(ran: Path) -> dict[str, Bomb]:
    """Bombs that leave a file behind."""
    write = f"open({str(ran)!r}, 'w')"
    return {
        "os.system": Bomb(os.system, f"touch {ran}"),
        "exec": Bomb(exec, write),
        "eval": Bomb(eval, write),
        "open": Bomb(open, str(ran), "w"),
        "subprocess": Bomb(subprocess.check_call, ["touch", str(ran)]),
    }


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file that must not appear. The test runs in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "ran"
    yield file
    assert not file.exists(), "the checkpoint has run code"


def test_the_bombs_are_live(tmp_path: Path) -> None:
    for name, bomb in bombs(tmp_path / "ran").items():
        torch.load(io.BytesIO(saved(bomb)), weights_only=False)
        assert (tmp_path / "ran").exists(), name
        (tmp_path / "ran").unlink()


@pytest.mark.parametrize("place", FORMATS)
def test_reading_a_checkpoint_runs_nothing(place: str, ran: Path) -> None:
    for bomb in bombs(ran).values():
        Path("bad.pt").write_bytes(FORMATS[place](bomb))
        with pytest.raises(CheckpointError):
            read_checkpoint("bad.pt")


def write_bomb(path: str | Path, ran: Path) -> None:
    Path(path).write_bytes(FORMATS["in a dictionary"](bombs(ran)["os.system"]))


def test_runner_runs_nothing(ran: Path) -> None:
    write_bomb("bad.pt", ran)
    runner = M3PORunner(PointEnv(4), runner_cfg(), log_dir=None, device="cpu")
    with pytest.raises(CheckpointError):
        runner.load("bad.pt")


WALKER = ("--task", "walker-walk", "--device", "cpu")
COMMANDS = {
    "train --checkpoint PATH": (train.run, (*WALKER, "--checkpoint", "bad.pt")),
    "train --checkpoint latest": (train.run, (*WALKER, "--checkpoint", "latest")),
    "train --resume PATH": (train.run, (*WALKER, "--resume", "bad.pt")),
    "train --resume latest": (train.run, (*WALKER, "--resume", "latest")),
    "train --resume best": (train.run, (*WALKER, "--resume", "best")),
    "train --resume RUN": (train.run, (*WALKER, "--resume", "2026-01-31_12-00-00")),
    "train --transfer": (train.run, (*WALKER, "--transfer", "bad.pt")),
    "play --checkpoint PATH": (play.run, (*WALKER, "--checkpoint", "bad.pt")),
    "play --checkpoint best": (play.run, (*WALKER, "--checkpoint", "best")),
    "play": (play.run, WALKER),
}
"""Every way of a command line to a checkpoint."""


def plant(ran: Path, task: str, experiment: str) -> None:
    """Bombs as a file, and as the checkpoints of a run."""
    run = Path("logs") / "m3po" / experiment / "2026-01-31_12-00-00"
    run.mkdir(parents=True)
    manifest = {"task": task, "tasks": [task], "algorithm": "m3po", "agent": "m3po_cfg_entry_point"}
    (run / "run.json").write_text(json.dumps(manifest))
    for path in ("bad.pt", run / "model_last.pt", run / "model_best.pt"):
        write_bomb(path, ran)


@pytest.mark.parametrize("command", COMMANDS)
def test_command_runs_nothing(command: str, ran: Path, capsys: pytest.CaptureFixture) -> None:
    plant(ran, "walker-walk", "walker-walk")
    run, argv = COMMANDS[command]
    assert run(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "holds objects other than tensors and plain values" in line


@pytest.mark.sim
@pytest.mark.parametrize("script", ["train", "play"])
def test_command_for_isaac_lab_runs_nothing(script: str, ran: Path, run_script: Callable) -> None:
    write_bomb("bad.pt", ran)
    options = ["--task", "Isaac-Cartpole-v0", "--device", "cpu", "--checkpoint", "bad.pt"]
    result = run_script([f"scripts/{script}.py", *options], cwd=Path.cwd())
    assert result.rc == 2
    assert "holds objects other than tensors and plain values" in result.stderr.splitlines()[-1]


def test_evaluation_process_runs_nothing(ran: Path) -> None:
    write_bomb("bad.pt", ran)
    job = make_job(*WALKER, "--algo", "ppo")
    orders = [job.order() | {"num_envs": 2}, {"checkpoint": "bad.pt"}]
    process = subprocess.Popen(
        [sys.executable, "-m", "m3po.cli.evaluate"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    with process:  # its stdin stays open, because it ends with its orders
        process.stdin.write("".join(json.dumps(order) + "\n" for order in orders).encode())
        process.stdin.flush()
        replies, log = process.stdout.read(), process.stderr.read().decode()
    assert process.returncode == 2 and replies == b""
    assert "holds objects other than tensors and plain values" in log.splitlines()[-1]


OWN = {"algorithm": {"class_name": "m3po.algorithms:M3PO"}, "actor": {"class_name": "MLPModel"}}


@pytest.mark.parametrize(
    "name", ["os:system", "os.system", "m3po.manifest:subprocess.Popen", "rsl_rl.utils:git.os.system"]
)
def test_checkpoint_does_not_choose_what_is_imported(name: str) -> None:
    """Its configuration is plain JSON, but rsl_rl would import and call what its class names say."""
    for field, places in (("class_name", ("actor", "algorithm")), ("data_augmentation_func", ("symmetry_cfg",))):
        for place in places:
            agent = json.dumps(OWN | {place: {"deeper": {field: name}}})
            with pytest.raises(CheckpointError, match=f"names code that this agent does not use: '{name}'"):
                trained_agent({"m3po": {"agent": agent}}, OWN, [])


def test_checkpoint_may_name_what_the_agent_names_and_what_is_rsl_rls() -> None:
    agent = OWN | {"critic": {"class_name": "CNNModel", "distribution_cfg": None}}
    assert trained_agent({"m3po": {"agent": json.dumps(agent)}}, OWN, []) == agent


# -- the sources ------------------------------------------------------------------------------------------------------

FORBIDDEN = {
    *("eval", "exec", "compile", "__import__"),
    *("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"),
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.load", "marshal.loads", "shelve.open"),
    *("dill.load", "dill.loads", "cloudpickle.load", "cloudpickle.loads", "joblib.load", "pandas.read_pickle"),
    *("yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "isaaclab.utils.io.load_yaml"),
    *("torch.jit.load", "torch.package.PackageImporter", "torch.hub.load", "importlib.import_module"),
}
"""Calls that run what they are given, or may."""

ALLOWED = {
    # It reads back what it has itself just written, to compare it with torch.
    "source/m3po/export.py": {"torch.jit.load"},
    # Between a process and the one that it has started, over a pair of sockets that has no address and that no third
    # process can open: what is unpickled, and the factory that is imported, come from our own code in the other one.
    "source/m3po/envs/subproc_env.py": {".recv"},
    "source/m3po/envs/subproc_worker.py": {".recv", "importlib.import_module"},
    "tasks/m3po_tasks/metaworld/pool.py": {".recv"},
    "tasks/m3po_tasks/metaworld/worker.py": {".recv"},
    # One of the package's own modules, from a table.
    "source/m3po/cli/main.py": {"importlib.import_module"},
    "tasks/m3po_tasks/dmcontrol/suite.py": {"importlib.import_module"},
}
"""Exceptions, with their reasons."""


def dangers(source: str) -> Iterator[str]:
    """Names of the dangerous calls in a source."""
    tree = ast.parse(source)
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    names |= {"np": "numpy", "th": "torch"}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        head, dot, rest = ast.unparse(node.func).partition(".")
        name = names.get(head, head) + dot + rest
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if name in FORBIDDEN:
            yield name
        elif name.endswith(".recv"):
            yield ".recv"
        elif name == "torch.load" and options.get("weights_only") != "True":
            yield "torch.load"
        elif name == "numpy.load" and options.get("allow_pickle", "False") != "False":
            yield "numpy.load"
        elif options.get("shell", "False") != "False":
            yield "shell"


def test_sources_run_nothing_that_they_are_given() -> None:
    found: dict[str, set[str]] = {}
    for folder in ("source", "exts", "tasks", "scripts"):
        for path in (REPOSITORY / folder).rglob("*.py"):
            for name in dangers(path.read_text()):
                found.setdefault(str(path.relative_to(REPOSITORY)), set()).add(name)
    assert found == ALLOWED


@pytest.mark.parametrize(
    "source",
    [
        "eval('1')",
        "import os\nos.system('ls')",
        "from os import system as run\nrun('ls')",
        "import pickle as p\np.loads(b'')",
        "import torch\ntorch.load(f)",
        "import torch\ntorch.load(f, weights_only=False)",
        "from torch import load\nload(f)",
        "import subprocess\nsubprocess.run('ls', shell=True)",
        "import numpy as np\nnp.load(f, allow_pickle=True)",
        "import yaml\nyaml.load(f, yaml.Loader)",
        "connection.recv()",
    ],
)
def test_dangers_are_seen(source: str) -> None:
    assert len(list(dangers(source))) == 1


def test_harmless_calls_are_not_dangers() -> None:
    source = "import torch, yaml\ntorch.load(f, weights_only=True)\nmodel.eval()\nyaml.safe_load(f)\nrun(shell=False)"
    assert list(dangers(source)) == []


# -- secrets ----------------------------------------------------------------------------------------------------------

SECRETS = {
    "WANDB_API_KEY": "wandb-4f1d9c0e",
    "AWS_SECRET_ACCESS_KEY": "aws/7b2e8a61",
    "HF_TOKEN": "hf_93d05c7e",
    "NGC_API_KEY": "ngc-e6a1f2b8",
    "DATABASE_URL": "postgres://user:5c0ffee1@host/base",
    "MY_PASSWORD": "correct-horse-2d7f",
}


def secrets_below(folder: Path) -> list[str]:
    """Files that hold a secret, or the name of one."""
    words = [word.encode() for pair in SECRETS.items() for word in pair]
    return [str(path) for path in folder.rglob("*") if path.is_file() and any(w in path.read_bytes() for w in words)]


def train_with_secrets(folder: Path, *options: object) -> Path:
    """Train a little with secrets in the environment. Returns the run folder."""
    command = [sys.executable, REPOSITORY / "scripts" / "train.py", "--device", "cpu", "--log_root", folder, *options]
    result = run_process(command, env={**os.environ, **SECRETS, "SLURM_JOB_ID": "7"}, timeout=600)
    assert result.rc == 0, result.stderr[-3000:]
    (folder / "console.txt").write_text(result.stdout + result.stderr)
    (manifest,) = folder.rglob("run.json")
    return manifest.parent


def check_no_secrets(folder: Path, run: Path) -> None:
    assert secrets_below(folder) == []
    recorded = json.loads((run / "run.json").read_text())["environment"]
    assert recorded.keys() <= set(ENVIRONMENT)
    assert recorded["SLURM_JOB_ID"] == "7"
    assert (run / "model_last.pt").is_file() and (run / "evaluation.log").is_file()


def test_run_folder_of_a_suite_holds_no_secrets(tmp_path: Path) -> None:
    options = ["--num_envs", 2, "--max_iterations", 2, "--eval_interval", 1]
    run = train_with_secrets(tmp_path, "--task", "walker-walk", *options)
    check_no_secrets(tmp_path, run)


@pytest.mark.sim
@pytest.mark.slow
def test_run_folder_of_isaac_lab_holds_no_secrets(tmp_path: Path) -> None:
    options = ["--num_envs", 8, "--max_iterations", 2, "--eval_interval", 1, "--eval_envs", 4]
    run = train_with_secrets(tmp_path, "--task", "Isaac-Cartpole-v0", *options)
    check_no_secrets(tmp_path, run)
    assert (run / "params" / "env.yaml").is_file()


def test_secrets_are_found(tmp_path: Path) -> None:
    (tmp_path / "log").write_text(f"logging in with {SECRETS['HF_TOKEN']}")
    assert secrets_below(tmp_path) == [str(tmp_path / "log")]
