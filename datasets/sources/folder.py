"""A folder of images of one's own, with captions in a CSV, a JSONL, COCO's JSON, or a text file beside each image.

How caption files are read; matching their names to image files and making splits is in assemble.py.
"""

import csv
import io
import logging
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from datasets.layout import SPLITS, VOCABULARY_NAME, Entry
from datasets.sources import flickr
from datasets.sources.assemble import ImageIndex, Row, assemble, image_index, locate
from datasets.sources.building import BuildOptions, named, read_text
from datasets.sources.coco import read_coco_captions
from miscc.errors import DataError, shown
from miscc.files import parse_json

__all__ = ["build", "locate"]

logger = logging.getLogger(__name__)

_LISTS = {
    "train": ("train.txt",),
    "val": ("val.txt", "dev.txt", "valid.txt", "validation.txt"),
    "test": ("test.txt",),
}
_OWN = (VOCABULARY_NAME, *(f"{split}.jsonl" for split in SPLITS))  # what prepare writes
_IMAGE_COLUMNS = ("image", "file", "filename", "file_name", "path", "filepath", "image_path", "image_name", "img")
_CAPTION_COLUMN = re.compile(r"(caption|text|sentence|description|comment|prompt)s?[_ ]?\d*$")
_LABEL_COLUMNS, _TAG_COLUMNS = ("label", "labels", "title", "name"), ("tags", "keywords")


def build(root: Path, options: BuildOptions) -> dict[str, list[Entry]]:
    """The common layout from images and the captions that are found with them.

    Splits: train.txt, val.txt or dev.txt, test.txt with a name a line where they are, else a seeded one. Raises
    DataError when there are no captions, several caption files, or no column that is known to hold captions.
    """
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; put the images and their captions there")

    # Flickr's own files are read by flickr.py.
    source = _find_source(root) if options.captions is None else _chosen_source(root, options.captions)
    if source is None:
        originals = flickr.find(root)
        if originals is not None:
            logger.info("captions: %s", originals.captions)
            return flickr.build_found(root, originals, options, _lists(root))

    # Captions: from one file, or from a text file beside each image.
    index = image_index(root, options)
    if not index.paths:
        raise DataError(f"{index.folder}: holds no image; --images says where they are")
    rows = _text_files(index) if source is None else _read(source, options)
    if not rows:
        raise DataError(
            f"{root}: no captions found; add a captions.csv (image,caption), a .jsonl, COCO's JSON, Flickr8k's token "
            f"file or a .txt beside each image"
        )
    return assemble(root, rows, index, options, _lists(root))


def _chosen_source(root: Path, captions: Path) -> Path:
    """--captions, which may be given from the current folder or from the root. Raises DataError for a layout's file."""
    source = root / captions if not captions.is_file() and (root / captions).is_file() else captions
    if source.resolve() in [(root / name).resolve() for name in _OWN]:
        raise DataError(f"--captions {captions}: prepare writes or removes a file of this name; rename it")
    return source


def _find_source(root: Path) -> Path | None:
    """The one caption file in the root. Raises DataError if there are several."""
    # Tables and JSON lines before COCO's JSON; what prepare wrote itself is no source.
    files = [path for path in sorted(root.iterdir()) if path.is_file() and path.name not in _OWN]
    found = [path for path in files if path.suffix.lower() in (".csv", ".tsv", ".jsonl")]
    found = found or [path for path in files if path.suffix.lower() == ".json" and _is_coco(path)]

    # Of several, captions.* or metadata.*, if only one has such a name.
    preferred = [path for path in found if path.stem.lower() in ("captions", "metadata")]
    if len(found) > 1 and len(preferred) != 1:
        raise DataError(f"{root}: captions in {', '.join(path.name for path in found)}; choose one with --captions")
    return (preferred or found or [None])[0]


def _is_coco(path: Path) -> bool:
    try:
        content = parse_json(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and {"images", "annotations"} <= content.keys()


def _read(path: Path, options: BuildOptions) -> list[Row]:
    kinds = {".csv": _table, ".txt": _table, ".tsv": _table, ".jsonl": _json_lines, ".json": _coco}
    if not path.is_file():
        raise DataError(f"--captions {path}: no such file")
    if path.suffix.lower() not in kinds:
        raise DataError(f"--captions {path}: must be a .csv, .tsv, .txt, .jsonl or COCO's .json")
    return kinds[path.suffix.lower()](path, options)


def _table(path: Path, options: BuildOptions) -> list[Row]:
    """A table whose first line names the columns, separated by commas, semicolons, tabs or bars."""
    # The delimiter is the one that occurs most often in the first line.
    text = read_text(path)
    header = text.partition("\n")[0]
    delimiter = max(",;\t|", key=header.count)
    reader = csv.reader(io.StringIO(text), delimiter=delimiter, skipinitialspace=True, strict=True)
    try:
        names = [name.strip() for name in next(reader, [])]
        lines = [(reader.line_num, line) for line in reader if line]
    except csv.Error as error:
        raise DataError(
            f"{path}: cannot be read as a table ({error}); look in or before line {reader.line_num} for a quote that is not "
            f"closed, or that stands inside a quoted text and is not doubled"
        ) from None
    twice = [name for name, number in Counter(names).items() if number > 1 and name]
    if twice:
        raise DataError(f"{path}: two columns are called {named(twice)}; rename one")

    # A line with too many fields holds a caption with a comma and no quotes. Where the caption is the last column, the
    # surplus fields belong to it; elsewhere it could be any of them.
    columns = _choose_columns(path, names, lines, options)
    records = []
    for number, line in lines:
        if len(line) > len(names):
            if [names[-1]] not in columns.captions:
                raise DataError(
                    f"{path}, line {number}: has {len(line)} fields under {len(names)} names; put texts that contain "
                    f"{delimiter!r} in quotes"
                )
            line[len(names) - 1 :] = [f"{delimiter} ".join(line[len(names) - 1 :])]
        records.append(dict(zip(names, line, strict=False)))
    return _rows(path, records, columns)


def _json_lines(path: Path, options: BuildOptions) -> list[Row]:
    """A JSON object a line, such as {"image": "a.jpg", "captions": ["a dog", "a black dog"]}."""
    records = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = parse_json(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number}: is no JSON ({error}); correct or remove it") from None
        if not isinstance(record, dict):
            raise DataError(f"{path}, line {number}: must be a JSON object, not {type(record).__name__}")
        records.append(record)
    return _rows(path, records, _choose_columns(path, list(records[0]) if records else [], records, options))


def _coco(path: Path, options: BuildOptions) -> list[Row]:
    return [Row(name, captions) for name, captions in read_coco_captions(path).items()]


def _text_files(index: ImageIndex) -> list[Row]:
    """A caption a line in the .txt beside each image."""
    rows = []
    for path in index.paths:
        text = (index.folder / path).with_suffix(".txt")
        if text.is_file():
            rows.append(Row(path, read_text(text).splitlines()))
    if rows:
        logger.info("captions: the .txt beside each of %d images, one a line", len(rows))
    return rows


@dataclass(frozen=True)
class _Columns:
    """Which columns hold what.

    image: the column that names the image
    captions: groups of columns; each group makes one caption
    class_name: the column of the class, or None
    """

    image: str
    captions: list[list[str]]
    class_name: str | None


def _choose_columns(path: Path, names: Sequence[str], lines: Sequence, options: BuildOptions) -> _Columns:
    """The columns that the user chose, or those with a known name; logs which."""
    if not lines:
        raise DataError(f"{path}: holds no captions, at most a header; add a line for each image")
    image, captions = _image_column(path, names, options), _caption_columns(path, names, options)
    if options.class_column and options.class_column not in names:
        raise DataError(f"--class-column {options.class_column}: {path} has only {', '.join(names)}")
    logger.info(
        "captions: %s, image from column %r, captions from %s",
        *(path, image, " and ".join(repr("+".join(group)) for group in captions)),
    )
    return _Columns(image, captions, options.class_column)


def _rows(path: Path, records: Sequence[dict], columns: _Columns) -> list[Row]:
    rows = []
    for record in records:
        if record.get(columns.image):
            texts = [text for group in columns.captions for text in _texts(path, record, group)]
            class_name = record.get(columns.class_name) if columns.class_name else None
            class_name = None if class_name is None else str(class_name).strip() or None  # an empty cell is no class
            rows.append(Row(str(record[columns.image]), texts, class_name))
    return rows


def _texts(path: Path, record: dict, group: Sequence[str]) -> list[str]:
    """The captions in a group of columns: one column may hold several; the values of several columns make one caption."""
    values = [(name, record.get(name)) for name in group]
    flat = [(name, text) for name, value in values for text in (value if isinstance(value, list) else [value]) if text]
    texts = [_text(path, name, text) for name, text in flat]

    # One column: a caption, or a list of them. Several: one caption; tags, which bars separate, become parts of it.
    return texts if len(group) == 1 else [", ".join(text.replace("|", ", ") for text in texts)]


def _text(path: Path, column: str, value: object) -> str:
    """A caption as text. Karpathy's lists hold an object for each, with the text as `raw`. Raises DataError for others."""
    if isinstance(value, dict):
        value = next((value[name] for name in ("raw", "caption") if name in value), value)
    if not isinstance(value, (str, int, float)):
        raise DataError(f"{path}: {column!r} holds {shown(value)}, which is no caption; write captions as texts")
    return str(value)


def _image_column(path: Path, names: Sequence[str], options: BuildOptions) -> str:
    if options.image_column:
        if options.image_column not in names:
            raise DataError(f"--image-column {options.image_column}: {path} has only {', '.join(names)}")
        return options.image_column
    lowered = {name.lower(): name for name in reversed(names)}
    found = next((lowered[name] for name in _IMAGE_COLUMNS if name in lowered), None)
    if found is None:
        raise DataError(
            f"{path}: which of {', '.join(names)} names the image? Say it with --image-column "
            f"(a table needs a first line that names its columns)"
        )
    return found


def _caption_columns(path: Path, names: Sequence[str], options: BuildOptions) -> list[list[str]]:
    """Groups of columns; each group makes one caption."""
    # As the user says: a name, or names joined by +.
    if options.caption_columns:
        groups = [[column] if column in names else column.split("+") for column in options.caption_columns]
        for name in (name for group in groups for name in group):
            if name not in names:
                raise DataError(f"--caption-column {name}: {path} has only {', '.join(names)}")
        return groups

    # By their names: caption columns, else a label with its tags.
    written = [[name] for name in names if _CAPTION_COLUMN.match(name.lower())]
    if written:
        return written
    labels = [name for name in names if name.lower() in _LABEL_COLUMNS][:1]
    if not labels:
        raise DataError(f"{path}: which of {', '.join(names)} is the caption? Say it with --caption-column")
    return [labels + [name for name in names if name.lower() in _TAG_COLUMNS]]


def _lists(root: Path) -> dict[str, list[str]]:
    """train.txt and the like: a name a line."""
    lists = {}
    for split, names in _LISTS.items():
        path = next((root / name for name in names if (root / name).is_file()), None)
        if path is not None:
            lists[split] = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    return lists
