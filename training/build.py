"""From settings to objects: networks, objective, data. Where plain typed arguments are taken out of the configuration."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from miscc.checkpoint import load_file
from miscc.errors import CheckpointError, ConfigError, UserError
from miscc.settings import arguments_from, from_config, settings_of
from miscc.vocabulary import Vocabulary
from models import SYSTEMS, networks_of
from models.mixed_text import mixed_text_encoder
from models.registry import from_state, network_name
from models.released import holds, load_discriminator, load_discriminator_files, load_generator, naming
from models.types import Network, System
from sampling.encoders import Encoders, load_encoders, released_vocabulary
from training.data import read_records

logger = logging.getLogger(__name__)


def build_networks(cfg: Mapping) -> dict[str, Network]:
    """Fresh networks of the chosen system: G, D and others that it has. Raises ConfigError where sizes do not work."""
    classes = SYSTEMS[cfg.GAN.NAME].NETWORKS
    try:
        return {part: network(**arguments_from(network.Settings, cfg)) for part, network in classes.items()}
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
            networks = {part: from_state(stored[part], networks_of(part)) for part in parts if part in stored}
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
        for argument, one in settings_of(type(network).Settings).items():
            theirs, ours = network.arguments.get(argument), fresh[part].arguments.get(argument)
            if theirs != ours:
                raise CheckpointError(
                    f"{key}: the {part}'s {argument} is {theirs}, {one.key} says {ours}; set it to {theirs}"
                )
    return networks


def build_system(cfg: Mapping, networks: dict[str, nn.Module]) -> System:
    """The objective around its networks."""
    system = SYSTEMS[cfg.GAN.NAME]
    return system(networks, **arguments_from(system.Settings, cfg))


def objective_settings(cfg: Mapping) -> Any:
    """The settings of the chosen system's objective."""
    return from_config(SYSTEMS[cfg.GAN.NAME].Settings, cfg)


def text_settings(cfg: Mapping) -> Any:
    """What the chosen system makes of the text encoder."""
    return from_config(SYSTEMS[cfg.GAN.NAME].TextSettings, cfg)


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
    if encoders.image_encoder is None and objective_settings(cfg).needs_image_encoder:
        raise CheckpointError(
            f"TEXT.DAMSM_NAME: there is no image encoder beside {cfg.TEXT.DAMSM_NAME}; put the released "
            f"image_encoder*.pth there, or train without the DAMSM loss: --set TRAIN.DAMSM_WEIGHT 0"
        )
    # The caption length is this training's; the checkpoint must draw with the same.
    encoders.text_encoder.change_settings(max_words=cfg.TEXT.WORDS_NUM)
    if folder := text_settings(cfg).transformer:
        mixed = mixed_text_encoder(encoders.text_encoder, vocabulary.words, folder)
        encoders = encoders._replace(text_encoder=mixed)
    text_dim = encoders.text_encoder.arguments["text_dim"]
    if text_dim != cfg.TEXT.EMBEDDING_DIM:
        raise ConfigError(
            f"TEXT.EMBEDDING_DIM: is {cfg.TEXT.EMBEDDING_DIM}, but the encoders give {text_dim}; set it so"
        )
    return encoders, vocabulary


def check_batch_size(batch_size: int, num_processes: int = 1) -> None:
    """Raises ConfigError where a process would get no mismatched pair, which the losses need."""
    if batch_size < 2 * num_processes:
        raise ConfigError(
            f"TRAIN.BATCH_SIZE: is {batch_size} for {num_processes} process(es), but each needs at least 2 images to have "
            f"mismatched pairs"
        )


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
