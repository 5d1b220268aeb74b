"""Evaluate, export, record or show a trained policy.

Usage: ``./isaaclab.sh -p scripts/play.py --task Isaac-Ant-v0 --algo m3po``
"""

import sys

from isaaclab_m3po.backends.play_m3po import run

if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
