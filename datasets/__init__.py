"""Data sets by name: the registry, and `load_records`. How each is read from its originals is in sources/."""

import difflib
import logging
from pathlib import Path

from datasets.captions import METADATA_NAMES
from datasets.layout import has_layout, metadata_file, read_layout, read_metadata, splits_present
from datasets.records import Records
from datasets.sources import birds, coco, flickr, folder
from miscc.errors import DataError
from miscc.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

# A data set is a module with
#   locate(root, keys) -> (paths, boxes or None): where the images are that AttnGAN's metadata names by key
#   build(root, options) -> {split: entries}: the common layout from the original downloads
DATASETS = {
    "birds": birds,
    "coco": coco,
    "flickr": flickr,
    "folder": folder,
    "toybirds": birds,  # drawn by toybirds/dataset.py, written in CUB's own layout
}


def check_name(name: str) -> None:
    """Raises DataError, with the nearest name, when there is no such data set."""
    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(DATASETS)}."
        raise DataError(f"DATASET_NAME: no data set {name!r}; {hint} Images of your own are `folder`.")


def load_records(
    name: str, root: str | Path, split: str, vocabulary: Vocabulary | None = None
) -> tuple[Records, Vocabulary]:
    """One split of a data set, and the vocabulary of its captions.

    name: in DATASETS.
    root: folder of the data set.
    split: "train", "test" or, where there is one, "val".
    vocabulary: encodes the captions, e.g. a checkpoint's; None: the data set's own.

    AttnGAN's metadata is preferred, whose vocabulary fits the released encoders, to our common layout. Raises DataError
    when neither is there, with the command that makes the layout.
    """
    # Which of the two forms is there.
    check_name(name)
    root = Path(root)
    metadata, layout = metadata_file(root, split), has_layout(root, split)
    if metadata and layout:
        logger.warning(
            "%s holds AttnGAN's %s and a vocabulary.json: the pickle and its vocabulary are used; "
            "remove or rename the pickle to use vocabulary.json",
            *(root, metadata.name),
        )

    # Read it.
    if metadata:
        records = read_metadata(name, root, split, vocabulary, DATASETS[name].locate)
    elif layout:
        records = read_layout(name, root, split, vocabulary)
    else:
        raise DataError(_not_there(name, root, split))

    _check_images(records)
    return records, records.vocabulary


def _not_there(name: str, root: Path, split: str) -> str:
    """Why a split cannot be loaded, and the command that prepares it."""
    present = splits_present(root)
    if present:
        return f"{root}: the data set {name} has no split {split!r}, only {', '.join(present)}"

    state = "is not prepared" if root.is_dir() else "does not exist"
    if any((root / pickle).is_file() for pickle in METADATA_NAMES):
        state = f"holds AttnGAN's captions but not {split}/filenames.pickle, which belongs to them"
    return f"{root}: {state}; run `python -m datasets.prepare {name} --root {root}`, or point DATA_DIR at the data set"


def _check_images(records: Records) -> None:
    """Raise DataError for a moved or missing image folder before training starts, by looking for three of the images."""
    samples = [records.image_paths[index] for index in (0, len(records) // 2, -1)]
    if not any(path.is_file() for path in samples):
        raise DataError(
            f"{samples[0]}: no such image; the data set {records.name} lists it in its split {records.split!r}: "
            f"put the images there, or prepare the data set again"
        )
