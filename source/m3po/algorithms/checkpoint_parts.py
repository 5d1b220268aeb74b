"""The part of M3PO that rsl_rl's runner saves, loads and exchanges."""

from __future__ import annotations

from typing import Any

import torch
from rsl_rl.models import MLPModel
from torch import nn

from m3po.algorithms.advantage_estimator import AdvantageEstimator
from m3po.algorithms.behaviour import Behaviour
from m3po.algorithms.newest_update import NewestUpdate
from m3po.algorithms.policy_average import PolicyAverage
from m3po.algorithms.policy_learning import PolicyLearner
from m3po.config import AlgorithmCfg
from m3po.storage import ReplayBuffer

NETWORKS = {"actor": "actor", "critic": "critic", "world_model": "model", "gates": "gates"}
"""Name in a checkpoint -> attribute of the algorithm."""

LEARNERS = ("policy_learner", "critic_replay", "plan_learner", "model_learner")
"""Attributes that hold an optimiser and its guard."""


class CheckpointParts:
    """Save, load and broadcast what the attributes of :data:`NETWORKS` and :data:`LEARNERS` hold."""

    cfg: AlgorithmCfg
    actor: MLPModel
    estimator: AdvantageEstimator
    policy_learner: PolicyLearner
    behaviour: Behaviour
    average: PolicyAverage
    newest_update: NewestUpdate
    replay: ReplayBuffer
    iteration: int
    _predicted_value: Any  # the method

    @property
    def learning_rate(self) -> float:
        """Current step size of the policy."""
        return self.policy_learner.learning_rate

    @property
    def learns_model(self) -> bool:
        """Whether the world model is trained."""
        return self.cfg.world_model.steps_per_iteration > 0

    def get_policy(self) -> MLPModel:
        """The policy."""
        return self.actor

    def train_mode(self) -> None:
        """Set all networks to training mode."""
        for network in self._networks().values():
            network.train()

    def eval_mode(self) -> None:
        """Set all networks to evaluation mode."""
        for network in self._networks().values():
            network.eval()

    @property
    def guards(self) -> list:
        """Guards of all gradient steps."""
        return [getattr(self, name).guard for name in LEARNERS]

    def _read_guards(self) -> dict[str, float]:
        """Steps that were skipped because they were not finite, restored states, and rewards that were cut."""
        skipped, restored = zip(*(guard.read() for guard in self.guards), strict=True)
        counts = {"skipped_steps": sum(skipped), "restored": sum(restored), "cut_rewards": self.estimator.cut_rewards}
        return {f"robust/{name}": float(count) for name, count in counts.items()}

    def _networks(self) -> dict[str, nn.Module]:
        networks = {name: getattr(self, attribute) for name, attribute in NETWORKS.items()}
        return networks | {"reward_units": self.estimator.rewards}

    def save(self) -> dict[str, Any]:
        """Everything to be restored, as tensors and plain values."""
        return {
            **{f"{name}_state_dict": network.state_dict() for name, network in self._networks().items()},
            **{f"{name}_optimizer_state_dict": getattr(self, name).optimizer.state_dict() for name in LEARNERS},
            **self.average.state(),
            "m3po_state": {
                "learning_rate": self.learning_rate,
                "task_learning_rates": self.policy_learner.task_rates.tolist(),
                "iteration": self.iteration,
                "behaviour": self.behaviour.state_dict(),
            },
        }

    def load(self, loaded_dict: dict[str, Any], load_cfg: dict | None, strict: bool) -> bool:
        """Restore :meth:`save`. ``load_cfg`` selects parts as in rsl_rl. Returns whether to restore the iteration."""
        if load_cfg is None:
            load_cfg = {"actor": True, "critic": True, "optimizer": True, "iteration": True}
        for guard in self.guards:
            guard.forget()
        for name, network in self._networks().items():
            if load_cfg.get("critic" if name in ("critic", "reward_units") else "actor"):
                network.load_state_dict(loaded_dict[f"{name}_state_dict"], strict=strict)
        if load_cfg.get("actor"):
            self.average.load(loaded_dict, strict)
        if load_cfg.get("optimizer"):
            for name in LEARNERS:
                getattr(self, name).optimizer.load_state_dict(loaded_dict[f"{name}_optimizer_state_dict"])
            state = loaded_dict["m3po_state"]
            self.policy_learner.learning_rate, self.iteration = state["learning_rate"], state["iteration"]
            self.policy_learner.task_rates = torch.tensor(state["task_learning_rates"])
            self.behaviour.load_state_dict(state["behaviour"])
        if self.iteration > 0 and self.learns_model:
            self.estimator.predict = self._predicted_value
        return load_cfg.get("iteration", False)

    def resume_state(self) -> dict[str, Any]:
        """What an exact continuation needs besides :meth:`save`: replay buffer, random numbers, scales of the rates."""
        return {
            "replay": self.replay.state_dict(),
            "earlier_policies": self.newest_update.state(),
            "behaviour_generator": self.behaviour.generator.get_state(),
            "guards": [guard.state() for guard in self.guards],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`resume_state`, after :meth:`load`.

        Raises:
            CheckpointError: If the stored rollouts have other sizes.
        """
        self.replay.load_state_dict(state["replay"])
        self.newest_update.restore(state["earlier_policies"])
        self.behaviour.generator.set_state(state["behaviour_generator"].cpu())
        for guard, part in zip(self.guards, state["guards"], strict=True):
            guard.load_state(part)

    def broadcast_parameters(self) -> None:
        """Send all parameters and statistics of rank 0 to the other ranks."""
        for network in self._networks().values():
            for tensor in network.state_dict().values():
                torch.distributed.broadcast(tensor, src=0)
