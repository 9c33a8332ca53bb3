"""Differentiable augmentation (Zhao et al., NeurIPS 2020, arXiv 2006.10738) of what a discriminator sees.

Real and fake images get the same draw, in D's and in G's step, so that G never learns to make augmented images. A draw is a
function of (seed, step, index of the image) alone, so resumed runs and other numbers of processes repeat it.
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from miscc.randomness import stream

Augmentation = Callable[[Tensor], Tensor]  # images (N, 3, H, W) in [-1, 1] -> the same size

LARGEST_SHIFT = 1 / 8  # of the image's side
CUTOUT = 1 / 2  # side of the square, of the image's
# Uniform numbers an image takes: shift (2), middle of the square (2), brightness, saturation, contrast, whether at all.
NUM_DRAWS = 8


def translate(images: Tensor, draws: Tensor) -> Tensor:
    """Shift by up to an eighth of the side; what comes in is 0. draws (N, 2) in [0, 1): down, right."""
    size = images.shape[-1]
    most = round(size * LARGEST_SHIFT)
    shifts = (draws * (2 * most + 1)).long() - most  # (N, 2), every whole number of pixels equally often
    for axis in (2, 3):
        # Pixel i of the result is pixel i - shift of the image, 0 where there is none.
        sources = torch.arange(size, device=images.device) - shifts[:, axis - 2, None]  # (N, S)
        inside = (sources >= 0) & (sources < size)
        shape = (len(images), 1, size, 1) if axis == 2 else (len(images), 1, 1, size)
        index = sources.clamp(0, size - 1).view(shape).expand_as(images)
        images = images.gather(axis, index) * inside.view(shape).to(images.dtype)
    return images


def cut_out(images: Tensor, draws: Tensor) -> Tensor:
    """Set a square of half the side to 0; its middle lies anywhere in the image. draws (N, 2) in [0, 1): row, column."""
    size = images.shape[-1]
    length = round(size * CUTOUT)
    start = (draws * (size + 1)).long() - length // 2  # (N, 2)
    pixels = torch.arange(size, device=images.device)

    # The square, cut where it leaves the image.
    rows, columns = (
        (pixels >= start[:, axis, None]) & (pixels < start[:, axis, None] + length) for axis in (0, 1)
    )  # (N, S)
    square = rows[:, None, :, None] & columns[:, None, None, :]
    return images * (~square).to(images.dtype)


def recolour(images: Tensor, draws: Tensor) -> Tensor:
    """x + b; then s·(x − g) + g, g each pixel's grey; then c·(x − m) + m, m the image's mean. draws (N, 3) in [0, 1).

    b in [-0.5, 0.5), s in [0, 2), c in [0.5, 1.5). It changes colours that captions name.
    """
    brightness, saturation, contrast = (draws[:, column, None, None, None] for column in range(3))

    # Brightness, saturation, contrast, in the paper's order.
    images = images + (brightness - 0.5)
    grey = images.mean(dim=1, keepdim=True)
    images = (images - grey) * (2 * saturation) + grey
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return (images - mean) * (contrast + 0.5) + mean


# name: (function, its columns of the draws), in the order in which they are applied
KINDS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], slice]] = {
    "colour": (recolour, slice(4, 7)),
    "translation": (translate, slice(0, 2)),
    "cutout": (cut_out, slice(2, 4)),
}


def unchanged(images: Tensor) -> Tensor:
    return images


def augmentation(
    kinds: Iterable[str], seed: int, step: int, indices: Sequence[int], probability: Tensor | None = None
) -> Augmentation:
    """The augmentation of one training step: one draw for each image, by its index, to be called on real and fake alike.

    probability: of changing an image at all, scalar in [0, 1], on any device; None: all are.
    """
    # Nothing to draw, and no copy to a GPU that it would wait for.
    if not (wanted := [KINDS[name] for name in KINDS if name in set(kinds)]):  # colour before shift and cutout
        return unchanged

    rows = [stream(seed, "augment", step, index).random(NUM_DRAWS) for index in indices]
    draws = torch.from_numpy(np.array(rows, dtype=np.float32))

    def apply(images: Tensor) -> Tensor:
        # Real and fake images see the same draws.
        on_device, given = draws.to(images.device), images
        for function, columns in wanted:
            images = function(images, on_device[:, columns].to(images.dtype))
        if probability is None:
            return images

        # The images that this step's draw leaves as they are.
        chosen = on_device[:, NUM_DRAWS - 1] < probability.to(images.device)  # (N,)
        return torch.where(chosen[:, None, None, None], images, given)

    return apply
