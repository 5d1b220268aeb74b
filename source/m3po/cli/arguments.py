"""What all commands share: argument types, one-line errors, exit codes."""

from __future__ import annotations

import argparse
import random
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from m3po.errors import M3POError, UserError
from m3po.stopping import INTERRUPTED, Stop


def guarded(main: Callable[[list[str]], int], argv: Sequence[str]) -> int:
    """Run a command; a user's mistake becomes one message on stderr.

    Args:
        main: Command that takes the arguments and returns an exit code.
        argv: Arguments without the program's name.

    Returns:
        Exit code: the command's own, 2 for a user's mistake, 1 for another known failure, 130 when interrupted, 75
        when stopped by another signal.
    """
    try:
        return main(list(argv))
    except M3POError as error:
        sys.stdout.flush()
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except Stop as stop:
        print(stop, file=sys.stderr)
        return stop.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def add_distributed(parser: argparse._ActionsContainer) -> None:
    """Add ``--distributed``, as ``args.in_group``: Isaac Lab's functions read ``distributed`` as "on GPUs"."""
    parser.add_argument(
        "--distributed",
        dest="in_group",
        action="store_true",
        help="Train together with the other processes that torchrun has started; --num_envs is that of each.",
    )


def at_least(minimum: int) -> Callable[[str], int]:
    """Argument type: an integer that is not smaller than ``minimum``."""

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected an integer, got '{text}'") from None
        if value < minimum:
            raise argparse.ArgumentTypeError(f"must be at least {minimum}, got {value}")
        return value

    return convert


def folder_name(text: str) -> str:
    """Argument type: part of the name of a folder."""
    if not text or any(character in text for character in "/\\\0\n"):
        raise argparse.ArgumentTypeError(f"must be part of a folder's name, without slashes, got {text!r}")
    return text


LARGEST_SEED = 2**31 - 1
"""Seeds of tasks and processes are a little larger, and all of them must fit 32 bits."""


def any_seed(text: str) -> int:
    """Argument type: a seed, or -1 for one that is to be drawn."""
    value = at_least(-1)(text)
    if value > LARGEST_SEED:
        raise argparse.ArgumentTypeError(f"must be at most {LARGEST_SEED}, got {value}")
    return value


def drawn(value: Any) -> int:
    """A seed as it is used and recorded: one that is drawn for -1.

    Raises:
        UserError: If it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not -1 <= value <= LARGEST_SEED:
        raise UserError(f"the seed must be an integer from -1 to {LARGEST_SEED}, got {value!r}")
    return random.randrange(LARGEST_SEED) if value == -1 else value


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line, like all others."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and exiting."""
        raise UserError(f"{message} (--help lists all options)")


def check_device(requested: str | None, present: bool = True) -> str:
    """Choose the device, CUDA where available, and refuse one that is not there.

    Args:
        requested: ``cpu``, ``cuda``, ``cuda:N`` or ``None`` for the default.
        present: Whether the device must be there.

    Returns:
        ``cpu`` or ``cuda:N``.
    """
    import torch

    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if requested is None:
        return "cuda:0" if available else "cpu"
    match = re.fullmatch(r"cpu|cuda(?::(\d+))?", requested)
    if match is None:
        raise UserError(f"unknown device '{requested}': use cpu, cuda or cuda:N.")
    if requested == "cpu":
        return "cpu"
    index = int(match[1] or 0)
    if present and index >= available:
        raise UserError(
            f"device '{requested}' is not available: torch sees {available} CUDA devices. Use --device cpu."
        )
    return f"cuda:{index}"
