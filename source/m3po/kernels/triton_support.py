"""What the Triton kernels share: an import that may fail, launch configurations, checks and the launch itself.

A kernel's configuration is one :class:`CompileSpec`. The launcher and the ahead-of-time tests read the same one, so
that what is proven to build without a GPU is what runs on one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

try:
    import triton
except ImportError:  # torch for CPUs comes without Triton, and the references need none
    triton = None

_POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}


class CompileSpec(NamedTuple):
    """What ``triton.compile`` needs to build a kernel as its launcher does; pointers are multiples of 16 bytes."""

    kernel: Any
    """The ``triton.jit`` function."""

    signature: dict[str, str]
    """Type of every argument that is not a constant, in order: ``*fp32``, ``*bf16``, ``i32``, ``fp32``."""

    constexprs: dict[str, Any]
    """Values of the compile-time constants."""

    options: dict[str, int]
    """``num_warps`` and ``num_stages``."""


def jit(do_not_specialize: tuple[str, ...] = ()) -> Callable[[Callable], Any]:
    """``triton.jit`` where Triton is installed.

    Args:
        do_not_specialize: Integers whose value must not lead to another build, such as the number of rows.
    """
    if triton is None:
        return lambda function: function
    return triton.jit(do_not_specialize=list(do_not_specialize))


def pointer(dtype: torch.dtype) -> str:
    """Triton's name of a pointer to a float32 or bfloat16.

    Raises:
        ValueError: For another type.
    """
    if dtype not in _POINTERS:
        raise ValueError(f"The Triton kernels know float32 and bfloat16, got {dtype}.")
    return _POINTERS[dtype]


def power_of_two(n: int) -> int:
    """Smallest power of two that is at least ``n``."""
    return 1 << (n - 1).bit_length()


def require(ok: bool, message: str) -> None:
    """Raise a ``ValueError`` unless ``ok``."""
    if not ok:
        raise ValueError(message)


def require_rows(name: str, x: torch.Tensor) -> None:
    """Refuse what is not a matrix whose rows are contiguous; the rows may lie any distance apart."""
    require(
        x.ndim == 2 and (x.stride(1) == 1 or x.shape[1] == 1),
        f"{name} must be a matrix with contiguous rows, got shape {tuple(x.shape)}, strides {x.stride()}.",
    )


def launch(spec: CompileSpec, programs: int, *args: Any) -> None:
    """Run a kernel on the device of its tensors and on torch's current stream.

    Args:
        spec: Configuration of the kernel.
        programs: Size of the one-dimensional grid.
        args: Arguments in the order of the signature.

    Raises:
        RuntimeError: Without Triton, or if a tensor is not on a CUDA device (Triton's interpreter excepted).
    """
    if triton is None:
        raise RuntimeError("This kernel needs Triton, which is not installed; use its torch reference.")
    tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
    if not triton.knobs.runtime.interpret and not all(tensor.is_cuda for tensor in tensors):
        devices = ", ".join(sorted({str(tensor.device) for tensor in tensors}))
        raise RuntimeError(f"This Triton kernel runs on CUDA, got tensors on {devices}; use its torch reference.")
    with torch.cuda.device_of(tensors[0]):
        spec.kernel[(programs,)](*args, **spec.constexprs, **spec.options)
