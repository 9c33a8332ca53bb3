"""Regularisers for small data that keep a state: LeCam's averages of logits, and ADA's probability of augmentation.

LeCam's loss is in miscc/losses.py, the augmentations in miscc/augment.py. The state follows values of the whole batch, and
stays on their device: reading it at each step would make a GPU wait.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from miscc.errors import CheckpointError, shown

LECAM_DECAY = 0.99  # the paper's
ADA_EVERY = 4  # steps between changes of p, the paper's
LARGEST = 1e30  # number in a checkpoint's state: float32 holds it


class LogitAverages:
    """Exponential averages of mean logits, for LeCam (Tseng et al., CVPR 2021, arXiv 2104.03310): a <- 0.99 a + 0.01 v.

    The first v is the first average. A step's loss uses the averages of the steps before it.

    pairs: {discriminator: (X, Y)}, see `models.types.System.logit_pairs`.
    warmup: steps before `of` gives averages; the authors' code has 1,000.
    """

    def __init__(self, pairs: Mapping[str, tuple[str, str]], warmup: int):
        self.pairs, self.warmup = pairs, warmup
        self.kinds = [kind for pair in pairs.values() for kind in pair]
        self.num_steps = 0
        self.averages: dict[str, Tensor] = {}  # {kind of pair: scalar}

    def of(self, discriminator: str) -> tuple[Tensor, Tensor] | None:
        """This discriminator's averages (of real pairs, of fake pairs); None during the warm-up."""
        if self.num_steps < max(1, self.warmup):
            return None
        real, fake = self.pairs[discriminator]
        return self.averages[real], self.averages[fake]

    def update(self, stats: Mapping[str, Tensor]) -> None:
        """After a step: stats holds logits/X of every kind of pair, the mean over the whole batch."""
        for kind in self.kinds:
            value = stats[f"logits/{kind}"].detach().float()
            known = self.averages.get(kind)
            self.averages[kind] = value if known is None else LECAM_DECAY * known + (1 - LECAM_DECAY) * value
        self.num_steps += 1

    def state(self) -> dict[str, float]:
        """Plain numbers for a checkpoint."""
        averages = {f"lecam/{kind}": average.item() for kind, average in self.averages.items()}
        return {"lecam/steps": self.num_steps, **averages}

    def restore(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Continue from a `state`; one without LeCam's: as at the start. Raises CheckpointError for a malformed one."""
        if not any(str(name).startswith("lecam/") for name in state):
            return
        self.num_steps = count_in(state, "lecam/steps")
        if self.num_steps:
            numbers = {kind: number_in(state, f"lecam/{kind}") for kind in self.kinds}
            self.averages = {kind: torch.tensor(number, device=device) for kind, number in numbers.items()}


class AugmentationControl:
    """ADA's probability p of augmenting an image (Karras et al., NeurIPS 2020, arXiv 2006.06676, section 3).

    From p = 0 on, every 4 steps: p <- p + sign(r_t - target) * 4 * batch size / num_images, within [0, 1]; r_t is the mean
    of D's signs on real pairs in these steps, near 1 where D overfits. The paper draws for each of its 18
    transformations whether it is applied; here one draw for each image decides on all of them.

    target: of r_t; the paper's is 0.6.
    num_images: real images after which p can have gone from 0 to 1.
    """

    def __init__(self, target: float, num_images: int):
        self.target, self.num_images = target, num_images
        self.num_steps = 0  # since p was changed
        self.p, self.sum_of_signs = torch.zeros(()), torch.zeros(())

    def update(self, sign: Tensor, batch_size: int) -> None:
        """After a step: sign is the mean of D's signs on real pairs, over the whole batch."""
        sign = sign.detach().float()
        self.sum_of_signs = self.sum_of_signs.to(sign.device) + sign
        self.num_steps += 1
        if self.num_steps < ADA_EVERY:
            return

        # D is surer of real pairs than the target: augment more. Less sure: less.
        direction = (self.sum_of_signs / ADA_EVERY - self.target).sign()
        self.p = (self.p.to(sign.device) + direction * (ADA_EVERY * batch_size / self.num_images)).clamp(0, 1)
        self.num_steps, self.sum_of_signs = 0, torch.zeros_like(sign)

    def state(self) -> dict[str, float]:
        """Plain numbers for a checkpoint."""
        return {"ada/p": self.p.item(), "ada/sum": self.sum_of_signs.item(), "ada/steps": self.num_steps}

    def restore(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Continue from a `state`; one without ADA's: as at the start. Raises CheckpointError for a malformed one."""
        if not any(str(name).startswith("ada/") for name in state):
            return
        self.p = torch.tensor(number_in(state, "ada/p", 0, 1), device=device)
        self.sum_of_signs = torch.tensor(number_in(state, "ada/sum", -ADA_EVERY, ADA_EVERY), device=device)
        self.num_steps = count_in(state, "ada/steps", ADA_EVERY - 1)


def number_in(state: Mapping[str, Any], name: str, smallest: float = -LARGEST, largest: float = LARGEST) -> float:
    """A number out of a checkpoint. Raises CheckpointError for anything else, and for one out of bounds."""
    value = state.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not smallest <= value <= largest:
        raise damaged(name, value)
    return float(value)


def count_in(state: Mapping[str, Any], name: str, largest: float = LARGEST) -> int:
    """A whole number >= 0 out of a checkpoint. Raises CheckpointError as `number_in`."""
    if not isinstance(state.get(name), int):
        raise damaged(name, state.get(name))
    return int(number_in(state, name, 0, largest))


def damaged(name: str, value: Any) -> CheckpointError:
    """The error for a value that no `state` holds."""
    return CheckpointError(
        f"the checkpoint's system is damaged ({name} is {shown(value)}); use another checkpoint, or start anew"
    )
