"""From settings to objects: networks, objective, data. Where plain typed arguments are taken out of the configuration."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from datasets import load_records
from datasets.cache import ImageCache
from datasets.captions import Vocabulary
from datasets.text_image import Records, TextImageDataset
from eval.pipeline import Encoders, load_encoders, released_vocabulary
from miscc.config import lookup
from miscc.errors import CheckpointError, ConfigError, DataError, UserError
from models import DISCRIMINATORS, GENERATORS, SYSTEMS

logger = logging.getLogger(__name__)


def pick(cfg: Mapping, settings: Mapping[str, str]) -> dict[str, Any]:
    """{argument: key} -> {argument: the key's value}."""
    return {argument: lookup(cfg, key) for argument, key in settings.items()}


def system_keys(name: str) -> set[str]:
    """The settings that a system's parts name."""
    system = SYSTEMS[name]
    parts = (system.GENERATOR_SETTINGS, system.DISCRIMINATOR_SETTINGS, system.OBJECTIVE_SETTINGS)
    return {key for part in parts for key in part.values()}


def build_networks(cfg: Mapping) -> dict[str, nn.Module]:
    """Fresh generator and discriminator of the chosen system. Raises ConfigError where the sizes do not work."""
    system = SYSTEMS[cfg.GAN.NAME]
    try:
        return {
            "generator": GENERATORS[cfg.GAN.NAME](**pick(cfg, system.GENERATOR_SETTINGS)),
            "discriminator": DISCRIMINATORS[cfg.GAN.NAME](**pick(cfg, system.DISCRIMINATOR_SETTINGS)),
        }
    except ValueError as error:
        raise ConfigError(f"TREE.BASE_SIZE: {error}") from None


def build_system(cfg: Mapping, networks: dict[str, nn.Module]) -> Any:
    """The objective around its networks."""
    return SYSTEMS[cfg.GAN.NAME](networks, **pick(cfg, SYSTEMS[cfg.GAN.NAME].OBJECTIVE_SETTINGS))


def encoders_for(cfg: Mapping) -> tuple[Encoders, Vocabulary]:
    """The encoders that TEXT.DAMSM_NAME names, and their vocabulary. Raises CheckpointError where they do not fit."""
    encoders = load_encoders(cfg.TEXT.DAMSM_NAME, max_words=cfg.TEXT.WORDS_NUM)
    vocabulary = encoders.vocabulary or released_vocabulary(cfg.DATA_DIR)
    known = encoders.text_encoder.embedding.num_embeddings
    if known != len(vocabulary):
        raise CheckpointError(
            f"TEXT.DAMSM_NAME: {cfg.TEXT.DAMSM_NAME} knows {known} words, the captions.pickle in {cfg.DATA_DIR} has "
            f"{len(vocabulary)}; take the metadata that these encoders were trained with"
        )
    text_dim = encoders.text_encoder.arguments["text_dim"]
    if text_dim != cfg.TEXT.EMBEDDING_DIM:
        raise ConfigError(
            f"TEXT.EMBEDDING_DIM: is {cfg.TEXT.EMBEDDING_DIM}, but the encoders give {text_dim}; set it so"
        )
    return encoders, vocabulary


def read_records(cfg: Mapping, split: str, vocabulary: Vocabulary | None = None) -> Records:
    """One split of the data set; at most CAPTIONS_PER_IMAGE captions of each image. Raises DataError."""
    records, _ = load_records(cfg.DATASET_NAME, cfg.DATA_DIR, split, vocabulary=vocabulary)
    most = cfg.TEXT.CAPTIONS_PER_IMAGE
    records.captions = [captions[:most] for captions in records.captions]
    if records.texts is not None:
        records.texts = [texts[:most] for texts in records.texts]
    return records


def make_dataset(cfg: Mapping, records: Records, image_sizes: list[int], augment: bool) -> TextImageDataset:
    """The records as a torch data set, from the cache where DATA_CACHE asks for it."""
    cache = ImageCache.open(records, max(image_sizes), Path(cfg.DATA_DIR) / "cache") if cfg.DATA_CACHE else None
    return TextImageDataset(
        records,
        image_sizes,
        max_words=cfg.TEXT.WORDS_NUM,
        seed=cfg.SEED,
        augment=augment,
        cache=cache,
        skip_broken=cfg.SKIP_BROKEN,
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


def problems(cfg: Mapping) -> list[str]:
    """What is not there yet for a training: one line each, from the errors that starting it would raise."""
    found, vocabulary = [], None
    try:
        _, vocabulary = encoders_for(cfg)
    except UserError as error:
        found.append(str(error))
    try:
        read_records(cfg, "train", vocabulary)
    except UserError as error:
        found.append(str(error))
    return found
