"""From an agent of some tasks to one of others: what both know stays as it is, whatever else comes and goes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict
from toy_env import PointEnv, runner_cfg
from toy_gates import open_gates
from toy_tasks import ToyTask

from m3po.algorithms.policy_outputs import PolicyOutputs
from m3po.cli import suite_job
from m3po.cli.arguments import Parser
from m3po.cli.job import add_task_arguments
from m3po.cli.suite_job import from_order
from m3po.cli.train import run
from m3po.envs import suite
from m3po.envs.multi_task import MultiTaskVecEnv, TaskEnv, task_discount
from m3po.envs.suite import TaskInfo
from m3po.errors import CheckpointError, UserError
from m3po.runners import M3PORunner
from m3po.runners.checkpoint import network_states, read_checkpoint, write_checkpoint
from m3po.runners.task_transfer import TaskSizes, _layouts, match_tasks, train_embedding_only

pytestmark = pytest.mark.unit
DIMS = {"line": 1, "plane": 2, "flat": 2, "space": 3}


def runner(*tasks: str, log_dir: Path | None = None, **algorithm) -> M3PORunner:
    """A runner on points, each in as many dimensions as :data:`DIMS` says."""
    task_envs = [TaskEnv(task, PointEnv(8, dim=DIMS[task], seed=k)) for k, task in enumerate(tasks)]
    for task_env in task_envs:
        task_env.env.cfg.compute_final_obs = True
    torch.manual_seed(len(tasks))
    gamma = task_discount(20)  # what several tasks of this length are given
    cfg = runner_cfg(**{"gamma": gamma, **algorithm}) | {"task": ",".join(tasks)}
    return M3PORunner(MultiTaskVecEnv(task_envs, "cpu"), cfg, log_dir and str(log_dir), "cpu")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[M3PORunner, str]:
    """A runner that has trained on two tasks, and its checkpoint."""
    folder = tmp_path_factory.mktemp("trained")
    agent = runner("line", "plane", log_dir=folder)
    open_gates(agent.alg)
    agent.learn(3)
    assert (agent.alg.gates.gain > 0.1).all()
    return agent, str(folder / "model_last.pt")


def observations(agent: M3PORunner, task: str) -> TensorDict:
    """The same observations of a task, as an agent's networks want them."""
    k, dim = agent.env.task_names.index(task), DIMS[task]
    obs = torch.zeros(5, max(agent.env.obs_dims))
    obs[:, : 2 * dim] = torch.randn(5, 2 * dim, generator=torch.Generator().manual_seed(3))
    return TensorDict({"policy": obs, "task": torch.full((5, 1), k)}, batch_size=[5])


def answers(agent: M3PORunner, task: str) -> list[torch.Tensor]:
    """All that an agent says of a task: policy, critic, and model."""
    alg, obs, dim = agent.alg, observations(agent, task), DIMS[task]
    objective, model = alg.objective, alg.model
    ids = obs["task"].squeeze(-1)
    action = torch.zeros(5, agent.env.num_actions)
    action[:, :dim] = 0.3

    def own(z: torch.Tensor) -> torch.Tensor:
        """The latent without observations that the task lacks, which must be 0."""
        assert (z[:, 2 * dim : model.anchor_dim] == 0).all()
        anchor = z[:, : 2 * dim] if model.anchor_dim else z[:, :0]
        return torch.cat([anchor, z[:, model.anchor_dim :]], dim=-1)

    with torch.no_grad():
        mean, std = PolicyOutputs(alg.actor)(obs)
        z = objective.encode(obs, ids)
        ahead, reward, alive = model.step(z, action, ids)
        imagined = objective.policy(z, ids)[:, :dim], objective.value(ahead, ids), objective.returns(z, action, ids)
        values = alg.estimator.values(obs, ids)
        return [mean[:, :dim], std[:, :dim], values, own(z), own(ahead), reward, alive, *imagined]


def assert_same(first: list[torch.Tensor], second: list[torch.Tensor], atol: float = 1e-6) -> None:
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=atol)


# -- what stays -------------------------------------------------------------------------------------------------------


SETS = [("plane", "line"), ("line",), ("plane",), ("space", "line", "flat", "plane")]
"""In another order, in a smaller set (of one task even), and in a larger one whose largest task is larger."""


@pytest.mark.parametrize("tasks", SETS)
def test_common_tasks_are_answered_as_before(trained, tasks):
    old, path = trained
    new = runner(*tasks)
    new.transfer(path)
    for task in set(tasks) & {"line", "plane"}:
        assert_same(answers(old, task), answers(new, task))


@pytest.mark.parametrize("model", [{"anchor": False}, {"features": 0}], ids=["purely latent", "anchor alone"])
def test_other_latents_are_transferred_too(tmp_path, model):
    old = runner("line", "plane", log_dir=tmp_path, world_model=model)
    old.learn(2)
    for tasks in SETS:
        new = runner(*tasks, world_model=model)
        new.transfer(str(tmp_path / "model_last.pt"))
        for task in set(tasks) & {"line", "plane"}:
            assert_same(answers(old, task), answers(new, task), atol=1e-4)  # values are sums of larger numbers


def test_all_that_depends_on_the_tasks_is_named():
    """Tensors whose sizes follow from the tasks have a layout, in every form; all others keep their size."""
    for model in ({}, {"anchor": False}, {"features": 0}):
        small, large = (
            dict(network_states(runner(*tasks, world_model=model, policy_average_decay=0.9).alg.save()))
            for tasks in (("line",), ("space", "plane"))
        )
        for network, state in small.items():
            layouts = _layouts(network, state)
            for name, value in state.items():
                depends = value.shape != large[network][name].shape
                assert depends <= (layouts[name] is not None), (network, name)
                if not model:
                    assert depends == (layouts[name] is not None), (network, name)


@pytest.mark.usefixtures("float64")
def test_a_common_task_is_planned_as_before(tmp_path):
    """The planner's noise is the same as long as actions have as many dimensions."""
    old = runner("line", "plane", log_dir=tmp_path)
    open_gates(old.alg)
    old.learn(3)
    new = runner("flat", "plane", "line")
    new.transfer(str(tmp_path / "model_last.pt"))
    with torch.inference_mode():
        plans = [agent.inference_policy("planner")(observations(agent, "plane")) for agent in (old, new)]
        prior = old.inference_policy()(observations(old, "plane"))
    assert not torch.allclose(plans[0], prior)
    torch.testing.assert_close(*plans, rtol=1e-9, atol=1e-9)


def test_statistics_and_gates_go_with_their_tasks(trained, tmp_path):
    old, path = trained
    content = read_checkpoint(path)
    content["gates_state_dict"]["gain"] = torch.tensor([0.5, 0.0])
    content["gates_state_dict"]["rewarded"] = torch.tensor([0.25, 1.0])
    write_checkpoint(tmp_path / "gated.pt", content)
    new = runner("plane", "space", "line", planner={"planned_fraction": 0.5})
    fresh = new.alg.gates.realised[1].clone()
    new.transfer(str(tmp_path / "gated.pt"))
    gates, behaviour = new.alg.gates, new.alg.behaviour
    assert gates.gain.tolist() == [0.0, 0.0, 0.5]
    assert gates.rewarded.tolist() == [1.0, 0.0, 0.25]
    assert torch.equal(gates.realised, torch.stack([old.alg.gates.realised[1], fresh, old.alg.gates.realised[0]]))
    behaviour.rotate()
    assert new.alg.tasks.ids[behaviour.planned_ids].unique().tolist() == [2]
    for networks in ((old.alg.model, new.alg.model), (old.alg.critic, new.alg.critic)):
        before, after = (network.obs_normalizer for network in networks)
        assert torch.equal(after.count, before.count[[1, 0, 0]] * torch.tensor([1, 0, 1]))
        assert torch.equal(after.mean[0, :4], before.mean[1])
        assert torch.equal(after.var[1], torch.ones(6))
    for name in ("changes", "reward_normalizer"):
        before, after = (getattr(agent.alg.model, name) for agent in (old, new))
        width = before.mean.shape[1]
        assert torch.equal(after.mean[[0, 2], :width], before.mean[[1, 0]])
        assert after.count[1] == 0
    explained = [agent.alg.model.explained for agent in (old, new)]
    assert torch.equal(explained[1][[0, 2], :4], explained[0][[1, 0]])
    assert (explained[1][1] == 1.0).all()
    before, after = old.alg.estimator.rewards, new.alg.estimator.rewards
    assert torch.equal(after.square[[0, 2]], before.square[[1, 0]])
    assert after.count[1] == 0


def test_training_starts_over_and_goes_on_from_there(trained, tmp_path):
    old, path = trained
    new = runner("plane", "space", log_dir=tmp_path)
    new.transfer(path)
    assert (new.alg.iteration, new.current_learning_iteration, new.env_steps) == (0, 0, 0)
    assert not new.alg.policy_learner.optimizer.state
    assert not new.alg.plan_learner.optimizer.state
    assert not new.alg.critic_replay.optimizer.state
    assert not new.alg.model_learner.optimizer.state
    assert new.alg.replay.size == 0
    assert new.alg.learning_rate == old.alg.cfg.learning_rate
    new.learn(2)
    again = runner("plane", "space")
    again.load(str(tmp_path / "model_last.pt"))
    for task in ("plane", "space"):
        assert_same(answers(new, task), answers(again, task))


# -- what is new ------------------------------------------------------------------------------------------------------


def test_a_new_task_can_start_as_another(trained):
    """With the same sizes it is answered as the other, apart from the unit of the value, which is its rewards'."""
    old, path = trained
    new = runner("flat", "line")
    new.transfer(path, {"flat": "plane"})
    mean, std, _, z, *_ = answers(new, "flat")
    expected = answers(old, "plane")
    assert_same([mean, std, z], [expected[0], expected[1], expected[3]])
    assert new.alg.model.reward_normalizer.count[0] == 0
    assert torch.equal(new.alg.model.task_embedding[0], old.alg.model.task_embedding[1])
    assert new.alg.estimator.rewards.count[0] == 0


def test_of_a_task_of_another_size_only_the_embedding_is_taken(trained):
    old, path = trained
    new = runner("space")
    fresh = new.alg.actor.distribution.std_param.detach().clone()
    new.transfer(path, {"space": "plane"})
    assert torch.equal(new.alg.model.task_embedding[0], old.alg.model.task_embedding[1])
    assert torch.equal(new.alg.actor.distribution.std_param, fresh)
    assert new.alg.actor.obs_normalizer.count[0] == 0


def test_what_nobody_has_seen_has_no_influence_yet(trained):
    """Observations beyond those of the checkpoint's largest task do nothing; actions beyond are 0."""
    _, path = trained
    new = runner("space", "plane")
    new.transfer(path)
    obs = observations(new, "space")
    action = new.alg.actor(obs)
    assert (action[:, 2:] == 0).all()
    obs["policy"][:, 4:] += 1.0
    torch.testing.assert_close(new.alg.actor(obs), action)
    obs["policy"][:, :4] += 1.0
    assert not torch.allclose(new.alg.actor(obs), action)


def test_a_new_task_can_be_trained_by_its_embedding_alone(trained):
    _, path = trained
    new = runner("flat", "line")
    new.transfer(path, {"flat": "plane"})
    train_embedding_only(new.alg)
    networks = {"actor": new.alg.actor, "critic": new.alg.critic, "model": new.alg.model}
    before = {(n, p): x.detach().clone() for n, net in networks.items() for p, x in net.named_parameters()}
    new.learn(2)
    changed = {(n, p) for n, net in networks.items() for p, x in net.named_parameters() if not x.equal(before[n, p])}
    table = {(name, "task_embedding") for name in networks}
    assert changed == table | {("actor", "distribution.std_param")}
    assert (new.alg.model.task_embedding != before["model", "task_embedding"]).any(dim=1).all()


# -- what is refused --------------------------------------------------------------------------------------------------


def test_another_set_of_tasks_is_refused_with_the_difference(trained):
    _, path = trained
    new = runner("plane", "space", "flat")
    before = new.alg.model.task_embedding.detach().clone()
    with pytest.raises(CheckpointError) as error:
        new.load(path)
    expected = "Only in the checkpoint: line; only here: space, flat; common: plane. To load the common ones, "
    assert expected + "train with --transfer instead of --checkpoint." in str(error.value)
    assert torch.equal(new.alg.model.task_embedding, before)
    with pytest.raises(CheckpointError, match="here: none; common: line, plane, in another order"):
        runner("plane", "line").load(path)


def test_a_single_tasks_own_networks_are_told_from_those_of_several(trained, tmp_path):
    single = M3PORunner(PointEnv(8), runner_cfg() | {"task": "plane"}, None, "cpu")
    assert "tasks" not in single.description()
    single.save(str(tmp_path / "single.pt"))
    single.load(str(tmp_path / "single.pt"))
    with pytest.raises(CheckpointError, match=r"nothing to transfer.*--multi_task"):
        runner("plane").transfer(str(tmp_path / "single.pt"))
    with pytest.raises(CheckpointError, match="trained without --multi_task; leave it out"):
        runner("plane").load(str(tmp_path / "single.pt"))
    with pytest.raises(
        CheckpointError, match=r"here: line; common: plane.*only if they were trained with --multi_task"
    ):
        runner("line", "plane").load(str(tmp_path / "single.pt"))
    with pytest.raises(CheckpointError, match="checkpoint: line; only here: none; common: plane"):
        single.load(trained[1])
    runner("plane").save(str(tmp_path / "one.pt"))
    with pytest.raises(CheckpointError, match="trained with --multi_task; add it"):
        single.load(str(tmp_path / "one.pt"))


def test_a_checkpoint_of_an_earlier_version_is_refused(trained, tmp_path):
    content = read_checkpoint(trained[1])
    content["m3po"]["format"] = 3
    write_checkpoint(tmp_path / "old.pt", content)
    for read in (runner("line", "plane").load, runner("line", "space").transfer):
        with pytest.raises(CheckpointError, match="has format 3: it was written by an earlier version") as error:
            read(str(tmp_path / "old.pt"))
        assert "\n" not in str(error.value)


def test_networks_of_other_sizes_are_refused(trained):
    _, path = trained
    for name, model in (
        ("task_embedding", {"task_embedding_dim": 8}),
        ("features", {"features": 24}),
        ("width", {"width": 64}),
        ("anchor", {"anchor": False}),
    ):
        new = runner("plane", world_model=model)
        before = new.alg.actor.mlp[0].weight.detach().clone()
        with pytest.raises(CheckpointError, match="Use the configuration that it was trained with"):
            new.transfer(path)
        assert torch.equal(new.alg.actor.mlp[0].weight, before), name


@pytest.mark.parametrize(
    ("here", "init_from", "message"),
    [
        ([("walk", 24, 6)], {"wlk": "run"}, "'wlk' is none of the tasks to be trained. Closest: walk."),
        ([("walk", 24, 6)], {"walk": "rn"}, "'rn' is none of the checkpoint's tasks. Closest: run."),
        ([("walk", 24, 6)], {"walk": "fly"}, "'fly' is none of the checkpoint's tasks. They are: run, swim."),
        ([("swim", 9, 2)], {"swim": "run"}, "task 'swim' is in the checkpoint already"),
        ([("run", 17, 6)], {}, "task 'run' has 24 observations and 6 actions in the checkpoint, 17 and 6 here."),
    ],
)
def test_tasks_that_do_not_match_are_refused(here, init_from, message):
    there = [TaskSizes("run", 24, 6), TaskSizes("swim", 9, 2)]
    with pytest.raises(UserError) as error:
        match_tasks(there, [TaskSizes(*task) for task in here], init_from)
    assert message in str(error.value)


def test_sizes_that_only_the_simulation_knows_are_not_compared():
    there = [TaskSizes("run", 24, 6)]
    assert match_tasks(there, [TaskSizes("run", None, None)]) == {"run": "run"}


# -- the command line -------------------------------------------------------------------------------------------------


class PointSuite:
    """The points as a suite; ``point-plane`` is another name of ``plane``."""

    name = "points"
    own_process = False
    made = 0

    def tasks(self):
        return list(DIMS)

    def sets(self):
        return {}

    def resolve(self, name):
        task = name.removeprefix("point-")
        return task if task in DIMS else None

    def missing(self):
        return None

    def info(self, task):
        return TaskInfo(task, 2 * DIMS[task], DIMS[task], episode_length=20)

    def make(self, task, num_envs, *, seed, device):
        PointSuite.made += 1
        return ToyTask(num_envs, dim=DIMS[task], episode=20, seed=seed)


@pytest.fixture
def points(monkeypatch: pytest.MonkeyPatch) -> None:
    """No other suite than the points."""
    monkeypatch.setattr(suite, "suites", lambda: {"points": PointSuite()})
    monkeypatch.setattr("m3po.cli.transfer.suites", suite.suites)


SMALL = ("--device", "cpu", "--num_envs", "8", "--max_iterations", "1", "--eval_interval", "0")


def test_from_several_tasks_to_an_unseen_one_on_the_command_line(points, tmp_path, capsys):
    def newest() -> str:
        return str(max(tmp_path.rglob("model_last.pt"), key=lambda path: path.stat().st_mtime_ns))

    log = ("--log_root", str(tmp_path))
    assert run(["--task", "line,plane", *SMALL, *log]) == 0
    first = newest()
    unseen = ("--init-task-from", "flat=point-plane", "--train-only", "embedding")
    assert run(["--task", "flat", "--transfer", first, *unseen, *SMALL, *log]) == 0
    output = capsys.readouterr().out
    assert f"[m3po] transferring 0 of 2 tasks from {first}\n[m3po] new tasks: flat (as plane)\n" in output
    assert "[m3po] training nothing but task embeddings and action noise" in output
    states = [read_checkpoint(path)["critic_state_dict"] for path in (first, newest())]
    assert states[1]["task_embedding"].shape[0] == 1
    assert states[0]["mlp.2.weight"].equal(states[1]["mlp.2.weight"])
    assert run(["--task", "flat", "--multi_task", "--checkpoint", "latest", *SMALL, *log]) == 0
    assert read_checkpoint(newest())["iter"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--transfer", "{path}", "--checkpoint", "latest"), "--checkpoint: not allowed with argument --transfer"),
        (("--transfer", "missing.pt"), "There is no checkpoint 'missing.pt'."),
        (("--init_task_from", "flat=plane"), "--init_task_from needs a checkpoint"),
        (("--transfer", "{path}", "--init_task_from", "flat"), "expected NEW=OLD, got 'flat'"),
        (("--transfer", "{path}", "--init_task_from", "flat=line,flat=plane"), "named twice"),
        (
            ("--transfer", "{path}", "--init_task_from", "space=line"),
            "none of the tasks to be trained. They are: flat.",
        ),
        (("--transfer", "{path}", "--init_task_from", "flat=plan"), "none of the checkpoint's tasks. Closest: plane"),
        (("--train_only", "embedding"), "--train_only embedding needs trained networks"),
        (("--checkpoint", "{path}"), "Only in the checkpoint: line, plane; only here: flat; common: none"),
    ],
)
def test_mistakes_are_found_before_anything_starts(points, trained, tmp_path, capsys, options, message):
    made = PointSuite.made
    options = [option.format(path=trained[1]) for option in options]
    assert run(["--task", "flat", *SMALL, "--log_root", str(tmp_path / "logs"), *options]) == 2
    assert message in capsys.readouterr().err
    assert PointSuite.made == made
    assert not (tmp_path / "logs").exists()


def test_the_process_that_evaluates_builds_the_same_networks(points):
    parser = Parser()
    add_task_arguments(parser)
    parser.add_argument("--transfer")
    options = ["--task", "flat", "--device", "cpu", "--num_envs", "4"]
    job = suite_job.SuiteJob.read(parser, [*options, "--transfer", "some.pt"])
    again = from_order(json.loads(json.dumps(job.order())))
    assert again.multi_task
    assert again.train_cfg == job.train_cfg
    plain = suite_job.make_job(*options)
    assert not plain.multi_task


def test_one_isaac_lab_task_leaves_its_own_launcher_when_it_shares_networks():
    ant = ["--task", "Isaac-Ant-v0"]
    assert not suite_job.is_suite_command(ant)
    for option in (["--transfer", "x.pt"], ["--multi_task"]):
        assert suite_job.is_suite_command([*ant, *option])
