"""Which captions are drawn: of a split, of files, or the user's own. Drawing is pipeline.py's, writing folders.py's."""

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from datasets.layout import SPLITS
from datasets.records import Records
from miscc.errors import DataError
from miscc.randomness import stream

logger = logging.getLogger(__name__)


EXAMPLES = "example_filenames.txt"


class Request(NamedTuple):
    """One image to draw: the caption and where it comes from. index numbers the requests; noise depends on it."""

    index: int
    caption: str
    key: str
    caption_number: int
    sample: int


def split_requests(
    records: Records,
    captions_per_image: int = 1,
    per_caption: int = 1,
    num_images: int | None = None,
    seed: int = 0,
) -> list[Request]:
    """What to draw for a split: `per_caption` images for each of the first `captions_per_image` captions of every image.

    captions_per_image 0: all of them. With num_images, so many captions instead, drawn from all captions of the split as a
    function of the seed; when there are fewer, they come again with other noise.
    """
    if num_images is None:
        numbers = [range(len(captions))[: captions_per_image or None] for captions in records.captions]
        pairs = [(index, n) for index in range(len(records)) for n in numbers[index] for _ in range(per_caption)]
    else:
        everything = [(i, c) for i, captions in enumerate(records.captions) for c in range(len(captions))]
        rounds = -(-num_images // len(everything))
        orders = [stream(seed, "sampled captions", number).permutation(len(everything)) for number in range(rounds)]
        pairs = [everything[place] for place in np.concatenate(orders)[:num_images]]
    counts: dict[tuple[int, int], int] = {}
    requests = []
    for number, (index, caption) in enumerate(pairs):
        sample = counts[index, caption] = counts.get((index, caption), -1) + 1
        requests.append(Request(number, records.text(index, caption), records.keys[index], caption, sample))
    return requests


def caption_requests(captions: Sequence[str], per_caption: int = 1) -> list[Request]:
    """What to draw for a user's own captions."""
    pairs = [(number, sample) for number in range(len(captions)) for sample in range(per_caption)]
    return [
        Request(index, captions[number], f"caption{number:03d}", 0, sample)
        for index, (number, sample) in enumerate(pairs)
    ]


def example_requests(data_dir: str | Path) -> list[Request]:
    """What to draw for AttnGAN's example_filenames.txt in a data folder: every line names a file of captions there, with
    or without `.txt`, for instance example_captions; each of its lines is drawn once. Raises DataError."""
    root = Path(data_dir)
    requests = []
    names = _read_lines(root / EXAMPLES)
    if not names:
        raise DataError(f"{root / EXAMPLES}: names no file of captions; write one a line, such as example_captions")
    for name in names:
        key = name.removesuffix(".txt")
        try:
            captions = read_captions(root / f"{key}.txt")
        except DataError as error:
            raise DataError(f"{error}, which {root / EXAMPLES} names") from None
        for number, caption in enumerate(captions):
            requests.append(Request(len(requests), caption, key, number, 0))
    return requests


def each_split_requests(
    read: Callable[[str], Records], present: Collection[str], number: int, seed: int
) -> Iterator[tuple[Records, list[Request]]]:
    """For each split: `number` of its captions, drawn without replacement as a function of the seed.

    read: a split's records by its name; present: the names that the data set has. A split that it lacks is named in a
    warning, and so is one with fewer captions, which are all drawn then.
    """
    for split in SPLITS:
        if split not in present:
            logger.warning("the data set has no split %r: skipped", split)
            continue
        records = read(split)
        total = sum(map(len, records.captions))
        if total < number:
            logger.warning("the split %r has only %d captions: all of them are drawn, not %d", split, total, number)
        yield records, split_requests(records, num_images=min(number, total), seed=seed)


def read_captions(path: str | Path) -> list[str]:
    """A text file with one caption a line; empty lines are passed over. Raises DataError."""
    captions = _read_lines(path)
    if not captions:
        raise DataError(f"{path}: holds no caption; write one a line")
    return captions


def _read_lines(path: str | Path) -> list[str]:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file of captions") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    return [line.strip() for line in lines if line.strip()]
