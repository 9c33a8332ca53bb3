"""How networks compute: memory layout, compiled methods, activations computed again; same values, other costs. Peak memory."""

import copy
import functools
import resource
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from miscc.errors import ConfigError
from models.types import Generator, Network


def use_channels_last(networks: Mapping[str, nn.Module]) -> None:
    """Store each pixel's channels together, which is faster on GPUs in bf16. Call it before copies and optimizers are made."""
    for network in networks.values():
        network.to(memory_format=torch.channels_last)


def compile_networks(networks: Mapping[str, Network]) -> None:
    """Let torch.compile fuse the methods that each network declares (`compiled_methods`).

    A generator with checkpointed activations is left out: the compiler cannot follow batch statistics that are restored.
    A gradient penalty runs uncompiled (models.modes.full_precision), as compilers cannot differentiate twice.
    """
    for network in networks.values():
        # A generator with checkpointed activations, see above.
        if any(isinstance(vars(module).get("forward"), _Recomputed) for module in network.modules()):
            continue

        # Part by part: AttnGAN's discriminator is made of several networks.
        for module in network.modules():
            for name in module.compiled_methods if isinstance(module, Network) else ():
                if name == "forward":
                    module.compile()
                else:
                    setattr(module, name, torch.compile(getattr(module, name)))


def checkpoint_activations(generator: Generator) -> int:
    """Keep only the inputs of G's blocks and compute the rest again in the backward pass; returns the number of blocks.

    Less memory, a third more time for G, the same gradients. Raises ConfigError where G declares no blocks.
    """
    blocks = generator.activation_blocks()
    if not blocks:
        raise ConfigError("TRAIN.ACTIVATION_CHECKPOINTING: this generator has no blocks to compute again; leave it off")
    for block in blocks:
        block.forward = _Recomputed(block)
    return len(blocks)


def peak_memory_mib(device: torch.device) -> float:
    """Peak memory so far in MiB: of the GPU, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


class _Recomputed:
    """A block's forward that keeps its inputs alone."""

    def __init__(self, block: nn.Module):
        self.block = block

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        forward = functools.partial(type(self.block).forward, self.block, **options)
        if not torch.is_grad_enabled():
            return forward(*inputs)
        return checkpoint(forward, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), self._again()))

    def __deepcopy__(self, memo: dict) -> "_Recomputed":
        return _Recomputed(copy.deepcopy(self.block, memo))

    @contextmanager
    def _again(self) -> Iterator[None]:
        """Let batch norm write into copies of its statistics while a block runs again: a batch must not count twice."""
        norms = [part for part in self.block.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
        kept = [(part, dict(part._buffers)) for part in norms]
        for part, buffers in kept:
            part._buffers.update({name: None if value is None else value.clone() for name, value in buffers.items()})
        try:
            yield
        finally:
            for part, buffers in kept:
                part._buffers.update(buffers)
