"""Which captions are drawn: of a split, of files, or the user's own. pipeline.py draws them, folders.py writes them."""

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from datasets.layout import SPLITS
from datasets.records import Records
from miscc.errors import ConfigError, DataError, shown
from miscc.files import stays_inside
from miscc.randomness import stream

logger = logging.getLogger(__name__)

MOST_IMAGES = 1_000_000  # of a user's own captions
EXAMPLES = "example_filenames.txt"


class Request(NamedTuple):
    """One image to draw.

    index: of the request; the noise depends on it
    caption: as written
    key: of the image that the caption describes
    caption_number: which of the image's captions
    sample: counts the images of the same caption
    """

    index: int  # pyrefly: ignore[bad-override]  # a tuple's own method of this name is not used
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

    captions_per_image: 0 means all of them
    num_images: so many captions instead, drawn from all captions of the split as a function of the seed; when there are
        fewer, they come again with other noise

    Raises ConfigError where both are given.
    """
    if num_images is not None and captions_per_image != 1:
        raise ConfigError("--num-images: draws out of all captions of a split; leave it or --captions-per-image out")

    # (image, caption) pairs.
    if num_images is None:
        numbers = [range(len(captions))[: captions_per_image or None] for captions in records.captions]
        pairs = [(image, n) for image in range(len(records)) for n in numbers[image] for _ in range(per_caption)]
    else:
        everything = [(image, n) for image, captions in enumerate(records.captions) for n in range(len(captions))]
        rounds = -(-num_images // len(everything))
        orders = [stream(seed, "sampled captions", number).permutation(len(everything)) for number in range(rounds)]
        chosen = [everything[index] for index in np.concatenate(orders)[:num_images]]
        pairs = [pair for pair in chosen for _ in range(per_caption)]

    # A pair that comes again is another sample of the same caption.
    counts: dict[tuple[int, int], int] = {}
    requests = []
    for index, (image, number) in enumerate(pairs):
        sample = counts[image, number] = counts.get((image, number), -1) + 1
        requests.append(Request(index, records.text(image, number), records.keys[image], number, sample))
    return requests


def caption_requests(captions: Sequence[str], per_caption: int = 1) -> list[Request]:
    """What to draw for a user's own captions. Raises ConfigError for more than MOST_IMAGES."""
    if len(captions) * per_caption > MOST_IMAGES:
        raise ConfigError(
            f"--per-caption {per_caption}: makes more than {MOST_IMAGES:,} images of {len(captions)} caption(s); give less"
        )
    pairs = [(number, sample) for number in range(len(captions)) for sample in range(per_caption)]
    return [
        Request(index, captions[number], f"caption{number:03d}", 0, sample)
        for index, (number, sample) in enumerate(pairs)
    ]


def example_requests(data_dir: str | Path) -> list[Request]:
    """What to draw for AttnGAN's example_filenames.txt in a data folder. Raises DataError.

    Every line names a file of captions in that folder, with or without `.txt`, for instance example_captions. Each
    caption is drawn once.
    """
    root = Path(data_dir)
    names = _read_lines(root / EXAMPLES)
    if not names:
        raise DataError(f"{root / EXAMPLES}: names no file of captions; write one a line, such as example_captions")

    # Each file's captions, in the order of the list.
    requests: list[Request] = []
    for key in dict.fromkeys(name.removesuffix(".txt") for name in names):
        if not stays_inside(key):
            raise DataError(f"{root / EXAMPLES}: names {shown(key)}, which is not inside {root}; link or copy it there")
        try:
            captions = read_captions(root / f"{key}.txt")
        except DataError as error:
            raise DataError(f"{error}, which {root / EXAMPLES} names") from None

        # A caption's key is its file, its number the line.
        for number, caption in enumerate(captions):
            requests.append(Request(len(requests), caption, key, number, 0))
    return requests


def each_split_requests(
    read: Callable[[str], Records], present: Collection[str], number: int, seed: int
) -> Iterator[tuple[Records, list[Request]]]:
    """For each split `number` of its captions, drawn without replacement as a function of the seed.

    read: returns a split's records
    present: the names of the splits that the data set has

    A warning names a split that is missing, and one with fewer captions, of which all are drawn.
    """
    for split in SPLITS:
        if split not in present:
            logger.warning("the data set has no split %r: skipped", split)
            continue

        records = read(split)

        # Fewer captions than requested: all of them, with a warning.
        total = sum(map(len, records.captions))
        if total < number:
            logger.warning("the split %r has only %d captions: all of them are drawn, not %d", split, total, number)
        yield records, split_requests(records, num_images=min(number, total), seed=seed)


def read_captions(path: str | Path) -> list[str]:
    """The captions of a text file, one a line; empty lines are skipped. Raises DataError."""
    captions = _read_lines(path)
    if not captions:
        raise DataError(f"{path}: holds no caption; write one a line")
    return captions


def _read_lines(path: str | Path) -> list[str]:
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()  # without the mark that Windows puts first
    except FileNotFoundError:
        raise DataError(f"{path}: no such file of captions") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    return [line.strip() for line in lines if line.strip()]
