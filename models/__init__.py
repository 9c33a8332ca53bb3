"""The registries: plain dicts from name to class. A new system is one file here and one line in each dict it serves."""

from collections.abc import Mapping

from models.attn_discriminator import AttnDCDiscriminator, AttnDiscriminator, StageDiscriminator
from models.attn_gan import AttnDCGAN, AttnDCGenerator, AttnGAN, AttnGenerator
from models.clip_features import ClipImageEncoder, ClipTextEncoder
from models.damsm import InceptionEncoder, SmallImageEncoder, TextEncoder
from models.df_gan import DFGAN, DFDiscriminator, DFGenerator
from models.galip import GALIPDiscriminator, GALIPGenerator
from models.layers import OneWayDiscriminator
from models.mixed_text import MixedTextEncoder
from models.sema import SEMA, SEMAGenerator
from models.sema_modules import FeatureExtractor, Redescriber
from models.ssa_gan import SSAGAN, SSAGenerator
from models.types import Discriminator, Generator, Network, System

SYSTEMS: dict[str, type[System]] = {
    "ssa_gan": SSAGAN,
    "df_gan": DFGAN,
    "sema": SEMA,
    "attn_gan": AttnGAN,
    "attn_dcgan": AttnDCGAN,
}
GENERATORS: dict[str, type[Generator]] = {
    "ssa_gan": SSAGenerator,
    "df_gan": DFGenerator,
    "sema": SEMAGenerator,
    "galip": GALIPGenerator,
    "attn_gan": AttnGenerator,
    "attn_dcgan": AttnDCGenerator,
}
DISCRIMINATORS: dict[str, type[Discriminator]] = {
    "ssa_gan": OneWayDiscriminator,
    "df_gan": DFDiscriminator,
    "sema": OneWayDiscriminator,
    "galip": GALIPDiscriminator,
    "attn_gan": AttnDiscriminator,
    "attn_dcgan": AttnDCDiscriminator,
    "attn_stage": StageDiscriminator,  # one of AttnGAN's, as its authors' files have it
}
TEXT_ENCODERS: dict[str, type[Network]] = {"rnn": TextEncoder, "mixed": MixedTextEncoder, "clip": ClipTextEncoder}
IMAGE_ENCODERS: dict[str, type[Network]] = {
    "inception": InceptionEncoder,
    "small": SmallImageEncoder,
    "clip": ClipImageEncoder,
}

# The registry that a network's place in a checkpoint is looked up in.
NETWORKS: dict[str, Mapping[str, type[Network]]] = {
    "generator": GENERATORS,
    "generator_ema": GENERATORS,
    "discriminator": DISCRIMINATORS,
    "text_encoder": TEXT_ENCODERS,
    "image_encoder": IMAGE_ENCODERS,
    "redescriber": {"sema": Redescriber},
    "feature_extractor": {"sema": FeatureExtractor},
}
