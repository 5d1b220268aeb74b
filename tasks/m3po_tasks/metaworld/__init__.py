"""Meta-World as TD-MPC2 uses it: 50 manipulation tasks in a pool of processes. Imports neither torch nor metaworld."""

from m3po_tasks.metaworld.suite import SUITE

__all__ = ["SUITE"]
