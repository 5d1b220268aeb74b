"""Batched MPPI planning over the latent world model."""

from m3po.planning.imagination import Imagination
from m3po.planning.mppi import MPPIPlanner, Plan

__all__ = ["Imagination", "MPPIPlanner", "Plan"]
