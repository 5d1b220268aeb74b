"""The worker process of a task: builds its environments, then obeys orders until the parent closes it or dies.

The parent starts it by ``python -c``, not by ``multiprocessing``, which would import the parent's main module again.
It sends the factory and its arguments first, and then orders ``(name, argument)``. The worker answers each of them with
``("done", content)``, or with ``("failed", reason, traceback)`` and ends. Tensors stay in the block that both share.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import sys
import threading
import traceback
from multiprocessing.connection import Connection
from typing import Any

import torch
from rsl_rl.env import VecEnv
from tensordict import TensorDict

from m3po.envs.interface import as_m3po_env
from m3po.envs.logs import NewLogs, number
from m3po.envs.shared_tensors import Sizes, cut, synchronize
from m3po.envs.suite import as_context
from m3po.stopping import leave_signals_to_the_parent

OPTIONAL = ("time_outs", "final_obs", "success")
"""Entries of ``extras`` that are shared where an environment delivers them."""


def main(descriptor: int) -> None:
    """Run the worker; ends the process.

    Args:
        descriptor: File descriptor of the pipe to the parent.
    """
    leave_signals_to_the_parent()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.set_inheritable(descriptor, False)  # or the parent would not see this process end before its children
    code = 0
    try:
        _run(Connection(descriptor))
    except BaseException:  # a simulator may call sys.exit
        traceback.print_exc()
        code = 1
    # The environments are closed. To let Python end takes an Isaac Lab simulation another ten seconds and more.
    sys.stdout.flush()
    os._exit(code)


def reason(error: BaseException) -> str:
    """An error in one line."""
    return "".join(traceback.format_exception_only(error)).strip().splitlines()[0]


def _run(connection: Connection) -> None:
    """Build the environments, serve and close them; tell the parent what fails."""
    with contextlib.ExitStack() as stack:
        try:
            authkey, factory, arguments = connection.recv()
            multiprocessing.current_process().authkey = authkey  # shared memory is asked of the parent with it
            _serve(stack.enter_context(_environments(factory, arguments)), connection)
        except BaseException as error:
            # Before the environments are left: a simulator may never come back from that after an error.
            connection.send(("failed", reason(error), traceback.format_exc()))
            raise


def _end_with_parent() -> None:
    """Wait for the end of stdin, which means that the parent is gone, even where a step never ends."""
    os.read(0, 1)
    os._exit(0)


def _environments(factory: str, arguments: dict[str, Any]) -> contextlib.AbstractContextManager[VecEnv]:
    """Call the factory; environments that it returns without a context are closed at the end."""
    module, _, function = factory.partition(":")
    made = getattr(importlib.import_module(module), function)(**arguments)
    return as_context(made)


def _serve(env: VecEnv, connection: Connection) -> None:
    """Answer orders until the parent closes."""
    worker = _Worker(env)
    connection.send(("done", worker.sizes))
    # Simulators update buffers in place, and those born in inference mode can only be updated there: so all of it is.
    with torch.inference_mode():
        for name, argument in iter(connection.recv, ("close", None)):
            content = getattr(worker, name)(argument)
            synchronize(worker.block)
            connection.send(("done", content))


class _Worker:
    """The orders. Most take the slot for their results; they return what is not a tensor."""

    def __init__(self, env: VecEnv) -> None:
        self.env = as_m3po_env(env)
        obs_dim = env.get_observations()["policy"].shape[1]
        self.sizes = Sizes(env.num_envs, obs_dim, env.num_actions, int(env.max_episode_length), str(env.device))
        self.logs = NewLogs()

    def share(self, block_and_slot: tuple[torch.Tensor, int]) -> None:
        """Take the block, which comes before anything else, and write the current observations to it."""
        self.block, slot = block_and_slot
        self.shared = cut(self.block, self.sizes)
        self._write_obs(slot, self.env.get_observations())

    def reset(self, slot: int) -> None:
        """Reset all environments."""
        self._write_obs(slot, self.env.reset()[0])

    def reset_envs(self, slot_and_ids: tuple[int, list[int]]) -> None:
        """Reset some environments, where these offer it."""
        slot, ids = slot_and_ids
        obs = self.env.reset_envs(torch.tensor(ids, device=self.env.device))
        if obs is not None:
            self._write_obs(slot, obs)

    def seed(self, seed: int) -> None:
        """Draw from a seed from now on."""
        self.env.seed(seed)

    def state_dict(self, _: None) -> dict[str, Any] | None:
        """The environments' own state, where they tell it."""
        return self.env.state_dict()

    def load_state_dict(self, state_and_slot: tuple[dict[str, Any], int]) -> bool:
        """Restore the environments' own state and write their observations."""
        state, slot = state_and_slot
        exact = self.env.load_state_dict(state)
        self._write_obs(slot, self.env.get_observations())
        return exact

    def curriculum_state(self, _: None) -> dict[str, Any] | None:
        """How hard the task is by now, where it tells that."""
        return self.env.curriculum_state()

    def load_curriculum_state(self, state: dict[str, Any]) -> None:
        """Make the task as hard as that."""
        self.env.load_curriculum_state(state)

    def set_episode_lengths(self, _: int) -> None:
        """Assign the environments' episode lengths."""
        self.env.episode_length_buf = self.shared["episode_length_buf"].clone()

    def step(self, slot: int) -> tuple[list[str], dict[str, float]]:
        """Step; returns which optional results there are, and the log where it is new."""
        # An environment may keep the actions as its previous ones, and the shared ones change.
        obs, rewards, dones, extras = self.env.step(self.shared["actions"].clone())
        self._write_obs(slot, obs)
        self.shared["rewards"][slot].copy_(rewards)
        self.shared["dones"][slot].copy_(dones)
        delivered = [name for name in OPTIONAL if name in extras]
        for name in delivered:
            value = extras[name]["policy"] if name == "final_obs" else extras[name]
            self.shared[name][slot].copy_(value)
        return delivered, self._new_log(extras)

    def _write_obs(self, slot: int, obs: TensorDict) -> None:
        self.shared["obs"][slot].copy_(obs["policy"])
        self.shared["episode_length_buf"].copy_(self.env.episode_length_buf)

    def _new_log(self, extras: dict[str, Any]) -> dict[str, float]:
        """Means of a new log's entries."""
        log = self.logs.take(extras.get("log"))
        return {str(key): number(value) for key, value in log.items()}
