"""DF-GAN (Tao et al., CVPR 2022, arXiv 2008.05865): deep fusion of text and image by affine blocks, and its objective.

Written from the paper and from what is known of the released code's behaviour; where the two differ the released code is
followed: γ and β see the noise beside the sentence, and the mismatched pairs are the batch's rolled by one.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from miscc.batch import Batch
from miscc.losses import hinge_discriminator_loss, matching_aware_gradient_penalty
from models.adversarial import AdversarialSystem, Seen, logit_stats
from models.layers import FusionBlock, OneWayDiscriminator, last_multipliers, num_upsamples
from models.modes import full_precision, no_parameter_grad
from models.projected import ProjectedDiscriminator
from models.settings import AdversarialSettings, DiscriminatorSettings, GeneratorSettings, PenaltySettings
from models.types import Generator, GeneratorOutput, Network, TextFeatures, Update

CHANNELS = (8, 8, 8, 8, 4, 2, 1)  # multiples of nf: of the 4×4 features, then after each block at 256 px


class DFGenerator(Generator):
    """noise and sentence -> image. Each block upsamples by 2, then fuses [noise, sentence] in by affine layers.

    nf: base number of channels.
    z_dim, sentence_dim: lengths of noise and sentence features.
    image_size: pixels; a power of two from 8 on. ValueError otherwise.
    """

    first_block_upsamples: ClassVar[bool] = True

    @dataclass(frozen=True)
    class Settings(GeneratorSettings):
        nf: int = 32

    def __init__(self, *arguments: Any, **named: Any):
        super().__init__(*arguments, **named)
        nf, z_dim, sentence_dim = self.settings.nf, self.settings.z_dim, self.settings.sentence_dim
        self.z_dim, self.noise_dim, self.image_size = z_dim, z_dim, self.settings.image_size

        # Channels before the first block and after each.
        channels = [nf * multiplier for multiplier in last_multipliers(CHANNELS, num_upsamples(self.image_size) + 1)]
        if not self.first_block_upsamples:
            channels = [channels[0], *channels]

        # noise -> 4×4 features -> blocks, under noise and sentence -> image.
        self.fc = nn.Linear(z_dim, channels[0] * 4 * 4)
        self.blocks = nn.ModuleList(
            self._block(a, b, z_dim + sentence_dim) for a, b in zip(channels, channels[1:], strict=False)
        )
        self.to_rgb = nn.Sequential(nn.LeakyReLU(0.2), nn.Conv2d(channels[-1], 3, 3, padding=1), nn.Tanh())

    def _block(self, channels_in: int, channels_out: int, condition_dim: int) -> FusionBlock:
        return FusionBlock(channels_in, channels_out, condition_dim)

    def forward(self, noise: Tensor, text: TextFeatures) -> GeneratorOutput:  # (N, z_dim) -> images (N, 3, H, W)
        condition = torch.cat([noise, text.sentence], dim=1)  # (N, z_dim + sentence_dim)
        x = self.fc(noise).view(noise.shape[0], -1, 4, 4)
        for index, block in enumerate(self.blocks):
            x = block(x, condition, upsample=index > 0 or self.first_block_upsamples)
        return GeneratorOutput(images=[self.to_rgb(x)])

    def activation_blocks(self) -> list[nn.Module]:
        return list(self.blocks)


class DFDiscriminator(OneWayDiscriminator):
    """The one-way discriminator with DF-GAN's channels: 2·nf, 4·nf, then 8·nf in all further blocks."""

    @dataclass(frozen=True)
    class Settings(OneWayDiscriminator.Settings):
        nf: int = 32
        multipliers: Sequence[int] = (2, 4, 8, 8, 8, 8)


class DFGAN(AdversarialSystem):
    """The objective: matching-aware hinge and MA-GP in one step of D, then the adversarial loss of G. No DAMSM loss.

    networks: generator, discriminator, text_encoder (frozen); an image encoder is ignored.
    """

    @dataclass(frozen=True)
    class Settings(DiscriminatorSettings, PenaltySettings, AdversarialSettings):
        pass

    NETWORKS: ClassVar[Mapping[str, type[Network]]] = {
        "generator": DFGenerator,
        "discriminator": DFDiscriminator,
        "projected": ProjectedDiscriminator,
    }
    DEFAULTS: ClassVar[Mapping[str, Any]] = {
        "TRAIN.BATCH_SIZE": 32,
        "TRAIN.MAX_EPOCH": 1300,
        "TRAIN.DAMSM_WEIGHT": 0.0,
        "GAN.TRUNCATION": 0.88,
    }
    SHOWN: ClassVar[tuple[str, ...]] = (
        "loss/hinge", "loss/projected_hinge", "loss/penalty", "loss/adversarial", "logits/real", "logits/fake",
    )  # fmt: skip

    @property
    def discriminator(self) -> OneWayDiscriminator:
        return self.networks["discriminator"]

    def updates(self, batch: Batch, noise: Tensor) -> Iterator[Update]:
        """Discriminator, (projected discriminator,) then generator."""
        text = self.text_encoder(batch.captions, batch.lengths).detach()
        fake_images = self.generator(noise, text).images[-1]

        # Discriminators: real pairs up; fake images and wrong captions down.
        seen = self.seen(batch, fake_images)
        yield from self.discriminator_updates(seen, text.sentence)

        # Generator: fake images up, through discriminators that take no gradient.
        with no_parameter_grad(*self.discriminators()):
            losses = self.adversarial_losses(seen, text.sentence)
            losses |= self.diversity_losses(fake_images, noise, text)
            yield Update("generator", losses, self.augmentation_stats())

    def discriminator_updates(self, seen: Seen, sentence: Tensor) -> Iterator[Update]:
        """The steps of the discriminators that take part; sentence (N, D) without a graph."""
        if self.paper_takes_part:
            losses, stats = self.discriminator_losses(seen.real, seen.fake.detach(), sentence)
            yield Update("discriminator", losses, stats)

        yield from self.projected_updates(seen, sentence)

    def discriminator_losses(
        self, real_images: Tensor, fake_images: Tensor, sentence: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """({"hinge", "penalty"}, values for the log): images (N, 3, H, W), sentence (N, D), both without a graph.

        The penalty differentiates the same logits of real pairs that the hinge uses: one forward serves both. It is left
        out of steps in which none is due.
        """
        discriminator = self.discriminator
        images = real_images.detach().requires_grad_()
        own = sentence.detach().to(images.dtype).requires_grad_()
        with full_precision(images.device):
            features = discriminator.features(images)
            real_logits = discriminator.logits(features, own)
            penalty = {}
            if self.settings.penalty_is_due(self.step):
                value = matching_aware_gradient_penalty(real_logits, images, own, **self.settings.penalty)
                penalty = {"penalty": value}

        # Mismatched pairs: each caption with the image of the next one, the last with the first's.
        mismatched_logits = discriminator.logits(features.roll(-1, dims=0), sentence)
        fake_logits = discriminator(fake_images, sentence)
        losses = {"hinge": hinge_discriminator_loss(real_logits, fake_logits, mismatched_logits)} | penalty
        losses |= self.lecam_losses("discriminator", real_logits, fake_logits)
        logits = {"real": real_logits, "fake": fake_logits, "mismatched": mismatched_logits}
        return losses, logit_stats(logits)
