"""Improved precision and recall (Kynkäänniemi et al. 2019): `python eval/precision_recall.py REAL FAKE`.

Precision: the share of generated images within the reach of real ones; recall: the share of real images within the
reach of generated ones; an image's reach is the distance to its third nearest neighbour in its own set.
"""

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script: this folder hides other packages' names
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from eval.features.networks import FeatureNetwork
from eval.metric import Metric, Needs, Run, Score, ScoringBatch
from eval.scripts import run_script
from miscc.command_line import positive
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


class PrecisionRecall(Metric):
    """Precision and recall of generated against real images."""

    needs = Needs(features=True, real="features")
    accumulated = ("features",)

    def __init__(self, network: FeatureNetwork, real: torch.Tensor | None, neighbourhood: int = 3) -> None:
        """real: features (N, D) of the real images, None in all processes but the main one."""
        self.network, self.real, self.neighbourhood = network, real, neighbourhood
        self.features: list[torch.Tensor] = []

    @classmethod
    def from_run(cls, run: Run) -> "PrecisionRecall":
        return cls(run.feature_network, run.reference.features if run.reference else None)

    def update(self, batch: ScoringBatch) -> None:
        self.features.append(batch.features.cpu())

    def compute(self) -> list[Score]:
        fake, real = torch.cat(self.features), self.real  # (N, D), (M, D)
        assert real is not None  # in the main process

        # Both values depend on the numbers of images.
        fewest, warnings = min(len(fake), len(real)), ()
        if fewest <= self.neighbourhood:
            raise DataError(
                f"{fewest} images; {self.neighbourhood} neighbours need {self.neighbourhood + 1} or more, real and generated"
            )
        if len(fake) != len(real):
            warnings = (
                f"{len(real)} real and {len(fake)} generated images: precision and recall depend on both numbers; "
                "compare only with the same",
            )

        # Two scores by the same features.
        values = precision_recall(real, fake, self.neighbourhood)
        names = [f"{name}[{self.network.label}]" for name in ("precision", "recall")]
        about = {**self.network.protocol(), "num_real": len(real), "num_fake": len(fake)}
        about |= {"neighbourhood": self.neighbourhood}
        return [Score(name, value, about, warnings=warnings) for name, value in zip(names, values, strict=True)]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--neighbourhood", type=positive, default=3, metavar="K", help="default 3")


def build(run: Run, args: argparse.Namespace) -> PrecisionRecall:
    metric = PrecisionRecall.from_run(run)
    metric.neighbourhood = args.neighbourhood
    return metric


def main() -> None:
    run_script(PrecisionRecall, add_options, build)


if __name__ == "__main__":
    run_command(main)
