"""AttnGAN and AttnDCGAN (Xu et al., CVPR 2018, arXiv 1711.10485): the generators and the objective.

Several stages, each at twice the image size of the one before; from the second on every pixel attends to the words.
Written from the paper and from what is known of the released code's behaviour. The discriminators are in
attn_discriminator.py.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from miscc.batch import Batch
from miscc.losses import binary_discriminator_loss, binary_generator_loss, kl_to_standard_normal
from miscc.settings import setting
from models.adversarial import AdversarialSystem, logit_stats
from models.attn_discriminator import AttnDCDiscriminator, AttnDiscriminator, StageDiscriminator, conv3x3, initialise
from models.kernels import Upsample2x, conv_after_upsample_2x
from models.layers import num_upsamples
from models.modes import no_parameter_grad
from models.settings import AdversarialSettings, DamsmSettings, NoiseSettings, StageSettings
from models.types import Generator, GeneratorOutput, Network, TextFeatures, Update

MAX_MULTIPLIER = 16  # of gf_dim: most channels at 4×4, which the published first stage of 64 px has


class UpBlock(nn.Sequential):
    """(N, C, H, W) -> (N, C', 2H, 2W): nearest upsampling, convolution, batch norm, gated linear unit."""

    def __init__(self, channels_in: int, channels_out: int):
        convolution = conv3x3(channels_in, 2 * channels_out)
        super().__init__(Upsample2x(), convolution, nn.BatchNorm2d(2 * channels_out), nn.GLU(dim=1))

    def forward(self, x: Tensor) -> Tensor:
        _, convolution, norm, gate = cast(list[Any], self)  # the first is fused into the convolution
        return gate(norm(conv_after_upsample_2x(convolution, x)))


class ConditioningAugmentation(nn.Module):
    """sentence -> a sample c ~ N(mu(s), sigma(s)), so that G also learns points between the captions.

    Zhang et al. 2017 (StackGAN), section 3.2; the linear layer with a GLU is AttnGAN's.
    """

    def __init__(self, sentence_dim: int, condition_dim: int):
        super().__init__()
        self.linear = nn.Linear(sentence_dim, 4 * condition_dim)
        self.gate = nn.GLU(dim=1)

    def forward(self, sentence: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # (N, D), (N, C) -> c, mu, logvar, each (N, C)
        mu, logvar = self.gate(self.linear(sentence)).chunk(2, dim=1)
        return mu + noise * (logvar / 2).exp(), mu, logvar


class FirstStage(nn.Module):
    """condition and noise -> features of the first image: a linear layer to 4×4, then up blocks, each with half the channels."""

    def __init__(self, input_dim: int, gf_dim: int, base_size: int):
        super().__init__()
        # Channels at 4×4, then after each block; the last number is gf_dim.
        num_blocks = num_upsamples(base_size)
        channels = [gf_dim * min(2**steps, MAX_MULTIPLIER) for steps in range(num_blocks, -1, -1)]
        width = channels[0] * 4 * 4

        self.fc = nn.Sequential(nn.Linear(input_dim, 2 * width, bias=False), nn.BatchNorm1d(2 * width), nn.GLU(dim=1))
        self.blocks = nn.Sequential(*(UpBlock(a, b) for a, b in zip(channels, channels[1:], strict=False)))

    def forward(self, x: Tensor) -> Tensor:  # (N, C + Z) -> (N, gf_dim, base_size, base_size)
        return self.blocks(self.fc(x).view(x.shape[0], -1, 4, 4))


class WordAttention(nn.Module):
    """Word context of each pixel (Xu et al. 2018, eq. 2): softmax over the words of its caption, padding excluded.

    attends: False gives every word the same weight at every pixel (an ablation).
    """

    def __init__(self, channels: int, word_dim: int, attends: bool):
        super().__init__()
        self.project = nn.Conv2d(word_dim, channels, 1, bias=False)
        self.attends = attends

    def forward(self, x: Tensor, words: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        # (N, C, H, W), (N, D, T), (N, T) True = padding -> context (N, C, H, W), attention (N, T, H, W)
        keys = self.project(words[..., None])[..., 0]  # (N, C, T)
        scores = keys.transpose(1, 2) @ x.flatten(2)  # (N, T, HW)
        scores = scores if self.attends else torch.zeros_like(scores)

        # Each sample's own mask at all its pixels. The authors' code mixes up the masks of the samples of a batch.
        scores = scores.masked_fill(mask[:, :, None], -torch.inf)
        attention = scores.softmax(dim=1)
        return (keys @ attention).view_as(x), attention.unflatten(2, x.shape[2:])


class ResidualBlock(nn.Module):
    """x + (convolution, batch norm, gated linear unit, convolution, batch norm)(x)."""

    def __init__(self, channels: int):
        super().__init__()
        self.layers = nn.Sequential(
            conv3x3(channels, 2 * channels),
            nn.BatchNorm2d(2 * channels),
            nn.GLU(dim=1),
            conv3x3(channels, channels),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class Refinement(nn.Module):
    """A stage after the first: features joined with their word contexts, residual blocks, one up block."""

    def __init__(self, gf_dim: int, word_dim: int, r_num: int, attends: bool):
        super().__init__()
        self.attention = WordAttention(gf_dim, word_dim, attends)
        self.residual = nn.Sequential(*(ResidualBlock(2 * gf_dim) for _ in range(r_num)))
        self.up = UpBlock(2 * gf_dim, gf_dim)

    def forward(self, x: Tensor, text: TextFeatures) -> tuple[Tensor, Tensor]:
        # (N, C, H, W) -> (N, C, 2H, 2W), attention (N, T, H, W)
        context, attention = self.attention(x, text.words, text.mask)
        joined = torch.cat([x, context], dim=1)  # (N, 2C, H, W)
        return self.up(self.residual(joined)), attention


class AttnGenerator(Generator):
    """noise and words -> an image at every stage, with the word attention of all but the first.

    gf_dim: base number of channels.
    z_dim, condition_dim: lengths of noise and augmented condition.
    sentence_dim: length of word and sentence features.
    r_num: residual blocks of each stage after the first.
    base_size: pixels of the first stage; a power of two from 8 on. ValueError otherwise.
    num_stages: each at twice the image size of the one before.
    attention: False gives all words the same weight.
    """

    draws_every_stage: ClassVar[bool] = True

    @dataclass(frozen=True)
    class Settings(StageSettings, NoiseSettings):
        gf_dim: int = setting("GAN.GF_DIM", 32, "AttnGAN: base number of channels of G", above=0, maximum=4096)
        condition_dim: int = setting(
            "GAN.CONDITION_DIM", 100, "AttnGAN: length of the augmented condition", above=0, maximum=65536
        )
        r_num: int = setting("GAN.R_NUM", 2, "AttnGAN: residual blocks a stage", maximum=128)
        attention: bool = setting("GAN.B_ATTENTION", True, "AttnGAN: word attention")

    def __init__(self, *arguments: Any, **named: Any):
        super().__init__(*arguments, **named)
        gf_dim, sentence_dim = self.settings.gf_dim, self.settings.sentence_dim
        base_size, num_stages = self.settings.base_size, self.settings.num_stages
        self.z_dim, self.condition_dim = self.settings.z_dim, self.settings.condition_dim
        self.noise_dim = self.z_dim + self.condition_dim
        self.image_size = base_size * 2 ** (num_stages - 1)
        self.num_attending = num_stages - 1

        # sentence -> condition; condition and noise -> first stage -> refinements.
        self.augmentation = ConditioningAugmentation(sentence_dim, self.condition_dim)
        self.first = FirstStage(self.noise_dim, gf_dim, base_size)
        self.refinements = nn.ModuleList(
            Refinement(gf_dim, sentence_dim, self.settings.r_num, self.settings.attention)
            for _ in range(num_stages - 1)
        )

        # One image layer for each stage that draws.
        self.to_rgb = nn.ModuleList(
            nn.Sequential(conv3x3(gf_dim, 3), nn.Tanh()) for _ in range(num_stages if self.draws_every_stage else 1)
        )
        initialise(self)

    def forward(self, noise: Tensor, text: TextFeatures, augmentation_noise: Tensor | None = None) -> GeneratorOutput:
        """Images of every stage that draws, coarse to fine.

        noise: (N, noise_dim), z and the ε of the conditioning augmentation; or (N, z_dim), z alone.
        augmentation_noise: (N, condition_dim), ε; None: taken from `noise`, or sampled here where `noise` is z alone.
        """
        z, rest = noise[:, : self.z_dim], noise[:, self.z_dim :]
        if augmentation_noise is None:
            augmentation_noise = rest if rest.shape[1] else noise.new_empty(rest.shape[0], self.condition_dim).normal_()

        # First stage, from the sentence alone.
        condition, mu, logvar = self.augmentation(text.sentence, augmentation_noise)  # (N, condition_dim) each
        x = self.first(torch.cat([condition, z], dim=1))  # (N, gf_dim, base_size, base_size)
        images, attention = [self.to_rgb[0](x)] if self.draws_every_stage else [], []

        # Further stages, which attend to the words; each upsamples by 2.
        for index, refinement in enumerate(self.refinements, start=1):
            x, weights = refinement(x, text)
            attention.append(weights)
            if self.draws_every_stage:
                images.append(self.to_rgb[index](x))

        if not self.draws_every_stage:
            images.append(self.to_rgb[0](x))
        return GeneratorOutput(images=images, attention=attention, mu=mu, logvar=logvar)

    def activation_blocks(self) -> list[nn.Module]:
        return [*self.refinements, *self.to_rgb]


class AttnDCGenerator(AttnGenerator):
    """AttnDCGAN's generator: the same stages, of which only the last one draws."""

    draws_every_stage = False


class AttnGAN(AdversarialSystem):
    """The objective (Xu et al. 2018, section 3): a discriminator for each stage, KL and DAMSM losses for the generator.

    networks: generator, discriminator (of all stages), text_encoder and, where the DAMSM loss has a weight,
    image_encoder.

    All discriminators share one Adam. It computes what one Adam for each would, as they share no parameter.
    """

    @dataclass(frozen=True)
    class Settings(DamsmSettings, AdversarialSettings):
        generator_lr: float = 2e-4
        discriminator_lr: float = 2e-4
        betas: tuple[float, float] = (0.5, 0.999)
        damsm_weight: float | None = 1.0
        damsm_factor: float = 5.0
        gamma1: float = 4.0

    NETWORKS: ClassVar[Mapping[str, type[Network]]] = {"generator": AttnGenerator, "discriminator": AttnDiscriminator}
    DEFAULTS: ClassVar[Mapping[str, Any]] = {"TRAIN.BATCH_SIZE": 20}
    SHOWN: ClassVar[tuple[str, ...]] = ("loss/discriminator", "loss/adversarial", "loss/words", "loss/kl")

    def __init__(self, networks: dict[str, Any], **arguments: Any):
        super().__init__(networks, **arguments)
        self.image_sizes = [stage.image_size for stage in self.discriminator.stage_list()]

    @property
    def discriminator(self) -> AttnDiscriminator:
        return self.networks["discriminator"]

    def logit_pairs(self) -> dict[str, tuple[str, str]]:
        """The pairs of every stage, by the size of its images."""
        sizes = [stage.image_size for stage in self.discriminator.stage_list()]
        return {f"discriminator_{size}": (f"real_{size}", f"fake_{size}") for size in sizes}

    @property
    def controlling_sign(self) -> str:
        return f"sign/real_{self.image_sizes[-1]}"

    def updates(self, batch: Batch, noise: Tensor) -> Iterator[Update]:
        """Discriminators of all stages, then the generator."""
        discriminator = self.discriminator
        text = self.text_encoder(batch.captions, batch.lengths).detach()
        fake = self.generator(noise, text)

        # What each stage's discriminator sees: real and fake images of its size, with the same augmentation at every size.
        augment = self.augmentation_of(batch)
        seen = [
            (stage, augment(batch.images_at(stage.image_size)), augment(images))
            for stage, images in zip(discriminator.stage_list(), fake.images, strict=True)
        ]

        # Discriminators, each at its stage's size: real pairs up; fake images and wrong captions down.
        losses, lecam, stats = [], [], {}
        for stage, real_images, fake_images in seen:
            size = stage.image_size
            loss, logits = discriminator_loss(stage, real_images, fake_images.detach(), text.sentence)
            losses.append(loss)
            lecam += self.lecam_losses(f"discriminator_{size}", logits["real"], logits["fake"]).values()
            stats |= logit_stats({f"{name}_{size}": value for name, value in logits.items()})
        stats = {name: stats[name] for name in stats if name.startswith("logits/") or name in self.observed}
        stats |= self._by_size("discriminator", losses)
        total = {"discriminator": torch.stack(losses).sum()}
        if lecam:
            total["lecam"] = torch.stack(lecam).sum()
        yield Update("discriminator", total, stats)

        # Generator: fake images up at every stage, the condition near N(0, 1), the last image matched to its words.
        with no_parameter_grad(discriminator, *self.encoders()):
            losses = [adversarial_loss(stage, fake_images, text.sentence) for stage, _, fake_images in seen]
            stats = self._by_size("adversarial", losses) | {"sigma_mean": (fake.logvar.detach() / 2).exp().mean()}
            total = {"adversarial": torch.stack(losses).sum(), "kl": kl_to_standard_normal(fake.mu, fake.logvar)}
            total |= self.diversity_losses(fake.images[-1], noise, text)
            if self.settings.whole_damsm_weight > 0:
                damsm = self.damsm_losses(fake.images[-1], text, batch)
                total |= {name: self.settings.whole_damsm_weight * loss for name, loss in damsm.items()}
            yield Update("generator", total, stats | self.augmentation_stats())

    def _by_size(self, name: str, losses: list[Tensor]) -> dict[str, Tensor]:
        """{name in the log: loss} of the single stages."""
        return {f"loss/{name}_{size}": loss.detach() for size, loss in zip(self.image_sizes, losses, strict=True)}


class AttnDCGAN(AttnGAN):
    """The same objective with AttnDCGAN's networks: one discriminator, conditional on the caption only."""

    NETWORKS: ClassVar[Mapping[str, type[Network]]] = {
        "generator": AttnDCGenerator,
        "discriminator": AttnDCDiscriminator,
    }
    DEFAULTS: ClassVar[Mapping[str, Any]] = {**AttnGAN.DEFAULTS, "GAN.B_DCGAN": True}


def discriminator_loss(
    stage: StageDiscriminator, real_images: Tensor, fake_images: Tensor, sentence: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss of one stage's discriminator, its logits by kind of pair).

    real_images, fake_images: (N, 3, H, W) in [-1, 1] at the stage's size, fake ones without a graph.
    sentence: (N, D).
    """
    real, fake = stage.features(real_images), stage.features(fake_images)  # (N, C, 4, 4)

    # With captions. Mismatched pairs: each real image but the last with the caption of the next one.
    logits = {
        "real": stage.logits(real, sentence),
        "fake": stage.logits(fake, sentence),
        "mismatched": stage.logits(real[:-1], sentence[1:]),
    }

    # Without captions, where the stage has a head for it.
    alone = {}
    if stage.has_unconditional_head:
        alone = {"real_alone": stage.unconditional(real), "fake_alone": stage.unconditional(fake)}

    loss = binary_discriminator_loss(*logits.values(), *alone.values())
    return loss, logits | alone


def adversarial_loss(stage: StageDiscriminator, fake_images: Tensor, sentence: Tensor) -> Tensor:
    """One stage's part of G's loss: fake images (N, 3, H, W) up, with their captions (N, D) and without."""
    features = stage.features(fake_images)
    alone = [stage.unconditional(features)] if stage.has_unconditional_head else []
    return binary_generator_loss(stage.logits(features, sentence), *alone)
