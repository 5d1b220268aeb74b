"""Returns, lengths and the environment's own log over one iteration, kept on the device until it ends."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch

from m3po.evaluation import is_success_rate


class EpisodeStatistics:
    """Episode bookkeeping of N environments without a host synchronisation per step."""

    WINDOW = 100
    """Finished episodes that the printed mean covers, as in rsl_rl."""

    def __init__(self, num_envs: int, device: str) -> None:
        """Start with empty episodes in all environments."""
        self.returns: deque[float] = deque(maxlen=self.WINDOW)
        self.lengths: deque[float] = deque(maxlen=self.WINDOW)
        self._return = torch.zeros(num_envs, device=device)
        self._length = torch.zeros(num_envs, device=device)
        self._steps: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self._rewards: list[torch.Tensor] = []
        self._logs: list[dict[str, Any]] = []
        self._last_log: dict[str, Any] | None = None

    def add(self, rewards: torch.Tensor, dones: torch.Tensor, extras: dict[str, Any]) -> None:
        """Add one step: rewards (N,), ends of episodes (N,), and the environment's ``extras``."""
        dones = dones.bool()
        self._return += rewards
        self._length += 1
        self._rewards.append(rewards.mean())
        self._steps.append((dones, self._return.clone(), self._length.clone()))
        self._return.masked_fill_(dones, 0.0)
        self._length.masked_fill_(dones, 0.0)
        log = extras.get("log", extras.get("episode"))
        # The environment repeats its dictionary until the next reset; a new reset brings a new object.
        if log and log is not self._last_log:
            self._logs.append(dict(log))
            self._last_log = log

    def read(self) -> dict[str, float]:
        """Statistics since the last call: the only host synchronisation of an iteration's bookkeeping."""
        result = {"mean_step_reward": torch.stack(self._rewards).mean().item()}
        dones, returns, lengths = (torch.stack(x) for x in zip(*self._steps, strict=True))
        self.returns.extend(returns[dones].tolist())
        self.lengths.extend(lengths[dones].tolist())
        result["episodes"] = int(dones.sum().item())
        if self.returns:
            result["mean_return"] = sum(self.returns) / len(self.returns)
            result["mean_length"] = sum(self.lengths) / len(self.lengths)
        values: dict[str, list[float]] = {}
        for log in self._logs:
            for key, value in log.items():
                values.setdefault(key, []).append(float(torch.as_tensor(value).float().mean()))
        for key, series in values.items():
            name = key if "/" in key else f"Episode/{key}"
            result[name] = sum(series) / len(series)
            if is_success_rate(key):
                result["success"] = result[name]
        self._steps.clear()
        self._rewards.clear()
        self._logs.clear()
        return result
