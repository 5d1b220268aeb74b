"""The program of a worker process: it holds shares of batches of environments and obeys the orders of its parent."""

from __future__ import annotations

import os
import traceback
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle

from m3po.stopping import leave_signals_to_the_parent
from m3po_tasks.metaworld.buffers import Buffers, block, cut


class Share:
    """Some environments of a batch, in consecutive rows of its buffers."""

    def __init__(self, task: str, seeds: list[int], buffers: Buffers) -> None:
        """Create one environment per seed and reset it; ``buffers`` holds their rows."""
        # Late, so that a mistake in the installation is reported like any other.
        from m3po_tasks.metaworld.simulation import Environment

        self.environments = [Environment(task, seed) for seed in seeds]
        self.buffers = buffers
        self.reset()

    def reset(self) -> None:
        """Reset all."""
        for row, environment in enumerate(self.environments):
            self.buffers.obs[row] = environment.reset()

    def seed(self, seeds: list[int]) -> None:
        """Seed each environment."""
        for environment, seed in zip(self.environments, seeds, strict=True):
            environment.seed(seed)

    def restart(self) -> None:
        """Reset those that are marked as ending."""
        for row, environment in enumerate(self.environments):
            if self.buffers.ends[row]:
                self.buffers.obs[row] = environment.reset()

    def step(self) -> None:
        """Step all, one after the other, and reset those whose episode ends."""
        to = self.buffers
        for row, environment in enumerate(self.environments):
            obs, to.rewards[row], to.success[row] = environment.step(to.actions[row])
            if to.ends[row]:
                to.final_obs[row] = obs
                obs = environment.reset()
            to.obs[row] = obs


def obey(connection: Connection) -> None:
    """Carry out orders until the parent is gone.

    An order is the number of a batch, a word, and what ``make`` needs. Its answer is ``None``, or the traceback of what
    went wrong, after which nothing is obeyed any more.
    """
    shares: dict[int, Share] = {}
    try:
        while True:
            batch, order, *details = connection.recv()
            if order == "make":
                shares[batch] = _make(connection, *details)
            elif order == "drop":
                del shares[batch]
            else:
                getattr(shares[batch], order)(*details)
            connection.send(None)
    except (EOFError, ConnectionError):
        return
    except Exception:
        connection.send(traceback.format_exc())


def _make(connection: Connection, task: str, seeds: list[int], start: int, num_envs: int) -> Share:
    """A share of a batch of ``num_envs``, from row ``start`` on, in memory that the parent hands over."""
    file = recv_handle(connection)
    buffers = cut(block(file, num_envs), num_envs)
    os.close(file)
    rows = slice(start, start + len(seeds))
    return Share(task, seeds, Buffers(*(part[rows] for part in buffers)))


def main(pipe: int) -> None:
    """Obey the parent at the other end of a pipe, a file descriptor."""
    leave_signals_to_the_parent()
    obey(Connection(pipe))
