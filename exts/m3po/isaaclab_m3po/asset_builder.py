"""Builds the embedded assets: the classic robots that ship inside the newton wheel, mended to Isaac Lab's names.

Run as ``python -m isaaclab_m3po.asset_builder FOLDER``, in a process of its own: OpenUSD freezes its plugin registry at
the first import, which belongs to Isaac Lab (or to Kit) in the process of the simulation.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pxr import Sdf

FORMAT = 1
"""Raised whenever the built files change, so that an old cache is not mistaken for a new one."""

ANT = "Isaac/Robots/IsaacSim/Ant/ant_instanceable.usd"
CARTPOLE = "Isaac/IsaacLab/Robots/Classic/Cartpole/cartpole.usd"
HUMANOID = "Isaac/Robots/IsaacSim/Humanoid/humanoid_instanceable.usd"
GROUND = "Isaac/IsaacLab/Environments/Grid/default_ground_plane_checker_v1/default_ground_plane.usda"

FILES = (ANT, CARTPOLE, HUMANOID, GROUND)
"""Every file of a complete asset folder, below its root; the names are those of Isaac Lab's remote root."""

HUMANOID_JOINTS = {
    "abdomen_x": "pelvis",
    "left_knee": "left_shin",
    "right_knee": "right_shin",
    "left_elbow": "left_lower_arm",
    "right_elbow": "right_lower_arm",
}
"""Newton's names of the humanoid's one-axis joints, and Isaac Lab's: those its actuators and gears are matched by."""

# An infinite plane, collided with and drawn. The spawner asks for a prim of type Plane below the default prim.
_GROUND_PLANE = """#usda 1.0
(
    defaultPrim = "GroundPlane"
    metersPerUnit = 1
    upAxis = "Z"
)

def Xform "GroundPlane"
{
    def Plane "CollisionPlane" (
        prepend apiSchemas = ["PhysicsCollisionAPI"]
    )
    {
        uniform token axis = "Z"
    }
}
"""


def build(folder: Path) -> None:
    """Write all of :data:`FILES` below a folder.

    Args:
        folder: The asset root to fill.
    """
    for name in FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)

    _open("ant.usda").Export(str(folder / ANT))

    cartpole = _open("cartpole_single_pendulum.usda")
    # newton's file names a default prim that it does not have
    cartpole.defaultPrim = "cartpole"
    cartpole.Export(str(folder / CARTPOLE))

    humanoid = _open("humanoid.usda")
    for old, new in HUMANOID_JOINTS.items():
        joint = humanoid.GetPrimAtPath(f"/nv_humanoid/joints/{old}")
        if joint is None:
            raise RuntimeError(f"newton's humanoid has no joint '{old}'")
        joint.name = new
    humanoid.Export(str(folder / HUMANOID))

    (folder / GROUND).write_text(_GROUND_PLANE)


def _open(name: str) -> Sdf.Layer:
    """Open a private copy of one of newton's example assets."""
    from pxr import Sdf

    # the folder of the wheel is found without importing newton, which would start warp
    spec = importlib.util.find_spec("newton")
    if spec is None or spec.origin is None:
        raise RuntimeError("the newton package is not installed")
    path = Path(spec.origin).parent / "examples" / "assets" / name
    if not path.is_file():
        raise RuntimeError(f"the installed newton package has no {path}")
    return Sdf.Layer.OpenAsAnonymous(str(path))


if __name__ == "__main__":
    build(Path(sys.argv[1]))
