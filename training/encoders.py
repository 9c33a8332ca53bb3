"""The encoders that a pretraining starts from: those of its checkpoint, of TRAIN.NET_E, or fresh ones."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torchvision.models import Inception_V3_Weights

from datasets.settings import DataSettings
from miscc.checkpoint import load_file
from miscc.config import Config
from miscc.errors import CheckpointError, ConfigError
from miscc.settings import arguments_from, settings_of
from miscc.vocabulary import Vocabulary
from models import IMAGE_ENCODERS, TEXT_ENCODERS, networks_of
from models.damsm import SmallImageEncoder, TextEncoder
from models.pretrained_encoder import PretrainedImageEncoder
from models.registry import from_state, network_name, with_weight_file
from models.types import Network
from sampling.encoders import Encoders, check_vocabulary, load_encoders, released_vocabulary
from sampling.published import weight_file
from training.settings import PretrainingSettings


def backbone_arguments(cfg: Config) -> dict[str, str]:
    """Which frozen network a `pretrained` image encoder has, and its weight file: {"backbone", "weights"}."""
    chosen = arguments_from(PretrainedImageEncoder.Settings, cfg)
    return {name: chosen[name] for name in ("backbone", "weights")}


def stored_encoders(
    settings: PretrainingSettings,
    data: DataSettings,
    text: Mapping[str, Any],
    backbone: Mapping[str, str],
    checkpoint: Mapping | None,
) -> tuple[dict[str, Network] | None, Vocabulary | None]:
    """The encoders of the checkpoint, or of NET_E, with their vocabulary; None, None: they start anew.

    settings: name the file in NET_E, and what its encoders must be.
    data: its folder holds the vocabulary of the authors' encoders; it says how many words of a caption are read.
    text: arguments of the text encoder that the settings give.
    backbone: see `backbone_arguments`; a checkpoint's own frozen network may lie in another file.
    checkpoint: of the run that is resumed.

    Raises CheckpointError for files that hold no encoders or do not fit their vocabulary, DataError where there is no
    vocabulary, ConfigError for encoders of another kind than the settings'.
    """
    # Of the run that is resumed.
    if checkpoint is not None:
        stored = {part: with_weight_file(entry, backbone["weights"]) for part, entry in checkpoint["networks"].items()}
        networks = {part: from_state(entry, networks_of(part)) for part, entry in stored.items()}
        return networks, Vocabulary(checkpoint["vocabulary"])

    # Of a file.
    file = settings.former_encoders
    if not file:
        return None, None
    if not weight_file(file).is_file():
        raise CheckpointError(
            f"TRAIN.NET_E: {file}: no such encoders; give the best.pth of a pretraining, a published model or a "
            f"text_encoder*.pth, or leave it empty to start anew"
        )
    encoders = load_encoders(
        file,
        max_words=data.max_words,
        backbone_weights=backbone["weights"],
        backbone=backbone["backbone"],
        with_image_encoder=settings.keep_image_encoder,
    )

    # Its words; captions are read as long as these settings say.
    vocabulary = encoders.vocabulary or released_vocabulary(data.data_dir)
    check_vocabulary(encoders.text_encoder, vocabulary, f"TRAIN.NET_E: {file}", data.data_dir)
    encoders.text_encoder.change_settings(max_words=data.max_words)
    _check_text_encoder(encoders, text)

    # Its image encoder, or a fresh one beside the text encoder.
    if settings.keep_image_encoder:
        image_encoder = _image_encoder(encoders, settings, backbone)
    else:
        image_encoder = fresh_image_encoder(settings, text["text_dim"], backbone)
    return {"text_encoder": encoders.text_encoder, "image_encoder": image_encoder}, vocabulary


def _check_text_encoder(encoders: Encoders, text: Mapping[str, Any]) -> None:
    """Raises CheckpointError where NET_E's text encoder is of a kind that is not trained here, ConfigError where it is not
    what the settings would build."""
    kind = network_name(encoders.text_encoder)
    if TEXT_ENCODERS[kind] is not TextEncoder:
        raise CheckpointError(
            f"TRAIN.NET_E: the text encoder of {encoders.file} is {kind}, which is not trained here; give encoders of "
            f"pretrain_DAMSM.py"
        )
    for argument, one in settings_of(TextEncoder.Settings).items():
        stored, configured = encoders.text_encoder.arguments.get(argument), text[argument]
        if stored != configured:
            raise ConfigError(
                f"TRAIN.NET_E: the {argument} of {encoders.file} is {stored}, {one.key} says {configured}; set it to {stored}"
            )


def _image_encoder(encoders: Encoders, settings: PretrainingSettings, backbone: Mapping[str, str]) -> Network:
    """NET_E's image encoder; a small one goes on as a pretrained one where the settings say so.

    Raises CheckpointError where there is none that can be trained, ConfigError where it is not what the settings say.
    """
    # One that is trained here.
    file, encoder = encoders.file, encoders.image_encoder
    if encoder is None:
        raise CheckpointError(
            f"TRAIN.NET_E: {file} comes without an image encoder; give encoders of pretrain_DAMSM.py, put the authors' "
            f"image_encoder*.pth beside their text_encoder*.pth, or set DAMSM.KEEP_IMAGE_ENCODER False for a fresh one"
        )
    actual, expected = network_name(encoder), settings.image_encoder
    becomes_pretrained = (actual, expected) == ("small", "pretrained")
    if actual not in settings_of(PretrainingSettings)["image_encoder"].choices:
        raise CheckpointError(
            f"TRAIN.NET_E: the image encoder of {file} is {actual}, which is not trained here; give encoders of pretrain_DAMSM.py"
        )

    # The kind that the settings say. A small one may become a pretrained one; nothing else changes its kind.
    if actual != expected and not becomes_pretrained:
        raise ConfigError(
            f"TRAIN.NET_E: the image encoder of {file} is {actual}, the settings say {expected}; --set DAMSM.IMAGE_ENCODER "
            f"{actual}, or DAMSM.KEEP_IMAGE_ENCODER False for a fresh one"
        )
    if isinstance(encoder, SmallImageEncoder) and encoder.image_size != settings.image_size:
        raise ConfigError(
            f"TRAIN.NET_E: the image encoder of {file} is for {encoder.image_size} px, TREE.BASE_SIZE says "
            f"{settings.image_size}; --set TREE.BASE_SIZE {encoder.image_size}"
        )
    if becomes_pretrained:
        return PretrainedImageEncoder.from_small(cast(SmallImageEncoder, encoder), **backbone)

    # On the frozen network that the settings name, if they name one.
    if isinstance(encoder, PretrainedImageEncoder):
        if encoder.backbone.name != backbone["backbone"]:
            raise ConfigError(
                f"TRAIN.NET_E: the image encoder of {file} stands on {encoder.backbone.name}, the settings say "
                f"{backbone['backbone']}; --set DAMSM.BACKBONE {encoder.backbone.name}"
            )
    else:
        _check_no_backbone(actual, backbone)
    return encoder


def _check_no_backbone(kind: str, backbone: Mapping[str, str]) -> None:
    """Raises ConfigError where the settings name a frozen network for an image encoder without one."""
    for argument, key in (("backbone", "DAMSM.BACKBONE"), ("weights", "DAMSM.BACKBONE_WEIGHTS")):
        if backbone[argument] != getattr(PretrainedImageEncoder.Settings(), argument):
            raise ConfigError(f"{key}: has no meaning for the image encoder {kind}; set DAMSM.IMAGE_ENCODER pretrained")


def fresh_encoders(
    settings: PretrainingSettings, text: Mapping[str, Any], backbone: Mapping[str, str]
) -> dict[str, Network]:
    """Encoders with random weights; see `fresh_image_encoder`.

    text: arguments of the text encoder.

    Raises as `fresh_image_encoder`, and ConfigError where DAMSM.KEEP_IMAGE_ENCODER has no file.
    """
    if not settings.keep_image_encoder:
        raise ConfigError("DAMSM.KEEP_IMAGE_ENCODER: False is for encoders that go on; name them in TRAIN.NET_E")

    # The image encoder comes first: the order decides which random numbers become whose initial weights.
    image_encoder = fresh_image_encoder(settings, text["text_dim"], backbone)
    return {"text_encoder": TEXT_ENCODERS["rnn"](**text), "image_encoder": image_encoder}


def fresh_image_encoder(settings: PretrainingSettings, text_dim: int, backbone: Mapping[str, str]) -> Network:
    """An image encoder with random weights, Inception's trunk with ImageNet's.

    settings: its kind and image size.
    text_dim: length of a word feature of the text encoder beside it.
    backbone: see `backbone_arguments`.

    Raises ConfigError for a size that the encoder does not take, CheckpointError where there are no ImageNet weights.
    """
    # Its arguments.
    kind = settings.image_encoder
    arguments: dict[str, Any] = {"text_dim": text_dim}
    if issubclass(IMAGE_ENCODERS[kind], SmallImageEncoder):
        size = settings.image_size
        if size < 16 or size & (size - 1):
            raise ConfigError(f"TREE.BASE_SIZE: the {kind} encoder takes powers of two from 16 on, not {size}")
        arguments["image_size"] = size
    if IMAGE_ENCODERS[kind] is PretrainedImageEncoder:
        arguments |= backbone
    else:
        _check_no_backbone(kind, backbone)

    # The network.
    image_encoder = IMAGE_ENCODERS[kind](**arguments)
    if kind == "inception":
        load_imagenet_weights(image_encoder.get_submodule("trunk"), settings.inception_weights)
    return image_encoder


def load_imagenet_weights(trunk: nn.Module, path: str) -> None:
    """Put torchvision's ImageNet weights into Inception-v3. Raises CheckpointError, saying where to get them."""
    # The file: the user's, or torchvision's.
    url = Inception_V3_Weights.IMAGENET1K_V1.url
    cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
    file = Path(path) if path else cached
    if not file.is_file():
        raise CheckpointError(
            f"{file}: no ImageNet weights of Inception-v3 there; download {url} to {cached} or set "
            f"DAMSM.INCEPTION_WEIGHTS to the file (or train a light encoder: --set DAMSM.IMAGE_ENCODER pretrained or small)"
        )

    # Its tensors; those of the classifier, which the trunk lacks, are left out.
    state = load_file(file)
    expected = trunk.state_dict()
    missing = [name for name in expected if name not in state or state[name].shape != expected[name].shape]
    if missing:
        raise CheckpointError(
            f"{file}: is not torchvision's inception_v3, {len(missing)} tensors missing ({missing[0]}); download {url} again"
        )
    trunk.load_state_dict({name: state[name] for name in expected})
