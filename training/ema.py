"""The averaged generator: an exponential moving average of G's weights, used for samples. No training happens here."""

import copy

import torch
from torch import Tensor, nn

from models.types import Generator


class EMA:
    """Keeps `module`, a copy of the generator whose weights follow it slowly; batch norm's statistics are copied.

    decay: how much of the old average an update keeps, from 0 to below 1. Early on it is lower, (1 + n) / (10 + n) after
        n updates, so that the random start is forgotten also in short runs.
    share: the average covers about this share of the n updates so far, however many a time budget allows: decay is at most
        n·share / (1 + n·share); 0: no such limit.
    """

    def __init__(self, generator: Generator, decay: float, share: float = 0.0):
        self.decay, self.share = decay, share
        self.num_updates = 0
        self.module: Generator = copy.deepcopy(generator).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, generator: nn.Module) -> None:
        """Move the average towards the generator's present weights."""
        # The decay is lower at first, and limited by `share`.
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        if self.share:
            decay = min(decay, self.num_updates * self.share / (1 + self.num_updates * self.share))
        self.num_updates += 1

        # Weights follow slowly; batch norm's statistics are copied.
        averages: list[Tensor] = list(self.module.parameters())
        values = [p.detach() for p in generator.parameters()]
        torch._foreach_lerp_(averages, values, 1 - decay)
        for average, value in zip(self.module.buffers(), generator.buffers(), strict=True):
            average.copy_(value)
