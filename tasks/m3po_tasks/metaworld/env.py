"""A batch of environments of one Meta-World task: torch tensors in and out, physics in a pool of processes."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict

from m3po.envs.interface import M3POEnv
from m3po.errors import UserError
from m3po_tasks.metaworld.batch import Batch
from m3po_tasks.metaworld.buffers import Buffers, cut
from m3po_tasks.metaworld.tasks import ACTION_DIM, ACTION_REPEAT, EPISODE_LENGTH


@dataclass
class MetaWorldCfg:
    """What the environments are, for a run's records."""

    task: str
    """Name of the task."""

    seed: int
    """Seed of goals and objects."""

    num_workers: int
    """Processes that hold the environments. No result depends on it."""

    action_repeat: int
    """Simulator steps per decision."""

    metaworld: str
    """Version of Meta-World. Its tasks' rewards and initial states change between versions."""

    mujoco: str
    """Version of MuJoCo. Meta-World is written for an older one than the project's."""


class MetaWorldVecEnv(M3POEnv):
    """N environments of one task as TD-MPC2 defines it (arXiv 2310.16828), with the goal in the observation.

    A decision is repeated for 2 simulator steps, whose rewards are summed; an episode has 100 decisions, is truncated
    then, and never terminates. Goals and objects are drawn anew at every reset, from the seed. Success is that of the
    episode's last step, as TD-MPC2's evaluation reads it (``info["success"]`` when the episode is over): to have solved
    the task on the way is not enough.

    Two details are not TD-MPC2's: it uses Meta-World's ``v2`` tasks, of which the ``v3`` are the successors, and its
    episodes begin with one simulator step without an action, after the first observation.
    """

    def __init__(self, task: str, num_envs: int, seed: int, device: str, num_workers: int | None = None) -> None:
        """Create the environments and reset them.

        Args:
            task: Name of the task, ``mw-...``.
            num_envs: Number of environments N.
            seed: Seed of goals and objects.
            device: Torch device of what is returned.
            num_workers: Most workers that hold the environments; one per core by default. The workers are shared with
                all other batches of this process. Each worker needs 18 MB for the task's model, and then less than
                1 MB for each environment.

        Raises:
            UserError: If there is no environment or no worker.
            M3POError: If the environments cannot be created.
        """
        if num_envs < 1 or (num_workers is not None and num_workers < 1):
            raise UserError(f"task '{task}' needs at least 1 environment and 1 worker, got {num_envs}, {num_workers}.")
        self.num_envs, self.num_actions, self.device = num_envs, ACTION_DIM, device
        self.max_episode_length = EPISODE_LENGTH
        self._batch = Batch(task, num_envs, seed, num_workers)
        self._block = torch.from_numpy(self._batch.block)
        self._inputs = cut(self._block, num_envs)
        versions = [importlib.metadata.version(name) for name in ("metaworld", "mujoco")]
        self.cfg = MetaWorldCfg(task, seed, self._batch.num_workers, ACTION_REPEAT, *versions)
        self.episode_length_buf = torch.zeros(num_envs, dtype=torch.long, device=device)
        self._obs = self._outputs().obs

    steps_beside = True

    def get_observations(self) -> TensorDict:
        """Observation group ``policy``, (N, 39)."""
        return self._group(self._obs)

    def reset(self) -> tuple[TensorDict, dict[str, Any]]:
        """Reset all environments."""
        self._batch.order("reset")
        self._batch.wait()
        self.episode_length_buf = torch.zeros_like(self.episode_length_buf)
        self._obs = self._outputs().obs
        return self.get_observations(), {}

    def seed(self, seed: int) -> None:
        """Draw goals and objects from a seed from now on."""
        self._batch.seed(seed)

    def reset_envs(self, ids: torch.Tensor) -> TensorDict:
        """Reset some environments, (n,), int64; returns the observations of all."""
        self._inputs.ends.zero_()
        self._inputs.ends[ids.cpu()] = 1.0
        self._batch.order("restart")
        self._batch.wait()
        self.episode_length_buf = self.episode_length_buf.index_fill(0, ids, 0)
        self._obs = self._obs.index_copy(0, ids, self._outputs().obs[ids])
        return self.get_observations()

    def step(self, actions: torch.Tensor) -> tuple[TensorDict, torch.Tensor, torch.Tensor, dict[str, Any]]:
        """Advance by one decision step.

        Args:
            actions: Actions, (N, 4), clamped to [-1, 1].

        Returns:
            Observations, rewards (N,), dones (N,), and extras: ``time_outs`` (N,), the same as dones; ``final_obs``,
            like the observations, those before the reset in rows that are done; and ``success`` (N,), 0 or 1, whether
            the task is solved after this step: the success of an episode in rows that are done.

        Raises:
            M3POError: If a worker failed or was killed.
        """
        self.step_async(actions)
        return self.step_wait()

    def step_async(self, actions: torch.Tensor) -> None:
        """Begin a step; see :meth:`step`. Batches that have begun step at the same time."""
        self._dones = self.episode_length_buf + 1 >= self.max_episode_length
        self._inputs.actions.copy_(actions.clamp(-1.0, 1.0))
        self._inputs.ends.copy_(self._dones[:, None])
        self._batch.order("step")

    def step_wait(self) -> tuple[TensorDict, torch.Tensor, torch.Tensor, dict[str, Any]]:
        """Finish the step that was begun; see :meth:`step`."""
        self._batch.wait()
        self.episode_length_buf = torch.where(self._dones, 0, self.episode_length_buf + 1)
        outputs = self._outputs()
        self._obs = outputs.obs
        extras = {
            "time_outs": self._dones,
            "final_obs": self._group(outputs.final_obs),
            "success": outputs.success[:, 0],
        }
        return self.get_observations(), outputs.rewards[:, 0], self._dones, extras

    def close(self) -> None:
        """Drop the environments, and end the workers that hold no others."""
        self._batch.close()

    def _outputs(self) -> Buffers:
        """A copy of the buffers on the device: the next step overwrites the shared memory."""
        return cut(self._block.to(self.device, copy=True), self.num_envs)

    def _group(self, policy: torch.Tensor) -> TensorDict:
        return TensorDict({"policy": policy}, batch_size=[self.num_envs])
