"""SimNorm of the residual dynamics in one kernel, without temporaries and in place if wanted.

Source: SimNorm, arXiv 2310.16828, section 3.1, as :class:`m3po.models.layers.SimNorm` writes it out; the residual form
is that of :meth:`m3po.models.world_model.WorldModel.predict`.
"""

from __future__ import annotations

import torch

from m3po.kernels.triton_support import CompileSpec, jit, launch, pointer, power_of_two, require, require_rows
from m3po.models.layers import SimNorm

try:
    import triton.language as tl
except ImportError:
    tl = None

BLOCK = 2048
"""Latent dimensions per program: 16 per thread."""


def residual_simnorm_reference(
    update: torch.Tensor, base: torch.Tensor | None, group_size: int, floor: float = 1e-3
) -> torch.Tensor:
    """Torch reference of :func:`residual_simnorm` in float32; same arguments, returns shape (R, Z)."""
    return SimNorm(group_size)(update.float(), None if base is None else base.float() + floor)


@torch.library.custom_op("m3po::residual_simnorm", mutates_args=("out",))
def residual_simnorm(
    update: torch.Tensor, base: torch.Tensor | None, group_size: int, out: torch.Tensor, floor: float = 1e-3
) -> None:
    """``out = softmax(log(base + floor) + clamp(update, -20, 20))`` over groups of columns, on CUDA.

    Args:
        update: Logits, shape (R, Z), float32 or bfloat16; contiguous rows, any row stride.
        base: Latents that the update starts from, shape (R, Z), in [0, 1]; contiguous rows, any row stride. ``None``
            stands for ones: the softmax of the update itself.
        group_size: Columns that sum to 1; a power of two that divides Z.
        out: Latents, shape (R, Z), float32 or bfloat16; contiguous rows, any row stride; may be ``base``.
        floor: Added to ``base``, so that dimensions that are off stay within reach of an update.

    Raises:
        ValueError: If shapes, strides or types do not fit, or if the group size is not a power of two.
        RuntimeError: If a tensor is not on a CUDA device.
    """
    for name, matrix in (("update", update), ("out", out), ("base", update if base is None else base)):
        require_rows(name, matrix)
        require(matrix.shape == update.shape, f"{name} must have update's shape, got {tuple(matrix.shape)}.")
    rows, latent_dim = update.shape
    start = out if base is None else base
    strides = (update.stride(0), start.stride(0), out.stride(0))
    spec = compile_spec(update.dtype, latent_dim, group_size, base is not None, start.dtype, out.dtype, strides)
    num_groups = rows * (latent_dim // group_size)
    launch(spec, -(-num_groups * group_size // BLOCK), update, start, out, num_groups, floor)


@residual_simnorm.register_fake
def _(update: torch.Tensor, base: torch.Tensor | None, group_size: int, out: torch.Tensor, floor: float = 1e-3) -> None:
    """The result is in ``out``."""


def compile_spec(
    dtype: torch.dtype,
    latent_dim: int,
    group_size: int,
    residual: bool = True,
    base_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
    strides: tuple[int, int, int] | None = None,
) -> CompileSpec:
    """Configuration of the kernel for a type and shape.

    Args:
        dtype: Type of ``update``.
        latent_dim: Latent dimensions Z.
        group_size: Columns that sum to 1; a power of two that divides Z, at most :data:`BLOCK`.
        residual: Whether there is a ``base``.
        base_dtype: Type of ``base``; that of ``update`` by default.
        out_dtype: Type of ``out``; that of ``update`` by default.
        strides: Row strides of ``update``, ``base`` and ``out``; contiguous by default.
    """
    require(
        1 <= group_size <= BLOCK and group_size == power_of_two(group_size) and latent_dim % group_size == 0,
        f"group_size must be a power of two that divides the {latent_dim} latent dimensions, got {group_size}.",
    )
    update_stride, base_stride, out_stride = strides or (latent_dim,) * 3
    return CompileSpec(
        kernel=_kernel,
        signature={
            "update_ptr": pointer(dtype),
            "base_ptr": pointer(base_dtype or dtype),
            "out_ptr": pointer(out_dtype or dtype),
            "num_groups": "i32",
            "floor": "fp32",
        },
        constexprs={
            "UPDATE_STRIDE": update_stride,
            "BASE_STRIDE": base_stride,
            "OUT_STRIDE": out_stride,
            "GROUPS_PER_ROW": latent_dim // group_size,
            "GROUP": group_size,
            "RESIDUAL": residual,
            "BLOCK_GROUPS": BLOCK // group_size,
        },
        options={"num_warps": 4, "num_stages": 1},
    )


@jit(do_not_specialize=("num_groups",))
def _kernel(
    update_ptr: tl.tensor,
    base_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_groups: tl.tensor,
    floor: tl.tensor,
    UPDATE_STRIDE: tl.constexpr,
    BASE_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    GROUPS_PER_ROW: tl.constexpr,
    GROUP: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
) -> None:
    groups = tl.program_id(0) * BLOCK_GROUPS + tl.arange(0, BLOCK_GROUPS)
    mask = (groups < num_groups)[:, None]
    rows = (groups // GROUPS_PER_ROW).to(tl.int64)[:, None]
    columns = (groups % GROUPS_PER_ROW * GROUP)[:, None] + tl.arange(0, GROUP)[None, :]

    logits = tl.load(update_ptr + rows * UPDATE_STRIDE + columns, mask=mask, other=0.0).to(tl.float32)
    weight = tl.exp(tl.clamp(logits, -20.0, 20.0, propagate_nan=tl.PropagateNan.ALL))
    if RESIDUAL:
        weight *= tl.load(base_ptr + rows * BASE_STRIDE + columns, mask=mask, other=0.0).to(tl.float32) + floor
    total = tl.sum(weight, 1)
    tl.store(out_ptr + rows * OUT_STRIDE + columns, weight / total[:, None], mask=mask)
