"""Context managers for how a network computes: evaluation mode, no gradients of parameters, full precision."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def no_tf32() -> Iterator[None]:
    """float32 without TF32, which GPUs use for convolutions by default and which keeps only three digits."""
    backends: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.cuda.matmul)  # torch declares no types for them
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = False
        yield
    finally:
        for backend, allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = allowed


@contextmanager
def no_parameter_grad(*modules: nn.Module) -> Iterator[None]:
    """`with no_parameter_grad(D):` D's parameters take no gradient inside.

    G's step then does not compute D's weight gradients; G's own gradients are the same bit for bit.
    """
    # Parameters that were frozen before stay frozen afterwards.
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """`with full_precision(images.device):` no autocast and nothing compiled inside.

    For what is differentiated twice, which compiled code does not support, and for penalties, whose high power amplifies
    rounding.
    """
    kind = "cpu" if device.type == "meta" else device.type  # autocast knows no meta device
    with torch.autocast(kind, enabled=False), torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def eval_mode(*modules: nn.Module) -> Iterator[None]:
    """`with eval_mode(G):` eval mode inside, the former mode afterwards."""
    modes = [module.training for module in modules]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.train(mode)


def device_of(module: nn.Module) -> torch.device:
    """The device of a network's parameters."""
    return next(module.parameters()).device
