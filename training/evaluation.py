"""Evaluation during training: which classes are held out for it, the score every few epochs, and the best one.

The metric is eval/FID.py's, imported only where a run evaluates; training/trainer.py decides when, and saves the best
checkpoint.
"""

import logging
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from datasets.records import Records
from datasets.settings import DataSettings
from miscc.errors import CheckpointError, ConfigError, DataError, UserError
from miscc.progress import ProgressBar
from miscc.randomness import stream
from miscc.vocabulary import Vocabulary
from models.backbones import Backbone
from sampling.pipeline import TextToImage
from sampling.requests import split_requests
from training.data import read_records
from training.settings import EvaluationSettings

logger = logging.getLogger(__name__)

# TRAIN.EVAL_MEASURE: (networks, resize filter). The first network that nothing in the training has as its backbone is used.
MEASURES = {
    "FD": (("efficientnet-lite0", "efficientnet-lite2"), "clean"),  # weights come with their packages: works anywhere
    "FID": (("inception-tf",), "tf1"),  # what papers mean, where the weights are
}
BATCH_SIZE = 32  # images drawn at a time


def split_records(
    data: DataSettings, share: float, seed: int, vocabulary: Vocabulary | None = None
) -> tuple[Records, Records | None]:
    """The images that are trained on, and those that the evaluations are made with; None where the share is 0."""
    records = read_records(data, "train", vocabulary)
    return hold_out(records, share, seed) if share else (records, None)


def hold_out(records: Records, share: float, seed: int) -> tuple[Records, Records]:
    """(records without some classes, the records of these classes): a function of the records and the seed.

    `share` of all classes, drawn at random, and as many more as two images need; of the images where there is one class
    only. Raises DataError where nothing would be left to train on.
    """
    classes = np.unique(records.class_ids)
    groups = [np.flatnonzero(records.class_ids == c) for c in classes] if len(classes) > 1 else []
    groups = groups or [np.array([index]) for index in range(len(records))]

    # Whole groups, in random order.
    num_groups, chosen = max(1, round(share * len(groups))), []
    for taken, group in enumerate(stream(seed, "held-out classes").permutation(len(groups))):
        if taken >= num_groups and len(chosen) >= 2:
            break
        chosen += groups[group].tolist()

    kept = sorted(set(range(len(records))) - set(chosen))
    if not kept or len(chosen) < 2:
        raise DataError(
            f"TRAIN.EVAL_CLASSES: {share} of {len(groups)} classes leaves {len(kept)} images to train on and "
            f"{len(chosen)} to evaluate with; evaluation needs two or more: change it, or set TRAIN.EVAL_EVERY to 0"
        )
    return records.select(kept), records.select(sorted(chosen))


class Evaluation:
    """The distance of generated to held-out real images, and the best that a run has reached.

    Captions and noise are the same each time.

    name: of the score, with network, number of images and which images.
    best: the lowest score so far; None before the first.
    best_step: the step at which it was reached.
    """

    def __init__(
        self,
        held_out: Records,
        image_size: int,
        device: torch.device,
        settings: EvaluationSettings,
        seed: int = 100,
        skip_broken: bool = False,
        networks: Iterable[nn.Module] = (),
    ):
        """Extracts the real images' features, so that missing files are found before training. Raises UserError.

        networks: of the run; the score is by a network that none of them holds as its backbone.
        """
        from eval.features.networks import WeightsError, load_network
        from eval.features.reference import RealImages, reference
        from eval.metric import distance_name

        # The network of the score.
        names, resize = MEASURES[settings.measure]
        seen = {module.name for network in networks for module in network.modules() if isinstance(module, Backbone)}
        name = next((name for name in names if name not in seen), None)
        if name is None:
            raise ConfigError(
                f"TRAIN.EVAL_MEASURE: all networks of {settings.measure} train here ({', '.join(names)}) and would flatter; "
                f"choose another measure, or another GAN.PROJECTED.BACKBONE or DAMSM.BACKBONE"
            )
        try:
            self.network = load_network(name, resize=resize, device=device)
        except (UserError, ImportError) as error:
            reason = error.text if isinstance(error, WeightsError) else error
            raise ConfigError(f"TRAIN.EVAL_MEASURE: {settings.measure} cannot be computed here: {reason}") from None

        # The real images, and what is drawn.
        num_images = settings.num_images
        if num_images < 2:
            raise ConfigError(f"TRAIN.EVAL_IMAGES: must be 2 or more, not {num_images}")
        if skip_broken:
            held_out = _readable(held_out, image_size)
        self.real = reference(RealImages(held_out, image_size), self.network, batch_size=BATCH_SIZE).statistics
        self.requests = split_requests(held_out, num_images=num_images, seed=seed)
        self.seed, self.num_held_out = seed, len(held_out)

        # Its names, and the best so far.
        self.title = distance_name("FID", self.network)
        plain = self.title.replace("[", "_").replace("]", "").replace(":", "_")  # TensorBoard allows no brackets
        self.name = f"evaluation/{plain}_{num_images}_images_of_held_out_classes"
        self.best: float | None = None
        self.best_step = 0

    def introduction(self) -> list[str]:
        """What will be measured; with a warning where there are too few images for an unbiased score."""
        lines = [
            f"evaluations: {self.title} of {len(self.requests)} images against {self.num_held_out} of held-out training "
            f"classes" + ("" if self.best is None else f"; best until now {self.best:.6g} at step {self.best_step}")
        ]
        fewest = min(self.num_held_out, len(self.requests))
        if fewest <= self.network.num_features:
            lines.append(
                f"{self.title}: {fewest} images for {self.network.num_features} features make it too large; it compares "
                f"the checkpoints of this run, and nothing else"
            )
        return lines

    def line(self, value: float, epoch: int, saved: Path | None) -> str:
        """An evaluation for the log.

        saved: the best checkpoint, where this is it.
        """
        text = f"evaluation after epoch {epoch}: {self.title} {value:.6g}, held-out classes"
        if saved:
            return f"{text}; the best so far: {saved}"
        return text if self.best is None else f"{text} (best: {self.best:.6g})"

    def measure(self, pipeline: TextToImage) -> float:
        """The score of a generator, lower is better. Nothing is drawn from torch's global random generators."""
        from eval.FID import FrechetDistance
        from eval.metric import ScoringBatch

        # Features of what is drawn, batch by batch.
        metric = FrechetDistance(self.network, self.real)
        with ProgressBar(what="evaluating", total=len(self.requests), unit="images") as bar:
            for drawn in pipeline.generate_batches(self.requests, self.seed, None, BATCH_SIZE, with_masks=False):
                features, _ = self.network.extract_features(list(drawn.images))  # (N, D)
                metric.update(ScoringBatch(features=features))
                bar.update(len(drawn.images))
        return metric.compute()[0].value

    def update_best(self, value: float, step: int) -> bool:
        """Record a value; return True if it is a new best (NaN never is)."""
        if not math.isfinite(value) or (self.best is not None and value >= self.best):
            return False
        self.best, self.best_step = value, step
        return True

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"name": self.name, "best": self.best, "best_step": self.best_step}

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Continue from a checkpoint's `state`; scores of another name do not compare, so the best is then dropped.

        Raises CheckpointError for a malformed one.
        """
        if not state:
            return
        try:
            name, best, step = str(state["name"]), state["best"], int(state["best_step"])
            best = None if best is None else float(best)
        except (LookupError, TypeError, ValueError):
            raise CheckpointError(
                "the checkpoint's best score is damaged; use another checkpoint, or start anew from its networks (TRAIN.NET_G)"
            ) from None
        if name == self.name:
            self.best, self.best_step = best, step


def _readable(records: Records, image_size: int) -> Records:
    """The records whose images can be read; the others are named in the log."""
    from eval.features.reference import RealImages

    images, good = RealImages(records, image_size), []
    for index in range(len(records)):
        try:
            images.read(index)
        except DataError as error:
            logger.warning("not evaluated with: %s", error)
        else:
            good.append(index)
    return records.select(good)
