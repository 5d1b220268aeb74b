"""A batch of environments in a worker process, as simulators need that allow one simulation per process."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Self

import torch
from tensordict import TensorDict

from m3po.envs.interface import M3POEnv
from m3po.envs.shared_tensors import allocate, cut, synchronize
from m3po.errors import M3POError

RESTART_SEED = 1000
"""Added to the seed of a task at each restart, so that it does not run into the same failure again."""

_POLL_SECONDS = 1.0
"""How often a silent worker is checked for life; a process that it started may hold its end of the pipe open."""

_EXIT_SECONDS = 20.0
"""How long a worker that was told to close may take before it is killed."""

_LOG_LINES = 20
"""Last lines of the log that the report of a killed worker quotes."""


class TaskEnvError(M3POError):
    """The environments of one task have failed."""

    def __init__(self, task: str, reason: str, details: str) -> None:
        """Compose the message.

        Args:
            task: Name of the task.
            reason: What happened, in one line.
            details: Traceback of the task, or the end of its output.
        """
        super().__init__(f"task '{task}': {reason}\n{details}".rstrip())
        self.task, self.reason = task, reason


class SubprocVecEnv(M3POEnv):
    """Environments in a process of their own, seen as if they were here. Only the group ``policy`` is passed on.

    Tensors are shared, without a copy through the pipe: in shared memory on the CPU, through CUDA IPC on a GPU. Those
    that a step returns are overwritten by the step after the next. The process ends with :meth:`close`, or with this
    one, however it ends.
    """

    def __init__(
        self, task: str, factory: str, arguments: dict[str, Any], seed: int, log_path: Path | None = None
    ) -> None:
        """Start the process and return at once, so that several can start together; :meth:`connect` waits for it.

        Args:
            task: Name of the task, for messages.
            factory: ``"module:function"``, called in the process. It returns environments, or a context manager that
                yields them.
            arguments: Keyword arguments of the factory.
            seed: Its keyword argument ``seed``; :data:`RESTART_SEED` is added at each restart.
            log_path: File that the process's output is appended to; it goes where our own goes without one.
        """
        self.task, self.factory, self.arguments, self.log_path = task, factory, arguments, log_path
        self._first_seed = seed
        self.cfg = {"factory": factory, "seed": seed, **arguments}
        self.restarts = 0
        self._slot = 0
        self._block: torch.Tensor | None = None
        self._launch()

    # -- life ---------------------------------------------------------------------------------------------------------

    steps_beside = True

    def connect(self) -> Self:
        """Wait until the environments are built; they can be used from then on. Does nothing when called again.

        Raises:
            TaskEnvError: If they cannot be built.
        """
        if self._block is None:
            sizes = self._receive()
            self._block = allocate(sizes)
            self.num_envs, self.num_actions, self.device = sizes.num_envs, sizes.num_actions, sizes.device
            self.max_episode_length = sizes.max_episode_length
            self._shared = cut(self._block, sizes)
            self._join()
        return self

    def restart(self) -> None:
        """Start a new process in place of a dead one, with another seed, and wait for it.

        Raises:
            TaskEnvError: If its environments cannot be built.
        """
        self.close()
        self.restarts += 1
        self._launch()
        self._receive()  # the sizes, known already
        self._join()

    def stop(self) -> None:
        """Tell the process to close its environments and end; returns at once."""
        if not self._connection.closed:
            self._send(("close", None))

    def close(self) -> None:
        """End the process and wait for that. Does nothing when called again."""
        if self._connection.closed:
            return
        self.stop()
        try:
            self._process.wait(_EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._connection.close()
        self._process.stdin.close()

    def _launch(self) -> None:
        """Start the process and tell it what to build."""
        self._connection, theirs = multiprocessing.Pipe()
        start = f"from m3po.envs.subproc_worker import main; main({theirs.fileno()})"
        with contextlib.ExitStack() as stack:
            stack.enter_context(theirs)
            log = stack.enter_context(open(self.log_path, "ab")) if self.log_path else None
            self._process: Any = subprocess.Popen(
                [
                    sys.executable,
                    "-X",
                    "faulthandler",
                    "-c",
                    f"import sys; sys.path[:] = {sys.path!r}; {start}",
                    self.task,  # for those who look at the list of processes
                ],
                stdin=subprocess.PIPE,  # never written to: its end tells the process that this one has died
                stdout=log,
                stderr=log and subprocess.STDOUT,
                pass_fds=(theirs.fileno(),),
                # One thread unless the user says otherwise: tasks that step at once would fight for the cores.
                env={"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **os.environ},
                start_new_session=True,  # Ctrl-C is for this process, which then closes that one
            )
        authkey = bytes(multiprocessing.current_process().authkey)
        arguments = self.arguments | {"seed": self._first_seed + RESTART_SEED * self.restarts}
        self._send((authkey, self.factory, arguments))

    def _join(self) -> None:
        """Share the block with a new process and wait for its first observations."""
        self._call("share", (self._block, self._slot))

    # -- environments -------------------------------------------------------------------------------------------------

    @property
    def episode_length_buf(self) -> torch.Tensor:
        """Steps of the current episodes, (N,), int64. Assigning it sets that of the environments."""
        return self._shared["episode_length_buf"]

    @episode_length_buf.setter
    def episode_length_buf(self, value: torch.Tensor) -> None:
        self._shared["episode_length_buf"].copy_(value)
        self._call("set_episode_lengths", self._slot)

    def get_observations(self) -> TensorDict:
        """Observation group ``policy``, (N, O)."""
        return self._group("obs")

    def seed(self, seed: int) -> None:
        """Draw from a seed from now on."""
        self._call("seed", seed)

    def state_dict(self) -> dict[str, Any] | None:
        """All that the future of the environments depends on; ``None`` where they do not tell it."""
        return self._call("state_dict", None)

    def load_state_dict(self, state: dict[str, Any]) -> bool:
        """Go on from :meth:`state_dict`. Returns whether the environments go on exactly."""
        return self._call("load_state_dict", (state, self._slot))

    def curriculum_state(self) -> dict[str, Any] | None:
        """How hard the task is by now; ``None`` where it does not tell."""
        return self._call("curriculum_state", None)

    def load_curriculum_state(self, state: dict[str, Any]) -> None:
        """Make the task as hard as :meth:`curriculum_state` of other environments of the task says."""
        self._call("load_curriculum_state", state)

    def reset(self) -> tuple[TensorDict, dict[str, Any]]:
        """Reset all environments."""
        self._slot = 1 - self._slot
        self._call("reset", self._slot)
        return self.get_observations(), {}

    def reset_envs(self, ids: torch.Tensor) -> TensorDict:
        """Reset some environments, (n,), int64, if they can; returns the observations of all."""
        self._call("reset_envs", (self._slot, ids.tolist()))
        return self.get_observations()

    def step(self, actions: torch.Tensor) -> tuple[TensorDict, torch.Tensor, torch.Tensor, dict[str, Any]]:
        """Step all environments.

        Args:
            actions: Actions, (N, A).

        Returns:
            Observations, rewards (N,), dones (N,), and extras: what the environments deliver of ``time_outs``,
            ``final_obs`` and ``success``, and their ``log`` where it is new.

        Raises:
            TaskEnvError: If the environments fail or their process dies.
        """
        self.step_async(actions)
        return self.step_wait()

    def step_async(self, actions: torch.Tensor) -> None:
        """Begin a step; never fails. :meth:`step_wait` must follow before anything else is called."""
        self._slot = 1 - self._slot
        self._shared["actions"].copy_(actions)
        self._order("step", self._slot)

    def step_wait(self) -> tuple[TensorDict, torch.Tensor, torch.Tensor, dict[str, Any]]:
        """Wait for the step and return its results, as :meth:`step` does."""
        delivered, log = self._receive()
        extras = {name: self._group(name) if name == "final_obs" else self._result(name) for name in delivered}
        if log:
            extras["log"] = log
        return self.get_observations(), self._result("rewards"), self._result("dones"), extras

    def _result(self, name: str) -> torch.Tensor:
        return self._shared[name][self._slot]

    def _group(self, name: str) -> TensorDict:
        return TensorDict({"policy": self._result(name)}, batch_size=[self.num_envs])

    # -- pipe ---------------------------------------------------------------------------------------------------------

    def _call(self, name: str, argument: Any) -> Any:
        self._order(name, argument)
        return self._receive()

    def _order(self, name: str, argument: Any) -> None:
        # What was written to the block must be there, and what was read from the slot must have been read.
        synchronize(self._shared["actions"])
        self._send((name, argument))

    def _send(self, content: Any) -> None:
        with contextlib.suppress(ConnectionError):  # the process has died; whoever waits for its answer learns why
            self._connection.send(content)

    def _receive(self) -> Any:
        """The answer to an order; waits for it as long as the process lives."""
        try:
            while not self._connection.poll(_POLL_SECONDS):
                if self._process.poll() is not None and not self._connection.poll():
                    raise EOFError
            kind, *content = self._connection.recv()
        except (EOFError, ConnectionResetError):
            raise self._death() from None
        if kind == "failed":
            raise TaskEnvError(self.task, *content)
        return content[0]

    def _death(self) -> TaskEnvError:
        """Why the process has ended without a word."""
        self.close()
        code = self._process.returncode
        by = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        details = ""
        if self.log_path is not None:
            lines = Path(self.log_path).read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_LINES:]
            details = "\n".join([f"The end of {self.log_path}:", *lines])
        return TaskEnvError(self.task, f"its process was {by}", details)
