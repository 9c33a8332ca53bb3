"""How much do images of one caption differ in pose, facing and place? `python eval/variety.py --checkpoint CKPT --per-caption 2`.

The segmenter of eval/mask_iou.py outlines the birds; two images of a caption differ by 1 − IoU of their outlines. Drawings
of the same captions, with all that these leave open drawn anew, say how much they should differ.
"""

import itertools
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: this folder hides other packages' names
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np

from datasets.toybirds.dataset import named_attributes
from eval.mask_iou import SMALLEST_BIRD, BirdSegmenter, Segmenter, iou, load_segmenter
from eval.metric import Needs, Score
from eval.toybirds.classifiers import crops, draw_captioned
from eval.toybirds.samples import BirdMetric, run_bird_script
from miscc.errors import DataError, run_command
from miscc.images import to_uint8
from miscc.randomness import stream


@dataclass(frozen=True)
class VarietyReport:
    """1 − IoU of two outlines of one caption, mean over pairs: 0 all alike, 1 no overlap.

    generated, drawings: of generated images, and of as many drawings of the same captions.
    num_pairs: of generated images.
    without_bird: pairs left out, as the segmenter finds no bird in one of their images.
    """

    generated: float
    drawings: float
    num_pairs: int
    without_bird: int

    def record(self) -> dict[str, Any]:
        """The report as JSON can hold it."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The report as a table for people."""
        lines = [
            f"variety of outlines of one caption, generated  {self.generated:.3f}  ({self.num_pairs} pairs)",
            f"                                    drawings   {self.drawings:.3f}",
        ]
        if self.without_bird:
            lines.append(f"left out: {self.without_bird} pairs, in which no bird is to be found")
        return lines


def variety(images: np.ndarray, captions: Sequence[str], segmenter: Segmenter, seed: int = 0) -> VarietyReport:
    """Compare the outlines of images (N, H, W, 3) uint8 of the same caption, pair by pair.

    captions: N.
    seed: of the drawings.
    Raises DataError where no caption has two images with a bird.
    """
    if len(images) != len(captions):
        raise DataError(f"{len(images)} images, {len(captions)} captions; give one caption for each image")
    pairs = caption_pairs(captions)
    generated, without_bird = outline_distances(segmenter.outline(images), pairs)
    if not len(generated):
        raise DataError("no caption has two images with a bird; draw several of each caption: --per-caption 2")

    # The same of drawings: how much the captions leave open.
    drawn = segmenter.outline(drawings_of(captions, images.shape[1], seed))
    drawings, _ = outline_distances(drawn, pairs)
    return VarietyReport(float(generated.mean()), float(drawings.mean()), len(generated), without_bird)


def caption_pairs(captions: Sequence[str]) -> np.ndarray:
    """(P, 2) indices of all pairs of images of the same caption."""
    indices: Mapping[str, list[int]] = defaultdict(list)
    for index, caption in enumerate(captions):
        indices[caption].append(index)
    pairs = [pair for same in indices.values() for pair in itertools.combinations(same, 2)]
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


def outline_distances(outlines: np.ndarray, pairs: np.ndarray) -> tuple[np.ndarray, int]:
    """1 − IoU of each pair of outlines (N, S, S) bool in which both show a bird, and how many pairs do not."""
    has_bird = outlines.mean(axis=(1, 2)) >= SMALLEST_BIRD
    usable = pairs[has_bird[pairs].all(axis=1)]
    return 1 - iou(outlines[usable[:, 0]], outlines[usable[:, 1]]), len(pairs) - len(usable)


def drawings_of(captions: Sequence[str], image_size: int, seed: int = 0) -> np.ndarray:
    """A drawing of each caption, (N, S, S, 3) uint8: what it names is so, all else drawn by (seed, index); cropped and
    flipped as training images are."""
    named = [named_attributes(caption) for caption in captions]
    drawings = draw_captioned(named, image_size, seed)

    examples = crops(drawings, range(len(captions)), image_size, stream(seed, "variety crops"))
    return to_uint8(examples.images)


class Variety(BirdMetric):
    """How much the outlines of images of one caption differ, beside those of drawings of it."""

    needs = Needs(data_set="toybirds")

    @cached_property
    def reader(self) -> BirdSegmenter:
        return load_segmenter(self.image_size, self.device, self.cache)

    def report(self) -> VarietyReport:
        """The score of all images. Raises DataError where there are no two of a caption."""
        return variety(self.all_images(), [request.caption for request in self.requests], self.reader, self.seed)

    def compute(self) -> list[Score]:
        report = self.report()
        about = self.about() | {"num_pairs": report.num_pairs, "without_bird": report.without_bird}
        return [Score("variety", report.generated, about | {"beside": {"drawings": report.drawings}})]


def main() -> None:
    run_bird_script("variety", "how much outlines of ToyBirds of one caption differ", Variety)


if __name__ == "__main__":
    run_command(main)
