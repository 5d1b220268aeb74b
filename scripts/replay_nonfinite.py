"""Show what a run recorded when an environment's values ceased to be finite, and act it out again.

./isaaclab.sh -p scripts/replay_nonfinite.py logs/m3po/ant/<time>/nonfinite_<step>.pt
./isaaclab.sh -p scripts/replay_nonfinite.py logs/m3po/ant/<time>/nonfinite_<step>.pt --replay
"""

import sys

from m3po.cli.replay_nonfinite import run

if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
