"""Batched MPPI sampling: counter-based normal noise, scaled, clamped and masked in one launch.

The noise is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). Every number is a
pure function of (seed, step, environment, iteration, sample, horizon, dimension), so an environment draws the same
noise whatever the batch, chunk or process it is in, and a resumed run continues the same stream from two integers.
Samples come in antithetic pairs ``(v, -v)``, which cancel the sample mean's error.
"""

from __future__ import annotations

import math

import torch
import warp as wp

from m3po.kernels.launch import launch

_MASK = 0xFFFFFFFF
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_KEYS = wp.constant(wp.vec4ui(wp.uint32(_M0), wp.uint32(_M1), wp.uint32(_W0), wp.uint32(_W1)))


def philox4x32(counter: tuple[torch.Tensor, ...], key: tuple[torch.Tensor | int, ...]) -> tuple[torch.Tensor, ...]:
    """Ten rounds of Philox4x32 in torch.

    Args:
        counter: Four int64 tensors holding 32-bit words, broadcastable to one shape.
        key: Two 32-bit words, integers or int64 tensors.

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


def planner_noise(counters: torch.Tensor, env_ids: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Standard normal noise of a plan, in torch.

    Args:
        counters: Seed (64 bits), step (32 bits) and planner iteration, int64, shape (3,).
        env_ids: Environment ids, shape (n,), int64.
        shape: Samples S, horizon H, action dimensions A.

    Returns:
        Noise of shape (n, S, H, A), float32, on the device of ``env_ids``; sample ``2 i + 1`` is minus sample ``2 i``.
    """
    samples, horizon, dims = shape
    size = (samples + 1) // 2 * horizon * dims
    index = torch.arange((size + 3) // 4, device=env_ids.device)
    seed, step, iteration = counters.unbind()
    words = philox4x32((index, env_ids.unsqueeze(-1), step & _MASK, iteration), (seed & _MASK, (seed >> 32) & _MASK))
    # Box-Muller on (0, 1]: the half-step keeps the logarithm finite.
    uniform = [(w.to(torch.float32) + 0.5) * 2.0**-32 for w in words]
    normals = []
    for u, v in ((uniform[0], uniform[1]), (uniform[2], uniform[3])):
        radius, angle = torch.sqrt(-2.0 * torch.log(u.clamp(max=1.0))), 2.0 * math.pi * v
        normals += [radius * torch.cos(angle), radius * torch.sin(angle)]
    half = torch.stack(normals, dim=-1).flatten(1)[:, :size].view(-1, 1, (samples + 1) // 2, horizon, dims)
    return torch.cat([half, -half], dim=1).transpose(1, 2).flatten(1, 2)[:, :samples]


def sample_candidates_torch(
    out: torch.Tensor,
    mean: torch.Tensor,
    std: torch.Tensor,
    counters: torch.Tensor,
    env_ids: torch.Tensor,
    action_mask: torch.Tensor | None,
    max_noise: float,
) -> None:
    """Reference of :func:`sample_candidates`."""
    noise = planner_noise(counters, env_ids, out.shape[1:]).to(out.dtype)
    torch.addcmul(mean.unsqueeze(1), std.unsqueeze(1), noise, out=noise)
    out.copy_(noise.clamp_(-max_noise, max_noise))
    if action_mask is not None:
        out.mul_(action_mask[:, None, None])


@wp.func
def _mul_hi(a: wp.uint32, b: wp.uint32) -> wp.uint32:
    return wp.uint32((wp.uint64(a) * wp.uint64(b)) >> wp.uint64(32))


@wp.func
def philox(counter: wp.vec4ui, key0: wp.uint32, key1: wp.uint32) -> wp.vec4ui:
    """Ten rounds of Philox4x32 in Warp."""
    c = counter
    k0 = key0
    k1 = key1
    for _ in range(10):
        high0 = _mul_hi(_KEYS[0], c[0])
        high1 = _mul_hi(_KEYS[1], c[2])
        c = wp.vec4ui(high1 ^ c[1] ^ k0, _KEYS[1] * c[2], high0 ^ c[3] ^ k1, _KEYS[0] * c[0])
        k0 = k0 + _KEYS[2]
        k1 = k1 + _KEYS[3]
    return c


@wp.func
def _unit(word: wp.uint32) -> wp.float32:
    return wp.min((wp.float32(word) + 0.5) * wp.float32(2.3283064365386963e-10), 1.0)


@wp.func
def normals(words: wp.vec4ui) -> wp.vec4f:
    """Four standard normal numbers by Box-Muller."""
    two_pi = wp.float32(6.283185307179586)
    r0 = wp.sqrt(-2.0 * wp.log(_unit(words[0])))
    r1 = wp.sqrt(-2.0 * wp.log(_unit(words[2])))
    a0 = two_pi * _unit(words[1])
    a1 = two_pi * _unit(words[3])
    return wp.vec4f(r0 * wp.cos(a0), r0 * wp.sin(a0), r1 * wp.cos(a1), r1 * wp.sin(a1))


@wp.kernel(enable_backward=False, module="m3po_sampling")
def sampling_kernel(
    out: wp.array4d(dtype=wp.float32),
    mean: wp.array3d(dtype=wp.float32),
    std: wp.array3d(dtype=wp.float32),
    counters: wp.array(dtype=wp.int64),
    env_ids: wp.array(dtype=wp.int64),
    action_mask: wp.array2d(dtype=wp.bool),
    max_noise: wp.float32,
) -> None:
    """One thread draws four numbers of one environment and writes them with their antithetic partners."""
    env, block = wp.tid()
    samples = out.shape[1]
    dims = out.shape[3]
    plane = out.shape[2] * dims
    seed = wp.uint64(counters[0])
    words = philox(
        wp.vec4ui(wp.uint32(block), wp.uint32(env_ids[env]), wp.uint32(counters[1]), wp.uint32(counters[2])),
        wp.uint32(seed),
        wp.uint32(seed >> wp.uint64(32)),
    )
    noise = normals(words)
    for q in range(4):
        flat = 4 * block + q
        first = 2 * (flat // plane)
        if first < samples:
            h = (flat % plane) // dims
            d = flat % dims
            centre = mean[env, h, d]
            offset = std[env, h, d] * noise[q]
            keep = wp.float32(1.0)
            if action_mask:
                keep = wp.where(action_mask[env, d], 1.0, 0.0)
            out[env, first, h, d] = keep * wp.clamp(centre + offset, -max_noise, max_noise)
            if first + 1 < samples:
                out[env, first + 1, h, d] = keep * wp.clamp(centre - offset, -max_noise, max_noise)


@torch.library.custom_op("m3po::sample_candidates", mutates_args=("out",))
def sample_candidates(
    out: torch.Tensor,
    mean: torch.Tensor,
    std: torch.Tensor,
    counters: torch.Tensor,
    env_ids: torch.Tensor,
    action_mask: torch.Tensor | None,
    max_noise: float,
) -> None:
    """Candidate perturbations ``clamp(mean + std * noise)`` of a planner iteration, written in place by Warp.

    Args:
        out: Perturbations in whitened coordinates, shape (n, S, H, A), float32, any strides.
        mean: Mean of the sampling distribution, shape (n, H, A).
        std: Std of the sampling distribution, shape (n, H, A).
        counters: Seed, step and planner iteration, int64, shape (3,), read on the device when the kernel runs.
        env_ids: Environment ids, shape (n,), int64.
        action_mask: Valid action dimensions, shape (n, A), boolean; masked ones become exactly 0.
        max_noise: Bound on the absolute perturbation.
    """
    n, samples, horizon, dims = out.shape
    blocks = ((samples + 1) // 2 * horizon * dims + 3) // 4
    launch(sampling_kernel, (n, blocks), (out, mean, std, counters, env_ids, action_mask, max_noise), out.device)


@sample_candidates.register_fake
def _(*_: object) -> None:
    return None
