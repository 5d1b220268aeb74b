"""NaN and Inf injected into every input, one at a time: environments, actions, losses, gradients, and the planner."""

from __future__ import annotations

import copy
import csv
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, run_process
from tensordict import TensorDict
from toy_env import PointEnv, runner_cfg
from toy_gates import open_gates

from m3po.algorithms import M3PO, step_guard
from m3po.algorithms.checkpoint_parts import LEARNERS
from m3po.algorithms.step_guard import BACK_OFF, StepGuard
from m3po.cli.replay_nonfinite import describe, read_recording, replay
from m3po.cli.replay_nonfinite import run as run_replay
from m3po.deferred_flag import DeferredFlag
from m3po.envs.multi_task import MultiTaskVecEnv, TaskEnv
from m3po.envs.subproc_env import SubprocVecEnv
from m3po.errors import M3POError, UserError
from m3po.runners import M3PORunner
from m3po.runners.checkpoint import read_checkpoint
from m3po.runners.nan_guard import NanGuard

VALUES = (math.nan, math.inf, -math.inf, 1e20)


class Faulty(PointEnv):
    """The toy environment with a second observation group ``extra``, and one value of one step replaced.

    ``where`` is ``state`` (which stays until a reset), ``policy``, ``extra``, ``reward`` or ``final_obs``.
    """

    def __init__(self, where=None, value=math.nan, row=3, at=5, num_envs=16, **arguments):
        super().__init__(num_envs, edge=math.inf, **arguments)  # or infinity would end the episode
        self.where, self.value, self.row, self.at, self.steps, self.resets = where, value, row, at, 0, []

    def close(self):
        """Nothing to close."""

    def get_observations(self):
        groups = {"policy": self.state.clone(), "extra": self.state.clone()}
        return TensorDict(groups, batch_size=[self.num_envs])

    def step(self, actions):
        assert actions.isfinite().all()
        self.steps += 1
        now = self.steps == self.at
        if now and self.where == "state":
            self.state[self.row, 0] = self.value
        if now and self.where == "final_obs":
            self.episode_length_buf[self.row] = self.max_episode_length
        _, rewards, dones, extras = super().step(actions)
        obs = self.get_observations()
        if "final_obs" in extras:
            final = extras["final_obs"]["policy"].clone()
            extras["final_obs"] = {"policy": final, "extra": final.clone()}
        if now and self.where in ("policy", "extra"):
            obs[self.where][self.row, 1] = self.value
        if now and self.where == "reward":
            rewards[self.row] = self.value
        if now and self.where == "final_obs":
            extras["final_obs"]["extra"][self.row, 1] = self.value
        return obs, rewards, dones, extras


class Resettable(Faulty):
    """The same, and it can be reset and put into a state."""

    def reset_envs(self, ids):
        self.resets.append(ids.tolist())
        rows = torch.zeros(self.num_envs, dtype=torch.bool)
        rows[ids] = True
        self._reset(rows)
        return self.get_observations()

    def get_state(self):
        return {"point": self.state.clone()}

    def set_state(self, state):
        self.state = state["point"].clone()
        return self.get_observations()


def cfg(**algorithm):
    return runner_cfg(**algorithm) | {"obs_groups": {"actor": ["policy"], "critic": ["policy", "extra"]}}


def train(env, log_dir=None, iterations=2, **values):
    torch.manual_seed(0)
    run = M3PORunner(env, copy.deepcopy(cfg()) | values, log_dir=log_dir and str(log_dir), device="cpu")
    if isinstance(run.alg, M3PO):
        open_gates(run.alg)
    run.learn(iterations)
    return run


def is_finite(run):
    networks = (run.alg.actor, run.alg.critic, *([run.alg.model] if isinstance(run.alg, M3PO) else []))
    return all(x.isfinite().all() for network in networks for x in network.state_dict().values())


def rows(path):
    with open(path, encoding="utf-8") as file:
        return list(csv.DictReader(file))


# -- environments -----------------------------------------------------------------------------------------------------

SOURCES = {
    "policy": "observation policy (columns 1)",
    "extra": "observation extra (columns 1)",
    "reward": "reward",
    "final_obs": "final observation extra (columns 1)",
    "state": "reward, observation policy (columns 0), observation extra (columns 0)",
}


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("where", SOURCES)
def test_each_input_is_masked_named_and_recorded(where, value, tmp_path, capsys):
    env = Resettable(where, value)
    run = train(env, tmp_path)
    assert is_finite(run)
    first, second = rows(tmp_path / "progress.csv")
    assert float(first["robust/nan_envs"]) == float(first["robust/invalid_steps"]) == 1.0
    assert float(second["robust/nan_envs"]) == 0.0
    assert float(first["robust/skipped_steps"]) == float(second["robust/skipped_steps"]) == 0.0
    out = capsys.readouterr().out
    assert f"NaN guard at step 5: not finite in environment 3: {SOURCES[where]};" in out
    # An episode that had ended anyway began anew by itself.
    assert env.resets == ([] if where == "final_obs" else [[3]])
    recording = read_recording(tmp_path / "nonfinite_5.pt")
    assert recording["environments"] == [3]
    assert recording["steps"]["actions"].shape == (5, 1, 2)
    assert any("step 5: " in line for line in describe(recording))


@pytest.mark.parametrize("where", ["policy", "reward", "state"])
def test_rsl_rls_ppo_survives_too(where, tmp_path):
    """Its storage has no mask: reward 0 and a time-out."""
    ppo = {"algorithm": {"class_name": "PPO", "num_learning_epochs": 2, "num_mini_batches": 2}, "multi_gpu": None}
    run = train(Resettable(where), tmp_path, **ppo)
    assert is_finite(run)
    assert float(rows(tmp_path / "progress.csv")[0]["robust/nan_envs"]) == 1.0


def answer_of(env, late=False, steps=5):
    """What the algorithm sees of the steps 1, 2, ..., with the fault in step 5 (or another)."""
    env.cfg.compute_final_obs = True
    guard = NanGuard(env, {}, None, "cpu", late)
    obs, answers = env.get_observations(), []
    for _ in range(steps):
        actions = guard.before(torch.zeros(env.num_envs, 2))
        previous = obs
        answers.append(guard.after(previous, env.step(actions)))
        obs = answers[-1][0]
    return previous, answers, guard


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("where", SOURCES)
def test_the_invalid_step(where, late):
    previous, answers, _ = answer_of(Resettable(where), late)
    obs, rewards, dones, extras = answers[-1]
    only = torch.arange(16) == 3
    assert torch.equal(extras["invalid"], only)
    assert extras["time_outs"][3]
    assert dones[3]
    assert rewards[3] == 0.0
    assert torch.equal(extras["final_obs"]["extra"][3], previous["extra"][3])
    assert all(group.isfinite().all() for group in obs.values())
    assert not dones[~only].any()


def test_a_device_that_does_not_wait_costs_one_more_step(capsys):
    env = Resettable("state")
    _, answers, guard = answer_of(env, late=True, steps=8)
    assert [bool(extras["invalid"][3]) for *_, extras in answers] == [False] * 4 + [True, True] + [False] * 2
    assert (answers[4][0]["policy"][3] == 0.0).all()  # nothing known yet
    assert env.resets == [[3]]
    assert (answers[5][0]["policy"][3, :2] != 0.0).all()  # reset
    guard.close_rollout()
    assert guard.metrics == {"robust/nan_envs": 1.0, "robust/invalid_steps": 2.0}
    assert "observation policy (columns 0)" in capsys.readouterr().out


def test_an_environment_that_cannot_be_reset_is_stepped_on_until_it_resets_itself(capsys):
    env = Faulty("state", episode=20)
    _, answers, guard = answer_of(env, steps=22)
    invalid = [bool(extras.get("invalid", torch.zeros(16))[3]) for *_, extras in answers]
    assert invalid == [False] * 4 + [True] * 16 + [False] * 2  # the 20th step ends the episode
    assert all((obs["policy"][3] == 0.0).all() for obs, *_ in answers[4:19])
    guard.close_rollout()
    assert guard.metrics == {"robust/nan_envs": 1.0, "robust/invalid_steps": 16.0}
    assert "environment 3 cannot be reset and will be stepped on" in capsys.readouterr().out


@pytest.mark.parametrize("late", [False, True])
def test_what_is_finite_passes_bit_for_bit(late):
    plain, watched = PointEnv(16), PointEnv(16)
    watched.cfg.compute_final_obs = plain.cfg.compute_final_obs = True
    guard = NanGuard(watched, {}, None, "cpu", late)
    obs = watched.get_observations()
    stream = torch.Generator().manual_seed(0)
    for _ in range(40):
        actions = torch.randn(16, 2, generator=stream)
        expected = plain.step(actions)
        answer = guard.after(obs, watched.step(guard.before(actions)))
        obs = answer[0]
        assert torch.equal(obs["policy"], expected[0]["policy"])
        assert torch.equal(answer[1], expected[1])
        assert torch.equal(answer[2], expected[2])
        assert torch.equal(answer[3]["time_outs"], expected[3]["time_outs"])
        assert not answer[3].get("invalid", torch.zeros(1)).any()


@pytest.mark.parametrize("value", VALUES)
def test_actions_of_a_broken_policy_never_reach_the_environment(value, tmp_path, capsys):
    torch.manual_seed(0)
    run = M3PORunner(Resettable(), cfg(), str(tmp_path), "cpu")
    act, calls = run.alg.act, []

    def broken(obs):
        actions = act(obs)
        calls.append(1)
        if len(calls) == 5:
            actions[3, 1] = run.alg.storage.actions[4, 3, 1] = run.alg.storage.log_pi[4, 3] = value
        return actions

    run.alg.act = broken
    run.learn(2)  # the environment refuses such actions
    assert is_finite(run)
    assert "not finite in environment 3: action;" in capsys.readouterr().out


def test_too_many_stop_the_run_with_a_checkpoint(tmp_path):
    env = Resettable("state", row=slice(0, 9))
    with pytest.raises(M3POError, match=r"56\.2% of the environments .*max_nan_fraction=0\.5 allows; saved .*last\.pt"):
        train(env, tmp_path)
    assert "actor_state_dict" in read_checkpoint(tmp_path / "model_last.pt")
    assert is_finite(train(Resettable("state", row=slice(0, 8)), tmp_path))
    assert is_finite(train(Resettable("state", row=slice(0, 16)), tmp_path, max_nan_fraction=1.0))


def test_networks_that_are_not_finite_do_not_replace_the_last_checkpoint(tmp_path):
    run = M3PORunner(Resettable(), cfg(), str(tmp_path), "cpu")
    (tmp_path / "model_last.pt").write_text("good")
    with torch.no_grad():
        next(run.alg.actor.mlp.parameters()).fill_(math.nan)
    with pytest.raises(M3POError, match=r"100\.0% .*nothing was saved, because the networks are not finite"):
        run.learn(1)
    assert (tmp_path / "model_last.pt").read_text() == "good"


def test_an_environment_that_is_broken_from_the_start(tmp_path):
    env = Resettable()
    run = M3PORunner(env, cfg(), str(tmp_path), "cpu")
    env.state[3] = math.nan
    run.learn(2)
    assert is_finite(run)
    assert env.resets == [[3]]


@pytest.mark.parametrize("fraction", [-0.1, 1.5])
def test_the_fraction_is_checked(fraction):
    with pytest.raises(ValueError, match="max_nan_fraction must lie in"):
        NanGuard(PointEnv(4), {"max_nan_fraction": fraction}, None, "cpu")


def test_its_field_of_an_earlier_version_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'quarantine_share' was removed; it is replaced by max_nan_fraction"):
        M3PORunner(PointEnv(4), runner_cfg() | {"quarantine_share": 0.5}, str(tmp_path), "cpu")


# -- several tasks ----------------------------------------------------------------------------------------------------


def faulty_env(num_envs=4, seed=0):
    """What a process of its own builds; refers to this module by name."""
    return Resettable("state", num_envs=num_envs, row=1, seed=seed)


def test_tasks_are_reset_and_counted_apart(tmp_path, capsys):
    here, fixed = Faulty("reward", num_envs=4, row=2, at=3), Resettable(num_envs=4)
    for task_env in (here, fixed):
        task_env.cfg.compute_final_obs = True
    process = SubprocVecEnv("away", "test_nonfinite:faulty_env", {}, seed=0)
    env = MultiTaskVecEnv([TaskEnv("here", here), TaskEnv("away", process), TaskEnv("fixed", fixed)], "cpu")
    try:
        several = runner_cfg()
        run = M3PORunner(env, several, str(tmp_path), "cpu")
        run.learn(1)
    finally:
        env.close()
    assert is_finite(run)
    counts = {row["task"]: float(row["nan_envs"]) for row in rows(tmp_path / "tasks.csv")}
    assert counts == {"here": 1.0, "away": 1.0, "fixed": 0.0}
    out = capsys.readouterr().out
    assert "step 3: not finite in environment 2 of here: reward; " in out
    assert "environment 2 cannot be reset" in out
    assert "step 5: not finite in environment 5 of away: reward, observation policy (columns 0); their" in out
    assert float(rows(tmp_path / "progress.csv")[0]["robust/nan_envs"]) == 2.0


def test_dmcontrol_and_meta_world_reset_single_environments():
    from m3po.envs.suite import find_task

    for name in ("cartpole-swingup", "mw-reach"):
        try:
            suite, task = find_task(name)
        except UserError as error:
            pytest.skip(str(error))
        env = suite.make(task, 3, seed=0, device="cpu")
        try:
            before = env.step(torch.ones(3, env.num_actions))[0]["policy"].clone()
            after = env.reset_envs(torch.tensor([1]))["policy"]
            assert torch.equal(after[[0, 2]], before[[0, 2]])
            assert not torch.equal(after[1], before[1])
            assert env.episode_length_buf.tolist() == [1, 0, 1]
            assert torch.equal(env.get_observations()["policy"], after)
            assert env.step(torch.ones(3, env.num_actions))[0]["policy"].isfinite().all()
        finally:
            env.close()


# -- replay -----------------------------------------------------------------------------------------------------------


def test_a_recording_is_printed_and_replayed(tmp_path, capsys):
    train(Resettable("reward", at=6), tmp_path, task="cartpole-swingup")
    path = tmp_path / "nonfinite_6.pt"
    recording = read_recording(path)
    exploding = Resettable("state", num_envs=1, row=0, at=6)
    lines = replay(exploding, recording["steps"])
    assert lines[0] == "replaying 6 steps from the recorded state"
    assert lines[1] == "  step 6: not finite: observation policy, observation extra, reward"
    # The same states and actions lead to the same observations.
    fine = Resettable(num_envs=1)
    assert replay(fine, recording["steps"])[1] == "  everything stayed finite"
    torch.testing.assert_close(fine.state, recording["steps"]["observations/policy"][5])
    capsys.readouterr()
    assert run_replay([str(path)]) == 0
    out = capsys.readouterr().out
    assert "task: cartpole-swingup, seed: 1, step: 6" in out
    assert "step 6: rewards (1 of 1)" in out
    (tmp_path / "bad.pt").write_bytes(b"bad")
    for name in ("none.pt", "bad.pt"):
        assert run_replay([str(tmp_path / name)]) == 2
    assert "there is no recording" in capsys.readouterr().err


# -- losses and gradients ---------------------------------------------------------------------------------------------


def guarded():
    torch.manual_seed(0)
    network = torch.nn.Linear(4, 1)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.1, fused=True)
    return network, StepGuard("toy", optimizer, [network], 1.0)


def guarded_step(network, guard, factor=1.0):
    guard.step(factor * network(torch.ones(8, 4)).square().mean())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_step_is_skipped_and_followed_by_smaller_ones(value, capsys):
    network, guard = guarded()
    guard.begin()
    guarded_step(network, guard)
    before = copy.deepcopy(network.state_dict())
    moments = copy.deepcopy(guard.optimizer.state_dict())
    guarded_step(network, guard, value)
    assert torch.equal(network.weight, before["weight"])
    assert torch.equal(guard.optimizer.state[network.weight]["exp_avg"], moments["state"][0]["exp_avg"])
    assert guard.scale == BACK_OFF
    assert guard.optimizer.param_groups[0]["lr"] == 0.1  # the schedule's, which others read
    assert guard.read() == (1, 0)
    assert "[m3po] toy: skipped 1 gradient steps" in capsys.readouterr().out
    guarded_step(network, guard)
    assert not torch.equal(network.weight, before["weight"])
    for _ in range(40):
        guarded_step(network, guard)
    assert guard.scale == 1.0
    assert guard.read() == (0, 0)


def test_several_in_a_row_restore_the_last_good_state(capsys, monkeypatch):
    monkeypatch.setattr(step_guard, "RESTORE_AFTER", 3)
    network, guard = guarded()
    for _ in range(3):
        guarded_step(network, guard, math.nan)
    assert "no good state yet" in capsys.readouterr().out
    guard.begin()
    good = copy.deepcopy(network.state_dict())
    for _ in range(4):
        guarded_step(network, guard)
    with torch.no_grad():
        network.weight.fill_(1e30)  # finite, but its squares are not
    guard.begin()
    for _ in range(2):
        guarded_step(network, guard)
    assert (network.weight == 1e30).all()
    guarded_step(network, guard)
    assert torch.equal(network.weight, good["weight"])
    assert "went back to the last good state" in capsys.readouterr().out
    guarded_step(network, guard)
    assert network.weight.isfinite().all()
    assert guard.read() == (6, 1)


def test_a_device_that_does_not_wait_skips_at_once_and_counts_one_step_later():
    network, guard = guarded()
    guard._flag = DeferredFlag("cpu", late=True)
    guarded_step(network, guard)
    before = network.weight.detach().clone()
    guarded_step(network, guard, math.nan)
    assert torch.equal(network.weight, before)
    assert guard.read() == (0, 0)
    guarded_step(network, guard)
    assert not torch.equal(network.weight, before)
    assert guard.read() == (1, 0)


def test_what_an_environment_shows_that_cannot_be_reset_stays_out_of_the_normalisers():
    env = Faulty("state", at=1)
    env.state += 10.0
    torch.manual_seed(0)
    normalised = cfg()
    normalised["actor"]["obs_normalization"] = True
    run = M3PORunner(env, normalised, None, "cpu")
    run.learn(1)
    assert run.alg.storage.any_invalid is False  # cleared
    lowest = run.alg.actor.obs_normalizer._mean - 3 * run.alg.actor.obs_normalizer._std
    assert lowest[0, 0] > 2.0  # zeros would have pulled it down


@pytest.mark.parametrize("learner", LEARNERS)
@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_training_goes_on_after_a_bad_update(learner, kind, tmp_path, monkeypatch):
    """The second step of each learner, one at a time."""
    torch.manual_seed(0)
    run = M3PORunner(PointEnv(16), runner_cfg(), str(tmp_path), "cpu")
    guard, calls = getattr(open_gates(run.alg), learner).guard, []
    step, clip = guard.step, torch.nn.utils.clip_grad_norm_

    def spoilt(loss, weight=1.0):
        calls.append(1)
        if len(calls) == 2 and kind == "loss":
            loss = loss + math.nan  # its derivative is finite
        return step(loss, weight)

    def spoilt_gradient(parameters, norm):
        parameters = list(parameters)
        if len(calls) == 2 and parameters[0] is guard.clipped[0][0]:
            next(p for p in parameters if p.grad is not None).grad[...] = math.nan
        return clip(parameters, norm)

    guard.step = spoilt
    if kind == "gradient":
        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spoilt_gradient)
    run.learn(2)
    assert len(calls) > 2
    assert is_finite(run)
    assert [float(row["robust/skipped_steps"]) for row in rows(tmp_path / "progress.csv")] == [1.0, 0.0]


def test_a_loss_of_frozen_parameters_alone_takes_no_step():
    network, guard = guarded()
    network.requires_grad_(False)
    before = network.weight.clone()
    guard.begin()
    guarded_step(network, guard)
    assert torch.equal(network.weight, before)
    assert guard.read() == (0, 0)


# -- the planner ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("execution", ["projected", "mppi"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_model_leaves_the_policy_in_charge_of_that_environment(execution, value, capsys):
    torch.manual_seed(0)
    env = PointEnv(8)
    settings = runner_cfg(planner={"planned_fraction": 1.0, "execution": execution, "num_iterations": 2})
    algorithm = M3PO.construct_algorithm(env.get_observations(), env, settings, "cpu")
    open_gates(algorithm).model.transition[1].weight.data.normal_(std=0.5)
    behaviour, obs = algorithm.behaviour, env.get_observations()
    policy = behaviour.sample(obs)
    encode, decisions = algorithm.model.encode, []

    def broken(o, task):
        z = encode(o, task)
        z[2] = value
        return z

    for function in (encode, broken):
        algorithm.model.encode = function
        behaviour.generator.manual_seed(0)
        behaviour.step.zero_()
        decisions.append(behaviour.plan(obs, policy))
    whole, partly = decisions
    others = torch.arange(8) != 2
    assert whole.planned.all()
    assert torch.equal(partly.planned, others)
    assert torch.equal(partly.actions[2], policy.actions[2])
    assert partly.log_beta[2] == policy.log_pi[2]
    assert partly.plan_gain[2] == 0.0
    assert not torch.equal(whole.actions[others], policy.actions[others])
    torch.testing.assert_close(partly.actions[others], whole.actions[others])
    played = behaviour.planner_policy(algorithm.actor)
    assert torch.equal(played(obs)[2], algorithm.actor(obs)[2])
    assert behaviour.read_fallbacks() == 1 / 16
    assert "1 of 16 plans were not finite, so the policy acted; environment 2" in capsys.readouterr().out


def test_a_model_that_breaks_while_training_is_reported_and_does_not_stop_the_run(tmp_path):
    torch.manual_seed(0)
    run = M3PORunner(PointEnv(16), runner_cfg(planner={"planned_fraction": 0.5}), str(tmp_path), "cpu")
    open_gates(run.alg)
    run.learn(1)
    run.alg.gates.update_gain = lambda *args: None
    with torch.no_grad():
        run.alg.model.transition[1].weight.fill_(math.nan)
    run.current_learning_iteration = 1
    run.learn(3)
    table = rows(tmp_path / "progress.csv")
    fallbacks = [float(row["planner/fallback"]) for row in table]
    assert fallbacks == [0.0, 1.0, 1.0, 0.0]
    # Four steps in an iteration, and five in a row restore what was good. Nobody else skips any.
    assert [float(row["robust/skipped_steps"]) for row in table] == [0.0, 4.0, 1.0, 0.0]
    assert [float(row["robust/restored"]) for row in table] == [0.0, 0.0, 1.0, 0.0]
    assert all(math.isfinite(float(row[name])) for row in table for name in ("bonus/gap", "loss/surrogate"))
    assert is_finite(run)


# -- a real simulation ------------------------------------------------------------------------------------------------

EXPLODING = "env.sim.dt=0.1"
"""An Ant whose physics takes steps twelve times as long as it can bear."""


def ant(folder, *options, algo="m3po"):
    command = [REPOSITORY / "scripts/train.py", "--task", "Isaac-Ant-v0", "--algo", algo, "--device", "cpu"]
    command += ["--num_envs", "16", "--max_iterations", "2", "--eval_interval", "0", "--seed", "1", EXPLODING]
    return run_process([sys.executable, *command, *options], timeout=300, cwd=folder)


@pytest.mark.sim
def test_an_exploding_simulation_is_masked_recorded_and_replayed(tmp_path):
    result = ant(tmp_path, "agent.max_nan_fraction=1.0")
    assert result.rc == 0, result.stderr[-3000:]
    assert re.search(r"NaN guard at step \d+: .*reward \(progress.*observation policy \(base_height", result.stdout)
    assert "cannot be reset" not in result.stdout
    (progress,) = tmp_path.glob("logs/*/ant/*/progress.csv")
    assert float(rows(progress)[0]["robust/nan_envs"]) == float(rows(progress)[0]["robust/invalid_steps"]) > 0.0
    recording = min(progress.parent.glob("nonfinite_*.pt"), key=lambda path: int(path.stem.split("_")[1]))
    script = REPOSITORY / "scripts/replay_nonfinite.py"
    replayed = run_process([sys.executable, script, recording, "--replay"], timeout=200, cwd=tmp_path)
    assert replayed.rc == 0, replayed.stderr[-3000:]
    assert "from the recorded state" in replayed.stdout
    assert re.search(r"step \d+: not finite: observation policy, reward", replayed.stdout.split("replaying")[1])


@pytest.mark.sim
@pytest.mark.parametrize("algo", ["m3po", "ppo"])
def test_an_exploding_simulation_stops_the_run_with_a_checkpoint(tmp_path, algo):
    result = ant(tmp_path, algo=algo)
    assert result.rc == 1, result.stdout[-3000:]
    assert re.search(r"error: .* of the environments gave values that are not finite .*; saved ", result.stderr)
    (checkpoint,) = Path(tmp_path).glob("logs/*/ant/*/model_last.pt")
    assert torch.load(checkpoint, weights_only=True)["m3po"]["algorithm"] == algo


@pytest.mark.parametrize("spoilt", [(), (0,), (0, 1, 2)])
def test_a_run_that_learnt_nothing_ends_with_an_error(spoilt, tmp_path, monkeypatch):
    """All steps of the policy skipped: the files are there, and the exit code is not 0."""
    runner = M3PORunner(PointEnv(8), runner_cfg() | {"algo": "m3po", "task": "toy"}, str(tmp_path), "cpu")
    learner, iteration = runner.alg.policy_learner, [0]
    train = learner.train

    def spoil(rollout):
        step = learner.guard.step
        if iteration[0] in spoilt:
            learner.guard.step = lambda loss, weight=1.0: step(loss * torch.nan, weight)
        iteration[0] += 1
        try:
            return train(rollout)
        finally:
            learner.guard.step = step

    monkeypatch.setattr(learner, "train", spoil)
    if len(spoilt) < 3:
        runner.learn(3)
    else:
        with pytest.raises(M3POError, match="nothing was learnt: every gradient step of the policy was skipped"):
            runner.learn(3)
    assert (tmp_path / "model_last.pt").exists()
