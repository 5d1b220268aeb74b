"""Linear layer, LayerNorm and Mish in one kernel: a layer of the world model's trunks without gradients.

The layer is :class:`m3po.models.layers.NormedLinear`. One program owns whole rows and walks over their columns in
tiles, so no width is too large: it writes each tile of the linear output while merging the rows' moments (Chan et al.,
"Updating formulae and a pairwise algorithm for computing sample variances", 1979), then reads the tiles again, which
still lie in the cache, and normalises them in place. Held in registers instead, 64 rows of width 416 already spill on
sm_90, and fewer rows use its matrix units badly and read the weights too often.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from m3po.kernels.triton_support import CompileSpec, jit, launch, pointer, power_of_two, require, require_rows

try:
    import triton.language as tl
except ImportError:
    tl = None

TILES = {torch.bfloat16: (128, 64, 64), torch.float32: (64, 64, 16)}
"""Rows, columns and depth of a tile, by the type of the inputs. In bfloat16 the 8 warps of a program need at most 128
registers per thread on sm_90: two programs share a multiprocessor, so that one multiplies while the other normalises.
Without tensor cores (float32) a thread holds its operands of the whole depth in registers, hence less of it."""


def linear_norm_mish_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    """Torch reference of :func:`linear_norm_mish` in float32; same arguments, returns shape (R, W)."""
    x, weight, bias, norm_weight, norm_bias = (t.float() for t in (x, weight, bias, norm_weight, norm_bias))
    y = x @ weight.T + bias.repeat_interleave(x.shape[0] // bias.shape[0], dim=0)
    return F.mish(F.layer_norm(y, (y.shape[1],), norm_weight, norm_bias, eps))


@torch.library.custom_op("m3po::linear_norm_mish", mutates_args=("out",))
def linear_norm_mish(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float,
    out: torch.Tensor,
) -> None:
    """``out = Mish(LayerNorm(x @ weight.T + bias[row // (R / G)]))`` on CUDA.

    Products are summed in float32 ("ieee", no TF32), and the moments are those of the float32 sums. Between the two
    passes the linear output is held in ``out``, in its type. Fast if K, the row strides and the addresses are multiples
    of 16 bytes; else tiles are loaded element by element (pad with columns of zeros).

    Args:
        x: Inputs, shape (R, K), float32 or bfloat16; contiguous rows, any row stride.
        weight: Weights, shape (W, K), type of ``x``; contiguous rows, any row stride.
        bias: Biases, shape (G, W), contiguous; G divides R, and R / G consecutive rows share a bias.
        norm_weight: Scale of the LayerNorm, shape (W,).
        norm_bias: Shift of the LayerNorm, shape (W,).
        eps: Added to the variance.
        out: Result, shape (R, W), float32 or bfloat16; contiguous rows, any row stride; must not overlap an input.

    Raises:
        ValueError: If shapes, strides or types do not fit.
        RuntimeError: If a tensor is not on a CUDA device.
    """
    for name, matrix in (("x", x), ("weight", weight), ("out", out)):
        require_rows(name, matrix)
    (rows, in_dim), width, groups = x.shape, weight.shape[0], bias.shape[0]
    require(weight.shape[1] == in_dim, f"weight must have {in_dim} columns like x, got {weight.shape[1]}.")
    require(weight.dtype == x.dtype, f"weight must have the type of x, {x.dtype}, got {weight.dtype}.")
    require(out.shape == (rows, width), f"out must have shape {(rows, width)}, got {tuple(out.shape)}.")
    require(
        bias.ndim == 2 and bias.is_contiguous() and bias.shape[1] == width and rows % groups == 0,
        f"bias must be contiguous, of shape (G, {width}), G a divisor of the {rows} rows; got {tuple(bias.shape)}.",
    )
    require(
        norm_weight.shape == norm_bias.shape == (width,) and norm_weight.is_contiguous() and norm_bias.is_contiguous(),
        f"norm_weight and norm_bias must be contiguous, of shape ({width},).",
    )
    spec = compile_spec(x.dtype, in_dim, width, groups > 1, out.dtype, (x.stride(0), weight.stride(0), out.stride(0)))
    programs = -(-rows // spec.constexprs["BLOCK_M"])
    launch(spec, programs, x, weight, bias, norm_weight, norm_bias, out, rows, rows // groups, eps)


@linear_norm_mish.register_fake
def _(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float,
    out: torch.Tensor,
) -> None:
    """The result is in ``out``."""


def compile_spec(
    dtype: torch.dtype,
    in_dim: int,
    width: int,
    grouped: bool,
    out_dtype: torch.dtype | None = None,
    strides: tuple[int, int, int] | None = None,
) -> CompileSpec:
    """Configuration of the kernel for inputs of a type and shape, with float32 biases.

    Args:
        dtype: Type of ``x`` and ``weight``.
        in_dim: Input dimensions K.
        width: Output dimensions W.
        grouped: Whether there is more than one bias (G > 1).
        out_dtype: Type of ``out``; that of the inputs by default.
        strides: Row strides of ``x``, ``weight`` and ``out``; contiguous by default.
    """
    x_stride, weight_stride, out_stride = strides or (in_dim, in_dim, width)
    inputs = pointer(dtype)
    tile_rows, tile_columns, tile_depth = TILES[dtype]
    return CompileSpec(
        kernel=_kernel,
        signature={
            "x_ptr": inputs,
            "weight_ptr": inputs,
            "bias_ptr": "*fp32",
            "norm_weight_ptr": "*fp32",
            "norm_bias_ptr": "*fp32",
            "out_ptr": pointer(out_dtype or dtype),
            "num_rows": "i32",
            "rows_per_group": "i32",
            "eps": "fp32",
        },
        constexprs={
            "X_STRIDE": x_stride,
            "WEIGHT_STRIDE": weight_stride,
            "OUT_STRIDE": out_stride,
            "IN_DIM": in_dim,
            "WIDTH": width,
            "GROUPED": grouped,
            "BLOCK_M": tile_rows,
            "BLOCK_N": tile_columns,
            "BLOCK_K": min(tile_depth, max(16, power_of_two(in_dim))),
        },
        options={"num_warps": 8, "num_stages": 3},
    )


@jit()
def _mish(y: tl.tensor) -> tl.tensor:
    # tanh(log(1 + w)) with w = exp(y) is n / (n + 2) with n = w (w + 2); beyond 20 it is 1 in float32.
    w = tl.exp(tl.minimum(y, 20.0))
    n = w * (w + 2.0)
    return y * (n / (n + 2.0))


@jit(do_not_specialize=("num_rows", "rows_per_group"))
def _kernel(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    norm_weight_ptr: tl.tensor,
    norm_bias_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_rows: tl.tensor,
    rows_per_group: tl.tensor,
    eps: tl.tensor,
    X_STRIDE: tl.constexpr,
    WEIGHT_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    IN_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUPED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    first = tl.program_id(0) * BLOCK_M
    rows = tl.arange(0, BLOCK_M)
    depth = tl.arange(0, BLOCK_K)
    valid_rows = rows < num_rows - first
    # Loads beyond the last row or column repeat the last one, which costs fewer registers than a mask.
    safe_rows = tl.minimum(rows, num_rows - first - 1)
    group = (first + safe_rows) // rows_per_group
    x_ptr += first.to(tl.int64) * X_STRIDE
    out_ptr += first.to(tl.int64) * OUT_STRIDE

    mean = tl.zeros((BLOCK_M,), tl.float32)
    squares = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, WIDTH, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        safe_columns = tl.minimum(columns, WIDTH - 1)
        x = x_ptr + safe_rows[:, None] * X_STRIDE + depth[None, :]
        weight = weight_ptr + safe_columns[None, :] * WEIGHT_STRIDE + depth[:, None]
        # The accumulator starts as the bias: added afterwards, its addresses would be held beside the sums.
        bias = bias_ptr + columns[None, :]
        if GROUPED:
            bias += group[:, None] * WIDTH
        y = tl.load(bias, mask=(columns < WIDTH)[None, :], other=0.0).to(tl.float32)
        y = tl.broadcast_to(y, (BLOCK_M, BLOCK_N))
        for k in range(0, IN_DIM, BLOCK_K):
            if IN_DIM % BLOCK_K == 0:
                a, b = tl.load(x), tl.load(weight)
            else:
                a = tl.load(x, mask=depth[None, :] < IN_DIM - k, other=0.0)
                b = tl.load(weight, mask=depth[:, None] < IN_DIM - k, other=0.0)
            y = tl.dot(a, b, y, input_precision="ieee")
            x += BLOCK_K
            weight += BLOCK_K
        count = tl.minimum(BLOCK_N, WIDTH - start).to(tl.float32)
        valid = (columns < WIDTH)[None, :]
        tile_mean = tl.sum(tl.where(valid, y, 0.0), 1) / count
        deviation = tl.where(valid, y - tile_mean[:, None], 0.0)
        delta, share = tile_mean - mean, count / (start + count)
        mean += delta * share
        squares += tl.sum(deviation * deviation, 1) + delta * delta * share * start
        tl.store(out_ptr + rows[:, None] * OUT_STRIDE + columns[None, :], y, mask=valid_rows[:, None] & valid)

    # Gathered in their own order, the moments lose the layout of the accumulators. With it, the compiler would move
    # every tile below through shared memory twice instead of moving the moments once.
    mean = tl.gather(mean, rows, 0)
    scale = tl.gather(tl.rsqrt(squares / WIDTH + eps), rows, 0)
    tl.debug_barrier()  # other threads of this program wrote what is read now
    for start in range(0, WIDTH, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        mask = valid_rows[:, None] & (columns < WIDTH)[None, :]
        out = out_ptr + rows[:, None] * OUT_STRIDE + columns[None, :]
        norm_weight = tl.load(norm_weight_ptr + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
        norm_bias = tl.load(norm_bias_ptr + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
        y = (tl.load(out, mask=mask, other=0.0).to(tl.float32) - mean[:, None]) * scale[:, None]
        tl.store(out, _mish(y * norm_weight[None, :] + norm_bias[None, :]), mask=mask)
