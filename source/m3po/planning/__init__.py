"""Planning: the imagined return, and MPPI that maximises it."""

from m3po.planning.mppi import MPPIPlanner, Plan, PlanInputs
from m3po.planning.objective import Objective

__all__ = ["MPPIPlanner", "Objective", "Plan", "PlanInputs"]
