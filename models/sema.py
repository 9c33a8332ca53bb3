"""SEMA (Yuan et al., IEEE TMM 2024, doi 10.1109/TMM.2023.3278992): adversarial semantic distances on top of DF-GAN.

**The paper's**
- The generator, as in the released weights, and truncated sampling.
- A redescription module R, an attention LSTM over convolutional features, and a feature extractor F, trained to classify
  real and fake images by cross-entropy. Each gives G a semantic distance to minimise.
- R minimises its distance on real images and maximises it on fake ones.
- The sentence is half LSTM, half Transformer (models/mixed_text.py).

**Ours**, as the training code was never released and the exact distance and weights are not public
- The distance, SEM(a, b) = 1 − cos(a, b), with weight 1 in G's loss for both.
- The margin: R's loss on fake images is max(0, margin − SEM(R(x̂), s)), which is 0 beyond the margin.
- The layers of R and F; their learning rate, which is D's; the order of the steps.
- D: DF-GAN's in the same early form as the generator (channels up to 16·nf), with its hinge and MA-GP.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from miscc.batch import Batch
from miscc.losses import semantic_distance
from miscc.settings import setting
from models.adversarial import Seen
from models.df_gan import DFGAN, DFGenerator
from models.layers import FusionBlock, OneWayDiscriminator
from models.modes import no_parameter_grad
from models.projected import ProjectedDiscriminator
from models.sema_modules import FeatureExtractor, Redescriber
from models.types import Network, OptimizerSpec, Update

ADVERSARIES = ("redescriber", "feature_extractor")  # of G, beside D


class SEMAGenerator(DFGenerator):
    """noise and sentence -> image: DF-GAN's early form, with one block more: the first works at 4×4.

    Arguments as for DFGenerator.
    hidden: width of the MLPs that predict γ and β.
    """

    first_block_upsamples = False

    @dataclass(frozen=True)
    class Settings(DFGenerator.Settings):
        hidden: int = 256

    def _block(self, channels_in: int, channels_out: int, condition_dim: int) -> FusionBlock:
        return FusionBlock(channels_in, channels_out, condition_dim, self.settings.hidden)


class SEMA(DFGAN):
    """The objective: DF-GAN's, with R and F as two more adversaries of G, each with an optimizer of its own.

    networks: as DFGAN, with redescriber and feature_extractor. A weight of 0 leaves out that distance and the training of
    its network.
    """

    @dataclass(frozen=True)
    class Settings(DFGAN.Settings):
        redescription_weight: float = setting(
            "SEMA.REDESCRIPTION_WEIGHT", 1.0, "weight of SEM(R(fake), sentence) in G's loss; 0: without R"
        )
        feature_weight: float = setting(
            "SEMA.FEATURE_WEIGHT", 1.0, "weight of SEM(F(fake), F(real)) in G's loss; 0: without F"
        )
        margin: float = setting(
            "SEMA.MARGIN",
            0.5,
            "distance up to which R's loss pushes its predictions for fake images away from the sentence",
        )

    @dataclass(frozen=True)
    class TextSettings:
        transformer: str = setting(
            "TEXT.TRANSFORMER",
            "",
            "SEMA: folder of a Hugging Face BERT that gives half of the sentence; empty: the LSTM alone",
        )

    NETWORKS: ClassVar[Mapping[str, type[Network]]] = {
        "generator": SEMAGenerator,
        "discriminator": OneWayDiscriminator,
        "projected": ProjectedDiscriminator,
        "redescriber": Redescriber,
        "feature_extractor": FeatureExtractor,
    }
    DEFAULTS: ClassVar[Mapping[str, Any]] = {
        **DFGAN.DEFAULTS,
        "TRAIN.BATCH_SIZE": 48,
        "TRAIN.MAX_EPOCH": 121,
        "GAN.TRUNCATION": 0.8,
    }
    SHOWN: ClassVar[tuple[str, ...]] = (
        "loss/hinge", "loss/adversarial", "loss/redescription", "loss/feature", "logits/real", "logits/fake",
    )  # fmt: skip

    @property
    def redescriber(self) -> Redescriber:
        return self.networks["redescriber"]

    @property
    def feature_extractor(self) -> FeatureExtractor:
        return self.networks["feature_extractor"]

    def optimizers(self) -> dict[str, OptimizerSpec]:
        groups = super().optimizers()
        for part in ADVERSARIES:
            parameters = list(self.networks[part].parameters())
            groups[part] = OptimizerSpec(parameters, self.settings.discriminator_lr, self.settings.betas)
        return groups

    def updates(self, batch: Batch, noise: Tensor) -> Iterator[Update]:
        """Discriminator, (projected discriminator,) R, F, generator."""
        real_images = batch.single_size
        text = self.text_encoder(batch.captions, batch.lengths).detach()
        fake_images = self.generator(noise, text).images[-1]

        # Discriminators, as in DF-GAN.
        seen = self.seen(batch, fake_images)
        yield from self.discriminator_updates(seen, text.sentence)

        # R: close to the sentence on real images, far from it on fake ones. F: real or fake.
        if self.settings.redescription_weight > 0:
            losses, stats = self.redescriber_losses(real_images, fake_images.detach(), text.sentence)
            yield Update("redescriber", losses, stats)
        if self.settings.feature_weight > 0:
            losses, stats = self.feature_extractor_losses(real_images, fake_images.detach())
            yield Update("feature_extractor", losses, stats)

        # Generator: against all of them, which take no gradient.
        with no_parameter_grad(*self.discriminators(), *(self.networks[part] for part in ADVERSARIES)):
            losses = self.generator_losses(real_images, fake_images, text.sentence, seen)
            losses |= self.diversity_losses(fake_images, noise, text)
            yield Update("generator", losses, self.augmentation_stats())

    def redescriber_losses(
        self, real_images: Tensor, fake_images: Tensor, sentence: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """R's losses and values for the log: means over the samples of SEM(R(x), s) and max(0, margin − SEM(R(x̂), s))."""
        redescriber = self.redescriber
        real = semantic_distance(redescriber(real_images), sentence)
        fake = semantic_distance(redescriber(fake_images), sentence)
        losses = {"redescribe_real": real.mean(), "redescribe_fake": F.relu(self.settings.margin - fake).mean()}
        return losses, {"distance/redescribed_fake": fake.detach().mean()}

    def feature_extractor_losses(
        self, real_images: Tensor, fake_images: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """F's loss and values for the log: cross-entropy of real images (class 1) and fake ones (class 0)."""
        extractor = self.feature_extractor
        logits = torch.cat([extractor.logits(extractor(images)) for images in (real_images, fake_images)])  # (2N, 2)
        is_real = torch.arange(len(logits), device=logits.device) < len(real_images)
        accuracy = (logits.detach().argmax(dim=1) == is_real).float().mean()
        return {"real_or_fake": F.cross_entropy(logits, is_real.long())}, {"accuracy/real_or_fake": accuracy}

    def generator_losses(
        self, real_images: Tensor, fake_images: Tensor, sentence: Tensor, seen: Seen | None = None
    ) -> dict[str, Tensor]:
        """G's losses: −D(x̂, s), weighted SEM(R(x̂), s) and SEM(F(x̂), F(x)), where x is the caption's real image.

        seen: inputs of the discriminators; None: the images themselves.
        """
        losses = self.adversarial_losses(seen or Seen(real_images, fake_images, None), sentence)
        if self.settings.redescription_weight > 0:
            distance = semantic_distance(self.redescriber(fake_images), sentence)
            losses["redescription"] = self.settings.redescription_weight * distance.mean()
        if self.settings.feature_weight > 0:
            extractor = self.feature_extractor
            with torch.no_grad():
                real = extractor(real_images)
            losses["feature"] = self.settings.feature_weight * semantic_distance(extractor(fake_images), real).mean()
        return losses
