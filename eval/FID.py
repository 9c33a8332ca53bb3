"""Fréchet Inception distance (Heusel et al. 2017) between two sets of images: `python eval/FID.py REAL FAKE`.

The distance between two Gaussians, without the matrix square root; FID extrapolated to infinitely many images
(Chong and Forsyth 2020) and a bootstrap interval on request. Features and their statistics: eval/features/statistics.py.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if __package__ in (None, ""):  # run as a script: this folder hides other packages' names
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch

from eval.features.networks import FeatureNetwork
from eval.features.statistics import (
    Statistics,
    StreamedStatistics,
    check_comparable,
    holds_statistics,
    image_statistics,
    load_source,
    save_statistics,
    statistics_of_features,
)
from eval.metric import Metric, Needs, Run, Score, ScoringBatch, distance_name
from eval.scripts import (
    add_arguments,
    add_cache_arguments,
    add_sources,
    extraction_of,
    network_of,
    report,
    say_origin,
    trained_with_of,
    update_from,
)
from miscc.command_line import CommandParser
from miscc.errors import DataError, run_command
from miscc.progress import ProgressBar
from miscc.randomness import stream

if TYPE_CHECKING:
    from typing_extensions import Self

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

    # The trace of the root, from the eigenvalues of a symmetric product.
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

    # The distance for each size, from the same decomposition of the real covariance.
    root, trace = _root(real.covariance), np.trace(real.covariance)
    points = []
    for index, size in enumerate(ProgressBar(sizes, "extrapolating", unit="sizes")):
        chosen = stream(seed, "fid extrapolation", index).choice(total, size, replace=False)
        part = statistics_of_features(features[torch.from_numpy(chosen)])
        points.append([int(size), _distance_from_root(root, real.mean, trace, part.mean, part.covariance)])

    # A line over 1/N, read at 0.
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
    for index in ProgressBar(range(rounds), "bootstrap", unit="rounds"):
        chosen = stream(seed, "fid bootstrap", index).integers(len(features), size=len(features))
        part = statistics_of_features(features[torch.from_numpy(chosen)])
        values.append(_distance_from_root(root, real.mean, trace, part.mean, part.covariance))

    # Around the value itself: resampling raises every distance.
    low, high = np.percentile(values, [2.5, 97.5]) - np.mean(values) + value
    return (float(low), float(high)), float(np.std(values, ddof=1))


class FrechetDistance(Metric):
    """FID of generated against real images, FID∞ and a bootstrap interval."""

    needs = Needs(features=True, real="statistics")
    accumulated = ("streamed", "features")

    def __init__(
        self,
        network: FeatureNetwork,
        real: Statistics | None,
        *,
        extrapolate: bool = False,
        bootstrap: int = 0,
        seed: int = 2020,
    ) -> None:
        """Raises DataError for too few rounds.

        real: the real images' statistics, None in all processes but the main one;
        extrapolate: also FID∞;
        bootstrap: rounds for a 95 % interval, at least 20, 0: none.
        """
        if bootstrap and bootstrap < 20:
            raise DataError(
                f"--bootstrap {bootstrap}: too few rounds for a 95 % interval; take 20 or more, 200 is usual"
            )
        self.network, self.real = network, real
        self.extrapolate, self.bootstrap, self.seed = extrapolate, bootstrap, seed
        self.keep_features = extrapolate or bootstrap > 0
        self.streamed = StreamedStatistics(network.num_features, network.device)
        self.features: list[torch.Tensor] = []

    @classmethod
    def from_run(cls, run: Run) -> "FrechetDistance":
        return cls(run.feature_network, run.reference.statistics if run.reference else None)

    def update(self, batch: ScoringBatch) -> None:
        if self.keep_features:
            self.features.append(batch.features.cpu())
        else:
            self.streamed.update(batch.features)

    def merge(self, other: "Self") -> None:
        self.streamed.merge(other.streamed)
        self.features += other.features

    def compute(self) -> list[Score]:
        real = self.real
        assert real is not None  # in the main process
        if not self.keep_features:
            return [frechet_score(real, self.streamed.result(self.network.protocol()), self.network)]

        # Single features are there: resamplings of them, and the limit for many.
        features = torch.cat(self.features)  # (N, D)
        score = frechet_score(real, statistics_of_features(features, self.network.protocol()), self.network)
        scores = [score]
        if self.bootstrap:
            interval, std = bootstrap_interval(real, features, score.value, self.bootstrap, self.seed)
            about = {"bootstrap_rounds": self.bootstrap, "seed": self.seed}
            scores = [replace(score, std=std, interval=interval).of(about)]
        if self.extrapolate:
            limit, points = extrapolated_distance(real, features, self.seed)
            name = distance_name("FID∞", self.network)
            scores.append(Score(name, limit, {**scores[0].protocol, "seed": self.seed}, details={"points": points}))
        return scores


def frechet_score(real: Statistics, fake: Statistics, network: FeatureNetwork | None = None) -> Score:
    """The distance of two sets of statistics with its warnings.

    network: None where only files of statistics are there.
    """
    made_by = network.protocol() if network else fake.protocol or real.protocol
    name = distance_name("FID", network) if network else _name_of_files(made_by)
    warnings = []

    # Fewer images than features: the distance depends on their number.
    counts = [statistics.num_images for statistics in (real, fake) if statistics.num_images is not None]
    if counts and min(counts) <= len(real.mean):
        warnings.append(
            f"{name}: {min(counts)} images for {len(real.mean)} features: the covariance is singular and the distance "
            "too large; compare only with values of as many images (eval/FID.py --extrapolate estimates the limit)"
        )

    for role, statistics in (("real", real), ("generated", fake)):
        if not statistics.protocol:
            warnings.append(
                f"{name}: the file of the {role} images' statistics does not say with which network, weights and resize "
                "filter they were made"
            )
    about = {**made_by, "num_real": real.num_images, "num_fake": fake.num_images}
    return Score(name, distance(real, fake), about, warnings=tuple(warnings))


def _name_of_files(made_by: dict) -> str:
    """The name of a distance between two files of statistics, which may say what network they are by."""
    if not made_by.get("network"):
        return "FD[unknown network]"
    network, published = str(made_by["network"]), made_by.get("published_weights")
    prefix = "FID" if network.startswith("inception") and published else "FD"
    weights_hash = str(made_by.get("weights_hash") or "unknown")[:8]
    return f"{prefix}[{network if published else network + ':' + weights_hash}]"


def fid(
    real: str | Path,
    fake: str | Path,
    network: FeatureNetwork | None,
    *,
    cache: str | Path | None = None,
    skip_broken: bool = False,
    extrapolate: bool = False,
    bootstrap: int = 0,
    seed: int = 2020,
    **options,
) -> list[Score]:
    """FID of generated against real images, each a source of eval/features/sources.py or a .npz of statistics.

    network: None where both are statistics;
    cache: where the real set's statistics are kept;
    extrapolate, bootstrap: see FrechetDistance;
    options: as `eval.scripts.update_from`.
    Returns the score, and FID∞ after it if asked for.
    """
    if (extrapolate or bootstrap) and holds_statistics(fake):
        raise DataError(f"{fake}: --extrapolate and --bootstrap need the generated images, not their statistics")

    # Real images: from the cache, where they are the same.
    of_real = image_statistics(real, network, skip_broken, cache, **options)

    # Generated images, or what is known of them.
    if holds_statistics(fake):
        of_fake = image_statistics(fake, network)
        check_comparable(real, of_real, fake, of_fake)
        scores, skipped = [frechet_score(of_real, of_fake, network)], of_fake.skipped
    else:
        assert network is not None  # for images
        metric = FrechetDistance(network, of_real, extrapolate=extrapolate, bootstrap=bootstrap, seed=seed)
        source, skipped = load_source(fake, skip_broken)
        if len(source) < 2:
            raise DataError(f"{fake}: holds a single image; FID needs two or more")
        scores = update_from(source, metric, network, **options).compute()
        scores = [score.after_training(trained_with_of(fake)) for score in scores]

    return say_origin(scores, (real, of_real.skipped), (fake, skipped))


def main() -> None:
    parser = CommandParser(description="Fréchet Inception distance between two sets of images")
    add_sources(parser, statistics=True)
    parser.add_argument("--extrapolate", action="store_true", help="also FID∞, for infinitely many generated images")
    parser.add_argument("--bootstrap", type=int, default=0, metavar="N", help="95 %% interval from N resamplings")
    parser.add_argument("--save-statistics", metavar="PATH", help="write REAL's statistics in pytorch-fid's format")
    add_arguments(parser)
    add_cache_arguments(parser)
    args = parser.parse_args()

    # Two files of statistics need no network.
    only_statistics = holds_statistics(args.real) and holds_statistics(args.fake)
    network = None if only_statistics else network_of(args)
    choices = {"cache": args.cache_dir, "skip_broken": args.skip_broken, **extraction_of(args)}

    # Statistics for later, in place of the real images.
    if args.save_statistics:
        if not args.save_statistics.endswith(".npz"):
            raise DataError(f"--save-statistics {args.save_statistics}: give it a name that ends in .npz")
        save_statistics(args.save_statistics, image_statistics(args.real, network, **choices))

    requests = {"extrapolate": args.extrapolate, "bootstrap": args.bootstrap, "seed": args.seed}
    report(fid(args.real, args.fake, network, **choices, **requests), args.json)


if __name__ == "__main__":
    run_command(main)
