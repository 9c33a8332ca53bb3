"""Features of many images, their mean and covariance gathered in one pass, and a cache of reference statistics.

The networks are in eval/features/networks.py, reading images in eval/features/sources.py, the metrics in a file each.
"""

import hashlib
import json
import os
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from eval.features.networks import FeatureNetwork
from eval.features.sources import ImageSource, batches, drop_broken, open_source
from miscc.errors import DataError, UserError
from miscc.files import parse_json, write_atomically
from miscc.progress import ProgressBar

MOST_BYTES = 1 << 30  # of a file of statistics; those of 2,048 features have 34 MB
CACHE_FORMAT = 1  # part of every cache key; raised when features would come out differently from the same files


@dataclass(frozen=True)
class Statistics:
    """Mean (D,) and covariance (D, D, divided by N - 1) of features, float64, and what they were made from."""

    mean: np.ndarray
    covariance: np.ndarray
    num_images: int | None  # None: a foreign file that does not say
    protocol: dict = field(default_factory=dict)  # FeatureNetwork.protocol(), {} where it is not known
    skipped: tuple[str, ...] = ()


class StreamedStatistics:
    """Mean and covariance of rows that come in batches, in float64; holds one (D, D) matrix however many come.

    Batches are combined by the pairwise update of Chan, Golub and LeVeque (1983), which loses no digits where the
    mean is large beside the spread; two halves made in different processes combine the same way (`merge`).
    """

    def __init__(self, num_features: int, device: str | torch.device = "cpu") -> None:
        device = torch.device(device)
        self.device = torch.device("cpu") if device.type == "mps" else device  # Apple's GPUs have no float64
        self.count = 0
        self.mean = torch.zeros(num_features, dtype=torch.float64, device=self.device)
        self.scatter = torch.zeros(num_features, num_features, dtype=torch.float64, device=self.device)

    def update(self, features: torch.Tensor) -> None:
        """Add rows (N, D)."""
        # Mean and scatter of the batch alone, then both together.
        rows = features.detach().to(self.device).double()
        mean = rows.mean(dim=0)
        centred = rows - mean
        self._combine(len(rows), mean, centred.T @ centred)

    def merge(self, other: "StreamedStatistics") -> None:
        """Add all the rows that `other` has seen."""
        if other.count:
            self._combine(other.count, other.mean.to(self.device), other.scatter.to(self.device))

    def _combine(self, count: int, mean: torch.Tensor, scatter: torch.Tensor) -> None:
        # The means' distance adds to the scatter.
        total = self.count + count
        shift = mean - self.mean
        self.scatter += scatter
        self.scatter.addr_(shift, shift, alpha=self.count * count / total)
        self.mean += shift * (count / total)
        self.count = total

    def __getstate__(self) -> dict:
        """On the CPU, where another process can read it."""
        device = torch.device("cpu")
        return self.__dict__ | {"device": device, "mean": self.mean.to(device), "scatter": self.scatter.to(device)}

    def result(self, protocol: dict | None = None, skipped: tuple[str, ...] = ()) -> Statistics:
        """Raises DataError with fewer than two rows, for which there is no covariance."""
        if self.count < 2:
            raise DataError(f"{self.count} image(s): a covariance needs at least two")
        covariance = self.scatter / (self.count - 1)
        return Statistics(self.mean.cpu().numpy(), covariance.cpu().numpy(), self.count, protocol or {}, skipped)


def load_source(path: str | Path, skip_broken: bool = False) -> tuple[ImageSource, tuple[str, ...]]:
    """Open the images at `path`; with `skip_broken` also the names of those that cannot be read and are left out."""
    source = open_source(path)
    if not skip_broken:
        return source, ()
    source, broken = drop_broken(source)
    return source, tuple(broken)


def extract(
    source: ImageSource,
    network: FeatureNetwork,
    batch_size: int = 32,
    workers: int | None = None,
    progress: bool = True,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Features (N, D) and class logits (N, K), float32 on the network's device, batch by batch in the source's order.

    progress: whether to show any.
    Raises DataError, naming the file, for an image that cannot be read.
    """
    with ProgressBar(what=source.path.name, total=len(source), unit="images", shown=progress) as bar:
        for images in batches(source, batch_size, workers):
            yield network.extract_features(images)
            bar.update(len(images))


def collect_features(source: ImageSource, network: FeatureNetwork, **options) -> torch.Tensor:
    """All features (N, D) float32 on the CPU, for scores that compare single images; options as `extract`."""
    features = torch.empty(len(source), network.num_features)

    done = 0
    for rows, _ in extract(source, network, **options):
        features[done : done + len(rows)] = rows.cpu()
        done += len(rows)
    return features


def statistics_of_features(features: torch.Tensor, protocol: dict | None = None) -> Statistics:
    """Mean and covariance of rows (N, D) that are already there."""
    streamed = StreamedStatistics(features.shape[1])
    for rows in features.split(4096):
        streamed.update(rows)
    return streamed.result(protocol)


def image_statistics(
    path: str | Path,
    network: FeatureNetwork | None,
    skip_broken: bool = False,
    cache: str | Path | None = None,
    **options,
) -> Statistics:
    """Statistics of the images at `path`, or those that a .npz in pytorch-fid's format holds.

    network: may be None for a .npz of statistics;
    cache: a folder in which statistics are kept under a hash of the files (names, sizes, times), network, weights and
    resize filter, so that the features of a reference set are extracted once; None: no cache;
    options: as `extract`.
    """
    path = Path(path)
    if holds_statistics(path):
        return load_statistics(path, network)

    # Kept from an earlier run.
    assert network is not None  # for images
    kept = None if cache is None else _cache_file(cache, open_source(path), network, skip_broken)
    if kept is not None and kept.is_file():
        try:
            return load_statistics(kept, network)
        except DataError:
            kept.unlink(missing_ok=True)  # cut off or foreign: make it again

    # One pass over the images.
    source, skipped = load_source(path, skip_broken)
    if len(source) < 2:
        raise DataError(f"{path}: holds a single image; a covariance needs at least two, and a fair one thousands")
    streamed = StreamedStatistics(network.num_features, network.device)
    for features, _ in extract(source, network, **options):
        streamed.update(features)
    statistics = streamed.result(network.protocol(), skipped)

    if kept is not None:
        try:
            save_statistics(kept, statistics)
        except (OSError, UserError) as error:  # the score does not depend on a full or read-only disk
            print(f"warning: the statistics of {path} are not kept ({error})", file=sys.stderr)
    return statistics


def default_cache() -> Path:
    """Where reference statistics are kept: ~/.cache/text-to-image-gans, or below XDG_CACHE_HOME."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "text-to-image-gans"


def _cache_file(cache: str | Path, source: ImageSource, network: FeatureNetwork, skip_broken: bool) -> Path:
    made_from = [CACHE_FORMAT, source.fingerprint(), network.protocol(), skip_broken]
    key = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:24]
    return Path(cache) / "statistics" / f"{key}.npz"


def holds_statistics(path: str | Path) -> bool:
    """Whether a file is a .npz with the `mu` and `sigma` of pytorch-fid."""
    path = Path(path)
    if path.suffix.lower() != ".npz" or not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return {"mu.npy", "sigma.npy"} <= set(archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return False


def save_statistics(path: str | Path, statistics: Statistics) -> None:
    """Write a .npz that pytorch-fid reads too (`mu`, `sigma`), with the number of images and the protocol beside."""
    # What pytorch-fid does not write stands beside what it reads.
    made_by = json.dumps({"protocol": statistics.protocol, "skipped": list(statistics.skipped)})
    arrays = {
        "mu": statistics.mean,
        "sigma": statistics.covariance,
        "num_images": np.array(-1 if statistics.num_images is None else statistics.num_images),
        "made_by": np.array(made_by),
    }
    write_atomically(path, lambda stream: np.savez(stream, **arrays))


def load_statistics(path: str | Path, network: FeatureNetwork | None = None) -> Statistics:
    """Read a .npz with `mu` and `sigma`, of pytorch-fid or our own.

    Raises DataError when it is damaged, or of another network, weights or resize filter than `network`.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(member.file_size for member in archive.infolist()) > MOST_BYTES:
                raise ValueError(f"declares more than {MOST_BYTES >> 30} GiB")
        with np.load(path, allow_pickle=False) as arrays:
            mean = np.asarray(arrays["mu"], dtype=np.float64)
            covariance = np.asarray(arrays["sigma"], dtype=np.float64)
            count = int(arrays["num_images"]) if "num_images" in arrays else -1
            made_by = parse_json(str(arrays["made_by"])) if "made_by" in arrays else {}
            protocol, skipped = made_by.get("protocol", {}), tuple(made_by.get("skipped", ()))
            if not isinstance(protocol, dict):
                raise TypeError("`made_by` names no protocol")
    except Exception as error:  # a damaged archive can raise nearly anything
        raise DataError(
            f"{path}: cannot be read as statistics with `mu` and `sigma` ({' '.join(str(error).split())[:160]}); make them again"
        ) from None

    # Shapes and values.
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise DataError(f"{path}: mu {mean.shape} and sigma {covariance.shape} do not fit (D,) and (D, D)")
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise DataError(f"{path}: mu or sigma is not finite; make the statistics again")

    # Of this network?
    statistics = Statistics(mean, covariance, count if count >= 0 else None, protocol, skipped)
    if network is not None:
        _check_made_for(path, statistics, network)
    return statistics


def _check_made_for(path: str | Path, statistics: Statistics, network: FeatureNetwork) -> None:
    if len(statistics.mean) != network.num_features:
        raise DataError(
            f"{path}: has {len(statistics.mean)} features, {network.label} gives {network.num_features}; "
            "these statistics are of another network"
        )
    for key, value in network.protocol().items():
        if statistics.protocol and statistics.protocol.get(key) != value:
            raise DataError(
                f"{path}: was made with {key} {statistics.protocol.get(key)}, not {value}; "
                "choose the same --network, --weights and --resize, or make the statistics again"
            )


def check_comparable(path: str | Path, one: Statistics, other_path: str | Path, other: Statistics) -> None:
    """Raises DataError for statistics of different networks, weights or resize filters, as far as both files say so."""
    if one.mean.shape != other.mean.shape:
        raise DataError(f"{path} has {len(one.mean)} features, {other_path} {len(other.mean)}: they do not compare")

    # Only what both files say can differ.
    known = one.protocol.keys() & other.protocol.keys()
    different = [key for key in one.protocol if key in known and one.protocol[key] != other.protocol[key]]
    if different:
        key = different[0]
        raise DataError(
            f"{path} was made with {key} {one.protocol[key]}, {other_path} with {other.protocol[key]}: they do not compare"
        )
