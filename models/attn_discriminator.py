"""AttnGAN's discriminators (Xu et al., CVPR 2018): one for the images of a stage, and all of a training as one network."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from miscc.settings import setting
from models.layers import num_upsamples
from models.settings import SpectralSettings, StageSettings
from models.types import Discriminator

ENCODER_STEPS = 4  # stride-2 convolutions of the encoder, in which the channels grow to 8·df_dim


class StageDiscriminator(Discriminator):
    """Discriminator for images of one size, with a sentence (`logits`) and without (`unconditional`).

    It returns logits, not probabilities.

    df_dim: base number of channels.
    image_size: pixels; a power of two from 8 on. ValueError otherwise.
    sentence_dim: length of the sentence features.
    has_unconditional_head: whether there is an unconditional head (AttnDCGAN's has none).
    spectral_normalisation: of all convolutions, in addition to batch norm (not in the paper).
    """

    slow_start = True  # orthogonal initialisation takes seconds
    compiled_methods = ("features", "logits", "unconditional")

    @dataclass(frozen=True)
    class Settings:
        df_dim: int = 64
        image_size: int = 64
        sentence_dim: int = 256
        has_unconditional_head: bool = True
        spectral_normalisation: bool = False

    def __init__(self, *arguments: Any, **named: Any):
        super().__init__(*arguments, **named)
        df_dim, sentence_dim = self.settings.df_dim, self.settings.sentence_dim
        self.image_size, self.has_unconditional_head = self.settings.image_size, self.settings.has_unconditional_head
        num_downsamples = num_upsamples(self.image_size)
        width = 8 * df_dim

        # Up to four downsamplings. Images below 64 px take the last of them, so that all end in 8·df_dim channels.
        channels = [df_dim * 2**step for step in range(ENCODER_STEPS)][-min(num_downsamples, ENCODER_STEPS) :]
        self.encoder = nn.Sequential(_conv_down(3, channels[0]), nn.LeakyReLU(0.2, inplace=True))
        for channels_in, channels_out in zip(channels, channels[1:], strict=False):
            self.encoder.extend(_with_norm(_conv_down(channels_in, channels_out)))

        # Images above 64 px: more downsamplings with growing channels, then back to 8·df_dim channels at 4×4.
        further = [width * 2**step for step in range(max(0, num_downsamples - ENCODER_STEPS) + 1)]
        pairs = list(zip(further, further[1:], strict=False))
        self.down = nn.Sequential(*(_with_norm(_conv_down(narrow, wide)) for narrow, wide in pairs))
        self.back = nn.Sequential(*(_with_norm(conv3x3(wide, narrow)) for narrow, wide in reversed(pairs)))

        # The heads: with the sentence, and without.
        self.joint = _with_norm(conv3x3(width + sentence_dim, width))
        self.conditional_head = nn.Conv2d(width, 1, 4)
        self.unconditional_head = nn.Conv2d(width, 1, 4) if self.has_unconditional_head else None

        # Spectral normalisation comes last: it starts from the initial weights.
        initialise(self)
        if self.settings.spectral_normalisation:
            for module in list(self.modules()):
                if isinstance(module, nn.Conv2d):
                    spectral_norm(module)

    def features(self, images: Tensor) -> Tensor:  # (N, 3, H, W) in [-1, 1] -> (N, 8·df_dim, 4, 4)
        return self.back(self.down(self.encoder(images)))

    def logits(self, features: Tensor, sentence: Tensor) -> Tensor:  # (N, C, 4, 4), (N, D) -> (N,)
        replicated = sentence[:, :, None, None].expand(-1, -1, 4, 4)
        return self.conditional_head(self.joint(torch.cat([features, replicated], dim=1))).flatten()

    def unconditional(self, features: Tensor) -> Tensor:  # (N, C, 4, 4) -> (N,)
        assert self.unconditional_head is not None  # callers check has_unconditional_head first
        return self.unconditional_head(features).flatten()

    def forward(self, images: Tensor, sentence: Tensor) -> Tensor:  # (N, 3, H, W), (N, D) -> (N,)
        return self.logits(self.features(images), sentence)


class AttnDiscriminator(Discriminator):
    """The discriminators of all stages as one network: one optimizer, one entry of the checkpoint.

    base_size: pixels of the first stage.
    num_stages: each at twice the image size of the one before.
    df_dim, sentence_dim, spectral_normalisation: as for StageDiscriminator.
    """

    slow_start = True
    compiled_methods = ()  # each stage compiles its own
    has_stages = True
    has_unconditional_head: ClassVar[bool] = True
    every_stage: ClassVar[bool] = True

    @dataclass(frozen=True)
    class Settings(SpectralSettings, StageSettings):
        df_dim: int = setting("GAN.DF_DIM", 64, "AttnGAN: base number of channels of D", above=0, maximum=4096)

    def __init__(self, *arguments: Any, **named: Any):
        super().__init__(*arguments, **named)
        shared = {name: getattr(self.settings, name) for name in ("df_dim", "sentence_dim", "spectral_normalisation")}
        sizes = [self.settings.base_size * 2**index for index in range(self.settings.num_stages)]
        self.stages = nn.ModuleList(
            StageDiscriminator(image_size=size, has_unconditional_head=self.has_unconditional_head, **shared)
            for size in (sizes if self.every_stage else sizes[-1:])
        )

    def stage_list(self) -> list[StageDiscriminator]:
        """Its discriminators, coarse to fine."""
        return cast(list[StageDiscriminator], list(self.stages))

    def forward(self, images: list[Tensor], sentence: Tensor) -> list[Tensor]:
        """images (N, 3, H, W) of each stage, coarse to fine, and sentence (N, D) -> logits (N,) of each stage."""
        return [stage(scale, sentence) for stage, scale in zip(self.stages, images, strict=True)]

    def with_stages(self, stages: Sequence[Discriminator]) -> "AttnDiscriminator":
        """A network like this one made of existing stages; stages of other image sizes are left out.

        Raises ValueError where a size is missing, or where the stages' arguments differ.
        """
        # One stage for each of our sizes.
        by_size = {stage.image_size: stage for stage in stages if isinstance(stage, StageDiscriminator)}
        missing = [stage.image_size for stage in self.stage_list() if stage.image_size not in by_size]
        if missing:
            sizes = ", ".join(map(str, missing))
            raise ValueError(f"the discriminator for images of {sizes} px is missing (found: {sorted(by_size)})")
        chosen = [by_size[stage.image_size] for stage in self.stages]

        # All alike, but for their size.
        shared = [{**stage.arguments, "image_size": None} for stage in chosen]
        if (
            any(arguments != shared[0] for arguments in shared)
            or chosen[0].has_unconditional_head != self.has_unconditional_head
        ):
            raise ValueError("the discriminators are not of one training of this system")

        # With their arguments, not ours, so that a checkpoint rebuilds the network as it is.
        theirs = {name: shared[0][name] for name in ("df_dim", "sentence_dim", "spectral_normalisation")}
        with torch.device("meta"):  # allocates nothing: these stages are replaced
            network = type(self)(**(self.arguments | theirs))
        network.stages = nn.ModuleList(chosen)
        return network


class AttnDCDiscriminator(AttnDiscriminator):
    """AttnDCGAN's discriminator: that of the last stage, conditional on the caption only."""

    has_unconditional_head = False
    every_stage = False


def initialise(module: nn.Module) -> None:
    """The authors' initial weights: orthogonal, zero biases, N(1, 0.02) for the scales of batch norm."""
    for layer in module.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            nn.init.orthogonal_(layer.weight)
        elif isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.normal_(layer.weight, 1.0, 0.02)
        else:
            continue
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def _conv_down(channels_in: int, channels_out: int) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, 4, stride=2, padding=1, bias=False)


def conv3x3(channels_in: int, channels_out: int) -> nn.Conv2d:
    """The 3×3 convolution of AttnGAN's networks: (N, C, H, W) -> (N, C', H, W), without bias."""
    return nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)


def _with_norm(convolution: nn.Conv2d) -> nn.Sequential:
    return nn.Sequential(convolution, nn.BatchNorm2d(convolution.out_channels), nn.LeakyReLU(0.2, inplace=True))
