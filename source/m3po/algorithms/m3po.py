"""M3PO (arXiv 2506.21782): PPO on rollouts that a planner in a latent world model helped to collect.

One iteration::

    for t in range(T):  act()               prior proposes, planner improves a share of the environments
                        process_env_step()  store outcome, true terminations, final observations
    compute_returns()                      GAE or V-trace under the behaviour
    update():  critic on the ring, advantages anew  ->  bonus (4)-(7)  ->  policy and critic (8)-(9), distillation
               ->  value gradient of a model of observations  ->  world model on the ring  ->  normalisers
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from rsl_rl.env import VecEnv
from rsl_rl.models import MLPModel
from tensordict import TensorDict

from m3po import distributed
from m3po.algorithms.advantage_estimator import AdvantageEstimator
from m3po.algorithms.behaviour import Behaviour
from m3po.algorithms.behaviour_metrics import behaviour_metrics
from m3po.algorithms.bonus import annealed_alpha, apply_bonus
from m3po.algorithms.construction import build_networks, check_cfg, observation_model, parse_algorithm_cfg
from m3po.algorithms.critic_replay import CriticReplay
from m3po.algorithms.model_learning import ModelLearner
from m3po.algorithms.policy_average import PolicyAverage
from m3po.algorithms.policy_learning import PolicyLearner
from m3po.algorithms.tasks import Tasks
from m3po.algorithms.value_gradient import ValueGradient
from m3po.config import AlgorithmCfg
from m3po.models import WorldModel
from m3po.models.task_policy import TaskGaussian, task_of
from m3po.stopwatch import Stopwatch
from m3po.storage import RolloutRing, RolloutStorage


class M3PO:
    """The algorithm behind :class:`~m3po.runners.M3PORunner` and rsl_rl's stock ``OnPolicyRunner``."""

    def __init__(
        self,
        actor: MLPModel,
        critic: MLPModel,
        model: WorldModel,
        storage: RolloutStorage,
        model_groups: list[str],
        cfg: AlgorithmCfg,
        *,
        max_iterations: int = 1000,
        seed: int = 0,
        tasks: Tasks | None = None,
        device: str = "cpu",
    ) -> None:
        """Assemble the algorithm; :meth:`construct_algorithm` does it from an environment.

        Args:
            actor: Policy prior ``pi`` on the observation.
            critic: Value function on the observation, for advantages.
            model: World model.
            storage: Rollout storage of T steps, N environments.
            model_groups: Observation groups that the world model reads.
            cfg: Configuration.
            max_iterations: Training iterations that schedules refer to.
            seed: Seed of the planner's noise.
            tasks: Tasks of the environments; a single one by default.
            device: Torch device.
        """
        self.cfg, self.device = cfg, device
        self.actor, self.critic, self.model = actor, critic, model
        self.storage, self.model_groups = storage, model_groups
        self.max_iterations = max_iterations
        self.iteration = 0
        num_envs, num_steps = storage.num_envs, storage.num_steps
        self.tasks = tasks or Tasks.single(num_envs, storage.actions.shape[-1], cfg.gamma, device)
        self.behaviour = Behaviour(actor, model, self.model_obs, cfg.planner, self.tasks, seed)
        self.estimator = AdvantageEstimator(critic, model, self.model_obs, self.tasks, cfg)
        num_rollouts = max(1, round(cfg.world_model.ring_transitions / (num_envs * num_steps)))
        self.ring = RolloutRing(storage, num_rollouts, seed)
        self.policy_learner = PolicyLearner(actor, critic, cfg, self.estimator.units)
        self.average = PolicyAverage(actor, cfg.policy_average_decay)
        self.model_learner = ModelLearner(
            model, self.model_obs, self._policy, self.estimator.values, self.tasks.action_mask, cfg.restore_after
        )
        self.critic_replay = None
        if cfg.critic_replay.steps_per_iteration > 0:
            # without the task embeddings, which other networks share
            own = self.policy_learner.parameters("critic")
            self.critic_replay = CriticReplay(critic, own, self.estimator, cfg)
        self.value_gradient = None
        if cfg.value_gradient.steps_per_iteration > 0:
            groups = [*model_groups, *actor.obs_groups, *critic.obs_groups]
            built = observation_model(storage.obs, groups, storage.actions.shape[-1], self.tasks, cfg, seed, device)
            self.value_gradient = ValueGradient(actor, self._policy, *built, self.estimator, self.tasks, cfg)
        learners = (self.policy_learner, self.model_learner, self.critic_replay)
        self._guards = [learner.guard for learner in learners if learner is not None]
        self._guards += self.value_gradient.guards if self.value_gradient is not None else ()
        self.learns_model = cfg.world_model.steps_per_iteration + cfg.world_model.extra_steps > 0
        self.stopwatch = Stopwatch(device)
        self.metrics: dict[str, float] = {}

    # -- collection ---------------------------------------------------------------------------------------------------

    def act(self, obs: TensorDict) -> torch.Tensor:
        """Choose actions for all environments and store what is known before the step.

        Args:
            obs: Observations, batch size (N,).

        Returns:
            Actions, shape (N, A).
        """
        decision = self.behaviour.prior(obs)
        if len(self.behaviour.planned_ids) > 0:
            with self.stopwatch.section("plan"):
                decision = self.behaviour.improve(obs, decision)
        values = self.critic(obs).detach().squeeze(-1)
        self.storage.add_action(obs, self.tasks.ids, values=values, **vars(decision))
        self.behaviour.step += 1
        return decision.actions

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
                where it is delivered); ``lost`` (N,) marks environments that had to be restarted.
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
        self.storage.add_outcome(next_obs, valid, rewards, terminated, dones, extras.get("lost"))
        self.actor.reset(dones)
        self.critic.reset(dones)

    def compute_returns(self, obs: TensorDict) -> None:
        """Returns and per-task standardised advantages of the finished rollout; ``obs`` (N,) follow its last step."""
        self.advantage_std = self.estimator.evaluate(self.storage, obs)

    # -- update -------------------------------------------------------------------------------------------------------

    def update(self) -> dict[str, float]:
        """Learn from the finished rollout. Returns the mean losses; :attr:`metrics` holds everything else."""
        metrics = behaviour_metrics(
            self.storage, self.estimator.units(self.storage.task), self.tasks.count, self.cfg.planner.execution
        )
        metrics |= distributed.means({"planner/fallback": self.behaviour.read_fallbacks()}, self.device)
        losses = {}
        if self.learns_model or self.critic_replay is not None or self.value_gradient is not None:
            self.ring.add(self.storage)
        if self.critic_replay is not None:
            with self.stopwatch.section("update_policy"):
                losses |= self.critic_replay.train(self.ring)
                self.advantage_std = self.estimator.evaluate_again(self.storage)
        alpha = annealed_alpha(self.cfg.bonus, self.iteration / max(1, self.max_iterations))
        to_gap = (self.model, self.model_obs, self.tasks.discounts, self.advantage_std)
        metrics |= apply_bonus(self.storage, *to_gap, alpha, self.cfg.bonus)
        ahead = self.value_gradient
        with self.stopwatch.section("update_policy"):
            if ahead is not None:
                metrics |= ahead.plan(self.ring, self.storage, self.iteration)
                self.policy_learner.leave(ahead.expected_kl)
            losses |= self.policy_learner.train(self.storage)
            if ahead is not None:
                metrics |= ahead.improve(self.ring.generator)
        if ahead is not None:
            with self.stopwatch.section("update_model"):
                losses |= ahead.train(self.ring, self.storage, self.iteration)
        if self.learns_model:
            with self.stopwatch.section("update_model"):
                quality = self.model_learner.measure(self.ring.newest(self.cfg.world_model.horizon))
                metrics |= {f"model/{name}": value.mean().item() for name, value in quality.items()}
                self._update_statistics()
                losses |= {f"model_{k}": v for k, v in self.model_learner.train(self.ring, self.iteration).items()}
            self.behaviour.imagination.model_changed()
            self.behaviour.gate(quality["skill_1"], quality["reward_ev"])
            self.behaviour.rotate()
        else:
            self._update_statistics()
        self.average.update()
        metrics["policy/clipped_share"] = losses.pop("clipped_share")
        skipped, restored = zip(*(guard.read() for guard in self._guards), strict=True)
        metrics["robust/skipped_steps"], metrics["robust/restored"] = float(sum(skipped)), float(sum(restored))
        self.metrics = metrics
        self.iteration += 1
        self.behaviour.set_progress(self.iteration / max(1, self.max_iterations))
        self.storage.clear()
        return losses

    def _update_statistics(self) -> None:
        """Normalisers, frozen until here, learn from the rollout; the model trains on the new statistics next."""
        st = self.storage
        flat, task = st.obs.flatten(0, 1), st.task.flatten()
        rewards, terminated = st.rewards.flatten(), st.terminated.flatten()
        if st.any_lost:  # an environment that cannot be reset shows zeros meanwhile
            kept = ~st.lost.flatten()
            if not kept.any():
                return
            flat, task, rewards, terminated = flat[kept], task[kept], rewards[kept], terminated[kept]
        self.actor.update_normalization(flat)
        self.critic.update_normalization(flat)
        if self.learns_model:
            self.model.obs_normalizer.update(self.model_obs(flat), task)
            self.model.rewards.update(rewards, terminated, task)

    def _policy(self, obs: TensorDict) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and deviation of the policy prior in observations with batch size (B,), (B, A) each. Draws nothing."""
        mean, distribution = self.actor(obs), self.actor.distribution
        if isinstance(distribution, TaskGaussian):
            return mean, distribution.std_of(task_of(obs))
        return mean, self.actor.output_std.view(-1, mean.shape[-1])[0].expand_as(mean)

    def model_obs(self, obs: TensorDict) -> torch.Tensor:
        """Observation vector of the world model, (..., O)."""
        return torch.cat([obs[group] for group in self.model_groups], dim=-1)

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
        return self.behaviour.planner_policy()

    # -- the contract with rsl_rl's runner ----------------------------------------------------------------------------

    @property
    def learning_rate(self) -> float:
        """Current step size of the policy."""
        return self.policy_learner.learning_rate

    def get_policy(self) -> MLPModel:
        """The policy prior."""
        return self.actor

    def train_mode(self) -> None:
        """Set all networks to training mode."""
        for network in (self.actor, self.critic, self.model):
            network.train()

    def eval_mode(self) -> None:
        """Set all networks to evaluation mode."""
        for network in (self.actor, self.critic, self.model):
            network.eval()

    def save(self) -> dict[str, Any]:
        """Everything to be restored, as tensors and plain values."""
        optional = {f"{name}_state_dict": part.state_dict() for name, part in self._optional().items()}
        if self.cfg.normalize_values:
            optional["reward_units_state_dict"] = self.estimator.rewards.state_dict()
        return {
            "actor_state_dict": self.actor.state_dict(),
            "critic_state_dict": self.critic.state_dict(),
            "world_model_state_dict": self.model.state_dict(),
            "optimizer_state_dict": self.policy_learner.optimizer.state_dict(),
            "world_model_optimizer_state_dict": self.model_learner.optimizer.state_dict(),
            **optional,
            **self.average.state(),
            "m3po_state": {
                "learning_rate": self.learning_rate,
                "task_learning_rates": self.policy_learner.task_rates.tolist(),
                "iteration": self.iteration,
                "planner_step": self.behaviour.step,
                **self.behaviour.state(),
            },
        }

    def load(self, loaded_dict: dict[str, Any], load_cfg: dict | None, strict: bool) -> bool:
        """Restore :meth:`save`. ``load_cfg`` selects parts as in rsl_rl. Returns whether to restore the iteration."""
        if load_cfg is None:
            load_cfg = {"actor": True, "critic": True, "optimizer": True, "iteration": True}
        if load_cfg.get("actor"):
            self.actor.load_state_dict(loaded_dict["actor_state_dict"], strict=strict)
            self.average.load(loaded_dict, strict)
            self.model.load_state_dict(loaded_dict["world_model_state_dict"], strict=strict)
            self.behaviour.imagination.model_changed()
        for guard in self._guards:
            guard.forget()
        if load_cfg.get("critic"):
            self.critic.load_state_dict(loaded_dict["critic_state_dict"], strict=strict)
            if self.cfg.normalize_values:
                self.estimator.rewards.load_state_dict(loaded_dict["reward_units_state_dict"], strict=strict)
        if load_cfg.get("optimizer"):
            self.policy_learner.optimizer.load_state_dict(loaded_dict["optimizer_state_dict"])
            self.model_learner.optimizer.load_state_dict(loaded_dict["world_model_optimizer_state_dict"])
            for name, part in self._optional().items():
                if f"{name}_state_dict" in loaded_dict:  # not in older checkpoints
                    part.load_state_dict(loaded_dict[f"{name}_state_dict"])
            state = loaded_dict["m3po_state"]
            self.policy_learner.learning_rate, self.iteration = state["learning_rate"], state["iteration"]
            self.policy_learner.task_rates = torch.tensor(state.get("task_learning_rates", []))
            self.behaviour.step = state["planner_step"]
            # Before there were several tasks, these were single values.
            gate = (x if isinstance(x, list) else [x] for x in (state["first_planned"], state["planner_on"]))
            self.behaviour.restore(*gate)
            self.behaviour.set_progress(self.iteration / max(1, self.max_iterations))
        return load_cfg.get("iteration", False)

    def _optional(self) -> dict[str, Any]:
        """What the learners hold that a configuration may leave out, by name."""
        parts = {}
        if self.critic_replay is not None:
            parts["critic_replay_optimizer"] = self.critic_replay.optimizer
        if self.value_gradient is not None:
            parts["observation_model"] = self.value_gradient.model
            parts["observation_model_optimizer"] = self.value_gradient.optimizer
            parts["value_gradient_optimizer"] = self.value_gradient.policy_optimizer
        return parts

    def resume_state(self) -> dict[str, Any]:
        """What an exact continuation needs besides :meth:`save`: ring, random numbers, scales of the learning rates."""
        return {
            "ring": self.ring.state_dict(),
            "behaviour_generator": self.behaviour.generator.get_state(),
            "guards": [guard.state() for guard in self._guards],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`resume_state`, after :meth:`load`.

        Raises:
            CheckpointError: If the stored rollouts have other sizes.
        """
        self.ring.load_state_dict(state["ring"])
        self.behaviour.generator.set_state(state["behaviour_generator"].cpu())
        for guard, part in zip(self._guards, state["guards"], strict=False):  # an older run may have one less
            guard.load_state(part)

    def broadcast_parameters(self) -> None:
        """Send all parameters and statistics of rank 0 to the other ranks."""
        ahead = [self.value_gradient.model] if self.value_gradient is not None else []
        for network in (self.actor, self.critic, self.model, self.estimator.rewards, *ahead):
            for tensor in network.state_dict().values():
                torch.distributed.broadcast(tensor, src=0)
        self.behaviour.imagination.model_changed()

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
        algorithm_cfg = parse_algorithm_cfg(cfg["algorithm"])
        num_steps = cfg["num_steps_per_env"]
        check_cfg(algorithm_cfg, env.num_envs, num_steps, device, env.num_actions)
        tasks = Tasks.of(env, algorithm_cfg.gamma, device)
        actor, critic, model, model_groups = build_networks(obs, env, cfg, algorithm_cfg, tasks, device)
        if hasattr(env.cfg, "compute_final_obs"):
            # Isaac Lab reads this at every step: it makes the observation before a reset available.
            env.cfg.compute_final_obs = True
        task_group = ["task"] if tasks.conditioned else []
        next_groups = list(dict.fromkeys([*cfg["obs_groups"]["critic"], *model_groups, *actor.obs_groups, *task_group]))
        storage = RolloutStorage(obs, next_groups, num_steps, env.num_actions, device)
        return M3PO(
            actor,
            critic,
            model,
            storage,
            model_groups,
            algorithm_cfg,
            max_iterations=cfg.get("max_iterations", 1000),
            seed=cfg.get("seed", 0),
            tasks=tasks,
            device=device,
        )
