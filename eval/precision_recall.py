"""Improved precision and recall (Kynkäänniemi et al. 2019): `python eval/precision_recall.py REAL FAKE`.

Precision: the share of generated images within the reach of real ones; recall: the share of real images within the
reach of generated ones; an image's reach is the distance to its third nearest neighbour in its own set.
"""

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script: this folder hides the standard library's and others' names
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from eval.features.networks import FeatureNetwork
from eval.features.statistics import collect_features, load_source
from eval.FID import describe
from eval.protocol.scores import Score, add_arguments, extraction_of, network_of, report
from miscc.errors import DataError, run_command

ROWS = 2048  # compared with the whole other set at a time: 30,000 images take 240 MB


def reaches(features: torch.Tensor, neighbourhood: int = 3) -> torch.Tensor:
    """The distance (N,) of each row of (N, D) to its `neighbourhood`-th nearest other row."""
    parts = [torch.cdist(rows, features).kthvalue(neighbourhood + 1).values for rows in features.split(ROWS)]
    return torch.cat(parts)  # the nearest of all is the row itself, hence + 1


def share_within(features: torch.Tensor, others: torch.Tensor, reach: torch.Tensor) -> float:
    """The share of rows of `features` (M, D) that lie within the reach (N,) of any row of `others` (N, D)."""
    parts = [(torch.cdist(rows, others) <= reach).any(dim=1) for rows in features.split(ROWS)]
    return float(torch.cat(parts).double().mean())


def precision_recall(real: torch.Tensor, fake: torch.Tensor, neighbourhood: int = 3) -> tuple[float, float]:
    """Precision and recall of features (N, D) of generated against real images; as torch-fidelity has it."""
    precision = share_within(fake, real, reaches(real, neighbourhood))
    recall = share_within(real, fake, reaches(fake, neighbourhood))
    return precision, recall


def image_precision_recall(
    real: str | Path,
    fake: str | Path,
    network: FeatureNetwork,
    *,
    neighbourhood: int = 3,
    skip_broken: bool = False,
    **options,
) -> list[Score]:
    """Precision and recall of generated against real images; options as `eval.features.extract`."""
    real_source, skipped_real = load_source(real, skip_broken)
    fake_source, skipped_fake = load_source(fake, skip_broken)
    for path, source in ((real, real_source), (fake, fake_source)):
        if len(source) <= neighbourhood:
            raise DataError(
                f"{path}: {len(source)} images; {neighbourhood} neighbours need {neighbourhood + 1} or more"
            )
    features = [collect_features(source, network, **options) for source in (real_source, fake_source)]
    values = precision_recall(*features, neighbourhood=neighbourhood)
    protocol = {
        **network.protocol(),
        **describe("real", real, len(real_source), skipped_real),
        **describe("fake", fake, len(fake_source), skipped_fake),
        "neighbourhood": neighbourhood,
    }
    warnings = []
    if len(real_source) != len(fake_source):
        warnings.append(
            f"{len(real_source)} real and {len(fake_source)} generated images: precision and recall "
            "depend on both numbers; compare only with the same"
        )
    names = [f"{name}[{network.label}]" for name in ("precision", "recall")]
    return [Score(name, value, protocol, warnings=tuple(warnings)) for name, value in zip(names, values, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description="Improved precision and recall of generated against real images")
    parser.add_argument("real", help="real images: folder, list of files, .zip or .npz")
    parser.add_argument("fake", help="generated images, likewise")
    parser.add_argument("--neighbourhood", type=int, default=3, help="default 3")
    add_arguments(parser)
    args = parser.parse_args()
    if args.neighbourhood < 1:
        raise DataError("--neighbourhood must be at least 1")
    choices = {"neighbourhood": args.neighbourhood, "skip_broken": args.skip_broken}
    report(image_precision_recall(args.real, args.fake, network_of(args), **choices, **extraction_of(args)), args.json)


if __name__ == "__main__":
    run_command(main)
