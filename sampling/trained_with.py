"""Which networks took part in a generator's training. A score by one of them flatters it (Kynkäänniemi et al. 2023,
arXiv 2203.06026); eval/ marks such scores."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from miscc.checkpoint import hash_tensors
from models.clip_features import ClipTextEncoder
from models.mixed_text import MixedTextEncoder


def networks_in_training(checkpoint: Mapping[str, Any]) -> list[dict[str, str]]:
    """The networks that a checkpoint's generator was trained with, each as plain text for JSON.

    network: by the name that scores have, such as "efficientnet-lite0"; all of CLIP's are "clip", DAMSM's encoders "damsm".
    role: what it did there.
    weights_hash, file: "" where they are not known; without a hash any weights of that name count as the same.
    starting_hash: of DAMSM's encoders as the training began, which may have learnt on since; absent where it is not known.
    """
    # One that holds no discriminator and no image encoder, of a training or published, says it itself.
    if "trained_with" in checkpoint:
        return entries_of(checkpoint["trained_with"])
    networks, config = checkpoint["networks"], checkpoint.get("config") or {}
    found: list[dict[str, str]] = []

    def add(network: str, role: str, weights_hash: str = "", file: str = "") -> None:
        found.append({"network": network, "role": role, "weights_hash": weights_hash, "file": file})

    # The projected discriminator's backbone; a checkpoint for drawing holds only the settings.
    gan, text = (group if isinstance(group, Mapping) else {} for group in (config.get("GAN"), config.get("TEXT")))
    if "projected" in networks or gan.get("DISCRIMINATOR") in ("projected", "both"):
        projected = (networks.get("projected") or {}).get("arguments") or {}
        backbone = projected.get("backbone") or _backbone_in(gan) or "efficientnet-lite0"
        is_clip = backbone.startswith("clip")
        add("clip" if is_clip else backbone, "discriminator", "" if is_clip else projected.get("weights_hash", ""))

    # Encoders; the trunk of DAMSM's Inception is torchvision's and stays as it is.
    kinds = {part: (networks.get(part) or {}).get("name") for part in ("generator_ema", "generator", "text_encoder")}
    if "galip" in kinds.values():
        add("clip", "generator and discriminator")
    elif kinds["text_encoder"] == "clip":
        add("clip", "encoders")
    elif kinds["text_encoder"]:
        encoder_hash = hash_tensors(networks["text_encoder"]["state"])
        add("damsm", "encoders", encoder_hash, text.get("DAMSM_NAME") or "")
        if checkpoint.get("encoders_hash"):
            found[-1]["starting_hash"] = checkpoint["encoders_hash"]
    image_encoder = networks.get("image_encoder") or {}
    if image_encoder.get("name") == "inception":
        add("inception-torchvision", "trunk of the image encoder")
    elif image_encoder.get("name") == "pretrained":
        arguments = image_encoder.get("arguments") or {}
        backbone, weights_hash = arguments.get("backbone") or "", arguments.get("weights_hash") or ""
        add("clip" if backbone == "clip" else backbone, "image encoder", "" if backbone == "clip" else weights_hash)
    return found


def _backbone_in(gan: Mapping[str, Any]) -> str:
    """GAN.PROJECTED.BACKBONE of stored settings; "" where they lack it."""
    projected = gan.get("PROJECTED")
    backbone = projected.get("BACKBONE") if isinstance(projected, Mapping) else None
    return backbone if isinstance(backbone, str) else ""


def entries_of(value: Any) -> list[dict[str, str]]:
    """What is an entry of `networks_in_training` in a list from a file; [] for anything else."""
    entries = value if isinstance(value, list) else []
    return [entry for entry in entries if _is_entry(entry)]


def _is_entry(value: Any) -> bool:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        return False
    return {"network", "role", "weights_hash", "file"} <= value.keys()


def starting_hash(text_encoder: nn.Module) -> str:
    """The hash of DAMSM's text encoder with which a training begins, as scores by it have it; "" of CLIP's."""
    if isinstance(text_encoder, ClipTextEncoder):
        return ""
    return hash_tensors(
        (text_encoder.recurrent if isinstance(text_encoder, MixedTextEncoder) else text_encoder).state_dict()
    )
