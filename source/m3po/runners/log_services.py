"""Where curves go besides the run's own files: TensorBoard alone, or also Weights & Biases or Neptune, by rsl_rl."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from m3po.errors import UserError
from m3po.manifest import jsonable

LOGGERS = ("tensorboard", "wandb", "neptune")
"""Choices of ``--logger``; TensorBoard's files are written with each of them."""

NEPTUNE_VARIABLES = ("NEPTUNE_API_TOKEN", "NEPTUNE_USERNAME")


def check_logger(logger: str) -> None:
    """Check that a service can be reached, before anything is started.

    Raises:
        UserError: If its package or its login is missing; names the command that mends it.
    """
    if logger == "tensorboard":
        return
    if logger not in LOGGERS:
        raise UserError(f"unknown logger '{logger}': use {', '.join(LOGGERS)}.")
    if importlib.util.find_spec(logger) is None:
        raise UserError(f"--logger {logger} needs its package: ./isaaclab.sh -p -m pip install {logger}")
    if logger == "neptune":
        missing = [name for name in NEPTUNE_VARIABLES if name not in os.environ]
        if missing:
            raise UserError(f"--logger neptune needs a login: set {' and '.join(missing)}.")
    elif os.environ.get("WANDB_MODE") not in ("offline", "disabled"):
        import wandb

        if not wandb.login(prompt=False):
            raise UserError(
                "--logger wandb needs a login: ./isaaclab.sh -p -m wandb login, or set WANDB_MODE=offline to "
                "upload later by `wandb sync`."
            )


def make_writer(log_dir: Path, cfg: Mapping[str, Any], env_cfg: Any) -> SummaryWriter:
    """The writer of a run's curves.

    Args:
        log_dir: Folder of the run.
        cfg: Runner configuration: ``logger``, ``log_project_name``, and what else a service is to know.
        env_cfg: Configuration of the environments, for the service.
    """
    logger = cfg.get("logger", "tensorboard")
    if logger == "tensorboard":
        return SummaryWriter(str(log_dir), flush_secs=10)
    if logger == "wandb":
        from rsl_rl.utils.wandb_log_writer import WandbLogWriter as Writer

        os.environ.setdefault("WANDB_DIR", str(log_dir))
    else:
        from rsl_rl.utils.neptune_log_writer import NeptuneLogWriter as Writer
    writer = Writer(str(log_dir), cfg.get("log_project_name") or "m3po")
    environment = env_cfg.to_dict() if hasattr(env_cfg, "to_dict") else {"environments": str(env_cfg)}
    writer.store_config(SimpleNamespace(to_dict=lambda: jsonable(environment)), jsonable(dict(cfg)))
    return writer
