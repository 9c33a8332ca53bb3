"""AttnGAN's discriminators (Xu et al., CVPR 2018): one for the images of a stage, and all of a training as one network."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from miscc.settings import setting
from models.layers import num_upsamples
from models.settings import SpectralSettings, StageSettings
from models.types import Discriminator

ENCODER_STEPS = 4  # halvings in which the channels grow to 8·df_dim; larger images take further ones


class StageDiscriminator(Discriminator):
    """Judges images of one size: alone (`unconditional`) and with a sentence (`logits`). Logits, not probabilities.

    df_dim: base number of channels; image_size: a power of two from 8 on; sentence_dim: length of sentence features;
    judges_alone: whether there is an unconditional head (AttnDCGAN's has none); spectral_normalisation: of all
    convolutions, beside the batch norm (not of the paper).
    """

    slow_start = True  # orthogonal weights
    compiled_methods = ("features", "logits", "unconditional")

    @dataclass(frozen=True)
    class Settings:
        df_dim: int = 64
        image_size: int = 64
        sentence_dim: int = 256
        judges_alone: bool = True
        spectral_normalisation: bool = False

    def __init__(self, *arguments: Any, **named: Any):
        super().__init__(*arguments, **named)
        df_dim, sentence_dim = self.settings.df_dim, self.settings.sentence_dim
        self.image_size, self.judges_alone = self.settings.image_size, self.settings.judges_alone
        steps = num_upsamples(self.image_size)
        width = 8 * df_dim
        # Images below 64 px take the last of the four convolutions: what arrives at 4×4 is always 8·df_dim wide.
        channels = [df_dim * 2**number for number in range(ENCODER_STEPS)][-min(steps, ENCODER_STEPS) :]
        self.encoder = nn.Sequential(_halving(3, channels[0]), nn.LeakyReLU(0.2, inplace=True))
        for channels_in, channels_out in zip(channels, channels[1:], strict=False):
            self.encoder.extend(_normalised(_halving(channels_in, channels_out)))
        further = [width * 2**number for number in range(max(0, steps - ENCODER_STEPS) + 1)]
        pairs = list(zip(further, further[1:], strict=False))
        self.down = nn.Sequential(*(_normalised(_halving(narrow, wide)) for narrow, wide in pairs))
        self.back = nn.Sequential(*(_normalised(_keeping(wide, narrow)) for narrow, wide in reversed(pairs)))
        self.joint = _normalised(_keeping(width + sentence_dim, width))
        self.conditional_head = nn.Conv2d(width, 1, 4)
        self.unconditional_head = nn.Conv2d(width, 1, 4) if self.judges_alone else None
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
        return self.unconditional_head(features).flatten()

    def forward(self, images: Tensor, sentence: Tensor) -> Tensor:  # (N, 3, H, W), (N, D) -> (N,)
        return self.logits(self.features(images), sentence)


class AttnDiscriminator(Discriminator):
    """The discriminators of all stages as one network: what one optimizer trains and one checkpoint entry holds.

    base_size: pixels of the first stage; num_stages: each doubles the size; others as StageDiscriminator.
    """

    slow_start = True
    compiled_methods = ()  # the stages'
    has_stages = True
    judges_alone: ClassVar[bool] = True
    every_stage: ClassVar[bool] = True

    @dataclass(frozen=True)
    class Settings(SpectralSettings, StageSettings):
        df_dim: int = setting("GAN.DF_DIM", 64, "AttnGAN: base number of channels of D", above=0)

    def __init__(self, *arguments: Any, **named: Any):
        super().__init__(*arguments, **named)
        shared = {name: getattr(self.settings, name) for name in ("df_dim", "sentence_dim", "spectral_normalisation")}
        sizes = [self.settings.base_size * 2**number for number in range(self.settings.num_stages)]
        self.stages = nn.ModuleList(
            StageDiscriminator(image_size=size, judges_alone=self.judges_alone, **shared)
            for size in (sizes if self.every_stage else sizes[-1:])
        )

    def forward(self, images: list[Tensor], sentence: Tensor) -> list[Tensor]:
        """images coarse to fine, (N, 3, H, W) each, and their captions (N, D) -> logits (N,) of every stage."""
        return [stage(scale, sentence) for stage, scale in zip(self.stages, images, strict=True)]

    def with_stages(self, stages: Sequence[Discriminator]) -> "AttnDiscriminator":
        """A network like this one around given stages, of which it takes those of its image sizes.

        Raises ValueError where a size is missing or a stage is of another kind.
        """
        by_size = {stage.image_size: stage for stage in stages if isinstance(stage, StageDiscriminator)}
        missing = [stage.image_size for stage in self.stages if stage.image_size not in by_size]
        if missing:
            sizes = ", ".join(map(str, missing))
            raise ValueError(f"the discriminator for images of {sizes} px is missing (found: {sorted(by_size)})")
        chosen = [by_size[stage.image_size] for stage in self.stages]
        shared = [{**stage.arguments, "image_size": None} for stage in chosen]
        if any(arguments != shared[0] for arguments in shared) or chosen[0].judges_alone != self.judges_alone:
            raise ValueError("the discriminators are not of one training of this system")
        theirs = {name: shared[0][name] for name in ("df_dim", "sentence_dim", "spectral_normalisation")}
        with torch.device("meta"):  # its own stages are thrown away
            network = type(self)(**(self.arguments | theirs))
        network.stages = nn.ModuleList(chosen)
        return network


class AttnDCDiscriminator(AttnDiscriminator):
    """AttnDCGAN's: one discriminator, of the last stage, which judges images with their captions alone."""

    judges_alone = False
    every_stage = False


def initialise(module: nn.Module) -> None:
    """The authors' start: orthogonal weights and zero biases, N(1, 0.02) for the scales of batch norm."""
    for layer in module.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            nn.init.orthogonal_(layer.weight)
        elif isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.normal_(layer.weight, 1.0, 0.02)
        else:
            continue
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def _halving(channels_in: int, channels_out: int) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, 4, stride=2, padding=1, bias=False)


def _keeping(channels_in: int, channels_out: int) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)


def _normalised(convolution: nn.Conv2d) -> nn.Sequential:
    return nn.Sequential(convolution, nn.BatchNorm2d(convolution.out_channels), nn.LeakyReLU(0.2, inplace=True))
