"""Expected value of a two-hot distribution in one kernel: softmax, product with the bins, symexp.

Source: arXiv 2301.04104, section "Critic learning"; :meth:`m3po.models.two_hot.TwoHot.decode`.
"""

from __future__ import annotations

import torch

from m3po.kernels.triton_support import CompileSpec, jit, launch, pointer, power_of_two, require, require_rows
from m3po.models.two_hot import symexp

try:
    import triton.language as tl
except ImportError:
    tl = None

BLOCK_ROWS = 16
"""Rows per program."""

MAX_BINS = 2048
"""A program holds all bins of its rows in registers."""


def two_hot_expectation_reference(logits: torch.Tensor, bins: torch.Tensor) -> torch.Tensor:
    """Torch reference of :func:`two_hot_expectation` in float32; same arguments, returns shape (R,)."""
    return symexp(torch.softmax(logits.float(), dim=-1) @ bins)


@torch.library.custom_op("m3po::two_hot_expectation", mutates_args=("out",))
def two_hot_expectation(logits: torch.Tensor, bins: torch.Tensor, out: torch.Tensor) -> None:
    """``out = symexp(softmax(logits) @ bins)`` on CUDA.

    Args:
        logits: Logits, shape (R, B), float32 or bfloat16; contiguous rows, any row stride.
        bins: Bin centres in symlog space, shape (B,), float32.
        out: Expected values, shape (R,), float32, contiguous.

    Raises:
        ValueError: If shapes, strides or types do not fit, or if there are more than :data:`MAX_BINS` bins.
        RuntimeError: If a tensor is not on a CUDA device.
    """
    require_rows("logits", logits)
    rows, num_bins = logits.shape
    for name, vector, length in (("bins", bins, num_bins), ("out", out, rows)):
        require(
            vector.shape == (length,) and vector.is_contiguous() and vector.dtype == torch.float32,
            f"{name} must be float32, contiguous, of shape ({length},); got {vector.dtype} {tuple(vector.shape)}.",
        )
    spec = compile_spec(logits.dtype, num_bins, logits.stride(0))
    launch(spec, -(-rows // BLOCK_ROWS), logits, bins, out, rows)


@two_hot_expectation.register_fake
def _(logits: torch.Tensor, bins: torch.Tensor, out: torch.Tensor) -> None:
    """The result is in ``out``."""


def compile_spec(dtype: torch.dtype, num_bins: int, stride: int | None = None) -> CompileSpec:
    """Configuration of the kernel for a type and shape.

    Args:
        dtype: Type of ``logits``.
        num_bins: Bins B, at most :data:`MAX_BINS`.
        stride: Row stride of ``logits``; contiguous by default.
    """
    require(num_bins <= MAX_BINS, f"two_hot_expectation holds at most {MAX_BINS} bins, got {num_bins}.")
    return CompileSpec(
        kernel=_kernel,
        signature={"logits_ptr": pointer(dtype), "bins_ptr": "*fp32", "out_ptr": "*fp32", "num_rows": "i32"},
        constexprs={
            "STRIDE": stride or num_bins,
            "NUM_BINS": num_bins,
            "BLOCK_M": BLOCK_ROWS,
            "BLOCK_N": power_of_two(num_bins),
        },
        options={"num_warps": 4, "num_stages": 1},
    )


@jit(do_not_specialize=("num_rows",))
def _kernel(
    logits_ptr: tl.tensor,
    bins_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_rows: tl.tensor,
    STRIDE: tl.constexpr,
    NUM_BINS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_N)
    mask = (rows < num_rows)[:, None] & (columns < NUM_BINS)[None, :]
    logits = tl.load(
        logits_ptr + rows.to(tl.int64)[:, None] * STRIDE + columns[None, :], mask=mask, other=float("-inf")
    ).to(tl.float32)
    bins = tl.load(bins_ptr + columns, mask=columns < NUM_BINS, other=0.0)
    # Rows beyond the last are all -inf and give NaN, which is not stored.
    weight = tl.exp(logits - tl.max(logits, 1)[:, None])
    x = tl.sum(weight * bins[None, :], 1) / tl.sum(weight, 1)
    # exp - 1 instead of expm1: near 0 its error, 1e-7, is no larger than that of the sum over bins up to 10.
    size = tl.exp(tl.abs(x)) - 1.0
    tl.store(out_ptr + rows, tl.where(x < 0.0, -size, size), mask=rows < num_rows)
