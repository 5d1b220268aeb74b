"""Worker processes, shared by all batches of environments, so that there are no more of them than cores."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import subprocess
import sys
from multiprocessing.reduction import send_handle
from typing import Any

from m3po.errors import M3POError


class Worker:
    """The parent's end of a worker process. Orders are carried out one after the other, in the order of their tickets.

    The process starts without waiting for it, and ends when this one does, however it ends.
    """

    num_envs = 0
    """Environments that it holds or is about to make."""

    def __init__(self) -> None:
        """Start the process. It is a new interpreter: it imports what it needs, and nothing of the parent's."""
        self._connection, theirs = multiprocessing.Pipe()
        program = f"from m3po_tasks.metaworld.worker import main; main({theirs.fileno()})"
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}; {program}"],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                env={**os.environ, "OMP_NUM_THREADS": "1"},  # the workers are as many as the cores
                start_new_session=True,  # Ctrl-C is for this process
            )
        self._num_orders = self._num_answers = 0
        self._failure: str | None = None

    @property
    def alive(self) -> bool:
        """Whether it can be given orders."""
        return self._failure is None and self._process.poll() is None

    def order(self, *message: Any, handle: int | None = None) -> int:
        """Give an order, with a file descriptor where it needs one. Returns its ticket for :meth:`wait`."""
        with contextlib.suppress(ConnectionError):  # wait() knows why
            self._connection.send(message)
            if handle is not None:
                send_handle(self._connection, handle, self._process.pid)
        self._num_orders += 1
        return self._num_orders

    def wait(self, ticket: int) -> None:
        """Wait until an order and all before it are carried out.

        Raises:
            M3POError: If one of them failed, or the process has ended.
        """
        while self._num_answers < ticket:
            self._failure = self._failure or self._answer()
            if self._failure:
                raise M3POError(self._failure)
            self._num_answers += 1

    def _answer(self) -> str | None:
        """The next answer: ``None``, or what went wrong."""
        try:
            answer = self._connection.recv()
        except (EOFError, ConnectionError):
            return f"its worker process {self._process.pid} ended with exit code {self._process.wait()}."
        return answer and f"its worker process failed.\n{answer}"

    def end(self) -> None:
        """End the process, whatever it is doing."""
        self._process.kill()
        self._process.wait()
        self._connection.close()


class Pool:
    """Workers that start when they are needed and end when they hold no environment any more."""

    def __init__(self) -> None:
        """Start nothing yet."""
        self._workers: list[Worker] = []

    def hire(self, num_envs: int, num_workers: int | None) -> list[tuple[Worker, range]]:
        """Spread the rows of a new batch over the workers that have least to do.

        Args:
            num_envs: Environments of the batch.
            num_workers: Workers for the batch, if there are that many environments; one per core by default. All
                batches share the cores' workers; only a batch that asks for more adds to them.

        Returns:
            Workers with consecutive rows, which differ by one at most in size.
        """
        cores = len(os.sched_getaffinity(0))
        wanted = min(num_workers or cores, num_envs)
        alive = [worker for worker in self._workers if worker.alive]
        room = max(cores, wanted) - len(alive)
        new = [Worker() for _ in range(min(wanted, room))]
        self._workers += new
        hired = sorted([*alive, *new], key=lambda worker: worker.num_envs)[:wanted]
        bounds = [num_envs * index // wanted for index in range(wanted + 1)]
        shares = [(worker, range(*bounds[index : index + 2])) for index, worker in enumerate(hired)]
        for worker, rows in shares:
            worker.num_envs += len(rows)
        return shares

    def dismiss(self, worker: Worker, rows: range) -> None:
        """Take rows from a worker; it ends with its last one."""
        worker.num_envs -= len(rows)
        if worker.num_envs == 0:
            worker.end()
            self._workers.remove(worker)


POOL = Pool()
"""The pool of this process."""
