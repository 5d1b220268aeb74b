"""TD-MPC2's variations of DMControl: rewards at states made by hand, mirror images, models, starts and ends."""

import math

import mujoco
import numpy as np
import pytest
import torch

from m3po_tasks.dmcontrol import SUITE
from m3po_tasks.dmcontrol.domains import (
    cheetah,
    cheetah_custom,
    cup_custom,
    hopper,
    hopper_custom,
    pendulum_custom,
    reacher,
    reacher_custom,
    walker,
    walker_custom,
)
from m3po_tasks.dmcontrol.env import MjcfVecEnv
from m3po_tasks.dmcontrol.sampling import contact_counts, initial_sensors
from m3po_tasks.dmcontrol.task import Initial, Physics, State, Task

pytest.importorskip("dm_control")

DOMAINS = (cheetah_custom, cup_custom, hopper_custom, pendulum_custom, reacher_custom, walker_custom)
CUSTOM = {name: make for domain in DOMAINS for name, make in domain.TASKS.items()}

# The task of dm_control with the same model.
BASE = {
    "cheetah-jump": "cheetah-run",
    "cheetah-run-back": "cheetah-run",
    "cheetah-run-backwards": "cheetah-run",
    "cheetah-run-front": "cheetah-run",
    "cup-spin": "cup-catch",
    "hopper-hop-backwards": "hopper-hop",
    "pendulum-spin": "pendulum-swingup",
    "walker-run-backwards": "walker-run",
    "walker-walk-backwards": "walker-walk",
}

# Signs that mirror positions, targets and actions, for the tasks whose models are symmetric.
MIRRORS = {
    "cup-spin": ([-1, 1, -1, 1], [], [-1, 1]),
    "pendulum-spin": ([-1], [], [-1]),
    "reacher-three-easy": ([-1, -1, -1], [1, -1], [-1, -1, -1]),
}


def state_at(task: Task, positions: dict, velocities: dict | None = None, target: list | None = None) -> State:
    """A batch of states: numbers or lists of numbers by joint, added to the default pose without motion."""
    values = [*positions.values(), *(velocities or {}).values()]
    count = max(np.size(value) for value in values)
    start = Initial.rest(task.model, count)
    for joint, value in positions.items():
        start.qpos[:, task.model.joint(joint).qposadr[0]] += value
    for joint, value in (velocities or {}).items():
        start.qvel[:, task.model.joint(joint).dofadr[0]] += value
    parts = (start.qpos, start.qvel, start.act, initial_sensors(task.model, start))
    sensors = (task.model.sensor(index) for index in range(task.model.nsensor))
    columns = {sensor.name: slice(sensor.adr[0], sensor.adr[0] + sensor.dim[0]) for sensor in sensors}
    ctrl, targets = torch.zeros(count, task.model.nu), torch.tensor(target or [[]] * count, dtype=torch.float64)
    return State(Physics(*map(torch.from_numpy, parts)), ctrl, targets, columns)


def rewards(task: Task, *args) -> list[float]:
    return task.reward(state_at(task, *args)).tolist()


def load(env: MjcfVecEnv, qpos: np.ndarray, qvel: np.ndarray, target: np.ndarray) -> None:
    """Put all worlds into given states."""
    parts = (torch.as_tensor(part, dtype=env.backend.dtype) for part in (qpos, qvel, np.zeros((len(qpos), 0))))
    env.backend.load(torch.arange(len(qpos)), *parts)
    env.target[:] = torch.as_tensor(target)


def test_these_are_all_variations() -> None:
    assert len(CUSTOM) == 11 and set(CUSTOM) <= set(SUITE.tasks())


# Walker. Upright at rest it stands 1.3 m high: full reward for standing, a sixth of all while it does not move.


def test_walker_is_paid_for_speed_backwards() -> None:
    # Half the reward of moving at half the speed, none at 0: (5 * 1 + 1) / 6, (5 * 0.5 + 1) / 6, 1 / 6.
    walk, run = CUSTOM["walker-walk-backwards"](), CUSTOM["walker-run-backwards"]()
    speeds = [-20.0, -1.0, -0.5, 0.0, 5.0]
    assert rewards(walk, {"rootz": 0.0}, {"rootx": speeds}) == pytest.approx([1.0, 1.0, 3.5 / 6, 1 / 6, 1 / 6])
    assert rewards(run, {"rootz": 0.0}, {"rootx": [8 * v for v in speeds]}) == pytest.approx(
        [1.0, 1.0, 3.5 / 6, 1 / 6, 1 / 6]
    )


@pytest.mark.parametrize("gait", ["walk", "run"])
def test_walking_backwards_mirrors_walking(gait: str) -> None:
    speeds = np.linspace(-10.0, 10.0, 41)
    pose = {"rootz": np.linspace(-0.6, 0.1, 41), "rooty": np.linspace(-1.0, 1.0, 41), "left_knee": -0.3}
    backwards = rewards(CUSTOM[f"walker-{gait}-backwards"](), pose, {"rootx": speeds})
    assert backwards == rewards(walker.TASKS[f"walker-{gait}"](), pose, {"rootx": -speeds})
    assert len(set(backwards)) > 30


# Hopper. In the default pose its torso is 0.98 m above its foot.


def test_hopper_is_paid_for_speed_backwards() -> None:
    hop = CUSTOM["hopper-hop-backwards"]()
    speeds = [-5.0, -1.0, -0.75, -0.5, -0.25, 0.0, 2.0]
    assert rewards(hop, {"rootz": 0.0}, {"rootx": speeds}) == pytest.approx([1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0])
    lying = {"rooty": math.pi / 2}
    assert rewards(hop, lying, {"rootx": speeds}) == [0.0] * 7


def test_hopping_backwards_mirrors_hopping_at_half_the_speed() -> None:
    speeds = np.linspace(-2.5, 2.5, 41)
    pose = {"rooty": np.linspace(-2.0, 2.0, 41)}
    backwards = rewards(CUSTOM["hopper-hop-backwards"](), pose, {"rootx": speeds})
    assert backwards == rewards(hopper.TASKS["hopper-hop"](), pose, {"rootx": -2.0 * speeds})
    assert len(set(backwards)) > 5


# Cheetah. In the default pose its torso is 0.7 m high, the back foot 0.31 m, the front foot 0.28 m.


def up(height: float) -> float:
    """0.1 at half of the 1.2 m with full reward, with the square of the distance in the exponent."""
    return 0.1 ** (max(1.2 - height, 0.0) / 0.6) ** 2


def test_running_backwards_mirrors_running_at_four_fifths_of_the_speed() -> None:
    backwards = CUSTOM["cheetah-run-backwards"]()
    assert rewards(backwards, {"rootz": 0.0}, {"rootx": [-16.0, -8.0, -2.0, 0.0, 8.0]}) == [1.0, 1.0, 0.25, 0.0, 0.0]
    speeds = np.linspace(-12.0, 12.0, 41)
    forwards = rewards(cheetah.TASKS["cheetah-run"](), {"rooty": 0.3}, {"rootx": -speeds / 0.8})
    assert rewards(backwards, {"rooty": 0.3}, {"rootx": speeds}) == pytest.approx(forwards)


@pytest.mark.parametrize(("task", "foot"), [("cheetah-run-front", 0.31), ("cheetah-run-back", 0.28)])
def test_cheetah_on_one_foot_is_paid_for_heights_and_speed(task: str, foot: float) -> None:
    one_foot = CUSTOM[task]()
    raised = [0.0, 0.4, 1.0]
    heights = [(3 * up(foot + z) + 2 * up(0.7 + z)) / 5 for z in raised]
    assert rewards(one_foot, {"rootz": raised}, {"rootx": 6.0}) == pytest.approx(heights)
    assert rewards(one_foot, {"rootz": raised}, {"rootx": 3.0}) == pytest.approx([3.5 / 6 * up for up in heights])
    assert rewards(one_foot, {"rootz": raised}, {"rootx": -6.0}) == pytest.approx([up / 6 for up in heights])


def test_cheetah_raises_the_other_foot() -> None:
    """On the front foot the tail is up, on the back foot the nose."""
    front, back = CUSTOM["cheetah-run-front"](), CUSTOM["cheetah-run-back"]()
    nose_down, nose_up = {"rooty": 1.0}, {"rooty": -1.0}
    assert rewards(front, nose_down)[0] > 2 * rewards(front, nose_up)[0]
    assert rewards(back, nose_up)[0] > 2 * rewards(back, nose_down)[0]


def test_cheetah_jumps_on_the_spot() -> None:
    jump = CUSTOM["cheetah-jump"]()
    raised = np.array([0.0, 0.4, 2.0])
    heights = [(up((0.7 + 0.31) / 2 + z) + up((0.7 + 0.28) / 2 + z)) / 2 for z in raised]
    assert rewards(jump, {"rootz": raised}) == pytest.approx([(5 * up + 1) / 6 for up in heights])
    speeds = [-2.0, -1.0, -0.75, -0.5, 0.5, 0.75, 1.0, 2.0]
    slow = [0.0, 0.0, 0.5, 1.0, 1.0, 0.5, 0.0, 0.0]
    assert rewards(jump, {"rootz": 2.0}, {"rootx": speeds}) == pytest.approx([(5 + reward) / 6 for reward in slow])


# Cup. The inside of the cup is at (0, 0.55) m; the ball starts at (0, 0.2) m and is in the cup where |x| < 0.025 m.


def test_ball_is_paid_for_distance_and_speed() -> None:
    spin = CUSTOM["cup-spin"]()
    # Distances 0.35, 0.5 and 0.25 m: 1 - 0.5 * (0.5 - distance) / 0.25.
    far = np.array([0.7, 1.0, 0.5])
    z = [0.0, -0.15, 0.1]
    for velocity, fast in ((0.0, 0.0), (3.0, 0.5), (6.0, 1.0)):
        assert rewards(spin, {"ball_z": z}, {"ball_x": velocity}) == pytest.approx((far + 2 * fast) / 3)
    # Speed and distance are those of both directions; moving the cup pays only through the distance.
    assert rewards(spin, {"ball_x": 0.3, "ball_z": -0.05}, {"ball_x": 3.6, "ball_z": -4.8}) == pytest.approx([1.0])
    assert rewards(spin, {"cup_z": -0.1}, {"cup_x": 5.0}) == pytest.approx([0.5 / 3])


def test_ball_in_the_cup_earns_nothing() -> None:
    spin = CUSTOM["cup-spin"]()
    caught = {"ball_z": 0.35, "ball_x": [0.0, 0.024, 0.026]}
    assert [reward > 0 for reward in rewards(spin, caught, {"ball_z": 6.0})] == [False, False, True]


def test_most_balls_start_in_the_cup() -> None:
    spin = CUSTOM["cup-spin"]()
    count = 4000
    start = spin.initial(count, np.random.default_rng(0))
    cup, x, z = start.qpos[:, :2], start.qpos[:, 2], start.qpos[:, 3]
    caught = (abs(x) < 0.025) & (abs(z - 0.35) < 0.025)
    # Nine tenths, and the few of the others that happen to be drawn there: 4 stds of 0.0047.
    assert 0.9 - 0.019 < caught.mean() < 0.9 + 0.1 * 0.05 + 0.019
    others = ~caught
    assert x[others].min() < -0.15 and x[others].max() > 0.15 and abs(x).max() <= 0.2
    assert z[others].min() < 0.25 and z[others].max() > 0.45 and z.min() >= 0.2 and z.max() <= 0.5
    # Between walls 0.1 m apart and 0.016 m thick the ball can move 0.017 m either way; the bottom is at 0.5 m.
    assert 0.0165 < abs(x[caught]).max() < 0.017
    assert 0.333 < z[caught].min() < 0.334 and 0.374 < z[caught].max() < 0.375
    assert not cup.any() and not start.qvel.any()
    assert not contact_counts(spin.model, start.qpos).any()


# Pendulum


def test_pendulum_is_paid_for_angular_speed() -> None:
    spin = CUSTOM["pendulum-spin"]()
    speeds = [-20.0, -9.0, -4.5, -2.25, 0.0, 2.25, 4.5, 9.0, 20.0]
    expected = [1.0, 1.0, 0.5, 0.25, 0.0, 0.25, 0.5, 1.0, 1.0]
    for angle in (0.0, 1.0, math.pi):
        assert rewards(spin, {"hinge": angle}, {"hinge": speeds}) == pytest.approx(expected)


# Reacher


def test_third_link_is_as_published() -> None:
    model = CUSTOM["reacher-three-easy"]().model
    assert (model.nq, model.nv, model.nu) == (3, 3, 3)
    assert [model.body(index).name for index in range(model.nbody)] == ["world", "arm0", "arm1", "hand", "finger"]
    names = ["shoulder0", "shoulder1", "wrist"]
    assert [model.joint(index).name for index in range(3)] == names
    assert [model.actuator(index).name for index in range(3)] == names
    assert model.actuator_trnid[:, 0].tolist() == [0, 1, 2]
    assert model.jnt_limited.tolist() == [0, 1, 1]
    np.testing.assert_allclose(model.jnt_range[1:], np.radians([[-80, 80], [-80, 80]]))
    # Spheres and cylinders of water: density 1000 kg/m³, radius 1 cm.
    sphere, per_metre = 1000 * 4 / 3 * math.pi * 0.01**3, 1000 * math.pi * 0.01**2
    masses = [per_metre * 0.09 + sphere, per_metre * 0.09 + sphere, per_metre * 0.1 + sphere, sphere]
    np.testing.assert_allclose(model.body_mass[1:], masses)
    np.testing.assert_allclose(model.body_pos[1:], [[0, 0, 0.01], [0.09, 0, 0], [0.09, 0, 0], [0.09, 0, 0]])


def test_third_link_has_joints_and_motors_of_the_other_two() -> None:
    model, base = CUSTOM["reacher-three-easy"]().model, reacher.TASKS["reacher-easy"]().model
    for name in ("jnt_type", "jnt_axis", "jnt_stiffness", "dof_damping", "dof_armature", "dof_frictionloss"):
        assert (getattr(model, name) == getattr(base, name)[0]).all(), name
    for name in ("gear", "ctrlrange", "gainprm", "biasprm", "dyntype", "forcelimited"):
        assert (getattr(model, f"actuator_{name}") == getattr(base, f"actuator_{name}")[0]).all(), name
    assert model.opt.timestep == base.opt.timestep == 0.02
    assert model.opt.disableflags == base.opt.disableflags == mujoco.mjtDisableBit.mjDSBL_CONTACT


@pytest.mark.parametrize(("task", "reach"), [("reacher-three-easy", 0.06), ("reacher-three-hard", 0.025)])
def test_reacher_is_paid_where_finger_and_target_touch(task: str, reach: float) -> None:
    three_links = CUSTOM[task]()
    angles = np.array([[0.0, 0.0, 0.0], [0.5, -1.0, 0.7], [-2.0, 1.2, 1.3]])
    directions = angles.cumsum(axis=1)
    finger = 0.09 * np.stack([np.cos(directions), np.sin(directions)], axis=2).sum(axis=1)
    pose = dict(zip(("shoulder0", "shoulder1", "wrist"), angles.T, strict=True))
    velocity = {"shoulder0": [1.0, 2.0, 3.0]}
    for distance, expected in ((0.999 * reach, 1.0), (1.001 * reach, 0.0)):
        offset = distance * np.array([[1, 0], [0.6, -0.8], [0, -1]])
        state = state_at(three_links, pose, velocity, (finger + offset).tolist())
        assert three_links.reward(state).tolist() == [expected] * 3
        position, to_target, speed = three_links.observation(state)
        np.testing.assert_allclose(position, angles)
        np.testing.assert_allclose(to_target, offset, atol=1e-12)
        np.testing.assert_allclose(speed, [[1, 0, 0], [2, 0, 0], [3, 0, 0]])


def test_reacher_starts_in_the_ranges() -> None:
    start = CUSTOM["reacher-three-hard"]().initial(4000, np.random.default_rng(0))
    limits = np.array([math.pi, math.radians(80), math.radians(80)])
    assert (abs(start.qpos) <= limits).all() and (np.ptp(start.qpos, axis=0) > 1.99 * limits).all()
    distance, angle = np.hypot(*start.target.T), np.arctan2(*start.target.T)
    assert 0.05 <= distance.min() < 0.051 and 0.199 < distance.max() <= 0.2
    assert abs(np.exp(1j * angle).mean()) < 4 / math.sqrt(4000)  # uniform: of a random walk's size
    assert distance.mean() == pytest.approx(0.125, abs=4 * 0.15 / math.sqrt(12 * 4000))  # uniform in the distance
    assert not start.qvel.any()


# All


@pytest.mark.parametrize("task", BASE)
def test_physics_and_observations_are_those_of_the_domain(task: str) -> None:
    """Which test_dmcontrol.py compares with dm_control itself."""
    env, base = (SUITE.make(name, 3, seed=0, device="cpu") for name in (task, BASE[task]))
    start = env.initial.physics
    rng = np.random.default_rng(0)
    for one in (env, base):
        load(one, start.qpos[:3].numpy(), start.qvel[:3].numpy(), np.zeros((3, 0)))
    for _ in range(50):
        actions = torch.as_tensor(rng.uniform(-1, 1, (3, env.num_actions)), dtype=torch.float32)
        assert torch.equal(env.step(actions)[0]["policy"], base.step(actions)[0]["policy"])
    assert env.task.sub_steps == base.task.sub_steps
    env.close()
    base.close()


@pytest.mark.parametrize("task", MIRRORS)
def test_mirrored_worlds_earn_the_same(task: str) -> None:
    env, mirrored = (SUITE.make(task, 4, seed=0, device="cpu") for _ in range(2))
    position, target, action = map(np.array, MIRRORS[task])
    rng = np.random.default_rng(0)
    total = torch.zeros(4)
    for _ in range(50):
        rows = rng.integers(1000, size=4)
        qpos, goal = env.initial.physics.qpos[rows].numpy(), env.initial.target[rows].numpy()
        qvel = rng.normal(size=qpos.shape)
        load(env, qpos, qvel, goal)
        load(mirrored, position * qpos, position * qvel, target * goal)
        actions = rng.uniform(-1, 1, (4, env.num_actions))
        _, reward, *_ = env.step(torch.as_tensor(actions, dtype=torch.float32))
        _, expected, *_ = mirrored.step(torch.as_tensor(action * actions, dtype=torch.float32))
        torch.testing.assert_close(reward, expected, rtol=0, atol=1e-6)
        total += reward
    assert total.gt(0).any()
    env.close()
    mirrored.close()


@pytest.mark.parametrize("task", CUSTOM)
def test_episodes_are_truncated_after_500_decisions(task: str) -> None:
    env = SUITE.make(task, 2, seed=0, device="cpu")
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 501):
        actions = 2 * torch.rand(2, env.num_actions, generator=generator) - 1
        obs, reward, dones, extras = env.step(actions)
        assert bool(dones.all()) == bool(dones.any()) == (step == 500)
        assert torch.equal(extras["time_outs"], dones)
        assert (reward >= 0).all() and (reward <= 2).all()  # two control steps, at most 1 each
        assert obs["policy"].isfinite().all()
    assert (env.episode_length_buf == 0).all()
    assert not torch.equal(extras["final_obs"]["policy"], obs["policy"])
    env.close()


def visited(task: Task, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Positions and velocities that random controls lead to from the default pose."""
    data = mujoco.MjData(task.model)
    states = []
    for _ in range(count):
        data.ctrl[:] = rng.uniform(*task.model.actuator_ctrlrange.T)
        mujoco.mj_step(task.model, data, 2 * task.sub_steps)
        states.append((data.qpos.copy(), data.qvel.copy()))
    return tuple(map(np.array, zip(*states, strict=True)))


@pytest.mark.slow
@pytest.mark.parametrize("task", CUSTOM)
def test_warp_agrees_with_mujoco(task: str) -> None:
    """One decision step. In float32 the stiff contacts of ball and cup are worth three digits."""
    envs = [SUITE.make(task, 20, seed=0, device="cpu", backend=backend) for backend in ("rollout", "warp")]
    rng = np.random.default_rng(0)
    qpos, qvel = visited(envs[0].task, 20, rng)
    actions = torch.as_tensor(rng.uniform(-1, 1, (20, envs[0].num_actions)), dtype=torch.float32)
    target = envs[0].initial.target[:20].numpy()
    steps = []
    for env in envs:
        load(env, qpos, qvel, target)
        obs, reward, *_ = env.step(actions)
        steps.append(torch.cat([obs["policy"], reward[:, None]], dim=1))
        env.close()
    torch.testing.assert_close(*steps, rtol=1e-3, atol=1e-3)
