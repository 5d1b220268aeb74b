"""Train M3PO, or rsl_rl's PPO in the same harness, on an Isaac Lab task.

./isaaclab.sh -p scripts/train.py --task Isaac-Ant-v0 --algo m3po
"""

import sys

from isaaclab_m3po.backends.train_m3po import run

if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
