"""From rows of captions that name images to a data set: finds the files, makes keys, class ids and splits.

How caption files are read is in folder.py and flickr.py.
"""

import logging
import os
import zlib
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from datasets.layout import SPLITS, Entry
from datasets.sources.building import BuildOptions, named
from miscc.errors import DataError, shown
from miscc.images import IMAGE_SUFFIXES
from miscc.randomness import stream
from miscc.vocabulary import tokenize, words_that_lose_letters

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Row:
    """One line of a caption file.

    image: the image's path or name, with or without suffix
    captions: any number of texts
    class_name: None where the file has no classes
    """

    image: str
    captions: Sequence[str]
    class_name: str | None = None


class ImageIndex:
    """The image files below a folder, found by path or, where that is unique, by name; suffixes may be left out."""

    def __init__(self, root: Path, folder: Path):
        """
        root: of the data set; paths of entries start there
        folder: where the images are, below root or elsewhere
        """
        self.root, self.folder = root, folder
        self.paths: list[str] = sorted(_walk(folder))

        # Two tables of paths and two of names, with and without suffix.
        self._by_path: list[dict[str, list[str]]] = [defaultdict(list) for _ in range(2)]
        self._by_name: list[dict[str, list[str]]] = [defaultdict(list) for _ in range(2)]
        for path in self.paths:
            name = path.rpartition("/")[2]
            for tables, spelling in ((self._by_path, path), (self._by_name, name)):
                tables[0][spelling].append(path)
                tables[1][os.path.splitext(spelling)[0]].append(path)

    def find(self, reference: str) -> str | None:
        """The file's path below the folder, or None if there is no such file or more than one."""
        # As a path, from the folder or from the root.
        reference = reference.strip().replace("\\", "/").removeprefix("./")
        found = _only(self._by_path, reference) or _only(
            self._by_path, _below(self.folder, self.root / reference) or ""
        )

        # By the name alone. Where the reference's folder is there, an image of this name elsewhere is another one.
        place, _, name = reference.rpartition("/")
        return found or (None if place and self._has_folder(place) else _only(self._by_name, name))

    def _has_folder(self, place: str) -> bool:
        """Whether this folder is there below the root or the folder of the images."""
        paths = [(base, base / place) for base in (self.root, self.folder)]
        return any(_below(base, path) is not None and os.path.isdir(path) for base, path in paths)

    def from_root(self, path: str) -> str:
        """A path below the folder -> the path that an Entry has: from the root, or absolute where it lies outside."""
        full = self.folder / path
        return _below(self.root, full) or str(full.resolve())


def _only(tables: Iterable[Mapping[str, list[str]]], spelling: str) -> str | None:
    """The one file with this spelling, from the first table where just one has it."""
    return next((table[spelling][0] for table in tables if len(table.get(spelling, ())) == 1), None)


def _below(folder: Path, path: Path) -> str | None:
    """The path from the folder, or None where it leads out of it."""
    try:
        below = path.relative_to(folder)
    except ValueError:
        return None
    return None if ".." in below.parts else below.as_posix()


def _walk(folder: Path) -> Iterable[str]:
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith("."):
                yield os.path.relpath(os.path.join(place, name), folder).replace(os.sep, "/")


def image_index(root: Path, options: BuildOptions | None, names: Sequence[str] = ("images", "Images")) -> ImageIndex:
    """The images in --images, else in the first of these folders that is there, else anywhere below the root."""
    # --images may be given from the current folder or from the root.
    chosen = options.images if options else None
    if chosen is not None:
        chosen = chosen if chosen.is_dir() or not (root / chosen).is_dir() else root / chosen

    folder = chosen or next((root / name for name in names if (root / name).is_dir()), root)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; it should hold the images")
    return ImageIndex(root, folder)


def locate(root: Path, keys: Sequence[str]) -> tuple[list[Path], None]:
    """The image of each key of a data set of one's own in the form of AttnGAN's metadata; there are no boxes."""
    index = image_index(root, None)
    found = {key: path for key in keys if (path := index.find(key)) is not None}
    lost = [key for key in keys if key not in found]
    if lost:
        raise DataError(f"{index.folder}: has no image for {named(lost)}, which filenames.pickle lists")
    return [index.folder / found[key] for key in keys], None


def assemble(
    root: Path, rows: Iterable[Row], index: ImageIndex, options: BuildOptions, lists: dict[str, list[str]]
) -> dict[str, list[Entry]]:
    """The splits of a data set.

    lists: for each split the names of its images; empty: a seeded split

    Warns of captions without an image and of images without a caption, and names some. Raises DataError if no image
    with a caption is left.
    """
    # Captions and classes by file; a file may have several rows.
    captions: dict[str, list[str]] = {}
    classes: dict[str, str] = {}
    lost: dict[str, None] = {}
    wordless: dict[str, None] = {}
    for row in rows:
        written = [text for text in (" ".join(caption.split()) for caption in row.captions) if text]
        texts = [text for text in written if tokenize(text)]
        wordless |= dict.fromkeys(text for text in written if not tokenize(text))
        path = index.find(row.image)
        if path is None:
            lost[row.image] = None
        elif texts:
            captions.setdefault(path, []).extend(texts)
            if row.class_name is not None:
                classes[path] = row.class_name

    # Say what is left out, and stop where nothing is left.
    if wordless:
        logger.warning(
            "%d captions without a word in Latin letters or digits are left out: %s", len(wordless), named(wordless)
        )
    _warn_of_lost_letters(text for texts in captions.values() for text in texts)
    if lost:
        logger.warning("%d names with captions, but no such image (or several): %s", len(lost), named(lost))
    bare = [path for path in index.paths if path not in captions]
    if bare:
        logger.warning("%d images without a caption are left out: %s", len(bare), named(bare))
    if not captions and wordless:
        raise DataError(
            f"{root}: not one image with a caption that the encoders can read: {len(wordless):,} captions hold no word in "
            f"Latin letters or digits, e.g. {shown(next(iter(wordless)))}; translate them"
        )
    if not captions:
        raise DataError(
            f"{root}: not one image with a caption: {len(index.paths):,} images in {index.folder}, {len(lost):,} names "
            f"with captions that fit none of them; say where the images are and how they are named with --images and "
            f"--image-column"
        )

    entries = _entries(sorted(captions), captions, classes, index)
    return _by_lists(entries, index, lists) if lists else _seeded(entries, options)


def _warn_of_lost_letters(captions: Iterable[str]) -> None:
    """Say which words lose letters outside ASCII, which AttnGAN's tokenizer takes out of words."""
    changed: dict[str, str] = {}
    for caption in captions:
        changed |= words_that_lose_letters(caption)
    if changed:
        examples = [f"{word} -> {plain or 'nothing'}" for word, plain in changed.items()]
        logger.warning(
            "%d words lose letters outside ASCII, as in AttnGAN: %s; spell them without (gruen), or train with CLIP's encoder, "
            "which reads them (TEXT.ENCODER clip)",
            *(len(changed), named(examples)),
        )


def _entries(
    paths: Sequence[str], captions: dict[str, list[str]], classes: dict[str, str], index: ImageIndex
) -> dict[str, Entry]:
    """The entry of each image by its path: its key is the path without suffix where that is unique."""
    stems = [os.path.splitext(path)[0] for path in paths]
    keys = stems if len(set(stems)) == len(stems) else paths

    # An image without a class is a class of its own, with an id that no named class has.
    class_ids = {name: class_id for class_id, name in enumerate(sorted(set(classes.values())))}
    entries = {}
    for index_in_paths, (path, key) in enumerate(zip(paths, keys, strict=True)):
        class_id = class_ids[classes[path]] if path in classes else len(class_ids) + index_in_paths
        entries[path] = Entry(key, index.from_root(path), captions[path], class_id)
    return entries


def _by_lists(entries: dict[str, Entry], index: ImageIndex, lists: dict[str, list[str]]) -> dict[str, list[Entry]]:
    """Splits as the lists of names say; a missing list of train or test means all images that no other list names."""
    # What the lists name; an image in two lists is an error, a name without an image a warning.
    assigned: dict[str, str] = {}
    unknown = []
    for split, names in lists.items():
        for name in names:
            path = index.find(name)
            if path is None or path not in entries:
                unknown.append(name)
            elif assigned.setdefault(path, split) != split:
                raise DataError(f"{name} is in the list of {assigned[path]} and in that of {split}; take it from one")
    if unknown:
        logger.warning("%d names in the split lists without an image and caption: %s", len(unknown), named(unknown))

    # What no list names: the split without a list, or left out.
    rest = [path for path in entries if path not in assigned]
    for split in ("train", "test"):
        if split not in lists and rest:
            logger.info("no list for %s: the %d images in no other list", split, len(rest))
            assigned.update(dict.fromkeys(rest, split))
            rest = []
    if rest:
        logger.warning("%d images are in no split list and are left out: %s", len(rest), named(rest))
    return _checked(
        {split: [e for path, e in entries.items() if assigned.get(path) == split] for split in SPLITS}, lists
    )


def _seeded(entries: dict[str, Entry], options: BuildOptions) -> dict[str, list[Entry]]:
    """A split at random: each image is ranked by a number that depends on its key and the seed alone.

    Of N images the first round(test_fraction * N), at least one, are for testing, the next round(val_fraction * N) for
    validation. So images added later change the split of others only near the borders.
    """
    # Rank the images.
    draws = {
        path: float(stream(options.seed, "split", zlib.crc32(entry.key.encode("utf-8", "surrogateescape"))).random())
        for path, entry in entries.items()
    }
    by_draw = sorted(entries, key=draws.__getitem__)

    # Cut the ranking in three.
    total = len(by_draw)
    num_test = min(max(1, round(options.test_fraction * total)), max(1, total - 1))  # one is left to train on
    num_val = min(round(options.val_fraction * total), max(0, total - 1 - num_test))
    splits = ["test"] * num_test + ["val"] * num_val + ["train"] * (total - num_test - num_val)
    split_of = dict(zip(by_draw, splits, strict=True))
    logger.info(
        "no split lists (train.txt, test.txt): a seeded split, %d test and %d val images, the other %d train",
        *(num_test, num_val, total - num_test - num_val),
    )
    return _checked({split: [e for path, e in entries.items() if split_of[path] == split] for split in SPLITS}, ())


def _checked(splits: dict[str, list[Entry]], listed: Collection[str]) -> dict[str, list[Entry]]:
    """The splits that hold an image. Raises DataError where train or test does not.

    listed: those that have a list.
    """
    for split in ("train", "test"):
        if not splits[split]:
            remedy = f"correct {split}.txt" if split in listed else f"add a {split}.txt"
            raise DataError(f"the split {split!r} would hold no image; add images, or {remedy}")
    return {split: entries for split, entries in splits.items() if entries}
