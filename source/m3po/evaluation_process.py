"""Evaluates checkpoints in a process of its own, beside a running training.

A simulator may allow one simulation per process, and resetting the training's environments would disturb its rollouts.
Parent and child speak JSON, one object per line: orders through the child's stdin, results through its stdout. Whatever
else the child prints goes to a log file.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NoReturn

from m3po import distributed
from m3po.cli.arguments import guarded
from m3po.errors import M3POError
from m3po.stopping import leave_signals_to_the_parent

_LOG_LINES = 20
"""Last lines of the log that the report of a failure quotes."""

_EXIT_SECONDS = 10
"""How long a child that was told to stop may take before it is killed."""

SEED_OFFSET = 10_000
"""Added to the training's seed: evaluation starts from states that training does not draw."""


Evaluate = Callable[[str], dict[str, dict]]
"""Path of a checkpoint -> results of its policies by name."""


class EvaluationProcess:
    """Evaluates checkpoints asynchronously; the ``evaluator`` of :class:`m3po.runners.M3PORunner`.

    The child starts with the first checkpoint and lives until :meth:`close`, or until this process dies.
    """

    def __init__(self, module: str, order: dict[str, Any], log_path: Path) -> None:
        """Remember what to evaluate; nothing is started.

        Args:
            module: Module that the child runs; it calls :func:`answer`.
            order: What to build there, as JSON knows it.
            log_path: File that receives the output of the child.
        """
        self.module, self._order, self.log_path = module, order, log_path
        self.restart()

    def restart(self) -> None:
        """Begin anew after a failure; what was queued before is not evaluated."""
        self._process: Any = None
        """The child, a ``Popen``; ``None`` before the first order."""
        self._replies: queue.SimpleQueue[dict | None] = queue.SimpleQueue()
        """Results in the order of their checkpoints; ``None`` when the child has ended."""
        self._outstanding = 0
        self._closed = False

    def submit(self, checkpoint_path: str, iteration: int) -> None:
        """Queue a checkpoint; returns at once. Does nothing after a reported failure or :meth:`close`."""
        if self._closed:
            return
        if self._process is None:
            self._start()
        self._outstanding += 1
        self._send({"checkpoint": str(checkpoint_path), "iteration": iteration})

    def poll(self) -> list[dict]:
        """Results that have arrived since the last call, in order.

        Returns:
            For each checkpoint ``iteration``, ``checkpoint`` and, under ``prior`` and ``planner`` (``None`` for PPO),
            the statistics of :func:`m3po.evaluation.evaluate`.

        Raises:
            M3POError: Once, if the child has ended: a line, and what the child said last. :meth:`restart` begins anew.
        """
        return self._collect(block=False)

    def wait(self) -> list[dict]:
        """Results of everything queued; blocks. Otherwise like :meth:`poll`."""
        return self._collect(block=True)

    def close(self) -> None:
        """End the child at once; what it has not finished is dropped."""
        process = self._process
        if process is None or self._closed:
            return
        self._closed = True
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()  # the end of its orders is what tells the child to stop
        try:
            process.wait(_EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        self._reader.join()
        process.stdout.close()

    def _start(self) -> None:
        """Start the child and the thread that reads its results."""
        with open(self.log_path, "ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", self.module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=distributed.child_environment() | {"OMP_NUM_THREADS": "1"},
                start_new_session=True,  # Ctrl-C is for the training, which then closes this
            )
        self._reader = threading.Thread(target=_read, args=(self._process.stdout, self._replies), daemon=True)
        self._reader.start()
        self._send(self._order)

    def _send(self, order: dict[str, Any]) -> None:
        """Write a line to the child. The pipe holds hundreds of orders, so this does not wait for it."""
        with contextlib.suppress(BrokenPipeError):  # the child has ended; the reader reports it
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            self._process.stdin.flush()

    def _collect(self, block: bool) -> list[dict]:
        """Take results from the queue; with ``block``, until nothing is outstanding."""
        results = []
        while not self._closed and not (block and self._outstanding == 0):
            try:
                reply = self._replies.get(block=block)
            except queue.Empty:
                break
            if reply is None:
                if results:  # these first; the failure is for the next call
                    self._replies.put(None)
                    break
                self._fail()
            results.append(reply)
            self._outstanding -= 1
        return results

    def _fail(self) -> NoReturn:
        """Report the end of a child that should be alive."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_EXIT_SECONDS)  # its own exit code, before :meth:`close` tells it to stop
        self.close()
        lines = self.log_path.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_LINES:]
        raise M3POError(
            f"The evaluation process ended with exit code {self._process.returncode}; see {self.log_path}.\n"
            + "\n".join(lines)
        )


def _read(stream: IO[bytes], replies: queue.SimpleQueue) -> None:
    """Move the child's replies from its pipe to a queue until the pipe ends."""
    for line in stream:
        replies.put(json.loads(line))
    replies.put(None)


def answer(build: Callable[[dict[str, Any]], contextlib.AbstractContextManager[Evaluate]]) -> int:
    """The child: evaluate what stdin names until it ends.

    Args:
        build: From the first order, builds what evaluates a checkpoint.

    Returns:
        Exit code.
    """
    leave_signals_to_the_parent()
    # Simulators print to stdout; from here on that is the log.
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    os.nice(5)  # the training comes first where cores are scarce
    orders: queue.SimpleQueue[dict] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(orders,), daemon=True).start()

    def serve(_: list[str]) -> int:
        with build(orders.get()) as evaluate:
            while True:
                order = orders.get()
                replies.write(json.dumps(order | {"planner": None} | evaluate(order["checkpoint"])) + "\n")

    return guarded(serve, [])


def _listen(orders: queue.SimpleQueue) -> None:
    """Queue the orders from stdin. Its end means that the parent has closed it or died, even in mid-evaluation."""
    for line in sys.stdin:
        orders.put(json.loads(line))
    os._exit(0)


def policies_of(train_cfg: dict[str, Any]) -> tuple[str, ...]:
    """What is evaluated of a runner configuration, whose environments are split evenly among them.

    The planner needs the world model, which not every configuration trains.
    """
    model = train_cfg["algorithm"].get("world_model", {})
    return ("prior", "planner") if model.get("steps_per_iteration") else ("prior",)


def acting_cfg(train_cfg: dict[str, Any]) -> dict[str, Any]:
    """Reduce a runner configuration to acting: storage and mini-batches are not used, and kept small."""
    algorithm = train_cfg["algorithm"] | {"num_mini_batches": 1}
    if "world_model" in algorithm:
        algorithm["world_model"] = algorithm["world_model"] | {"replay_transitions": 0}
    return train_cfg | {"algorithm": algorithm}
