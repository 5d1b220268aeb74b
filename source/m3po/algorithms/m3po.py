"""M3PO (arXiv 2506.21782): PPO on rollouts that a planner in a latent world model helped to collect.

One iteration::

    for t in range(T):  act()               the policy proposes, the planner improves a share of the environments
                        process_env_step()  store outcome, true terminations, final observations
    update()            critic -> advantages -> bonus -> plans -> policy -> world model
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from rsl_rl.env import VecEnv
from rsl_rl.models import MLPModel
from tensordict import TensorDict

from m3po import distributed
from m3po.algorithms import construction
from m3po.algorithms.advantage_estimator import AdvantageEstimator
from m3po.algorithms.behaviour import Behaviour
from m3po.algorithms.behaviour_metrics import behaviour_metrics
from m3po.algorithms.bonus import ExplorationBonus
from m3po.algorithms.checkpoint_parts import CheckpointParts
from m3po.algorithms.critic_replay import CriticReplay
from m3po.algorithms.gates import Gates
from m3po.algorithms.hindsight import Hindsight
from m3po.algorithms.model_learning import ModelLearner
from m3po.algorithms.newest_update import NewestUpdate
from m3po.algorithms.plan_learning import PlanLearner
from m3po.algorithms.policy_average import PolicyAverage
from m3po.algorithms.policy_learning import PolicyLearner
from m3po.algorithms.policy_outputs import PolicyOutputs
from m3po.algorithms.tasks import Tasks
from m3po.config import AlgorithmCfg
from m3po.models import WorldModel
from m3po.planning import Objective
from m3po.stopwatch import Stopwatch
from m3po.storage import ReplayBuffer, RolloutStorage


class M3PO(CheckpointParts):
    """The algorithm behind :class:`~m3po.runners.M3PORunner` and rsl_rl's stock ``OnPolicyRunner``."""

    def __init__(
        self,
        actor: MLPModel,
        critic: MLPModel,
        model: WorldModel,
        group_dims: dict[str, int],
        storage: RolloutStorage,
        tasks: Tasks,
        cfg: AlgorithmCfg,
        *,
        max_iterations: int = 1000,
        seed: int = 0,
        device: str = "cpu",
    ) -> None:
        """Assemble the algorithm; :meth:`construct_algorithm` does it from an environment.

        Args:
            actor: Policy ``pi`` on the observation.
            critic: Value function on the observation.
            model: World model.
            group_dims: Observation groups that the world model reads, in this order, with their dimensions.
            storage: Rollout storage of T steps, N environments.
            tasks: Tasks of the environments.
            cfg: Configuration.
            max_iterations: Training iterations that the paper's bonus is annealed over.
            seed: Seed of everything that is drawn here.
            device: Torch device.
        """
        self.cfg, self.device, self.tasks, self.storage = cfg, device, tasks, storage
        self.actor, self.critic, self.model = actor, critic, model
        self.max_iterations, self.iteration = max_iterations, 0
        self.gates = Gates(tasks.count).to(device)
        policy = PolicyOutputs(actor)
        self.estimator = AdvantageEstimator(critic, tasks, cfg)
        values = (self.estimator.values, group_dims, tasks.discounts, cfg.planner)
        self.objective = objective = Objective(model, actor, *values, tasks.action_mask)
        self.behaviour = Behaviour(actor, objective, self.gates, cfg.planner, tasks, seed)
        num_rollouts = max(1, round(cfg.world_model.replay_transitions / (storage.num_envs * storage.num_steps)))
        self.replay = ReplayBuffer(storage, num_rollouts, seed)
        self.policy_learner = PolicyLearner(actor, critic, self.gates, cfg, self.estimator.units)
        # Without the task embeddings, which other networks share.
        self.critic_replay = CriticReplay(critic, self.policy_learner.parameters("critic"), self.estimator, cfg)
        self.plan_learner = PlanLearner(actor, policy, objective, self.gates, tasks, cfg)
        self.model_learner = ModelLearner(objective, policy, self.gates, tasks, cfg)
        self.bonus = ExplorationBonus(objective, self.gates, tasks, cfg.bonus, seed)
        self.average = PolicyAverage(actor, cfg.policy_average_decay)
        self.newest_update = NewestUpdate(actor, tasks.count)
        self.num_steps, horizon = storage.num_steps, min(cfg.critic_replay.horizon, self.replay.capacity)
        self.hindsight = Hindsight(self.estimator, self.gates, horizon, cfg.schedule)
        self.stopwatch = Stopwatch(device)
        self.metrics: dict[str, float] = {}

    # -- collection ---------------------------------------------------------------------------------------------------

    def begin_rollout(self, most: int) -> int:
        """Make room for as many rollouts as the next update waits for, at most ``most``. Returns their number."""
        count = self.gates.wait(min(most, self.hindsight.room // self.num_steps))
        self.storage = self.storage.of_length(count * self.num_steps)
        return count

    def act(self, obs: TensorDict) -> torch.Tensor:
        """Choose actions for all environments and store what is known before the step.

        Args:
            obs: Observations, batch size (N,).

        Returns:
            Actions, shape (N, A).
        """
        sample = self.behaviour.sample(obs)
        if len(self.behaviour.planned_ids) > 0:
            with self.stopwatch.section("plan"):
                sample = self.behaviour.plan(obs, sample)  # (3)
        self.storage.add_action(obs, self.tasks.ids, **vars(sample))
        self.behaviour.step += 1
        return sample.actions

    def process_env_step(
        self, obs: TensorDict, rewards: torch.Tensor, dones: torch.Tensor, extras: dict[str, Any]
    ) -> None:
        """Store the environment's answer.

        Args:
            obs: Observations after any reset, batch size (N,).
            rewards: Rewards, (N,).
            dones: Ends of episodes, (N,).
            extras: ``time_outs`` (N,) marks truncations, without it every end is a termination; ``final_obs`` holds
                the observations before a reset and is stale on rows that were not reset (``final_obs_valid`` (N,):
                where it is delivered); ``invalid`` (N,) marks environments that had to be restarted.
        """
        dones = dones.bool()
        time_outs = extras.get("time_outs")
        terminated = dones if time_outs is None else dones & ~time_outs.to(self.device).bool()
        next_obs, valid = obs, ~dones
        final_obs = extras.get("final_obs")
        if final_obs is not None:
            groups = {}
            for group in self.storage.next_obs.keys():  # noqa: SIM118 - a TensorDict iterates over its rows
                rows = dones.view(-1, *[1] * (obs[group].dim() - 1))
                groups[group] = torch.where(rows, final_obs[group].to(self.device), obs[group])
            next_obs = TensorDict(groups, batch_size=obs.batch_size)
            valid = extras.get("final_obs_valid", torch.ones_like(dones)) | ~dones
        self.storage.add_outcome(next_obs, valid, rewards, terminated, dones, extras.get("invalid"))
        self.actor.reset(dones)
        self.critic.reset(dones)

    def compute_returns(self, obs: TensorDict) -> None:
        """Prepare a finished rollout; its advantages are estimated once, by :meth:`update`. ``obs`` are not needed."""
        if self.storage.any_invalid:
            self.storage.repair_invalid()
        self.estimator.learn_units(self.storage)

    # -- update -------------------------------------------------------------------------------------------------------

    def update(self) -> dict[str, float]:
        """Learn from the finished rollout. Returns the mean losses; :attr:`metrics` holds everything else."""
        st, replay, metrics = self.storage, self.replay, {}
        replay.add(st)
        with self.stopwatch.section("update_policy"):
            steps = self.critic_replay.look_back(replay)  # the last 64 steps of each environment
            losses = self.critic_replay.train(steps, replay.generator)  # V
            advantage_std = self.estimator.estimate(st)  # GAE or V-trace, per task
            metrics |= self._measure(steps)
            metrics |= self.bonus.add(st, replay, advantage_std, self.iteration / self.max_iterations)  # (4)-(7)
            plans, found = self.plan_learner.plan(st, replay)  # (2)-(3)
            self.newest_update.keep("ppo")
            self.policy_learner.reserve_kl(plans.expected_kl if plans else 0.0)
            losses |= self.policy_learner.train(st)  # (8)-(9)
            self.newest_update.keep("plan")
            metrics |= found | self.plan_learner.regress(plans, replay.generator)
        with self.stopwatch.section("update_model"):
            self._update_statistics()
            losses |= self.model_learner.train(replay, st, self.iteration)
        self.behaviour.rotate()
        self.average.update()
        metrics["policy/clip_fraction"] = losses.pop("clip_fraction")
        self.metrics = metrics | self.gates.metrics() | self._read_guards()
        if self.learns_model:
            self.estimator.predict = self._predicted_value
        self.iteration += self.gates.waited
        st.clear()
        return losses

    def _measure(self, steps: dict[str, Any]) -> dict[str, float]:
        """What the newest steps say of behaviour, updates and model, before they learn from the finished rollout."""
        st, units = self.storage, self.estimator.units(self.storage.task)
        metrics = behaviour_metrics(st, units, self.tasks.count, self.cfg.planner.execution)
        metrics |= self.newest_update.note(st, self.replay)
        metrics |= self.hindsight.measure(self.hindsight.judge(steps, st.num_steps))
        metrics |= self.model_learner.measure(st) if self.learns_model else {}
        return metrics | distributed.means({"planner/fallback": self.behaviour.read_fallbacks()}, self.device)

    def _update_statistics(self) -> None:
        """Normalisers of policy and critic, frozen until here, learn from the rollout."""
        flat, kept = self.storage.obs.flatten(0, 1), ~self.storage.invalid.flatten()
        if self.storage.any_invalid:  # an environment that cannot be reset shows zeros meanwhile
            flat = flat[kept]
        if len(flat) > 0:
            self.actor.update_normalization(flat)
            self.critic.update_normalization(flat)

    def _predicted_value(self, obs: TensorDict, actions: torch.Tensor, task: torch.Tensor) -> torch.Tensor:
        """Value of what follows observations and actions, reward units, (B,), as the world model predicts it."""
        z = self.model.step(self.objective.encode(obs, task), actions, task)[0]
        return self.objective.value(z, task)

    # -- acting without learning --------------------------------------------------------------------------------------

    def inference_policy(self, kind: str = "prior") -> Callable[[TensorDict], torch.Tensor]:
        """A noise-free policy: observations with batch size (n,) -> actions (n, A).

        Args:
            kind: ``prior``: the mean action of the policy, averaged if so configured; ``planner``: the planner's mean.

        Raises:
            ValueError: If ``kind`` is neither.
        """
        self.eval_mode()
        if kind == "prior":
            return self.average.policy
        if kind != "planner":
            raise ValueError(f"The policy must be 'prior' or 'planner', got '{kind}'.")
        return self.behaviour.planner_policy(self.average.policy)

    @staticmethod
    def construct_algorithm(obs: TensorDict, env: VecEnv, cfg: dict[str, Any], device: str) -> M3PO:
        """Build M3PO for an environment from a runner configuration.

        Args:
            obs: Example observations, batch size (N,).
            env: Environment; sizes come from its spaces.
            cfg: Runner configuration as in rsl_rl.
            device: Torch device.

        Raises:
            UserError: If the configuration does not fit the environment.
        """
        return M3PO(**construction.parts(obs, env, cfg, device), device=device)
