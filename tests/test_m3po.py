"""The algorithm as a whole on a fast environment."""

import copy
import csv
import dataclasses
import math

import pytest
import torch
from rsl_rl.runners import OnPolicyRunner
from toy_env import PointEnv, runner_cfg

from m3po.algorithms import M3PO
from m3po.algorithms.behaviour_metrics import behaviour_metrics
from m3po.config import AlgorithmCfg, from_dict
from m3po.errors import CheckpointError, UserError
from m3po.presets import paper_preset
from m3po.runners import M3PORunner
from m3po.runners.checkpoint import read_checkpoint
from m3po.runners.episode_statistics import EpisodeStatistics
from m3po.validation import validate

OPEN = {"min_skill": None, "min_reward_ev": None}


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
    env, algorithm = build(10_000, planner={"share": 1.0, "execution": execution, "max_kl": 0.5, **OPEN})
    algorithm.model.reward_head.weight.data.normal_(std=0.5)
    obs = env.get_observations()
    obs["policy"][:] = 0.1
    decision = algorithm.behaviour.improve(obs, algorithm.behaviour.prior(obs))
    assert decision.planned.all()
    assert (decision.log_beta - decision.log_pi).abs().mean() > 0.01
    q = torch.distributions.Normal(decision.mean, 0.5 * decision.std).log_prob(decision.actions).sum(-1)
    estimate = torch.exp(q - decision.log_beta)
    assert abs(estimate.mean() - 1.0) < 5 * estimate.std() / 100.0 + 0.01
    # A wrong density must fail this test: the prior's own is not that of the executed actions.
    if execution == "projected":
        kl = 0.5 * ((decision.plan_mean - decision.mean) / decision.std).square().sum(-1)
        assert kl.max() <= 0.5 + 1e-5
        monte_carlo = (decision.log_beta - decision.log_pi).mean()
        torch.testing.assert_close(monte_carlo, kl.mean(), atol=0.02, rtol=0.0)


def test_the_planned_share_rotates():
    _, algorithm = build(planner={"share": 0.25, **OPEN})
    seen = []
    for _ in range(4):
        obs = algorithm.storage.obs[0].clone()
        seen.append(algorithm.behaviour.improve(obs, algorithm.behaviour.prior(obs)).planned)
        algorithm.behaviour.rotate()
    assert (torch.stack(seen).sum(0) == 1).all()


def test_the_gate_keeps_a_bad_model_from_planning():
    _, algorithm = build()
    assert not algorithm.behaviour.planner_on.any()
    for skill, ev, on in ((0.5, 0.5, True), (0.1, 0.5, False), (0.5, 0.1, False)):
        algorithm.behaviour.gate(torch.tensor([skill]), torch.tensor([ev]))
        assert algorithm.behaviour.planner_on.item() == on


def test_stock_runner_contract(tmp_path):
    run = train(runner_cfg(planner=OPEN), log_dir=str(tmp_path), runner=OnPolicyRunner)
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
    cfg = runner_cfg(planner=OPEN, bonus={"alpha": 0.3})
    first, second = train(cfg), train(cfg)
    assert torch.equal(weights(first), weights(second))
    other = train(cfg | {"seed": 7})
    assert not torch.equal(weights(first), weights(other))


def test_reports_and_checkpoints(tmp_path, capsys):
    run = train(runner_cfg(planner=OPEN, bonus={"alpha": 0.3}) | {"task": "Point"}, 4, str(tmp_path))
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
        "planner/share",
        "policy/effective_sample_size",
        "policy/clipped_share",
        "policy/value_ev",
        "bonus/mean_abs",
        "model/skill_1",
        "model/error_H",
        "model/reward_ev",
        "model/value_ev",
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
        ({"planner": {"share": 1.5}}, "share"),
        ({"ratio": "nonsense"}, "decoupled, prior"),
        ({"world_model": {"size": "7M"}}, "micro, tiny"),
        ({"world_model": {"horizon": 9}}, "exceeds the 8 steps"),
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
    cfg = runner_cfg(planner={"share": 0.5}, use_clipped_value_loss=False, gamma=0.95)
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
    paper = dataclasses.asdict(paper_preset("cpu"))
    paper["world_model"] |= {"steps_per_iteration": 4, "batch_size": 64}
    cfg["algorithm"] = {"class_name": cfg["algorithm"]["class_name"], **paper}
    train(cfg, 3, str(tmp_path))
    with open(tmp_path / "progress.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [float(r["planner/share"]) for r in rows] == [1.0] * 3
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


def test_the_planner_uses_what_the_model_has_just_learnt_or_loaded():
    """It plans with copies of the weights; training and loading must reach them without being told."""
    run = train(runner_cfg(planner=OPEN), 2)
    algorithm, obs = run.alg, run.env.get_observations()
    act = torch.inference_mode()(algorithm.act)
    packed, head = algorithm.behaviour.imagination.model, algorithm.model.value_head[-1]
    act(obs)
    assert torch.equal(packed.value.weight, head.weight)
    earlier, state = head.weight.clone(), copy.deepcopy(algorithm.save())
    algorithm.storage.clear()
    run.learn(1)
    act(obs)
    assert torch.equal(packed.value.weight, head.weight)
    assert not torch.equal(head.weight, earlier)
    algorithm.load(state, None, True)
    act(obs)
    assert torch.equal(packed.value.weight, earlier)


def test_stages_change_the_planned_share_during_training(tmp_path):
    cfg = runner_cfg(planner={**OPEN, "share": 1.0, "stages": [[0.5, {"share": 0.25}]]})
    train(cfg, 4, str(tmp_path))  # max_iterations is 4
    with open(tmp_path / "progress.csv", encoding="utf-8") as file:
        assert [float(r["planner/share"]) for r in csv.DictReader(file)] == [1.0, 1.0, 0.25, 0.25]


def test_extra_model_steps_fall_to_none():
    cfg = runner_cfg(world_model={"steps_per_iteration": 2, "extra_steps": 4, "extra_iterations": 2})
    run = M3PORunner(PointEnv(16), cfg, log_dir=None, device="cpu")
    sample, counts = run.alg.ring.sample, []
    run.alg.ring.sample = lambda *args: counts.append(run.alg.iteration) or sample(*args)
    run.learn(3)
    assert [counts.count(i) for i in range(3)] == [2 + 4, 2 + 2, 2]


def test_a_checkpoint_from_before_several_tasks_still_resumes():
    run = train(runner_cfg(planner=OPEN), 2)
    state = copy.deepcopy(run.alg.save())
    expected = run.alg.behaviour.state()
    state["m3po_state"] |= {name: values[0] for name, values in expected.items()}
    _, again = build(planner=OPEN)
    again.load(state, None, True)
    assert again.behaviour.state() == expected


def test_realised_gain_compares_planned_environments_with_the_others():
    _, algorithm = build(planner={"share": 0.25, **OPEN})
    st = algorithm.storage
    st.std.fill_(1.0)
    st.planned[:, :4] = True
    st.advantages[:, :4], st.advantages[:, 4:] = 0.5, -0.25
    metrics = behaviour_metrics(st, torch.ones_like(st.values), 1, "projected")
    assert metrics["planner/realised_gain"] == 0.75
    assert metrics["planner/share"] == 0.25
    st.planned[:] = True
    assert behaviour_metrics(st, torch.ones_like(st.values), 1, "projected")["planner/realised_gain"] == 0.0
