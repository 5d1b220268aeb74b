"""Evaluate, export, record or show a trained policy: of an Isaac Lab task, of other suites' tasks, or of several tasks.

./isaaclab.sh -p scripts/play.py --task Isaac-Ant-v0 --algo m3po
./isaaclab.sh -p scripts/play.py --task walker-walk --checkpoint best --video
./isaaclab.sh -p scripts/play.py --task MT10 --policy planner
"""

import sys

from m3po.cli.play import run

if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
