"""Devices, processes and their gradients: the only place that asks which GPU."""

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from miscc.errors import ConfigError, TrainingError

# The other processes wait while the main one draws and scores thousands of images; torch would give up after 10 minutes.
LONGEST_WAIT = timedelta(hours=4)

Module = TypeVar("Module", bound=nn.Module)
Shared = TypeVar("Shared")


class World(NamedTuple):
    """The processes that train together.

    rank: of this process; rank 0 writes files
    size: number of processes
    device: of this process
    """

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def choose_device(gpu: int | None = None, cuda: bool = True) -> torch.device:
    """The device that a user means by `--gpu N`: -1 the CPU, None a GPU if there is one. Raises ConfigError."""
    if not cuda or gpu == -1:
        return torch.device("cpu")
    if gpu is None:
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")

    # A number must be that of a GPU here.
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not 0 <= gpu < count:
        there = f"GPUs here: 0 to {count - 1}" if count else "no CUDA GPU is usable here"
        raise ConfigError(f"--gpu {gpu}: {there}; use --gpu -1 for the CPU")
    return torch.device("cuda", gpu)


def launched() -> bool:
    """Whether torchrun started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def refuse_several_processes(what: str) -> None:
    """Raises ConfigError under torchrun: each process would write the same files."""
    if launched():
        raise ConfigError(f"{what} runs in one process; start it without torchrun")


def start(gpu: int | None = None, cuda: bool = True) -> World:
    """Join the processes that torchrun started (one a GPU, or on CPUs with `--gpu -1`); alone otherwise."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        device = choose_device(gpu, cuda)
        if device.type == "cuda":
            torch.cuda.set_device(device)
            _allow_tf32()
        return World(0, 1, device)

    # One of several: the GPU of its rank on this machine, or the CPU.
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    on_gpu = cuda and gpu != -1 and torch.cuda.is_available()
    if on_gpu and local_rank >= (count := torch.cuda.device_count()):
        raise ConfigError(f"process {local_rank} has no GPU: start at most {count} processes here, or use --gpu -1")
    device = choose_device(local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
        _allow_tf32()
    if not dist.is_initialized():
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=LONGEST_WAIT)
    return World(dist.get_rank(), size, device)


def stop() -> None:
    """Leave the process group, if this process is in one."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def naming_lost_processes(
    world: World, remedy: str = "the last checkpoint is kept, go on with --resume"
) -> Iterator[None]:
    """Inside, the error of a message to a process that has ended becomes a TrainingError of one line."""
    try:
        yield
    except RuntimeError as error:
        text = " ".join(str(error).split())
        is_message = isinstance(error, dist.DistError) or re.search(r"gloo|nccl|connection", text, re.IGNORECASE)
        if world.size == 1 or not is_message:
            raise
        raise TrainingError(
            f"process {world.rank} of {world.size}: another process has ended, or cannot be reached ({text[:120]}); {remedy}"
        ) from None


def average_gradients(parameters: Iterable[nn.Parameter], world: World) -> None:
    """Replace every gradient by its mean over the processes. Parameters without a gradient are left alone.

    Called after backward, as DistributedDataParallel hooks into backward itself: it cannot follow a gradient penalty's
    double backward, nor the generator's graph that outlives D's step.
    """
    if world.size == 1:
        return

    # One message for all gradients of a dtype.
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    for dtype in {gradient.dtype for gradient in gradients}:
        same = [gradient for gradient in gradients if gradient.dtype == dtype]
        flat = torch.cat([gradient.flatten() for gradient in same])
        dist.all_reduce(flat)
        flat /= world.size

        # Back to where they came from.
        for gradient, mean in zip(same, flat.split([gradient.numel() for gradient in same]), strict=True):
            gradient.copy_(mean.view_as(gradient))


def average(values: dict[str, Tensor], world: World) -> dict[str, Tensor]:
    """The mean of each number over the processes, for the log."""
    if world.size == 1 or not values:
        return values

    # In one message, in an order that all processes share.
    names = sorted(values)
    stacked = torch.stack([torch.as_tensor(values[name], device=world.device).float() for name in names])
    dist.all_reduce(stacked)
    return dict(zip(names, stacked / world.size, strict=True))


def any_process(flag: bool, world: World) -> bool:
    """Whether the flag is set in at least one process."""
    if world.size == 1:
        return flag
    value = torch.tensor(float(flag), device=world.device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value.item())


def gather(value: Any, world: World) -> list[Any]:
    """At the main process the values of all processes, in the order of their ranks; at the others []."""
    if world.size == 1:
        return [value]
    values: list[Any] | None = [None] * world.size if world.is_main else None
    dist.gather_object(value, values, dst=0)
    return values or []


def share(value: Shared, world: World) -> Shared:
    """The main process's value, in all processes; numbers and texts, not tensors of a GPU."""
    if world.size == 1:
        return value
    values: list[Any] = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def wait_for_all(world: World) -> None:
    """Return when every process has called this."""
    if world.size > 1:
        dist.barrier()


def synchronise(module: Module, world: World) -> Module:
    """Give all processes rank 0's weights, and batch norm over the images of all of them."""
    if world.size == 1:
        return module

    # Batch norm: torch's own on GPUs, ours on CPUs, with the same parameters and buffers.
    if world.device.type == "cuda":
        module = cast(Module, nn.SyncBatchNorm.convert_sync_batchnorm(module))
    else:
        for part in module.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                part.__class__ = JointBatchNorm

    # Initial weights and running statistics of rank 0.
    for tensor in [*module.parameters(), *module.buffers()]:
        dist.broadcast(tensor.data, src=0)
    return module


class _SumOverProcesses(torch.autograd.Function):
    """Sum of a tensor over the processes, with gradient: each process's tensor contributes to every process's loss."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # pyrefly: ignore[bad-override]  # torch declares *grad_outputs
        return _SumOverProcesses.apply(grad)


class JointBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over the images of all processes for CPUs, where torch has none: (N, C, ...) of any rank, with gradient.

    Same parameters, buffers and values as torch's on the joint batch, and like there statistics in float32 for images of
    16 bits; every process must have as many images.
    """

    def _check_input_dim(self, x: Tensor) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training or self.running_mean is None):
            return super().forward(x)

        # At least float32, as torch does: under autocast x has 16 bits, the running statistics have 32.
        dtype, x = x.dtype, x.to(torch.promote_types(x.dtype, torch.float32))

        # Mean and variance over everything but the channels, of all processes.
        others = [d for d in range(x.dim()) if d != 1]
        shape = [-1 if d == 1 else 1 for d in range(x.dim())]
        number = x.numel() // x.shape[1] * dist.get_world_size()
        mean = _SumOverProcesses.apply(x.sum(dim=others)) / number
        centred = x - mean.view(shape)
        variance = _SumOverProcesses.apply(centred.square().sum(dim=others)) / number

        # Normalise, follow the running statistics, scale and shift: as torch does.
        normalised = centred * (variance + self.eps).rsqrt().view(shape)
        if self.training and self.track_running_stats:
            self._update_running(mean.detach(), variance.detach() * number / max(1, number - 1))
        if self.weight is None:
            return normalised.to(dtype)
        return (normalised * self.weight.view(shape) + self.bias.view(shape)).to(dtype)

    @torch.no_grad()
    def _update_running(self, mean: Tensor, variance: Tensor) -> None:
        """Momentum None: a plain mean of all batches."""
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(variance, share)


def processes_of(norm: nn.Module) -> int:
    """Number of processes whose images a batch norm averages over: 1 before `synchronise`."""
    return dist.get_world_size() if isinstance(norm, (nn.SyncBatchNorm, JointBatchNorm)) else 1


_MATCHING: ContextVar[World | None] = ContextVar("matching", default=None)


@contextmanager
def global_damsm(world: World) -> Iterator[None]:
    """Inside, `all_gather_with_grad` returns the rows of all processes, for losses that compare samples with each other."""
    token = _MATCHING.set(world)
    try:
        yield
    finally:
        _MATCHING.reset(token)


def all_gather_with_grad(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Inside `global_damsm` the rows (N, ...) of all processes, concatenated, with gradient; else the tensors as they are.

    All processes must have the same number of rows. The gradient is the sum over the processes, so that a loss over all
    rows counts once after gradients have been averaged.
    """
    world = _MATCHING.get()
    if world is None or world.size == 1:
        return tensors

    # Class ids and lengths may be on the CPU still, where NCCL gathers nothing.
    return tuple(
        _GatherRows.apply(tensor.to(world.device, non_blocking=True), world.rank, world.size) for tensor in tensors
    )


class _GatherRows(torch.autograd.Function):
    """all_gather along the first dimension, with gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, rank: int, size: int) -> Tensor:
        ctx.rows = slice(rank * len(x), (rank + 1) * len(x))
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(size)]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    @once_differentiable  # autograd does not see the message
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # pyrefly: ignore[bad-override]  # as above
        total = grad.clone(memory_format=torch.contiguous_format)  # autograd may hand the same gradient to others
        dist.all_reduce(total)
        return total[ctx.rows], None, None


def _allow_tf32() -> None:
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
