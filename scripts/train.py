"""Train M3PO, or PPO in the same harness: on an Isaac Lab task, on tasks of other suites, or on several tasks at once.

./isaaclab.sh -p scripts/train.py --task Isaac-Ant-v0 --algo m3po
./isaaclab.sh -p scripts/train.py --task Isaac-Cartpole-v0,Isaac-Ant-v0,Isaac-Humanoid-v0
./isaaclab.sh -p scripts/train.py --task walker-walk
./isaaclab.sh -p scripts/train.py --task MT10
"""

import sys

from m3po.cli.train import run

if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
