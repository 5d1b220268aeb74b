"""M3PO (arXiv 2506.21782): PPO on rollouts that a planner in a latent world model helped to collect.

One iteration::

    for t in range(T):  act()               prior proposes, planner improves a share of the environments
                        process_env_step()  store outcome, true terminations, final observations
    compute_returns()                      GAE or V-trace under the behaviour
    update():  bonus (4)-(7)  ->  policy and critic (8)-(9), distillation  ->  world model on the ring  ->  normalisers
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from rsl_rl.env import VecEnv
from rsl_rl.models import MLPModel
from tensordict import TensorDict

from m3po.algorithms.behaviour import Behaviour
from m3po.algorithms.bonus import add_bonus, annealed_alpha, centre, value_gap
from m3po.algorithms.construction import build_networks, check_cfg, parse_algorithm_cfg
from m3po.algorithms.model_learning import ModelLearner, explained_variance
from m3po.algorithms.policy_learning import PolicyLearner
from m3po.algorithms.returns import gae, vtrace
from m3po.config import AlgorithmCfg
from m3po.errors import UserError
from m3po.models import WorldModel
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
        task_ids: torch.Tensor | None = None,
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
            task_ids: Task of each environment, (N,); all 0 by default.
            device: Torch device.
        """
        self.cfg, self.device = cfg, device
        self.actor, self.critic, self.model = actor, critic, model
        self.storage, self.model_groups = storage, model_groups
        self.max_iterations = max_iterations
        self.iteration = 0
        num_envs, num_steps = storage.num_envs, storage.num_steps
        task_ids = torch.zeros(num_envs, dtype=torch.long, device=device) if task_ids is None else task_ids
        self.behaviour = Behaviour(actor, model, self.model_obs, cfg.planner, cfg.gamma, task_ids, seed)
        num_rollouts = max(1, round(cfg.world_model.ring_transitions / (num_envs * num_steps)))
        self.ring = RolloutRing(storage, num_rollouts, seed)
        self.policy_learner = PolicyLearner(actor, critic, cfg)
        self.model_learner = ModelLearner(
            model,
            flatten_obs=self.model_obs,
            policy_mean=actor,
            policy_std=lambda: actor.output_std.view(-1, actor.output_std.shape[-1])[0],
            critic=lambda obs: critic(obs).squeeze(-1),
        )
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
        if self.behaviour.planner_on and self.behaviour.num_planned > 0:
            with self.stopwatch.section("plan"):
                decision = self.behaviour.improve(obs, decision)
        values = self.critic(obs).detach().squeeze(-1)
        self.storage.add_action(obs, self.behaviour.task_ids, values=values, **vars(decision))
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
                the observations before a reset and is stale on rows that were not reset.
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
            next_obs, valid = TensorDict(groups, batch_size=obs.batch_size), torch.ones_like(dones)
        self.storage.add_outcome(next_obs, valid, rewards, terminated, dones)
        self.actor.reset(dones)
        self.critic.reset(dones)

    def compute_returns(self, obs: TensorDict) -> None:
        """Returns and per-task standardised advantages of the finished rollout.

        Args:
            obs: Observations after the last step, batch size (N,).
        """
        st, cfg = self.storage, self.cfg
        st.next_values[:-1].copy_(st.values[1:])
        st.next_values[-1].copy_(self.critic(obs).detach().squeeze(-1))
        self._bootstrap_time_outs()
        episode = (st.rewards, st.values, st.next_values, st.terminated, st.dones)
        if cfg.advantage == "gae":
            returns, advantages = gae(*episode, cfg.gamma, cfg.lam)
        else:
            returns, advantages = vtrace(*episode, st.log_pi - st.log_beta, cfg.gamma, cfg.lam)
        st.returns.copy_(returns)
        self.advantage_std = torch.ones(self.model.task_embedding.shape[0], device=self.device)
        for k in range(len(self.advantage_std)):
            mine = st.task == k
            own = advantages[mine]
            if own.numel() > 1:
                self.advantage_std[k] = own.std() + 1e-8
                advantages[mine] = (own - own.mean()) / self.advantage_std[k]
        st.advantages.copy_(advantages)

    def _bootstrap_time_outs(self) -> None:
        """Value of the final observation where an episode was cut short, or of the predicted latent without one."""
        st = self.storage
        cut = st.dones & ~st.terminated
        known, unknown = cut & st.next_obs_valid, cut & ~st.next_obs_valid
        if known.any():
            st.next_values[known] = self.critic(st.next_obs[known]).detach().squeeze(-1)
        if unknown.any():
            task = st.task[unknown]
            e = self.model.embed(task)
            z = self.model.encode(self.model_obs(st.obs[unknown]), task)
            value = self.model.value(self.model.predict(z, st.actions[unknown], e)[0], e)
            st.next_values[unknown] = (value * self.model.rewards.scale(task)).detach()

    # -- update -------------------------------------------------------------------------------------------------------

    def update(self) -> dict[str, float]:
        """Learn from the finished rollout. Returns the mean losses; :attr:`metrics` holds everything else."""
        metrics = self._behaviour_metrics()
        metrics |= self._apply_bonus()
        with self.stopwatch.section("update_policy"):
            losses = self.policy_learner.train(self.storage)
        with self.stopwatch.section("update_model"):
            self.ring.add(self.storage)
            metrics |= self._measure_model()
            self._update_statistics()
            losses |= {f"model_{k}": v for k, v in self.model_learner.train(self.ring, self.iteration).items()}
        self.behaviour.imagination.model_changed()
        self.behaviour.gate(metrics["model/skill_1"], metrics["model/reward_ev"])
        self.behaviour.rotate()
        metrics["policy/clipped_share"] = losses.pop("clipped_share")
        self.metrics = metrics
        self.iteration += 1
        self.behaviour.set_progress(self.iteration / max(1, self.max_iterations))
        self.storage.clear()
        return losses

    def _measure_model(self) -> dict[str, float]:
        """Quality of the model on the new rollout, which it has not trained on yet."""
        batch = self.ring.newest(self.cfg.world_model.horizon)
        return {f"model/{name}": value for name, value in self.model_learner.measure(batch).items()}

    def _behaviour_metrics(self) -> dict[str, float]:
        """How far the behaviour was from the prior, and how well the critic explains the returns."""
        st = self.storage
        planned = st.planned
        count = planned.sum().clamp_min(1)
        rho = (st.log_pi - st.log_beta).exp().clamp(max=1.0)
        if self.cfg.planner.execution == "projected":
            kl = 0.5 * ((st.plan_mean - st.mean) / st.std).square().sum(-1)
        else:
            kl = st.log_beta - st.log_pi
        every = torch.ones_like(planned)
        return {
            "planner/share": planned.float().mean().item(),
            "planner/kl": ((kl * planned).sum() / count).item(),
            "planner/gain": ((st.plan_gain * planned).sum() / count).item(),
            "planner/accepted": (((st.plan_gain > 0) & planned).sum() / count).item(),
            "policy/effective_sample_size": (rho.sum().square() / rho.square().sum() / rho.numel()).item(),
            "policy/value_ev": explained_variance(st.values, st.returns, every),
        }

    def _apply_bonus(self) -> dict[str, float]:
        """Add the exploration bonus (7) to the stored advantages."""
        st, cfg = self.storage, self.cfg.bonus
        alpha = annealed_alpha(cfg, self.iteration / max(1, self.max_iterations))
        metrics = {"bonus/alpha": alpha, "bonus/gap": 0.0, "bonus/mean_abs": 0.0}
        if alpha == 0.0:
            return metrics
        obs, task = self.model_obs(st.obs).flatten(0, 1), st.task.flatten()
        gap = value_gap(
            self.model,
            obs,
            st.actions.flatten(0, 1),
            st.rewards.flatten(),
            self.model_obs(st.next_obs).flatten(0, 1),
            st.terminated.flatten(),
            task,
            self.cfg.gamma,
        )
        centred = centre(gap / self.advantage_std[task], task, len(self.advantage_std), cfg.centering)
        centred = (centred * st.next_obs_valid.flatten()).view_as(st.advantages)
        with_bonus = add_bonus(st.advantages, centred, alpha, cfg.floor)
        metrics["bonus/gap"] = gap.mean().item()
        metrics["bonus/mean_abs"] = (with_bonus - st.advantages).abs().mean().item()
        st.advantages.copy_(with_bonus)
        return metrics

    def _update_statistics(self) -> None:
        """Normalisers, frozen until here, learn from the rollout; the model trains on the new statistics next."""
        st = self.storage
        flat = st.obs.flatten(0, 1)
        self.actor.update_normalization(flat)
        self.critic.update_normalization(flat)
        task = st.task.flatten()
        self.model.obs_normalizer.update(self.model_obs(flat), task)
        self.model.rewards.update(st.rewards.flatten(), st.terminated.flatten(), task)

    def model_obs(self, obs: TensorDict) -> torch.Tensor:
        """Observation vector of the world model, (..., O)."""
        return torch.cat([obs[group] for group in self.model_groups], dim=-1)

    # -- acting without learning --------------------------------------------------------------------------------------

    def inference_policy(self, kind: str = "prior") -> Callable[[TensorDict], torch.Tensor]:
        """A noise-free policy: observations with batch size (n,) -> actions (n, A).

        Args:
            kind: ``prior`` is the policy's mean action; ``planner`` is the mean that the planner would execute.

        Raises:
            ValueError: If ``kind`` is neither.
        """
        self.eval_mode()
        if kind == "prior":
            return self.actor
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
        return {
            "actor_state_dict": self.actor.state_dict(),
            "critic_state_dict": self.critic.state_dict(),
            "world_model_state_dict": self.model.state_dict(),
            "optimizer_state_dict": self.policy_learner.optimizer.state_dict(),
            "world_model_optimizer_state_dict": self.model_learner.optimizer.state_dict(),
            "m3po_state": {
                "learning_rate": self.learning_rate,
                "iteration": self.iteration,
                "planner_step": self.behaviour.step,
                "first_planned": self.behaviour.first_planned,
                "planner_on": self.behaviour.planner_on,
            },
        }

    def load(self, loaded_dict: dict[str, Any], load_cfg: dict | None, strict: bool) -> bool:
        """Restore :meth:`save`. ``load_cfg`` selects parts as in rsl_rl. Returns whether to restore the iteration."""
        if load_cfg is None:
            load_cfg = {"actor": True, "critic": True, "optimizer": True, "iteration": True}
        if load_cfg.get("actor"):
            self.actor.load_state_dict(loaded_dict["actor_state_dict"], strict=strict)
            self.model.load_state_dict(loaded_dict["world_model_state_dict"], strict=strict)
            self.behaviour.imagination.model_changed()
        if load_cfg.get("critic"):
            self.critic.load_state_dict(loaded_dict["critic_state_dict"], strict=strict)
        if load_cfg.get("optimizer"):
            self.policy_learner.optimizer.load_state_dict(loaded_dict["optimizer_state_dict"])
            self.model_learner.optimizer.load_state_dict(loaded_dict["world_model_optimizer_state_dict"])
            state = loaded_dict["m3po_state"]
            self.policy_learner.learning_rate, self.iteration = state["learning_rate"], state["iteration"]
            self.behaviour.step, self.behaviour.first_planned = state["planner_step"], state["first_planned"]
            self.behaviour.planner_on = state["planner_on"]
            self.behaviour.set_progress(self.iteration / max(1, self.max_iterations))
        return load_cfg.get("iteration", False)

    def broadcast_parameters(self) -> None:
        """Send all parameters of rank 0 to the other ranks."""
        for network in (self.actor, self.critic, self.model):
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
        if cfg.get("multi_gpu"):
            raise UserError("M3PO does not average gradients over several processes yet; run a single process.")
        algorithm_cfg = parse_algorithm_cfg(cfg["algorithm"])
        num_steps = cfg["num_steps_per_env"]
        check_cfg(algorithm_cfg, env.num_envs, num_steps, device, env.num_actions)
        actor, critic, model, model_groups = build_networks(obs, env, cfg, algorithm_cfg, device)
        if hasattr(env.cfg, "compute_final_obs"):
            # Isaac Lab reads this at every step: it makes the observation before a reset available.
            env.cfg.compute_final_obs = True
        next_groups = list(dict.fromkeys([*cfg["obs_groups"]["critic"], *model_groups]))
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
            task_ids=getattr(env, "task_ids", None),
            device=device,
        )
