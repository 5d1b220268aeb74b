"""NVIDIA's heterogeneous scene on a toy physics: all of it is Isaac Lab's own but the simulation.

Configuration, environment class, managers, all terms and rsl_rl's wrapper are the installed ones. Joints creep towards
their targets, and bodies move with the first joints. Isaac Lab is imported when a scene is made.
"""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import MagicMock

import torch

ARM = [f"panda_joint{i}" for i in range(1, 8)]
OPENARM = [f"openarm_joint{i}" for i in range(1, 8)]
FINGERS = ["_finger_joint1", "_finger_joint2"]
UR10 = ["shoulder_pan", "shoulder_lift", "elbow", "wrist_1", "wrist_2", "wrist_3"]
JOINTS = {
    "robot": [*OPENARM, *(f"openarm{finger}" for finger in FINGERS)],
    "robot_1": [*ARM, *(f"panda{finger}" for finger in FINGERS)],
    "robot_2": [f"{name}_joint" for name in UR10],
    "cabinet": ["door_left_joint", "door_right_joint", "drawer_bottom_joint", "drawer_top_joint"],
    "object": [],
}
BODIES = {
    "robot": ["openarm_ee_tcp"],
    "robot_1": ["panda_hand", "panda_leftfinger", "panda_rightfinger"],
    "robot_2": ["ee_link"],
    "cabinet": ["drawer_handle_top"],
    "object": ["cube"],
}


class Ids(list):
    """Joint indices as Isaac Lab's proxy of a tensor."""

    @property
    def torch(self):
        return torch.tensor(self)


class Asset:
    """The instances of a robot or object in some of the environments; quantities are (n, ...)."""

    is_initialized, device = True, "cpu"

    def __init__(self, name, cfg, env_ids, template):
        from isaaclab.utils.string import resolve_matching_names_values

        n, self.joint_names, self.body_names = len(env_ids), JOINTS[name], BODIES[name]
        self.num_instances, self.num_joints, self.num_bodies = n, len(self.joint_names), len(self.body_names)
        prim_paths = [cfg.prim_path.format(ENV_REGEX_NS=template.format(row)) for row in env_ids]
        self.root_view = SimpleNamespace(prim_paths=prim_paths)
        default = torch.zeros(n, self.num_joints)
        if self.joint_names:
            ids, _, values = resolve_matching_names_values(cfg.init_state.joint_pos, self.joint_names)
            default[:, ids] = torch.tensor(values)
        pose = torch.tensor([*cfg.init_state.pos, 0.0, 0.0, 0.0, 1.0]).repeat(n, 1)
        self.state = {
            "default_joint_pos": default,
            "default_joint_vel": torch.zeros_like(default),
            "joint_pos": default.clone(),
            "joint_vel": torch.zeros_like(default),
            "soft_joint_pos_limits": torch.tensor([-4.0, 4.0]).repeat(n, self.num_joints, 1),
            "default_root_pose": pose,
            "default_root_vel": torch.zeros(n, 6),
            "root_pose": pose.clone(),
        }
        self.target = default.clone()
        self.actuators = SimpleNamespace(target_command=self)

    @property
    def data(self):
        root, joints = self.state["root_pose"], self.state["joint_pos"]
        offset = torch.nn.functional.pad(0.1 * joints[:, :3], (0, 7 - min(3, self.num_joints)))
        bodies = (root + offset)[:, None].repeat(1, self.num_bodies, 1)
        views = {"root_pos_w": root[:, :3], "root_quat_w": root[:, 3:], "body_link_pose_w": bodies}
        views |= {"body_pos_w": bodies[..., :3], "body_quat_w": bodies[..., 3:]}
        return SimpleNamespace(**{k: SimpleNamespace(torch=v) for k, v in (self.state | views).items()})

    def find_joints(self, names, preserve_order=False, as_proxy=False):
        return self._find(names, self.joint_names, preserve_order)

    def find_bodies(self, names, preserve_order=False):
        return self._find(names, self.body_names, preserve_order)

    def _find(self, wanted, names, preserve_order):
        from isaaclab.utils.string import resolve_matching_names

        ids, found = resolve_matching_names(wanted, names, preserve_order)
        return Ids(ids), found

    def set_position_index(self, value, joint_ids=slice(None), env_ids=None):
        rows = slice(None) if env_ids is None else env_ids[:, None]
        joint_ids = torch.arange(self.num_joints) if env_ids is not None else joint_ids
        self.target[rows, joint_ids] = value

    def set_velocity_index(self, value, env_ids=None):
        pass

    def write_joint_position_to_sim_index(self, position, env_ids):
        self.state["joint_pos"][env_ids] = position

    def write_joint_velocity_to_sim_index(self, velocity, env_ids):
        self.state["joint_vel"][env_ids] = velocity

    def write_root_pose_to_sim_index(self, root_pose, env_ids):
        self.state["root_pose"][env_ids] = root_pose

    def write_root_velocity_to_sim_index(self, root_velocity, env_ids):
        pass

    def reset(self, rows):
        pass

    def update(self, dt):
        step = 0.05 * (self.target - self.state["joint_pos"])
        self.state["joint_pos"] += step
        self.state["joint_vel"][:] = step / dt


class Scene(dict):
    """The assets by name, each in the environments that Isaac Lab's own cloning strategy gives it."""

    def __init__(self, cfg):
        combinations, self.num_envs = cfg.clone_cfg.clone_combinations, cfg.num_envs
        layout = torch.from_numpy(cfg.clone_cfg.clone_strategy(torch.ones(len(combinations)).numpy(), cfg.num_envs))
        self.cloner_cfg, self._ALL_INDICES = cfg.clone_cfg, torch.arange(cfg.num_envs)
        self.env_origins = torch.zeros(cfg.num_envs, 3)
        for k, combination in enumerate(combinations):
            rows = (layout == k).nonzero()[:, 0].tolist()
            for name in combination.assets:
                self[name] = Asset(name, getattr(cfg, name), rows, cfg.clone_cfg.clone_template)
        self.articulations = {name: asset for name, asset in self.items() if asset.joint_names}
        self.rigid_objects = {"object": self["object"]}

    def update(self, dt):
        for asset in self.articulations.values():
            asset.update(dt)

    def write_data_to_sim(self):
        pass


def make_scene(num_envs=12, seconds=None, clone_strategy=None):
    """The scene behind rsl_rl's wrapper; ``seconds`` are its time limits."""
    import isaaclab_tasks  # noqa: F401
    from isaaclab_rl.rsl_rl import RslRlVecEnvWrapper
    from isaaclab_tasks.contrib.multitask_manipulation.multitask_env_cfg import MultitaskManipulationEnvCfg

    cfg = MultitaskManipulationEnvCfg(compute_final_obs=True)
    cfg.scene.num_envs = num_envs
    cfg.scene.clone_cfg.clone_strategy = clone_strategy or cfg.scene.clone_cfg.clone_strategy
    if seconds is not None:
        cfg.terminations.time_out.params["episode_lengths_s"] = seconds
    return RslRlVecEnvWrapper(simulate(cfg))


def simulate(cfg):
    """Isaac Lab's environment of a configuration of the scene."""
    from isaaclab.managers import EventManager
    from isaaclab_tasks.contrib.multitask_manipulation.multitask_env import MultitaskManipulationEnv

    env = object.__new__(MultitaskManipulationEnv)
    env.cfg, env.scene, env.extras, env.video_recorders, env._is_closed = cfg, Scene(cfg.scene), {}, [], True
    env.sim = MagicMock(device="cpu", is_rendering=False)
    env.sim.consume_reset_request.return_value = False
    env.episode_length_buf = torch.zeros(cfg.scene.num_envs, dtype=torch.long)
    env.common_step_counter = env._sim_step_counter = 0
    env.has_rtx_sensors, env.render_enabled, env._physics_handles_decimation = False, True, False
    env.event_manager = EventManager(cfg.events, env)
    env.load_managers()
    return env
