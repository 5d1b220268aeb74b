"""Rollout storage and the world model's ring of recent rollouts."""

from m3po.storage.ring import RolloutRing, Sequences
from m3po.storage.rollout import RolloutStorage

__all__ = ["RolloutRing", "RolloutStorage", "Sequences"]
