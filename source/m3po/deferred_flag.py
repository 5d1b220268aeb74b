"""A flag on the device that the host reads without making the device wait."""

from __future__ import annotations

import torch


class DeferredFlag:
    """On a CPU the host reads the flag at once, on a GPU when the next one is handed over, one step later.

    By then the copy has long arrived, because a step takes longer than a copy of one byte. To ask at once would stall
    the host at every step until the device has done all that is queued, for something that hardly ever happens.
    """

    def __init__(self, device: str | torch.device, late: bool | None = None) -> None:
        """Start with a flag that is not set.

        Args:
            device: Torch device of the flags.
            late: Whether to answer one call later; by default on everything but a CPU.
        """
        cuda = torch.device(device).type == "cuda"
        self.late = cuda if late is None else late
        """Whether answers come one call later."""
        self._host = torch.zeros((), dtype=torch.bool, pin_memory=cuda)
        self._arrival = torch.cuda.Event() if cuda else None

    def __call__(self, flag: torch.Tensor) -> bool:
        """Hand a flag over, (), boolean. Returns it, or where answers come later, the one of the call before."""
        if not self.late:
            return bool(flag)
        if self._arrival is not None:
            self._arrival.synchronize()
        answer = bool(self._host)
        self._host.copy_(flag, non_blocking=True)
        if self._arrival is not None:
            self._arrival.record()
        return answer
