"""DMControl as batched environments of torch tensors. Importing this package imports no simulator."""

from m3po_tasks.dmcontrol.suite import SUITE

__all__ = ["SUITE"]
