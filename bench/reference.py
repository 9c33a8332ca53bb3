"""The SSA-GAN step in its plain form, to compare with: the papers' formulas in the papers' order, stock operations.

Convolution, then pooling; torch's leaky_relu and avg_pool2d; a loop over the captions in the word loss; D's weights take
gradients in G's step; Inception in the default layout. Written by us for bench/ alone. The modules hold the same names
as models/, so that weights pass from one to the other and a test can show that losses and gradients are the same.
"""

import copy
from collections.abc import Collection, Iterator
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from miscc.batch import Batch
from miscc.errors import ConfigError
from miscc.settings import settings_of
from models.damsm import InceptionEncoder
from models.kernels import Conv2d
from models.layers import DownBlock, OneWayDiscriminator
from models.ssa_gan import SSAGAN, SSCBN, SSAGenerator
from models.types import System, TextFeatures, Update

Module = TypeVar("Module", bound=nn.Module)

# The settings of the objective that PlainSSAGAN computes with.
SETTINGS_OF_PLAIN_FORM = {"betas", "generator_lr", "discriminator_lr", "gamma1", "gamma2", "gamma3", "damsm_weight",
                          "damsm_factor", "penalty_weight", "penalty_power"}  # fmt: skip


class PlainSSCBN(SSCBN):
    """x̂·(1 + m·γ) + m·β, as it is written: scale and shift are spread over the image first."""

    def forward(self, x: Tensor, sentence: Tensor, mask: Tensor) -> Tensor:
        normalised = self.norm(x)
        gamma = self.gamma(sentence)[:, :, None, None].expand_as(x)
        beta = self.beta(sentence)[:, :, None, None].expand_as(x)
        if self.form == "paper":
            return mask * (gamma * normalised + beta)
        return normalised * (1 + mask * gamma) + mask * beta


class PlainDownBlock(DownBlock):
    """The shortcut's convolution at full size, then pooling."""

    def forward(self, x: Tensor) -> Tensor:
        residual = F.leaky_relu(self.residual[0](x), 0.2)
        residual = F.leaky_relu(self.residual[2](residual), 0.2)
        shortcut = self.shortcut(x) if self.changes_channels else x
        return F.avg_pool2d(shortcut, 2) + self.gate * residual


class PlainDiscriminator(OneWayDiscriminator):
    def logits(self, features: Tensor, sentence: Tensor) -> Tensor:
        replicated = sentence.view(len(sentence), -1, 1, 1).repeat(1, 1, 4, 4)
        hidden = F.leaky_relu(self.head[0](torch.cat([features, replicated], dim=1)), 0.2)
        return self.head[2](hidden).flatten()


class PlainGenerator(SSAGenerator):
    """Features are upsampled before they go into a block."""

    def _upsample_before_block(self, x: Tensor) -> Tensor:
        if self.settings.upsample == "nearest":
            return F.interpolate(x, scale_factor=2, mode="nearest")
        return super()._upsample_before_block(x)


class PlainInceptionEncoder(InceptionEncoder):
    """Inception in the layout that its images come in."""

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        trunk = self.trunk
        x = F.interpolate(images, size=(299, 299), mode="bilinear", align_corners=False)
        for layer in (trunk.Conv2d_1a_3x3, trunk.Conv2d_2a_3x3, trunk.Conv2d_2b_3x3):
            x = layer(x)
        x = F.max_pool2d(x, kernel_size=3, stride=2)
        x = trunk.Conv2d_4a_3x3(trunk.Conv2d_3b_1x1(x))
        x = F.max_pool2d(x, kernel_size=3, stride=2)
        for layer in (trunk.Mixed_5b, trunk.Mixed_5c, trunk.Mixed_5d):
            x = layer(x)
        for layer in (trunk.Mixed_6a, trunk.Mixed_6b, trunk.Mixed_6c, trunk.Mixed_6d, trunk.Mixed_6e):
            x = layer(x)
        regions = self.region_head(x)
        for layer in (trunk.Mixed_7a, trunk.Mixed_7b, trunk.Mixed_7c):
            x = layer(x)
        return regions, self.code_head(F.avg_pool2d(x, kernel_size=8).flatten(1))


PLAIN: dict[type[nn.Module], type[nn.Module]] = {
    Conv2d: nn.Conv2d,
    SSCBN: PlainSSCBN,
    SSAGenerator: PlainGenerator,
    DownBlock: PlainDownBlock,
    OneWayDiscriminator: PlainDiscriminator,
    InceptionEncoder: PlainInceptionEncoder,
}


def plain_copy(module: Module) -> Module:
    """A copy of a network of ours, with its weights, whose parts compute in the plain form.

    The plain classes add no state, so a copied part becomes plain by taking on the other class.
    """
    copied = copy.deepcopy(module)
    for part in copied.modules():
        if parametrize.is_parametrized(part):
            raise ConfigError("--reference: there is no plain form of spectral normalisation; leave USE_SN off")
        part.__class__ = PLAIN.get(type(part), type(part))
    return copied


def plain_word_loss(
    regions: Tensor, words: Tensor, lengths: Tensor, class_ids: Tensor, gamma1: float, gamma2: float, gamma3: float
) -> tuple[Tensor, Tensor]:
    """DAMSM at word level (Xu et al. 2018, eq. 7-12): a loop over the captions, all images at a time."""
    columns = []
    for number, length in enumerate(lengths.tolist()):
        # One caption against all images.
        repeated = words[number, :, :length].expand(len(regions), -1, -1)  # (N, D, T)
        flat = regions.flatten(2)  # (N, D, R)
        scores = torch.bmm(repeated.transpose(1, 2), flat).softmax(dim=1)
        attention = (gamma1 * scores).softmax(dim=2)
        contexts = torch.bmm(flat, attention.transpose(1, 2))  # (N, D, T)
        relevance = F.cosine_similarity(contexts, repeated, dim=1)
        columns.append(torch.log(torch.exp(gamma2 * relevance).sum(dim=1)))
    return plain_matching_loss(gamma3 * torch.stack(columns, dim=1), class_ids)


def released_word_loss(
    regions: Tensor, words: Tensor, lengths: Tensor, class_ids: Tensor, gamma1: float, gamma2: float, gamma3: float
) -> tuple[Tensor, Tensor]:
    """The same loop with the data laid out as the released programs have it: a caption's words repeated for every image,
    regions before words, a copy for each transposition."""
    number_of_images, columns = len(regions), []
    flat = regions.flatten(2)
    for number, length in enumerate(lengths.tolist()):
        repeated = words[number : number + 1, :, :length].repeat(number_of_images, 1, 1)  # (N, D, T)

        # Softmax over words, then over regions, each on a copy of its own.
        scores = torch.bmm(flat.transpose(1, 2).contiguous(), repeated)  # (N, R, T)
        over_words = scores.view(-1, length).softmax(dim=1).view_as(scores)
        over_regions = (gamma1 * over_words.transpose(1, 2).contiguous().flatten(0, 1)).softmax(dim=1)
        attention = over_regions.view(number_of_images, length, -1).transpose(1, 2).contiguous()
        contexts = torch.bmm(flat, attention)  # (N, D, T)
        pairs = [part.transpose(1, 2).contiguous().flatten(0, 1) for part in (contexts, repeated)]
        relevance = F.cosine_similarity(*pairs, dim=1).view(number_of_images, length)
        columns.append(torch.log(torch.exp(gamma2 * relevance).sum(dim=1, keepdim=True)))
    return plain_matching_loss(gamma3 * torch.cat(columns, dim=1), class_ids)


def plain_sentence_loss(code: Tensor, sentence: Tensor, class_ids: Tensor, gamma3: float) -> tuple[Tensor, Tensor]:
    """DAMSM at sentence level (eq. 13)."""
    norms = code.norm(dim=1)[:, None] * sentence.norm(dim=1)[None, :]
    return plain_matching_loss(gamma3 * (code @ sentence.T) / norms.clamp(min=1e-8), class_ids)


def plain_matching_loss(similarity: Tensor, class_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropies along both sides; other samples of one class are masked out."""
    same = (class_ids[:, None] == class_ids[None, :]).fill_diagonal_(False)
    similarity = similarity.masked_fill(same, -torch.inf)

    # The own caption of each image, and the own image of each caption.
    own = torch.arange(len(similarity), device=similarity.device)
    return F.cross_entropy(similarity, own), F.cross_entropy(similarity.T, own)


class PlainSSAGAN(SSAGAN):
    """The objective on plain networks: the same updates, without the shortcuts."""

    def updates(self, batch: Batch, noise: Tensor) -> Iterator[Update]:
        generator, discriminator = self.networks["generator"], self.networks["discriminator"]
        images = batch.single_size
        text = self.networks["text_encoder"](batch.captions, batch.lengths).detach()
        sentence = text.sentence
        fake = generator(noise, text).images[-1]

        # D: real pairs up; fake images and wrong captions down.
        features = discriminator.features(images)
        real_logits = discriminator.logits(features, sentence)
        mismatched_logits = discriminator.logits(features[:-1], sentence[1:])
        fake_logits = discriminator.logits(discriminator.features(fake.detach()), sentence)
        hinge = F.relu(1 - real_logits).mean()
        hinge = hinge + (F.relu(1 + fake_logits).mean() + F.relu(1 + mismatched_logits).mean()) / 2
        yield Update("discriminator", {"hinge": hinge})

        # D: the gradient penalty, an update of its own.
        yield Update("discriminator", {"penalty": self._plain_penalty(images, sentence)}, is_penalty=True)

        # G: fake images up, and DAMSM.
        losses = {"adversarial": -discriminator.logits(discriminator.features(fake), sentence).mean()}
        if (weight := self.settings.whole_damsm_weight) > 0:
            losses |= {name: weight * loss for name, loss in self.damsm_losses(fake, text, batch).items()}
        yield Update("generator", losses)

    def _plain_penalty(self, images: Tensor, sentence: Tensor) -> Tensor:
        """2·E‖(∂D/∂x, ∂D/∂s)‖⁶ as published: the norm, then its power."""
        images, sentence = images.detach().requires_grad_(), sentence.detach().requires_grad_()
        logits = self.networks["discriminator"](images, sentence)
        gradients = torch.autograd.grad(
            logits, (images, sentence), torch.ones_like(logits), create_graph=True, retain_graph=True
        )

        # The sixth power of the norm, by way of its root.
        flat = torch.cat([gradient.flatten(1) for gradient in gradients], dim=1)
        norm = flat.square().sum(dim=1).sqrt()
        return self.settings.penalty_weight * norm.pow(self.settings.penalty_power).mean()

    def damsm_losses(self, images: Tensor, text: TextFeatures, batch: Batch) -> dict[str, Tensor]:
        regions, code = self.networks["image_encoder"](images)

        # Both levels, each in both directions.
        words = plain_word_loss(regions, text.words, batch.lengths, batch.class_ids, **self.settings.gammas)
        sentence = plain_sentence_loss(code, text.sentence, batch.class_ids, self.settings.gamma3)
        return {"words": words[0] + words[1], "sentence": sentence[0] + sentence[1]}


def check_plain_form(system: System, computed: Collection[str]) -> None:
    """Raises ConfigError where the settings turn on a loss that the plain form does not have: a ratio would mean nothing.

    computed: fields of the objective's settings that the plain form computes with.
    """
    for name, one in settings_of(type(system).Settings).items():
        if name not in computed and getattr(system.settings, name) != one.default:
            raise ConfigError(f"{one.key}: has no plain form to compare with; leave --reference out, or the key")


def plain_system(system: SSAGAN) -> PlainSSAGAN:
    """The plain form of a system of ours, on copies of its networks: same settings, same weights. Raises ConfigError."""
    check_plain_form(system, SETTINGS_OF_PLAIN_FORM)
    networks = {name: plain_copy(network) for name, network in system.networks.items()}
    plain = PlainSSAGAN(networks, **vars(system.settings))
    plain.train()
    return plain
