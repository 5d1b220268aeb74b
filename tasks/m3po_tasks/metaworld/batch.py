"""The environments of one task, spread over the workers of the pool."""

from __future__ import annotations

import itertools
import os

import numpy as np

from m3po.errors import M3POError
from m3po_tasks.metaworld.buffers import block, num_bytes
from m3po_tasks.metaworld.pool import POOL

_NUMBERS = itertools.count()


class Batch:
    """Environments that obey one order at a time, each worker its share of them one after the other."""

    def __init__(self, task: str, num_envs: int, seed: int, num_workers: int | None) -> None:
        """Create the environments and reset them, all workers at the same time.

        Args:
            task: Name of the task.
            num_envs: Number of environments N.
            seed: Seed; each environment gets one of its own from it, whatever N and the workers are.
            num_workers: See :meth:`m3po_tasks.metaworld.pool.Pool.hire`.

        Raises:
            M3POError: If an environment cannot be created.
        """
        self._task, self._number = task, next(_NUMBERS)
        seeds = _seeds(seed, num_envs)
        self._shares = POOL.hire(num_envs, num_workers)
        self._tickets: list[int] = []
        file = os.memfd_create(task)
        try:
            os.ftruncate(file, num_bytes(num_envs))
            self.block = block(file, num_envs)
            """Shared memory, see :mod:`m3po_tasks.metaworld.buffers`. Written to by the workers during an order."""
            for worker, rows in self._shares:
                make = (self._number, "make", task, seeds[rows.start : rows.stop], rows.start, num_envs)
                self._tickets.append(worker.order(*make, handle=file))
            self.wait()
        except BaseException:
            self.close()
            raise
        finally:
            os.close(file)

    @property
    def num_workers(self) -> int:
        """Workers that hold environments of this batch."""
        return len(self._shares)

    def seed(self, seed: int) -> None:
        """Seed the environments as if they had been created with ``seed``."""
        if self._tickets:
            self.order("")  # raises
        seeds = _seeds(seed, sum(rows.stop - rows.start for _, rows in self._shares))
        self._tickets = [
            worker.order(self._number, "seed", seeds[rows.start : rows.stop]) for worker, rows in self._shares
        ]
        self.wait()

    def order(self, word: str) -> None:
        """Have all environments ``reset`` or ``step``, or those marked as ending ``restart``, without waiting.

        Raises:
            M3POError: If they are closed, or :meth:`wait` was not called for the last order.
        """
        if self._tickets or not self._shares:
            raise M3POError(f"task '{self._task}': {'the last order is under way' if self._tickets else 'closed'}.")
        self._tickets = [worker.order(self._number, word) for worker, _ in self._shares]

    def wait(self) -> None:
        """Wait until the order is carried out.

        Raises:
            M3POError: If a worker failed, with its traceback, or was killed, with its exit code.
        """
        tickets, self._tickets = self._tickets, []
        for (worker, _), ticket in zip(self._shares, tickets, strict=True):
            try:
                worker.wait(ticket)
            except M3POError as error:
                raise M3POError(f"task '{self._task}': {error}") from None

    def close(self) -> None:
        """Drop the environments; workers that hold no others end. Does nothing when called again."""
        for worker, rows in self._shares:
            worker.order(self._number, "drop")
            POOL.dismiss(worker, rows)
        self._shares = []


def _seeds(seed: int, num_envs: int) -> list[int]:
    """A seed for each environment."""
    return np.random.SeedSequence(seed).generate_state(num_envs, np.uint64).tolist()
