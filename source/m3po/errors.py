"""Errors with a message for the person at the keyboard."""


class M3POError(Exception):
    """Base class of all errors raised on purpose by this project."""


class UserError(M3POError):
    """A mistake in what the user asked for. Command-line entry points print it as one line and exit with code 2."""


class CheckpointError(UserError):
    """A checkpoint that is missing, unreadable, or does not fit the task, the spaces or the algorithm."""
