"""Flickr8k and Flickr30k as their authors published them: where their files lie and how they are written.

Captions in any other form are read by folder.py, which calls this file for Flickr's own.
"""

import csv
import re
from dataclasses import dataclass
from pathlib import Path

from datasets.layout import Entry
from datasets.sources.assemble import Row, assemble, image_index, locate
from datasets.sources.building import BuildOptions, first_present, missing_pieces, read_text
from miscc.errors import DataError

__all__ = ["build", "build_found", "find", "locate"]

IMAGE_FOLDERS = ("images", "Images", "Flicker8k_Dataset", "Flickr8k_Dataset", "flickr30k_images", "flickr30k-images")
_TOKENS = ("Flickr8k.token.txt", "results_20130124.token", "Flickr30k.token.txt", "captions.txt")
_LISTS = {"train": "Flickr_8k.trainImages.txt", "val": "Flickr_8k.devImages.txt", "test": "Flickr_8k.testImages.txt"}
_FOLDERS = (".", "Flickr8k_text", "flickr30k")
_TOKEN_LINE = re.compile(r"(.+?)#\d+\t(.*)")  # 1000268201_693b08cb0e.jpg#0<tab>A child in a pink dress ...


@dataclass(frozen=True)
class Originals:
    """Flickr's files that were found.

    captions: the caption file
    lists: {split: its list of images}, only those that are there
    """

    captions: Path
    lists: dict[str, Path]


def find(root: Path) -> Originals | None:
    """The files of Flickr8k or Flickr30k, or None if the captions are not there in that form."""
    captions = first_present(root, [f"{folder}/{name}" for name in _TOKENS for folder in _FOLDERS])
    if captions is None or not _is_caption_file(captions):
        return None
    found = {split: first_present(root, [f"{folder}/{name}" for folder in _FOLDERS]) for split, name in _LISTS.items()}
    return Originals(captions, {split: path for split, path in found.items() if path is not None})


def build(root: Path, options: BuildOptions) -> dict[str, list[Entry]]:
    """The common layout from the authors' files; without lists of splits, a seeded one."""
    originals = find(root)
    if originals is None:
        raise DataError(
            missing_pieces(
                f"{root}: the data set is not complete",
                [
                    f"{root / _TOKENS[0]} (or captions.txt): the captions",
                    *(f"{root / name}: the images of {split}" for split, name in _LISTS.items()),
                ],
            )
            + "\ncaptions in another form (CSV, JSONL, text files): `python -m datasets.prepare folder`"
        )
    return build_found(root, originals, options, {})


def build_found(
    root: Path, originals: Originals, options: BuildOptions, other_lists: dict[str, list[str]]
) -> dict[str, list[Entry]]:
    """As `build`, from what `find` has found.

    other_lists: image names of each split, used where Flickr's own lists are missing
    """
    own_lists = {split: read_text(path).split() for split, path in originals.lists.items()}
    index = image_index(root, options, IMAGE_FOLDERS)
    return assemble(root, _read_captions(originals.captions), index, options, own_lists or other_lists)


def _is_caption_file(path: Path) -> bool:
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        first = file.readline().strip()
    return bool(_TOKEN_LINE.match(first)) or first.lower().replace(" ", "") == "image,caption"


def _read_captions(path: Path) -> list[Row]:
    """Token files (`name#number<tab>caption`), or the captions.txt that others made of them (`image,caption`)."""
    # captions.txt: not every caption with a comma is quoted, so all fields after the first are joined. Line by line, so
    # that a quote that is not closed takes no other line.
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    if not _TOKEN_LINE.match(text):
        try:
            lines = [next(csv.reader([line]), []) for line in text.splitlines()[1:]]
        except csv.Error as error:
            raise DataError(f"{path}: cannot be read as a table ({error}); copy it again") from None
        return [Row(line[0], [", ".join(line[1:])]) for line in lines if len(line) > 1]

    # Token files.
    matches = (_TOKEN_LINE.match(line) for line in text.splitlines())
    return [Row(match[1], [match[2]]) for match in matches if match]
