"""The numbers of a protocol, gathered while images stream by: each measure looks at a batch, and gives its scores at the end.

Which numbers are wanted is eval/protocol/protocols.py's, drawing and reporting eval/evaluate.py's, the formulas are in the files
named after them.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from eval import attributes, mask_iou
from eval.features.networks import FeatureNetwork
from eval.features.reference import Reference
from eval.features.statistics import StreamedStatistics
from eval.FID import distance
from eval.IS import USUAL_SPLIT, StreamedScore
from eval.KID import kernel_distance
from eval.LPIPS import diversity, load_perceptual_distance
from eval.precision_recall import precision_recall
from eval.protocol.protocols import Protocol as Scoring
from eval.protocol.scores import Score, distance_name, score_name
from eval.R_precision import draw_candidates, encode_captions, encoder_hash, r_precision
from miscc.distributed import World, gather
from miscc.errors import CheckpointError, DataError
from miscc.images import from_uint8
from miscc.vocabulary import Vocabulary
from models.modes import no_tf32
from sampling.encoders import Encoders
from sampling.pipeline import Generated
from sampling.requests import Request

FROM_FEATURES = ("FID", "KID", "IS", "precision_recall")  # metrics that one pass through a feature network gives
SINGLE_FEATURES = ("KID", "precision_recall")  # of these, what compares single images
OF_BIRDS = ("attributes", "mask_iou")  # metrics by judges that know ToyBirds alone
SMALLEST_FOR_LPIPS = 32  # pixels; AlexNet's pooling leaves nothing of smaller images


class Measure(Protocol):
    """parts: for each metric a function that gives its scores, at the main process and after `gather`.

    A part raises UserError where it cannot be computed; that costs the others nothing.
    """

    parts: dict[str, Callable[[], list[Score]]]

    def update(self, drawn: Generated) -> None:
        """Look at the next images of this process."""

    def gather(self, world: World) -> None:
        """Bring what all processes have seen to the main one."""


class FeatureMeasure:
    """Fréchet and kernel distance, class score, precision and recall."""

    def __init__(
        self, network: FeatureNetwork, protocol: Scoring, real: Reference | None, rows: range, num_images: int
    ) -> None:
        """real: at the main process; rows: the images of this process, out of `num_images`."""
        self.network, self.protocol, self.real, self.num_images = network, protocol, real, num_images
        every = {
            "FID": self._frechet,
            "KID": self._kernel,
            "IS": self._class_score,
            "precision_recall": self._precision_recall,
        }
        self.parts = {metric: every[metric] for metric in protocol.metrics if metric in every}
        self.streamed = StreamedStatistics(network.num_features, network.device) if "FID" in self.parts else None
        self.score = None
        if "IS" in self.parts and num_images >= protocol.splits:
            self.score = StreamedScore(num_images, protocol.splits, protocol.seed)
            self.whole = self.score.split_of
            self.score.split_of = self.whole[rows.start : rows.stop]
        self.features: list[torch.Tensor] | None = [] if set(SINGLE_FEATURES) & set(self.parts) else None

    def update(self, drawn: Generated) -> None:
        features, logits = self.network.look(list(drawn.images))
        if self.streamed is not None:
            self.streamed.update(features)
        if self.score is not None:
            self.score.update(logits)
        if self.features is not None:
            self.features.append(features.cpu())

    def gather(self, world: World) -> None:
        if world.size == 1:
            return
        if self.streamed is not None:
            self.streamed.device = torch.device("cpu")
            self.streamed.mean, self.streamed.scatter = self.streamed.mean.cpu(), self.streamed.scatter.cpu()
            for other in gather(self.streamed, world)[1:]:
                self.streamed.merge(other)
        if self.score is not None:
            for other in gather(self.score, world)[1:]:
                self.score.probabilities += other.probabilities
                self.score.negative_entropies += other.negative_entropies
                self.score.seen += other.seen
            self.score.split_of = self.whole
        if self.features is not None:
            self.features = [rows for part in gather(self.features, world) for rows in part]

    def _counts(self, with_real: bool = True) -> dict[str, Any]:
        if not with_real:
            return {**self.network.protocol(), "num_images": self.num_images}
        real = self.real.statistics.num_images
        return {**self.network.protocol(), "num_real": real, "num_fake": self.num_images}

    def _frechet(self) -> list[Score]:
        statistics = self.streamed.result(self.network.protocol())
        fewest = min(self.num_images, self.real.statistics.num_images)
        warnings = ()
        if fewest <= self.network.num_features:
            warnings = (
                f"{distance_name('FID', self.network)}: {fewest} images for {self.network.num_features} features: the "
                "covariance is singular and the distance too large; compare only with numbers of as many images",
            )
        value = distance(self.real.statistics, statistics)
        return [Score(distance_name("FID", self.network), value, self._counts(), warnings=warnings)]

    def _kernel(self) -> list[Score]:
        protocol, fake, real = self.protocol, torch.cat(self.features), self.real.features
        size = min(protocol.kid_subset_size, len(fake), len(real))
        name = distance_name("KID", self.network)
        warnings = ()
        if size < protocol.kid_subset_size:
            warnings = (f"{name}: subsets of {size} images instead of {protocol.kid_subset_size}; the ± is too small",)
        mean, std = kernel_distance(real, fake, protocol.kid_subsets, size, seed=protocol.seed)
        counts = self._counts() | {"subsets": protocol.kid_subsets, "subset_size": size, "seed": protocol.seed}
        return [Score(name, mean, counts, std=std, warnings=warnings)]

    def _class_score(self) -> list[Score]:
        splits = self.protocol.splits
        if self.score is None:
            raise DataError(f"{self.num_images} images cannot be dealt to {splits} splits; draw more")
        values = self.score.result()
        name = score_name(self.network)
        warnings = ()
        if self.num_images // splits < USUAL_SPLIT // 3:
            warnings = (
                f"{name}: {self.num_images} images in {splits} splits: too small; the papers have 30,000 in 10",
            )
        about = self._counts(with_real=False) | {"splits": splits, "seed": self.protocol.seed}
        about |= {"num_classes": self.network.num_classes}
        details = {"splits": values.tolist()}
        return [Score(name, float(values.mean()), about, float(values.std()), details=details, warnings=warnings)]

    def _precision_recall(self) -> list[Score]:
        fake, real = torch.cat(self.features), self.real.features
        if min(len(fake), len(real)) < 4:
            raise DataError("three neighbours need four or more images, real and generated")
        values = precision_recall(real, fake)
        names = [f"{name}[{self.network.label}]" for name in ("precision", "recall")]
        about = self._counts() | {"neighbourhood": 3}
        return [Score(name, value, about) for name, value in zip(names, values, strict=True)]


class RetrievalMeasure:
    """R-precision: does an image find its own caption among wrong ones?"""

    def __init__(
        self,
        encoders: Encoders,
        vocabulary: Vocabulary,
        requests: Sequence[Request],
        protocol: Scoring,
        generators_encoder: str | None,
    ) -> None:
        """vocabulary: for encoders that carry none; generators_encoder: fingerprint of the generator's text encoder.

        Raises CheckpointError without an image encoder, DataError for too few captions.
        """
        if encoders.image_encoder is None:
            raise CheckpointError("these encoders have no image encoder; put image_encoder*.pth beside them")
        if len(requests) < protocol.folds:
            raise DataError(f"{len(requests)} images cannot be dealt to {protocol.folds} folds; draw more")
        captions, keys = [r.caption for r in requests], [r.key for r in requests]
        self.lists = draw_candidates(captions, keys, protocol.candidates, protocol.seed)
        self.encoders, self.protocol = encoders, protocol
        self.vocabulary = encoders.vocabulary or vocabulary
        self.generators_encoder = generators_encoder
        self.device = next(encoders.image_encoder.parameters()).device
        self.codes: list[torch.Tensor] = []
        self.parts = {"R_precision": self._scores}

    @torch.inference_mode()
    def update(self, drawn: Generated) -> None:
        pixels = torch.from_numpy(drawn.images).to(self.device).permute(0, 3, 1, 2)
        with no_tf32():
            self.codes.append(self.encoders.image_encoder(from_uint8(pixels))[1].float().cpu())

    def gather(self, world: World) -> None:
        if world.size > 1:
            self.codes = [rows for part in gather(self.codes, world) for rows in part]

    def _scores(self) -> list[Score]:
        protocol, lists, judge = self.protocol, self.lists, encoder_hash(self.encoders)
        captions = encode_captions(lists.pool, self.encoders, self.vocabulary)
        codes = torch.cat(self.codes)
        mean, std = r_precision(codes, captions, lists.true, lists.candidates, protocol.folds, protocol.seed)
        about = {
            "encoder_hash": judge,
            "num_images": len(codes),
            "candidates": lists.candidates.shape[1],
            "pool": len(lists.pool),
            "folds": protocol.folds,
            "seed": protocol.seed,
            "unit": "%",
            "chance": 100 / (1 + lists.candidates.shape[1]),
            "encoder_of_the_generator": None if self.generators_encoder is None else self.generators_encoder == judge,
        }
        warnings = ()
        if about["encoder_of_the_generator"]:
            warnings = (
                "R-precision: these are the encoders that the generator was trained with, which flatters it; "
                "judge with encoders that were trained apart (--encoders)",
            )
        return [Score(f"R-precision%[damsm:{judge[:8]}]", 100 * mean, about, std=100 * std, warnings=warnings)]


class BirdMeasure:
    """What only a drawn world can tell: attributes that captions name, and masks against the birds' outlines."""

    def __init__(
        self, requests: Sequence[Request], protocol: Scoring, device: torch.device, cache: Path | None
    ) -> None:
        """cache: where trained judges are kept, None: the usual place, because training them takes minutes."""
        self.requests, self.protocol, self.device, self.cache = requests, protocol, device, cache
        self.images: list[np.ndarray] = []
        self.masks: list[list[np.ndarray]] = []
        every = {"attributes": self._attributes, "mask_iou": self._mask_iou}
        self.parts = {metric: every[metric] for metric in protocol.metrics if metric in every}

    def update(self, drawn: Generated) -> None:
        self.images.append(drawn.images)
        self.masks.append(drawn.masks)

    def gather(self, world: World) -> None:
        if world.size > 1:
            images, masks = gather(self.images, world), gather(self.masks, world)
            self.images, self.masks = ([batch for part in parts for batch in part] for parts in (images, masks))

    def _attributes(self) -> list[Score]:
        images = np.concatenate(self.images)
        judge = attributes.load_judge(images.shape[1], self.device, self.cache)
        captions, keys = [r.caption for r in self.requests], [r.key for r in self.requests]
        report = attributes.judge_attributes(images, captions, judge, keys, self.protocol.seed)
        about = {"judge": asdict(judge.recipe) | {"recipe_hash": judge.recipe.key()}, "seed": report.seed}
        about |= {"num_images": report.num_images, "unit": "share"}
        scores = []
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
        pairs = [counted.pair_diversity for counted in report.attributes.values() if counted.pair_diversity is not None]
        if pairs:
            told = about | {"beside": {"no difference": 0.0, "by lot": 1.0}}
            scores.append(Score("unnamed attributes differ", float(np.mean(pairs)), told))
        return scores

    def _mask_iou(self) -> list[Score]:
        stages = [np.concatenate(stage) for stage in zip(*self.masks, strict=True)]
        images = np.concatenate(self.images)
        if not stages:
            raise DataError("these images come without masks; SSA-GAN predicts them, AttnGAN and DF-GAN do not")
        judge = mask_iou.load_judge(images.shape[1], self.device, self.cache)
        report = mask_iou.mask_iou(images, stages, judge)
        about = {"judge": asdict(judge.recipe) | {"recipe_hash": judge.recipe.key()}}
        about |= {"num_images": report.num_images - report.without_bird, "without_bird": report.without_bird}
        scores = []
        for stage in report.stages:
            beside = {"other polarity": stage.other_iou, "of another image": stage.shuffled_iou}
            beside |= {"mean shape": report.mean_shape_iou, "ceiling": report.ceiling}
            name = f"mask IoU {stage.size} px" + (" (inverted)" if stage.inverted else "")
            scores.append(Score(name, stage.iou, about | {"beside": beside}, details=asdict(stage)))
        return scores


class DiversityMeasure:
    """LPIPS among images of the same caption; looks at images that are drawn for it, not at the protocol's others."""

    def __init__(self, weights: str | Path | None, image_size: int, captions: Sequence[str], device) -> None:
        """captions: of each image that will come. Raises DataError below 32 px, CheckpointError without weights."""
        if image_size < SMALLEST_FOR_LPIPS:
            raise DataError(f"images of {image_size} px are too small for LPIPS, which needs {SMALLEST_FOR_LPIPS} px")
        self.network = load_perceptual_distance(weights, device)
        self.captions = captions
        self.images: list[np.ndarray] = []
        self.parts = {"diversity": self._scores}

    def update(self, drawn: Generated) -> None:
        self.images.extend(drawn.images)

    def gather(self, world: World) -> None:
        """Only the main process draws for this."""

    def _scores(self) -> list[Score]:
        values = list(diversity(self.images, self.captions, self.network).values())
        about = {"network": self.network.name, "weights_hash": self.network.weights_hash}
        about |= {"num_captions": len(values), "num_images": len(self.images), "pairs": "all of the same caption"}
        return [Score(f"{self.network.name} diversity", float(np.mean(values)), about, std=float(np.std(values)))]
