"""From settings to objects: the networks that a training starts with, and the objective around them. No data here."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from torch import nn

from datasets.settings import DataSettings
from miscc.byte_pairs import BytePairs, vocabulary_of
from miscc.checkpoint import validate
from miscc.errors import CheckpointError, ConfigError, UserError
from miscc.settings import settings_of
from miscc.vocabulary import Vocabulary
from models import SYSTEMS, networks_of
from models.choice import ChosenSystem
from models.clip_features import untrained_clip
from models.clip_files import UNTRAINED
from models.mixed_text import mixed_text_encoder
from models.registry import from_state, network_name, with_weight_file
from models.released import holds, load_discriminator, load_discriminator_files, load_generator, naming
from models.types import CaptionEncoder, Discriminator, Generator, Network, System
from sampling.encoders import (
    Encoders,
    check_sentence_length,
    check_vocabulary,
    load_clip_encoders,
    load_encoders,
    released_vocabulary,
)
from sampling.published import is_published, load_weights, weight_file
from training.data import read_records
from training.settings import StartSettings

logger = logging.getLogger(__name__)


# -- networks ------------------------------------------------------------------------------------------------------


def build_networks(system: ChosenSystem) -> dict[str, Network]:
    """Fresh networks of a system: G, D and others that it has. Raises ConfigError where sizes do not work."""
    networks = SYSTEMS[system.name].NETWORKS
    classes = {part: networks[part] for part in SYSTEMS[system.name].parts(system.objective)}
    try:
        return {part: network(**system.networks[part]) for part, network in classes.items()}
    except ValueError as error:
        raise ConfigError(f"TREE.BASE_SIZE: {error}") from None


def build_system(system: ChosenSystem, networks: dict[str, Any]) -> System:
    """The objective around its networks."""
    return SYSTEMS[system.name](networks, **vars(system.objective))


def starting_networks(
    system: ChosenSystem, start: StartSettings, data: DataSettings
) -> tuple[dict[str, Network], Vocabulary]:
    """The networks of a new training, fresh or of NET_G, with the encoders that the settings name. Raises UserError."""
    encoders, vocabulary = encoders_for(system, start, data)

    # Fresh networks, whose gates start from GAN.GATE.
    fresh = build_networks(system)
    for network in fresh.values():
        for gate in network.gates():
            nn.init.constant_(gate, start.gate)

    # Networks from weight files replace fresh ones; the encoders stand beside them.
    networks = dict(fresh)
    networks |= networks_from_files(start, networks, system.name)
    networks["text_encoder"] = encoders.text_encoder
    if encoders.image_encoder is not None:
        networks["image_encoder"] = encoders.image_encoder
    return networks, vocabulary


def resumed_networks(
    system: ChosenSystem, checkpoint: Mapping, backbone_weights: str = ""
) -> tuple[dict[str, Network], Vocabulary]:
    """The networks of a run's checkpoint, all but the average. Raises CheckpointError where one is missing.

    backbone_weights: where the weights of the image encoder's frozen backbone lie now; "": where they did.
    """
    files = {"image_encoder": backbone_weights, "projected": system.networks.get("projected", {}).get("weights", "")}
    networks = {
        part: from_state(with_weight_file(entry, files.get(part, "")), networks_of(part))
        for part, entry in checkpoint["networks"].items()
        if part != "generator_ema"
    }

    # The networks that the settings train, of the system that they name.
    expected = SYSTEMS[system.name]
    for part in expected.parts(system.objective):
        if part not in networks:
            raise CheckpointError(
                f"the run was started without a network {part!r}, which these settings train; set GAN.DISCRIMINATOR "
                f"back, or start anew (TRAIN.NET_G)"
            )
        if type(networks[part]) is not expected.NETWORKS[part]:
            raise CheckpointError(
                f"the checkpoint's {part} is {network_name(networks[part])}'s, not {system.name}'s; resume with its own settings"
            )

    # The encoders, and the vocabulary that goes with them.
    if "text_encoder" not in networks:
        raise CheckpointError("the checkpoint holds no text encoder; use another one, or start anew")
    if "image_encoder" not in networks and system.objective.needs_image_encoder:
        raise CheckpointError("the run was started without an image encoder; keep TRAIN.DAMSM_WEIGHT at 0")
    vocabulary = vocabulary_of(checkpoint["vocabulary"])
    text_encoder = cast(CaptionEncoder, networks["text_encoder"])
    check_sentence_length(text_encoder, cast(Generator, networks["generator"]), "the checkpoint's text encoder")
    if text_encoder.embedding.num_embeddings != len(vocabulary):
        raise CheckpointError(
            "the checkpoint's text encoder knows another number of words than its vocabulary has; start anew"
        )
    return networks, vocabulary


# -- weight files --------------------------------------------------------------------------------------------------


def networks_from_files(start: StartSettings, fresh: Mapping[str, Network], name: str) -> dict[str, Network]:
    """G and D from the weight files that NET_G and NET_D name.

    fresh: the networks of the settings.
    name: of their system.

    Raises CheckpointError where the files do not fit the settings.
    """
    # From the generator's file, which may hold a discriminator, too; then from the discriminator's own file.
    networks: dict[str, Network] = {}
    if start.generator_file:
        networks = _from_generator_file(start, fresh)
    if start.discriminator_file:
        if "discriminator" not in fresh:
            raise ConfigError(
                "TRAIN.NET_D: no discriminator of the paper's kind is trained with GAN.DISCRIMINATOR projected; leave it "
                "empty, or set GAN.DISCRIMINATOR paper or both"
            )
        like = cast(Discriminator, fresh["discriminator"])
        networks["discriminator"] = load_discriminator_files(start.discriminator_file, like)

    # They must be what the settings would build.
    if networks and "discriminator" in fresh and "discriminator" not in networks:
        logger.warning("the discriminator starts anew; TRAIN.NET_D names the one that goes with TRAIN.NET_G")
    if networks and "projected" in fresh and "projected" not in networks:
        logger.warning("the projected discriminator starts anew: no file holds one, or TRAIN.B_NET_D is False")
    for part, network in networks.items():
        key = "TRAIN.NET_D" if part == "discriminator" and start.discriminator_file else "TRAIN.NET_G"
        _check_same_network(network, fresh[part], key, part, name)
    return networks


def _from_generator_file(start: StartSettings, fresh: Mapping[str, Network]) -> dict[str, Network]:
    """The networks in what NET_G names: a checkpoint of ours, a published model, or the authors' weights."""
    path = start.generator_file
    content = load_weights(path)

    # Ours: every network that the system trains, or G alone.
    if isinstance(content, dict) and "networks" in content:
        validate(content, path)
        stored = content["networks"]
        if "generator_ema" in stored:  # which may be the only one: of a published model, as a rule
            stored = {"generator": stored["generator_ema"], **stored}
        if "generator" not in stored:
            raise CheckpointError(f"TRAIN.NET_G: {path} holds no generator but {', '.join(stored)}")
        parts = tuple(fresh) if start.with_discriminator else ("generator",)
        with naming(path):
            return {part: _network_of(stored[part], fresh[part], part) for part in parts if part in stored}

    # The authors'.
    with naming(path):
        networks: dict[str, Network] = {"generator": load_generator(content)}
        takes_discriminator = start.with_discriminator and not start.discriminator_file and "discriminator" in fresh
        if takes_discriminator and holds(content, "discriminator"):
            networks["discriminator"] = load_discriminator(content)
    return networks


def _network_of(entry: Mapping, fresh: Network, part: str) -> Network:
    """A stored network; a frozen backbone in it is read from where the settings say that its file lies."""
    file, backbone = (fresh.arguments.get(name, "") for name in ("weights", "backbone"))
    return from_state(with_weight_file(entry, file, backbone), networks_of(part))


def _check_same_network(network: Network, fresh: Network, key: str, part: str, name: str) -> None:
    """Raises CheckpointError where a loaded network differs from the one that the settings would build.

    key: the setting that names its file.
    name: of the system.
    """
    if type(network) is not type(fresh):
        raise CheckpointError(
            f"{key}: holds the {part} of {network_name(network)}, the settings are for {name}; set GAN.NAME"
        )
    has_hash = "weights_hash" in network.arguments
    for argument, one in settings_of(type(network).Settings).items():
        if argument == "weights" and has_hash:  # a file may move: its hash has been compared
            continue
        stored, configured = network.arguments.get(argument), fresh.arguments.get(argument)
        if stored != configured:
            raise CheckpointError(
                f"{key}: the {part}'s {argument} is {stored}, {one.key} says {configured}; set it to {stored}"
            )


# -- encoders ------------------------------------------------------------------------------------------------------


def damsm_encoders(start: StartSettings, data: DataSettings) -> Encoders:
    """Those that TEXT.DAMSM_NAME names, for captions of TEXT.WORDS_NUM words."""
    encoders = load_encoders(start.encoders, max_words=data.max_words, backbone_weights=start.backbone_weights)
    # The caption length is this training's; the checkpoint must draw with the same.
    encoders.text_encoder.change_settings(max_words=data.max_words)
    return encoders


def clip_encoders(start: StartSettings, data: DataSettings) -> Encoders:
    """CLIP's towers that CLIP.WEIGHTS names, or untrained ones of the settings' sizes with the data set's words."""
    if start.clip != UNTRAINED:
        return load_clip_encoders(start.clip, scaled_twice=start.clip_scaled_twice)

    # Untrained: for checks of everything around it.
    logger.warning("CLIP.WEIGHTS: an untrained CLIP shows that a training runs; what it draws means nothing")
    vocabulary = BytePairs.of_words(read_records(data, "train").vocabulary.words)
    patch_size = max(1, start.image_size // 7)
    clip = untrained_clip(
        7 * patch_size, patch_size, start.width, start.num_blocks, start.text_dim, len(vocabulary),
        scaled_twice=start.clip_scaled_twice,
    )  # fmt: skip
    return Encoders(clip.text_encoder, clip.visual, vocabulary, clip.text_encoder.max_words)


ENCODERS_OF: dict[str, Callable[[StartSettings, DataSettings], Encoders]] = {
    "damsm": damsm_encoders,
    "clip": clip_encoders,
}


def encoders_for(system: ChosenSystem, start: StartSettings, data: DataSettings) -> tuple[Encoders, Vocabulary]:
    """The encoders that the settings name, and their vocabulary. Raises UserError where they do not fit."""
    # A loss that looks at images needs the encoder of its own kind; others take any text encoder.
    objective = system.objective
    kind = objective.encoders_with_images
    if objective.needs_image_encoder and start.kind != kind:
        raise ConfigError(
            f"TEXT.ENCODER: is {start.kind}, but a loss of these settings looks at images with the encoder of {kind}; set it "
            f"to {kind}, or leave that loss out (TRAIN.DAMSM_WEIGHT 0)"
        )

    # The files.
    key = {"damsm": "TEXT.DAMSM_NAME", "clip": "CLIP.WEIGHTS"}[start.kind]
    encoders = ENCODERS_OF[start.kind](start, data)
    vocabulary = encoders.vocabulary or released_vocabulary(data.data_dir)
    if not objective.needs_image_encoder and start.kind != kind:
        encoders = encoders._replace(image_encoder=None)  # no loss uses it

    # They must know the vocabulary's words, and include an image encoder where a loss needs it.
    check_vocabulary(encoders.text_encoder, vocabulary, f"{key}: {start.encoders_path}", data.data_dir)
    if encoders.image_encoder is None and objective.needs_image_encoder:
        remedy = "put the released image_encoder*.pth there"
        if is_published(start.encoders_path):
            remedy = (
                "train one for its text encoder (pretrain_DAMSM.py --set TRAIN.NET_E … DAMSM.KEEP_IMAGE_ENCODER False)"
            )
        raise CheckpointError(
            f"{key}: there is no image encoder beside {start.encoders_path}; {remedy}, or train without the DAMSM loss: --set "
            f"TRAIN.DAMSM_WEIGHT 0, and TRAIN.FINETUNE_ENCODERS False where they learn on"
        )

    # What the system makes of the text encoder.
    if folder := system.text.transformer:
        mixed = mixed_text_encoder(encoders.text_encoder, vocabulary.words, folder)
        encoders = encoders._replace(text_encoder=mixed)
    text_dim = encoders.text_encoder.arguments["text_dim"]
    if text_dim != start.text_dim:
        raise ConfigError(
            f"TEXT.EMBEDDING_DIM: is {start.text_dim}, but the encoders give {text_dim}; set it to {text_dim}"
        )
    return encoders, vocabulary


# -- checks --------------------------------------------------------------------------------------------------------


def problems(system: ChosenSystem, start: StartSettings, data: DataSettings) -> list[str]:
    """What is not there yet for a training: one line each, from the errors that starting it would raise."""
    found, vocabulary = [], None

    # Encoders, then data, which are read with the encoders' words.
    try:
        _, vocabulary = encoders_for(system, start, data)
    except UserError as error:
        found.append(str(error))
    try:
        read_records(data, "train", vocabulary)
    except UserError as error:
        found.append(str(error))

    # Weight files; G's may be a published model's folder.
    generator, discriminator = start.generator_file, start.discriminator_file
    for key, named, file in (
        ("NET_G", generator, weight_file(generator)),
        ("NET_D", discriminator, Path(discriminator)),
    ):
        if named and not file.is_file():
            found.append(f"TRAIN.{key}: {named}: no such weight file")
    return found
