"""Inception score (Salimans et al. 2016) of a set of images: `python eval/IS.py IMAGES`.

exp of the mean Kullback-Leibler distance between a network's class probabilities for an image and their mean, in 10
splits as the papers have it. Which network judged is part of the score's name: IS[imagenet], or IS[cub] by a classifier of
eval/train_classifier.py.
"""

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script: this folder hides the standard library's and others' names
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch

from eval.features.classifier import load_classifier
from eval.features.networks import FeatureNetwork
from eval.features.statistics import extract, load_source
from eval.protocol.scores import Score, add_arguments, extraction_of, named_device, network_of, report, score_name
from miscc.errors import ConfigError, DataError, run_command

USUAL_SPLIT = 3000  # images a split in the papers on CUB and COCO: 30,000 in 10


class StreamedScore:
    """The Inception score of `num_images` images whose logits come in batches; holds sums a split, never the logits.

    The images are dealt to the splits at random but always alike, as torch-fidelity deals them (same seed, same
    score); in the order of their names, one split would hold one kind of image.
    """

    def __init__(self, num_images: int, splits: int = 10, seed: int = 2020) -> None:
        if not 1 <= splits <= num_images:
            raise DataError(f"--splits {splits}: {num_images} images cannot be dealt to as many splits")
        order = np.random.RandomState(seed).permutation(num_images)  # torch-fidelity's draw, for equal numbers
        borders = [split * num_images // splits for split in range(splits + 1)]
        self.split_of = np.empty(num_images, dtype=np.int64)
        for split in range(splits):
            self.split_of[order[borders[split] : borders[split + 1]]] = split
        self.sizes = np.diff(borders)
        self.seen = 0
        self.probabilities: torch.Tensor | None = None  # (splits, K): sum of p
        self.negative_entropies = torch.zeros(splits, dtype=torch.float64)  # sum of Σ p log p

    def update(self, logits: torch.Tensor) -> None:
        """Add the logits (N, K) of the next N images."""
        log_p = logits.detach().cpu().double().log_softmax(dim=1)
        p = log_p.exp()
        if self.probabilities is None:
            self.probabilities = torch.zeros(len(self.sizes), logits.shape[1], dtype=torch.float64)
        splits = torch.from_numpy(self.split_of[self.seen : self.seen + len(logits)])
        self.probabilities.index_add_(0, splits, p)
        self.negative_entropies.index_add_(0, splits, (p * log_p).sum(dim=1))
        self.seen += len(logits)

    def result(self) -> np.ndarray:
        """The score of each split, float64."""
        if self.seen != len(self.split_of):
            raise ValueError(f"{self.seen} of {len(self.split_of)} images seen")
        sizes = torch.from_numpy(self.sizes).double()
        mean = self.probabilities / sizes[:, None]
        # mean of Σ p (log p − log p̄) = mean of Σ p log p − Σ p̄ log p̄; a class that no image has counts 0
        divergence = self.negative_entropies / sizes - torch.special.xlogy(mean, mean).sum(dim=1)
        return divergence.exp().numpy()


def inception_score(logits: torch.Tensor, splits: int = 10, seed: int = 2020) -> tuple[float, float]:
    """Mean and standard deviation over the splits, from the logits (N, K) of all images."""
    score = StreamedScore(len(logits), splits, seed)
    score.update(logits)
    values = score.result()
    return float(values.mean()), float(values.std())


def image_score(
    path: str | Path,
    network: FeatureNetwork,
    *,
    splits: int = 10,
    seed: int = 2020,
    skip_broken: bool = False,
    **options,
) -> Score:
    """The Inception score of the images at `path`; options as `eval.features.extract`."""
    source, skipped = load_source(path, skip_broken)
    score = StreamedScore(len(source), splits, seed)
    for _, logits in extract(source, network, **options):
        score.update(logits)
    values = score.result()
    protocol = {
        **network.protocol(),
        "images": str(path),
        "num_images": len(source),
        "skipped": len(skipped),
        "skipped_names": list(skipped),
        "splits": splits,
        "seed": seed,
        "num_classes": network.num_classes,
    }
    warnings = []
    if len(source) // splits < USUAL_SPLIT // 3:
        warnings.append(
            f"{path}: {len(source)} images in {splits} splits: the score is too small; the papers have 30,000 in 10"
        )
    if skipped:
        warnings.append(f"{path}: {len(skipped)} broken images were left out, e.g. {skipped[0]}")
    return Score(
        score_name(network),
        float(values.mean()),
        protocol,
        std=float(values.std()),
        details={"splits": values.tolist()},
        warnings=tuple(warnings),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Inception score of a set of images")
    parser.add_argument("images", help="generated images: folder, list of files, .zip or .npz")
    parser.add_argument("--splits", type=int, default=10, help="default 10, as the papers")
    parser.add_argument(
        "--classifier", metavar="FILE", help="judge by the classifier of eval/train_classifier.py: IS[<data set>]"
    )
    add_arguments(parser)
    args = parser.parse_args()
    if args.classifier and (args.weights or args.resize or args.network != parser.get_default("network")):
        raise ConfigError("--classifier is a network with weights and filter; leave --network, --weights, --resize out")
    choices = {"splits": args.splits, "seed": args.seed, "skip_broken": args.skip_broken}
    network = load_classifier(args.classifier, named_device(args.device)) if args.classifier else network_of(args)
    report([image_score(args.images, network, **choices, **extraction_of(args))], args.json)


if __name__ == "__main__":
    run_command(main)
