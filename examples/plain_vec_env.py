"""Train M3PO with rsl_rl's own runner on environments of your own. Needs nothing but this library's dependencies.

python examples/plain_vec_env.py
"""

import sys
import tempfile

import torch
from rsl_rl.env import VecEnv
from rsl_rl.runners import OnPolicyRunner
from tensordict import TensorDict

from m3po.presets import runner_cfg


class Reach(VecEnv):
    """Points on a line that must reach the origin: an action accelerates, distance costs."""

    def __init__(self, num_envs: int = 64, device: str = "cpu") -> None:
        self.num_envs, self.num_actions, self.max_episode_length, self.device = num_envs, 1, 50, device
        self.cfg: dict = {}
        self.episode_length_buf = torch.zeros(num_envs, dtype=torch.long, device=device)
        self._state = self._initial()

    def _initial(self) -> torch.Tensor:
        return torch.rand(self.num_envs, 2, device=self.device) * 2 - 1

    def get_observations(self) -> TensorDict:
        """Position and velocity."""
        return TensorDict({"policy": self._state}, batch_size=[self.num_envs], device=self.device)

    def step(self, actions: torch.Tensor) -> tuple[TensorDict, torch.Tensor, torch.Tensor, dict]:
        """Advance by one step; episodes end by time alone."""
        position, velocity = self._state.T
        velocity = 0.9 * velocity + 0.1 * actions[:, 0].clamp(-1, 1)
        self._state = torch.stack((position + velocity, velocity), 1)
        rewards = -self._state[:, 0].abs()
        self.episode_length_buf = self.episode_length_buf + 1
        dones = self.episode_length_buf >= self.max_episode_length
        extras = {"time_outs": dones, "final_obs": self.get_observations()}
        self._state = torch.where(dones[:, None], self._initial(), self._state)
        self.episode_length_buf = self.episode_length_buf.masked_fill(dones, 0)
        return self.get_observations(), rewards, dones, extras


if __name__ == "__main__":
    torch.manual_seed(1)
    cfg = runner_cfg()
    cfg["save_interval"] = 1000
    runner = OnPolicyRunner(Reach(), cfg, log_dir=tempfile.mkdtemp(), device="cpu")
    runner.learn(int(sys.argv[1]) if len(sys.argv) > 1 else 60)

    env, policy = Reach(1000), runner.get_inference_policy()
    with torch.inference_mode():
        for _ in range(env.max_episode_length - 1):
            obs, rewards, _, _ = env.step(policy(env.get_observations()))
    print(f"mean distance at the end of an episode: {-rewards.mean():.3f}")
