"""CUB-200-2011, and ToyBirds, which is written in the same layout: where the originals lie, boxes, classes, captions.

Images are cut out along their boxes in text_image.py; what `build` returns is written by layout.py.
"""

import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from datasets.layout import Entry, expect_list
from datasets.pickles import load_legacy_pickle
from datasets.sources.building import BuildOptions, first_present, missing_pieces, named, read_text
from miscc.errors import DataError, shown
from miscc.files import stays_inside

logger = logging.getLogger(__name__)

CAPTIONS_PER_IMAGE = 10
CUB_CLASSES, CUB_IMAGES = 200, 11_788
CUB_COUNTS = {"train": 8_855, "test": 2_933}
# The ids of the test classes of Reed et al. 2016, which every text-to-image system since has used.
REED_TEST_CLASSES = frozenset(
    (1, 4, 6, 8, 9, 14, 23, 29, 31, 33, 34, 35, 36, 37, 38, 43, 49, 51, 53, 66, 72, 79, 83, 84, 86, 91, 95, 96, 98, 101)
    + (102, 103, 112, 114, 119, 121, 130, 135, 138, 147, 156, 163, 165, 166, 180, 183, 185, 186, 187, 197)
)
_FOLDERS = ("CUB_200_2011", ".")  # below the root; released metadata expects the first
_TEXTS = ("text", "text_c10", "CUB_200_2011/text", "CUB_200_2011/text_c10", "cvpr2016_cub/text_c10")
_SPLIT_FOLDERS = (".", "CUB_200_2011", "cvpr2016_cub")


def locate(root: Path, keys: Sequence[str]) -> tuple[list[Path], np.ndarray]:
    """The image and bounding box of each key (`class/name`). Raises DataError listing what is missing."""
    found = _find(root)
    images = found.images()
    if images is None:
        missing = found.missing_images()
        raise DataError(missing_pieces(f"{root}: the images of the data set are not complete", missing))

    boxes = _read_boxes(images)
    without = [key for key in keys if key not in boxes]
    if without:
        raise DataError(f"{images.boxes}: has no box for {named(without)}, which filenames.pickle lists")
    return [images.folder / f"{key}.jpg" for key in keys], np.array([boxes[key] for key in keys])


def build(root: Path, options: BuildOptions) -> dict[str, list[Entry]]:
    """The common layout from CUB's archive and the caption texts of Reed et al.

    Split by class: trainvalclasses.txt and testclasses.txt where they are, else {train,test}/filenames.pickle,
    else, for the whole of CUB, Reed's 150 and 50 classes. Raises DataError listing everything that is missing.
    """
    # Files and folders: all that are missing are listed at once.
    found = _find(root)
    missing = found.missing_images()
    if found.texts is None:
        missing.append(f"{root / 'text'}/<class>/<name>.txt: the captions, ten a file (Reed et al.'s CUB captions)")
    keys = list(_read_names(found.names).values()) if found.names else []
    split = _split(root, keys)
    if split is None and keys:
        missing.append(f"{root / 'trainvalclasses.txt'} and {root / 'testclasses.txt'}: the classes of each split")
    images, texts = found.images(), found.texts
    if images is None or texts is None or split is None:
        raise DataError(missing_pieces(f"{root}: the data set is not complete", missing))

    # Single boxes, images and captions; with --allow-partial those without are left out.
    boxes = _read_boxes(images)
    absent = {
        f"{images.boxes}: no box for": [key for key in keys if key not in boxes],
        f"{images.folder}: no image for": _without_file(images.folder, keys, ".jpg"),
        f"{texts}: no captions for": _without_file(texts, keys, ".txt"),
    }
    options.complain(root, [f"{what} {named(lost)}" for what, lost in absent.items() if lost])
    lost = {key for group in absent.values() for key in group}

    # What remains, split by class.
    splits = {}
    for name, members in split.items():
        kept = [key for key in members if key not in lost]
        splits[name] = _entries(kept, images.folder.relative_to(root).as_posix(), texts, boxes)
    if options.name == "birds":
        options.check_counts(root, splits, CUB_COUNTS)
    return splits


@dataclass(frozen=True)
class _Images:
    """CUB's photos and the files that name and box them."""

    folder: Path
    names: Path
    boxes: Path


@dataclass(frozen=True)
class _Found:
    """Where CUB's pieces were found; None where one was not."""

    root: Path
    folder: Path | None
    names: Path | None
    boxes: Path | None
    texts: Path | None

    def images(self) -> _Images | None:
        """The pieces that images need, or None if one is missing."""
        if self.folder is None or self.names is None or self.boxes is None:
            return None
        return _Images(self.folder, self.names, self.boxes)

    def missing_images(self) -> list[str]:
        """What `images` lacks, a line a piece."""
        base = self.root / _FOLDERS[0]
        expected = [
            (self.folder, base / "images", "the photos, a folder a class (CUB_200_2011.tgz)"),
            (self.names, base / "images.txt", "the names of the images (CUB_200_2011.tgz)"),
            (self.boxes, base / "bounding_boxes.txt", "the box of the bird in each image (CUB_200_2011.tgz)"),
        ]
        return [f"{place}: {what}" for found, place, what in expected if found is None]


def _find(root: Path) -> _Found:
    def inside(name: str) -> Path | None:
        return first_present(root, [f"{folder}/{name}" for folder in _FOLDERS])

    return _Found(
        root, inside("images"), inside("images.txt"), inside("bounding_boxes.txt"), first_present(root, _TEXTS)
    )


def _read_names(path: Path) -> dict[str, str]:
    """images.txt: `number class/name.jpg` a line -> number to key."""
    names: dict[str, str] = {}
    for line in read_text(path).splitlines():
        number, _, name = line.strip().partition(" ")
        if name:
            if not stays_inside(name):
                raise DataError(f"{path}: {shown(name)} is not inside the folder of the images; take it out")
            names[number] = os.path.splitext(name.strip())[0]

    # Each image once.
    twice = [key for key, count in Counter(names.values()).items() if count > 1]
    if twice:
        raise DataError(f"{path}: names {named(twice)} twice; take out one line")
    return names


def _read_boxes(images: _Images) -> dict[str, list[float]]:
    """bounding_boxes.txt: `number x y width height` a line -> key to box."""
    names = _read_names(images.names)
    boxes = {}
    for line in read_text(images.boxes).splitlines():
        number, *box = line.split() or [""]
        if number in names and len(box) == 4:
            try:
                boxes[names[number]] = [float(value) for value in box]
            except ValueError as error:
                raise DataError(f"{images.boxes}: image {number}: {error}; copy the file again") from None
    return boxes


def _class_of(key: str) -> str:
    return key.rpartition("/")[0]


def _split(root: Path, keys: Sequence[str]) -> dict[str, list[str]] | None:
    """Keys of train and test, or None if nothing says which are which."""
    # Reed's lists of classes.
    train_list = first_present(root, [f"{folder}/trainvalclasses.txt" for folder in _SPLIT_FOLDERS])
    test_list = first_present(root, [f"{folder}/testclasses.txt" for folder in _SPLIT_FOLDERS])
    if train_list and test_list:
        train, test = (set(read_text(path).split()) for path in (train_list, test_list))
        if train & test:
            raise DataError(f"{test_list}: {named(sorted(train & test))} are training classes in {train_list}, too")
        return {
            "train": [key for key in keys if _class_of(key) in train],
            "test": [key for key in keys if _class_of(key) in test],
        }

    # AttnGAN's lists of images.
    pickles = {name: root / name / "filenames.pickle" for name in ("train", "test")}
    if all(path.is_file() for path in pickles.values()):
        known = set(keys)
        listed = {
            name: [str(key) for key in expect_list(load_legacy_pickle(path), path)] for name, path in pickles.items()
        }
        return {name: [key for key in members if key in known] for name, members in listed.items()}

    # The whole of CUB without either: the ids of Reed's classes are known.
    if len(keys) == CUB_IMAGES and len({_class_of(key) for key in keys}) == CUB_CLASSES:
        tested = [int(key[:3]) in REED_TEST_CLASSES for key in keys]
        return {
            "train": [key for key, test in zip(keys, tested, strict=True) if not test],
            "test": [key for key, test in zip(keys, tested, strict=True) if test],
        }
    return None


def _without_file(folder: Path, keys: Sequence[str], suffix: str) -> list[str]:
    """The keys without a file below `folder`. Each class folder is listed once, which is faster than a look at every file."""
    there: dict[str, set[str]] = {}
    for name in {_class_of(key) for key in keys}:
        there[name] = set(os.listdir(folder / name)) if (folder / name).is_dir() else set()
    return [key for key in keys if key.rpartition("/")[2] + suffix not in there[_class_of(key)]]


def _entries(keys: Sequence[str], images: str, texts: Path, boxes: dict[str, list[float]]) -> list[Entry]:
    """The entries of some images.

    images: the folder of the images, from the root of the data set
    texts: the folder of the captions
    boxes: by key
    """
    class_ids = {name: class_id for class_id, name in enumerate(sorted({_class_of(key) for key in keys}))}
    entries = []
    for key in keys:
        path = texts / f"{key}.txt"
        lines = path.read_text(encoding="utf-8-sig", errors="replace").split("\n")
        captions = [line.strip() for line in lines if line.strip()][:CAPTIONS_PER_IMAGE]
        if not captions:
            raise DataError(f"{path}: holds no caption; write one a line, or remove the file")
        entries.append(Entry(key, f"{images}/{key}.jpg", captions, _class_id(key, class_ids), boxes[key]))

    counts = Counter(len(entry.captions) for entry in entries)
    if set(counts) - {CAPTIONS_PER_IMAGE}:
        listed = ", ".join(f"{count:,} with {number}" for number, count in sorted(counts.items()))
        logger.warning("%s: not every image has %d captions (%s)", texts, CAPTIONS_PER_IMAGE, listed)
    return entries


def _class_id(key: str, class_ids: dict[str, int]) -> int:
    """CUB's own id, which starts the folder's name (`001.Black_footed_Albatross`), else that of the folder."""
    prefix = key.partition(".")[0]
    return int(prefix) if prefix.isdecimal() else class_ids[_class_of(key)]
