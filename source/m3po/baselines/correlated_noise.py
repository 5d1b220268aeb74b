"""Exploration by noise that lasts: what the exploration bonus is compared with.

Independent noise moves a system to and fro, and takes it nowhere. Noise that is correlated in time takes it further, at
no cost (pink noise: arXiv 2206.14056). The distribution of a single action stays the policy's, which is all that the
ratios of PPO see.
"""

from __future__ import annotations

from typing import Any

import torch
from rsl_rl.modules import GaussianDistribution


class CorrelatedGaussian(GaussianDistribution):
    """rsl_rl's Gaussian, whose noise follows a first-order autoregressive process over the steps of acting.

    To be named as ``agent.actor.distribution_cfg.class_name`` of a single task. Draws with gradients are those of an
    update, and do not belong to the process. It goes on across resets, and begins anew when a run is resumed.
    """

    def __init__(self, output_dim: int, correlation: float = 0.9, **options: Any) -> None:
        """Create the distribution.

        Args:
            output_dim: Action dimensions A.
            correlation: Correlation of the noise of consecutive steps, in [0, 1).
            **options: Those of rsl_rl's ``GaussianDistribution``.

        Raises:
            ValueError: If the correlation lies outside.
        """
        if not 0.0 <= correlation < 1.0:
            raise ValueError(f"The correlation must lie in [0, 1), got {correlation}.")
        super().__init__(output_dim, **options)
        self.correlation = correlation
        self._noise: torch.Tensor | None = None

    def sample(self) -> torch.Tensor:
        """Draw actions, (B, A), of the same B environments at each step."""
        if torch.is_grad_enabled():
            return super().sample()
        fresh = torch.randn_like(self.mean)
        if self._noise is None or self._noise.shape != fresh.shape:
            self._noise = fresh
        else:
            self._noise = self.correlation * self._noise + (1.0 - self.correlation**2) ** 0.5 * fresh
        return self.mean + self.std * self._noise
