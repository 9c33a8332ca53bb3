"""Kernel Inception distance (Binkowski et al. 2018) between two sets of images: `python eval/KID.py REAL FAKE`.

The unbiased squared maximum mean discrepancy under the kernel (x·y / D + 1)³, averaged over random subsets: unlike
FID it does not depend on the number of images. Subsets and defaults are torch-fidelity's.
"""

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script: this folder hides other packages' names
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch

from eval.features.networks import FeatureNetwork
from eval.metric import Metric, Needs, Run, Score, ScoringBatch, distance_name
from eval.scripts import run_script
from miscc.command_line import at_least, positive
from miscc.errors import DataError, run_command
from miscc.progress import ProgressBar


def squared_discrepancy(first: torch.Tensor, second: torch.Tensor, degree: int = 3) -> float:
    """The unbiased estimate of MMD² under (x·y / D + 1)^degree; (M, D) and (N, D), M, N >= 2. May be below 0."""
    first, second = first.double(), second.double()
    m, n, scale = len(first), len(second), 1 / first.shape[1]

    def kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (x @ y.T * scale + 1) ** degree

    # The diagonal, an image with itself, is left out.
    within_first, within_second = kernel(first, first), kernel(second, second)
    among_first = (within_first.sum() - within_first.trace()) / (m * (m - 1))
    among_second = (within_second.sum() - within_second.trace()) / (n * (n - 1))
    return float(among_first + among_second - 2 * kernel(first, second).mean())


def kernel_distance(
    real: torch.Tensor,
    fake: torch.Tensor,
    subsets: int = 100,
    subset_size: int = 1000,
    degree: int = 3,
    seed: int = 2020,
) -> tuple[float, float]:
    """Mean and standard deviation of MMD² over random subsets of features (N, D) of real and generated images.

    The subsets are those that torch-fidelity draws with the generated images as its first input.
    """
    # Order and sizes of the draws are torch-fidelity's.
    random = np.random.RandomState(seed)  # torch-fidelity's generator, for equal scores
    values = np.empty(subsets)
    for index in ProgressBar(range(subsets), "subsets", unit="subsets"):
        chosen_fake = random.choice(len(fake), subset_size, replace=False)
        chosen_real = random.choice(len(real), subset_size, replace=False)
        values[index] = squared_discrepancy(fake[chosen_fake], real[chosen_real], degree)
    return float(values.mean()), float(values.std())


class KernelDistance(Metric):
    """KID of generated against real images; with fewer images than `subset_size`, subsets of as many as there are."""

    needs = Needs(features=True, real="features")
    accumulated = ("features",)

    def __init__(
        self,
        network: FeatureNetwork,
        real: torch.Tensor | None,
        subsets: int = 100,
        subset_size: int = 1000,
        seed: int = 2020,
    ) -> None:
        """real: features (N, D) of the real images, None in all processes but the main one."""
        self.network, self.real = network, real
        self.subsets, self.subset_size, self.seed = subsets, subset_size, seed
        self.features: list[torch.Tensor] = []

    @classmethod
    def from_run(cls, run: Run) -> "KernelDistance":
        protocol, real = run.protocol, run.reference.features if run.reference else None
        return cls(run.feature_network, real, protocol.kid_subsets, protocol.kid_subset_size, protocol.seed)

    def update(self, batch: ScoringBatch) -> None:
        self.features.append(batch.features.cpu())

    def compute(self) -> list[Score]:
        fake, real, name = torch.cat(self.features), self.real, distance_name("KID", self.network)  # (N, D), (M, D)
        assert real is not None  # in the main process

        # Subsets of as many images as there are.
        size = min(self.subset_size, len(fake), len(real))
        if size < 2:
            single = "generated" if len(fake) < 2 else "real"
            raise DataError(f"{name}: a single image ({single}); KID needs two or more")
        warnings = ()
        if size < self.subset_size:
            warnings = (f"{name}: subsets of {size} instead of {self.subset_size} images; the ± is too small",)

        # The score, with what it depends on.
        mean, std = kernel_distance(real, fake, self.subsets, size, seed=self.seed)
        about = {**self.network.protocol(), "num_real": len(real), "num_fake": len(fake)}
        about |= {"kernel": "(x·y / D + 1)^3", "subsets": self.subsets, "subset_size": size, "seed": self.seed}
        return [Score(name, mean, about, std=std, warnings=warnings)]


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--subsets", dest="kid_subsets", metavar="N", type=positive, default=100, help="default 100")
    add("--subset-size", dest="kid_subset_size", metavar="N", type=at_least(2), default=1000, help="default 1000")


def main() -> None:
    run_script(KernelDistance, add_options)


if __name__ == "__main__":
    run_command(main)
