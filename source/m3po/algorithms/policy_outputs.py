"""Mean and std of a policy, without drawing anything."""

from __future__ import annotations

from typing import Any

import torch
from rsl_rl.models import MLPModel
from tensordict import TensorDict

from m3po.models.task_policy import TaskGaussian, task_of


class PolicyOutputs:
    """Observations -> mean and std of the policy."""

    def __init__(self, actor: MLPModel) -> None:
        """Bind to a policy with a Gaussian distribution."""
        self.actor = actor

    def __call__(self, obs: TensorDict) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and std in observations with batch size (B,), (B, A) each."""
        actor = self.actor
        distribution: Any = actor.distribution  # a policy has one
        if isinstance(distribution, TaskGaussian):
            return actor(obs), distribution.std_of(task_of(obs))
        # The current policy, whether it has sampled before or not, as an average of policies never does.
        distribution.update(actor.mlp(actor.get_latent(obs)))
        return distribution.params
