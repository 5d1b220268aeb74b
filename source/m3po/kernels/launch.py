"""Launching Warp kernels on torch tensors: zero-copy, on torch's current stream."""

from __future__ import annotations

from typing import Any

import torch
import warp as wp

wp.config.log_level = wp.LOG_WARNING  # no banner


def launch(kernel: wp.Kernel, dim: tuple[int, ...], args: tuple[Any, ...], device: torch.device) -> None:
    """Launch a kernel.

    Args:
        kernel: Warp kernel.
        dim: Threads per dimension.
        args: Kernel arguments; tensors are passed as they lie in memory, ``None`` is an empty array.
        device: Device of the tensors.
    """
    wp.init()
    # Raw descriptors instead of array objects: the tensors outlive the call, and nothing else is needed.
    values = [wp.from_torch(a, return_ctype=True) if isinstance(a, torch.Tensor) else a for a in args]
    if device.type == "cuda":
        stream = wp.stream_from_torch(torch.cuda.current_stream(device))
        wp.launch(kernel, dim=dim, inputs=values, stream=stream)
    else:
        wp.launch(kernel, dim=dim, inputs=values, device="cpu")
