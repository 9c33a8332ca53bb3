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
from miscc.settings import arguments_from
from miscc.vocabulary import Vocabulary
from models import IMAGE_ENCODERS, TEXT_ENCODERS, networks_of
from models.damsm import SmallImageEncoder
from models.pretrained_encoder import PretrainedImageEncoder
from models.registry import from_state, network_name, with_weight_file
from models.types import Network
from sampling.encoders import load_encoders, released_vocabulary
from training.settings import PretrainingSettings


def backbone_arguments(cfg: Config) -> dict[str, str]:
    """Which frozen network a `pretrained` image encoder has, and its weight file: {"backbone", "weights"}."""
    chosen = arguments_from(PretrainedImageEncoder.Settings, cfg)
    return {name: chosen[name] for name in ("backbone", "weights")}


def stored_encoders(
    settings: PretrainingSettings, data: DataSettings, backbone: Mapping[str, str], checkpoint: Mapping | None
) -> tuple[dict[str, Network] | None, Vocabulary | None]:
    """The encoders of the checkpoint, or of NET_E, with their vocabulary; None, None: they start anew.

    backbone: see `backbone_arguments`; a checkpoint's own frozen network may lie in another file.

    Raises CheckpointError for files that hold no encoders, ConfigError for encoders of another kind than the settings'.
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
    if not Path(file).is_file():
        raise CheckpointError(
            f"TRAIN.NET_E: {file}: no such encoders; give the best.pth of a pretraining or a text_encoder*.pth, or leave it "
            f"empty to start anew"
        )
    encoders = load_encoders(file, max_words=data.max_words, backbone_weights=backbone["weights"])
    if encoders.image_encoder is None:
        raise CheckpointError(f"TRAIN.NET_E: there is no image encoder beside {file}; put its image_encoder*.pth there")
    vocabulary = encoders.vocabulary or released_vocabulary(data.data_dir)

    # A small image encoder goes on as a pretrained one where the settings say so; nothing else changes its kind.
    image_encoder, kind = encoders.image_encoder, network_name(encoders.image_encoder)
    if settings.image_encoder == "pretrained" and kind == "small":
        image_encoder = PretrainedImageEncoder.from_small(cast(SmallImageEncoder, image_encoder), **backbone)
    elif kind != settings.image_encoder:
        raise ConfigError(
            f"TRAIN.NET_E: the image encoder of {file} is {kind}, the settings say {settings.image_encoder}; "
            f"--set DAMSM.IMAGE_ENCODER {kind}"
        )
    elif isinstance(image_encoder, PretrainedImageEncoder) and image_encoder.backbone.name != backbone["backbone"]:
        raise ConfigError(
            f"TRAIN.NET_E: the image encoder of {file} stands on {image_encoder.backbone.name}, the settings say "
            f"{backbone['backbone']}; --set DAMSM.BACKBONE {image_encoder.backbone.name}"
        )
    return {"text_encoder": encoders.text_encoder, "image_encoder": image_encoder}, vocabulary


def fresh_encoders(
    settings: PretrainingSettings, text: Mapping[str, Any], backbone: Mapping[str, str]
) -> dict[str, Network]:
    """Encoders with random weights, Inception's trunk with ImageNet's. Raises ConfigError, CheckpointError.

    text: arguments of the text encoder.
    backbone: see `backbone_arguments`.
    """
    # The image encoder comes first: the order decides which random numbers become whose initial weights.
    kind, unset = settings.image_encoder, PretrainedImageEncoder.Settings()
    arguments: dict[str, Any] = {"text_dim": text["text_dim"]}
    if issubclass(IMAGE_ENCODERS[kind], SmallImageEncoder):
        size = settings.image_size
        if size < 16 or size & (size - 1):
            raise ConfigError(f"TREE.BASE_SIZE: the {kind} encoder takes powers of two from 16 on, not {size}")
        arguments["image_size"] = size
    if IMAGE_ENCODERS[kind] is PretrainedImageEncoder:
        arguments |= backbone
    elif backbone != {"backbone": unset.backbone, "weights": unset.weights}:
        raise ConfigError(
            f"DAMSM.BACKBONE: has no meaning for the image encoder {kind}; set DAMSM.IMAGE_ENCODER pretrained"
        )
    image_encoder = IMAGE_ENCODERS[kind](**arguments)
    if kind == "inception":
        load_imagenet_weights(image_encoder.get_submodule("trunk"), settings.inception_weights)

    return {"text_encoder": TEXT_ENCODERS["rnn"](**text), "image_encoder": image_encoder}


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
