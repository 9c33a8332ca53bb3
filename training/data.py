"""The data of a training: records, data sets, worker processes, the captions of the pictures. No networks here."""

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from datasets import load_records
from datasets.cache import ImageCache
from datasets.layout import splits_present
from datasets.loading import training_loader
from datasets.records import Records
from datasets.settings import DataSettings
from datasets.text_image import TextImageDataset
from miscc.batch import Batch
from miscc.distributed import World
from miscc.errors import DataError
from miscc.randomness import stream
from miscc.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

MOST_VALIDATED = 1000  # held-out pairs that are ranked against each other at most


def read_records(settings: DataSettings, split: str, vocabulary: Vocabulary | None = None) -> Records:
    """One split of the data set; at most CAPTIONS_PER_IMAGE captions of each image. Raises DataError."""
    records, _ = load_records(settings.dataset, settings.data_dir, split, vocabulary=vocabulary)
    return records.with_captions(settings.captions_per_image)


def split_pairs(data: DataSettings, share: float, seed: int, vocabulary: Vocabulary | None) -> tuple[Records, Records]:
    """Training pairs and held-out pairs: the data's val split, or else a seeded share of the training images.

    share: HELD_OUT; 0 without a val split: the test split, as AttnGAN does; the choice then depends on the test set.
    """
    records = read_records(data, "train", vocabulary)
    if "val" in splits_present(Path(data.data_dir)):
        validation = read_records(data, "val", vocabulary)
    elif share == 0:
        logger.warning("TRAIN.HELD_OUT is 0: the best encoders are chosen by the test split, as AttnGAN's were")
        validation = read_records(data, "test", vocabulary)
    else:
        count = min(MOST_VALIDATED, max(2, round(share * len(records))))
        order = stream(seed, "held out").permutation(len(records))
        records, validation = records.select(sorted(order[count:])), records.select(sorted(order[:count]))

    # No more than can be ranked against each other.
    if len(validation) > MOST_VALIDATED:
        chosen = stream(seed, "validated").permutation(len(validation))[:MOST_VALIDATED]
        validation = validation.select(sorted(chosen))
    return records, validation


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
        folder = Path(settings.cache_dir or Path(settings.data_dir) / "cache")
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

    return records.examples(count, vocabulary)


def batches_from(
    dataset: TextImageDataset, batch_size: int, seed: int, step: int, settings: DataSettings, world: World
) -> Iterable[Batch]:
    """This process's share of the endless batches of a training, from a step on.

    batch_size: of all processes together.
    seed: of the order.
    settings: how many processes read, and which share of the batches holds similar captions.
    """
    return training_loader(
        dataset,
        batch_size,
        seed,
        start_step=step,
        workers=usable_workers(settings.workers, world.device),
        rank=world.rank,
        world_size=world.size,
        pin_memory=world.device.type == "cuda",
        similar=settings.similar_batches,
    )


def next_batch(batches: Iterator[Batch], step: int, save: Callable[[], None] | None) -> Batch:
    """The next batch. Where the data cannot be read, the steps so far are saved before the error goes on.

    step: taken so far.
    save: writes last.pth; None in a process that writes nothing.
    """
    try:
        return next(batches)
    except DataError as error:
        if save is None or step == 0:
            raise
        save()
        raise DataError(f"{error}; step {step} is saved, go on with --resume") from None


def usable_workers(workers: int, device: torch.device) -> int:
    """WORKERS, but at most one a core, on a CPU one for two cores: there the training needs the cores itself."""
    cores = os.cpu_count() or 1
    return min(workers, cores // 2 if device.type == "cpu" else cores)
