"""Rollout storage and the replay buffer of recent rollouts."""

from m3po.storage.replay import ReplayBuffer, Sequences
from m3po.storage.rollout import RolloutStorage

__all__ = ["ReplayBuffer", "RolloutStorage", "Sequences"]
