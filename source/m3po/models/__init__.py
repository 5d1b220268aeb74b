"""Networks: the latent world model, its layers, and per-task statistics."""

from m3po.models.world_model import WorldModel

__all__ = ["WorldModel"]
