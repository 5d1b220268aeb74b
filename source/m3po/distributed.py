"""Several processes that train one agent: who they are, and what they exchange.

``torchrun`` starts one process per GPU (or any number on a CPU) and names them in the environment; :func:`group`
connects them. In one process every function returns what it was given, bit for bit, so that nothing needs a second code
path. All processes of a group must make the same calls in the same order.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import time
import uuid
from collections.abc import Generator
from typing import Any

import torch
import warp as wp
from torch import distributed

from m3po.errors import UserError

TORCHRUN_HELP = "./isaaclab.sh -p -m torch.distributed.run --nproc_per_node N scripts/train.py ... --distributed"
"""How several processes are started, for messages."""


# -- who we are -------------------------------------------------------------------------------------------------------


def started_by_torchrun() -> int:
    """Processes that the environment speaks of; 1 where nobody started several."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_connected() -> bool:
    """Whether this process belongs to a group, be it the only one in it."""
    return distributed.is_initialized()


def world_size() -> int:
    """Processes of the group; 1 without one."""
    return distributed.get_world_size() if is_connected() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return distributed.get_rank() if is_connected() else 0


def is_main() -> bool:
    """Whether this process writes files, prints and evaluates."""
    return rank() == 0


def own_share(count: int) -> list[bool]:
    """Which of a number of things are left to this process, dealt out in turn; also before the group is connected."""
    size, number = started_by_torchrun(), int(os.environ.get("RANK", "0"))
    return [k % size == number for k in range(count)]


def check_start(wanted: bool) -> None:
    """Compare ``--distributed`` with how this process was started.

    Raises:
        UserError: If processes were started that would not be connected, none were that could be, or rsl_rl is too old.
    """
    if wanted and "WORLD_SIZE" not in os.environ:
        raise UserError(f"--distributed connects the processes that torchrun starts: {TORCHRUN_HELP}")
    if wanted and (version := importlib.metadata.version("rsl-rl-lib")).startswith("5.4."):
        raise UserError(f"--distributed needs rsl-rl-lib 5.5: the normalisers of {version} know one process alone.")
    if not wanted and (count := started_by_torchrun()) > 1:
        raise UserError(
            f"this is one of {count} processes, which would train {count} agents that know nothing of each other: "
            "add --distributed, or run a single process."
        )


def local_device(device: str) -> str:
    """The device of this process: the CPU, or the GPU with the number of the process on its machine.

    Args:
        device: ``cpu``, or any CUDA device; its index does not count.

    Raises:
        UserError: If the machine has fewer GPUs than processes.
    """
    if device == "cpu":
        return device
    index, available = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if index >= available:
        count = os.environ.get("LOCAL_WORLD_SIZE", index + 1)
        raise UserError(
            f"{count} processes on this machine need a GPU each, but torch sees {available}. "
            f"Start fewer (--nproc_per_node {available}), or use --device cpu."
        )
    return f"cuda:{index}"


@contextlib.contextmanager
def group(wanted: bool, device: str) -> Generator[None]:
    """Connect the processes that torchrun has started; the connection ends with the context.

    All but the first are silent on stdout; stderr stays everybody's.

    Args:
        wanted: Otherwise this process stays alone.
        device: Device of this process; NCCL connects GPUs, gloo connects CPUs and what lies in host memory.
    """
    if not wanted:
        yield
        return
    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.set_device(device)
        wp.set_device(device)
    store, number, size = next(distributed.rendezvous("env://"))
    store = _unused_part(store, number, size)
    distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=number, world_size=size)
    with contextlib.ExitStack() as stack:
        if not is_main():
            silence = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(silence))
        yield
        # Not after an error: with a process missing, to take leave of it could take for ever.
        distributed.destroy_process_group()


def _unused_part(store: distributed.Store, number: int, size: int) -> distributed.Store:
    """A part of torchrun's store that no earlier attempt has written to, the same one in all processes.

    torchrun keeps its store when it restarts the processes, and torch 2.11 would read the addresses of the dead there.
    So the first process makes a name up, the others answer with names of their own until they find them confirmed:
    nothing that an earlier attempt has left can contain those.
    """
    own = uuid.uuid4().hex
    if number == 0:
        store.set("m3po/name", own)
        answers = [f"m3po/{own}/{other}" for other in range(1, size)]
        store.wait(answers)
        store.set(f"m3po/{own}", b" ".join(store.get(answer) for answer in answers).decode())
        return distributed.PrefixStore(own, store)
    deadline = time.monotonic() + store.timeout.total_seconds()  # ty: ignore[missing-attribute]  # missing in torch's stubs
    while time.monotonic() < deadline:
        name = store.get("m3po/name").decode()
        store.set(f"m3po/{name}/{number}", own)
        if store.check([f"m3po/{name}"]) and own in store.get(f"m3po/{name}").decode().split():
            return distributed.PrefixStore(name, store)
        time.sleep(0.02)
    raise TimeoutError("the first process did not answer.")


def child_environment() -> dict[str, str]:
    """Environment variables for a process of our own that is not one of the group."""
    return {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}


# -- what we exchange -------------------------------------------------------------------------------------------------


def total(x: torch.Tensor) -> torch.Tensor:
    """Sum over the processes, same shape."""
    if world_size() == 1:
        return x
    x = x.clone()
    distributed.all_reduce(x)
    return x


def mean(x: torch.Tensor, weight: float = 1.0) -> torch.Tensor:
    """Mean over the processes, weighted by what each of them counts for; same shape."""
    if world_size() == 1:
        return x
    sums = total(torch.cat((x.flatten() * weight, x.new_tensor([weight]))))
    return (sums[:-1] / sums[-1]).view_as(x)


def means(values: dict[str, float], device: torch.device | str, weight: float = 1.0) -> dict[str, float]:
    """:func:`mean` of numbers by name, the same names in every process; they are exchanged through ``device``."""
    if world_size() == 1:
        return values
    averages = mean(torch.tensor([*values.values()], dtype=torch.float64, device=device), weight)
    return dict(zip(values, averages.tolist(), strict=True))


def gather(rows: torch.Tensor) -> torch.Tensor:
    """Rows of all processes in order of their rank, (B, ...) -> (sum of B, ...); B may differ."""
    if world_size() == 1:
        return rows
    sizes = total(_at_own_place(len(rows), rows.device)).tolist()
    if max(sizes) == 0:
        return rows
    padded = rows.new_zeros(max(sizes), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in sizes]
    distributed.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def moments(rows: torch.Tensor) -> tuple[int, torch.Tensor, torch.Tensor]:
    """Number, mean and variance (biased) of the rows (B, D) of all processes; () of none is 0."""
    if world_size() == 1 and len(rows) > 0:
        return len(rows), rows.mean(0), rows.var(0, unbiased=False)
    sums = total(torch.cat((rows.double().sum(0), rows.new_tensor([len(rows)]).double())))
    count = int(sums[-1])
    average = sums[:-1] / max(1, count)
    variance = total((rows - average).square().sum(0)) / max(1, count)
    return count, average.to(rows.dtype), variance.to(rows.dtype)


def rows_before(count: int, device: torch.device | str) -> int:
    """Sum of ``count`` over the processes of lower rank: where the rows of this process begin among all."""
    return int(total(_at_own_place(count, device))[: rank()].sum()) if world_size() > 1 else 0


def _at_own_place(value: int, device: torch.device | str) -> torch.Tensor:
    """``value`` at the place of this process among zeros, (number of processes,), int64."""
    values = torch.zeros(world_size(), dtype=torch.long, device=device)
    values[rank()] = value
    return values


def average_gradients(optimizer: torch.optim.Optimizer, weight: float = 1.0) -> None:
    """Average the gradients of an optimiser's parameters over the processes, in one exchange.

    Args:
        optimizer: Its parameters have been through ``backward``, the same ones in every process.
        weight: What the gradient of this process counts for, for example the number of samples behind it.
    """
    if world_size() == 1:
        return
    gradients = [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    parts = mean(flat, weight).split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))


def shared[Value](value: Value) -> Value:
    """What the first process has, for all: any picklable value."""
    if world_size() == 1:
        return value
    box = [value]
    distributed.broadcast_object_list(box, src=0)
    return box[0]


def collected[Value](value: Value) -> list[Value]:
    """What each process has, in order of rank: any picklable value."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    distributed.all_gather_object(values, value)
    return values
