"""How far a training is: which share of its steps or minutes is used up, and the learning rates that follow from it.

Steps are a function of the settings alone, so such runs resume bit for bit. Minutes are not: a resumed run keeps count of
the time that it has used, but a faster machine takes more steps in it.
"""

import time
from collections.abc import Callable, Mapping

import torch

from miscc import distributed
from miscc.distributed import World


class Budget:
    """The steps and minutes that a training may take, whichever are used up first.

    last_step: the step it ends at.
    max_minutes: wall time of the loop, pictures and checkpoints included; 0: no limit.
    seconds_before: used by the run before it was resumed.
    clock: monotonic, in seconds.
    """

    def __init__(
        self,
        last_step: int,
        max_minutes: float = 0.0,
        seconds_before: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.last_step, self.max_seconds = last_step, 60 * max_minutes
        self.seconds_before, self.clock = seconds_before, clock
        self.started: float | None = None
        self.agreed = seconds_before  # seconds that all processes count with

    def start(self) -> None:
        """The loop begins."""
        self.started = self.clock()

    @property
    def seconds(self) -> float:
        """Used up so far, by this process's clock."""
        return self.seconds_before + (0.0 if self.started is None else self.clock() - self.started)

    def agree(self, world: World) -> None:
        """Read the clock. All processes must call it at the same step; all then use the same reading."""
        if self.max_seconds:
            reading = torch.tensor(self.seconds, dtype=torch.float64, device=world.device)
            self.agreed = distributed.average({"seconds": reading}, world)["seconds"].item()

    def share(self, step: int) -> float:
        """The share of the budget that is used up after `step` steps, 0 to 1."""
        shares = [step / self.last_step] if self.last_step else [1.0]
        if self.max_seconds:
            shares.append(self.agreed / self.max_seconds)
        return min(1.0, max(shares))

    def is_over(self, step: int) -> bool:
        """Whether the training ends after `step` steps."""
        return self.share(step) >= 1


def learning_rate_factor(share: float, decay_from: float) -> float:
    """1 up to the share `decay_from` of the budget, from there linearly to 0 at its end; decay_from 1: always 1."""
    return 1.0 if share <= decay_from else (1 - share) / (1 - decay_from)


def set_learning_rates(
    optimizers: Mapping[str, torch.optim.Optimizer], base: Mapping[str, float], factor: float
) -> None:
    """Each optimizer's rate is its base rate times `factor`."""
    for name, optimizer in optimizers.items():
        for group in optimizer.param_groups:
            group["lr"] = base[name] * factor
