"""The algorithm as a whole on a fast environment."""

import copy
import csv
import dataclasses
import math

import pytest
import torch
from rsl_rl.runners import OnPolicyRunner
from test_plan_learning import judged
from toy_env import PointEnv, runner_cfg
from toy_gates import open_gates

from m3po.algorithms import M3PO, model_learning
from m3po.algorithms.behaviour_metrics import behaviour_metrics
from m3po.algorithms.gates import FULL_REALISED, LEAST_SHARE
from m3po.config import AlgorithmCfg, from_dict
from m3po.errors import CheckpointError, UserError
from m3po.presets import MODES
from m3po.runners import M3PORunner
from m3po.runners.checkpoint import FORMAT, read_checkpoint, write_checkpoint
from m3po.runners.episode_statistics import EpisodeStatistics
from m3po.validation import validate


def build(num_envs=16, **algorithm):
    torch.manual_seed(0)
    env = PointEnv(num_envs)
    return env, M3PO.construct_algorithm(env.get_observations(), env, runner_cfg(**algorithm), "cpu")


def train(cfg, iterations=3, log_dir=None, runner=M3PORunner, num_envs=16):
    torch.manual_seed(0)
    run = runner(PointEnv(num_envs), copy.deepcopy(cfg), log_dir=log_dir, device="cpu")
    run.learn(iterations, init_at_random_ep_len=True)
    return run


def weights(run):
    return torch.cat([p.detach().flatten() for p in [*run.alg.actor.parameters(), *run.alg.model.parameters()]])


@pytest.mark.parametrize("execution", ["projected", "mppi"])
def test_behaviour_density_against_monte_carlo(execution):
    """``E_beta[q / beta] = 1`` for any density q: the stored ``log beta`` must be that of the executed actions."""
    env, algorithm = build(10_000, planner={"planned_fraction": 1.0, "execution": execution, "max_acting_kl": 0.5})
    open_gates(algorithm).model.transition[1].weight.data.normal_(std=0.5)
    obs = env.get_observations()
    obs["policy"][:] = 0.1
    decision = algorithm.behaviour.plan(obs, algorithm.behaviour.sample(obs))
    assert decision.planned.all()
    assert (decision.log_beta - decision.log_pi).abs().mean() > 0.01
    q = torch.distributions.Normal(decision.mean, 0.5 * decision.std).log_prob(decision.actions).sum(-1)
    estimate = torch.exp(q - decision.log_beta)
    assert abs(estimate.mean() - 1.0) < 5 * estimate.std() / 100.0 + 0.01
    # A wrong density must fail this test: the policy's own is not that of the executed actions.
    if execution == "projected":
        kl = 0.5 * ((decision.plan_mean - decision.mean) / decision.std).square().sum(-1)
        assert kl.max() <= 0.5 + 1e-5
        monte_carlo = (decision.log_beta - decision.log_pi).mean()
        torch.testing.assert_close(monte_carlo, kl.mean(), atol=0.02, rtol=0.0)


def test_the_planned_share_rotates():
    _, algorithm = build(planner={"planned_fraction": 0.25})
    open_gates(algorithm)
    seen = []
    for _ in range(4):
        obs = algorithm.storage.obs[0].clone()
        seen.append(algorithm.behaviour.plan(obs, algorithm.behaviour.sample(obs)).planned)
        algorithm.behaviour.rotate()
    assert (torch.stack(seen).sum(0) == 1).all()


def test_the_gates_say_how_many_environments_are_planned():
    _, algorithm = build(64)
    behaviour, gates = algorithm.behaviour, algorithm.gates
    assert len(behaviour.planned_ids) == 0
    most = 0.25 * 64
    for gain, realised, planned in (
        (0.5, 1.0, most),
        (-0.1, 1.0, 0),  # the model's gradient points nowhere
        (0.5, FULL_REALISED / 2, most / 2),
        (0.5, -1.0, LEAST_SHARE * most),
    ):
        gates.gain.fill_(gain)
        gates.realised.fill_(realised)
        behaviour.rotate()
        assert len(behaviour.planned_ids) == planned


@pytest.mark.parametrize(("num_envs", "planned"), [(1, 0), (4, 1), (8, 1), (16, 1), (64, 2)])
def test_a_small_share_goes_on_measuring(num_envs, planned):
    """A share that rounds to nothing would never be measured again, whatever the plans come to be worth."""
    _, algorithm = build(num_envs)
    algorithm.gates.realised.fill_(-1.0)
    open_gates(algorithm)
    assert len(algorithm.behaviour.planned_ids) == planned


def test_stock_runner_contract(tmp_path):
    run = train(runner_cfg(), log_dir=str(tmp_path), runner=OnPolicyRunner)
    policy = run.get_inference_policy("cpu")
    obs = run.env.get_observations()
    assert policy(obs).shape == (16, 2)
    policy.reset(torch.zeros(16))
    run.export_policy_to_jit(str(tmp_path))
    run.export_policy_to_onnx(str(tmp_path))
    exported = torch.jit.load(tmp_path / "policy.pt")
    torch.testing.assert_close(exported(obs["policy"]), policy(obs))
    again = OnPolicyRunner(PointEnv(16), runner_cfg(), device="cpu")
    again.load(str(tmp_path / "model_2.pt"))
    assert torch.equal(weights(again), weights(run))


def test_same_seed_same_result_bit_for_bit():
    cfg = runner_cfg(policy_average_decay=0.9)
    first, second = train(cfg), train(cfg)
    assert torch.equal(weights(first), weights(second))
    other = train(cfg | {"seed": 7})
    assert not torch.equal(weights(first), weights(other))


def test_reports_and_checkpoints(tmp_path, capsys):
    run = train(runner_cfg() | {"task": "Point", "quiet": False}, 4, str(tmp_path))
    with open(tmp_path / "progress.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [int(r["iteration"]) for r in rows] == [0, 1, 2, 3]
    assert int(rows[-1]["env_steps"]) == 4 * 16 * 8
    wanted = (
        "mean_return",
        "mean_length",
        "time_plan",
        "time_physics",
        "time_update",
        "loss/surrogate",
        "loss/model_reward",
        "planner/kl",
        "planner/planned_fraction",
        "policy/effective_sample_size",
        "policy/clip_fraction",
        "policy/value_ev",
        "bonus/mean_abs",
        "bonus/alpha",
        "bonus/gap",
        "plan/gain",
        "plan/max_kl",
        "plan/kl",
        "plan/cosine",
        "planner/realised_gain",
        "gate/gain",
        "gate/realised",
        "gate/rewarded",
        "model/dynamics_r2",
        "model/reward_ev",
        "loss/critic_replay",
    )
    for name in wanted:
        assert rows[-1][name] != "", name
    assert float(rows[0]["bonus/mean_abs"]) > 0.0
    assert "ETA" in capsys.readouterr().out
    assert {p.name for p in tmp_path.glob("*.pt")} == {"model_1.pt", "model_3.pt", "model_last.pt"}
    assert list(tmp_path.glob("events.out.*"))

    again = M3PORunner(PointEnv(16), runner_cfg() | {"task": "Point"}, device="cpu")
    again.load(str(tmp_path / "model_last.pt"))
    assert torch.equal(weights(again), weights(run))
    assert again.current_learning_iteration == 4
    assert again.alg.learning_rate == run.alg.learning_rate
    assert again.env_steps == run.env_steps


def test_best_checkpoint_is_the_best_evaluated(tmp_path):
    class Scripted:
        """Returns 3, 9, 5 for the three evaluations, each one poll late."""

        scores, done = [3.0, 9.0, 5.0], []

        def submit(self, checkpoint_path, iteration):
            score = {"return_mean": self.scores.pop(0), "return_std": 0.0, "length_mean": 1.0, "num_episodes": 1}
            self.done.append({"iteration": iteration, "checkpoint": checkpoint_path, "prior": score, "planner": None})

        def poll(self):
            return []

        def wait(self):
            results, Scripted.done = self.done, []
            return results

        def close(self):
            pass

    cfg = runner_cfg() | {"eval_interval": 1}
    run = M3PORunner(PointEnv(16), cfg, log_dir=str(tmp_path), device="cpu", evaluator=Scripted())
    run.learn(3)
    assert read_checkpoint(tmp_path / "model_best.pt")["iter"] == 1
    with open(tmp_path / "evaluations.csv", encoding="utf-8") as file:
        assert [r["return_mean"] for r in csv.DictReader(file)] == ["3.0", "9.0", "5.0"]


def test_bad_checkpoints_are_refused_and_nothing_is_loaded(tmp_path):
    run = train(runner_cfg() | {"task": "Point"}, 1, str(tmp_path))
    path = tmp_path / "model_last.pt"
    other = M3PORunner(PointEnv(16, dim=3), runner_cfg() | {"task": "Cube"}, device="cpu")
    before = weights(other)
    with pytest.raises(CheckpointError, match=r"task: Point .* Cube.*observation sizes: .*number of actions: 2"):
        other.load(str(path))
    assert torch.equal(weights(other), before)

    content = path.read_bytes()
    (tmp_path / "short.pt").write_bytes(content[: len(content) // 2])
    (tmp_path / "noise.pt").write_bytes(b"\x00" * 1000)
    for name in ("short.pt", "noise.pt", "none.pt"):
        with pytest.raises(CheckpointError, match=name):
            run.load(str(tmp_path / name))
    torch.save({"actor_state_dict": OnPolicyRunner}, tmp_path / "code.pt")
    with pytest.raises(CheckpointError, match="other than tensors"):
        run.load(str(tmp_path / "code.pt"))
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        run.load(str(tmp_path / "list.pt"))


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="single process"):
        M3PORunner(PointEnv(16), runner_cfg(), device="cpu")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_mini_batches": 1000}, "128 samples"),
        ({"planner": {"num_elites": 99, "num_samples": 8}}, "num_elites"),
        ({"planner": {"planned_fraction": 1.5}}, "planned_fraction"),
        ({"planner": {"num_samples": 5}}, "at least 6, four of the gradient"),
        ({"planner": {"num_policy_samples": 5}}, "at least 9, four of the gradient"),
        ({"ratio": "nonsense"}, "decoupled, prior"),
        ({"world_model": {"features": 12}}, "multiple of 8, got 12"),
        ({"world_model": {"features": 0, "anchor": False}}, "positive without the anchor"),
        ({"world_model": {"horizon": 9}}, "exceeds the 8 steps"),
        ({"world_model": {"steps_per_iteration": 0}}, "the world model that it needs is not trained"),
        ({"critic_replay": {"steps_per_iteration": 0}}, "the critic would learn nothing"),
    ],
)
def test_bad_configurations_are_refused_with_what_is_allowed(values, message):
    with pytest.raises(ValueError, match=message):
        validate(from_dict(AlgorithmCfg, values), 16, 8)
    env = PointEnv(16)
    with pytest.raises(UserError, match=message):
        M3PO.construct_algorithm(env.get_observations(), env, runner_cfg(**values), "cpu")


def test_unknown_fields_are_listed():
    with pytest.raises(ValueError, match=r"no field horizn\. It has: horizon"):
        from_dict(AlgorithmCfg, {"planner": {"horizn": 5}})


def test_learns_to_stay_at_the_origin():
    """A few seconds of training beat the starting policy clearly, with the planner allowed once its model is good."""
    cfg = runner_cfg(
        planner={"planned_fraction": 0.5}, gamma=0.95, critic_replay={"steps_per_iteration": 32, "batch_size": 256}
    )
    cfg |= {"max_iterations": 40, "num_steps_per_env": 10}
    torch.manual_seed(1)
    run = M3PORunner(PointEnv(128), cfg, device="cpu")

    def score():
        env, policy, total = PointEnv(64, seed=99), run.inference_policy("prior"), 0.0
        with torch.inference_mode():
            for _ in range(20):
                _, reward, _, _ = env.step(policy(env.get_observations()))
                total += reward.mean().item()
        return total

    before = score()
    run.learn(40)
    after = score()
    assert after > 0.5 * before, (before, after)  # returns are negative: at most half of the initial cost


def test_paper_mode_plans_everywhere_on_the_same_code_path(tmp_path):
    cfg = runner_cfg()
    paper = dataclasses.asdict(MODES["paper"]())
    paper["world_model"] |= {"steps_per_iteration": 4, "batch_size": 64}
    cfg["algorithm"] = {"class_name": cfg["algorithm"]["class_name"], **paper}
    train(cfg, 3, str(tmp_path))
    with open(tmp_path / "progress.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [float(r["planner/planned_fraction"]) for r in rows] == [1.0] * 3
    assert [float(r["bonus/alpha"]) for r in rows] == [1.0, 0.75, 0.5]
    assert all(math.isfinite(float(v)) for r in rows for v in r.values() if v)


def test_success_is_the_tasks_rate_and_stale_logs_count_once():
    statistics = EpisodeStatistics(2, "cpu")
    log = {"Metrics/success_rate": torch.tensor(0.75), "Episode_Reward/success_rate": 0.1}
    done = torch.tensor([1, 0])
    statistics.add(torch.tensor([1.0, 2.0]), 0 * done, {})
    statistics.add(torch.tensor([1.0, 2.0]), done, {"log": log})
    # Isaac Lab hands the same dictionary out again until the next reset.
    statistics.add(torch.tensor([5.0, 2.0]), 0 * done, {"log": log})
    statistics.add(torch.tensor([5.0, 2.0]), done, {"log": {"Metrics/success_rate": 0.25}})
    result = statistics.read()
    assert result["success"] == 0.5
    assert result["mean_return"] == (2.0 + 10.0) / 2
    assert result["mean_length"] == 2.0
    assert result["episodes"] == 2
    assert result["mean_step_reward"] == 20.0 / 8


def test_extra_model_steps_are_taken_at_first_and_fewer_where_nothing_needs_the_model(monkeypatch):
    monkeypatch.setattr(model_learning, "EXTRA_ITERATIONS", 2)
    cfg = runner_cfg(world_model={"steps_per_iteration": 8, "extra_steps": 4})
    run = M3PORunner(PointEnv(16), cfg, log_dir=None, device="cpu")
    gates, sample, counts = run.alg.gates, run.alg.replay.sample, []
    run.alg.replay.sample = lambda *args: counts.append(run.alg.iteration) or sample(*args)
    gates.update_gain = gates.update_rewarded = lambda *args: None
    run.learn(3)
    assert [counts.count(i) for i in range(3)] == [8 + 4, 8 + 4, 8]  # nothing is rewarded yet
    gates.rewarded.fill_(1.0)
    run.learn(1)
    assert counts.count(3) == 2
    gates.gain.fill_(1.0)
    run.learn(1)
    assert counts.count(4) == 8


def test_realised_gain_compares_planned_environments_with_the_others():
    _, algorithm = build(planner={"planned_fraction": 0.25})
    st, gates = algorithm.storage, algorithm.gates
    st.std.fill_(1.0)
    st.planned[:, :4] = True
    st.advantages[:, :4], st.advantages[:, 4:] = 0.5, -0.25
    metrics = behaviour_metrics(st, torch.ones_like(st.values), 1, "projected")
    assert metrics["planner/planned_fraction"] == 0.25
    assert metrics["planner/realised_gain"] == 0.75
    algorithm.replay.add(st)
    assert algorithm.hindsight.measure(judged(algorithm))["planner/lasting_gain"] == 0.75
    known = gates.realised.item()
    assert FULL_REALISED < known < 0.75
    st.planned[:] = True
    assert behaviour_metrics(st, torch.ones_like(st.values), 1, "projected")["planner/realised_gain"] == 0.0
    assert algorithm.hindsight.measure(judged(algorithm))["planner/lasting_gain"] == 0.0
    assert gates.realised.item() == known  # nothing to compare with says nothing


def test_plans_are_made_learnt_from_and_acted_on_where_the_gates_are_open(tmp_path):
    torch.manual_seed(0)
    run = M3PORunner(PointEnv(16), runner_cfg(), str(tmp_path), "cpu")
    open_gates(run.alg)
    run.learn(4)
    with open(tmp_path / "progress.csv", encoding="utf-8") as file:
        rows = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
    assert all(row["planner/planned_fraction"] == 0.25 for row in rows)
    assert all(0.0 < row["planner/kl"] <= 0.301 for row in rows[1:])
    assert all(0.0 < row["plan/kl"] <= 1.2 * row["plan/max_kl"] for row in rows[1:])
    assert all(row["plan/cosine"] > 0.3 for row in rows[1:])


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (3, "written by an earlier version, whose networks were different"),
        (FORMAT - 1, "written by an earlier version, whose networks were different"),
        (FORMAT + 1, f"this version reads format {FORMAT}"),
    ],
)
def test_a_checkpoint_of_another_version_is_refused_in_one_line(version, message, tmp_path):
    run = train(runner_cfg(), 1, str(tmp_path))
    content = read_checkpoint(tmp_path / "model_last.pt")
    assert content["m3po"]["format"] == FORMAT == 6
    content["m3po"]["format"] = version
    write_checkpoint(tmp_path / "other.pt", content)
    before = weights(run)
    with pytest.raises(CheckpointError, match=message) as error:
        run.load(str(tmp_path / "other.pt"))
    assert "\n" not in str(error.value)
    assert ("train again" in str(error.value)) == (version < FORMAT)
    assert torch.equal(weights(run), before)
