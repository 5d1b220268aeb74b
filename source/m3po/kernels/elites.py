"""MPPI's update: elites, their softmax-weighted mean and std, and the trust region around the prior.

Candidate returns are z-scored per environment before the softmax, so scaling all rewards changes nothing.
"""

from __future__ import annotations

import math

import torch
import warp as wp

from m3po.kernels.launch import launch

_MIN_SPREAD = 1e-8
_MIN_SIGMA = 1e-6


def update_distribution_torch(
    mean: torch.Tensor,
    std: torch.Tensor,
    weights: torch.Tensor,
    spread: torch.Tensor,
    candidates: torch.Tensor,
    returns: torch.Tensor,
    num_elites: int,
    temperature: float,
    min_std: float,
) -> None:
    """Reference of :func:`update_distribution`."""
    spread.copy_(returns.std(dim=1, unbiased=False)).clamp_(min=_MIN_SPREAD)
    score = (returns - returns.mean(1, keepdim=True)) / spread.unsqueeze(1)
    # A stable order: of equal candidates, the first ones are elites, as in the kernel.
    best = score.argsort(dim=1, descending=True, stable=True)[:, :num_elites]
    weights.zero_().scatter_(1, best, torch.softmax(temperature * score.gather(1, best), dim=1))
    flat = candidates.flatten(2)
    mean.copy_(torch.bmm(weights.unsqueeze(1), flat).view_as(mean))
    offset = flat - mean.flatten(1).unsqueeze(1)
    std.copy_(torch.bmm(weights.unsqueeze(1), offset.square_()).view_as(std).sqrt_().clamp_(min_std, 1.0))


def project_torch(
    out: torch.Tensor, mu: torch.Tensor, sigma: torch.Tensor, offset: torch.Tensor, max_kl: float
) -> None:
    """Reference of :func:`project`."""
    # A std of 0 marks a masked dimension: it neither moves nor counts.
    valid = torch.where(sigma > _MIN_SIGMA, offset, 0.0)
    scale = (math.sqrt(2.0 * max_kl) / valid.norm(dim=-1, keepdim=True).clamp_min(1e-12)).clamp(max=1.0)
    torch.add(mu, scale * sigma * valid, out=out)


@wp.kernel(enable_backward=False, module="m3po_elites")
def weight_kernel(
    weights: wp.array2d(dtype=wp.float32),
    spread: wp.array(dtype=wp.float32),
    returns: wp.array2d(dtype=wp.float32),
    num_elites: wp.int32,
    temperature: wp.float32,
) -> None:
    """One thread ranks one candidate among its environment's and writes its unnormalised weight."""
    env, sample = wp.tid()
    samples = returns.shape[1]
    mine = returns[env, sample]
    total = wp.float32(0.0)
    best = mine
    rank = wp.int32(0)
    for s in range(samples):
        other = returns[env, s]
        total += other
        best = wp.max(best, other)
        if other > mine or (other == mine and s < sample):
            rank += 1
    centre = total / wp.float32(samples)
    square = wp.float32(0.0)
    for s in range(samples):
        square += (returns[env, s] - centre) * (returns[env, s] - centre)
    std = wp.max(wp.sqrt(square / wp.float32(samples)), wp.float32(_MIN_SPREAD))
    weight = wp.float32(0.0)
    if rank < num_elites:
        weight = wp.exp(temperature * (mine - best) / std)
    weights[env, sample] = weight
    if sample == 0:
        spread[env] = std


@wp.kernel(enable_backward=False, module="m3po_elites")
def moment_kernel(
    mean: wp.array3d(dtype=wp.float32),
    std: wp.array3d(dtype=wp.float32),
    weights: wp.array2d(dtype=wp.float32),
    candidates: wp.array4d(dtype=wp.float32),
    min_std: wp.float32,
) -> None:
    """One thread takes the weighted mean and std of one number over the candidates, in one pass (West, 1979)."""
    env, h, d = wp.tid()
    total = wp.float32(0.0)
    centre = wp.float32(0.0)
    square = wp.float32(0.0)
    for s in range(candidates.shape[1]):
        weight = weights[env, s]
        if weight > 0.0:
            total += weight
            offset = candidates[env, s, h, d] - centre
            centre += offset * weight / total
            square += weight * offset * (candidates[env, s, h, d] - centre)
    mean[env, h, d] = centre
    std[env, h, d] = wp.clamp(wp.sqrt(square / total), min_std, 1.0)


@wp.kernel(enable_backward=False, module="m3po_elites")
def normalize_kernel(weights: wp.array2d(dtype=wp.float32)) -> None:
    """One thread makes the weights of one environment sum to one."""
    env = wp.tid()
    total = wp.float32(0.0)
    for s in range(weights.shape[1]):
        total += weights[env, s]
    for s in range(weights.shape[1]):
        weights[env, s] = weights[env, s] / total


@wp.kernel(enable_backward=False, module="m3po_elites")
def projection_kernel(
    out: wp.array2d(dtype=wp.float32),
    mu: wp.array2d(dtype=wp.float32),
    sigma: wp.array2d(dtype=wp.float32),
    offset: wp.array2d(dtype=wp.float32),
    radius: wp.float32,
) -> None:
    """One thread projects the plan of one environment."""
    env = wp.tid()
    square = wp.float32(0.0)
    for d in range(offset.shape[1]):
        if sigma[env, d] > wp.float32(_MIN_SIGMA):
            square += offset[env, d] * offset[env, d]
    scale = wp.min(radius / wp.max(wp.sqrt(square), 1.0e-12), 1.0)
    for d in range(offset.shape[1]):
        move = wp.float32(0.0)
        if sigma[env, d] > wp.float32(_MIN_SIGMA):
            move = scale * sigma[env, d] * offset[env, d]
        out[env, d] = mu[env, d] + move


@torch.library.custom_op("m3po::update_distribution", mutates_args=("mean", "std", "weights", "spread"))
def update_distribution(
    mean: torch.Tensor,
    std: torch.Tensor,
    weights: torch.Tensor,
    spread: torch.Tensor,
    candidates: torch.Tensor,
    returns: torch.Tensor,
    num_elites: int,
    temperature: float,
    min_std: float,
) -> None:
    """Fit the sampling distribution to the best candidates, in place, by Warp.

    Args:
        mean: Receives the weighted mean of the elites, shape (n, H, A).
        std: Receives their weighted std, clamped to [``min_std``, 1], shape (n, H, A).
        weights: Receives ``softmax(temperature * z-score)`` over the elites and 0 elsewhere, shape (n, S).
        spread: Receives the std of all returns, shape (n,).
        candidates: Perturbations, shape (n, S, H, A), any strides.
        returns: Predicted returns, shape (n, S), any strides.
        num_elites: Best candidates that count; among equal ones the first.
        temperature: Inverse scale of the softmax.
        min_std: Lower bound of the std.
    """
    device = candidates.device
    launch(weight_kernel, tuple(returns.shape), (weights, spread, returns, num_elites, temperature), device)
    launch(moment_kernel, tuple(mean.shape), (mean, std, weights, candidates, min_std), device)
    launch(normalize_kernel, (returns.shape[0],), (weights,), device)


@torch.library.custom_op("m3po::project", mutates_args=("out",))
def project(out: torch.Tensor, mu: torch.Tensor, sigma: torch.Tensor, offset: torch.Tensor, max_kl: float) -> None:
    """Mean ``mu + s * sigma * offset`` with ``KL(N(out, sigma) || N(mu, sigma)) <= max_kl``, in place, by Warp.

    Args:
        out: Receives the projected mean, shape (n, A); exactly ``mu`` where the offset is 0.
        mu: Prior mean, shape (n, A).
        sigma: Prior std, shape (n, A); 0 marks a masked dimension.
        offset: Planned perturbation in whitened coordinates, shape (n, A).
        max_kl: Trust region, nats. ``inf`` leaves the plan as it is.
    """
    launch(projection_kernel, (out.shape[0],), (out, mu, sigma, offset, math.sqrt(2.0 * max_kl)), out.device)


@update_distribution.register_fake
def _(*_: object) -> None:
    return None


@project.register_fake
def _(*_: object) -> None:
    return None
