"""Kernel Inception distance (Binkowski et al. 2018) between two sets of images: `python eval/KID.py REAL FAKE`.

The unbiased squared maximum mean discrepancy under the kernel (x·y / D + 1)³, averaged over random subsets: unlike
FID it does not depend on the number of images. Subsets and defaults are torch-fidelity's.
"""

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script: this folder hides the standard library's and others' names
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from tqdm import tqdm

from eval.features.networks import FeatureNetwork
from eval.features.statistics import collect_features, load_source
from eval.FID import describe
from eval.protocol.scores import Score, add_arguments, distance_name, extraction_of, network_of, report
from miscc.errors import DataError, run_command


def squared_discrepancy(first: torch.Tensor, second: torch.Tensor, degree: int = 3) -> float:
    """The unbiased estimate of MMD² under (x·y / D + 1)^degree; (M, D) and (N, D), M, N >= 2. May be below 0."""
    first, second = first.double(), second.double()
    m, n, scale = len(first), len(second), 1 / first.shape[1]

    def kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (x @ y.T * scale + 1) ** degree

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
    random = np.random.RandomState(seed)  # torch-fidelity's generator, for equal numbers
    values = np.empty(subsets)
    for index in tqdm(range(subsets), "subsets", leave=False, disable=not sys.stderr.isatty()):
        chosen_fake = random.choice(len(fake), subset_size, replace=False)
        chosen_real = random.choice(len(real), subset_size, replace=False)
        values[index] = squared_discrepancy(fake[chosen_fake], real[chosen_real], degree)
    return float(values.mean()), float(values.std())


def kid(
    real: str | Path,
    fake: str | Path,
    network: FeatureNetwork,
    *,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 2020,
    skip_broken: bool = False,
    **options,
) -> Score:
    """KID of generated against real images; options as `eval.features.extract`.

    With fewer images than `subset_size`, subsets of as many as there are, and a warning.
    """
    real_source, skipped_real = load_source(real, skip_broken)
    fake_source, skipped_fake = load_source(fake, skip_broken)
    fewest = min(len(real_source), len(fake_source))
    if fewest < 2:
        raise DataError(f"{real if len(real_source) < 2 else fake}: holds a single image; KID needs two or more")
    warnings = []
    if fewest < subset_size:
        warnings.append(f"KID: {fewest} images, so subsets of {fewest} instead of {subset_size}; the ± is too small")
        subset_size = fewest
    warnings += [
        f"{path}: {len(skipped)} broken images were left out, e.g. {skipped[0]}"
        for path, skipped in ((real, skipped_real), (fake, skipped_fake))
        if skipped
    ]
    features = [collect_features(source, network, **options) for source in (real_source, fake_source)]
    mean, std = kernel_distance(*features, subsets=subsets, subset_size=subset_size, seed=seed)
    protocol = {
        **network.protocol(),
        **describe("real", real, len(real_source), skipped_real),
        **describe("fake", fake, len(fake_source), skipped_fake),
        "kernel": "(x·y / D + 1)^3",
        "subsets": subsets,
        "subset_size": subset_size,
        "seed": seed,
    }
    return Score(distance_name("KID", network), mean, protocol, std=std, warnings=tuple(warnings))


def main() -> None:
    parser = argparse.ArgumentParser(description="Kernel Inception distance between two sets of images")
    parser.add_argument("real", help="real images: folder, list of files, .zip or .npz")
    parser.add_argument("fake", help="generated images, likewise")
    parser.add_argument("--subsets", type=int, default=100, help="default 100")
    parser.add_argument("--subset-size", type=int, default=1000, help="default 1000")
    add_arguments(parser)
    args = parser.parse_args()
    if args.subsets < 1 or args.subset_size < 2:
        raise DataError("--subsets must be at least 1 and --subset-size at least 2")
    choices = {"subsets": args.subsets, "subset_size": args.subset_size}
    choices |= {"seed": args.seed, "skip_broken": args.skip_broken}
    report([kid(args.real, args.fake, network_of(args), **choices, **extraction_of(args))], args.json)


if __name__ == "__main__":
    run_command(main)
