"""The systems by their names in GAN.NAME, and every network that a checkpoint can hold, by its name there.

A new system is its file here and one line in SYSTEMS.
"""

from models.attn_discriminator import StageDiscriminator
from models.attn_gan import AttnDCGAN, AttnGAN
from models.clip_features import ClipImageEncoder, ClipTextEncoder
from models.damsm import InceptionEncoder, SmallImageEncoder, TextEncoder
from models.df_gan import DFGAN
from models.galip import GALIP
from models.mixed_text import MixedTextEncoder
from models.pretrained_encoder import PretrainedImageEncoder
from models.sema import SEMA
from models.ssa_gan import SSAGAN
from models.types import Network, System

SYSTEMS: dict[str, type[System]] = {
    "ssa_gan": SSAGAN,
    "df_gan": DFGAN,
    "sema": SEMA,
    "galip": GALIP,
    "attn_gan": AttnGAN,
    "attn_dcgan": AttnDCGAN,
}
TEXT_ENCODERS: dict[str, type[Network]] = {"rnn": TextEncoder, "mixed": MixedTextEncoder, "clip": ClipTextEncoder}
IMAGE_ENCODERS: dict[str, type[Network]] = {
    "inception": InceptionEncoder,
    "small": SmallImageEncoder,
    "pretrained": PretrainedImageEncoder,
    "clip": ClipImageEncoder,
}

# Networks that checkpoints and released files hold, and that no system above trains under this name.
OTHER_NETWORKS: dict[str, dict[str, type[Network]]] = {
    "discriminator": {"attn_stage": StageDiscriminator},  # one of AttnGAN's, as its authors' files have it
    "text_encoder": dict(TEXT_ENCODERS),
    "image_encoder": dict(IMAGE_ENCODERS),
}


def networks_of(part: str) -> dict[str, type[Network]]:
    """{name: class} of what a part of a checkpoint may be, e.g. "generator": every system's, by the system's name."""
    part = "generator" if part == "generator_ema" else part
    trained = {name: system.NETWORKS[part] for name, system in SYSTEMS.items() if part in system.NETWORKS}
    return trained | OTHER_NETWORKS.get(part, {})


def parts() -> list[str]:
    """The names of all parts that some system has."""
    trained = [part for system in SYSTEMS.values() for part in system.NETWORKS]
    return list(dict.fromkeys([*trained, *OTHER_NETWORKS]))
