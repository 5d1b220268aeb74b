"""Jobs of a single Isaac Lab task.

Everything a user can get wrong is checked before the simulation starts. Nothing from Isaac Lab is imported before the
assets are prepared, because Isaac Lab reads the asset root on import.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import importlib.util
import math
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from rsl_rl.env import VecEnv

from m3po import distributed
from m3po.cli.arguments import Parser, check_device, drawn, folder_name
from m3po.cli.film import recorded
from m3po.cli.job import ALGORITHMS, Hook, Job, add_task_arguments
from m3po.envs.interface import M3POEnv
from m3po.envs.suite import TaskInfo
from m3po.errors import M3POError, UserError

from . import assets, video
from .checks import check_actions, check_agent, check_sizes, choose_agent, ignored_settings

FILM_STEPS = 300
"""Frames of a video, unless the command line says otherwise."""


@dataclass
class IsaacJob(Job):
    """A request for one Isaac Lab task, whose simulation runs in this process."""

    assets: assets.AssetChoice
    """Where the robots come from."""

    env_cfg: Any
    """Isaac Lab's environment configuration."""

    agent_cfg: Any
    """rsl_rl runner configuration, a configclass."""

    suite = "isaaclab"
    play_envs = 32

    @classmethod
    def read(cls, parser: argparse.ArgumentParser, argv: Sequence[str], play: bool = False) -> Self:
        """See :meth:`Job.read`. ``play`` applies the task's own play mode, unless ``--train_env_cfg`` is given."""
        if not {"-h", "--help"} & set(argv):
            parser.parse_known_args(list(argv))  # mistakes are told before anything is built
        early = Parser(add_help=False)
        early.add_argument("--assets", choices=assets.MODES, default="auto")
        early.add_argument("--task", default="")
        first, _ = early.parse_known_args(argv)
        choice = assets.prepare_assets(first.assets, first.task)

        from . import registration  # noqa: F401, I001  (registers all tasks; only now, see above)
        from isaaclab_tasks.utils import setup_preset_cli

        _add_launcher_arguments(parser)
        args, rest = setup_preset_cli(parser, list(argv))
        options = [option for action in parser._actions for option in action.option_strings]
        for token in rest:
            if token.startswith("-"):
                close = difflib.get_close_matches(token.split("=")[0], options, n=3)
                hint = f"Closest: {', '.join(close)}." if close else "--help lists all options."
                raise UserError(f"unknown option '{token}'. {hint}")
        return cls._checked(args, rest, choice, play)

    @classmethod
    def recreate(cls, options: dict[str, Any], overrides: list[str]) -> Self:
        """See :meth:`Job.recreate`."""
        choice = assets.prepare_assets(options["assets"], options["task"])
        from . import registration  # noqa: F401

        parser = Parser()
        add_task_arguments(parser)
        _add_launcher_arguments(parser)
        args = parser.parse_args(["--task", options["task"]])
        vars(args).update(options)
        return cls._checked(args, overrides, choice)

    @classmethod
    def _checked(
        cls, args: argparse.Namespace, overrides: list[str], choice: assets.AssetChoice, play: bool = False
    ) -> Self:
        """Check what was asked for, and resolve its configurations."""
        from isaaclab.app import validate_launch
        from isaaclab.utils import to_dict, validate
        from isaaclab_rl.entrypoints.common import apply_env_overrides

        from . import agents
        from .contrib import heterogeneous
        from .overrides import resolve_configurations
        from .registration import ENTRY_POINTS
        from .tasks import resolve_task

        task = resolve_task(args.task)
        device = check_device(args.device, present=not getattr(args, "print_config", False))
        if getattr(args, "in_group", False):
            device = distributed.local_device(device)
        agents.set_device(device)
        heterogeneous.attach(task)
        entry = choose_agent(task, args.algo, args.agent)
        own_mode = play and not args.train_env_cfg
        env_cfg, agent_cfg = resolve_configurations(task, entry, overrides, own_mode)
        agent_cfg = check_agent(agent_cfg, args.algo, entry)
        check_actions(task, env_cfg)

        args.num_envs = args.num_envs or args.num_envs_per_task
        typed, sized = args.num_envs, any(token.startswith("env.scene.num_envs=") for token in overrides)
        if play:
            args.num_envs = None  # the training's sizes are checked, not this one
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
        if play and (typed is not None or not sized):
            env_cfg.scene.num_envs = typed or cls.play_envs
        steps = math.ceil(env_cfg.episode_length_s / (env_cfg.sim.dt * env_cfg.decimation))
        train_cfg = to_dict(agent_cfg) | {"task": task, "algo": args.algo}
        sizes, mode = [env_cfg.scene.num_envs], ENTRY_POINTS.get(entry, entry)
        infos, own = [TaskInfo(task, None, None, steps)], (choice, env_cfg, agent_cfg)
        return cls(args, overrides, infos, sizes, device, entry, mode, False, train_cfg, *own)

    @contextlib.contextmanager
    def environments(
        self, sizes: list[int], seed: int, log_dir: Path | None = None, restart: bool = False
    ) -> Generator[M3POEnv]:
        """Start the simulation and create the environments; see :meth:`Job.environments`.

        Yields:
            Isaac Lab's environment behind rsl_rl's ``VecEnv`` interface; of a scene of several tasks, as those tasks.
        """
        from isaaclab.app import launch_simulation
        from isaaclab.envs import DirectMARLEnvCfg
        from isaaclab.utils.seed import configure_seed
        from isaaclab_rl.entrypoints.common import close_env, create_isaaclab_env

        from .contrib.heterogeneous import per_task
        from .vec_env import IsaacVecEnv

        env_cfg, failure = self.env_cfg, None
        (env_cfg.scene.num_envs,), env_cfg.seed = sizes, seed
        if log_dir is not None:
            env_cfg.log_dir = str(log_dir)
        with launch_simulation(env_cfg, self.args):
            try:
                configure_seed(seed)
                multi_agent = isinstance(env_cfg, DirectMARLEnvCfg)
                try:
                    env = create_isaaclab_env(
                        self.names[0], env_cfg, self.args, convert_marl_to_single_agent=multi_agent
                    )
                except FileNotFoundError as error:
                    raise M3POError(f"{error}. The assets in use are {self.assets}.") from error
                try:
                    # Isaac Lab's wrapper, of which nothing is known here, has the methods that are abstract.
                    wrapped = IsaacVecEnv(  # ty: ignore[abstract-class-instantiation]
                        env, clip_actions=self.train_cfg["clip_actions"]
                    )
                    yield per_task(wrapped, self.names[0])
                finally:
                    close_env(env)
            except M3POError as error:  # launch_simulation would print its traceback
                failure = error
        if failure is not None:
            raise failure

    def require_video(self) -> None:
        """See :meth:`Job.require_video`."""
        video.require_rendering()
        video.add_camera(self.env_cfg)

    def films(self, env: VecEnv, path: Path) -> Iterable[contextlib.AbstractContextManager[Hook]]:
        """See :meth:`Job.films`."""
        yield recorded(video.RobotCamera(env), path, self.args.video_length or FILM_STEPS)

    def conditioned_on(self) -> list[str] | None:
        """The tasks of a scene of several; see :meth:`Job.conditioned_on`."""
        from .contrib.heterogeneous import task_names

        return task_names(self.names[0])

    def about(self) -> dict[str, Any]:
        """Physics, assets and configuration of the environment."""
        from isaaclab.utils import to_dict

        physics = self.env_cfg.sim.physics
        return {
            "physics": {
                "config": type(physics).__name__,
                "solver": type(getattr(physics, "solver_cfg", None)).__name__,
            },
            "assets": dataclasses.asdict(self.assets),
            "configuration": {"env": to_dict(self.env_cfg)},
        }

    def chosen(self) -> list[str]:
        """The assets, and settings that have no effect."""
        from isaaclab_tasks.utils.hydra import resolve_presets
        from isaaclab_tasks.utils.parse_cfg import load_cfg_from_registry

        lines = [f"assets: {self.assets}"]
        ours = self.algo == "m3po"
        own = resolve_presets(load_cfg_from_registry(self.names[0], ALGORITHMS["ppo"])) if ours else None
        if ignored := ignored_settings(self.agent_cfg, own):
            lines.append(f"settings of the agent that have no effect here: {', '.join(ignored)}")
        return lines

    def record(self, run_dir: Path) -> None:
        """Write both configurations as Isaac Lab's own commands do."""
        from isaaclab_rl.entrypoints.common import dump_train_configs

        self.agent_cfg.seed, self.env_cfg.log_dir = self.seed, str(run_dir)
        dump_train_configs(str(run_dir), self.env_cfg, self.agent_cfg)


def _add_launcher_arguments(parser: argparse.ArgumentParser) -> None:
    from isaaclab.app import add_launcher_args

    add_launcher_args(parser)
    # Isaac Lab's default cuda:0 would hide whether the user asked for it; its functions read the frontend.
    parser.set_defaults(device=None, frontend="torch")
