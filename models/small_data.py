"""What helps a discriminator that sees few images: LeCam's averages of its logits, and ADA's probability of augmenting.

Both remember former steps, so a checkpoint keeps their state. All tensors stay on the device; nothing here waits for it.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from miscc.distributed import mean_over_processes, num_processes
from miscc.errors import CheckpointError
from miscc.losses import lecam_loss

LECAM_DECAY = 0.99  # of the averages, a step, as published
ADA_INTERVAL = 4  # steps between two changes of the probability, as published


class StepMean:
    """The mean of some numbers over the micro-batches and processes of one training step, known when the next one begins."""

    def __init__(self) -> None:
        self.step, self.count = -1, 0
        self.total = torch.zeros(())

    def add(self, step: int, values: Tensor) -> None:
        """Add one micro-batch's means (K,); the mean of an earlier step must have been taken."""
        values = mean_over_processes(values.detach().float())
        self.step, self.total, self.count = step, values if self.count == 0 else self.total + values, self.count + 1

    def take(self, step: int) -> Tensor | None:
        """The mean (K,) of the step before this one, once; None where there is none."""
        if self.count == 0 or step == self.step:
            return None
        mean, self.count = self.total / self.count, 0
        return mean

    def state(self) -> dict[str, Any]:
        return {"step": self.step, "count": self.count, "total": self.total.tolist()}

    def restore(self, state: Mapping[str, Any], device: torch.device) -> None:
        self.step, self.count = int(state["step"]), int(state["count"])
        self.total = _finite(state["total"], device)


class LogitAverages:
    """Moving averages of a discriminator's mean logits of real and of fake pairs, for LeCam.

    averages: (2,), of real and fake; None until the first step has ended.
    """

    def __init__(self) -> None:
        self.averages: Tensor | None = None
        self.last = StepMean()

    def add(self, step: int, real: Tensor, fake: Tensor) -> None:
        """Take in the logits of one micro-batch, of any shape."""
        mean = self.last.take(step)
        if mean is not None:
            before = mean if self.averages is None else self.averages
            self.averages = LECAM_DECAY * before + (1 - LECAM_DECAY) * mean
        self.last.add(step, torch.stack([real.float().mean(), fake.float().mean()]))

    def loss(self, real: Tensor, fake: Tensor) -> Tensor:
        """LeCam's penalty of logits by the averages of the steps before; 0 in the first step of all."""
        if self.averages is None:
            return 0 * real.float().mean()
        return lecam_loss(real, fake, *self.averages.unbind())

    def state(self) -> dict[str, Any]:
        averages = None if self.averages is None else self.averages.tolist()
        return {"averages": averages, "last": self.last.state()}

    def restore(self, state: Mapping[str, Any], device: torch.device) -> None:
        averages = state["averages"]
        self.averages = None if averages is None else _finite(averages, device).reshape(2)
        self.last.restore(state["last"], device)


class AugmentationController:
    """Adaptive discriminator augmentation (Karras et al., NeurIPS 2020, arXiv 2006.06676, section 3.1).

    Every 4 steps the probability p moves by sign(r - target) · 4·B / num_images, within [0, 1]: r is the mean sign of D's
    logits of real pairs in these steps, which nears 1 where D overfits; B the images of a step.

    target: of r, 0.6 as published.
    num_images: in which p can go from 0 to 1, 500,000 as published.
    """

    def __init__(self, target: float, num_images: int) -> None:
        self.target, self.num_images = target, num_images
        self.probability = torch.zeros(())
        self.signs = torch.zeros(())  # sum over the steps since the last change
        self.num_steps = self.num_seen = 0  # steps and images since then
        self.last = StepMean()

    def begin(self, step: int, device: torch.device) -> Tensor:
        """The probability in this step, a scalar; called before D sees an image."""
        mean = self.last.take(step)
        self.probability, self.signs = self.probability.to(device), self.signs.to(device)
        if mean is not None:
            self.signs, self.num_steps = self.signs + mean[0], self.num_steps + 1

        # Once in a while it moves.
        if self.num_steps == ADA_INTERVAL:
            direction = (self.signs / self.num_steps - self.target).sign()
            self.probability = (self.probability + direction * (self.num_seen / self.num_images)).clamp(0, 1)
            self.signs, self.num_steps, self.num_seen = torch.zeros_like(self.signs), 0, 0
        return self.probability

    def add(self, step: int, real: Tensor) -> None:
        """Take in D's logits (N, ...) of the real pairs of one micro-batch."""
        self.last.add(step, real.sign().float().mean().reshape(1))
        self.num_seen += len(real) * num_processes()

    def state(self) -> dict[str, Any]:
        numbers = {"probability": self.probability.item(), "signs": self.signs.item()}
        return {**numbers, "num_steps": self.num_steps, "num_seen": self.num_seen, "last": self.last.state()}

    def restore(self, state: Mapping[str, Any], device: torch.device) -> None:
        self.probability, self.signs = _finite(state["probability"], device), _finite(state["signs"], device)
        self.num_steps, self.num_seen = int(state["num_steps"]), int(state["num_seen"])
        self.last.restore(state["last"], device)


def _finite(numbers: Any, device: torch.device) -> Tensor:
    tensor = torch.tensor(numbers, dtype=torch.float32, device=device)
    if not torch.isfinite(tensor).all():
        raise ValueError("a number is not finite")
    return tensor


class Memory:
    """What an objective remembers of former steps: the averages of each discriminator, and the controller.

    lecam: whether LeCam has a weight.
    ada_target: 0: without ADA.
    ada_images: see AugmentationController.
    """

    def __init__(self, lecam: bool, ada_target: float, ada_images: int) -> None:
        self.lecam = lecam
        self.averages: dict[str, LogitAverages] = {}
        self.controller = AugmentationController(ada_target, ada_images) if ada_target else None

    def averages_of(self, discriminator: str) -> LogitAverages:
        return self.averages.setdefault(discriminator, LogitAverages())

    def state(self) -> dict[str, Any]:
        """Plain numbers for a checkpoint; {} where nothing is remembered."""
        averages = {"lecam": {name: one.state() for name, one in self.averages.items()}} if self.averages else {}
        return averages | ({"ada": self.controller.state()} if self.controller is not None else {})

    def restore(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Go on from a checkpoint's `state`; what the settings have added since starts anew. Raises CheckpointError."""
        try:
            if self.lecam:
                for name, one in state.get("lecam", {}).items():
                    self.averages_of(name).restore(one, device)
            if self.controller is not None and "ada" in state:
                self.controller.restore(state["ada"], device)
        except (TypeError, ValueError, RuntimeError, AttributeError, LookupError, OverflowError) as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
            raise CheckpointError(
                f"the checkpoint's memory of LeCam or ADA is damaged ({reason}); use another checkpoint, or start anew"
            ) from None
