"""Image sources: a folder, a list of files, a zip, an array. What is computed from the images is the metrics' part.

A source lists its images' names without reading them, yields the images in order as RGB, and has a fingerprint that
changes with its content.
"""

import hashlib
import io
import math
import os
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from miscc.errors import DataError, shown
from miscc.files import parse_json, stays_inside
from miscc.images import IMAGE_SUFFIXES, open_rgb
from miscc.progress import ProgressBar

CAPTIONS_FILE = "captions.jsonl"  # beside sampled images: one JSON object a line, see `read_samples`


@dataclass(frozen=True)
class Sample:
    """One generated image and what it was made from."""

    file: str  # relative to the sample folder
    caption: str
    key: str  # of the real image whose caption it is; "" for a caption of one's own
    caption_number: int
    sample: int


@dataclass(frozen=True)
class ImageSource:
    """Images by index. `fetch` is called in order by one thread and is cheap; `decode` may run in any thread.

    stamp: gives a text that changes when the images do;
    kind: "files", which several threads may fetch at once, "members" of an archive, or "rows" of one array, which is
    read whole or not at all.
    """

    path: Path
    names: tuple[str, ...]
    fetch: Callable[[int], Path | bytes | np.ndarray]
    stamp: Callable[[], str]
    kind: str = "files"

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> np.ndarray:
        """One image as (H, W, 3) uint8. Raises DataError, naming it and --skip-broken, when it cannot be read."""
        return _decode(self.fetch(index), self._title(index))

    def fingerprint(self) -> str:
        """32 hex digits that stay the same as long as the files do."""
        return hashlib.sha256(self.stamp().encode()).hexdigest()[:32]

    def subset(self, indices: Sequence[int]) -> "ImageSource":
        """The images at `indices`, in that order."""
        chosen = tuple(indices)

        # The fingerprint changes with the choice, too.
        names = tuple(self.names[index] for index in chosen)
        digest = hashlib.sha256("\0".join(names).encode()).hexdigest()
        fetch, stamp = lambda i: self.fetch(chosen[i]), lambda: f"{self.stamp()}\0{digest}"
        return replace(self, names=names, fetch=fetch, stamp=stamp)

    def _title(self, index: int) -> str:
        return f"{self.path}: {self.names[index]}"


class _NamedBytes(io.BytesIO):
    """Bytes with a name for error messages."""

    def __init__(self, data: bytes, title: str) -> None:
        super().__init__(data)
        self.title = title

    def __str__(self) -> str:
        return self.title


def decode(item: Path | bytes | np.ndarray, title: str) -> np.ndarray:
    """What `fetch` gave -> (H, W, 3) uint8: grey is repeated, transparency laid over white, CMYK converted."""
    if isinstance(item, np.ndarray):
        return item if item.ndim == 3 and item.shape[2] == 3 else np.repeat(item.reshape(*item.shape[:2], 1), 3, 2)
    return np.array(open_rgb(item if isinstance(item, Path) else _NamedBytes(item, title)))


def _decode(item: Path | bytes | np.ndarray, title: str) -> np.ndarray:
    """`decode` for an image of a script, all of which have --skip-broken."""
    try:
        return decode(item, title)
    except DataError as error:
        raise DataError(f"{error}, or leave such files out with --skip-broken") from None


def open_source(path: str | Path) -> ImageSource:
    """Open a folder (searched to its depth), a text file of paths, a .zip, or a .npy / .npz array of uint8 images.

    A folder with a captions.jsonl gives the files that this names, and not the masks and grids beside them.
    Raises DataError when there is nothing, no image in it, or statistics in place of images.
    """
    # By what it is: folder, archive, array, image, list.
    path = Path(path)
    if path.is_dir():
        source = _sample_folder(path) if (path / CAPTIONS_FILE).is_file() else _folder(path)
    elif not path.is_file():
        raise DataError(f"{path}: no such folder or file; give a folder, a list of files, a .zip or a .npz of images")
    elif path.suffix.lower() == ".zip":
        source = _zip(path)
    elif path.suffix.lower() in (".npy", ".npz"):
        source = _array(path)
    elif path.suffix.lower() in IMAGE_SUFFIXES:
        raise DataError(f"{path}: is a single image; give a folder of images, or a text file that lists them")
    else:
        source = _list(path)

    if not len(source):
        raise DataError(f"{path}: no image in it (looked for {' '.join(IMAGE_SUFFIXES)})")
    return source


def read_samples(folder: str | Path) -> list[Sample]:
    """The lines of `captions.jsonl` in a folder of sampled images, in their order.

    Raises DataError when the file is missing, a line is no record, or a named image is not there.
    """
    folder = Path(folder)
    path = folder / CAPTIONS_FILE
    if not path.is_file():
        raise DataError(f"{folder}: no {CAPTIONS_FILE} in it; sample with this project's main.py, which writes one")

    # One record a line.
    samples = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            record = parse_json(line.decode("utf-8"))
            if not stays_inside(str(record["file"])):
                raise ValueError("the file is outside the folder")
            samples.append(
                Sample(
                    file=str(record["file"]),
                    caption=str(record["caption"]),
                    key=str(record.get("key") or ""),
                    caption_number=int(record.get("caption_number") or 0),
                    sample=int(record.get("sample") or 0),
                )
            )
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise DataError(f"{path}, line {number}: not a record with `file` and `caption` ({shown(error)})") from None

    # Every image must be there.
    missing = [sample.file for sample in samples if not (folder / sample.file).is_file()]
    if missing:
        raise DataError(f"{path}: names {len(missing)} images that are not there, e.g. {missing[0]}; sample again")
    return samples


def batches(source: ImageSource, batch_size: int, workers: int | None = None) -> Iterator[list[np.ndarray]]:
    """The images in order, as lists of at most `batch_size` arrays (H, W, 3) uint8, decoded by threads ahead of use.

    At most one batch and two images a thread are kept waiting, however large the source is.
    """
    # Items are fetched in order here and decoded ahead by threads.
    workers = workers or min(8, os.cpu_count() or 1)
    waiting: deque = deque()
    following = 0
    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
    try:
        for start in range(0, len(source), batch_size):
            stop = min(start + batch_size, len(source))
            while following < min(stop + 2 * workers, len(source)):
                item = source.fetch(following)
                waiting.append(pool.submit(_decode, item, source._title(following)))
                following += 1
            yield [waiting.popleft().result() for _ in range(start, stop)]
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def drop_broken(source: ImageSource, workers: int | None = None) -> tuple[ImageSource, list[str]]:
    """Read every image once: the source without those that cannot be read, and their names.

    Raises DataError when none is left, and for a damaged array, of which no image can be left out.
    """

    def readable(index: int) -> bool:
        try:
            source.read(index)
            return True
        except DataError:
            if source.kind == "rows":
                raise
            return False

    # Every image once.
    if source.kind == "files":
        with ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1)) as pool:
            results = pool.map(readable, range(len(source)))
            good = list(ProgressBar(results, "checking images", len(source), "images"))
    else:
        good = [readable(index) for index in ProgressBar(range(len(source)), "checking images", unit="images")]

    # Names of the broken ones, and a source without them.
    broken = [name for name, fine in zip(source.names, good, strict=True) if not fine]
    if len(broken) == len(source):
        raise DataError(f"{source.path}: not one of the {len(source)} images can be read")
    return (source.subset([i for i, fine in enumerate(good) if fine]) if broken else source), broken


def _file_stamp(paths: Sequence[Path]) -> str:
    lines = []
    for path in paths:
        status = path.stat()
        lines.append(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\0{status.st_ctime_ns}")
    return "\n".join(lines)


def _files(path: Path, names: Sequence[str], files: Sequence[Path]) -> ImageSource:
    return ImageSource(path, tuple(names), lambda index: files[index], lambda: _file_stamp(files))


def _folder(path: Path) -> ImageSource:
    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror}); change its permissions") from None

    # To its depth, hidden files and folders left out; each folder once, whatever links lead to it.
    root = path.resolve()
    found, visited = [], set()
    for folder, subfolders, files in os.walk(root, onerror=refuse, followlinks=True):
        real_path = os.path.realpath(folder)
        if real_path in visited:
            subfolders.clear()
            continue
        visited.add(real_path)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))

        # Masks and grids lie beside samples; the root has none, see `open_source`.
        if CAPTIONS_FILE in files:
            raise DataError(f"{path}: holds folders of samples ({folder}); give one of them")
        for name in files:
            if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith("."):
                found.append(os.path.join(folder, name))
    files = [Path(name) for name in sorted(found)]  # by the whole path, as torch-fidelity and pytorch-fid sort
    return _files(path, [file.relative_to(root).as_posix() for file in files], files)


def _sample_folder(path: Path) -> ImageSource:
    names = sorted({sample.file for sample in read_samples(path)})
    return _files(path, names, [path.resolve() / name for name in names])


def _list(path: Path) -> ImageSource:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (UnicodeDecodeError, OSError):
        raise DataError(f"{path}: neither a folder, a .zip, a .npz nor a text file of paths") from None

    # Each path relative to the list, or to the working directory.
    names = [line for line in lines if line]
    files, missing = [], []
    for name in names:
        choices = [path.resolve().parent / name, Path(name).absolute()]  # beside the list, or in the working directory
        file = next((choice for choice in choices if os.path.isfile(choice)), None)
        (files if file else missing).append(file or name)

    if missing:
        raise DataError(f"{path}: {len(missing)} of its {len(names)} images are not there, e.g. {missing[0][:200]}")
    return _files(path, names, files)


def _zip(path: Path) -> ImageSource:
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, NotImplementedError) as error:
        raise DataError(f"{path}: cannot be read as a zip ({error}); copy it again") from None

    # Images alone, not what macOS puts beside them.
    members = [
        member
        for member in sorted(archive.infolist(), key=lambda member: member.filename)
        if member.filename.lower().endswith(IMAGE_SUFFIXES)
        and not member.is_dir()
        and not Path(member.filename).name.startswith(".")
        and not member.filename.startswith("__MACOSX/")
    ]

    def fetch(index: int) -> bytes:
        try:
            return archive.read(members[index])
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, NotImplementedError) as error:
            raise DataError(
                f"{path}: {members[index].filename}: cannot be unpacked ({error}); copy the archive again, or leave such "
                "images out with --skip-broken"
            ) from None

    def stamp() -> str:
        return "\n".join(f"{member.filename}\0{member.file_size}\0{member.CRC}" for member in members)

    return ImageSource(path, tuple(member.filename for member in members), fetch, stamp, "members")


def _array(path: Path) -> ImageSource:
    """Reads the array forwards, image by image, so that a large .npz never lies in memory as a whole."""
    stream, member, num_bytes = _open_array(path)
    shape, channels_first = _image_shape(path, member, stream)
    size = math.prod(shape[1:])
    start = stream.tell()

    # A damaged header could declare any size.
    if math.prod(shape) > num_bytes:
        raise DataError(f"{path}: declares {shape} bytes of images, more than the file can hold; copy it again")

    def fetch(index: int) -> np.ndarray:
        try:
            stream.seek(start + index * size)
            data = stream.read(size)
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:  # a checksum concerns the whole array
            raise DataError(f"{path}: cannot be unpacked ({error}); copy it again") from None
        if len(data) != size:
            raise DataError(f"{path}: ends within image {index} of {shape[0]}; copy it again")
        image = np.frombuffer(data, np.uint8).reshape(shape[1:])
        return image.transpose(1, 2, 0) if channels_first else image

    names = tuple(str(i) for i in range(shape[0]))
    return ImageSource(path, names, fetch, lambda: _file_stamp([path.resolve()]), "rows")


def _open_array(path: Path):
    """A seekable stream at the start of the .npy data, the array's name, and how many bytes it can be at most."""
    if path.suffix.lower() == ".npy":
        return open(path, "rb"), path.name, path.stat().st_size
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, NotImplementedError) as error:
        raise DataError(f"{path}: cannot be read as a .npz ({error}); copy it again") from None

    # One array of images among the members, and no statistics.
    members = [name for name in archive.namelist() if name.endswith(".npy")]
    if {"mu.npy", "sigma.npy"} <= set(members):
        raise DataError(f"{path}: holds statistics (mu, sigma), not images; only eval/FID.py takes these")
    named = [name for name in members if name in ("images.npy", "arr_0.npy")] or members
    if len(named) != 1:
        raise DataError(f"{path}: holds the arrays {', '.join(members) or '(none)'}; call that of the images `images`")
    about = archive.getinfo(named[0])
    num_bytes = min(about.file_size, 1100 * about.compress_size)  # deflate packs 1 : 1032 at most
    try:
        return archive.open(named[0]), named[0], num_bytes
    except (zipfile.BadZipFile, OSError, RuntimeError) as error:
        raise DataError(f"{path}: {named[0]} cannot be unpacked ({error}); copy it again") from None


def _image_shape(path: Path, member: str, stream) -> tuple[tuple[int, ...], bool]:
    """Read the .npy header: the shape, and whether the channels come first. Raises DataError for another content."""
    try:
        version = np.lib.format.read_magic(stream)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = read_header(stream)
    except Exception as error:  # a damaged header can raise nearly anything
        raise DataError(f"{path}: {member} is not a numpy array ({' '.join(str(error).split())[:160]})") from None

    # Bytes in C order.
    if dtype != np.uint8:
        raise DataError(f"{path}: {member} is {dtype}; store the images as uint8, 0 to 255")
    if fortran_order and len(shape) > 1:
        raise DataError(f"{path}: {member} is in Fortran order; save numpy.ascontiguousarray(images)")

    # Images in colour or grey.
    if len(shape) == 3 and shape[2] in (1, 3):
        raise DataError(f"{path}: {member} of shape {shape} is a single image; store (N, H, W, 3)")
    channels_last = len(shape) == 3 or (len(shape) == 4 and shape[3] in (1, 3))
    channels_first = not channels_last and len(shape) == 4 and shape[1] in (1, 3)
    if not (channels_last or channels_first) or min(shape) < 0 or 0 in shape[1:]:
        raise DataError(f"{path}: {member} has shape {shape}; expected (N, H, W, 3), (N, H, W) or (N, 3, H, W)")
    return tuple(shape), channels_first
