"""Do generated ToyBirds have the attributes that their captions name? `python eval/attributes.py --checkpoint CKPT`.

A small classifier, trained on drawings, reads every attribute off every image; here are the classifier, the counting, the
metric and its script. Training and caching the classifier: eval/toybirds/classifiers.py; the images: eval/toybirds/samples.py.
"""

import math
import sys
from collections import defaultdict
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

from datasets.toybirds.dataset import ATTRIBUTES, named_attributes
from eval.features.statistics import default_cache
from eval.metric import Needs, Score
from eval.toybirds.classifiers import (
    Drawings,
    Examples,
    Recipe,
    classifier_size,
    held_out_examples,
    prepared,
    train,
    trained,
)
from eval.toybirds.networks import AttributeNetwork
from eval.toybirds.samples import BirdMetric, run_bird_script
from miscc.errors import DataError, UserError, run_command
from miscc.randomness import stream

NAMES = tuple(ATTRIBUTES)
NUM_VALUES = tuple(len(values) for values in ATTRIBUTES.values())
COLOURS = ("crown_color", "wing_color", "belly_color")
LOWEST_ACCURACY = 0.98  # of each attribute on held-out drawings; a classifier below it is not used
RECIPES = {  # by input size; at 32 px the spots of a wing are a pixel wide, and a blur would take them away
    64: Recipe("attribute-classifier", 64, epochs=9, width=24, most_noise=0.08, most_blur=0.6),
    32: Recipe("attribute-classifier", 32, epochs=10, width=24, most_noise=0.04, most_blur=0.3),
}
UNNAMED, UNKNOWN = -1, -2  # in place of a value's index: the caption says nothing, or what no toy bird can be


class Classifier(Protocol):
    """Reads attributes off images."""

    @property
    def ceiling(self) -> dict[str, float]:
        """Its accuracy on held-out drawings, by attribute."""
        ...

    def predict(self, images: np.ndarray) -> np.ndarray:
        """(N, H, W, 3) uint8 -> (N, 9) int64, the index of the value for each of ATTRIBUTES."""
        ...


@dataclass(frozen=True)
class AttributeClassifier:
    """A trained classifier that has passed its test; made by `load_classifier`."""

    network: nn.Module
    recipe: Recipe
    ceiling: dict[str, float]
    seconds: float  # that drawing, training and testing took

    @torch.inference_mode()
    def predict(self, images: np.ndarray) -> np.ndarray:
        """See Classifier; images of any size from 32 px."""
        device = next(self.network.parameters()).device
        chosen = []
        for start in range(0, len(images), 200):
            logits = self.network(prepared(images[start : start + 200], self.recipe.image_size, device))
            chosen.append(torch.stack([head.argmax(dim=1) for head in logits], dim=1).cpu())
        return torch.cat(chosen).numpy()


def load_classifier(
    image_size: int,
    device: str | torch.device = "cpu",
    cache: str | Path | None = None,
    recipe: Recipe | None = None,
) -> AttributeClassifier:
    """The classifier for images of this size, from the cache or trained now, which takes minutes.

    cache: a folder, None: ~/.cache/text-to-image-gans;
    recipe: another way of training it.
    Raises UserError, with the accuracy, when it reads an attribute off fewer than 98 % of the held-out drawings.
    """
    recipe = recipe or RECIPES[classifier_size(image_size)]
    cache = default_cache() if cache is None else cache
    network, measured = trained(recipe, lambda r: AttributeNetwork(r.image_size, r.width), _train, device, cache)
    ceiling = {name: float(measured["accuracy"][name]) for name in NAMES}

    # A classifier that misreads drawings would misread generated birds, too.
    poor = [f"{name} {100 * share:.1f} %" for name, share in ceiling.items() if share < LOWEST_ACCURACY]
    if poor:
        raise UserError(
            f"the attribute classifier for {recipe.image_size} px reads too few of {recipe.num_held_out} held-out drawings "
            f"rightly ({', '.join(poor)}; {100 * LOWEST_ACCURACY:.0f} % are needed), so it is not used; "
            f"generate larger images, or train it otherwise (Recipe in eval/toybirds/classifiers.py)"
        )
    return AttributeClassifier(network, recipe, ceiling, float(measured["seconds"]))


def _train(network: nn.Module, drawings: Drawings, recipe: Recipe, device: torch.device) -> dict[str, Any]:
    """Train and measure: {"accuracy": share of held-out drawings read rightly, by attribute}."""

    def loss(logits: list[Tensor], examples: Examples) -> Tensor:
        losses = [F.cross_entropy(head, examples.labels[:, i]) for i, head in enumerate(logits)]
        return sum(losses[1:], losses[0])

    # Trained, then measured on drawings that it has not seen.
    train(network, loss, drawings, recipe, device)
    right = torch.zeros(len(NAMES), dtype=torch.int64)
    with torch.inference_mode():
        for examples in held_out_examples(recipe):
            logits = network(examples.images.to(device))
            chosen = torch.stack([head.argmax(dim=1) for head in logits], dim=1).cpu()
            right += (chosen == examples.labels).sum(dim=0)
    return {"accuracy": {name: int(n) / recipe.num_held_out for name, n in zip(NAMES, right, strict=True)}}


@dataclass(frozen=True)
class AttributeScore:
    """What was counted for one attribute; a share is None where there was nothing to count.

    named, accuracy: images whose caption names it, and the share of them on which the classifier reads that value.
    mismatched, mismatched_accuracy: the same with the caption of another image in place of one's own, which for a generator
        that ignores captions equals `accuracy`, and for any is near chance.
    chance: 1 / number of values.
    ceiling: the classifier's accuracy on held-out drawings.
    open, diversity: images whose caption leaves it open, and the entropy of the values that the classifier reads off them,
        all together, divided by the logarithm of the number of values: 0 one value only, 1 all alike.
    pairs, pair_diversity: pairs of images of the same caption that leaves it open, and the share of them that differ divided
        by 1 - chance: 0 a caption's images are all alike in it, 1 as different as if drawn at random.
    impossible: captions that name a value which no toy bird has, e.g. a green beak; they count nowhere else.
    """

    named: int
    accuracy: float | None
    mismatched: int
    mismatched_accuracy: float | None
    chance: float
    ceiling: float
    open: int
    diversity: float | None
    pairs: int
    pair_diversity: float | None
    impossible: int


@dataclass(frozen=True)
class AttributeReport:
    """All attributes' counts; the colour figures are means over crown, wing and belly, of those that are named."""

    num_images: int
    attributes: dict[str, AttributeScore]
    colour_accuracy: float | None
    mismatched_colour_accuracy: float | None
    colour_ceiling: float
    colour_chance: float
    seed: int  # of the choice of other images' captions

    def record(self) -> dict[str, Any]:
        """The report as JSON can hold it."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The report as a table for people."""
        head = ("attribute", "named", "accuracy", "other's", "chance", "ceiling", "open", "diversity", "pairs differ")
        fields = (
            "named",
            "accuracy",
            "mismatched_accuracy",
            "chance",
            "ceiling",
            "open",
            "diversity",
            "pair_diversity",
        )
        rows = [(name, *(getattr(score, field) for field in fields)) for name, score in self.attributes.items()]

        # Under them the mean of the colours.
        colours = (self.colour_accuracy, self.mismatched_colour_accuracy, self.colour_chance, self.colour_ceiling)
        rows.append(("colours (mean)", "", *colours, "", "", ""))
        return [_row(head), *(_row(row) for row in rows)]


def _row(cells: Sequence[str | int | float | None]) -> str:
    first, *rest = ("-" if cell is None else f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in cells)
    return f"{first:<15}" + "".join(f"{cell:>{13 if i == 7 else 10}}" for i, cell in enumerate(rest))


def read_attributes(
    images: np.ndarray,
    captions: Sequence[str],
    classifier: Classifier,
    keys: Sequence[str] | None = None,
    seed: int = 0,
) -> AttributeReport:
    """Read the attributes off images and count how many of those that their captions name are there.

    images: (N, H, W, 3) uint8;
    captions: N;
    keys: of the bird that a caption was written for, "" for none: another caption of the same bird is no other image's;
    seed: of the choice of other images' captions.
    Raises DataError when no caption names an attribute.
    """
    if len(images) != len(captions):
        raise DataError(f"{len(images)} images, {len(captions)} captions; give one caption for each image")

    # What captions name; only such attributes can be right or wrong.
    truth = named_values(captions)
    if not (truth >= 0).any():
        raise DataError("no caption names an attribute of a toy bird, e.g. 'a bird with a red crown'")

    read = classifier.predict(images)  # (N, 9)
    others = other_captions(truth, captions, keys or [""] * len(captions), seed)
    scores = {name: _count(i, read[:, i], truth, others, captions, classifier.ceiling) for i, name in enumerate(NAMES)}

    # The three colours together are the headline.
    colours = [scores[name] for name in COLOURS]
    return AttributeReport(
        num_images=len(images),
        attributes=scores,
        colour_accuracy=_mean([score.accuracy for score in colours]),
        mismatched_colour_accuracy=_mean([score.mismatched_accuracy for score in colours]),
        colour_ceiling=sum(score.ceiling for score in colours) / len(colours),
        colour_chance=sum(score.chance for score in colours) / len(colours),
        seed=seed,
    )


def named_values(captions: Sequence[str]) -> np.ndarray:
    """(N, 9) int64: for each of ATTRIBUTES the index of the value that a caption names, or UNNAMED or UNKNOWN."""
    truth = np.full((len(captions), len(NAMES)), UNNAMED, dtype=np.int64)
    for row, caption in enumerate(captions):
        for name, value in named_attributes(caption).items():
            values = ATTRIBUTES[name]
            truth[row, NAMES.index(name)] = values.index(value) if value in values else UNKNOWN
    return truth


def other_captions(truth: np.ndarray, captions: Sequence[str], keys: Sequence[str], seed: int = 0) -> np.ndarray:
    """For each caption the index of another image's, (N,) int64, -1 where all are of the same bird or equal.

    Drawn at random from those that name the same attributes, or, where there are none, from those that name most of them.

    truth: (N, 9) from `named_values`.
    keys: N, "" for no bird.
    """
    # Captions by which attributes they name.
    named = truth != UNNAMED
    groups = defaultdict(list)
    for row, pattern in enumerate(named):
        groups[tuple(pattern)].append(row)
    patterns = np.array(list(groups))

    # The likest first, in random order.
    others = np.full(len(truth), -1, dtype=np.int64)
    for row in range(len(truth)):
        rng = stream(seed, "other caption", row)
        likeness = (patterns & named[row]).sum(axis=1) * 100 - (patterns != named[row]).sum(axis=1)
        for value in np.unique(likeness)[::-1]:
            candidates = np.concatenate([groups[tuple(pattern)] for pattern in patterns[likeness == value]])
            foreign = _first_foreign(rng.permutation(candidates), row, captions, keys)
            if foreign is not None:
                others[row] = foreign
                break
    return others


def _first_foreign(candidates: np.ndarray, row: int, captions: Sequence[str], keys: Sequence[str]) -> int | None:
    for candidate in candidates:
        same_bird = keys[row] and keys[candidate] == keys[row]
        if not same_bird and captions[candidate] != captions[row]:
            return int(candidate)
    return None


def _count(
    attribute: int,
    read: np.ndarray,
    truth: np.ndarray,
    others: np.ndarray,
    captions: Sequence[str],
    ceiling: dict[str, float],
) -> AttributeScore:
    """read (N,): the values of one attribute on all images; truth (N, 9); others (N,)."""
    said = truth[:, attribute]
    named, left_open = said >= 0, said == UNNAMED
    others_said = np.where(others >= 0, said[others], UNNAMED)
    both = named & (others_said >= 0)
    chance = 1 / NUM_VALUES[attribute]

    # What a caption leaves open should differ between its images.
    pairs, differing = _pairs(read[left_open], [c for c, is_open in zip(captions, left_open, strict=True) if is_open])
    return AttributeScore(
        named=int(named.sum()),
        accuracy=_share(read[named] == said[named]),
        mismatched=int(both.sum()),
        mismatched_accuracy=_share(read[both] == others_said[both]),
        chance=chance,
        ceiling=ceiling[NAMES[attribute]],
        open=int(left_open.sum()),
        diversity=_entropy(read[left_open], NUM_VALUES[attribute]),
        pairs=pairs,
        pair_diversity=differing / pairs / (1 - chance) if pairs else None,
        impossible=int((said == UNKNOWN).sum()),
    )


def _share(hits: np.ndarray) -> float | None:
    return float(hits.mean()) if len(hits) else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _entropy(values: np.ndarray, num_values: int) -> float | None:
    """Entropy of the values' frequencies divided by log(num_values); 0 to 1, None without values."""
    if not len(values):
        return None

    shares = np.bincount(values, minlength=num_values) / len(values)
    return float(-sum(share * math.log(share) for share in shares if share) / math.log(num_values)) + 0.0


def _pairs(values: np.ndarray, captions: Sequence[str]) -> tuple[int, int]:
    """How many pairs of images share a caption, and how many of these have different values."""
    by_caption = defaultdict(list)
    for value, caption in zip(values, captions, strict=True):
        by_caption[caption].append(value)
    pairs = alike = 0
    for same in by_caption.values():
        pairs += math.comb(len(same), 2)
        alike += sum(math.comb(int(count), 2) for count in np.bincount(same))
    return pairs, pairs - alike


class AttributeAccuracy(BirdMetric):
    """How many of the attributes that captions name the images show."""

    needs = Needs(data_set="toybirds")

    @cached_property
    def reader(self) -> AttributeClassifier:
        return load_classifier(self.image_size, self.device, self.cache)

    def report(self) -> AttributeReport:
        """All counts."""
        captions, keys = [r.caption for r in self.requests], [r.key for r in self.requests]
        return read_attributes(self.all_images(), captions, self.reader, keys, self.seed)

    def compute(self) -> list[Score]:
        report = self.report()
        about = self.about() | {"seed": report.seed, "num_images": report.num_images, "unit": "share"}
        scores = []

        # The mean over the three colours, then each attribute that captions name.
        if report.colour_accuracy is not None:
            beside = {"of another caption": report.mismatched_colour_accuracy}
            beside |= {"chance": report.colour_chance, "ceiling": report.colour_ceiling}
            scores.append(Score("crown, wing, belly colour (mean)", report.colour_accuracy, about | {"beside": beside}))
        for name, counted in report.attributes.items():
            if counted.accuracy is not None:
                beside = {"of another caption": counted.mismatched_accuracy, "chance": counted.chance}
                beside |= {"ceiling": counted.ceiling}
                told = about | {"beside": beside, "num_named": counted.named}
                scores.append(Score(f"named {name}", counted.accuracy, told, details=asdict(counted)))

        # What captions leave open should differ between images of one caption.
        pairs = [counted.pair_diversity for counted in report.attributes.values() if counted.pair_diversity is not None]
        if pairs:
            told = about | {"beside": {"no difference": 0.0, "by lot": 1.0}}
            scores.append(Score("unnamed attributes differ", float(np.mean(pairs)), told))
        return scores


def main() -> None:
    run_bird_script("attributes", "attributes that captions name, read off generated ToyBirds", AttributeAccuracy)


if __name__ == "__main__":
    run_command(main)
