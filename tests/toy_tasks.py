"""The toy environment as one of several tasks: with a log, success, a wait, and every way to fail."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from toy_env import PointEnv

FAILURES = {
    "raise": lambda: 1 / 0,
    "exit": lambda: sys.exit("no physics today"),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
}


class ToyTask(PointEnv):
    """Ends of episodes differ from environment to environment, as the runner would make them."""

    def __init__(
        self,
        num_envs: int = 6,
        dim: int = 2,
        episode: int = 7,
        seed: int = 0,
        optional: tuple[str, ...] = ("time_outs", "final_obs", "success", "log"),
        sleep: float = 0.0,
        fail_at: int | None = None,
        failure: str = "raise",
        heals: bool = True,
    ) -> None:
        """Create the environments.

        ``optional`` names what ``extras`` holds. Step ``fail_at`` fails, step 0 is the construction; an environment
        that ``heals`` does not fail with the seed of a restart.
        """
        super().__init__(num_envs, dim, episode, edge=1.3, seed=seed)
        self.cfg.compute_final_obs = "final_obs" in optional
        self.optional, self.sleep = optional, sleep
        self.fail_at = None if heals and seed >= 1000 else fail_at
        self.failure, self.steps, self.log, self.closed = failure, 0, {}, False
        self.episode_length_buf = torch.arange(num_envs) % episode
        self._fail()

    def _fail(self) -> None:
        if self.steps == self.fail_at:
            print(f"about to {self.failure}")
            FAILURES[self.failure]()

    def step(self, actions: torch.Tensor) -> tuple:
        """Step; the log is a new object at each reset only, and repeated until the next, as in Isaac Lab."""
        self.steps += 1
        self._fail()
        time.sleep(self.sleep)
        obs, rewards, dones, extras = super().step(actions)
        if dones.any():
            self.log = {"Metrics/ended": dones.float(), "steps": float(self.steps)}
        extras["success"] = torch.where(dones.bool(), (obs["policy"][:, 0] > 0).float(), torch.nan)
        extras["log"] = self.log
        return obs, rewards, dones, {name: extras[name] for name in self.optional}

    def close(self) -> None:
        """Remember that it was called."""
        self.closed = True


@contextlib.contextmanager
def in_context(marker: str, **arguments: object) -> Iterator[ToyTask]:
    """A factory with a context; leaves a file behind when it is left."""
    try:
        yield ToyTask(**arguments)
    finally:
        Path(marker).write_text("left", encoding="utf-8")


def echo(num_envs: int = 4, seed: int = 0) -> ToyTask:
    """An environment that rewards what its previous actions were: an action buffer that changes would show."""
    env = ToyTask(num_envs, seed=seed)
    step, previous = env.step, [torch.zeros(num_envs, 2)]

    def step_and_keep(actions: torch.Tensor) -> tuple:
        obs, _, dones, extras = step(actions)
        rewards, previous[0] = previous[0].sum(1), actions
        return obs, rewards, dones, extras

    env.step = step_and_keep
    return env


def on_gpu(**arguments: object) -> ToyTask:
    """The toy environment with its tensors on a GPU; computed on the CPU, so that the numbers are the same."""
    env = ToyTask(**arguments)
    env.device = "cuda"
    step, observe = env.step, env.get_observations

    def step_there(actions: torch.Tensor) -> tuple:
        obs, rewards, dones, extras = step(actions.cpu())
        for name in ("time_outs", "success"):
            extras[name] = extras[name].cuda()
        extras["final_obs"] = {"policy": extras["final_obs"]["policy"].cuda()}
        return obs.to("cuda"), rewards.cuda(), dones.cuda(), extras

    env.step, env.get_observations = step_there, lambda: observe().to("cuda")
    return env
