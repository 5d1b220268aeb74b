"""PPO epochs over a rollout (8)-(9).

The step sizes are adapted as in rsl_rl, by the KL of an update. What several tasks share follows their mean KL; each
task's own output layer follows the task's: a task with one action moves a hundredth as far as one with twenty.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from rsl_rl.models import MLPModel
from torch import nn

from m3po import distributed
from m3po.algorithms.gates import Gates
from m3po.algorithms.policy_loss import surrogate_loss, value_loss
from m3po.algorithms.statistics import mean_per_task
from m3po.algorithms.step_guard import StepGuard
from m3po.config import AlgorithmCfg
from m3po.models.task_policy import TaskMLPModel
from m3po.storage import RolloutStorage

LEAST_STD, LEAST_PART = 0.2, 0.4
"""Smallest std of the actions, and its largest part of the first std: what an update gains shrinks with its square."""


class PolicyLearner:
    """Trains policy and critic on the current rollout (8)-(9)."""

    def __init__(
        self,
        actor: MLPModel,
        critic: MLPModel,
        gates: Gates,
        cfg: AlgorithmCfg,
        units: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        """Create the optimiser.

        Args:
            actor: Policy.
            critic: Value function; it may share the task embedding with the policy.
            gates: They say how far an update may go.
            cfg: Configuration.
            units: Tasks (B,) -> reward units of the critic's output, (B,).
        """
        self.actor, self.critic, self.gates, self.cfg, self.units = actor, critic, gates, cfg, units
        self.learning_rate = cfg.learning_rate
        heads = list(actor.task_head.parameters()) if isinstance(actor, TaskMLPModel) else []
        self.task_rates = torch.full((len(heads[0]),), cfg.learning_rate) if heads else torch.empty(0)
        """Step size of each task's output layer of the policy, (K,), on the host; empty where there are none."""
        learns_std = actor.distribution is not None and cfg.std_learning_rate > 0.0
        std = list(actor.distribution.parameters()) if learns_std else []
        # Groups of their own for policy and critic: one adaptive rate for both starves the critic.
        known = {id(p) for p in actor.parameters()}
        own = {id(p) for p in (*heads, *std)}
        groups = {
            "policy": [p for p in actor.parameters() if id(p) not in own],
            "critic": [p for p in critic.parameters() if id(p) not in known],
            "heads": heads,
            "std": std,
        }
        self._names = [name for name, group in groups.items() if name in ("policy", "critic") or group]
        self.optimizer = torch.optim.Adam(
            [{"params": groups[name], "lr": cfg.learning_rate} for name in self._names], fused=True
        )
        self.learns_values = cfg.value_loss_coef > 0.0
        """Whether the critic learns here, or from the replay buffer alone."""
        networks = (actor, critic) if self.learns_values else (actor,)
        clipped = [list(network.parameters()) for network in networks]
        self.guard = StepGuard("policy", self.optimizer, (actor, critic), cfg.max_grad_norm, clipped)
        self._is_log = getattr(actor.distribution, "std_type", "log") == "log"
        first = [p.detach().clone() for p in std]
        first = [p.exp() if self._is_log else p for p in first]
        least = [(LEAST_PART * p).clamp(max=LEAST_STD) for p in first]
        self._least_std = [p.log() if self._is_log else p for p in least]
        self.reserve_kl(0.0)
        self._set_learning_rate(cfg.learning_rate)

    def reserve_kl(self, kl: float) -> None:
        """Set how far the next update goes: as far as the gates say.

        Args:
            kl: Part of the KL budget that is reserved for the plans, nats; PPO gets the rest, and at least a quarter.
        """
        budget, rest = self.gates.part("ppo"), max(self.cfg.desired_kl - kl, 0.25 * self.cfg.desired_kl)
        self.desired_kls = [rest * part for part in budget.tolist()]
        # An update that waited for several rollouts stands for as many of the std's.
        self.std_pace = (self.gates.waited * budget.mean().item()) ** 0.5
        std = self.parameters("std")
        # The step size is that of the logarithm, however the std is written.
        self.std_unit = 1.0 if self._is_log or not std else std[0].mean().item()

    def train(self, rollout: RolloutStorage) -> dict[str, float]:
        """Run all epochs. Returns the mean of each loss, and the share of clipped ratios in the first epoch."""
        cfg, samples = self.cfg, 0
        sums: dict[str, float] = {}
        updates = cfg.num_learning_epochs * cfg.num_mini_batches
        self.guard.begin()
        for i, batch in enumerate(rollout.mini_batches(cfg.num_mini_batches, cfg.num_learning_epochs)):
            terms, clipped = self._losses(batch)
            samples += len(batch["actions"])
            loss = terms["surrogate"]
            if self.learns_values:
                loss = loss + cfg.value_loss_coef * terms["value"]
            self._step(loss - cfg.entropy_coef * terms["entropy"], len(batch["actions"]))
            for name, term in terms.items():
                sums[name] = sums.get(name, 0.0) + term.item() / updates
            if i < cfg.num_mini_batches:
                sums["clip_fraction"] = sums.get("clip_fraction", 0.0) + clipped.item() / cfg.num_mini_batches
        return distributed.means(sums, rollout.device, weight=samples)

    def _step(self, loss: torch.Tensor, samples: int) -> None:
        """Take a gradient step; each task's output layer goes as far as its own rate says."""
        heads = self.parameters("heads")
        before = [p.detach().clone() for p in heads]
        restored = self.guard.step(loss, samples)
        if heads and not restored:  # Adam's step is proportional to its rate, here the largest of the tasks'
            share = (self.task_rates / self.task_rates.max()).to(heads[0].device)
            for parameter, old in zip(heads, before, strict=True):
                parameter.data.copy_(torch.lerp(old, parameter.data, share.view(-1, *[1] * (old.dim() - 1))))
        for parameter, least in zip(self.parameters("std"), self._least_std, strict=True):
            parameter.data.clamp_(min=least)

    def _losses(self, batch: dict[str, Any]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Loss terms of a mini-batch, and its share of clipped ratios. Adapts the learning rate on the way."""
        cfg = self.cfg
        self.actor(batch["obs"], stochastic_output=True)
        mean, std = self.actor.output_distribution_params
        if cfg.schedule != "fixed":
            self._adapt_learning_rates((batch["mean"], batch["std"]), (mean, std), batch["task"])
        surrogate, clipped = surrogate_loss(
            self.actor.get_output_log_prob(batch["actions"]),
            batch["log_pi"],
            batch["log_beta"],
            batch["advantages"],
            cfg.clip_param,
            cfg.ratio,
        )
        terms = {"surrogate": surrogate, "entropy": self.actor.output_entropy.mean()}
        if self.learns_values:
            values, units = self.critic(batch["obs"]).squeeze(-1), self.units(batch["task"])
            old_values, returns = batch["values"] / units, batch["returns"] / units
            terms["value"] = value_loss(values, old_values, returns, cfg.clip_param)
        return terms, clipped

    @torch.no_grad()
    def _adapt_learning_rates(
        self, old: tuple[torch.Tensor, ...], new: tuple[torch.Tensor, ...], task: torch.Tensor
    ) -> None:
        """rsl_rl's adaptive schedule: keep the KL of an update, over all processes, near ``desired_kl``."""
        kl = self.actor.get_kl_divergence(old, new)
        if len(self.task_rates):
            everywhere = torch.ones_like(kl, dtype=torch.bool)
            of_tasks = mean_per_task(kl, everywhere, task, len(self.task_rates)).tolist()
            pairs = zip(self.task_rates.tolist(), of_tasks, self.desired_kls, strict=True)
            rates = [self._adapted(*pair) for pair in pairs]
            self.task_rates = torch.tensor(rates)
        kl = distributed.mean(kl.mean(), weight=len(kl))
        desired_kl = sum(self.desired_kls) / len(self.desired_kls)
        self._set_learning_rate(self._adapted(self.learning_rate, kl, desired_kl))

    @staticmethod
    def _adapted(rate: float, kl: float | torch.Tensor, desired_kl: float) -> float:
        """A step size after an update of some KL; one of exactly 0 says nothing."""
        if kl > 2.0 * desired_kl:
            return max(1e-5, rate / 1.5)
        if 0.0 < kl < 0.5 * desired_kl:
            return min(1e-2, rate * 1.5)
        return rate

    def _set_learning_rate(self, rate: float) -> None:
        self.learning_rate = rate
        rates = {
            "policy": rate,
            "critic": max(rate, self.cfg.learning_rate),
            "std": self.cfg.std_learning_rate * self.std_unit * self.std_pace,
        }
        if len(self.task_rates):
            rates["heads"] = self.task_rates.max().item()
        for name, group in zip(self._names, self.optimizer.param_groups, strict=True):
            group["lr"] = rates[name]

    def parameters(self, name: str) -> list[nn.Parameter]:
        """Parameters of a group: ``policy``, ``critic``, each task's output layers (``heads``), ``std``."""
        groups = dict(zip(self._names, self.optimizer.param_groups, strict=True))
        return groups[name]["params"] if name in groups else []
