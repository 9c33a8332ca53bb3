"""ToyBirds, our embedded data set: drawn birds with ten captions, an outline and attributes each, made on demand.

The data set, and its writer in CUB's own layout. What a bird can be is in attributes.py, how it looks in drawing.py and
scenery.py, what its captions say in captions.py.
"""

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from datasets.layout import LAYOUT_NAMES
from datasets.toybirds.attributes import (
    ATTRIBUTES,
    CLASS_IDS,
    NUM_CLASSES,
    PALETTE,
    SPLITS,
    choose_attributes,
    class_id,
    class_name,
)
from datasets.toybirds.captions import named_attributes, write_captions
from datasets.toybirds.drawing import draw
from miscc.errors import DataError
from miscc.files import read_json, write_json, write_text
from miscc.lock import FolderLock
from miscc.progress import ProgressBar, say
from miscc.randomness import stream

__all__ = [
    "ATTRIBUTES",
    "CLASS_IDS",
    "PALETTE",
    "ToyBird",
    "ToyBirds",
    "class_id",
    "class_name",
    "named_attributes",
    "write_cub_layout",
]

DEFAULT_SIZES = {"train": 8000, "test": 2000}
SEED = 0  # of all drawings; experiments have seeds of their own

VERSION = 1  # of the drawings and captions; raised when the same index gives another bird
MARKER, UNFINISHED = "toybirds.json", "toybirds.unfinished.json"
_IMAGES, _MASKS, _TEXT = "CUB_200_2011/images", "segmentations", "text"
_CLASS_LISTS = {"train": "trainvalclasses.txt", "test": "testclasses.txt"}
_ATTRIBUTES_FILE = "attributes.jsonl"
_TOP_LEVEL = ("CUB_200_2011", _MASKS, _TEXT, _ATTRIBUTES_FILE, *_CLASS_LISTS.values())


class ToyBird(NamedTuple):
    """One drawing.

    image: (S, S, 3) uint8
    mask: (S, S) uint8, 255 inside the outline, without legs
    attributes: {"crown_color": "red", …}, the keys and values of ATTRIBUTES
    captions: ten of them
    """

    image: np.ndarray
    mask: np.ndarray
    attributes: dict[str, str]
    captions: list[str]


class ToyBirds(Dataset):
    """Drawn birds, a pure function of (split, index, image_size)."""

    def __init__(self, split: str, size: int | None = None, image_size: int = 64):
        """
        split: "train", or "test", whose birds have pairs of wing and belly colours that training does not have
        size: number of drawings, 8,000 or 2,000 by default; another number changes no drawing
        image_size: 32 to 512 pixels; the same birds at each size

        Raises DataError for values outside these.
        """
        if split not in SPLITS:
            raise DataError(f"toybirds: no split {split!r}; there are {' and '.join(SPLITS)}")
        size = DEFAULT_SIZES[split] if size is None else size
        if size < 1:
            raise DataError(f"toybirds: {size} drawings in {split}; ask for at least one")
        if not 32 <= image_size <= 512:
            raise DataError(f"toybirds: image size {image_size}; choose one from 32 to 512")
        self.split, self.size, self.image_size = split, size, image_size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> ToyBird:
        attributes = self.attributes(index)
        image, mask = draw(attributes, self._stream("drawing", index), self.image_size)
        return ToyBird(image, mask, attributes, self.captions(index))

    def attributes(self, index: int) -> dict[str, str]:
        """The attributes of one bird, without drawing it."""
        if not 0 <= index < self.size:
            raise IndexError(f"toybirds {self.split} has {self.size} drawings, no index {index}")
        return choose_attributes(self.split, index, self._stream("attributes", index))

    def captions(self, index: int) -> list[str]:
        """The ten captions of one bird, without drawing it."""
        captions = write_captions(self.attributes(index), self._stream("captions", index))
        return [caption for caption, _ in captions]

    def _stream(self, purpose: str, index: int) -> np.random.Generator:
        return stream(SEED, f"toybirds {self.split} {purpose}", index)


def write_cub_layout(
    root: str | Path,
    train_size: int = DEFAULT_SIZES["train"],
    test_size: int = DEFAULT_SIZES["test"],
    image_size: int = 128,
    progress: bool = True,
    workers: int | None = None,
) -> Path:
    """Write ToyBirds in the layout of CUB-200-2011 and its captions, with masks and attributes beside them; returns `root`.

    The bounding box is the mask's. CUB's crop around it (a square of 1.5 times its longer side) lies within or nearly
    within the frame, and shows the bird's size although it scales all birds alike: small and large birds are built
    differently. A run that was killed is done again; where one with the same parameters has finished, nothing is done.
    Of several processes one draws, which holds the lock of the folder.

    train_size, test_size: numbers of birds
    image_size: 32 to 512 pixels
    workers: processes that draw; None: one a core, up to 8, or the main process alone for few birds

    Raises DataError when `root` holds something else or cannot be written, UserError where another process draws there.
    """
    # Nothing to do where the same drawings are there already.
    root = Path(root)
    parameters = {"version": VERSION, "train_size": train_size, "test_size": test_size, "image_size": image_size}
    birds = [ToyBirds("train", train_size, image_size), ToyBirds("test", test_size, image_size)]
    if _is_finished(root, parameters):
        if progress:
            say(f"{root}: the {train_size + test_size} toy birds are already there")
        return root

    # The marker comes last: a folder without it is unfinished and may be replaced, once no other process draws there.
    lock = FolderLock(root, "drawn", "choose another root")
    try:
        if _is_finished(root, parameters):
            return root
        _clear_unfinished(root)
        write_json(root / UNFINISHED, parameters)
        _write_birds(root, birds, progress, workers)
        if hasattr(os, "sync"):
            os.sync()  # once for all files, so that no power cut leaves a marker with half of them
        write_json(root / MARKER, parameters)
        (root / UNFINISHED).unlink()
    except OSError as error:
        reason = str(error).strip().splitlines()[-1]
        raise DataError(f"{root}: cannot be written ({reason}); free space there or choose another root") from None
    finally:
        lock.release()
    return root


def _is_finished(root: Path, parameters: dict[str, int]) -> bool:
    """Whether drawings with these parameters are there. Raises DataError when others are."""
    try:
        found = read_json(root / MARKER)
    except FileNotFoundError:
        return False
    except (OSError, ValueError) as error:
        raise DataError(f"{root / MARKER}: cannot be read ({error}); remove {root} or choose another root") from None
    if found != parameters:
        raise DataError(
            f"{root}: holds toy birds made with {found}, not {parameters}; remove the folder or choose another root"
        )
    return True


def _clear_unfinished(root: Path) -> None:
    """Remove what an interrupted run left. Raises DataError for files that were there before any run."""
    # Of another data set are drawings that no unfinished run tells of, and lists, which `prepare` would replace afterwards.
    present = [root / name for name in (*_TOP_LEVEL, *LAYOUT_NAMES) if (root / name).exists()]
    if present and not (root / UNFINISHED).exists():
        raise DataError(f"{present[0]}: belongs to another data set; choose another root for the toy birds")

    # What is left is our own; lists stay until `prepare` writes them anew.
    for path in present:
        if path.name in _TOP_LEVEL:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _write_birds(root: Path, birds: list[ToyBirds], progress: bool, workers: int | None) -> None:
    """Draw everything, then write the lists."""
    # Folders first, so that no process has to make them.
    for number in range(1, NUM_CLASSES + 1):
        for folder in (_IMAGES, _MASKS, _TEXT):
            (root / folder / class_name(number)).mkdir(parents=True, exist_ok=True)

    # How many processes draw.
    writer = _Writer(root, birds)
    if workers is None:
        workers = min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 8)
    if workers < 2 or len(writer) < 500:  # starting processes takes longer than a few drawings
        workers = 0

    # Draw, and keep what the lists say of each bird.
    loader = DataLoader(writer, batch_size=25, num_workers=workers, collate_fn=list)
    with ProgressBar(what="toy birds", total=len(writer), unit="birds", leave=True, shown=progress) as bar:
        written = []
        for chunk in loader:
            written += chunk
            bar.update(len(chunk))
    _write_lists(root, sorted(written, key=lambda bird: bird.key))


class _Written(NamedTuple):
    """What the lists say about one bird.

    key: `class/name` without suffix
    class_id: 1 to 200
    box: x, y, width, height in pixels
    split, index: which of the ToyBirds it is
    attributes: as a ToyBird has them
    """

    key: str
    class_id: int
    box: tuple[float, float, float, float]
    split: str
    index: int
    attributes: dict[str, str]


class _Writer(Dataset):
    """Item i draws bird i and writes its three files; a data loader spreads that over processes."""

    def __init__(self, root: Path, birds: list[ToyBirds]):
        self.root = root
        self.items = [(split, index) for split in birds for index in range(len(split))]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> _Written:
        # Draw it and name it as CUB names its images.
        birds, bird_index = self.items[index]
        bird, number = birds[bird_index], class_id(birds.attributes(bird_index))
        folder = class_name(number)
        name = f"{folder.split('.')[1].title()}_{bird_index:05d}"
        key = f"{folder}/{name}"

        # Image, mask and captions, each in its own folder under the same key.
        image = Image.fromarray(bird.image)
        image.save(self.root / _IMAGES / f"{key}.jpg", quality=95, subsampling=0)
        Image.fromarray(bird.mask).save(self.root / _MASKS / f"{key}.png")
        text = "\n".join(bird.captions) + "\n"
        (self.root / _TEXT / f"{key}.txt").write_text(text, encoding="utf-8")
        return _Written(key, number, bounding_box(bird.mask), birds.split, bird_index, bird.attributes)


def bounding_box(mask: np.ndarray) -> tuple[float, float, float, float]:
    """The tight box (x, y, width, height) in pixels around what is at least half inside, for a mask (S, S) uint8."""
    rows, columns = np.flatnonzero((mask > 127).any(axis=1)), np.flatnonzero((mask > 127).any(axis=0))
    x, y = columns[0], rows[0]
    return float(x), float(y), float(columns[-1] + 1 - x), float(rows[-1] + 1 - y)


def _write_lists(root: Path, birds: list[_Written]) -> None:
    """CUB's lists, Reed's lists of classes, and the attributes; ids count from 1 in the order of the keys."""
    # CUB's own: images, boxes, classes.
    cub = root / "CUB_200_2011"
    names = [class_name(number) for number in range(1, NUM_CLASSES + 1)]
    numbered = list(enumerate(birds, start=1))
    _write_lines(cub / "images.txt", (f"{n} {bird.key}.jpg" for n, bird in numbered))
    _write_lines(cub / "bounding_boxes.txt", (f"{n} {' '.join(f'{v:.1f}' for v in bird.box)}" for n, bird in numbered))
    _write_lines(cub / "image_class_labels.txt", (f"{n} {bird.class_id}" for n, bird in numbered))
    _write_lines(cub / "classes.txt", (f"{n} {name}" for n, name in enumerate(names, start=1)))

    # Beside them: the classes of each split, and the attributes.
    for split, file in _CLASS_LISTS.items():
        _write_lines(root / file, (class_name(number) for number in CLASS_IDS[split]))
    entries = ({"key": b.key, "split": b.split, "index": b.index, "attributes": b.attributes} for b in birds)
    _write_lines(root / _ATTRIBUTES_FILE, map(json.dumps, entries))


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    write_text(path, "".join(f"{line}\n" for line in lines))
