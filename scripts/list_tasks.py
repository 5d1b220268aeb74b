"""List every task and task set: sizes, length of an episode, score, installed or not.

./isaaclab.sh -p scripts/list_tasks.py
./isaaclab.sh -p scripts/list_tasks.py --suite dmcontrol
./isaaclab.sh -p scripts/list_tasks.py --set MT10 --json
"""

import sys

from m3po.cli.list_tasks import run

if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
