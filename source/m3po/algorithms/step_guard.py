"""The one gradient step that all learners take: guarded against numbers that are not finite, clipped, and averaged.

A step whose gradient is not finite is skipped. Where that goes on, the last good state is restored.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from m3po import distributed
from m3po.deferred_flag import DeferredFlag

RESTORE_AFTER = 5
"""Skipped steps in a row after which the last good state is restored."""

BACK_OFF, RECOVERY = 0.5, 1.02
"""Factors of the learning rates' scale at a skipped step, and at a taken one until the scale is 1 again."""


class StepGuard:
    """Stands between a loss and its optimiser.

    A step is skipped on the device itself, so that the host need not look at the gradient before it goes on. The last
    good state is that of networks and optimiser before the first good step of the last round that had one. It is known
    to be good, because a finite gradient was computed from it.
    """

    def __init__(
        self,
        label: str,
        optimizer: torch.optim.Adam,
        networks: Sequence[nn.Module],
        max_grad_norm: float,
        clipped: Sequence[Sequence[nn.Parameter]] | None = None,
    ) -> None:
        """Guard an optimiser.

        Args:
            label: What is trained, for messages.
            optimizer: Fused Adam over parameters of the networks; only the fused one can skip on the device.
            networks: Their parameters and statistics belong to the state.
            max_grad_norm: Clipping threshold of the gradient.
            clipped: Parameters that are clipped together, group by group; by default all of the optimiser's.
        """
        self.label, self.optimizer, self.networks, self.max_grad_norm = label, optimizer, networks, max_grad_norm
        self.clipped = clipped or [[p for group in optimizer.param_groups for p in group["params"]]]
        self.scale = 1.0
        """Factor of all learning rates, in (0, 1]."""
        self._device = optimizer.param_groups[0]["params"][0].device
        self._flag = DeferredFlag(self._device)
        self._skipped = self._restored = self._in_a_row = 0
        self._skips = False
        self.forget()

    @property
    def learnt_nothing(self) -> bool:
        """Whether steps were skipped and none was taken."""
        return self._skips and self._good is None

    def forget(self) -> None:
        """Drop the last good state, because the networks now hold something else, such as a checkpoint."""
        self._good: dict[str, Any] | None = None
        self._saved = False

    def state(self) -> dict[str, float]:
        """What :meth:`load_state` needs to take the same steps; the last good state is saved anew."""
        return {"scale": self.scale, "in_a_row": self._in_a_row}

    def load_state(self, state: dict[str, float]) -> None:
        """Go on from :meth:`state`."""
        self.scale, self._in_a_row = state["scale"], int(state["in_a_row"])

    def begin(self) -> None:
        """Begin a round of steps; its first good one saves the state."""
        self._saved = False

    def step(self, loss: torch.Tensor, weight: float = 1.0) -> bool:
        """Take a gradient step on a loss, or skip it.

        Args:
            loss: Loss, ().
            weight: What the gradient of this process counts for among several, such as the samples behind it.

        Returns:
            Whether the last good state was restored instead.
        """
        if not loss.requires_grad:  # everything that it depends on is frozen
            return False
        self.optimizer.zero_grad(set_to_none=True)
        # All gradients are NaN where the loss is not finite, whatever its derivative is: the gradients alone then tell
        # a bad step, even after they were averaged over processes.
        loss.backward(torch.where(loss.detach().isfinite(), 1.0, torch.nan).to(loss.dtype))
        distributed.average_gradients(self.optimizer, weight)
        norms = [nn.utils.clip_grad_norm_(group, self.max_grad_norm) for group in self.clipped]
        bad = ~torch.stack(norms).isfinite().all()
        if not self._saved and not bad:  # once per round the host waits
            self._save()
        rates = [group["lr"] for group in self.optimizer.param_groups]
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * self.scale
        # As torch.amp.GradScaler tells a fused Adam, whose class does not declare it.
        self.optimizer.found_inf = bad.float()  # ty: ignore[missing-attribute]
        self.optimizer.step()
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        if not self._flag(bad):
            self._in_a_row, self.scale = 0, min(1.0, self.scale * RECOVERY)
            return False
        self._skips = True
        self._skipped += 1
        self._in_a_row += 1
        self.scale *= BACK_OFF
        if self._in_a_row < RESTORE_AFTER:
            return False
        self._in_a_row = 0
        return self._restore()

    def read(self) -> tuple[int, int]:
        """Skipped steps and restored states since the last call; says so where there are any."""
        counts = self._skipped, self._restored
        self._skipped = self._restored = 0
        if counts[0]:
            print(
                f"[m3po] {self.label}: skipped {counts[0]} gradient steps that were not finite; learning rate scaled "
                f"by {self.scale:.2g}",
                flush=True,
            )
        return counts

    def _save(self) -> None:
        """Keep a copy of networks and optimiser."""
        states = [network.state_dict() for network in self.networks]
        self._good = copy.deepcopy({"networks": states, "optimizer": self.optimizer.state_dict()})
        self._saved = True

    def _restore(self) -> bool:
        """Go back to the last good state, with the current learning rates. Returns whether there is one."""
        many = f"[m3po] {self.label}: {RESTORE_AFTER} gradient steps in a row were not finite"
        if self._good is None:
            print(f"{many}, and there is no good state yet to go back to", flush=True)
            return False
        rates = [group["lr"] for group in self.optimizer.param_groups]
        for network, state in zip(self.networks, self._good["networks"], strict=True):
            network.load_state_dict(state)
        self.optimizer.load_state_dict(copy.deepcopy(self._good["optimizer"]))
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        self._restored += 1
        print(f"{many}; went back to the last good state", flush=True)
        return True
