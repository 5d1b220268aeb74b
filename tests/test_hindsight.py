"""What plans and updates were worth is told by the rewards that followed, and decides how far the next ones go."""

import csv
import math

import pytest
import torch
from test_plan_learning import collect, judged, runner_of
from test_train_cli import tensors
from toy_env import PointEnv, runner_cfg

from m3po.algorithms.gates import BUDGET_RATE, BUDGET_STEPS, LARGEST_SLOPE, LEAST_BUDGET, Gates
from m3po.algorithms.hindsight import LATER
from m3po.algorithms.newest_update import PARTS, gaussian_kl
from m3po.algorithms.policy_learning import LEAST_STD
from m3po.algorithms.policy_outputs import PolicyOutputs
from m3po.runners import M3PORunner

NUM_ENVS = 2048


def moved(ppo: torch.Tensor, plan: torch.Tensor, log_std: float = 0.0):
    """A rollout of a policy that an update has just moved, in two parts (A,), stds, and what measures it."""
    torch.manual_seed(0)
    runner = runner_of(PointEnv(NUM_ENVS))
    alg = runner.alg
    distribution, newest = alg.actor.distribution, alg.newest_update
    with torch.no_grad():
        newest.keep("ppo")
        distribution.std_param *= math.exp(log_std)
        alg.actor.mlp[-1].bias += ppo * distribution.std_param
        newest.keep("plan")
        alg.actor.mlp[-1].bias += plan * distribution.std_param
    collect(runner)
    st = alg.storage
    return alg, st, (st.actions - st.mean) / st.std


def measure(alg):
    """What the newest rollout says of the newest update, as if enough steps had followed."""
    return alg.newest_update.note(alg.storage, alg.replay) | alg.hindsight.measure(judged(alg))


# -- which steps are judged, and by what -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_steps", "horizon"), [(8, 64), (20, 64), (24, 64), (60, 64), (64, 64), (100, 64), (8, 16)]
)
def test_each_step_is_judged_once_when_enough_later_ones_are_known(num_steps, horizon):
    """As many as there is room for; where the rollout is as long as what is looked back at, none."""
    alg = runner_of().alg
    alg.hindsight.horizon = horizon
    later = max(0, min(LATER, horizon - num_steps))
    seen, total = [], 0
    for _ in range(12):
        total += num_steps
        times = torch.arange(total)[-horizon:].float()
        none = torch.zeros(len(times), 2)
        steps = {"notes": times.view(-1, 1, 1).expand(-1, 2, 4), "advantages": torch.randn(len(times), 2)}
        steps |= {"planned": none.bool(), "invalid": none.bool(), "task": none.long()}
        found = alg.hindsight.judge(steps, num_steps)
        if found is None:
            assert total <= later
            continue
        assert found.advantages.mean().abs() < 1e-6
        assert found.advantages.std() == pytest.approx(1.0, abs=1e-3)
        new = found.along[:, 0, 0].tolist()
        assert new[-1] == total - 1 - later
        seen += new
    if num_steps <= horizon:
        assert seen == list(range(total - later))
    assert len(set(seen)) == len(seen)


def test_rollouts_may_be_longer_than_what_is_looked_back_at():
    cfg = runner_cfg(critic_replay={"horizon": 16, "steps_per_iteration": 2, "batch_size": 32})
    runner = M3PORunner(PointEnv(16), cfg | {"num_steps_per_env": 24}, None, "cpu")
    runner.learn(3)
    notes = runner.alg.replay.latest(24, ("notes",))["notes"]
    assert not notes[:8, :, 3].any()  # the critic did not look at these
    assert notes[8:, :, 3].abs().sum(1).all()
    assert runner.alg.gates.judged.item() == 3


def test_steps_are_judged_by_the_rewards_that_follow():
    """An action that pays 20 steps later, which the critic does not know."""
    num_steps, num_envs = 8, 4096
    room = {"replay_transitions": 64 * num_envs}
    runner = runner_of(PointEnv(num_envs), world_model=room)
    alg, stream = runner.alg, torch.Generator().manual_seed(0)
    st, noise = alg.storage, []
    alg.estimator.values_of = lambda obs, task: torch.zeros(task.shape)
    alg.estimator.values = lambda obs, task: torch.zeros(task.shape)
    for _ in range(5):
        for row in range(num_steps):
            noise.append(torch.randn(num_envs, generator=stream))
            st.rewards[row] = noise[-21] if len(noise) > 20 else 0.0
        alg.replay.add(st)
        alg.replay.note("gradient", torch.stack(noise[-num_steps:]))
    judged_steps = alg.hindsight.judge(alg.critic_replay.look_back(alg.replay), num_steps)
    gain = alg.hindsight.measure(judged_steps)["plan/gain"]
    # Of a return that is a sum of independent rewards, whose weights fall by gamma * lambda with each step.
    decay = (alg.cfg.gamma * 0.95) ** 2
    weights = [decay**k for k in range(64)]
    known = sum(sum(weights[max(0, 20 - t) : 40 - t]) for t in range(8, 16)) / 8
    assert gain == pytest.approx((weights[20] / known) ** 0.5, abs=0.05)


def test_gains_wait_for_what_follows_and_resume_with_it(tmp_path):
    """The first rollouts cannot be judged yet; a continued run judges what the first one collected."""
    runner = runner_of(folder=str(tmp_path))
    runner.learn(3)
    assert runner.alg.gates.judged.item() == 0
    runner.learn(1)
    assert runner.alg.gates.judged.item() == 1
    noted = runner.alg.replay.latest(32, ("notes",))["notes"]
    assert noted[..., 3].abs().sum(1).all()
    assert not noted[:8, :, :3].any()  # the first follows no update, and an untrained model's gradient is 0
    assert noted[8:, :, :2].abs().sum(1).all()
    state = runner.alg.replay.state_dict()
    other = runner_of().alg
    other.replay.load_state_dict(state)
    assert torch.equal(other.replay.latest(32, ("notes",))["notes"], noted)


def test_a_critic_that_knows_what_came_of_a_step_does_not_judge_it():
    """Each step is judged against its value before the critic learnt from it; afterwards nothing would be left."""
    runner = runner_of(PointEnv(64))
    runner.learn(4)
    alg = runner.alg
    before = alg.critic_replay.look_back(alg.replay)
    values = before["returns"] - before["advantages"]
    alg.estimator.values_of = lambda obs, task: 100.0 * torch.ones(task.shape)
    after = alg.critic_replay.look_back(alg.replay)
    rows = slice(0, -alg.storage.num_steps)
    torch.testing.assert_close((after["returns"] - after["advantages"])[rows], values[rows])
    newest = (after["returns"] - after["advantages"])[-alg.storage.num_steps :]
    torch.testing.assert_close(newest, torch.full_like(newest, 100.0))


# -- the slope of an update --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beyond", [1.0, 0.0, -1.0])
def test_the_slope_is_what_is_left_of_a_quadratic_at_the_end_of_the_step(beyond):
    """Its optimum lies ``beyond`` another step of PPO; the plans' part went at right angles to that."""
    ppo, plan = torch.tensor([0.4, 0.0]), torch.tensor([0.0, 0.2])
    alg, st, noise = moved(ppo, plan)
    st.advantages.copy_(-0.5 * (noise - beyond * ppo).square().sum(-1))
    st.advantages -= st.advantages.mean()
    found = measure(alg)
    assert found["update/ppo_slope"] == pytest.approx(beyond * 0.4, abs=0.03)
    assert found["update/plan_slope"] == pytest.approx(0.0, abs=0.03)
    assert found["update/ppo_kl"] == pytest.approx(0.5 * 0.4**2, rel=1e-4)
    assert found["update/plan_kl"] == pytest.approx(0.5 * 0.2**2, rel=1e-4)


def test_the_std_is_part_of_the_step():
    """The advantage falls with the noise, and the std fell."""
    alg, st, noise = moved(torch.zeros(2), torch.zeros(2), log_std=-0.1)
    st.advantages.copy_(-0.5 * noise.square().sum(-1))
    st.advantages -= st.advantages.mean()
    found = measure(alg)
    # d J / d log std = -1 in each of two dimensions
    assert found["update/ppo_slope"] == pytest.approx(0.2 / (2.0 * found["update/ppo_kl"]) ** 0.5, rel=0.05)
    assert found["update/plan_slope"] == found["update/plan_kl"] == 0.0


def test_invalid_steps_do_not_count_and_planned_ones_about_their_plan():
    ppo = torch.tensor([0.4, 0.0])
    alg, st, noise = moved(ppo, torch.zeros(2))
    st.advantages.copy_(noise[..., 0])
    before = measure(alg)["update/ppo_slope"]
    assert before == pytest.approx(1.0, abs=0.05)
    shift = 3.0 * st.std[:, :200]
    st.plan_mean[:, :200] += shift
    st.actions[:, :200] += shift
    st.planned[:, :200] = True
    assert measure(alg)["update/ppo_slope"] == pytest.approx(before, rel=1e-4)
    st.invalid[:, :100] = True
    st.advantages[:, :100] = 1e6
    assert measure(alg)["update/ppo_slope"] == pytest.approx(before, abs=0.05)


def test_what_the_normaliser_learnt_is_not_part_of_the_step():
    cfg = runner_cfg(bonus={"size": 0.0})
    cfg["actor"]["obs_normalization"] = True
    runner = M3PORunner(PointEnv(64), cfg, None, "cpu")
    alg, actor, st = runner.alg, runner.alg.actor, runner.alg.storage
    for part in PARTS:
        alg.newest_update.keep(part)
    actor.obs_normalizer._mean += 1.0
    for moved_by in (0.0, 0.1):
        with torch.no_grad():
            actor.mlp[-1].bias += moved_by
        collect(runner)
        found = measure(alg)
        st.clear()
        assert found["update/plan_kl"] == pytest.approx(2 * 0.5 * moved_by**2, rel=1e-3, abs=1e-9)
        assert found["update/ppo_kl"] == pytest.approx(0.0, abs=1e-9)


def test_nothing_is_known_before_the_first_update():
    runner = runner_of()
    collect(runner)
    found = measure(runner.alg)
    names = {f"update/{part}_{name}" for part in PARTS for name in ("slope", "kl")}
    assert not any(found[name] for name in names)
    assert all((getattr(runner.alg.gates, f"{part}_budget") == 1.0).all() for part in PARTS)


def test_a_part_that_did_not_take_place_keeps_its_budget():
    """Otherwise plans would begin with next to nothing when their gradient becomes worth something."""
    alg, st, noise = moved(torch.tensor([0.4, 0.0]), torch.zeros(2))
    st.advantages.copy_(-noise[..., 0])
    measure(alg)
    assert alg.gates.ppo_budget < 1.0
    assert alg.gates.plan_budget == 1.0


def test_the_kl_of_gaussians():
    p, q = (torch.distributions.Normal(torch.randn(5, 3), torch.rand(5, 3) + 0.5) for _ in range(2))
    expected = torch.distributions.kl_divergence(p, q).sum(-1)
    torch.testing.assert_close(gaussian_kl((p.loc, p.scale), (q.loc, q.scale)), expected)


# -- the budgets -------------------------------------------------------------------------------------------------------


def test_budgets_follow_the_slope():
    gates, slope = Gates(4), torch.tensor([-0.1, 0.1, 0.1, -5.0])
    gates.plan_budget.copy_(torch.tensor([0.5, 0.5, 1.0, 0.5]))
    gates.update_budget("plan", slope, torch.full((4,), BUDGET_STEPS))
    grown, least = math.exp(BUDGET_RATE * 0.1), math.exp(-BUDGET_RATE * LARGEST_SLOPE)
    assert gates.plan_budget.tolist() == pytest.approx([0.5 / grown, 0.5 * grown, 1.0, 0.5 * least])
    assert gates.ppo_budget.tolist() == [1.0] * 4


def test_few_steps_weigh_less_and_nothing_falls_below_the_least():
    gates, slope = Gates(2), torch.full((2,), -0.1)
    gates.update_budget("ppo", slope, torch.tensor([BUDGET_STEPS / 8, 0.0]))
    assert gates.ppo_budget.tolist() == pytest.approx([math.exp(-BUDGET_RATE * 0.1 / 8**0.5), 1.0])
    for _ in range(200):
        gates.update_budget("ppo", slope, torch.full((2,), BUDGET_STEPS))
    assert gates.ppo_budget.tolist() == pytest.approx([LEAST_BUDGET] * 2)
    gates.update_budget("ppo", torch.full((2,), torch.nan), torch.full((2,), BUDGET_STEPS))
    assert gates.ppo_budget.tolist() == pytest.approx([LEAST_BUDGET] * 2)


def test_budgets_set_how_far_the_parts_go():
    """The plans' trust region, PPO's desired KL, and the step size of the std."""
    runner = runner_of(desired_kl=0.06)
    runner.learn(2)
    alg = runner.alg
    alg.gates.gain.fill_(1e3)
    alg.gates.ppo_budget.fill_(0.25)
    alg.gates.plan_budget.fill_(0.5)
    runner.learn(1)
    assert alg.metrics["plan/max_kl"] == pytest.approx(0.5 * 0.06, rel=0.2)
    learner = alg.policy_learner
    rest = 0.06 - 0.5 * alg.metrics["plan/max_kl"]
    assert learner.desired_kls == pytest.approx([0.25 * rest], rel=0.1)
    rates = dict(zip(learner._names, (group["lr"] for group in learner.optimizer.param_groups), strict=True))
    assert rates["std"] == pytest.approx(alg.cfg.std_learning_rate * 0.5, rel=0.1)


# -- updates that wait -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ppo", "plan", "most", "rollouts", "parts"),
    [
        (1.0, 0.1, 4, 1, (1.0, 0.1)),
        (0.51, 0.1, 4, 1, (0.51, 0.1)),
        (0.5, 0.9, 4, 2, (1.0, 1.0)),  # PPO's part decides: the noise is its own
        (0.5, 0.1, 4, 2, (1.0, 0.2)),
        (0.2, 0.2, 4, 4, (0.8, 0.8)),
        (0.01, 0.02, 4, 4, (0.04, 0.08)),
        (0.2, 0.2, 3, 2, (0.4, 0.4)),
        (0.2, 0.2, 0, 1, (0.2, 0.2)),
    ],
)
def test_small_updates_become_one_that_waited(ppo, plan, most, rollouts, parts):
    gates = Gates(1)
    gates.ppo_budget.fill_(ppo)
    gates.plan_budget.fill_(plan)
    assert gates.wait(most) == gates.metrics()["gate/rollouts"] == rollouts
    assert [gates.part(name).item() for name in PARTS] == pytest.approx(parts)


def test_a_run_of_updates_that_wait_has_as_many_steps_and_ends_where_it_should(tmp_path):
    """Each step is judged once, and a run that is continued is the same bit for bit."""
    whole, parts = {}, {}
    for name, iterations, found in (("whole", (14,), whole), ("parts", (8, 6), parts)):
        folder = tmp_path / name
        folder.mkdir()
        torch.manual_seed(1)
        for part, count in enumerate(iterations):
            room = {"replay_transitions": 88 * 32}
            runner = M3PORunner(PointEnv(32, seed=3), runner_cfg(world_model=room), str(folder), "cpu")
            if part > 0:
                runner.resume(str(folder / "model_last.pt"))
            alg, lengths, judged_steps = runner.alg, [], []
            alg.hindsight.measured = False
            judge, update = alg.hindsight.judge, alg.update
            for budget in (alg.gates.ppo_budget, alg.gates.plan_budget):
                budget.fill_(0.25)

            def watch(steps, num_steps, judge=judge, seen=judged_steps):
                judged = judge(steps, num_steps)
                seen.append(0 if judged is None else len(judged.invalid))
                return judged

            def learn(update=update, alg=alg, lengths=lengths):
                lengths.append(alg.storage.num_steps)
                return update()

            alg.hindsight.judge, alg.update = watch, learn
            runner.learn(count)
        found |= {"steps": runner.env_steps, "iteration": alg.iteration, "lengths": lengths, "judged": judged_steps}
        found["tensors"] = tensors({"saved": alg.save(), "resume": alg.resume_state()})
    assert whole["lengths"] == [32, 32, 32, 16]  # 4 + 4 + 4 + 2 rollouts of 8 steps
    assert whole["judged"] == [8, 32, 32, 16]
    assert whole["steps"] == 14 * 8 * 32
    assert whole["iteration"] == 14
    assert parts["lengths"] == [32, 16]
    assert parts["judged"] == [32, 16]
    assert parts["steps"] == whole["steps"]
    expected, found = whole["tensors"], parts["tensors"]
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def test_an_update_that_waited_learns_from_all_of_its_steps(monkeypatch):
    room = {"replay_transitions": 88 * 32}
    runner = M3PORunner(PointEnv(32), runner_cfg(world_model=room), None, "cpu")
    alg, seen = runner.alg, []
    train = alg.policy_learner.train
    monkeypatch.setattr(alg.policy_learner, "train", lambda st: seen.append(st.actions.clone()) or train(st))
    alg.gates.ppo_budget.fill_(0.25)
    alg.gates.plan_budget.fill_(0.25)
    alg.hindsight.measured = False
    runner.learn(8)
    newest = alg.replay.latest(64, ("actions",))["actions"]
    torch.testing.assert_close(newest, torch.cat(seen))
    assert [len(actions) for actions in seen] == [32, 32]


class Asked:
    """An evaluator that only remembers what it was asked."""

    def __init__(self) -> None:
        self.iterations: list[int] = []

    def submit(self, checkpoint_path: str, iteration: int) -> None:
        self.iterations.append(iteration)

    def poll(self) -> list[dict]:
        return []

    wait = poll

    def close(self) -> None:
        pass


def test_checkpoints_and_evaluations_come_with_the_update_that_passes_their_iteration(tmp_path):
    cfg, asked = runner_cfg(world_model={"replay_transitions": 88 * 32}), Asked()
    cfg |= {"save_interval": 5, "eval_interval": 6, "keep_checkpoints": 9}
    runner = M3PORunner(PointEnv(32), cfg, str(tmp_path), "cpu", asked)
    alg = runner.alg
    alg.gates.ppo_budget.fill_(0.25)
    alg.gates.plan_budget.fill_(0.25)
    alg.hindsight.measured = False
    runner.learn(18)  # updates after 4, 8, 12, 16 and 18 iterations
    assert asked.iterations == [7, 11, 17]
    assert {path.name for path in tmp_path.glob("model_*.pt")} == {
        "model_7.pt", "model_11.pt", "model_15.pt", "model_17.pt", "model_last.pt"
    }  # fmt: skip
    with open(tmp_path / "progress.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["iteration"]) for row in rows] == [3, 7, 11, 15, 17]
    assert [int(row["env_steps"]) for row in rows] == [32 * 8 * done for done in (4, 8, 12, 16, 18)]


# -- long runs ---------------------------------------------------------------------------------------------------------


@pytest.mark.learning
def test_a_task_that_is_learnt_stays_learnt():
    """Three times as long as it takes; the std keeps its floor, and updates become shorter."""
    torch.manual_seed(1)
    model = {"features": 0, "steps_per_iteration": 20, "batch_size": 128}
    critic = {"steps_per_iteration": 32, "batch_size": 256}
    cfg = runner_cfg(desired_kl=0.06, world_model=model, critic_replay=critic)
    runner = M3PORunner(PointEnv(64, episode=40), cfg, None, "cpu")
    alg, rewards, compute_returns = runner.alg, [], runner.alg.compute_returns

    def record(obs):
        rewards.append(alg.storage.rewards.mean().item())
        compute_returns(obs)

    alg.compute_returns = record
    runner.learn(120)
    start, learnt, end = (sum(part) / len(part) for part in (rewards[:3], rewards[30:40], rewards[-20:]))
    assert learnt > 0.2 * start, (start, learnt)
    assert end > 2.0 * learnt, (learnt, end)
    assert PolicyOutputs(alg.actor)(runner.env.get_observations())[1].min() >= LEAST_STD - 1e-6
    assert min(alg.gates.ppo_budget.item(), alg.gates.plan_budget.item()) < 0.99
