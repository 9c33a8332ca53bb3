"""The real images of a protocol: cropped as it says, their features extracted once and kept.

Records come from datasets/; the metrics use the features.
"""

import hashlib
import json
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from datasets.records import Records
from datasets.text_image import TextImageDataset
from eval.features.networks import FeatureNetwork
from eval.features.statistics import (
    CACHE_FORMAT,
    Statistics,
    StreamedStatistics,
    load_statistics,
    save_statistics,
    statistics_of_features,
)
from miscc.errors import DataError, UserError
from miscc.files import write_atomically
from miscc.images import to_uint8
from miscc.progress import ProgressBar


class RealImages:
    """Images of a split at a generator's size: the same pixels every time.

    crop "middle": box cut out, shorter side scaled to 76/64 of the size, the middle of that; "augmented": a crop and a
    flip drawn by (seed, image).
    """

    def __init__(self, records: Records, image_size: int, crop: str = "middle", seed: int = 0):
        self.records, self.image_size, self.crop, self.seed = records, image_size, crop, seed
        remedy = f"python -m datasets.prepare {records.name} --drop-broken"
        self._dataset = TextImageDataset(records, [image_size], seed=seed, augment=crop == "augmented", remedy=remedy)

    def __len__(self) -> int:
        return len(self.records)

    def read(self, index: int) -> np.ndarray:
        """One image (S, S, 3) uint8. Raises DataError, naming the file, when it cannot be read."""
        return to_uint8(self._dataset[0, index].images[0][None])[0]

    def batches(self, batch_size: int, rows: range | None = None, workers: int = 4) -> Iterator[np.ndarray]:
        """The images in order, (N, S, S, 3) uint8 with N at most batch_size, read by threads one batch ahead."""
        # One batch is read while the one before is used.
        rows = range(len(self)) if rows is None else rows
        waiting: deque = deque()
        with ThreadPoolExecutor(workers) as pool:
            for start in range(0, len(rows), batch_size):
                waiting.append([pool.submit(self.read, index) for index in rows[start : start + batch_size]])
                if len(waiting) > 1:
                    yield np.stack([future.result() for future in waiting.popleft()])
            while waiting:
                yield np.stack([future.result() for future in waiting.popleft()])

    def fingerprint(self) -> str:
        """32 hex digits that change with the files (path, size, time), boxes, crop and size."""
        digest = hashlib.sha256()
        for path in self.records.image_paths:
            try:
                status = path.stat()
            except OSError as error:
                raise DataError(f"{path}: cannot be read ({error.strerror}); prepare the data set again") from None
            digest.update(f"{path.resolve()}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())

        # Boxes, crop and size change the pixels, too.
        boxes = self.records.boxes
        digest.update(b"" if boxes is None else np.ascontiguousarray(boxes).tobytes())
        seed = self.seed if self.crop == "augmented" else None
        digest.update(json.dumps([self.image_size, self.crop, seed]).encode())
        return digest.hexdigest()[:32]


@dataclass(frozen=True)
class Reference:
    """What generated images are compared with: by statistics, or where a metric compares single images, features (N, D)."""

    statistics: Statistics | None
    features: torch.Tensor | None
    fingerprint: str
    from_cache: bool


def reference(
    images: RealImages,
    network: FeatureNetwork,
    with_features: bool = False,
    cache: str | Path | None = None,
    batch_size: int = 32,
    progress: bool = True,
) -> Reference:
    """Features of real images, or what a cache folder has of them under a hash of files, crop, network and resize.

    with_features: keep single features, for KID, precision and recall, which takes (N, D) float32 of memory and cache;
    cache: None: keep nothing;
    progress: whether to show any.
    Raises DataError for fewer than two images, and for one that cannot be read.
    """
    if len(images) < 2:
        raise DataError(
            f"{images.records.split!r} holds {len(images)} image(s); a distance needs two, a fair one 2,000"
        )

    # What an earlier run has kept.
    fingerprint = images.fingerprint()
    made_from = json.dumps([CACHE_FORMAT, "records", fingerprint, network.protocol()], sort_keys=True)
    key = hashlib.sha256(made_from.encode()).hexdigest()[:24]
    kind = "features" if with_features else "statistics"
    kept = None if cache is None else Path(cache) / kind / f"{key}.{'npy' if with_features else 'npz'}"
    if kept is not None and kept.is_file():
        found = _load(kept, network, len(images), fingerprint)
        if found is not None:
            return found

    # One pass over the images.
    streamed = StreamedStatistics(network.num_features, network.device)
    rows = []
    with ProgressBar(what="real images", total=len(images), unit="images", shown=progress) as bar:
        for batch in images.batches(batch_size):
            features, _ = network.extract_features(list(batch))
            if with_features:
                rows.append(features.cpu())
            else:
                streamed.update(features)
            bar.update(len(batch))
    features = torch.cat(rows) if with_features else None
    if features is not None:
        statistics = statistics_of_features(features, network.protocol())
    else:
        statistics = streamed.result(network.protocol())

    if kept is not None:
        try:
            if features is not None:
                array = features.numpy()
                write_atomically(kept, lambda stream: np.save(stream, array))
            else:
                save_statistics(kept, statistics)
        except (OSError, UserError) as error:  # on a full or read-only disk the run goes on
            print(f"warning: the real images' {kind} are not kept ({error})", file=sys.stderr)
    return Reference(statistics, features, fingerprint, from_cache=False)


def _load(kept: Path, network: FeatureNetwork, num_images: int, fingerprint: str) -> Reference | None:
    """None, and the file removed, where it is damaged."""
    try:
        if kept.suffix == ".npz":
            return Reference(load_statistics(kept, network), None, fingerprint, from_cache=True)

        # Single features: as many rows as images, all finite.
        array = np.load(kept, allow_pickle=False)
        if array.shape != (num_images, network.num_features) or not np.isfinite(array).all():
            raise ValueError("has another shape")
        features = torch.from_numpy(array)
        statistics = statistics_of_features(features, network.protocol())
        return Reference(statistics, features, fingerprint, from_cache=True)
    except (OSError, ValueError, EOFError, DataError):
        kept.unlink(missing_ok=True)
        return None
