"""Plans while learning: the policy moves along the gradient of the imagined return, as far as that has been worth."""

import math

import pytest
import torch
from toy_env import PointEnv, runner_cfg

from m3po.algorithms import M3PO
from m3po.algorithms.hindsight import Judged
from m3po.algorithms.plan_learning import EXPECTED_KL, LARGEST_SHIFT, NUM_EPOCHS, RATES, _adapted
from m3po.algorithms.policy_learning import LEAST_PART, LEAST_STD
from m3po.algorithms.policy_outputs import PolicyOutputs
from m3po.config import AlgorithmCfg
from m3po.envs.multi_task import MultiTaskVecEnv, TaskEnv
from m3po.errors import UserError
from m3po.runners import M3PORunner
from m3po.validation import validate

MODEL = {"steps_per_iteration": 30, "batch_size": 128}


def runner_of(env=None, folder=None, planned_fraction=0.0, planner=None, **algorithm) -> M3PORunner:
    """M3PO with plans while learning; acting planner and bonus are off unless asked for."""
    off = {
        "planner": {"planned_fraction": planned_fraction, **(planner or {})},
        "bonus": {"size": 0.0},
        "world_model": MODEL,
    }
    return M3PORunner(env or PointEnv(32), runner_cfg(**off | algorithm), folder, "cpu")


def collect(runner: M3PORunner) -> None:
    """Fill the storage with a rollout, estimate its advantages, and add it to the replay buffer."""
    alg, env = runner.alg, runner.env
    obs = env.get_observations()
    for _ in range(alg.storage.num_steps):
        obs, rewards, dones, extras = env.step(alg.act(obs))
        alg.process_env_step(obs, rewards, dones, extras)
    alg.compute_returns(obs)
    alg.replay.add(alg.storage)
    alg.estimator.estimate(alg.storage)


def judged(alg: M3PO, advantages: torch.Tensor | None = None) -> Judged:
    """The newest rollout, as if enough steps had followed it; its advantages are those of the storage or given."""
    st = alg.storage
    found = st.advantages if advantages is None else advantages
    along = alg.replay.latest(st.num_steps, ("notes",))["notes"][..., :3]
    return Judged(found, along, st.planned, st.invalid, st.task)


def planned(gain: float, **planner):
    """An algorithm whose gradient has been worth ``gain`` so far, with plans for a new rollout."""
    torch.manual_seed(0)
    runner = runner_of(planner=planner)
    runner.learn(3)
    collect(runner)
    alg = runner.alg
    alg.gates.gain.fill_(gain)
    plans, metrics = alg.plan_learner.plan(alg.storage, alg.replay)
    return alg, plans, metrics


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -- plans -------------------------------------------------------------------------------------------------------------


def test_plans_keep_to_the_trust_region():
    _, plans, metrics = planned(1e3, max_learning_kl=0.08)
    own = 256
    kl = 0.5 * plans.shift.square().sum(-1)
    assert kl[:own].mean() <= 0.08 + 1e-5
    assert kl[:own].mean() > 0.04  # some plans are cut off, not most
    assert kl.max() <= LARGEST_SHIFT**2 * 0.08 + 1e-4
    assert metrics["plan/max_kl"] == pytest.approx(0.08)
    assert plans.expected_kl == pytest.approx(EXPECTED_KL * 0.08)


def test_plans_raise_the_imagined_return():
    """They lie along the gradient; those that are not cut off are of its size, in units of the rollout's."""
    alg, plans, _ = planned(1e3, max_learning_kl=0.02)
    task = torch.zeros(len(plans.shift), dtype=torch.long)
    mean, std = (x.detach() for x in alg.plan_learner.policy(plans.obs))
    z = alg.objective.encode(plans.obs, task).detach()
    gradient = alg.objective.gradient(z, mean, std, task)
    length = (gradient.norm(dim=-1) / alg.gates.gradient_size).clamp(max=LARGEST_SHIFT)
    expected = 0.04**0.5 * length.unsqueeze(1) * torch.nn.functional.normalize(gradient, dim=-1)
    torch.testing.assert_close(plans.shift, expected, atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        before, after = (alg.objective.returns(z, mean + std * shift, task) for shift in (0.0, plans.shift))
    assert (after > before).float().mean() > 0.95


def test_plans_go_as_far_as_the_gradient_has_been_worth():
    def reach(gain):
        alg, plans, metrics = planned(gain, full_gain=1.0)
        part = alg.gates.trust(1.0).item()  # the newest rollout has its say
        assert metrics["plan/max_kl"] == pytest.approx(part**2 * 0.06)
        assert plans.expected_kl == pytest.approx(EXPECTED_KL * part**2 * 0.06)
        return plans.shift.square().sum(-1).mean().sqrt().item(), part

    (half, part), (whole, all_of_it) = reach(0.5), reach(1e3)
    assert 0.3 < part < 0.7
    assert all_of_it == 1.0
    assert half == pytest.approx(part * whole, rel=1e-4)


def test_plans_at_stored_observations_are_added_to_those_of_the_rollout():
    alg, plans, _ = planned(1e3, num_states=256)
    own, replay, learner = 256, alg.replay, alg.plan_learner
    assert len(plans.weight) == own
    for num_states, more in ((100, 0), (300, 44), (10_000, 3 * own)):
        learner.num_states = num_states
        alg.gates.gain.fill_(1e3)
        found, _ = learner.plan(alg.storage, replay)
        assert len(found.obs) == len(found.shift) == len(found.weight) == own + more
        # Neither the size nor the worth of the rollout's own depends on the others.
        torch.testing.assert_close(found.shift[:own], plans.shift, rtol=1e-4, atol=1e-6)
        assert torch.equal(found.weight[:own], plans.weight)
    lengths = found.shift[own:].norm(dim=-1)
    assert 0 < lengths.min() < lengths.max() <= LARGEST_SHIFT * (2 * 0.06) ** 0.5 + 1e-4

    def rows(obs):
        return set(map(tuple, obs["policy"].reshape(-1, 4).tolist()))

    drawn = rows(found.obs[own:])
    assert drawn <= rows(replay.latest(learner.stored_steps)["obs"])
    assert not drawn <= rows(replay.latest(alg.storage.num_steps)["obs"])
    learner.stored_steps = alg.storage.num_steps
    assert rows(learner.plan(alg.storage, replay)[0].obs) <= rows(replay.latest(alg.storage.num_steps)["obs"])


def test_the_gradients_size_is_kept_for_plans_that_are_acted_on():
    alg, _, _ = planned(1e3)
    st = alg.storage
    obs, task = st.obs.flatten(0, 1), st.task.flatten()
    gradient = alg.objective.gradient(
        alg.objective.encode(obs, task), *(x.flatten(0, 1) for x in (st.mean, st.std)), task
    )
    torch.testing.assert_close(alg.gates.gradient_size, gradient.square().sum(-1).mean().sqrt().view(1))


def test_the_gain_is_what_the_advantages_say():
    """Advantages that are the noise along a direction have the gain 1 along it, and -1 against it."""
    alg, _, _ = planned(1.0)
    st = alg.storage
    obs, task = st.obs.flatten(0, 1), st.task.flatten()
    gradient = alg.objective.gradient(
        alg.objective.encode(obs, task), *(x.flatten(0, 1) for x in (st.mean, st.std)), task
    )
    direction = gradient / gradient.square().sum(-1).mean().sqrt()
    along = (direction * ((st.actions - st.mean) / st.std).flatten(0, 1)).sum(-1)
    for sign in (1, -1):
        gain = alg.hindsight.measure(judged(alg, (sign * along).view_as(st.advantages)))["plan/gain"]
        assert gain == pytest.approx(sign * along.square().mean().item(), rel=1e-4)


def test_a_rollouts_gain_reaches_the_gates_with_the_weight_of_its_steps():
    """Steps that did not take place tell nothing."""
    alg, _, _ = planned(0.0)
    st = alg.storage
    st.invalid[:, :3] = st.any_invalid = True
    steps = int((~st.invalid).sum())
    for before, weight in ((10_000, 0.1 * steps / 4096), (0, 0.1), (3, 1 / 13)):
        alg.gates.gain.fill_(0.5)
        alg.gates.judged.fill_(before)
        gain = alg.hindsight.measure(judged(alg))["plan/gain"]
        assert alg.gates.judged.item() == before + 1
        assert alg.gates.gain.item() == pytest.approx(0.5 + weight * (gain - 0.5), rel=1e-4)
    st.invalid[:] = True
    before, size = alg.gates.gain.clone(), alg.gates.gradient_size.clone()
    alg.plan_learner.plan(st, alg.replay)
    alg.hindsight.measure(judged(alg))
    assert torch.equal(alg.gates.gain, before)
    assert torch.equal(alg.gates.gradient_size, size)


def test_real_advantages_rise_along_the_gradient():
    """On rollouts that model and policy were not trained on yet.

    That the policy learns faster for it is shown on Isaac Lab's tasks (benchmarks/learning), not on a point.
    """
    gains = []
    for seed in range(1, 4):
        torch.manual_seed(seed)
        runner = runner_of(PointEnv(128, episode=60, seed=seed), desired_kl=0.03)
        for iteration in range(10):
            runner.learn(1)
            if iteration >= 3:
                gains.append(runner.alg.metrics["plan/gain"])
    assert sum(gains) / len(gains) > 0.008, gains


# -- the regression ----------------------------------------------------------------------------------------------------


def test_the_regression_follows_the_plans_and_moves_nothing_else():
    alg, plans, _ = planned(1e3)
    obs, critic = plans.obs, [p.clone() for p in alg.critic.parameters()]
    std, before = alg.actor.distribution.std_param.clone(), alg.actor(obs).detach()
    model = [p.clone() for p in alg.model.parameters()]
    metrics = alg.plan_learner.regress(plans, stream())
    moved = (alg.actor(obs).detach() - before) / std
    assert metrics["plan/cosine"] > 0.3
    cosine = (moved * plans.shift).sum() / (moved.norm() * plans.shift.norm())
    assert cosine > 0.3
    assert metrics["plan/kl"] == pytest.approx(0.5 * moved.square().sum(-1).mean().item(), rel=1e-3)
    assert torch.equal(std, alg.actor.distribution.std_param)
    assert all(map(torch.equal, critic, alg.critic.parameters()))
    assert all(map(torch.equal, model, alg.model.parameters()))


def test_plans_are_in_stds_of_the_policy():
    """The loss is the KL to what was planned, whatever the std of a dimension is."""
    alg, plans, _ = planned(1e3)
    learner, losses = alg.plan_learner, []
    learner.num_mini_batches = 1
    with torch.no_grad():
        alg.actor.distribution.std_param.copy_(torch.tensor([0.1, 2.0]))
    step = learner.guard.step
    learner.guard.step = lambda loss, weight: [losses.append(loss.item()), step(loss, weight)]
    learner.regress(plans, stream())
    assert len(losses) == NUM_EPOCHS
    assert losses[0] == pytest.approx(0.5 * plans.shift.square().sum(-1).mean().item(), rel=1e-4)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(("size", "rate"), [(0.3, 1e-2), (0.1, 3e-3), (0.3, 1e-5)])
def test_the_policy_moves_by_what_fits_the_plans_best(size, rate):
    """Plans that no network can follow, at rates that are far too high or too low: no other multiple fits better."""
    alg, plans, _ = planned(1e3)
    learner = alg.plan_learner
    learner.optimizer.param_groups[0]["lr"] = rate
    plans.shift = size * torch.randn(plans.shift.shape, generator=stream())
    mean = alg.actor(plans.obs).detach()
    metrics = learner.regress(plans, stream())
    moved = (alg.actor(plans.obs) - mean).detach() / alg.actor.distribution.std_param.detach()
    best = (moved * plans.shift).sum() / moved.square().sum()
    assert 0.8 < best < 1.25  # exactly 1 if the mean were linear in the weights
    share = moved.square().sum() / plans.shift.square().sum()
    assert share == pytest.approx(metrics["plan/cosine"] ** 2, rel=0.3)
    assert metrics["plan/kl"] == pytest.approx(0.5 * moved.square().sum(-1).mean().item(), rel=1e-3)


@pytest.mark.parametrize(("size", "rate"), [(0.01, 1e-2), (0.3, 1e-5)])
def test_the_regressions_rate_follows_how_well_its_movement_fits(size, rate):
    alg, plans, _ = planned(1e3)
    learner = alg.plan_learner
    learner.optimizer.param_groups[0]["lr"] = rate
    plans.shift = size * torch.randn(plans.shift.shape, generator=stream())
    rates = [learner.regress(plans, stream(k))["plan/learning_rate"] for k in range(12)]
    assert all(RATES[0] <= found <= RATES[1] for found in rates)
    assert rates[-1] < 0.3 * rate if rate == 1e-2 else rates[-1] > 10 * rate


def test_the_next_rate_by_hand():
    assert _adapted(1e-3, 0.79) == pytest.approx(1e-3 / 1.5)
    assert _adapted(1e-3, 0.81) == _adapted(1e-3, 1.19) == 1e-3
    assert _adapted(1e-3, 1.21) == pytest.approx(1.5e-3)
    assert _adapted(RATES[0], 0.0) == RATES[0]
    assert _adapted(RATES[1], 9.0) == RATES[1]


def test_a_movement_against_the_plans_is_taken_back():
    """If what the regression did is worse than nothing, the policy stays."""
    alg, plans, _ = planned(1e3)
    learner, target = alg.plan_learner, plans.shift
    moved = learner._moved
    learner._moved = lambda obs, mean, std, shift, weight: moved(obs, mean, std, -shift, weight)
    before = [p.clone() for p in alg.actor.parameters()]
    metrics = learner.regress(plans, stream())
    assert metrics["plan/cosine"] < 0.0
    assert metrics["plan/kl"] == 0.0
    assert all(map(torch.equal, before, alg.actor.parameters()))
    assert target.any()


@pytest.mark.parametrize("gain", [-1e3, 0.0])
def test_a_gradient_that_is_worth_nothing_moves_nothing(gain):
    alg, plans, metrics = planned(gain) if gain else (None, None, None)
    if not gain:  # an untrained model, whose gradient is 0 where the critic does not change either
        runner = runner_of()
        alg = runner.alg
        alg.objective.gradient = lambda z, mean, std, task: torch.zeros_like(mean)
        collect(runner)
        plans, metrics = alg.plan_learner.plan(alg.storage, alg.replay)
    assert metrics["plan/max_kl"] == plans.expected_kl == 0.0
    assert not plans.weight.any()
    before, rate = [p.clone() for p in alg.actor.parameters()], alg.plan_learner.optimizer.param_groups[0]["lr"]
    metrics = alg.plan_learner.regress(plans, stream())
    assert metrics == {"plan/kl": 0.0, "plan/cosine": 0.0, "plan/learning_rate": rate}
    assert all(map(torch.equal, before, alg.actor.parameters()))


def test_without_a_trust_region_no_plans_are_made():
    runner = runner_of(planner={"max_learning_kl": 0.0})
    runner.learn(6)
    alg, metrics = runner.alg, runner.alg.metrics
    assert metrics["plan/kl"] == 0.0
    assert metrics["plan/gain"] == alg.gates.gain == 0.0
    rest = alg.cfg.desired_kl * alg.gates.ppo_budget
    assert alg.policy_learner.desired_kls == pytest.approx(rest.tolist(), rel=0.1)


def test_plans_have_a_part_of_ppos_trust_region():
    alg = runner_of(desired_kl=0.06).alg
    learner = alg.policy_learner
    for spent, left in ((0.0, 0.06), (0.03, 0.03), (0.5, 0.015)):
        for budget in (1.0, 0.5):
            alg.gates.ppo_budget.fill_(budget)
            learner.reserve_kl(spent)
            assert learner.desired_kls == pytest.approx([budget * left])


@pytest.mark.parametrize(
    ("budget", "rollouts", "pace"), [(1.0, 1, 1.0), (0.25, 1, 0.5), (0.25, 4, 2.0), (0.25, 2, 1.0)]
)
def test_the_std_keeps_its_pace_where_an_update_waits(budget, rollouts, pace):
    """One update in the place of four takes steps four times as long as each of them."""
    alg = runner_of(std_learning_rate=1e-3).alg
    alg.gates.ppo_budget.fill_(budget)
    alg.gates.waited = rollouts
    alg.policy_learner.reserve_kl(0.0)
    alg.policy_learner._set_learning_rate(1e-4)
    rates = dict(zip(alg.policy_learner._names, alg.policy_learner.optimizer.param_groups, strict=True))
    assert rates["std"]["lr"] == pytest.approx(1e-3 * alg.policy_learner.std_unit * pace)


def test_an_update_reserves_what_its_plans_are_expected_to_move():
    runner = runner_of(desired_kl=0.06)
    runner.learn(3)
    alg = runner.alg
    alg.gates.gain.fill_(1e3)
    runner.learn(1)
    max_kl = alg.metrics["plan/max_kl"]
    assert max_kl == pytest.approx(0.06, rel=0.1)
    rest = (0.06 - EXPECTED_KL * max_kl) * alg.gates.ppo_budget
    assert alg.policy_learner.desired_kls == pytest.approx(rest.tolist(), rel=1e-4)
    assert alg.metrics["plan/kl"] > 0.0


# -- invalid steps, tasks, groups --------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_states", [1, 2000])
def test_invalid_steps_teach_nothing_whatever_they_show(num_states):
    runs = []
    for poison in (0.0, 50.0):
        torch.manual_seed(0)
        runner = runner_of(planner={"num_states": num_states})
        runner.learn(2)
        collect(runner)
        st, alg = runner.alg.storage, runner.alg
        st.invalid[:, :3] = st.any_invalid = True
        for field in (st.obs["policy"], st.next_obs["policy"], st.actions, st.rewards, st.advantages):
            field[:, :3] = poison
        st.repair_invalid()
        alg.replay.add(st)
        alg.gates.gain.fill_(1.0)
        plans, _ = alg.plan_learner.plan(st, alg.replay)
        alg.policy_learner.train(st)
        alg.plan_learner.regress(plans, alg.replay.generator)
        alg.model_learner.train(alg.replay, st, 20)
        alg.model_learner.measure(st)
        networks = (alg.actor, alg.critic, alg.model, alg.gates)
        runs.append([x.clone() for network in networks for x in network.state_dict().values()])
    assert all(map(torch.equal, *runs))


def test_several_tasks_have_their_own_gains_and_keep_their_dimensions():
    task_envs = [TaskEnv("near", PointEnv(16, edge=1.5), (-20.0, 0.0)), TaskEnv("far", PointEnv(16, dim=3, episode=30))]
    runner = runner_of(MultiTaskVecEnv(task_envs, "cpu"))
    runner.learn(4)
    collect(runner)
    alg = runner.alg
    assert alg.gates.gain.shape == (2,)
    alg.gates.gain.copy_(torch.tensor([1.0, -1.0]))
    plans, _ = alg.plan_learner.plan(alg.storage, alg.replay)
    near = plans.obs["task"].squeeze(-1) == 0
    assert plans.shift[near, :2].abs().max() > 0
    assert torch.equal(plans.shift[near, 2], torch.zeros_like(plans.shift[near, 2]))
    assert torch.equal(plans.shift[~near], torch.zeros_like(plans.shift[~near]))
    assert plans.weight[near].all()
    assert not plans.weight[~near].any()
    # Only the task whose gradient is worth something moves towards its plans; its gradients are of size 1.
    lengths = plans.shift[: alg.storage.task.numel()][near[: alg.storage.task.numel()]].norm(dim=-1)
    assert 0.2 < lengths.square().mean().sqrt() <= 0.12**0.5 + 1e-5


def test_the_std_has_a_step_size_of_its_own():
    """However small the policy's is: noise that a policy no longer needs costs what it earns."""
    stds = []
    for rate in (0.0, 1e-2):
        torch.manual_seed(0)
        without = {"world_model": {"steps_per_iteration": 0}, "planner": {"max_learning_kl": 0.0}}
        runner = runner_of(std_learning_rate=rate, learning_rate=1e-5, schedule="fixed", **without)
        runner.learn(4)
        stds.append(runner.alg.actor.distribution.std_param.detach())
        assert runner.alg.policy_learner.learning_rate == 1e-5
    assert (stds[0] - 1).abs().max() < 2e-3 < (stds[1] - 1).abs().min()


@pytest.mark.parametrize("kind", ["scalar", "log"])
@pytest.mark.parametrize(("first", "least"), [(0.25, LEAST_PART * 0.25), (1.0, LEAST_STD)])
def test_the_stds_step_is_that_of_its_logarithm_and_it_has_a_floor(kind, first, least):
    """However the std is written. Adam's first step is as long as its rate."""
    cfg = runner_cfg(std_learning_rate=0.01)
    cfg["actor"]["distribution_cfg"] |= {"init_std": first, "std_type": kind}
    alg = M3PORunner(PointEnv(32), cfg, None, "cpu").alg
    learner, obs = alg.policy_learner, PointEnv(32).get_observations()
    (parameter,) = learner.parameters("std")

    def std_after(steps: int, sign: float = 1.0) -> torch.Tensor:
        for _ in range(steps):
            learner._step(sign * parameter.sum(), 1)
        return PolicyOutputs(alg.actor)(obs)[1].reshape(-1, 2)[0]

    torch.testing.assert_close(std_after(1), torch.full((2,), first * math.exp(-0.01)), atol=1e-4, rtol=0.0)
    torch.testing.assert_close(std_after(400), torch.full((2,), least))
    assert (std_after(100, sign=-1.0) > 1.1 * least).all()  # it can rise again


class Privileged(PointEnv):
    """A critic that sees more than the policy."""

    shape = (4,)

    def get_observations(self):
        """Groups ``policy`` and ``state``."""
        obs = super().get_observations()
        obs["state"] = obs["policy"].square().view(-1, *self.shape)
        return obs

    def step(self, actions):
        """As the point, with both groups before a reset."""
        obs, rewards, dones, extras = super().step(actions)
        if "final_obs" in extras:
            extras["final_obs"] = {**extras["final_obs"], "state": extras["final_obs"]["policy"].square()}
        return obs, rewards, dones, extras


def privileged_cfg():
    cfg = runner_cfg(world_model=MODEL)
    cfg["obs_groups"]["critic"] = ["policy", "state"]
    return cfg


def test_what_the_critic_alone_reads_is_predicted_as_well():
    runner = M3PORunner(Privileged(32), privileged_cfg(), None, "cpu")
    runner.learn(6)
    assert runner.alg.objective.group_dims == {"policy": 4, "state": 4}
    assert runner.alg.metrics["model/dynamics_r2"] > 0.3
    assert runner.alg.model.anchor_dim == 8


def test_pictures_are_refused(monkeypatch):
    monkeypatch.setattr(Privileged, "shape", (2, 2))
    env = Privileged(8)
    with pytest.raises(UserError, match=r"group 'state' has shape \(2, 2\).*--algo ppo"):
        cfg = privileged_cfg()
        cfg["critic"] = {**cfg["critic"], "class_name": "m3po_test_reads_all"}
        monkeypatch.setattr("m3po.algorithms.construction.resolve_class", lambda c: (FlatReader, c))
        M3PO.construct_algorithm(env.get_observations(), env, cfg, "cpu")


class FlatReader:
    """A network that takes groups of any shape, as an image encoder would."""

    is_recurrent = False

    def __init__(self, obs, groups, name, outputs, **cfg):
        self.obs_groups = groups[name]
        self.distribution = type("Gaussian", (), {"std_range": (0.0, 1.0)})

    def to(self, device):
        return self


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"planner": {"max_learning_kl": 0.0}, "world_model": {"steps_per_iteration": 0}},
            "planner.planned_fraction is 0.25, but the world",
        ),
        (
            {"planner": {"max_learning_kl": 0.0, "planned_fraction": 0.0}, "world_model": {"steps_per_iteration": 0}},
            "bonus.size is 0.15, but the world model",
        ),
        ({"std_learning_rate": -1.0}, "std_learning_rate must not be negative"),
        ({"replay_ratio": -1.0}, "replay_ratio must not be negative"),
    ],
)
def test_wrong_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        validate(AlgorithmCfg(**change), 16, 8)
