"""Policy and critic of several tasks: one network, conditioned on the task, that never sees another task's scale.

rsl_rl's ``MLPModel`` with four changes: observations are normalised per task, the task embedding joins them, each
task adds a linear output layer of its own, and the Gaussian has a std per task and knows which action dimensions
a task has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from rsl_rl.models import MLPModel
from rsl_rl.modules.distribution import GaussianDistribution
from tensordict import TensorDict
from torch import nn

from m3po.class_names import resolve_class
from m3po.errors import UserError
from m3po.models.layers import linear_layers
from m3po.models.normalizers import MEMORY, TaskNormalizer


def new_embedding(num_tasks: int, dim: int) -> nn.Parameter:
    """Table of task embeddings (K, E), random directions of norm about 1."""
    return nn.Parameter(torch.randn(num_tasks, dim) / dim**0.5)


def embed(table: torch.Tensor, task: torch.Tensor) -> torch.Tensor:
    """Rows of a table of task embeddings (K, E), scaled to norm 1. Shape (...,) -> (..., E)."""
    return nn.functional.normalize(table, dim=-1)[task]


def task_of(obs: TensorDict) -> torch.Tensor:
    """Task ids in the observations of several tasks, whose group ``task`` has shape (..., 1); shape (...,)."""
    return obs["task"].squeeze(-1)


class TaskGaussian(GaussianDistribution):
    """Gaussian with a std per task; dimensions that a task lacks are 0 and add nothing to any sum."""

    action_mask: torch.Tensor
    task: torch.Tensor
    _distribution: Any  # a Normal, once it is updated

    def __init__(
        self,
        output_dim: int,
        action_mask: torch.Tensor,
        init_std: float | Sequence[float] = 1.0,
        **distribution_cfg: Any,
    ) -> None:
        """Set the stds that training begins with.

        Args:
            output_dim: Action dimensions A of the largest task.
            action_mask: Dimensions that each task has, shape (K, A), boolean.
            init_std: First std, of all tasks or of each.
            **distribution_cfg: Other options of rsl_rl's ``GaussianDistribution``.

        Raises:
            UserError: If there are not as many stds as tasks.
        """
        each = [init_std] * len(action_mask) if isinstance(init_std, (int, float)) else list(init_std)
        if len(each) != len(action_mask):
            raise UserError(f"init_std has {len(each)} values for {len(action_mask)} tasks.")
        super().__init__(output_dim, init_std=each[0], **distribution_cfg)
        name = "std_param" if self.std_type == "scalar" else "log_std_param"
        one, first = getattr(self, name), torch.tensor(each).unsqueeze(1).expand(-1, output_dim)
        values = first.clone() if self.std_type == "scalar" else first.log()
        setattr(self, name, nn.Parameter(values, requires_grad=one.requires_grad))
        self.register_buffer("action_mask", action_mask.clone(), persistent=False)

    def select(self, task: torch.Tensor) -> None:
        """Set the tasks (B,) of the rows that the next calls are about."""
        self.task = task

    def std_of(self, task: torch.Tensor) -> torch.Tensor:
        """Stds of tasks, shape (...,) -> (..., A); 1 in dimensions that a task lacks."""
        if self.std_type == "scalar":
            std = self.std_param.clamp(*self.std_range)
        else:
            std = self.log_std_param.clamp(*self.log_std_range).exp()
        return torch.where(self.action_mask, std, 1.0)[task]

    def update(self, mlp_output: torch.Tensor) -> None:
        """Set the means (B, A) of the selected tasks."""
        std = self.std_of(self.task)
        self._distribution = torch.distributions.Normal(mlp_output * self.action_mask[self.task], std)

    def sample(self) -> torch.Tensor:
        """Draw actions, shape (B, A)."""
        return super().sample() * self.action_mask[self.task]

    def deterministic_output(self, mlp_output: torch.Tensor) -> torch.Tensor:
        """Mean actions, shape (B, A)."""
        return mlp_output * self.action_mask[self.task]

    @property
    def entropy(self) -> torch.Tensor:
        """Entropy over the dimensions that a task has, nats, shape (B,)."""
        return (self._distribution.entropy() * self.action_mask[self.task]).sum(-1)

    def log_prob(self, outputs: torch.Tensor) -> torch.Tensor:
        """Log-probability over the dimensions that a task has, shape (B, A) -> (B,)."""
        return (self._distribution.log_prob(outputs) * self.action_mask[self.task]).sum(-1)


class TaskHead(nn.Module):
    """What each task adds to the output of the layer that all share: a linear function of its own, 0 at first."""

    def __init__(self, num_tasks: int, features: int, outputs: int) -> None:
        """Set all functions to 0."""
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_tasks, outputs, features))
        self.bias = nn.Parameter(torch.zeros(num_tasks, outputs))

    def forward(self, features: torch.Tensor, task: torch.Tensor) -> torch.Tensor:
        """Outputs of each row's task. Shapes (B, F) and (B,) -> (B, outputs).

        All tasks' functions are one product of matrices: there are few outputs, and no row need be looked for.
        """
        every = nn.functional.linear(features, self.weight.flatten(0, 1), self.bias.flatten())
        return every.unflatten(-1, self.bias.shape)[torch.arange(len(task), device=task.device), task]


class TaskMLPModel(MLPModel):
    """Policy or critic of several tasks; reads the observation group ``task`` beside its own."""

    obs_normalizer: TaskNormalizer

    def __init__(
        self,
        obs: TensorDict,
        obs_groups: dict[str, list[str]],
        obs_set: str,
        output_dim: int,
        *,
        action_mask: torch.Tensor,
        task_dims: Sequence[int],
        embedding_dim: int,
        distribution_cfg: dict[str, Any] | None = None,
        **mlp_cfg: Any,
    ) -> None:
        """Create the network.

        Args:
            obs: Example observations.
            obs_groups: Observation groups of each observation set.
            obs_set: Observation set of this network, ``actor`` or ``critic``.
            output_dim: Output dimensions.
            action_mask: Action dimensions that each task has, shape (K, A), boolean.
            task_dims: Observation dimensions that each task has, K numbers.
            embedding_dim: Dimensions E of the task embedding.
            distribution_cfg: Options of rsl_rl's ``GaussianDistribution``; ``None`` for a critic.
            **mlp_cfg: Options of rsl_rl's ``MLPModel``. Observations are always normalised, per task.

        Raises:
            UserError: If another distribution is asked for.
        """
        self.embedding_dim = embedding_dim  # read by the constructor of the base class
        mlp_cfg["obs_normalization"] = False
        super().__init__(obs, obs_groups, obs_set, output_dim, **mlp_cfg)
        num_tasks = len(action_mask)
        self.obs_normalizer = TaskNormalizer(num_tasks, self.obs_dim, task_dims, memory=MEMORY)
        self.task_embedding = new_embedding(num_tasks, embedding_dim)
        if distribution_cfg is not None:
            cls, cfg = resolve_class(dict(distribution_cfg))
            if cls is not GaussianDistribution:
                raise UserError(f"the policy of several tasks must have a GaussianDistribution, got {cls.__name__}.")
            self.distribution = TaskGaussian(output_dim, action_mask, **cfg)

        last = linear_layers(self.mlp)[-1]
        self.task_head = TaskHead(num_tasks, last.in_features, last.out_features)

    def forward(
        self, obs: TensorDict, masks: Any = None, hidden_state: Any = None, stochastic_output: bool = False
    ) -> torch.Tensor:
        """As rsl_rl's model, for the tasks that the observations name; it has no memory."""
        task, features = task_of(obs), self.get_latent(obs)
        *hidden, last = self.mlp
        for layer in hidden:
            features = layer(features)
        output = last(features) + self.task_head(features, task)
        if not isinstance(self.distribution, TaskGaussian):  # a critic has none
            return output
        self.distribution.select(task)
        if stochastic_output:
            self.distribution.update(output)
            return self.distribution.sample()
        return self.distribution.deterministic_output(output)

    def get_latent(self, obs: TensorDict, masks: Any = None, hidden_state: Any = None) -> torch.Tensor:
        """Normalised observations and task embeddings, shape (B, O + E)."""
        task = task_of(obs)
        return torch.cat([self.obs_normalizer(self._flat(obs), task), embed(self.task_embedding, task)], dim=-1)

    def update_normalization(self, obs: TensorDict) -> None:
        """Learn the statistics of each task from observations with batch size (B,)."""
        self.obs_normalizer.update(self._flat(obs), task_of(obs))

    def _flat(self, obs: TensorDict) -> torch.Tensor:
        return torch.cat([obs[group] for group in self.obs_groups], dim=-1)

    def _get_latent_dim(self) -> int:
        return self.obs_dim + self.embedding_dim
