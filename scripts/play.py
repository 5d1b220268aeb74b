"""Evaluate, export, record or show a trained policy: of an Isaac Lab task, of other suites' tasks, or of several tasks.

./isaaclab.sh -p scripts/play.py --task Isaac-Ant-v0 --algo m3po
./isaaclab.sh -p scripts/play.py --task walker-walk --checkpoint best --video
./isaaclab.sh -p scripts/play.py --task MT10 --policy planner
"""

import sys

from m3po.cli import suite_job


def run(argv: list[str]) -> int:
    """Hand over to the command that knows the tasks."""
    if suite_job.handles(argv):
        from m3po.cli.play import run
    else:
        from isaaclab_m3po.backends.play_m3po import run
    return run(argv)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
