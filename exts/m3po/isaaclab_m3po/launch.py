"""From a command line to a running environment: the part that training, playing and evaluating share.

Everything a user can get wrong is checked by :func:`parse` and :func:`prepare`, before the simulation starts, and
raises :class:`m3po.errors.UserError`; :func:`guarded` turns that into one line and exit code 2. Nothing from Isaac Lab
is imported before :func:`parse` has prepared the assets, because Isaac Lab reads the asset root on import.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from m3po import distributed
from m3po.cli.arguments import Parser, any_seed, at_least, check_device, drawn, folder_name
from m3po.errors import M3POError, UserError
from m3po.presets import describe

from . import assets
from .checks import ALGORITHMS, check_actions, check_agent, check_sizes, choose_agent, ignored_settings


@dataclass
class Request:
    """A parsed command line."""

    args: argparse.Namespace
    """Options, Isaac Lab's launcher options among them."""

    overrides: list[str]
    """Tokens ``env.X=``, ``agent.X=``, ``physics=`` and the like, not checked yet."""

    assets: assets.AssetChoice
    """Where the robots come from."""


@dataclass
class Job:
    """A checked request: what will run, where and how."""

    args: argparse.Namespace
    """Options, Isaac Lab's launcher options among them."""

    overrides: list[str]
    """Overrides as typed; already applied to the two configurations."""

    assets: assets.AssetChoice
    """Where the robots come from."""

    task: str
    """Registered task id."""

    algo: str
    """Key of :data:`ALGORITHMS`."""

    agent_entry: str
    """Key of the agent configuration in the task's specification."""

    device: str
    """Torch device of simulation and agent."""

    env_cfg: Any
    """Isaac Lab's environment configuration."""

    agent_cfg: Any
    """rsl_rl runner configuration (a configclass)."""

    def train_cfg(self) -> dict[str, Any]:
        """Nested dictionary for the runner, a fresh one each time because the runner changes it."""
        from isaaclab.utils import to_dict

        return to_dict(self.agent_cfg) | {"task": self.task, "algo": self.algo}

    def arguments(self) -> list[str]:
        """Options that recreate this job in another process; number of environments and seed are left to it."""
        options = {
            "--task": self.task,
            "--algo": self.algo,
            "--agent": self.agent_entry,
            "--device": self.device,
            "--assets": self.args.assets,
        }
        return [part for option in options.items() for part in option] + self.overrides


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that training, playing and evaluating share, named as Isaac Lab names them."""
    parser.add_argument("--task", required=True, help="Isaac Lab task, with or without its old suffix -v0.")
    parser.add_argument("--algo", choices=list(ALGORITHMS), default="m3po", help="m3po, or rsl_rl's own PPO.")
    parser.add_argument(
        "--agent",
        help="Agent configuration, for example m3po_paper_cfg_entry_point (default: that of the algorithm).",
    )
    parser.add_argument("--num_envs", type=at_least(1), help="Environments simulated at once.")
    parser.add_argument("--seed", type=any_seed, help="Seed of everything random; -1 draws one.")
    parser.add_argument(
        "--assets",
        choices=assets.MODES,
        default="auto",
        help="Robot models: built from installed packages, from Isaac Lab's server, or embedded where possible.",
    )
    parser.add_argument("--log_root", default="logs", help="Folder that receives the run folders.")
    parser.add_argument("--headless", action="store_true", help="Accepted and ignored: no window opens without --viz.")
    parser.set_defaults(frontend="torch")  # read by Isaac Lab's functions


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> Request:
    """Prepare the assets, load all tasks and parse a command line.

    Args:
        parser: Parser with :func:`add_common_arguments` and the command's own options.
        argv: Arguments without the program's name.
    """
    early = Parser(add_help=False)
    early.add_argument("--assets", choices=assets.MODES, default="auto")
    early.add_argument("--task", default="")
    first, _ = early.parse_known_args(argv)
    choice = assets.prepare_assets(first.assets, first.task)

    from . import registration  # noqa: F401, I001  (registers all tasks; only now, see above)
    from isaaclab.app import add_launcher_args
    from isaaclab_tasks.utils import setup_preset_cli

    add_launcher_args(parser)
    parser.set_defaults(device=None)  # Isaac Lab's default cuda:0 would hide whether the user asked for it
    args, rest = setup_preset_cli(parser, list(argv))
    options = [option for action in parser._actions for option in action.option_strings]
    for token in rest:
        if token.startswith("-"):
            close = difflib.get_close_matches(token.split("=")[0], options, n=3)
            hint = f"Closest: {', '.join(close)}." if close else "--help lists all options."
            raise UserError(f"unknown option '{token}'. {hint}")
    return Request(args, rest, choice)


def prepare(request: Request, play: bool = False) -> Job:
    """Check a request and resolve its configurations; no simulation is started.

    Args:
        request: Result of :func:`parse`.
        play: Whether to apply the environment's play mode.

    Raises:
        UserError: For everything that cannot run as asked.
    """
    from isaaclab.app import validate_launch
    from isaaclab.utils import validate
    from isaaclab_rl.entrypoints.common import apply_env_overrides

    from . import agents, heterogeneous
    from .overrides import resolve_configurations
    from .tasks import resolve_task

    args = request.args
    task = resolve_task(args.task)
    device = check_device(args.device, present=not getattr(args, "print_config", False))
    if getattr(args, "in_group", False):
        device = distributed.local_device(device)
    agents.set_device(device)
    heterogeneous.attach(task)
    entry = choose_agent(task, args.algo, args.agent)
    env_cfg, agent_cfg = resolve_configurations(task, entry, request.overrides, play)
    agent_cfg = check_agent(agent_cfg, args.algo, entry)
    check_actions(task, env_cfg)

    sized = any(token.startswith("env.scene.num_envs=") for token in request.overrides)
    if args.num_envs is None and not sized and device == "cpu":
        args.num_envs = agents.CPU_NUM_ENVS
    args.task, args.device = task, device  # Isaac Lab's functions read the namespace
    for name in ("max_iterations", "experiment_name", "run_name"):  # options of training only
        if getattr(args, name, None) is not None:
            setattr(agent_cfg, name, getattr(args, name))
    try:
        folder_name(agent_cfg.run_name or "none")
    except argparse.ArgumentTypeError as error:
        raise UserError(f"agent.run_name: {error}.") from error
    agent_cfg.device = device
    agent_cfg.seed = drawn(agent_cfg.seed if args.seed is None else args.seed)
    apply_env_overrides(args, env_cfg)
    env_cfg.seed = agent_cfg.seed
    try:
        validate(env_cfg)
        scan, kit_sources = validate_launch(env_cfg, args)
    except (TypeError, ValueError) as error:
        raise UserError(str(error)) from error
    if kit_sources and importlib.util.find_spec("isaacsim") is None:
        raise UserError(f"this run needs Isaac Sim, which is not installed, for: {', '.join(kit_sources)}.")
    if scan.has_ovphysx_physics and importlib.util.find_spec("ovphysx") is None:
        raise UserError("physics=ovphysx needs the package ovphysx, which is not installed.")
    check_sizes(agent_cfg, args.algo, env_cfg.scene.num_envs, device)
    return Job(args, request.overrides, request.assets, task, args.algo, entry, device, env_cfg, agent_cfg)


def report(job: Job) -> None:
    """Print what was chosen: device, threads, assets, preset."""
    import torch
    from isaaclab_tasks.utils.hydra import resolve_presets
    from isaaclab_tasks.utils.parse_cfg import load_cfg_from_registry

    from .registration import ENTRY_POINTS

    print(f"[m3po] task: {job.task}, algorithm: {job.algo} ({job.agent_entry}), seed: {job.agent_cfg.seed}")
    threads = os.environ.get("OMP_NUM_THREADS")
    source = "OMP_NUM_THREADS" if threads else "OMP_NUM_THREADS is not set"
    print(f"[m3po] device: {job.device}, torch threads: {torch.get_num_threads()} ({source})")
    print(f"[m3po] assets: {job.assets}")
    steps = job.agent_cfg.num_steps_per_env
    together = f" in each of {distributed.world_size()} processes" if distributed.world_size() > 1 else ""
    print(f"[m3po] environments: {job.env_cfg.scene.num_envs}{together}, steps per rollout: {steps}")
    own = resolve_presets(load_cfg_from_registry(job.task, ALGORITHMS["ppo"])) if job.algo == "m3po" else None
    if ignored := ignored_settings(job.agent_cfg, own):
        print(f"[m3po] settings of the agent that have no effect here: {', '.join(ignored)}")
    if job.algo == "m3po":
        mode = ENTRY_POINTS.get(job.agent_entry, job.agent_entry)
        print(describe(job.agent_cfg.algorithm, mode, job.agent_cfg.device))


def create_run_dir(job: Job) -> Path:
    """Create ``<log_root>/<algo>/<experiment>/<timestamp>[_run_name]``, never one that exists already."""
    stamp = getattr(job.args, "run_timestamp", None) or datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    name = f"{stamp}_{job.agent_cfg.run_name}" if job.agent_cfg.run_name else stamp
    parent = experiment_dir(job)
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for suffix in ("", *(f"_{i}" for i in range(2, 100))):
            with contextlib.suppress(FileExistsError):
                run_dir = parent / (name + suffix)
                run_dir.mkdir()
                return run_dir
    except OSError as error:
        raise UserError(f"cannot write the log folder '{parent}': {error.strerror}.") from error
    raise UserError(f"too many runs named '{name}' in '{parent}'.")


def experiment_dir(job: Job) -> Path:
    """Folder of all runs of the job's algorithm and experiment."""
    return Path(job.args.log_root).resolve() / job.algo / job.agent_cfg.experiment_name


def resolve_checkpoint(job: Job, wanted: str) -> Path:
    """Find a checkpoint and check that it is readable and belongs to the job's task and algorithm.

    Args:
        job: The checked request.
        wanted: ``latest``, ``best``, or the path of a file.
    """
    from m3po.runners.checkpoint import SELECTORS, check_compatible, read_checkpoint

    from .heterogeneous import task_names

    path = Path(wanted)
    if wanted in SELECTORS:
        path = _select_checkpoint(job, wanted)
    content = read_checkpoint(str(path), "cpu")
    check_compatible(path, content, task=job.task, tasks=task_names(job.task), algorithm=job.algo)
    return path


def find_run(job: Job, wanted: str) -> tuple[Path, Path]:
    """Find the run of the job's task that ``--resume`` means, and its checkpoint, and check that this fits.

    Args:
        job: The checked request.
        wanted: As in :func:`m3po.runners.run_folder.find_run`.
    """
    from m3po.runners import run_folder
    from m3po.runners.checkpoint import check_compatible, read_checkpoint

    from .heterogeneous import task_names

    here = {"task": job.task, "algorithm": job.algo, "agent": job.agent_entry}
    run, path = run_folder.find_run(
        experiment_dir(job), wanted, lambda manifest: all(manifest.get(key) == value for key, value in here.items())
    )
    content = read_checkpoint(path, "cpu")
    check_compatible(path, content, task=job.task, tasks=task_names(job.task), algorithm=job.algo)
    return run, path


def _select_checkpoint(job: Job, selector: str) -> Path:
    """Checkpoint of the newest run of the job's task and agent that has the selector's file."""
    from isaaclab_rl.entrypoints.common import resolve_checkpoint_selector

    from m3po.runners.checkpoint import SELECTORS

    from .manifest import LIBRARY

    folder, filename = experiment_dir(job), SELECTORS[selector]
    try:
        found = resolve_checkpoint_selector(
            str(folder),
            selector,
            library=LIBRARY,
            task=job.task,
            checkpoint_pattern=re.escape(filename),
            metadata={"agent": job.agent_entry},
        )
    except ValueError:
        raise UserError(
            f"no run of task '{job.task}' with agent '{job.agent_entry}' in '{folder}' has a {filename}; "
            "give the path of a checkpoint, or train first."
        ) from None
    return Path(found)


@contextlib.contextmanager
def environment(job: Job) -> Iterator[Any]:
    """Start the simulation and create the job's environment; both end with the context.

    Yields:
        Isaac Lab's environment behind rsl_rl's ``VecEnv`` interface; of a scene of several tasks, as those tasks.
    """
    from isaaclab.app import launch_simulation
    from isaaclab.envs import DirectMARLEnvCfg
    from isaaclab.utils.seed import configure_seed
    from isaaclab_rl.entrypoints.common import close_env, create_isaaclab_env

    from .heterogeneous import per_task
    from .vec_env import IsaacVecEnv

    failure = None
    with launch_simulation(job.env_cfg, job.args):
        try:
            configure_seed(job.env_cfg.seed)
            multi_agent = isinstance(job.env_cfg, DirectMARLEnvCfg)
            try:
                env = create_isaaclab_env(job.task, job.env_cfg, job.args, convert_marl_to_single_agent=multi_agent)
            except FileNotFoundError as error:
                raise M3POError(f"{error}. The assets in use are {job.assets}.") from error
            try:
                yield per_task(IsaacVecEnv(env, clip_actions=job.agent_cfg.clip_actions), job.task)
            finally:
                close_env(env)
        except M3POError as error:  # launch_simulation would print its traceback
            failure = error
    if failure is not None:
        raise failure
