"""From settings to data: records, data sets, worker processes, the captions of the pictures. No networks here."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path

import torch

from datasets import load_records
from datasets.cache import ImageCache
from datasets.records import Records
from datasets.text_image import TextImageDataset
from miscc.errors import DataError
from miscc.vocabulary import Vocabulary

logger = logging.getLogger(__name__)


def read_records(cfg: Mapping, split: str, vocabulary: Vocabulary | None = None) -> Records:
    """One split of the data set; at most CAPTIONS_PER_IMAGE captions of each image. Raises DataError."""
    records, _ = load_records(cfg.DATASET_NAME, cfg.DATA_DIR, split, vocabulary=vocabulary)
    most = cfg.TEXT.CAPTIONS_PER_IMAGE
    records.captions = [captions[:most] for captions in records.captions]
    if records.texts is not None:
        records.texts = [texts[:most] for texts in records.texts]
    return records


def make_dataset(
    cfg: Mapping, records: Records, image_sizes: list[int], augment: bool, max_words: int | None = None
) -> TextImageDataset:
    """The records as a torch data set, from the cache where DATA_CACHE asks for it. Images are bytes until `Batch.to`.

    max_words: of a caption at most; None: TEXT.WORDS_NUM.
    """
    folder = Path(cfg.DATA_DIR) / "cache"
    cache = ImageCache.open(records, max(image_sizes), folder, cfg.SKIP_BROKEN) if cfg.DATA_CACHE else None
    return TextImageDataset(
        records,
        image_sizes,
        max_words=max_words or cfg.TEXT.WORDS_NUM,
        seed=cfg.SEED,
        augment=augment,
        cache=cache,
        skip_broken=cfg.SKIP_BROKEN,
        as_bytes=True,
    )


def fixed_captions(cfg: Mapping, vocabulary: Vocabulary, training_records: Records, number: int) -> list[str]:
    """Captions for the pictures of a run's state: of evenly spaced test images, or training images where there are none."""
    try:
        records = read_records(cfg, "test", vocabulary)
    except DataError as error:
        logger.warning("pictures will show training captions: %s", error)
        records = training_records
    places = [round(place * (len(records) - 1) / max(1, number - 1)) for place in range(min(number, len(records)))]
    captions = [records.text(place, 0) for place in places]
    # Encoders that were trained on other captions may know no word of some.
    return [caption for caption in captions if vocabulary.encode(caption)[0]]


def usable_workers(wanted: int, device: torch.device) -> int:
    """WORKERS, but no more than the cores can carry: training on a CPU wants most of them for itself."""
    cores = os.cpu_count() or 1
    return min(wanted, cores // 2 if device.type == "cpu" else cores)
