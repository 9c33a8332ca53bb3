"""SSA-GAN (Liao et al., CVPR 2022, arXiv 2104.00567): semantic-spatial aware blocks, predicted masks, objective.

Written from the paper and from what is known of the released code's behaviour; where the two differ the released
code is the default, and the paper's form a setting.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miscc.batch import Batch
from miscc.losses import hinge_discriminator_loss, matching_aware_gradient_penalty
from miscc.settings import setting
from models.adversarial import AdversarialSystem, Seen, logit_stats
from models.kernels import batch_norm_before_upsample_2x, masked_affine, upsample_2x
from models.layers import OneWayDiscriminator, affine_head, last_multipliers, num_upsamples
from models.modes import full_precision, no_parameter_grad
from models.projected import ProjectedDiscriminator
from models.settings import (
    AdversarialSettings,
    DamsmSettings,
    DiscriminatorSettings,
    GeneratorSettings,
    PenaltySettings,
)
from models.types import Generator, GeneratorOutput, Network, OptimizerSpec, TextFeatures, Update

CHANNELS = (8, 8, 8, 8, 4, 2, 1)  # multiples of nf after each block at 256 px


class SSCBN(nn.Module):
    """Semantic-spatial condition batch norm: normalise, then scale and shift by the sentence, weighted by the mask.

    Features at half the size of the mask are upsampled (nearest).

    form: "code", x̂·(1 + m·γ(s)) + m·β(s), as in the authors' code and the paper's figure; or "paper",
        m·(γ(s)·x̂ + β(s)), as in its text (eq. 5).
    """

    def __init__(self, channels: int, sentence_dim: int, form: str):
        super().__init__()
        self.form = form
        self.norm = nn.BatchNorm2d(channels, affine=False)

        # γ = β = 0 at first: form "code" starts as a plain batch norm.
        self.gamma = affine_head(sentence_dim, 256, channels, start=0.0)
        self.beta = affine_head(sentence_dim, 256, channels, start=0.0)

    def forward(self, x: Tensor, sentence: Tensor, mask: Tensor) -> Tensor:
        # (N, C, H, W) or (N, C, H/2, W/2), (N, D), (N, 1, H, W) -> (N, C, H, W)
        # Normalise before upsampling: 1/4 of the pixels, the same values. A compiler does better with the plain forms.
        upsamples = x.shape[2:] != mask.shape[2:]
        if upsamples and (self.form == "paper" or torch.compiler.is_compiling()):
            x, upsamples = upsample_2x(x), False
        normalised = batch_norm_before_upsample_2x(self.norm, x) if upsamples else self.norm(x)

        # Scale and shift each channel, (N, C), weighted by the mask, (N, 1, H, W).
        gamma, beta, mask = (value.to(normalised.dtype) for value in (self.gamma(sentence), self.beta(sentence), mask))
        if self.form == "code":
            return masked_affine(normalised, gamma, beta, mask)
        return mask * torch.addcmul(beta[:, :, None, None], normalised, gamma[:, :, None, None])


class SSABlock(nn.Module):
    """out = shortcut(x) + gate · residual(x), where the residual's two SSCBN share one mask.

    Features at half the size of the mask are upsampled (nearest).

    gate: a learned scalar, initially 0.
    mask_predictor: from the output to the next block's mask logits; None in the last block.
    """

    def __init__(self, channels_in: int, channels_out: int, sentence_dim: int, form: str, predicts_mask: bool):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.sscbn1 = SSCBN(channels_in, sentence_dim, form)
        self.sscbn2 = SSCBN(channels_out, sentence_dim, form)
        self.gate = nn.Parameter(torch.zeros(1))
        self.shortcut = nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else nn.Identity()
        self.mask_predictor = mask_predictor(channels_out) if predicts_mask else None

    def forward(self, x: Tensor, sentence: Tensor, mask: Tensor) -> Tensor:
        # (N, C, H, W) or (N, C, H/2, W/2), (N, D), (N, 1, H, W) -> (N, C', H, W)
        residual = self.conv1(F.relu(self.sscbn1(x, sentence, mask), inplace=True))
        residual = self.conv2(F.relu(self.sscbn2(residual, sentence, mask), inplace=True))

        # A 1×1 convolution and nearest upsampling commute: convolved first, it works on 1/4 of the pixels.
        shortcut = self.shortcut(x)
        return (shortcut if x.shape[2:] == mask.shape[2:] else upsample_2x(shortcut)) + self.gate * residual


def mask_predictor(channels: int) -> nn.Sequential:
    """(N, C, H, W) features -> (N, 1, H, W) mask logits."""
    return nn.Sequential(nn.Conv2d(channels, 100, 3, padding=1), nn.BatchNorm2d(100), nn.ReLU(), nn.Conv2d(100, 1, 1))


class SSAGenerator(Generator):
    """noise and sentence -> image, with the mask of every block.

    nf: base number of channels.
    z_dim, sentence_dim: lengths of noise and sentence features.
    image_size: pixels; a power of two from 8 on. ValueError otherwise.
    sscbn: form of the SSCBN, "code" or "paper".
    upsample: "nearest" (the authors' code) or "bilinear" (the paper).
    mask: "predicted", or "ones", without spatial conditioning (an ablation).
    """

    predicts_masks = True

    @dataclass(frozen=True)
    class Settings(GeneratorSettings):
        sscbn: str = setting(
            "GAN.SSCBN",
            "code",
            "form of the SSCBN: as in the authors' code or as in the paper's text",
            ("code", "paper"),
        )
        upsample: str = setting(
            "GAN.UPSAMPLE",
            "nearest",
            "upsampling between blocks: nearest (code) or bilinear (paper)",
            ("nearest", "bilinear"),
        )
        mask: str = setting(
            "GAN.MASK", "predicted", "SSA-GAN's masks; ones: all ones, for ablations", ("predicted", "ones")
        )

    def __init__(self, *arguments: Any, **named: Any):
        super().__init__(*arguments, **named)
        nf, z_dim, image_size = self.settings.nf, self.settings.z_dim, self.settings.image_size
        self.z_dim, self.noise_dim, self.image_size = z_dim, z_dim, image_size

        # Channels before the first block and after each.
        num_blocks = num_upsamples(image_size) + 1
        multipliers = last_multipliers(CHANNELS, num_blocks)
        channels = [nf * multiplier for multiplier in [multipliers[0], *multipliers]]

        # noise -> 4×4 features -> blocks -> image. Each block's output gives the mask of the next.
        self.fc = nn.Linear(z_dim, channels[0] * 4 * 4)
        self.first_mask_predictor = mask_predictor(channels[0])
        self.blocks = nn.ModuleList(
            SSABlock(
                channels[i],
                channels[i + 1],
                self.settings.sentence_dim,
                self.settings.sscbn,
                predicts_mask=i < num_blocks - 1,
            )
            for i in range(num_blocks)
        )
        self.to_rgb = nn.Sequential(
            nn.BatchNorm2d(channels[-1]),
            nn.LeakyReLU(0.2),
            nn.Conv2d(channels[-1], 3, 3, padding=1),
            nn.Tanh(),
        )

    def forward(self, noise: Tensor, text: TextFeatures) -> GeneratorOutput:  # (N, z_dim) -> images (N, 3, H, W)
        x = self.fc(noise).view(noise.shape[0], -1, 4, 4)
        mask_logits = self.first_mask_predictor(x)  # (N, 1, 4, 4)
        masks = []
        for index, block in enumerate(cast(list[SSABlock], self.blocks)):
            # Each block but the first works at twice the size.
            if index > 0:
                x = self._upsample_before_block(x)
                mask_logits = F.interpolate(mask_logits, scale_factor=2, mode="bilinear", align_corners=True)

            # The block, under its mask. Its output gives the next block's mask.
            masks.append(torch.ones_like(mask_logits) if self.settings.mask == "ones" else torch.sigmoid(mask_logits))
            x = block(x, text.sentence, masks[-1])
            mask_logits = block.mask_predictor(x) if block.mask_predictor is not None else mask_logits

        return GeneratorOutput(images=[self.to_rgb(x)], masks=masks)

    def activation_blocks(self) -> list[nn.Module]:
        return list(self.blocks)

    def gates(self) -> list[nn.Parameter]:
        return [block.get_parameter("gate") for block in self.blocks]

    def _upsample_before_block(self, x: Tensor) -> Tensor:
        """Bilinear upsampling by 2. Nearest upsampling is left to the block, which does it faster."""
        if self.settings.upsample == "nearest":
            return x
        return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


class SSAGAN(AdversarialSystem):
    """The objective: hinge with mismatched captions, MA-GP in a step of its own, DAMSM; optionally fine-tuned encoders.

    networks: generator, discriminator, text_encoder and, where the DAMSM loss has a weight, image_encoder.
    """

    @dataclass(frozen=True)
    class Settings(DiscriminatorSettings, PenaltySettings, DamsmSettings, AdversarialSettings):
        penalty_step: str = setting(
            "TRAIN.PENALTY_STEP",
            "separate",
            "the penalty in an optimizer step of its own, or jointly with the hinge",
            ("separate", "joint"),
        )
        finetune_encoders: bool = setting(
            "TRAIN.FINETUNE_ENCODERS", False, "train the encoders along with G and D (SSA-GAN, section 3.4)"
        )
        finetune_lr: float = setting("TRAIN.FINETUNE_LR", 4e-5, "Adam's learning rate of the encoders in fine-tuning")
        finetune_mode: str = setting(
            "TRAIN.FINETUNE_MODE",
            "eval",
            "mode of the encoders in fine-tuning; train: with dropout and batch statistics, as the authors did",
            ("eval", "train"),
        )
        mask_area_weight: float = setting(
            "TRAIN.MASK_AREA",
            0.0,
            "weight of the masks' mean area in G's loss: no larger than the text needs (ours; 0: off)",
        )

        @property
        def usual_damsm_weight(self) -> float:
            return 0.1 if self.finetune_encoders else 0.05

        @property
        def needs_image_encoder(self) -> bool:
            return self.finetune_encoders or self.whole_damsm_weight > 0

    NETWORKS: ClassVar[Mapping[str, type[Network]]] = {
        "generator": SSAGenerator,
        "discriminator": OneWayDiscriminator,
        "projected": ProjectedDiscriminator,
    }
    SHOWN: ClassVar[tuple[str, ...]] = (
        "loss/hinge", "loss/projected_hinge", "loss/adversarial", "loss/words", "logits/real", "logits/fake",
    )  # fmt: skip

    @property
    def discriminator(self) -> OneWayDiscriminator:
        return self.networks["discriminator"]

    def optimizers(self) -> dict[str, OptimizerSpec]:
        groups = super().optimizers()
        if self.settings.finetune_encoders:
            text_encoder, image_encoder = self.text_encoder, self.image_encoder
            trained = [*text_encoder.parameters(), *image_encoder.head_parameters()]
            groups["encoders"] = OptimizerSpec(trained, self.settings.finetune_lr, self.settings.betas)
        return groups

    def train(self) -> None:
        super().train()

        # Mode of the encoders.
        batch_statistics = self.settings.finetune_encoders and self.settings.finetune_mode == "train"
        if "image_encoder" in self.networks:
            self.image_encoder.batch_statistics = batch_statistics
        for encoder in self.encoders():
            encoder.train(batch_statistics)

        # What fine-tuning trains: the whole text encoder, the heads of the image encoder.
        if self.settings.finetune_encoders:
            self.text_encoder.requires_grad_(True)
            for parameter in self.image_encoder.head_parameters():
                parameter.requires_grad_(True)

    def updates(self, batch: Batch, noise: Tensor) -> Iterator[Update]:
        """(Encoders,) discriminator, penalty, (projected discriminator,) generator, in the authors' order."""
        encoded = self.text_encoder(batch.captions, batch.lengths)
        if self.settings.finetune_encoders:
            yield Update("encoders", self.damsm_losses(batch.single_size, encoded, batch), group="encoders")
        text = encoded.detach()
        fake = self.generator(noise, text)

        # Discriminators, in their own steps, on the same augmented images.
        seen = self.seen(batch, fake.images[-1])
        if self.paper_takes_part:
            yield from self._discriminator_updates(seen, text.sentence)
        yield from self.projected_updates(seen, text.sentence)

        # Generator: fake images up, and matched to their words, through networks that take no gradient.
        with no_parameter_grad(*self.discriminators(), *self.encoders()):
            losses = self.adversarial_losses(seen, text.sentence)
            losses |= self.diversity_losses(fake.images[-1], noise, text)
            if self.settings.whole_damsm_weight > 0:
                damsm = self.damsm_losses(fake.images[-1], text, batch)
                losses |= {name: self.settings.whole_damsm_weight * loss for name, loss in damsm.items()}
            if self.settings.mask_area_weight > 0:
                losses["mask_area"] = self.settings.mask_area_weight * mask_area(fake.masks)
            mask_mean = fake.masks[-1].detach().mean()
            yield Update("generator", losses, {"mask_mean": mask_mean, **self.augmentation_stats()})

    def _discriminator_updates(self, seen: Seen, sentence: Tensor) -> Iterator[Update]:
        """Hinge, and every penalty_every steps the penalty, weighted by that number: jointly, or in a step of its own."""
        losses, stats = self._discriminator_losses(seen.real, seen.fake.detach(), sentence)
        is_due, joint = self.settings.penalty_is_due(self.step), self.settings.penalty_step == "joint"
        if joint and is_due:
            losses["penalty"] = self._penalty(seen.real, sentence)
        yield Update("discriminator", losses, stats)
        if is_due and not joint:
            yield Update("discriminator", {"penalty": self._penalty(seen.real, sentence)}, is_penalty=True)

    def _discriminator_losses(
        self, real_images: Tensor, fake_images: Tensor, sentence: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """({"hinge"}, values for the log): images (N, 3, H, W), sentence (N, D), both without a graph."""
        discriminator = self.discriminator
        features = discriminator.features(real_images)  # (N, C, 4, 4)
        real_logits = discriminator.logits(features, sentence)

        # Mismatched pairs: each real image but the last with the caption of the next one.
        mismatched_logits = discriminator.logits(features[:-1], sentence[1:])
        fake_logits = discriminator(fake_images, sentence)
        hinge = hinge_discriminator_loss(real_logits, fake_logits, mismatched_logits)
        logits = {"real": real_logits, "fake": fake_logits, "mismatched": mismatched_logits}
        lecam = self.lecam_losses("discriminator", real_logits, fake_logits)
        return {"hinge": hinge, **lecam}, logit_stats(logits)

    def _penalty(self, real_images: Tensor, sentence: Tensor) -> Tensor:
        """MA-GP of real pairs, in full precision: images (N, 3, H, W), sentence (N, D) -> scalar."""
        real_images = real_images.detach().requires_grad_()
        sentence = sentence.detach().to(real_images.dtype).requires_grad_()
        with full_precision(real_images.device):
            logits = self.discriminator(real_images, sentence)
            return matching_aware_gradient_penalty(logits, real_images, sentence, **self.settings.penalty)


def mask_area(masks: Sequence[Tensor]) -> Tensor:
    """The mean over stages of the share of the image that the masks cover: (N, 1, h, w) in [0, 1] each -> scalar.

    Where G pays for the area in which its text acts, a mask that is one everywhere is no resting place: it keeps what the
    discriminators and DAMSM reward. Ours, not in the paper.
    """
    return torch.stack([mask.mean() for mask in masks]).mean()
