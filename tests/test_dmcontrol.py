"""DMControl in batches against dm_control itself, one environment after the other.

The state of dm_control is put into the batch before every step: trajectories of contacts are chaotic, single steps are
not. So a test sees states that dm_control reaches under random actions, and one decision step (two control steps) from
each of them.
"""

import subprocess
import sys
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import scipy.stats
import torch

from m3po.envs.suite import TaskInfo
from m3po.errors import UserError
from m3po_tasks.dmcontrol import SUITE

pytest.importorskip("dm_control")

from m3po_tasks.dmcontrol.env import MjcfVecEnv
from m3po_tasks.dmcontrol.sampling import random_rotations, split_states
from m3po_tasks.dmcontrol.task import Initial

CUSTOM = {
    "cheetah-jump",
    "cheetah-run-back",
    "cheetah-run-backwards",
    "cheetah-run-front",
    "cup-spin",
    "hopper-hop-backwards",
    "pendulum-spin",
    "reacher-three-easy",
    "reacher-three-hard",
    "walker-run-backwards",
    "walker-walk-backwards",
}
DM_CONTROL = [task for task in SUITE.tasks() if task not in CUSTOM]

# Where an episode's target is in dm_control's model: physics -> numbers, as `State.target` has them. By domain.
TARGETS: dict[str, Callable] = {
    # finger-spin, which has no target, makes its site transparent.
    "finger": lambda physics: physics.target_position() if physics.named.model.site_rgba["target", "a"] else [],
    "fish": lambda physics: physics.named.data.geom_xpos["target"].copy(),
    "reacher": lambda physics: physics.named.data.geom_xpos["target", :2].copy(),
}

# Positions near the goal, for tasks whose reward random actions would hardly ever see. By task.
GOALS: dict[str, list[float]] = {
    "acrobot-swingup": [0.3, 0.2],
    "cartpole-balance-sparse": [0.26, 0.01],
    "cartpole-swingup": [0.2, 0.05],
    "cartpole-swingup-sparse": [0.24, 0.05],
    "cup-catch": [0.0, 0.0, 0.0, 0.37],
    "finger-spin": [0.34, -0.56, -2.45],
    "finger-turn-easy": [0.0, 0.0, 0.23],
    "finger-turn-hard": [0.0, 0.0, -0.08],
    "fish-swim": [0.02, -0.05, 0.28, 1.0] + 10 * [0.0],
    "humanoid-run": [0.0, 0.0, 1.22, 1.0, 0.0, 0.22, 0.0] + 21 * [0.0],
    "humanoid-stand": [0.0, 0.0, 1.22, 1.0, 0.0, 0.22, 0.0] + 21 * [0.0],
    "humanoid-walk": [0.0, 0.0, 1.22, 1.0, 0.0, 0.22, 0.0] + 21 * [0.0],
    "pendulum-swingup": [0.1],
    "reacher-easy": [-0.79, -1.95],
    "reacher-hard": [-1.07, -1.95],
}

# How far around these positions it goes, 0.05 if not said.
JITTER: dict[str, float] = {"cup-catch": 0.008}  # or the ball would start within the cup's walls


class Reference:
    """dm_control's own environments with TD-MPC2's action repeat of 2."""

    def __init__(self, task: str, num_envs: int) -> None:
        from dm_control import suite

        self.domain, name = task.split("-", 1)
        self.domain = {"cup": "ball_in_cup"}.get(self.domain, self.domain)
        self.envs = [suite.load(self.domain, name.replace("-", "_"), {"random": seed}) for seed in range(num_envs)]
        for env in self.envs:
            env.reset()
        self.goal, self.jitter = GOALS.get(task), JITTER.get(task, 0.05)

    def start_near_goal(self, rng: np.random.Generator) -> None:
        """Put the first environment near the goal; the others stay where random actions lead them."""
        physics = self.envs[0].physics
        with physics.reset_context():
            physics.data.qpos[:] = self.goal + self.jitter * rng.uniform(-1, 1, len(self.goal))

    def lift(self, rng: np.random.Generator) -> None:
        """Put all environments high above the floor, near the default pose, turned and moving at random."""
        for env in self.envs:
            data = env.physics.data
            with env.physics.reset_context():
                data.qpos[:] += 0.02 * rng.uniform(-1, 1, len(data.qpos))
                data.qpos[2] = 5.0
                data.qpos[3:7] = random_rotations(1, rng)[0]
                data.qvel[:] = 0.5 * rng.standard_normal(len(data.qvel))

    def states(self) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Positions, velocities and activations of all environments, and their targets."""
        data = [env.physics.data for env in self.envs]
        parts = ([getattr(one, name) for one in data] for name in ("qpos", "qvel", "act"))
        target = TARGETS.get(self.domain, lambda physics: [])
        targets = torch.as_tensor(np.array([target(env.physics) for env in self.envs]))
        return [torch.as_tensor(np.array(part)) for part in parts], targets

    def step(self, actions: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Observations and rewards of one decision step each."""
        results = []
        for env, action in zip(self.envs, actions.double().numpy(), strict=True):
            spec = env.action_spec()
            ctrl = spec.minimum + (action + 1.0) / 2.0 * (spec.maximum - spec.minimum)
            env.physics.data.qacc_warmstart[:] = 0.0  # where the batch's constraint solver starts, too
            steps = [env.step(ctrl) for _ in range(2)]
            obs = np.concatenate([np.ravel(value) for value in steps[-1].observation.values()])
            results.append((obs, sum(step.reward for step in steps)))
        return tuple(map(np.array, zip(*results, strict=True)))


def force(env: MjcfVecEnv, parts: list[torch.Tensor], targets: torch.Tensor) -> None:
    """Put all worlds of a batch into given states."""
    env.backend.load(torch.arange(env.num_envs), *(part.to(env.backend.dtype) for part in parts))
    env.target[:] = targets


def steps_of(task: str, backend: str, num_envs: int, steps: int, airborne: bool = False) -> Iterator[tuple]:
    """Drive a batch beside dm_control, from the same states with the same actions.

    Yields:
        Observations and rewards of the batch, and those of dm_control, (N, O), (N,), (N, O), (N,).
    """
    env = SUITE.make(task, num_envs, seed=0, device="cpu", backend=backend)
    reference = Reference(task, num_envs)
    rng = np.random.default_rng(0)
    for _ in range(steps):
        if airborne:
            reference.lift(rng)
        elif reference.goal is not None:
            reference.start_near_goal(rng)
        force(env, *reference.states())
        actions = torch.as_tensor(rng.uniform(-1, 1, (num_envs, env.num_actions)), dtype=torch.float32)
        expected = reference.step(actions)
        obs, rewards, dones, _ = env.step(actions)
        assert not dones.any()
        yield obs["policy"].numpy(), rewards.numpy(), *expected
    env.close()


def assert_steps_agree(results: Iterator[tuple], atol: float, rtol: float) -> None:
    """All observations and rewards agree, and there were different rewards to compare."""
    seen = []
    for obs, rewards, expected_obs, expected_rewards in results:
        np.testing.assert_allclose(obs, expected_obs, rtol=rtol, atol=atol)
        np.testing.assert_allclose(rewards, expected_rewards, rtol=rtol, atol=atol)
        seen.append(expected_rewards)
    assert np.ptp(seen) > 0, "the rewards compared are all the same: the task needs a row in GOALS"


@pytest.mark.parametrize("task", DM_CONTROL)
def test_steps_are_dm_controls(task: str) -> None:
    # The relative part is the rounding of large observations to float32.
    assert_steps_agree(steps_of(task, "rollout", num_envs=3, steps=200), atol=1e-5, rtol=1e-7)


# In contact these differ: where a capsule stands steeply on a plane, mujoco_warp lays the friction pyramid along the
# world's axes, MuJoCo along the capsule, and the quadruped reads contact forces. In the air they do not.
STEEP_CAPSULES = ("humanoid-", "quadruped-")


@pytest.mark.slow
@pytest.mark.parametrize("task", [task for task in DM_CONTROL if not task.startswith("dog-")])
def test_warp_steps_are_dm_controls(task: str) -> None:
    results = steps_of(task, "warp", num_envs=2, steps=20, airborne=task.startswith(STEEP_CAPSULES))
    if task.startswith("quadruped-"):
        results = map(with_directions, results)
    assert_steps_agree(results, atol=1e-4, rtol=1e-4)


def with_directions(result: tuple) -> tuple:
    """The quadruped's forces and torques as fractions of their length; the small parts of large ones are rounded."""
    obs, rewards, expected_obs, expected_rewards = result
    vectors, expected = (np.sinh(values[:, 54:].astype(float)).reshape(-1, 8, 3) for values in (obs, expected_obs))
    lengths = np.linalg.norm(expected, axis=2, keepdims=True)
    parts = [
        np.concatenate([values[:, :54], (forces / lengths).reshape(-1, 24)], axis=1)
        for values, forces in ((obs, vectors), (expected_obs, expected))
    ]
    return parts[0], rewards, parts[1], expected_rewards


@pytest.mark.slow
@pytest.mark.parametrize("task", [task for task in DM_CONTROL if task.startswith(STEEP_CAPSULES)])
def test_warp_on_the_floor_is_dm_control_for_most_steps(task: str) -> None:
    errors = []
    for obs, rewards, expected_obs, expected_rewards in steps_of(task, "warp", num_envs=2, steps=40):
        errors.extend((np.abs(obs - expected_obs) / (1 + np.abs(expected_obs))).max(axis=1))
        np.testing.assert_allclose(rewards, expected_rewards, rtol=1e-4, atol=1e-4)
    assert np.median(errors) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("task", ["pendulum-swingup", "cartpole-swingup", "finger-spin", "walker-walk"])
def test_backends_agree(task: str) -> None:
    """Trajectories of the same seed and actions, across the resets of some worlds."""
    envs = [SUITE.make(task, 3, seed=4, device="cpu", backend=backend) for backend in ("rollout", "warp")]
    generator = torch.Generator().manual_seed(0)
    for env in envs:
        env.episode_length_buf = torch.tensor([497, 0, 499])
    for _ in range(5):
        actions = 2 * torch.rand(3, envs[0].num_actions, generator=generator) - 1
        (obs, rewards, dones, extras), (others, *rest) = (env.step(actions) for env in envs)
        torch.testing.assert_close(others["policy"], obs["policy"], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(rest[0], rewards, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(rest[2]["final_obs"]["policy"], extras["final_obs"]["policy"], rtol=1e-4, atol=1e-4)
        assert torch.equal(rest[1], dones)
    assert envs[0].episode_length_buf.tolist() == [2, 5, 4]


@pytest.mark.parametrize("task", DM_CONTROL)
def test_initial_observations_are_dm_controls(task: str) -> None:
    """Of dm_control's own initial states, readings of forces and accelerations included."""
    reference = Reference(task, 3)
    parts, targets = reference.states()
    env = SUITE.make(task, 3, seed=0, device="cpu")
    start = Initial(*(part.numpy() for part in parts), targets.numpy())
    env.task.initial = lambda count, rng: start
    env = MjcfVecEnv(env.task, env.backend, num_envs=3, episode_length=500, seed=0)
    observations = [env.task.get_observation(env.physics) for env in reference.envs]
    expected = np.array([np.concatenate([np.ravel(value) for value in obs.values()]) for obs in observations])
    np.testing.assert_allclose(env.initial_obs.numpy(), expected, rtol=1e-7, atol=1e-5)


@pytest.mark.parametrize("task", DM_CONTROL)
def test_resets_are_distributed_as_dm_controls(task: str) -> None:
    """Kolmogorov-Smirnov on each observation of 150 resets of dm_control and the pool, at 1e-3 over all of them."""
    reference = Reference(task, 1)
    expected = []
    for _ in range(150):
        observation = reference.envs[0].reset().observation
        expected.append(np.concatenate([np.ravel(value) for value in observation.values()]))
    env = SUITE.make(task, 2, seed=1, device="cpu")
    # Rounded, so that what is constant stays so.
    expected, drawn = np.round(expected, 5), np.round(env.initial_obs.numpy().astype(float), 5)
    pvalues = [scipy.stats.ks_2samp(a, b).pvalue for a, b in zip(expected.T, drawn.T, strict=True)]
    assert min(pvalues) > 1e-3 / len(pvalues)


@pytest.fixture
def env() -> Iterator[MjcfVecEnv]:
    """Five worlds of a cheap task."""
    env = SUITE.make("hopper-stand", 5, seed=0, device="cpu", num_threads=1)
    yield env
    env.close()


def test_episodes_are_truncated_after_500_steps(env: MjcfVecEnv) -> None:
    env.episode_length_buf = torch.tensor([0, 498, 498, 300, 499])
    actions = torch.zeros(5, 4)
    _, _, dones, extras = env.step(actions)
    assert dones.tolist() == extras["time_outs"].tolist() == [False, False, False, False, True]
    before = env.get_observations()["policy"]
    twin = twin_of(env)
    obs, _, dones, extras = env.step(actions)
    assert dones.tolist() == extras["time_outs"].tolist() == [False, True, True, False, False]
    assert env.episode_length_buf.tolist() == [2, 0, 0, 302, 1]
    assert dones.dtype == torch.bool and env.max_episode_length == 500
    # The observation before the reset is that of a batch that does not end here; the one after it is a pool's.
    unbroken, *_ = twin.step(actions)
    assert torch.equal(extras["final_obs"]["policy"], unbroken["policy"])
    for row, done in enumerate(dones):
        in_pool = bool((env.initial_obs == obs["policy"][row]).all(dim=1).any())
        assert in_pool == done
        assert torch.equal(obs["policy"][row], unbroken["policy"][row]) == (not done)
    # What was returned before is not overwritten.
    assert not torch.equal(before, obs["policy"])
    # A world goes on from where its reset put it.
    env.step(actions)
    assert torch.isfinite(env.get_observations()["policy"]).all()


def twin_of(env: MjcfVecEnv) -> MjcfVecEnv:
    """A batch in the same physical state, at the start of its episodes."""
    twin = SUITE.make("hopper-stand", env.num_envs, seed=5, device="cpu", num_threads=1)
    _, *parts = split_states(env.task.model, env.backend.state)
    force(twin, [torch.from_numpy(part) for part in parts], env.target)
    return twin


def test_everything_follows_from_the_seed() -> None:
    def run(seed: int, num_threads: int) -> torch.Tensor:
        env = SUITE.make("walker-run", 4, seed=seed, device="cpu", num_threads=num_threads)
        env.episode_length_buf = torch.tensor([498, 0, 499, 0])
        generator = torch.Generator().manual_seed(0)
        steps = [env.step(2 * torch.rand(4, 6, generator=generator) - 1) for _ in range(5)]
        env.close()
        return torch.stack([torch.cat([obs["policy"], rewards[:, None]], dim=1) for obs, rewards, _, _ in steps])

    assert torch.equal(run(0, num_threads=1), run(0, num_threads=2))
    assert not torch.equal(run(0, num_threads=1)[0], run(1, num_threads=1)[0])


def test_reset_starts_all_episodes_anew(env: MjcfVecEnv) -> None:
    first = env.get_observations()["policy"]
    env.step(torch.ones(5, 4))
    obs, _ = env.reset()
    assert env.episode_length_buf.eq(0).all()
    assert not torch.equal(obs["policy"], first)
    assert all(bool((env.initial_obs == row).all(dim=1).any()) for row in obs["policy"])


def test_inference_mode_can_be_left(env: MjcfVecEnv) -> None:
    with torch.inference_mode():
        env.episode_length_buf = torch.full((5,), 499)
        env.step(torch.zeros(5, 4))
    env.step(torch.zeros(5, 4))
    env.reset()
    assert env.episode_length_buf.tolist() == [0] * 5


def test_actions_are_clamped(env: MjcfVecEnv) -> None:
    twin = twin_of(env)
    actions = torch.linspace(-3, 3, 20).reshape(5, 4)
    obs, rewards, *_ = env.step(actions)
    expected, expected_rewards, *_ = twin.step(actions.clamp(-1, 1))
    assert torch.equal(obs["policy"], expected["policy"])
    assert torch.equal(rewards, expected_rewards)


def test_returns_float32_on_the_device(env: MjcfVecEnv) -> None:
    obs, rewards, _, extras = env.step(torch.zeros(5, 4))
    assert obs["policy"].dtype == rewards.dtype == torch.float32
    assert obs["policy"].shape == (5, 15) and rewards.shape == (5,)
    assert set(extras) == {"time_outs", "final_obs"}


@pytest.mark.parametrize("task", SUITE.tasks())
def test_info_is_what_the_environments_have(task: str) -> None:
    env = SUITE.make(task, 1, seed=0, device="cpu", num_threads=1)
    obs_dim = env.get_observations()["policy"].shape[1]
    assert SUITE.info(task) == TaskInfo(task, obs_dim, env.num_actions, env.max_episode_length, (0.0, 1000.0))
    env.close()


def test_sets_are_those_of_the_benchmarks() -> None:
    sets = SUITE.sets()
    assert len(sets["DMC39"]) == 39 and set(sets["DMC39"]) == set(SUITE.tasks()) and set(sets["DMC39"]) > CUSTOM
    assert len(sets["DMC-MT30"]) == 30 and set(sets["DMC-MT30"]) > CUSTOM
    assert {"reacher-hard", "fish-swim", "cup-catch", "acrobot-swingup"} < set(sets["DMC-MT30"])
    assert not {"dog-run", "humanoid-walk", "quadruped-run"} & set(sets["DMC-MT30"])


def test_names_resolve() -> None:
    assert SUITE.resolve("cheetah-run") == SUITE.resolve("dmc-cheetah-run") == "cheetah-run"
    assert SUITE.resolve("cheetah") is None
    assert SUITE.missing() is None


def test_missing_backend_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert SUITE.missing() == "pip install 'm3po[dmcontrol]'"


def test_backends_are_checked() -> None:
    with pytest.raises(UserError, match="unknown DMControl backend 'gpu', choose from: rollout, warp"):
        SUITE.make("cheetah-run", 1, seed=0, device="cpu", backend="gpu")
    with pytest.raises(UserError, match="noslip"):
        SUITE.make("dog-run", 1, seed=0, device="cpu", backend="warp")


def test_importing_the_suite_imports_no_simulator() -> None:
    code = (
        "import sys, m3po_tasks.dmcontrol as d; d.SUITE.tasks(); d.SUITE.sets(); d.SUITE.info('cheetah-run');"
        "print([m for m in ('mujoco', 'dm_control', 'mujoco_warp') if m in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"
