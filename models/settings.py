"""Settings that several networks or objectives share, each declared once. What one part alone has stands beside that part."""

from dataclasses import dataclass
from typing import Any, ClassVar

from miscc.errors import ConfigError
from miscc.settings import setting

# -- networks ------------------------------------------------------------------------------------------------------


def image_size_setting(default: int = 256) -> Any:
    """TREE.BASE_SIZE, which networks with stages call otherwise."""
    return setting(
        "TREE.BASE_SIZE", default, "image size in pixels (AttnGAN: of the first stage)", above=0, maximum=8192
    )


def sentence_dim_setting() -> Any:
    """TEXT.EMBEDDING_DIM, which the encoders call otherwise."""
    return setting("TEXT.EMBEDDING_DIM", 256, "length of word and sentence features", above=0, maximum=65536)


@dataclass(frozen=True)
class WidthSettings:
    """Number of channels."""

    nf: int = setting(
        "TRAIN.NF", 64, "base number of channels of G and D (SSA-GAN, DF-GAN, SEMA)", above=0, maximum=4096
    )


@dataclass(frozen=True)
class ImageSizeSettings:
    """Image size."""

    image_size: int = image_size_setting()


@dataclass(frozen=True)
class SizeSettings(ImageSizeSettings, WidthSettings):
    """Width and image size."""


@dataclass(frozen=True)
class SentenceSettings:
    """Length of the text features that a network reads."""

    sentence_dim: int = sentence_dim_setting()


@dataclass(frozen=True)
class NumStagesSettings:
    """Number of AttnGAN's stages."""

    num_stages: int = setting(
        "TREE.BRANCH_NUM", 3, "AttnGAN: number of stages; each doubles the image size", above=0, maximum=8
    )


@dataclass(frozen=True)
class StageSettings(SentenceSettings, NumStagesSettings):
    """Settings of AttnGAN's networks, which work on images of several sizes."""

    base_size: int = image_size_setting(64)


@dataclass(frozen=True)
class NoiseSettings:
    """Settings of a generator that draws from noise."""

    z_dim: int = setting("GAN.Z_DIM", 100, "number of values in the noise vector z", above=0, maximum=65536)


@dataclass(frozen=True)
class SpectralSettings:
    """Spectral normalisation."""

    spectral_normalisation: bool = setting(
        "USE_SN", False, "spectral normalisation of the discriminator's convolutions"
    )


@dataclass(frozen=True)
class GeneratorSettings(SentenceSettings, ImageSizeSettings, NoiseSettings, WidthSettings):
    """Settings of a generator that draws one image from noise and sentence."""


@dataclass(frozen=True)
class ClipWidthSettings:
    """Channels of CLIP's ViT."""

    width: int = setting("CLIP.WIDTH", 768, "GALIP: channels of CLIP's ViT; ViT-B/32 has 768", above=0, maximum=16384)


@dataclass(frozen=True)
class ClipSizeSettings(ClipWidthSettings):
    """Sizes of CLIP's ViT."""

    num_blocks: int = setting(
        "CLIP.BLOCKS", 12, "GALIP: Transformer blocks of CLIP's ViT; ViT-B/32 has 12", above=0, maximum=128
    )


# -- objectives ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BetasSettings:
    """Adam's betas."""

    betas: tuple[float, float] = setting("TRAIN.BETAS", (0.0, 0.9), "Adam's betas", below=1, length=2)


@dataclass(frozen=True)
class SmallDataSettings:
    """What helps where data is little."""

    diversity_weight: float = setting(
        "TRAIN.DIVERSITY",
        0.0,
        "weight of the mode-seeking loss, against one image for all noise of a caption; 0: without",
    )
    augment: str = setting(
        "TRAIN.AUGMENT",
        "",
        "random changes of what D sees (DiffAugment), the same for real and fake; colour would hide what captions name",
        ("", "translation", "cutout", "translation,cutout", "translation,cutout,colour"),
    )
    ada_target: float = setting(
        "TRAIN.ADA",
        0.0,
        "mean sign of D's logits of real pairs that ADA aims at, by the share of images that it augments (published: "
        "0.6); needs TRAIN.AUGMENT; 0: all are augmented",
        below=1,
    )
    ada_images: int = setting(
        "TRAIN.ADA_IMAGES", 500_000, "real images in which that share can go from 0 to 1", above=0
    )
    lecam_weight: float = setting(
        "TRAIN.LECAM", 0.0, "weight of the LeCam regularisation of each discriminator, for little data; 0: without"
    )
    lecam_warmup: int = setting(
        "TRAIN.LECAM_WARMUP", 1000, "steps whose logits it averages before it begins (published: 1000)"
    )

    def __post_init__(self) -> None:
        if self.ada_target and not self.augment:
            raise ConfigError(
                "TRAIN.ADA: has nothing to control without TRAIN.AUGMENT; set that, e.g. translation,cutout"
            )

    @property
    def augment_kinds(self) -> tuple[str, ...]:
        """The kinds of miscc.augment."""
        return tuple(self.augment.split(",")) if self.augment else ()


@dataclass(frozen=True)
class AdversarialSettings(SmallDataSettings, BetasSettings):
    """Settings of every system that trains G against D.

    discriminator, steps_alone, projected_joins: see DiscriminatorSettings; of systems without that choice.
    needs_image_encoder: whether a loss looks at images with an encoder.
    encoders_with_images: whose encoder that is, see TEXT.ENCODER.
    """

    discriminator: ClassVar[str] = "paper"
    steps_alone: ClassVar[int] = 0
    projected_joins: ClassVar[int] = 0
    encoders_with_images: ClassVar[str] = "damsm"

    generator_lr: float = setting("TRAIN.GENERATOR_LR", 1e-4, "Adam's learning rate of G", above=0)
    discriminator_lr: float = setting("TRAIN.DISCRIMINATOR_LR", 4e-4, "Adam's learning rate of D", above=0)

    @property
    def needs_image_encoder(self) -> bool:
        return False


@dataclass(frozen=True)
class PenaltySettings:
    """Settings of the matching-aware gradient penalty."""

    penalty_weight: float = setting("TRAIN.PENALTY_WEIGHT", 2.0, "weight of the gradient penalty (MA-GP)")
    penalty_power: float = setting("TRAIN.PENALTY_POWER", 6.0, "power of the gradient's norm in it")
    penalty_every: int = setting(
        "TRAIN.PENALTY_EVERY", 1, "steps between penalties, each times as much (lazy: Karras et al. 2020)", above=0
    )

    @property
    def penalty(self) -> dict[str, float]:
        """Arguments of `miscc.losses.matching_aware_gradient_penalty`."""
        return {"weight": self.penalty_weight * self.penalty_every, "power": self.penalty_power}

    def penalty_is_due(self, step: int) -> bool:
        """Whether the training step after `step` others has a penalty."""
        return step % self.penalty_every == 0


@dataclass(frozen=True)
class DiscriminatorSettings:
    """Which discriminators train G."""

    discriminator: str = setting(
        "GAN.DISCRIMINATOR",
        "paper",
        "the paper's; projected: on features of a frozen network (models/projected.py); both: side by side",
        ("paper", "projected", "both"),
    )
    projected_weight: float = setting(
        "GAN.PROJECTED.LOSS_WEIGHT", 1.0, "weight of the projected discriminator in G's loss"
    )
    steps_alone: int = setting(
        "GAN.PROJECTED.STEPS_ALONE", 0, "of both discriminators, the paper's joins after so many steps"
    )
    projected_joins: int = setting(
        "GAN.PROJECTED.JOINS", 0, "of both discriminators, the projected one joins after so many steps"
    )


@dataclass(frozen=True)
class MatchingSettings:
    """DAMSM's γ1, γ2, γ3, and which captions of a batch are mismatches of an image."""

    gamma1: float = setting("TRAIN.SMOOTH.GAMMA1", 5.0, "DAMSM: sharpness of attention over regions")
    gamma2: float = setting("TRAIN.SMOOTH.GAMMA2", 5.0, "DAMSM: sharpness in joining the words")
    gamma3: float = setting("TRAIN.SMOOTH.GAMMA3", 10.0, "DAMSM: sharpness of the match over the batch")
    mask_classes: bool = setting(
        "DAMSM.MASK_CLASSES",
        True,
        "True, as published: captions of other images of the same class do not count as mismatches; False: they do",
    )

    @property
    def matching(self) -> dict[str, Any]:
        """Arguments of `models.damsm.matching_losses`."""
        return {"mask_classes": self.mask_classes} | self.gammas

    @property
    def gammas(self) -> dict[str, float]:
        """γ1, γ2, γ3 by the names of the losses' arguments."""
        return {"gamma1": self.gamma1, "gamma2": self.gamma2, "gamma3": self.gamma3}


@dataclass(frozen=True)
class DamsmSettings(MatchingSettings):
    """Settings of a DAMSM loss in G's objective."""

    damsm_weight: float | None = setting(
        "TRAIN.DAMSM_WEIGHT", None, "weight of the DAMSM loss in G's; empty: 0.05, or 0.1 with FINETUNE_ENCODERS"
    )
    damsm_factor: float = setting("TRAIN.SMOOTH.LAMBDA", 1.0, "factor on the DAMSM loss (AttnGAN: its weight)")

    def __post_init__(self) -> None:
        if self.damsm_weight is None:
            object.__setattr__(self, "damsm_weight", self.usual_damsm_weight)

        # Parts that stand behind this one in a system's settings have checks of their own.
        following = getattr(super(), "__post_init__", None)
        if following is not None:
            following()

    @property
    def usual_damsm_weight(self) -> float:
        """What an empty TRAIN.DAMSM_WEIGHT means."""
        return 0.05

    @property
    def whole_damsm_weight(self) -> float:
        """Weight and factor together."""
        return (self.damsm_weight or 0.0) * self.damsm_factor

    @property
    def needs_image_encoder(self) -> bool:
        return self.whole_damsm_weight > 0
