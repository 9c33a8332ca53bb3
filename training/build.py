"""From settings to objects: networks, objective, data. Where plain typed arguments are taken out of the configuration."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from miscc.byte_pairs import BytePairs
from miscc.checkpoint import load_file
from miscc.errors import CheckpointError, ConfigError, UserError
from miscc.settings import arguments_from, from_config, settings_of
from miscc.vocabulary import Vocabulary
from models import SYSTEMS, networks_of
from models.clip_features import untrained_clip
from models.clip_files import UNTRAINED
from models.mixed_text import mixed_text_encoder
from models.registry import from_state, network_name
from models.released import holds, load_discriminator, load_discriminator_files, load_generator, naming
from models.types import Network, System
from sampling.encoders import Encoders, load_clip_encoders, load_encoders, released_vocabulary
from training.data import read_records

logger = logging.getLogger(__name__)


def build_networks(cfg: Mapping) -> dict[str, Network]:
    """Fresh networks of the chosen system: G, D and others that it has. Raises ConfigError where sizes do not work."""
    system = SYSTEMS[cfg.GAN.NAME]
    classes = {part: system.NETWORKS[part] for part in system.parts(objective_settings(cfg))}
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


def encoders_path(cfg: Mapping) -> str:
    """What the encoders of TEXT.ENCODER are loaded from."""
    return {"damsm": cfg.TEXT.DAMSM_NAME, "clip": cfg.CLIP.WEIGHTS}[cfg.TEXT.ENCODER]


def damsm_encoders(cfg: Mapping) -> Encoders:
    """Those that TEXT.DAMSM_NAME names, for captions of TEXT.WORDS_NUM words."""
    encoders = load_encoders(cfg.TEXT.DAMSM_NAME, max_words=cfg.TEXT.WORDS_NUM)
    # The caption length is this training's; the checkpoint must draw with the same.
    encoders.text_encoder.change_settings(max_words=cfg.TEXT.WORDS_NUM)
    return encoders


def clip_encoders(cfg: Mapping) -> Encoders:
    """CLIP's towers that CLIP.WEIGHTS names, or untrained ones of the settings' sizes with the data set's words."""
    if cfg.CLIP.WEIGHTS != UNTRAINED:
        return load_clip_encoders(cfg.CLIP.WEIGHTS, scaled_twice=cfg.CLIP.SCALED_TWICE)
    logger.warning("CLIP.WEIGHTS: an untrained CLIP shows that a training runs; what it draws means nothing")
    vocabulary = BytePairs.of_words(read_records(cfg, "train").vocabulary.words)
    patch_size = max(1, cfg.TREE.BASE_SIZE // 7)
    clip = untrained_clip(
        7 * patch_size, patch_size, cfg.CLIP.WIDTH, cfg.CLIP.BLOCKS, cfg.TEXT.EMBEDDING_DIM, len(vocabulary),
        scaled_twice=cfg.CLIP.SCALED_TWICE,
    )  # fmt: skip
    return Encoders(clip.text_encoder, clip.visual, vocabulary, clip.text_encoder.max_words)


ENCODERS_OF: dict[str, Callable[[Mapping], Encoders]] = {"damsm": damsm_encoders, "clip": clip_encoders}


def encoders_for(cfg: Mapping) -> tuple[Encoders, Vocabulary]:
    """The encoders that the settings name, and their vocabulary. Raises UserError where they do not fit."""
    # A loss that looks at images needs the encoder of its own kind; others take any text encoder.
    objective = objective_settings(cfg)
    if objective.needs_image_encoder and objective.encoders_with_images != cfg.TEXT.ENCODER:
        raise ConfigError(
            f"TEXT.ENCODER: is {cfg.TEXT.ENCODER}, but a loss of these settings looks at images with the encoder of "
            f"{objective.encoders_with_images}; set it so, or leave that loss out (TRAIN.DAMSM_WEIGHT 0)"
        )
    encoders = ENCODERS_OF[cfg.TEXT.ENCODER](cfg)
    vocabulary = encoders.vocabulary or released_vocabulary(cfg.DATA_DIR)
    if not objective.needs_image_encoder and cfg.TEXT.ENCODER != objective.encoders_with_images:
        encoders = encoders._replace(image_encoder=None)  # nobody would look with it
    known = encoders.text_encoder.embedding.num_embeddings
    if known != len(vocabulary):
        raise CheckpointError(
            f"TEXT.DAMSM_NAME: {cfg.TEXT.DAMSM_NAME} knows {known} words, the captions.pickle in {cfg.DATA_DIR} has "
            f"{len(vocabulary)}; take the metadata that these encoders were trained with"
        )
    if encoders.image_encoder is None and objective.needs_image_encoder:
        raise CheckpointError(
            f"TEXT.DAMSM_NAME: there is no image encoder beside {cfg.TEXT.DAMSM_NAME}; put the released "
            f"image_encoder*.pth there, or train without the DAMSM loss: --set TRAIN.DAMSM_WEIGHT 0"
        )
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
