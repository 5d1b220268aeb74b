"""Counter-based normal noise: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

Every number is a pure function of (seed, step, environment, iteration, index), so an environment draws the same noise
whatever the batch, chunk or process it is in, and a resumed run continues the same stream from two integers.
"""

from __future__ import annotations

import math

import torch

_MASK = 0xFFFFFFFF
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85


def philox4x32(counter: tuple[torch.Tensor, ...], key: tuple[int, int]) -> tuple[torch.Tensor, ...]:
    """Ten rounds of Philox4x32.

    Args:
        counter: Four int64 tensors holding 32-bit words, broadcastable to one shape.
        key: Two 32-bit words.

    Returns:
        Four int64 tensors of 32-bit words, of the broadcast shape.
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = key
    for _ in range(10):
        # int64 products wrap around, which leaves the low 64 bits right; the masks undo the signed shift.
        p0, p1 = c0 * _M0, c2 * _M1
        hi0, lo0 = (p0 >> 32) & _MASK, p0 & _MASK
        hi1, lo1 = (p1 >> 32) & _MASK, p1 & _MASK
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


def planner_noise(
    seed: int, step: int, env_ids: torch.Tensor, iteration: int, shape: tuple[int, int, int]
) -> torch.Tensor:
    """Standard normal noise of a plan.

    Args:
        seed: Seed of the run, 64 bits.
        step: Environment step counter of the run, 32 bits.
        env_ids: Environment ids, shape (n,), int64.
        iteration: Planner iteration.
        shape: Samples S, horizon H, action dimensions A.

    Returns:
        Noise of shape (n, S, H, A), float32, on the device of ``env_ids``.
    """
    size = shape[0] * shape[1] * shape[2]
    index = torch.arange((size + 3) // 4, device=env_ids.device)
    zero = torch.zeros_like(index)
    words = philox4x32(
        (index, env_ids.unsqueeze(-1), zero + (step & _MASK), zero + iteration),
        (seed & _MASK, (seed >> 32) & _MASK),
    )
    # Box-Muller on (0, 1]: the half-step keeps the logarithm finite.
    uniform = [(w.to(torch.float32) + 0.5) * 2.0**-32 for w in words]
    normals = []
    for u, v in ((uniform[0], uniform[1]), (uniform[2], uniform[3])):
        radius, angle = torch.sqrt(-2.0 * torch.log(u.clamp(max=1.0))), 2.0 * math.pi * v
        normals += [radius * torch.cos(angle), radius * torch.sin(angle)]
    return torch.stack(normals, dim=-1).flatten(1)[:, :size].view(-1, *shape)
