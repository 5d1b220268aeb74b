"""Train M3PO with mjlab's own runner on one of its tasks. ``m3po train --task Mjlab-...`` needs no code at all.

python examples/mjlab_task.py Mjlab-Cartpole-Balance 4
"""

import sys
import tempfile

import mjlab.tasks  # noqa: F401
from mjlab.envs import ManagerBasedRlEnv
from mjlab.rl import MjlabOnPolicyRunner, RslRlVecEnvWrapper
from mjlab.tasks.registry import load_env_cfg, load_rl_cfg

from m3po.presets import runner_cfg

if __name__ == "__main__":
    task, iterations = sys.argv[1], int(sys.argv[2])
    env_cfg, agent = load_env_cfg(task), load_rl_cfg(task)
    env_cfg.scene.num_envs = 64
    env = RslRlVecEnvWrapper(ManagerBasedRlEnv(env_cfg, device="cpu"))

    cfg = runner_cfg("cpu") | {"obs_groups": {name: list(groups) for name, groups in agent.obs_groups.items()}}
    cfg["algorithm"]["gamma"] = agent.algorithm.gamma
    cfg["logger"], cfg["upload_model"] = "tensorboard", False
    runner = MjlabOnPolicyRunner(env, cfg, tempfile.mkdtemp(), "cpu")
    runner.learn(iterations)
