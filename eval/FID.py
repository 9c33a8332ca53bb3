"""Fréchet Inception distance (Heusel et al. 2017) between two sets of images: `python eval/FID.py REAL FAKE`.

The distance between two Gaussians, without the matrix square root; FID extrapolated to infinitely many images
(Chong and Forsyth 2020) and a bootstrap interval on request. Features and their statistics: eval/features/statistics.py.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a script: this folder hides the standard library's and others' names
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from tqdm import tqdm

from eval.features.networks import FeatureNetwork
from eval.features.statistics import (
    Statistics,
    collect_features,
    holds_statistics,
    image_statistics,
    load_source,
    save_statistics,
    statistics_of_features,
)
from eval.protocol.scores import (
    Score,
    add_arguments,
    add_cache_arguments,
    distance_name,
    extraction_of,
    network_of,
    report,
)
from miscc.errors import DataError, run_command
from miscc.randomness import stream

EXTRAPOLATION_POINTS = 15  # as Chong and Forsyth


def frechet_distance(mean1: np.ndarray, covariance1: np.ndarray, mean2: np.ndarray, covariance2: np.ndarray) -> float:
    """|μ1 − μ2|² + tr(Σ1 + Σ2 − 2 (Σ1 Σ2)^½) of two Gaussians; (D,), (D, D) each, D alike; symmetric.

    (Σ1 Σ2)^½ has the trace Σ √λ over the eigenvalues λ of RᵀΣ2R with Σ1 = RRᵀ, which is symmetric and positive
    semi-definite; so it holds for singular covariances too, where `sqrtm` breaks down, and is six times as fast.
    """
    return _distance_from_root(_root(covariance1), mean1, np.trace(covariance1), mean2, covariance2)


def _root(covariance: np.ndarray) -> torch.Tensor:
    """R (D, D) float64 with RRᵀ = covariance."""
    values, vectors = torch.linalg.eigh(torch.as_tensor(np.asarray(covariance, dtype=np.float64)))
    return vectors * values.clamp(min=0).sqrt()  # rounding leaves eigenvalues of about -1e-17 in place of 0


def _distance_from_root(root: torch.Tensor, mean1, trace1, mean2, covariance2) -> float:
    covariance2 = np.asarray(covariance2, dtype=np.float64)
    difference = np.asarray(mean1, dtype=np.float64) - np.asarray(mean2, dtype=np.float64)
    inner = root.T @ torch.as_tensor(covariance2) @ root
    trace_of_root = float(torch.linalg.eigvalsh(inner).clamp(min=0).sqrt().sum())
    return float(difference @ difference + trace1 + np.trace(covariance2) - 2 * trace_of_root)


def distance(real: Statistics, fake: Statistics) -> float:
    """The Fréchet distance of two sets of features."""
    return frechet_distance(real.mean, real.covariance, fake.mean, fake.covariance)


def extrapolated_distance(real: Statistics, features: torch.Tensor, seed: int = 2020) -> tuple[float, list]:
    """FID∞: the distance for infinitely many generated images, read off a line over 1/N (Chong and Forsyth 2020).

    features (N, D) of the generated images; 15 subsets of 5,000 (at least N/2 if N < 10,000) to N. Returns the
    value at 1/N = 0 and the [size, distance] points. The real set's own bias, of its fixed size, stays.
    """
    total = len(features)
    smallest = 5000 if total >= 10_000 else max(2, total // 2)
    sizes = np.unique(np.linspace(smallest, total, EXTRAPOLATION_POINTS).astype(int))
    if len(sizes) < 3:
        raise DataError(f"--extrapolate: {total} generated images are too few to draw a line through")
    root, trace = _root(real.covariance), np.trace(real.covariance)
    points = []
    for number, size in enumerate(tqdm(sizes, "extrapolating", leave=False)):
        chosen = stream(seed, "fid extrapolation", number).choice(total, size, replace=False)
        part = statistics_of_features(features[torch.from_numpy(chosen)])
        points.append([int(size), _distance_from_root(root, real.mean, trace, part.mean, part.covariance)])
    _, intercept = np.polyfit(1 / sizes, [value for _, value in points], 1)
    return float(intercept), points


def bootstrap_interval(
    real: Statistics, features: torch.Tensor, value: float, rounds: int, seed: int = 2020
) -> tuple[tuple[float, float], float]:
    """A 95 % interval for the distance, and its standard deviation, over resamplings of the generated images.

    features (N, D). Drawing with replacement raises every FID, because repeated images add no spread; the interval
    therefore is the percentiles' distance from the resamplings' mean, laid around `value`.
    """
    root, trace = _root(real.covariance), np.trace(real.covariance)
    values = []
    for number in tqdm(range(rounds), "bootstrap", leave=False):
        chosen = stream(seed, "fid bootstrap", number).integers(len(features), size=len(features))
        part = statistics_of_features(features[torch.from_numpy(chosen)])
        values.append(_distance_from_root(root, real.mean, trace, part.mean, part.covariance))
    low, high = np.percentile(values, [2.5, 97.5]) - np.mean(values) + value
    return (float(low), float(high)), float(np.std(values, ddof=1))


def fid(
    real: str | Path,
    fake: str | Path,
    network: FeatureNetwork,
    *,
    cache: str | Path | None = None,
    skip_broken: bool = False,
    extrapolate: bool = False,
    bootstrap: int = 0,
    seed: int = 2020,
    **options,
) -> list[Score]:
    """FID of generated against real images, each a source of eval/features/sources.py or a .npz of statistics.

    cache: where the real set's statistics are kept; extrapolate: adds FID∞; bootstrap: rounds for an interval, at
    least 20. options as `eval.features.extract`. Returns the score, and FID∞ after it if asked for.
    """
    single = extrapolate or bootstrap
    if single and holds_statistics(fake):
        raise DataError(f"{fake}: --extrapolate and --bootstrap need the generated images, not their statistics")
    if bootstrap and bootstrap < 20:
        raise DataError(f"--bootstrap {bootstrap}: too few rounds for a 95 % interval; take 20 or more, 200 is usual")
    of_real = image_statistics(real, network, skip_broken, cache, **options)
    if single:
        source, skipped = load_source(fake, skip_broken)
        features = collect_features(source, network, **options)
        of_fake = Statistics(*_moments(features), len(features), network.protocol(), skipped)
    else:
        of_fake = image_statistics(fake, network, skip_broken, **options)
    value = distance(of_real, of_fake)
    protocol = {
        **network.protocol(),
        **describe("real", real, of_real.num_images, of_real.skipped),
        **describe("fake", fake, of_fake.num_images, of_fake.skipped),
    }
    warnings = tuple(_warnings(network, of_real, of_fake, real, fake))
    interval, std = None, None
    if bootstrap:
        interval, std = bootstrap_interval(of_real, features, value, bootstrap, seed)
        protocol |= {"bootstrap_rounds": bootstrap, "seed": seed}
    scores = [Score(distance_name("FID", network), value, protocol, std, interval, warnings=warnings)]
    if extrapolate:
        limit, points = extrapolated_distance(of_real, features, seed)
        scores.append(
            Score(distance_name("FID∞", network), limit, {**protocol, "seed": seed}, details={"points": points})
        )
    return scores


def _moments(features: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    statistics = statistics_of_features(features)
    return statistics.mean, statistics.covariance


def describe(role: str, path: str | Path, count: int | None, skipped: Sequence[str]) -> dict:
    """The fields of a protocol that say what a set of images was."""
    return {role: str(path), f"num_{role}": count, f"skipped_{role}": len(skipped), f"skipped_{role}_names": [*skipped]}


def _warnings(network: FeatureNetwork, of_real: Statistics, of_fake: Statistics, real, fake):
    for path, statistics in ((real, of_real), (fake, of_fake)):
        if statistics.num_images is not None and statistics.num_images <= network.num_features:
            yield (
                f"{path}: {statistics.num_images} images for {network.num_features} features: the covariance is "
                "singular and the distance too large; compare only with numbers of as many images, or --extrapolate"
            )
        if not statistics.protocol:
            yield f"{path}: does not say with which network, weights and resize filter its statistics were made"
        if statistics.skipped:
            yield f"{path}: {len(statistics.skipped)} broken images were left out, e.g. {statistics.skipped[0]}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Fréchet Inception distance between two sets of images")
    parser.add_argument("real", help="real images: folder, list of files, .zip, .npz of images or of mu and sigma")
    parser.add_argument("fake", help="generated images, likewise")
    parser.add_argument("--extrapolate", action="store_true", help="also FID∞, for infinitely many generated images")
    parser.add_argument("--bootstrap", type=int, default=0, metavar="N", help="95 %% interval from N resamplings")
    parser.add_argument("--save-statistics", metavar="PATH", help="write REAL's statistics in pytorch-fid's format")
    add_arguments(parser)
    add_cache_arguments(parser)
    args = parser.parse_args()
    network, extraction = network_of(args), extraction_of(args)
    choices = {"cache": args.cache, "skip_broken": args.skip_broken}
    if args.save_statistics:
        if not args.save_statistics.endswith(".npz"):
            raise DataError(f"--save-statistics {args.save_statistics}: give it a name that ends in .npz")
        save_statistics(args.save_statistics, image_statistics(args.real, network, **choices, **extraction))
    requests = {"extrapolate": args.extrapolate, "bootstrap": args.bootstrap, "seed": args.seed}
    report(fid(args.real, args.fake, network, **choices, **requests, **extraction), args.json)


if __name__ == "__main__":
    run_command(main)
