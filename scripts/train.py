"""Train M3PO, or PPO in the same harness: on an Isaac Lab task, on tasks of other suites, or on several tasks at once.

./isaaclab.sh -p scripts/train.py --task Isaac-Ant-v0 --algo m3po
./isaaclab.sh -p scripts/train.py --task Isaac-Cartpole-v0,Isaac-Ant-v0,Isaac-Humanoid-v0
./isaaclab.sh -p scripts/train.py --task walker-walk
./isaaclab.sh -p scripts/train.py --task MT10
"""

import sys

from m3po.cli import suite_job


def run(argv: list[str]) -> int:
    """Hand over to the command that knows the tasks."""
    if suite_job.handles(argv):
        from m3po.cli.train import run
    else:
        from isaaclab_m3po.backends.train_m3po import run
    return run(argv)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
