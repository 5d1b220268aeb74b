"""Reacher with three links: TD-MPC2's variation of reacher (arXiv 2310.16828, appendix)."""

from __future__ import annotations

from functools import partial
from typing import override

import mujoco

from m3po_tasks.dmcontrol.domains.reacher import EASY_TARGET_RADIUS, HARD_TARGET_RADIUS, Reacher
from m3po_tasks.dmcontrol.task import add_frame_sensor, load_spec

LINKS = {"arm0": ("shoulder0", 0.09, None), "arm1": ("shoulder1", 0.09, 80.0), "hand": ("wrist", 0.1, 80.0)}
"""Joint, length (m) and largest joint angle (degrees, either way; ``None`` for no limit) of each link."""

SPACING = 0.09
"""Distance from each joint to the next, and from the last one to the finger, m."""

RADIUS = 0.01
"""Radius of links and finger, and height of the arm over the ground, m."""


class ThreeLinks(Reacher):
    """Reacher with another arm."""

    @override
    def build(self) -> mujoco.MjSpec:
        spec = load_spec("reacher.xml")
        spec.delete(spec.body("arm"))  # and with it all joints and motors
        size = (RADIUS, 0.0, 0.0)
        parent, position = spec.worldbody, (0.0, 0.0, RADIUS)
        for link, (joint, length, limit) in LINKS.items():
            parent = parent.add_body(name=link, pos=position)
            ends = (0.0, 0.0, 0.0, length, 0.0, 0.0)
            parent.add_geom(name=link, type=mujoco.mjtGeom.mjGEOM_CAPSULE, fromto=ends, size=size, material="self")
            parent.add_joint(name=joint, **({} if limit is None else {"range": (-limit, limit)}))
            spec.add_actuator(name=joint, target=joint, trntype=mujoco.mjtTrn.mjTRN_JOINT)
            position = (SPACING, 0.0, 0.0)
        finger = parent.add_body(name="finger", pos=position)
        finger.add_geom(name="finger", type=mujoco.mjtGeom.mjGEOM_SPHERE, size=size, material="effector")
        add_frame_sensor(spec, "pos", "geom", "finger")
        return spec


TASKS = {
    "reacher-three-easy": partial(ThreeLinks, EASY_TARGET_RADIUS),
    "reacher-three-hard": partial(ThreeLinks, HARD_TARGET_RADIUS),
}
