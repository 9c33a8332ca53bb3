"""Inception score (Salimans et al. 2016) of a set of images: `python eval/IS.py IMAGES`.

exp of the mean Kullback-Leibler distance between a network's class probabilities for an image and their mean, in 10
splits as the papers have it. The network is part of the score's name: IS[imagenet], or IS[cub] by a classifier of
eval/train_classifier.py.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if __package__ in (None, ""):  # run as a script: this folder hides other packages' names
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch

from eval.features.classifier import load_classifier
from eval.features.networks import FeatureNetwork
from eval.metric import Metric, Needs, Run, Score, ScoringBatch, score_name
from eval.scripts import network_of, run_script
from miscc.command_line import named_device
from miscc.errors import ConfigError, DataError, run_command

if TYPE_CHECKING:
    from typing_extensions import Self

USUAL_SPLIT = 3000  # images a split in the papers on CUB and COCO: 30,000 in 10


class InceptionScore(Metric):
    """The Inception score of `num_images` images; holds sums for each split, never the logits.

    The images are dealt to the splits at random but always alike, as torch-fidelity deals them (same seed, same
    score); in the order of their names, one split would hold one kind of image.
    """

    needs = Needs(features=True)
    accumulated = ("probabilities", "negative_entropies", "seen")

    def __init__(
        self, num_images: int, splits: int = 10, seed: int = 2020, network: FeatureNetwork | None = None
    ) -> None:
        """Raises DataError for fewer images than splits.

        network: of the logits, for the score's name and protocol.
        """
        if not 1 <= splits <= num_images:
            raise DataError(
                f"{num_images} images cannot be dealt to {splits} splits (eval/IS.py --splits {splits}); give more"
            )
        self.num_images, self.splits, self.seed, self.network = num_images, splits, seed, network

        # Which split each image goes to.
        order = np.random.RandomState(seed).permutation(num_images)  # torch-fidelity's draw, for equal scores
        borders = [split * num_images // splits for split in range(splits + 1)]
        self.split_of = np.empty(num_images, dtype=np.int64)
        for split in range(splits):
            self.split_of[order[borders[split] : borders[split + 1]]] = split
        self.sizes = torch.from_numpy(np.diff(borders)).double()  # (splits,)

        # Sums for each split: of p (splits, K), of Σ p log p (splits,).
        self.seen = 0
        self.probabilities = torch.zeros(splits, 0, dtype=torch.float64)  # K is known with the first batch
        self.negative_entropies = torch.zeros(splits, dtype=torch.float64)

    @classmethod
    def from_run(cls, run: Run) -> "InceptionScore":
        return cls(len(run.requests), run.protocol.splits, run.protocol.seed, run.network)

    def update(self, batch: ScoringBatch) -> None:
        log_p = batch.logits.detach().cpu().double().log_softmax(dim=1)  # (N, K)
        p = log_p.exp()
        if not self.probabilities.shape[1]:
            self.probabilities = torch.zeros(self.splits, p.shape[1], dtype=torch.float64)

        # To the split of each image.
        splits = torch.from_numpy(self.split_of[np.asarray(batch.indices)])
        self.probabilities.index_add_(0, splits, p)
        self.negative_entropies.index_add_(0, splits, (p * log_p).sum(dim=1))
        self.seen += len(p)

    def merge(self, other: "Self") -> None:
        self.probabilities += other.probabilities
        self.negative_entropies += other.negative_entropies
        self.seen += other.seen

    def values(self) -> np.ndarray:
        """The score of each split, (splits,) float64."""
        if self.seen != self.num_images:
            raise ValueError(f"{self.seen} of {self.num_images} images seen")

        # mean of Σ p (log p − log p̄) = mean of Σ p log p − Σ p̄ log p̄; a class that no image has counts 0
        mean = self.probabilities / self.sizes[:, None]
        divergence = self.negative_entropies / self.sizes - torch.special.xlogy(mean, mean).sum(dim=1)
        return divergence.exp().numpy()

    def compute(self) -> list[Score]:
        network = self.network
        assert network is not None  # `inception_score` alone does without a name
        name, values, warnings = score_name(network), self.values(), ()
        if self.num_images // self.splits < USUAL_SPLIT // 3:
            warnings = (
                f"{name}: {self.num_images} images in {self.splits} splits: too small; the papers have 30,000 in 10",
            )

        # What is needed to compute the score again.
        about = {**network.protocol(), "num_images": self.num_images, "splits": self.splits, "seed": self.seed}
        about |= {"num_classes": network.num_classes}
        details = {"splits": values.tolist()}
        return [Score(name, float(values.mean()), about, float(values.std()), details=details, warnings=warnings)]


def inception_score(logits: torch.Tensor, splits: int = 10, seed: int = 2020) -> tuple[float, float]:
    """Mean and standard deviation over the splits, from the logits (N, K) of all images."""
    metric = InceptionScore(len(logits), splits, seed)
    metric.update(ScoringBatch(indices=range(len(logits)), logits=logits))
    values = metric.values()
    return float(values.mean()), float(values.std())


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--splits", type=int, default=10, help="default 10, as the papers")
    add("--classifier", metavar="FILE", help="score by the classifier of eval/train_classifier.py: IS[<data set>]")


def load(args: argparse.Namespace) -> FeatureNetwork:
    """The network that the options name, or a classifier, which is a network with weights and filter of its own."""
    if not args.classifier:
        return network_of(args)

    # The classifier brings its own.
    if args.weights or args.resize or args.network != "inception-tf":
        raise ConfigError("--classifier is a network with weights and filter; leave --network, --weights, --resize out")
    return load_classifier(args.classifier, named_device(args.device))


def main() -> None:
    run_script(InceptionScore, add_options, load=load)


if __name__ == "__main__":
    run_command(main)
