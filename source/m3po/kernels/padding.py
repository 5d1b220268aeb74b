"""Padding of a heterogeneous batch: observations of different sizes, task embeddings and masks in one launch."""

from __future__ import annotations

import torch
import warp as wp

from m3po.kernels.launch import launch


@wp.kernel(enable_backward=False, module="m3po_padding")
def padding_kernel(
    out: wp.array2d(dtype=wp.float32),
    obs_mask: wp.array2d(dtype=wp.bool),
    action_mask: wp.array2d(dtype=wp.bool),
    flat_obs: wp.array(dtype=wp.float32),
    offsets: wp.array(dtype=wp.int64),
    task: wp.array(dtype=wp.int64),
    obs_dims: wp.array(dtype=wp.int64),
    action_dims: wp.array(dtype=wp.int64),
    embedding: wp.array2d(dtype=wp.float32),
) -> None:
    """One thread writes one column of one environment's row, and its share of the masks."""
    env, column = wp.tid()
    width = obs_mask.shape[1]
    k = wp.int32(task[env])
    if column < width:
        valid = column < wp.int32(obs_dims[k])
        value = wp.float32(0.0)
        if valid:
            value = flat_obs[wp.int32(offsets[env]) + column]
        out[env, column] = value
        obs_mask[env, column] = valid
    elif column < out.shape[1]:
        out[env, column] = embedding[k, column - width]
    if column < action_mask.shape[1]:
        action_mask[env, column] = column < wp.int32(action_dims[k])


@torch.library.custom_op("m3po::pad_observations", mutates_args=("out", "obs_mask", "action_mask"))
def pad_observations(
    out: torch.Tensor,
    obs_mask: torch.Tensor,
    action_mask: torch.Tensor,
    flat_obs: torch.Tensor,
    offsets: torch.Tensor,
    task: torch.Tensor,
    obs_dims: torch.Tensor,
    action_dims: torch.Tensor,
    embedding: torch.Tensor,
) -> None:
    """Rows ``[observation, zeros, task embedding]`` and masks of environments of different tasks, by Warp.

    Args:
        out: Receives the rows, shape (N, O + E) with O the largest observation.
        obs_mask: Receives which observation columns are valid, shape (N, O), boolean.
        action_mask: Receives which action dimensions are valid, shape (N, A), boolean.
        flat_obs: Observations of all environments one after the other, shape (L,), float32.
        offsets: Where an environment's observation begins in ``flat_obs``, shape (N,), int64; L is below 2**31.
        task: Task ids, shape (N,), int64.
        obs_dims: Observation dimensions of each task, shape (K,), int64.
        action_dims: Action dimensions of each task, shape (K,), int64.
        embedding: Task embeddings, shape (K, E).
    """
    columns = max(out.shape[1], action_mask.shape[1])
    arguments = (out, obs_mask, action_mask, flat_obs, offsets, task, obs_dims, action_dims, embedding)
    launch(padding_kernel, (out.shape[0], columns), arguments, out.device)


@pad_observations.register_fake
def _(*_: object) -> None:
    return None
