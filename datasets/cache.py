"""ImageCache: decoded, cut out and resized images in one memory-mapped file, so that training need not decode them.

It stores what text_image.load_resized returns, the whole rectangle; crops and flips are drawn afterwards.
"""

import contextlib
import hashlib
import logging
import os
import shutil
import struct
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import numpy as np
import PIL
import torch
import torchvision

from datasets.records import Records
from datasets.text_image import load_resized
from miscc.errors import DataError
from miscc.files import write_atomically
from miscc.progress import ProgressBar

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

logger = logging.getLogger(__name__)

# A file holds the pixels of all images, then (offset, height, width, CRC-32 of the pixels) of each as int64, then this
# footer: fingerprint, number of images, bytes of pixels, CRC-32 of the table, magic. A file that was cut off, or whose
# table is damaged, is not taken for a cache.
_FOOTER = struct.Struct("<32sqqq8s")
_MAGIC = b"T2ICACH2"
_ROW = 4 * 8  # bytes of an image in the table
_BLOCK = 256  # images that are decoded ahead


class ImageCache:
    """The images of some records at one size, read-only. `open` builds the file when it is not there or outdated."""

    def __init__(self, path: Path, records: Records, image_size: int):
        """Use `open`; this maps a file that is known to be whole."""
        self.path = path
        self.image_size = image_size
        self._records = records
        self._checked = np.zeros(len(records), dtype=bool)  # which images this process has compared with their checksum
        self._warned = False
        self._map()

    @classmethod
    def open(
        cls, records: Records, image_size: int, folder: str | Path, skip_broken: bool = False, progress: bool = True
    ) -> "ImageCache":
        """The cache of these records in `folder`, built now if there is none, or if an image or box has changed.

        records: whose images
        image_size: the largest of the training's
        folder: of the cache file
        skip_broken: store a broken image as broken; `read` raises for it
        progress: whether to show a progress bar

        A second process that opens the same cache waits until the first has built it. Raises DataError when an image
        cannot be read or the disk is full.
        """
        # The name identifies the images, the fingerprint their state.
        folder = Path(folder)
        identity = hashlib.sha256("\n".join(map(str, records.image_paths)).encode()).hexdigest()[:10]
        path = folder / f"{records.name}-{records.split}-{image_size}-{identity}.images"
        fingerprint = _fingerprint(records, image_size)

        if not _is_current(path, fingerprint):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                with _locked(path):
                    if not _is_current(path, fingerprint):  # no other process built it while we waited
                        _build(path, records, image_size, fingerprint, skip_broken, progress)
            except OSError as error:
                raise DataError(f"{path}: the image cache cannot be written ({error}); train without --cache") from None
        return cls(path, records, image_size)

    def __len__(self) -> int:
        return len(self._table)

    def read(self, index: int) -> np.ndarray:
        """What load_resized returns for this image: (h, w, 3) uint8, read-only. Raises DataError if it was broken.

        An image that is damaged in the cache is read from its own file.
        """
        offset, height, width, checksum = (int(value) for value in self._table[index])
        if not height:
            raise DataError(f"{self._records.image_paths[index]}: cannot be read as an image; replace or remove it")
        pixels = self._pixels[offset : offset + height * width * 3].reshape(height, width, 3)

        # Compared once in each process, as that takes a tenth of a millisecond.
        if not self._checked[index]:
            if zlib.crc32(pixels.data) != checksum:
                return self._from_file(index)
            self._checked[index] = True
        return pixels

    def _from_file(self, index: int) -> np.ndarray:
        if not self._warned:
            logger.warning(
                "%s: is damaged; damaged images are read from their own files. Delete it: it is built anew", self.path
            )
            self._warned = True
        box = None if self._records.boxes is None else self._records.boxes[index]
        return load_resized(self._records.image_paths[index], box, self.image_size)

    def _map(self) -> None:
        """Read the table and map the pixels."""
        with self.path.open("rb") as file:
            # Footer and table.
            file.seek(-_FOOTER.size, os.SEEK_END)
            _, count, num_bytes, _, _ = _FOOTER.unpack(file.read(_FOOTER.size))
            file.seek(num_bytes)
            self._table = np.frombuffer(file.read(count * _ROW), dtype="<i8").reshape(count, 4)

            # Pixels: from the open file, not from its name, because another process may put a newer cache there at any moment.
            mapped = (
                np.memmap(file, dtype=np.uint8, mode="r", shape=(num_bytes,)) if num_bytes else np.zeros(0, np.uint8)
            )
        self._pixels = mapped.view(np.ndarray)  # memmap's own slicing is slow

    def __getstate__(self) -> dict:
        """Without the map: a spawned worker maps the file again, instead of getting a copy of every image."""
        return {name: value for name, value in vars(self).items() if name not in ("_pixels", "_table")}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._map()


def _fingerprint(records: Records, image_size: int) -> bytes:
    """A hash that changes with any file, box, the size, and the versions of the libraries that decode and scale."""
    # Another version may round differently.
    versions = f"{PIL.__version__} {torch.__version__} {torchvision.__version__}"
    digest = hashlib.sha256(f"{versions} {image_size}".encode())

    # Size and time of every file, and its box.
    for index, path in enumerate(records.image_paths):
        try:
            status = os.stat(path)
            state = f"{status.st_size} {status.st_mtime_ns}"
        except OSError:
            state = "missing"
        box = "" if records.boxes is None else records.boxes[index].tolist()
        digest.update(f"{path} {state} {box}\n".encode())
    return digest.digest()


def _is_current(path: Path, fingerprint: bytes) -> bool:
    """Whether the file is a whole cache with this fingerprint."""
    try:
        with path.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - _FOOTER.size))
            found, count, num_bytes, checksum, magic = _FOOTER.unpack(file.read())
            is_whole = min(count, num_bytes) >= 0 and end == num_bytes + count * _ROW + _FOOTER.size
            if not is_whole or magic != _MAGIC or found != fingerprint:
                return False
            file.seek(num_bytes)
            return zlib.crc32(file.read(count * _ROW)) == checksum
    except (OSError, struct.error):
        return False


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of this cache, if necessary after waiting for it, and remove the unfinished files of killed processes.

    Where files cannot be locked, two processes build the same cache, each in its own file, and the later one stays.
    """
    with open(path.with_suffix(".lock"), "w") as lock:
        if _lock(lock, path):
            for left in path.parent.glob(f".{path.name}.*.tmp"):
                left.unlink(missing_ok=True)
        yield


def _lock(lock: IO[str], path: Path) -> bool:
    """Lock the file; False where that is not possible."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        logger.info("waiting for another process that builds %s", path)
        fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError:  # some network file systems
        return False
    return True


def _build(
    path: Path, records: Records, image_size: int, fingerprint: bytes, skip_broken: bool, progress: bool
) -> None:
    """Decode all images with threads and write the cache file."""

    def load(index: int) -> np.ndarray:
        box = None if records.boxes is None else records.boxes[index]
        try:
            return load_resized(records.image_paths[index], box, image_size)
        except DataError as error:
            if not skip_broken:
                raise DataError(f"{error}, or leave such files out: --set SKIP_BROKEN True") from None
            return np.zeros((0, 0, 3), dtype=np.uint8)

    def write(stream: IO[bytes]) -> None:
        table = np.zeros((len(records), 4), dtype="<i8")
        offset = 0
        what = f"cache {records.name} {records.split}"
        bar = ProgressBar(what=what, total=len(records), unit="images", leave=True, shown=progress)
        with bar, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            # Block by block, so that decoded images do not pile up in memory.
            for start in range(0, len(records), _BLOCK):
                block = range(start, min(start + _BLOCK, len(records)))
                for index, pixels in zip(block, pool.map(load, block), strict=True):
                    table[index] = offset, *pixels.shape[:2], zlib.crc32(np.ascontiguousarray(pixels).data)
                    offset += stream.write(pixels.tobytes())
                    bar.update()

                # The first block says how large the file will be.
                if start == 0:
                    _check_space(path.parent, offset // len(block) * (len(records) - len(block)))

        stream.write(table.tobytes())
        stream.write(_FOOTER.pack(fingerprint, len(records), offset, zlib.crc32(table.tobytes()), _MAGIC))

    write_atomically(path, write)


def _check_space(folder: Path, still_needed: int) -> None:
    """Raise DataError where the disk has less room than is still needed, in bytes."""
    free = shutil.disk_usage(folder).free
    if still_needed > free:
        raise DataError(
            f"{folder}: the image cache needs about {still_needed / 1e9:.1f} GB more, {free / 1e9:.1f} GB are free; "
            f"point DATA_CACHE_DIR at a larger disk or train without --cache"
        )
