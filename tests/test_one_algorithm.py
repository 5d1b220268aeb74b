"""One algorithm: the same parts on every device and for every task, in every unit of reward, with no dead field."""

from __future__ import annotations

import ast
import dataclasses
from typing import Any

import pytest
import torch
from conftest import REPOSITORY
from toy_env import PointEnv, runner_cfg
from toy_gates import open_gates

from m3po import config
from m3po.algorithms import M3PO
from m3po.config import COMPONENTS, REMOVED, AlgorithmCfg, from_dict
from m3po.presets import MODES, sized, suite_runner_cfg
from m3po.runners import M3PORunner

SIZES = {
    "world_model.features",
    "world_model.width",
    "world_model.task_embedding_dim",
    "world_model.steps_per_iteration",
    "world_model.extra_steps",
    "world_model.batch_size",
    "planner.num_states",
    "planner.num_samples",
    "planner.num_policy_samples",
    "planner.num_iterations",
    "planner.num_elites",
    "planner.kernels",
    "planner.precision",
    "critic_replay.steps_per_iteration",
    "critic_replay.batch_size",
}
"""Fields that a device may change: sizes, and how the same numbers are computed."""


def leaves(cfg: AlgorithmCfg) -> dict[str, Any]:
    """Values of all fields by their dotted names."""
    found = {}
    for name, value in dataclasses.asdict(cfg).items():
        if isinstance(value, dict):
            found |= {f"{name}.{key}": x for key, x in value.items()}
        else:
            found[name] = value
    return found


def parts(cfg: AlgorithmCfg) -> dict[str, Any]:
    """Which parts are on: each number as whether it is 0, choices as they are."""
    ways = ("planner.kernels", "planner.precision")
    return {k: v if isinstance(v, str) else bool(v) for k, v in leaves(cfg).items() if k not in ways}


# -- devices and tasks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_the_same_parts_are_on_everywhere(mode):
    cfgs = [suite_runner_cfg(several, device, mode) for several in (False, True) for device in ("cpu", "cuda:0")]
    first, *others = (parts(cfg["algorithm"]) for cfg in cfgs)
    assert all(first == other for other in others)
    assert first == parts(MODES[mode]())


def test_all_parts_are_on_by_default():
    for device in ("cpu", "cuda:0"):
        cfg = suite_runner_cfg(True, device, "default")["algorithm"]
        on = (
            cfg.world_model.anchor,
            cfg.world_model.steps_per_iteration,
            cfg.planner.max_learning_kl,
            cfg.planner.planned_fraction,
            cfg.planner.num_iterations,
            cfg.bonus.size,
            cfg.bonus.num_functions,
            cfg.critic_replay.steps_per_iteration,
            cfg.policy_average_decay,
        )
        assert all(on)


@pytest.mark.parametrize("mode", MODES)
def test_a_device_changes_sizes_alone(mode):
    cfg = MODES[mode]()
    before = leaves(cfg)
    after = leaves(sized(cfg, "cuda:0"))
    assert {name for name in before if before[name] != after[name]} <= SIZES
    assert leaves(sized(cfg, "cpu")) == before == leaves(cfg)


# -- fields -----------------------------------------------------------------------------------------------------------


def test_every_field_is_read_and_there_are_few():
    names = [name.split(".")[-1] for name in leaves(AlgorithmCfg())]
    assert len(names) <= 50
    read = set()
    for path in (REPOSITORY / "source/m3po").rglob("*.py"):
        if path.name in ("config.py", "presets.py", "validation.py"):  # these name all of them
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                read.add(node.attr)
    assert sorted(set(names) - read) == []


@pytest.mark.parametrize(("cls", "name"), [(cls, name) for cls, names in REMOVED.items() for name in names])
def test_the_message_of_a_removed_field_names_what_replaces_it(cls, name):
    section = getattr(config, cls)
    assert name not in [field.name for field in dataclasses.fields(section)]
    outer = next((field for field, component in COMPONENTS.items() if component is section), None)
    values = {name: 1} if outer is None else {outer: {name: 1}}
    with pytest.raises(ValueError, match=f"'{name}' was removed") as error:
        from_dict(AlgorithmCfg, values)
    assert REMOVED[cls][name] in str(error.value)
    assert "\n" not in str(error.value)


def test_what_replaces_a_removed_field_is_a_field():
    """``agent.algorithm.`` and a section may stand before it."""
    names = {name.split(".")[-1] for name in leaves(AlgorithmCfg())} | set(COMPONENTS)
    for fields in REMOVED.values():
        for replacement in fields.values():
            words = replacement.replace("(", " ").replace(")", " ").replace("=", " ").split()
            found = {word.split(".")[-1] for word in words} & names
            assert found or replacement.startswith("nothing"), replacement


# -- units of reward --------------------------------------------------------------------------------------------------


class ScaledEnv(PointEnv):
    """The point with rewards times a factor."""

    factor = 1.0

    def step(self, actions):
        obs, reward, dones, extras = super().step(actions)
        return obs, self.factor * reward, dones, extras


def actions_of(factor: float) -> torch.Tensor:
    """Actions of three iterations with all parts on, the bonus forced, (T, N, A)."""
    torch.manual_seed(0)
    env = ScaledEnv(16)
    env.factor = factor
    cfg = runner_cfg(world_model={"steps_per_iteration": 10, "extra_steps": 20}, planner={"planned_fraction": 0.5})
    algorithm = open_gates(M3PO.construct_algorithm(env.get_observations(), env, cfg, "cpu"))
    algorithm.gates.rewarded.fill_(0.01)
    algorithm.gates.update_rewarded = lambda *args: None
    algorithm.gates.update_gain = lambda *args: None
    obs, actions = env.get_observations(), []
    for _ in range(3):
        with torch.inference_mode():
            for _ in range(8):
                actions.append(algorithm.act(obs).clone())
                obs, reward, dones, extras = env.step(actions[-1])
                algorithm.process_env_step(obs, reward, dones, extras)
            algorithm.compute_returns(obs)
        algorithm.update()
        metrics = algorithm.metrics
        assert metrics["planner/planned_fraction"] == 0.5
        assert metrics["bonus/mean_abs"] > 0.01
    assert metrics["plan/kl"] > 0.0
    assert metrics["planner/kl"] > 0.01
    return torch.stack(actions)


def test_the_unit_of_the_rewards_changes_no_action():
    expected = actions_of(1.0)
    for factor in (0.01, 100.0):
        torch.testing.assert_close(actions_of(factor), expected, rtol=0.0, atol=1e-2)


# -- long runs --------------------------------------------------------------------------------------------------------


@pytest.mark.learning
def test_training_three_times_as_long_keeps_the_return():
    torch.manual_seed(1)
    critic = {"steps_per_iteration": 32, "batch_size": 256}
    cfg = runner_cfg(gamma=0.95, policy_average_decay=0.95, critic_replay=critic) | {"num_steps_per_env": 10}
    run = M3PORunner(PointEnv(64), cfg, device="cpu")

    def cost() -> float:
        env, policy, total = PointEnv(256, seed=99), run.inference_policy("prior"), 0.0
        with torch.inference_mode():
            for _ in range(20):
                _, reward, _, _ = env.step(policy(env.get_observations()))
                total -= reward.mean().item()
        return total

    costs = [cost()]
    for _ in range(3):
        run.alg.train_mode()
        run.learn(40)
        costs.append(cost())
    assert costs[1] < 0.6 * costs[0], costs
    assert max(costs[2:]) < 1.1 * costs[1], costs
