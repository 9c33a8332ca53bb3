"""The data of a training: records, data sets, worker processes, the captions of the pictures. No networks here."""

import logging
import os
from pathlib import Path

import torch

from datasets import load_records
from datasets.cache import ImageCache
from datasets.records import Records
from datasets.settings import DataSettings
from datasets.text_image import TextImageDataset
from miscc.errors import DataError
from miscc.vocabulary import Vocabulary

logger = logging.getLogger(__name__)


def read_records(settings: DataSettings, split: str, vocabulary: Vocabulary | None = None) -> Records:
    """One split of the data set; at most CAPTIONS_PER_IMAGE captions of each image. Raises DataError."""
    records, _ = load_records(settings.dataset, settings.data_dir, split, vocabulary=vocabulary)
    most = settings.captions_per_image
    records.captions = [captions[:most] for captions in records.captions]
    if records.texts is not None:
        records.texts = [texts[:most] for texts in records.texts]
    return records


def make_dataset(
    settings: DataSettings,
    records: Records,
    image_sizes: list[int],
    seed: int,
    augment: bool,
    max_words: int | None = None,
) -> TextImageDataset:
    """The records as a torch data set, from the cache where DATA_CACHE asks for it. Images are bytes until `Batch.to`.

    image_sizes: pixels, coarse to fine.
    seed: of crops, flips and the choice of captions.
    augment: crop and flip at random.
    max_words: of a caption at most; None: TEXT.WORDS_NUM.
    """
    cache = None
    if settings.keep_decoded:
        folder = Path(settings.data_dir) / "cache"
        cache = ImageCache.open(records, max(image_sizes), folder, settings.skip_broken)
    return TextImageDataset(
        records,
        image_sizes,
        max_words=max_words or settings.max_words,
        seed=seed,
        augment=augment,
        cache=cache,
        skip_broken=settings.skip_broken,
        as_bytes=True,
    )


def fixed_captions(settings: DataSettings, vocabulary: Vocabulary, training_records: Records, count: int) -> list[str]:
    """Captions for the pictures of a run's state: of evenly spaced test images, or training images where there are none."""
    try:
        records = read_records(settings, "test", vocabulary)
    except DataError as error:
        logger.warning("pictures will show training captions: %s", error)
        records = training_records

    # The first caption of each.
    last, num_gaps = len(records) - 1, max(1, count - 1)
    captions = [records.text(round(index * last / num_gaps), 0) for index in range(min(count, len(records)))]

    # Encoders that were trained on other captions may know no word of some.
    return [caption for caption in captions if vocabulary.encode(caption)[0]]


def usable_workers(workers: int, device: torch.device) -> int:
    """WORKERS, but no more than the cores can carry: training on a CPU wants most of them for itself."""
    cores = os.cpu_count() or 1
    return min(workers, cores // 2 if device.type == "cpu" else cores)
