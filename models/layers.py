"""What at least two systems use: the one-way discriminator, affine fusion blocks, channels, sizes, resizing."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from models.kernels import Conv2d, LeakyReLU, avg_pool_2x, conv_after_upsample_2x, upsample_2x
from models.settings import SentenceSettings, SizeSettings, SpectralSettings
from models.types import Discriminator


class DownBlock(nn.Module):
    """out = shortcut(avg_pool_2x(x)) + gate · residual(x), at half the size. The gate is a learned scalar, initially 0."""

    def __init__(self, channels_in: int, channels_out: int):
        super().__init__()
        self.residual = nn.Sequential(
            Conv2d(channels_in, channels_out, 4, stride=2, padding=1, bias=False),
            LeakyReLU(),
            Conv2d(channels_out, channels_out, 3, padding=1, bias=False),
            LeakyReLU(),
        )

        # Also built, unused, where the number of channels stays the same: the released weights contain it.
        self.shortcut = Conv2d(channels_in, channels_out, 1)
        self.gate = nn.Parameter(torch.zeros(1))
        self.changes_channels = channels_in != channels_out

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W) -> (N, C', H/2, W/2)
        # The authors convolve, then pool. A 1×1 convolution and a mean commute; pooled first, it works on 1/4 of the pixels.
        pooled = avg_pool_2x(x)
        shortcut = self.shortcut(pooled) if self.changes_channels else pooled
        return shortcut + self.gate * self.residual(x)


class OneWayDiscriminator(Discriminator):
    """The one-way discriminator of SSA-GAN and DF-GAN (Tao et al. 2022, section 3.3): one logit for image and sentence.

    nf: base number of channels.
    image_size: pixels; a power of two from 8 on. ValueError otherwise.
    multipliers: of nf, after each down block; the last one is repeated for larger images.
    sentence_dim: length of the sentence features.
    spectral_normalisation: of all convolutions.
    """

    compiled_methods = ("features", "logits")

    @dataclass(frozen=True)
    class Settings(SpectralSettings, SentenceSettings, SizeSettings):
        multipliers: Sequence[int] = (2, 4, 8, 16, 16, 16)

    def __init__(self, *arguments: Any, **named: Any):
        super().__init__(*arguments, **named)
        nf, multipliers = self.settings.nf, self.settings.multipliers

        # Channels before the first block and after each block: as many blocks as lead from image_size down to 4.
        num_blocks = num_upsamples(self.settings.image_size)
        multipliers = [1, *multipliers] + [multipliers[-1]] * num_blocks
        channels = [nf * multiplier for multiplier in multipliers[: num_blocks + 1]]

        # The image alone, then its 4×4 features together with the sentence.
        self.from_rgb = Conv2d(3, nf, 3, padding=1)
        self.blocks = nn.ModuleList(DownBlock(a, b) for a, b in zip(channels, channels[1:], strict=False))
        self.head = nn.Sequential(
            Conv2d(channels[-1] + self.settings.sentence_dim, 2 * nf, 3, padding=1, bias=False),
            LeakyReLU(),
            Conv2d(2 * nf, 1, 4, bias=False),
        )

        if self.settings.spectral_normalisation:
            for module in list(self.modules()):
                if isinstance(module, nn.Conv2d):
                    spectral_norm(module)

    def gates(self) -> list[nn.Parameter]:
        return [block.get_parameter("gate") for block in self.blocks]

    def features(self, images: Tensor) -> Tensor:  # (N, 3, H, W) in [-1, 1] -> (N, C, 4, 4)
        x = self.from_rgb(images)
        for block in self.blocks:
            x = block(x)
        return x

    def logits(self, features: Tensor, sentence: Tensor) -> Tensor:  # (N, C, 4, 4), (N, D) -> (N,)
        replicated = sentence[:, :, None, None].expand(-1, -1, 4, 4)
        return self.head(torch.cat([features, replicated], dim=1)).flatten()

    def forward(self, images: Tensor, sentence: Tensor) -> Tensor:  # (N, 3, H, W), (N, D) -> (N,)
        return self.logits(self.features(images), sentence)


class ConditionalAffine(nn.Module):
    """γ(c)·x + β(c): the condition scales and shifts each channel (Tao et al. 2022, eq. 3-5). Initially the identity.

    hidden: width of the two MLPs that predict γ and β.
    """

    def __init__(self, channels: int, condition_dim: int, hidden: int):
        super().__init__()
        self.gamma = affine_head(condition_dim, hidden, channels, start=1.0)
        self.beta = affine_head(condition_dim, hidden, channels, start=0.0)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:  # (N, C, H, W), (N, D) -> (N, C, H, W)
        gamma, beta = self.gamma(condition)[:, :, None, None], self.beta(condition)[:, :, None, None]  # (N, C, 1, 1)
        return torch.addcmul(beta, x, gamma)


class AffineFusion(nn.Module):
    """Affine, LeakyReLU, affine, LeakyReLU: DF-GAN's fusion of features with a condition (Tao et al. 2022, section 3.4)."""

    def __init__(self, channels: int, condition_dim: int, hidden: int):
        super().__init__()
        self.affine0 = ConditionalAffine(channels, condition_dim, hidden)
        self.affine1 = ConditionalAffine(channels, condition_dim, hidden)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:  # (N, C, H, W), (N, D) -> (N, C, H, W)
        for affine in (self.affine0, self.affine1):
            # In place: saves one activation.
            x = F.leaky_relu(affine(x, condition), 0.2, inplace=True)
        return x


class FusionBlock(nn.Module):
    """out = shortcut(x) + residual(x), with residual = fusion, Conv3×3, fusion, Conv3×3 (DF-GAN's UpBlock).

    hidden: width of the MLPs that predict γ and β; None: the number of channels of the features.
    """

    def __init__(self, channels_in: int, channels_out: int, condition_dim: int, hidden: int | None = None):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.fusion1 = AffineFusion(channels_in, condition_dim, hidden or channels_in)
        self.fusion2 = AffineFusion(channels_out, condition_dim, hidden or channels_out)
        self.shortcut = nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else nn.Identity()

    def forward(self, x: Tensor, condition: Tensor, upsample: bool = False, size: int | None = None) -> Tensor:
        """x (N, C, H, W), condition (N, D) -> (N, C', H, W); nearest upsampling of x to (2H, 2W) or (size, size) first.

        upsample: by 2.
        size: to this number of pixels; None: no change, or as `upsample` says.
        """
        # Fusion and shortcut treat each pixel by itself: they work at the smaller size, with the same result.
        fused, shortcut = self.fusion1(x, condition), self.shortcut(x)
        upsample = upsample or size == 2 * x.shape[-1]
        if size is not None and not upsample:
            fused, shortcut = (F.interpolate(part, size=size, mode="nearest") for part in (fused, shortcut))

        # From here on at the size of the output.
        residual = conv_after_upsample_2x(self.conv1, fused) if upsample else self.conv1(fused)
        residual = self.conv2(self.fusion2(residual, condition))
        return (upsample_2x(shortcut) if upsample else shortcut) + residual


def affine_head(condition_dim: int, hidden: int, channels: int, start: float) -> nn.Sequential:
    """The MLP that predicts γ or β from a condition: (N, condition_dim) -> (N, channels).

    start: what it predicts for every condition until it is trained, as the last layer's weights are zero.
    """
    first, last = nn.Linear(condition_dim, hidden), nn.Linear(hidden, channels)
    nn.init.zeros_(last.weight)
    nn.init.constant_(last.bias, start)
    return nn.Sequential(first, nn.ReLU(), last)


def last_multipliers(multipliers: Sequence[int], count: int) -> list[int]:
    """The last `count` channel multipliers of a paper, wide to narrow. Larger images need more: then the first is repeated."""
    return ([multipliers[0]] * count + list(multipliers))[-count:]


def at_least_float32(x: Tensor) -> Tensor:
    """16-bit values are widened, others stay as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def resize(images: Tensor, size: int) -> Tensor:
    """(N, C, H, W) -> (N, C, size, size), bilinear; antialiased when images get smaller, or fine detail would turn into noise."""
    if images.shape[-1] == size:
        return images
    shrinks = images.shape[-1] > size
    wide = at_least_float32(images)  # antialiasing does not support bfloat16
    return F.interpolate(wide, size=(size, size), mode="bilinear", align_corners=False, antialias=shrinks)


def num_upsamples(image_size: int) -> int:
    """Number of 2x upsamplings from 4 pixels to image_size. Raises ValueError unless that is a power of two from 8 on."""
    steps = round(math.log2(image_size / 4)) if image_size >= 8 else 0
    if steps < 1 or 4 * 2**steps != image_size:
        raise ValueError(f"the image size must be a power of two from 8 on (8, 16, ... 256, 512), not {image_size}")
    return steps
