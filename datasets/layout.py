"""Data sets on the disk, as Records: our common layout, which prepare.py writes, and AttnGAN's metadata.

The common layout is `vocabulary.json` and one `{train,val,test}.jsonl` a split with a line for each image: key,
image (path from the root), captions, class_id and, where there is one, box. The original downloads are read in sources/.
"""

import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from datasets.captions import METADATA_NAMES, load_captions_pickle
from datasets.pickles import load_legacy_pickle
from datasets.records import Records
from miscc.errors import DataError, shown
from miscc.files import parse_json, stays_inside, write_text
from miscc.vocabulary import Vocabulary, tokenize

logger = logging.getLogger(__name__)

Captions = list[list[np.ndarray]]  # for each image its captions as int64 indices

SPLITS = ("train", "val", "test")
VOCABULARY_NAME = "vocabulary.json"
LAYOUT_NAMES = (VOCABULARY_NAME, *(f"{split}.jsonl" for split in SPLITS))


@dataclass(frozen=True)
class Entry:
    """One image of a data set that is being built.

    key: its name, unique
    image: its path from the data set's root, with slashes
    captions: as written, at least one
    class_id: of its class; where there are no classes, a number that no other image has
    box: x, y, width, height in pixels, or None
    """

    key: str
    image: str
    captions: list[str]
    class_id: int
    box: list[float] | None = None


def metadata_file(root: Path, split: str) -> Path | None:
    """AttnGAN's captions.pickle, if it and the split's filenames.pickle, which belongs to it, are there.

    None for other splits than train and test, of which the pickle has no captions.
    """
    if split not in ("train", "test") or not (root / split / "filenames.pickle").is_file():
        return None
    return next((root / name for name in METADATA_NAMES if (root / name).is_file()), None)


def has_layout(root: Path, split: str) -> bool:
    """Whether the common layout is there for this split."""
    return (root / VOCABULARY_NAME).is_file() and (root / f"{split}.jsonl").is_file()


def splits_present(root: Path) -> list[str]:
    """The splits that can be loaded from this folder."""
    return [split for split in SPLITS if has_layout(root, split) or metadata_file(root, split)]


def refuse_other_files(root: Path) -> None:
    """Raises DataError for a file that `write_layout` would replace or remove, and that is none of a layout."""
    for path in (root / f"{split}.jsonl" for split in SPLITS):
        if path.is_file() and not _is_layout(path):
            raise DataError(f"{path}: is not a layout; rename it, since prepare writes or removes a file of this name")

    # The vocabulary.
    path = root / VOCABULARY_NAME
    if path.is_file():
        try:
            Vocabulary.load(path)
        except DataError:
            raise DataError(
                f"{path}: is not a layout's vocabulary; rename it, since prepare writes a file of this name"
            ) from None


def _is_layout(path: Path) -> bool:
    """Whether the first line of a {split}.jsonl has the fields of an Entry, or the file is empty."""
    with path.open("rb") as file:
        line = file.readline(1 << 24)
    if not line:
        return True
    try:
        Entry(**parse_json(line.decode("utf-8")))
    except (ValueError, TypeError):
        return False
    return True


def write_layout(root: str | Path, splits: Mapping[str, Sequence[Entry]]) -> Vocabulary:
    """Write the common layout, each file whole or not at all, and return the vocabulary.

    vocabulary.json comes last. Splits of an earlier build that `splits` lacks are removed. Raises DataError where train
    or test would be empty, and for an entry that `read_layout` would refuse.
    """
    root = Path(root)
    for split in ("train", "test"):
        if not splits.get(split):
            raise DataError(f"{root}: there would be no image in the split {split!r}")
    for split, entries in splits.items():
        _check_entries(root, split, entries)

    # The words of all splits together, as in AttnGAN: a word that only test captions use needs an index, too.
    ordered = [split for split in ("train", "test", "val") if split in splits]
    vocabulary = Vocabulary.build(caption for split in ordered for entry in splits[split] for caption in entry.captions)

    for split in SPLITS:
        path = root / f"{split}.jsonl"
        if split in splits:
            write_text(path, "".join(_to_line(entry) for entry in splits[split]))
        else:
            path.unlink(missing_ok=True)
    vocabulary.save(root / VOCABULARY_NAME)
    return vocabulary


def _check_entries(root: Path, split: str, entries: Sequence[Entry]) -> None:
    """Raises DataError for an entry that loading would refuse, or that has the key of another."""
    keys: set[str] = set()
    for entry in entries:
        try:
            if _checked(entry).key in keys:
                raise ValueError("its name is there twice")
        except UnicodeEncodeError as error:
            text = shown(error.object)
            raise DataError(f"{text}: is not UTF-8; rename the file, or write the caption anew") from None
        except ValueError as error:
            raise DataError(
                f"{root}: the image {shown(entry.key)} of {split}: {error}; correct the originals or leave it out"
            ) from None
        keys.add(entry.key)


def _to_line(entry: Entry) -> str:
    record: dict[str, Any] = {
        "key": entry.key,
        "image": entry.image,
        "captions": entry.captions,
        "class_id": entry.class_id,
    }
    if entry.box is not None:
        record["box"] = entry.box
    return json.dumps(record, ensure_ascii=False) + "\n"


def read_layout(name: str, root: Path, split: str, vocabulary: Vocabulary | None) -> Records:
    """One split of the common layout.

    vocabulary: encodes the captions; None: vocabulary.json does

    Raises DataError, naming file and line.
    """
    vocabulary = Vocabulary.load(root / VOCABULARY_NAME) if vocabulary is None else vocabulary
    entries = _read_entries(root / f"{split}.jsonl")

    # Boxes for all images or for none.
    boxes = None
    if entries and all(entry.box is not None for entry in entries):
        boxes = np.array([entry.box for entry in entries], dtype=np.float64)
    elif any(entry.box is not None for entry in entries):
        raise DataError(f"{root / f'{split}.jsonl'}: some images have a box and some have none; give all of them one")

    texts = [entry.captions for entry in entries]
    records = Records(
        name=name,
        split=split,
        keys=[entry.key for entry in entries],
        image_paths=[root / entry.image for entry in entries],
        captions=_encode(texts, vocabulary, f"{name}, {split}"),
        class_ids=np.array([entry.class_id for entry in entries], dtype=np.int64),
        vocabulary=vocabulary,
        texts=texts,
        boxes=boxes,
    )
    return _without_empty(records)


def _read_entries(path: Path) -> list[Entry]:
    """The lines of a {split}.jsonl. Raises DataError for one that is no entry, or has the key of another."""
    entries: dict[str, Entry] = {}
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                entry = _checked(Entry(**parse_json(line.decode("utf-8"))))
                if entries.setdefault(entry.key, entry) is not entry:
                    raise ValueError(f"the key {shown(entry.key)} is there twice")
            except (ValueError, TypeError) as error:
                reason = str(error)[:200]
                raise DataError(f"{path}, line {number}: is not a valid record ({reason}); run prepare again") from None
    if not entries:
        raise DataError(f"{path}: holds no record; run prepare again")
    return list(entries.values())


def _checked(entry: Entry) -> Entry:
    """The entry. Raises ValueError where a field holds something else than it should."""
    texts = [entry.key, entry.image, *(entry.captions if isinstance(entry.captions, list) else [])]
    if not all(isinstance(text, str) for text in texts) or not entry.key or len(texts) < 3:
        raise ValueError("key and image must be texts, captions a list of at least one")
    for text in texts:
        text.encode("utf-8")  # half a character: UnicodeEncodeError, which is a ValueError
    if not stays_inside(entry.image):
        raise ValueError(
            f"the image {shown(entry.image)} is outside the data folder; a link in the folder may lead there"
        )
    if type(entry.class_id) is not int or abs(entry.class_id) >= 2**63:
        raise ValueError(f"class_id must be a whole number, not {shown(entry.class_id)}")

    # The box.
    if entry.box is not None:
        numbers = entry.box if isinstance(entry.box, list) else []
        if len(numbers) != 4 or not all(type(one) in (int, float) and abs(one) < 1e9 for one in numbers):
            raise ValueError(f"box must be four numbers, not {shown(entry.box)}")
    return entry


# (root, keys) -> paths of the images, and their boxes (N, 4) or None
Locate = Callable[[Path, Sequence[str]], tuple[list[Path], np.ndarray | None]]


def read_metadata(name: str, root: Path, split: str, vocabulary: Vocabulary | None, locate: Locate) -> Records:
    """One split from AttnGAN's captions.pickle, filenames.pickle and, where there is one, class_info.pickle.

    vocabulary: encodes the captions, which are decoded with the pickle's first; None: the pickle's, which released
        encoders need
    locate: finds images and boxes

    Raises DataError, naming the file.
    """
    captions_path = metadata_file(root, split)
    if captions_path is None:
        raise DataError(f"{root}: holds no captions.pickle with {split}/filenames.pickle")
    own, keys, captions = _read_captions(captions_path, root / split / "filenames.pickle", split)
    paths, boxes = locate(root, keys)

    # In the caller's vocabulary: the captions as texts, decoded or as their authors wrote them, are encoded again.
    texts = None
    if vocabulary is not None and vocabulary != own:
        texts = [[own.decode(caption) for caption in group] for group in captions]
        if vocabulary.reads_whole_captions:
            texts = _as_written(root, keys, texts)
        captions = _encode(texts, vocabulary, f"{name}, {split}")

    records = Records(
        name=name,
        split=split,
        keys=keys,
        image_paths=paths,
        captions=captions,
        class_ids=_class_ids(root / split / "class_info.pickle", keys),
        vocabulary=own if vocabulary is None else vocabulary,
        texts=texts,
        boxes=boxes,
    )
    return _without_empty(records)


def _read_captions(captions_path: Path, names_path: Path, split: str) -> tuple[Vocabulary, list[str], Captions]:
    """The vocabulary, the keys of the split's images, and for each its captions."""
    train, test, vocabulary = load_captions_pickle(captions_path)
    keys = expect_list(load_legacy_pickle(names_path), names_path)
    outside = [key for key in keys if not isinstance(key, str) or not stays_inside(key)]
    if outside:
        raise DataError(f"{names_path}: {shown(outside[0])} names no image inside the data folder; copy the file again")
    flat = expect_list(train if split == "train" else test, captions_path)

    # The pickle holds one flat list: as many captions for each image.
    if not keys or not flat or len(flat) % len(keys):
        raise DataError(
            f"{captions_path}: holds {len(flat)} captions for {split}, which is no multiple of the {len(keys)} images "
            f"in {names_path}; the two files do not belong together"
        )
    each = len(flat) // len(keys)
    try:
        captions = [np.fromiter(caption, dtype=np.int64, count=len(caption)) for caption in flat]
    except (TypeError, ValueError, OverflowError):
        raise DataError(f"{captions_path}: a caption is no list of words' numbers; copy the file again") from None

    # A damaged file shows as an index beyond the vocabulary.
    highest = max((int(caption.max(initial=0)) for caption in captions), default=0)
    lowest = min((int(caption.min(initial=0)) for caption in captions), default=0)
    if highest >= len(vocabulary) or lowest < 0:
        raise DataError(
            f"{captions_path}: word {lowest if lowest < 0 else highest} is beyond its vocabulary of {len(vocabulary)}; copy "
            f"the file again"
        )
    return vocabulary, keys, [captions[start : start + each] for start in range(0, len(captions), each)]


def _as_written(root: Path, keys: Sequence[str], decoded: list[list[str]]) -> list[list[str]]:
    """The captions as their authors wrote them, from text/<key>.txt, one a line; those in `decoded` where that lacks some.

    decoded: for each image its captions as the pickle has them: only the words, in lower case, without punctuation
    """
    # An image's file is used only if it has at least as many captions as the pickle.
    texts, missing = [], []
    for key, group in zip(keys, decoded, strict=True):
        path = root / "text" / f"{key}.txt"
        lines = path.read_text(encoding="utf-8-sig", errors="replace").split("\n") if path.is_file() else []
        written = [line.strip() for line in lines if tokenize(line)][: len(group)]
        if len(written) < len(group):
            missing.append(key)
        texts.append(written if len(written) == len(group) else group)

    if missing:
        logger.warning(
            "%s: captions of %d of %d images are read from captions.pickle, without capitals and punctuation, since "
            "text/ does not have them (%s)",
            *(root, len(missing), len(keys), ", ".join(missing[:3])),
        )
    return texts


def expect_list(value: object, path: Path) -> list:
    """What a pickle holds, as a list. Raises DataError where it is none."""
    if not isinstance(value, (list, tuple, np.ndarray)):
        raise DataError(f"{path}: must hold a list, not {type(value).__name__}")
    return list(value)


def _class_ids(path: Path, keys: Sequence[str]) -> np.ndarray:
    """AttnGAN's class_info.pickle, (N,) int64."""
    # Without it the folder in the key is the class, as in CUB; keys without a folder are classes of their own, as in COCO.
    if not path.is_file():
        if any("/" in key for key in keys):
            return np.unique([key.rpartition("/")[0] for key in keys], return_inverse=True)[1].astype(np.int64)
        return np.arange(len(keys), dtype=np.int64)

    try:
        class_ids = np.array([int(number) for number in expect_list(load_legacy_pickle(path), path)], dtype=np.int64)
    except (TypeError, ValueError, OverflowError):
        raise DataError(f"{path}: must hold a whole number for each image; copy the file again") from None
    if len(class_ids) != len(keys):
        raise DataError(
            f"{path}: names {len(class_ids)} classes for {len(keys)} images; the files do not belong together"
        )
    return class_ids


def _encode(texts: Sequence[Sequence[str]], vocabulary: Vocabulary, name: str) -> Captions:
    """Captions as indices, a list for each image; a warning, which starts with `name`, says which words are unknown."""
    # Each different caption once: data sets repeat them.
    encoded: dict[str, np.ndarray] = {}
    unknown: Counter[str] = Counter()
    num_words = 0
    for caption in (caption for group in texts for caption in group):
        if caption not in encoded:
            indices, missing = vocabulary.encode(caption)
            encoded[caption] = np.array(indices, dtype=np.int64)
            unknown.update(missing)
            num_words += len(indices) + len(missing)

    if unknown:
        logger.warning(
            "%s: %d of %d words in its captions are not in the vocabulary of %d and are left out (%s)",
            *(name, unknown.total(), num_words, len(vocabulary)),
            ", ".join(word for word, _ in unknown.most_common(8)),
        )
    return [[encoded[caption] for caption in group] for group in texts]


def _without_empty(records: Records) -> Records:
    """Leave out captions without a word, and images without a caption: nothing can be drawn or learnt from them."""
    if all(len(caption) for group in records.captions for caption in group) and all(records.captions):
        return records

    # Captions without a word.
    for index, group in enumerate(records.captions):
        kept = [number for number, caption in enumerate(group) if len(caption)]
        records.captions[index] = [group[number] for number in kept]
        if records.texts is not None:
            records.texts[index] = [records.texts[index][number] for number in kept]

    # Images without a caption.
    good = [index for index, group in enumerate(records.captions) if group]
    if not good:
        raise DataError(
            f"{records.name}: not one caption of the split {records.split!r} holds a word of the vocabulary; "
            f"the vocabulary belongs to another data set"
        )
    if len(good) < len(records):
        bad = [records.keys[index] for index, group in enumerate(records.captions) if not group]
        logger.warning(
            "%s, %s: %d images left out, because their captions hold no known word (%s)",
            *(records.name, records.split, len(bad), ", ".join(bad[:3])),
        )
    return records.select(good)
