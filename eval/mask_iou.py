"""Do a generator's masks find the bird? `python eval/mask_iou.py --checkpoint CKPT`.

A small segmenter, trained on drawings with their outlines, outlines the bird in generated images; each stage's mask is
compared with that by intersection over union (IoU), and so is the mean shape of all drawings. Here are the segmenter, the
comparison, the metric and its script. Training and caching the segmenter: eval/toybirds/classifiers.py; the images:
eval/toybirds/samples.py.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

if __package__ in (None, ""):  # run as a script: this folder hides other packages' names
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eval.features.statistics import default_cache
from eval.metric import Needs, Score
from eval.toybirds.classifiers import (
    Drawings,
    Examples,
    Recipe,
    classifier_size,
    convolution,
    crops,
    held_out_examples,
    prepared,
    train,
    trained,
)
from eval.toybirds.samples import BirdMetric, run_bird_script
from miscc.errors import DataError, UserError, run_command
from miscc.randomness import stream

LOWEST_IOU = 0.95  # mean on held-out drawings; a segmenter below it is not used
THRESHOLD = 0.5  # a mask of at least this is inside
SMALLEST_BIRD = 0.02  # share of the image; an outline smaller than that is no bird (drawn ones fill 0.15 to 0.4)
WITHOUT_MASKS = "these images come without masks; SSA-GAN predicts them, AttnGAN and DF-GAN do not"
RECIPES = {  # by input size
    64: Recipe("outline-segmenter", 64, epochs=5, width=16, most_noise=0.08, most_blur=0.6),
    32: Recipe("outline-segmenter", 32, epochs=8, width=24, most_noise=0.04, most_blur=0.3),
}


class SegmenterNetwork(nn.Module):
    """A small U-Net (Ronneberger et al. 2015): images (N, 3, S, S) in [-1, 1] -> logits (N, 1, S, S)."""

    def __init__(self, width: int):
        super().__init__()
        self.fine = convolution(3, width // 2)
        self.down = nn.ModuleList(
            [
                convolution(width // 2, width, stride=2),
                convolution(width, 2 * width, stride=2),
                convolution(2 * width, 4 * width, stride=2),
            ]
        )
        self.deep = convolution(4 * width, 4 * width)
        self.up = nn.ModuleList(
            [convolution(6 * width, 2 * width), convolution(3 * width, width), convolution(width * 3 // 2, width // 2)]
        )
        self.outline = nn.Conv2d(width // 2, 1, kernel_size=1)

    def forward(self, images: Tensor) -> Tensor:
        # Down, keeping what the way up is joined with.
        skipped = [self.fine(images)]
        for down in self.down:
            skipped.append(down(skipped[-1]))

        # Up to the full size.
        x = self.deep(skipped.pop())
        for up in self.up:
            skip = skipped.pop()
            x = up(torch.cat([F.interpolate(x, size=skip.shape[2:], mode="nearest"), skip], dim=1))
        return self.outline(x)


class Segmenter(Protocol):
    """Outlines birds."""

    @property
    def mean_shape(self) -> np.ndarray:
        """(S, S) bool, the mean outline of drawings thresholded at half."""
        ...

    @property
    def ceiling(self) -> float:
        """Mean IoU with the true outlines of held-out drawings."""
        ...

    @property
    def mean_shape_ceiling(self) -> float:
        """Mean IoU of the mean shape with the true outlines of held-out drawings."""
        ...

    def outline(self, images: np.ndarray) -> np.ndarray:
        """(N, H, W, 3) uint8 -> (N, S, S) bool, True inside the bird; S the size of `mean_shape`."""
        ...


@dataclass(frozen=True)
class BirdSegmenter:
    """A trained segmenter that has passed its test; made by `load_segmenter`."""

    network: nn.Module
    recipe: Recipe
    mean_shape: np.ndarray
    ceiling: float
    mean_shape_ceiling: float
    seconds: float  # that drawing, training and testing took

    @torch.inference_mode()
    def outline(self, images: np.ndarray) -> np.ndarray:
        """See Segmenter; images of any size from 32 px."""
        device = next(self.network.parameters()).device
        outlines = []
        for start in range(0, len(images), 100):
            logits = self.network(prepared(images[start : start + 100], self.recipe.image_size, device))
            outlines.append((logits[:, 0] >= 0).cpu().numpy())
        return np.concatenate(outlines)


def load_segmenter(
    image_size: int,
    device: str | torch.device = "cpu",
    cache: str | Path | None = None,
    recipe: Recipe | None = None,
) -> BirdSegmenter:
    """The segmenter for images of this size, from the cache or trained now, which takes minutes.

    cache: a folder, None: ~/.cache/text-to-image-gans;
    recipe: another way of training it.
    Raises UserError, with the IoU, when its outlines of held-out drawings reach a mean IoU below 0.95.
    """
    recipe = recipe or RECIPES[classifier_size(image_size)]
    cache = default_cache() if cache is None else cache
    network, measured = trained(recipe, lambda r: SegmenterNetwork(r.width), _train, device, cache)

    # A segmenter that misses drawn birds would miss generated ones, too.
    if measured["iou"] < LOWEST_IOU:
        raise UserError(
            f"the segmenter for {recipe.image_size} px reaches a mean IoU of {measured['iou']:.3f} on "
            f"{recipe.num_held_out} held-out drawings ({LOWEST_IOU} is needed), so it is not used; generate "
            f"larger images, or train it otherwise (Recipe in eval/toybirds/classifiers.py)"
        )
    shape = measured["mean_shape"].numpy()
    return BirdSegmenter(
        network, recipe, shape, measured["iou"], measured["mean_shape_iou"], float(measured["seconds"])
    )


def _train(network: nn.Module, drawings: Drawings, recipe: Recipe, device: torch.device) -> dict[str, Any]:
    """Train and measure: {"iou", "mean_shape_iou": on held-out drawings; "mean_shape": (S, S) bool tensor}."""

    def loss(logits: Tensor, examples: Examples) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits, examples.masks)

    train(network, loss, drawings, recipe, device)

    # Segmenter and mean shape against the true outlines.
    shape = mean_shape(drawings, recipe)
    ious, shape_ious = [], []
    with torch.inference_mode():
        for examples in held_out_examples(recipe):
            true = (examples.masks[:, 0] >= THRESHOLD).numpy()
            ious.append(iou((network(examples.images.to(device))[:, 0] >= 0).cpu().numpy(), true))
            shape_ious.append(iou(shape, true))
    measured = {"iou": float(np.concatenate(ious).mean()), "mean_shape_iou": float(np.concatenate(shape_ious).mean())}
    return measured | {"mean_shape": torch.from_numpy(shape)}


def mean_shape(drawings: Drawings, recipe: Recipe) -> np.ndarray:
    """(S, S) bool: where at least half of the drawings, cropped and flipped as in training, have their bird."""
    rng = stream(recipe.seed, "mean shape")
    total = np.zeros((recipe.image_size, recipe.image_size))
    for start in range(0, len(drawings.pixels), 500):
        rows = range(start, min(start + 500, len(drawings.pixels)))
        total += crops(drawings, rows, recipe.image_size, rng).masks.double().sum(dim=(0, 1)).numpy()
    return total / len(drawings.pixels) >= THRESHOLD


def iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Area of the intersection over that of the union, of two sets of outlines (N, S, S) bool, or of one (S, S)
    with each: (N,) float64, 1 where both are empty."""
    both, either = (first & second).sum(axis=(-2, -1)), (first | second).sum(axis=(-2, -1))
    return np.where(either > 0, both / np.maximum(either, 1), 1.0)


@dataclass(frozen=True)
class StageIoU:
    """One stage's masks (size px a side) against the outlines: mean IoU over images with a bird.

    iou: of the better polarity, the same for all images, inverted if that is the one where the mask is low;
    other_iou: of the other polarity;
    shuffled_iou: of the better one with another image's outline: what a mask reaches that ignores its image.
    """

    size: int
    iou: float
    inverted: bool
    other_iou: float
    shuffled_iou: float | None


@dataclass(frozen=True)
class MaskReport:
    """IoU with the segmenter's outlines, means over num_images - without_bird images.

    mean_shape_iou, whole_frame_iou: of the mean outline of drawings, and of the whole image: baselines that do not depend on
        the image.
    ceiling, mean_shape_ceiling: of the segmenter and of the mean shape on held-out drawings, against their true outlines.
    without_bird: images in which the segmenter finds less bird than 2 % of the area.
    """

    num_images: int
    without_bird: int
    stages: list[StageIoU]
    mean_shape_iou: float
    whole_frame_iou: float
    ceiling: float
    mean_shape_ceiling: float

    def record(self) -> dict[str, Any]:
        """The report as JSON can hold it."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The report as a table for people."""
        # A line for each stage.
        lines = [f"{'IoU with the outlined bird':<34}{'IoU':>7}{'other polarity':>16}{'other image':>13}"]
        for stage in self.stages:
            name = f"mask of {stage.size} px" + (" (inverted)" if stage.inverted else "")
            shuffled = "-" if stage.shuffled_iou is None else f"{stage.shuffled_iou:.3f}"
            lines.append(f"{name:<34}{stage.iou:>7.3f}{stage.other_iou:>16.3f}{shuffled:>13}")

        # Baselines and ceilings.
        for name, value in (
            ("mean shape of drawings", self.mean_shape_iou),
            ("the whole image", self.whole_frame_iou),
            ("on real drawings: the segmenter", self.ceiling),
            ("on real drawings: mean shape", self.mean_shape_ceiling),
        ):
            lines.append(f"{name:<34}{value:>7.3f}")

        if self.without_bird:
            lines.append(f"left out: {self.without_bird} of {self.num_images} images, in which no bird is to be found")
        return lines


def mask_iou(images: np.ndarray, masks: Sequence[np.ndarray], segmenter: Segmenter) -> MaskReport:
    """Compare a generator's masks with the birds in its images.

    images: (N, H, W, 3) uint8;
    masks: of each stage (N, h, w) in [0, 1].
    Raises DataError without masks, or when no image shows a bird.
    """
    if not len(masks):
        raise DataError(WITHOUT_MASKS)
    if any(len(stage) != len(images) for stage in masks):
        raise DataError(
            f"{len(images)} images, {[len(stage) for stage in masks]} masks; give one a stage for each image"
        )

    # Only images with a bird count.
    outlines = segmenter.outline(images)  # (N, S, S)
    with_bird = outlines.mean(axis=(1, 2)) >= SMALLEST_BIRD
    if not with_bird.any():
        raise DataError(f"in none of the {len(images)} images is a bird to be found; train the generator longer")
    birds = outlines[with_bird]

    return MaskReport(
        num_images=len(images),
        without_bird=int((~with_bird).sum()),
        stages=[_stage(stage[with_bird], birds) for stage in masks],
        mean_shape_iou=float(iou(segmenter.mean_shape, birds).mean()),
        whole_frame_iou=float(iou(np.ones_like(segmenter.mean_shape), birds).mean()),
        ceiling=segmenter.ceiling,
        mean_shape_ceiling=segmenter.mean_shape_ceiling,
    )


def _stage(masks: np.ndarray, birds: np.ndarray) -> StageIoU:
    """masks (N, h, w) in [0, 1]; birds (N, S, S) bool."""
    inside = resized(masks, birds.shape[1]) >= THRESHOLD
    upright, inverted = float(iou(inside, birds).mean()), float(iou(~inside, birds).mean())

    # The better polarity: a mask may be low inside the bird.
    better = ~inside if inverted > upright else inside
    return StageIoU(
        size=masks.shape[1],
        iou=max(upright, inverted),
        inverted=inverted > upright,
        other_iou=min(upright, inverted),
        shuffled_iou=float(iou(better, np.roll(birds, 1, axis=0)).mean()) if len(birds) > 1 else None,
    )


def resized(masks: np.ndarray, size: int) -> np.ndarray:
    """(N, h, w) float -> (N, size, size) float32, bilinear between pixel centres, smoothly where it shrinks them."""
    stage = torch.from_numpy(np.ascontiguousarray(masks, dtype=np.float32))[:, None]
    shrinks = masks.shape[1] > size
    return F.interpolate(stage, (size, size), mode="bilinear", align_corners=False, antialias=shrinks)[:, 0].numpy()


class MaskIoU(BirdMetric):
    """How well the generator's masks cover the birds in its images."""

    needs = Needs(masks=True, data_set="toybirds")

    @cached_property
    def reader(self) -> BirdSegmenter:
        return load_segmenter(self.image_size, self.device, self.cache)

    def report(self) -> MaskReport:
        """All stages. Raises DataError without masks."""
        stages = self.all_masks()
        if not stages:
            raise DataError(WITHOUT_MASKS)
        return mask_iou(self.all_images(), stages, self.reader)

    def compute(self) -> list[Score]:
        report = self.report()
        counted = report.num_images - report.without_bird
        about = self.about() | {"num_images": counted, "without_bird": report.without_bird}

        scores = []
        for stage in report.stages:
            beside = {"other polarity": stage.other_iou, "of another image": stage.shuffled_iou}
            beside |= {"mean shape": report.mean_shape_iou, "ceiling": report.ceiling}
            name = f"mask IoU {stage.size} px" + (" (inverted)" if stage.inverted else "")
            scores.append(Score(name, stage.iou, about | {"beside": beside}, details=asdict(stage)))
        return scores


def main() -> None:
    run_bird_script("masks", "IoU of a generator's masks with the birds in its ToyBirds images", MaskIoU)


if __name__ == "__main__":
    run_command(main)
