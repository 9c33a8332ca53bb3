"""From settings to objects: networks, objective, data. Where plain typed arguments are taken out of the configuration."""

import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from datasets import load_records
from datasets.cache import ImageCache
from datasets.captions import Vocabulary
from datasets.text_image import Records, TextImageDataset
from eval.pipeline import Encoders, load_encoders, released_vocabulary
from miscc.checkpoint import load_file
from miscc.config import lookup
from miscc.errors import CheckpointError, ConfigError, DataError, UserError
from models import NETWORKS, SYSTEMS
from models.mixed_text import mixed_text_encoder
from models.released import holds, load_discriminator, load_discriminator_files, load_generator, naming, network_name
from models.types import rebuild

logger = logging.getLogger(__name__)


def pick(cfg: Mapping, settings: Mapping[str, str]) -> dict[str, Any]:
    """{argument: key} -> {argument: the key's value}."""
    return {argument: lookup(cfg, key) for argument, key in settings.items()}


def network_settings(name: str) -> dict[str, Mapping[str, str]]:
    """{part: {argument: key}} of the networks that a system trains."""
    system = SYSTEMS[name]
    always = {"generator": system.GENERATOR_SETTINGS, "discriminator": system.DISCRIMINATOR_SETTINGS}
    return always | getattr(system, "EXTRA_NETWORKS", {})


def network_keys(name: str) -> set[str]:
    """The settings that shape a system's networks, the text encoder's included."""
    parts = [*network_settings(name).values(), getattr(SYSTEMS[name], "TEXT_SETTINGS", {})]
    return {key for settings in parts for key in settings.values()}


def system_keys(name: str) -> set[str]:
    """The settings that a system's parts name."""
    return network_keys(name) | set(SYSTEMS[name].OBJECTIVE_SETTINGS.values())


def text_settings(cfg: Mapping) -> dict[str, Any]:
    """What the system makes of the text encoder, as arguments of `encoders_for` and `TextToImage.from_released`."""
    return pick(cfg, getattr(SYSTEMS[cfg.GAN.NAME], "TEXT_SETTINGS", {}))


def build_networks(cfg: Mapping) -> dict[str, nn.Module]:
    """Fresh networks of the chosen system: G, D and others that it has. Raises ConfigError where sizes do not work."""
    name = cfg.GAN.NAME
    try:
        return {part: NETWORKS[part][name](**pick(cfg, settings)) for part, settings in network_settings(name).items()}
    except ValueError as error:
        raise ConfigError(f"TREE.BASE_SIZE: {error}") from None


def given_networks(cfg: Mapping, fresh: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """G and D of the weight files that NET_G and NET_D name. Raises CheckpointError where they do not fit the settings."""
    train, networks = cfg.TRAIN, {}
    if train.NET_G:
        content = load_file(train.NET_G)
        if isinstance(content, dict) and "networks" in content:
            stored = content["networks"]
            if "generator" not in stored:
                raise CheckpointError(f"TRAIN.NET_G: {train.NET_G} holds no generator but {', '.join(stored)}")
            parts = tuple(fresh) if train.B_NET_D else ("generator",)
            networks = {part: rebuild(stored[part], NETWORKS[part]) for part in parts if part in stored}
        else:
            with naming(train.NET_G):
                networks["generator"] = load_generator(content)
                if train.B_NET_D and not train.NET_D and holds(content, "discriminator"):
                    networks["discriminator"] = load_discriminator(content)
    if train.NET_D:
        networks["discriminator"] = load_discriminator_files(train.NET_D, fresh["discriminator"])
    if networks and "discriminator" not in networks:
        logger.warning("the discriminator starts anew; TRAIN.NET_D names the one that goes with TRAIN.NET_G")
    for part, network in networks.items():
        key = "TRAIN.NET_D" if part == "discriminator" and train.NET_D else "TRAIN.NET_G"
        if type(network) is not type(fresh[part]):
            raise CheckpointError(
                f"{key}: holds the {part} of {network_name(network)}, the settings are for {cfg.GAN.NAME}; set GAN.NAME"
            )
        for argument, setting in network_settings(cfg.GAN.NAME)[part].items():
            theirs, ours = network.arguments.get(argument), fresh[part].arguments.get(argument)
            if theirs != ours:
                raise CheckpointError(
                    f"{key}: the {part}'s {argument} is {theirs}, {setting} says {ours}; set it to {theirs}"
                )
    return networks


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
    if encoders.image_encoder is None and needs_image_encoder(cfg):
        raise CheckpointError(
            f"TEXT.DAMSM_NAME: there is no image encoder beside {cfg.TEXT.DAMSM_NAME}; put the released "
            f"image_encoder*.pth there, or train without the DAMSM loss: --set TRAIN.DAMSM_WEIGHT 0"
        )
    # The caption length is this training's; the checkpoint must draw with the same.
    encoders.text_encoder.max_words = encoders.text_encoder.arguments["max_words"] = cfg.TEXT.WORDS_NUM
    if folder := text_settings(cfg).get("transformer"):
        mixed = mixed_text_encoder(encoders.text_encoder, vocabulary.words, folder)
        encoders = encoders._replace(text_encoder=mixed)
    text_dim = encoders.text_encoder.arguments["text_dim"]
    if text_dim != cfg.TEXT.EMBEDDING_DIM:
        raise ConfigError(
            f"TEXT.EMBEDDING_DIM: is {cfg.TEXT.EMBEDDING_DIM}, but the encoders give {text_dim}; set it so"
        )
    return encoders, vocabulary


def needs_image_encoder(cfg: Mapping) -> bool:
    """Whether the settings ask for a loss that looks at images with DAMSM's encoder."""
    keys = system_keys(cfg.GAN.NAME)
    matching = "TRAIN.DAMSM_WEIGHT" in keys and cfg.TRAIN.DAMSM_WEIGHT * cfg.TRAIN.SMOOTH.LAMBDA > 0
    return matching or ("TRAIN.FINETUNE_ENCODERS" in keys and cfg.TRAIN.FINETUNE_ENCODERS)


def check_batch_size(batch_size: int, num_processes: int = 1) -> None:
    """Raises ConfigError where a process would get no mismatched pair, which the losses need."""
    if batch_size < 2 * num_processes:
        raise ConfigError(
            f"TRAIN.BATCH_SIZE: is {batch_size} for {num_processes} process(es), but each needs at least 2 images to have "
            f"mismatched pairs"
        )


def check_fixed_settings(stored: Mapping, cfg: Mapping, keys: Iterable[str], instead: str) -> None:
    """Raises ConfigError where a key that a run cannot change on the way differs from the run's stored settings."""
    for key in keys:
        before, now = lookup(stored, key), lookup(cfg, key)
        if before != now:
            raise ConfigError(
                f"{key}: the run was started with {before}, not {now}; set it back, or start anew ({instead})"
            )


def fingerprint(records: Records) -> dict[str, int]:
    """What a checkpoint keeps of its training set, see `Records.fingerprint`."""
    return records.fingerprint()


def check_same_data(checkpoint: Mapping, records: Records, data_dir: str) -> None:
    """Raises DataError when a run was started with other images: its steps would no longer mean the same."""
    before, now = checkpoint.get("data", {}), fingerprint(records)
    if before != now:
        same_number = before.get("num_images") == now["num_images"]
        raise DataError(
            f"the run was started with {before.get('num_images')} training images, {data_dir} now has {now['num_images']}"
            f"{' others, or other captions' if same_number else ''}; restore the data, or start a new run from these weights "
            f"(TRAIN.NET_G, TRAIN.NET_E)"
        )


def read_records(cfg: Mapping, split: str, vocabulary: Vocabulary | None = None) -> Records:
    """One split of the data set; at most CAPTIONS_PER_IMAGE captions of each image. Raises DataError."""
    records, _ = load_records(cfg.DATASET_NAME, cfg.DATA_DIR, split, vocabulary=vocabulary)
    most = cfg.TEXT.CAPTIONS_PER_IMAGE
    records.captions = [captions[:most] for captions in records.captions]
    if records.texts is not None:
        records.texts = [texts[:most] for texts in records.texts]
    return records


def make_dataset(cfg: Mapping, records: Records, image_sizes: list[int], augment: bool) -> TextImageDataset:
    """The records as a torch data set, from the cache where DATA_CACHE asks for it. Images are bytes until `Batch.to`."""
    folder = Path(cfg.DATA_DIR) / "cache"
    cache = ImageCache.open(records, max(image_sizes), folder, cfg.SKIP_BROKEN) if cfg.DATA_CACHE else None
    return TextImageDataset(
        records,
        image_sizes,
        max_words=cfg.TEXT.WORDS_NUM,
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
    for key in ("NET_G", "NET_D"):
        if cfg.TRAIN[key] and not Path(cfg.TRAIN[key]).is_file():
            found.append(f"TRAIN.{key}: {cfg.TRAIN[key]}: no such weight file")
    return found
