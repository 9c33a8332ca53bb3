"""Projected discriminator (Sauer et al., NeurIPS 2021, arXiv 2111.01007): D sees only the features of a frozen network.

Departures from the paper: mixing across scales by 1×1 convolutions before the upsampling (the two commute), at the size of
each scale's own features; heads with GroupNorm, so that an image's logits do not depend on its batch (unless
BATCH_STATISTIC is on); hinge over all logits.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from miscc.errors import ConfigError
from miscc.settings import setting
from models.backbones import BACKBONES, Backbone
from models.layers import resize
from models.settings import SentenceSettings
from models.types import Discriminator

SCALE_WIDTHS = (1, 2, 4, 8)  # of `width`: channels after mixing, fine to coarse
NUM_MATCHING = 64  # maps of a head whose inner product with the sentence is part of the logit
LARGEST_MAP = 7  # pixels; heads downsample larger maps, by 2 each time
GROUP = 4  # images over which the batch statistic is computed


class RandomMixing(nn.Module):
    """Random projections that never train: 1×1 across the channels of each scale, then from coarse to fine across the scales.

    Each scale thus contains the coarser ones. Mixing dilutes prominent features, so that D makes use of all of them.
    """

    def __init__(self, channels: Sequence[int], widths: Sequence[int], seed: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def projection(channels_in: int, channels_out: int) -> Tensor:
            # Variance 1 / channels_in keeps the features' scale. Drawn on the CPU: the same values on every device.
            with torch.device("cpu"):
                weight = torch.randn(channels_out, channels_in, 1, 1, generator=generator) / math.sqrt(channels_in)
            return weight.to(torch.get_default_device())

        for index, sizes in enumerate(zip(channels, widths, strict=True)):
            self.register_buffer(f"own{index}", projection(*sizes))
        for index, sizes in enumerate(zip(widths[1:], widths, strict=False)):
            self.register_buffer(f"coarser{index}", projection(*sizes))

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:  # (N, C, h, w), fine to coarse -> (N, width, h, w)
        mixed = [F.conv2d(scale, self.get_buffer(f"own{index}")) for index, scale in enumerate(features)]
        for index in reversed(range(len(mixed) - 1)):
            coarser = F.conv2d(mixed[index + 1], self.get_buffer(f"coarser{index}"))
            coarser = F.interpolate(coarser, size=mixed[index].shape[2:], mode="bilinear", align_corners=False)
            mixed[index] = (mixed[index] + coarser) * math.sqrt(0.5)
        return mixed


class BatchStatistic(nn.Module):
    """Minibatch standard deviation (Karras et al. 2018, ProGAN, section 3): shows D how much images differ.

    One more map: the deviation within groups of up to GROUP images, averaged over channels and pixels.
    """

    def forward(self, x: Tensor) -> Tensor:  # (N, C, h, w) -> (N, C + 1, h, w)
        parts = []
        for group in x.float().split(GROUP):
            deviation = (group.var(dim=0, unbiased=False) + 1e-8).sqrt().mean()
            parts.append(deviation.expand(len(group), 1, *x.shape[2:]))
        return torch.cat([x, torch.cat(parts).to(x.dtype)], dim=1)


class Head(nn.Module):
    """The discriminator of one scale: a map of logits, each an unconditional part plus the match with the sentence.

    logit = m_0 + ⟨m_1…64, W·s⟩ / √64 of its 65 maps m (Miyato and Koyama 2018, as in Projected GAN).

    channels, size: of the features that it reads; size in pixels.
    most_channels: limit of its channels, which double with each downsampling.
    sentence_dim: length of the sentence features.
    batch_statistic: whether it has a BatchStatistic.
    """

    def __init__(self, channels: int, size: int, most_channels: int, sentence_dim: int, batch_statistic: bool):
        super().__init__()

        # Downsample until the map is small enough.
        layers: list[nn.Module] = []
        while size > LARGEST_MAP:
            wider = min(2 * channels, most_channels)
            layers += [spectral_norm(nn.Conv2d(channels, wider, 4, stride=2, padding=1))]
            layers += [nn.GroupNorm(math.gcd(wider, 8), wider), nn.LeakyReLU(0.2)]
            channels, size = wider, size // 2
        if batch_statistic:
            layers.append(BatchStatistic())

        # The maps, and the sentence for the match with them.
        layers += [spectral_norm(nn.Conv2d(channels + batch_statistic, most_channels, 3, padding=1)), nn.LeakyReLU(0.2)]
        self.trunk = nn.Sequential(*layers)
        self.maps = spectral_norm(nn.Conv2d(most_channels, 1 + NUM_MATCHING, 1))
        self.sentence = nn.Linear(sentence_dim, NUM_MATCHING)

    def forward(self, x: Tensor) -> Tensor:  # (N, C, h, w) -> maps (N, 65, h', w')
        return self.maps(self.trunk(x))

    def logits(self, maps: Tensor, sentence: Tensor) -> Tensor:  # (N, 65, h', w'), (N, D) -> (N, h'·w')
        match = torch.einsum("nchw,nc->nhw", maps[:, 1:], self.sentence(sentence).to(maps.dtype))
        return (maps[:, 0] + match / math.sqrt(NUM_MATCHING)).flatten(1)


class ProjectedDiscriminator(Discriminator):
    """Independent heads on four scales of a frozen backbone's features, mixed at random.

    weights_hash: of the backbone's weights that a checkpoint was trained with; "": any.
    seed: of the random projections.

    Raises ConfigError for an input size that the backbone does not read, CheckpointError for missing weights and for weights of
    another hash.
    """

    @dataclass(frozen=True)
    class Settings(SentenceSettings):
        backbone: str = setting(
            "GAN.PROJECTED.BACKBONE",
            "efficientnet-lite0",
            "frozen network whose features the projected discriminator sees",
            tuple(BACKBONES),
        )
        weights: str = setting(
            "GAN.PROJECTED.WEIGHTS",
            "",
            "weight file of that frozen network; empty: the one in its package, where there is one",
        )
        input_size: int = setting(
            "GAN.PROJECTED.INPUT",
            224,
            "pixels that images are resized to for that network, a multiple of 32; 224 as published, less for CPUs; a ViT's own",
            above=0,
            maximum=8192,
        )
        width: int = setting(
            "GAN.PROJECTED.WIDTH",
            64,
            "channels of the finest scale after mixing; 64 as published",
            above=0,
            maximum=4096,
        )
        batch_statistic: bool = setting(
            "GAN.PROJECTED.BATCH_STATISTIC",
            False,
            "heads also see how much the images of a batch differ (minibatch standard deviation)",
        )
        weights_hash: str = ""
        seed: int = 0

    compiled_methods = ("project", "features", "logits")

    def __init__(self, *arguments: Any, **named: Any):
        super().__init__(*arguments, **named)
        settings = self.settings

        # The frozen part. A ViT reads images of one size only.
        self.backbone = Backbone(settings.backbone, settings.weights)
        strides, image_size = self.backbone.strides, self.backbone.image_size
        if image_size and settings.input_size != image_size:
            raise ConfigError(
                f"GAN.PROJECTED.INPUT: must be {image_size} for {settings.backbone} with these weights, not "
                f"{settings.input_size}"
            )
        if settings.input_size % strides[-1]:
            raise ConfigError(f"GAN.PROJECTED.INPUT: must be a multiple of {strides[-1]}, not {settings.input_size}")
        self.backbone.check_hash(settings.weights_hash, "discriminator")
        self.change_settings(weights_hash=self.backbone.weights_hash)
        widths = [settings.width * factor for factor in SCALE_WIDTHS]
        self.mixing = RandomMixing(self.backbone.channels, widths, settings.seed)

        # The trained part.
        options = (widths[-1], settings.sentence_dim, settings.batch_statistic)
        self.heads = nn.ModuleList(
            Head(channels, settings.input_size // stride, *options)
            for channels, stride in zip(widths, strides, strict=True)
        )

    def project(self, images: Tensor) -> list[Tensor]:
        """The frozen part: images (N, 3, H, W) in [-1, 1] -> mixed features (N, width, h, w), fine to coarse."""
        return self.mixing(self.backbone(resize(images, self.settings.input_size)))

    def features(self, projected: Sequence[Tensor]) -> list[Tensor]:
        """The trained part, without the sentence: mixed features -> maps (N, 65, h', w') of each head."""
        return [head(scale) for head, scale in zip(self.heads, projected, strict=True)]

    def logits(self, features: Sequence[Tensor], sentence: Tensor) -> Tensor:
        """maps of each head, (N, D) -> logits of all heads (N, L)."""
        logits = [
            head.logits(maps, sentence) for head, maps in zip(cast(list[Head], self.heads), features, strict=True)
        ]
        return torch.cat(logits, dim=1)

    def forward(self, images: Tensor, sentence: Tensor) -> Any:  # (N, 3, H, W), (N, D) -> (N, L)
        return self.logits(self.features(self.project(images)), sentence)
