"""The GALIP step in its plain form, to compare with: as the released code goes about it, stock operations.

Real images carry a gradient through the whole ViT, which is not used; captions are computed to the last padding; features are
upsampled before a block's fusion; D's weights take gradients in G's step. Written by us for bench/ alone.
"""

import copy
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.reference import check_plain_form
from miscc.batch import Batch
from models.clip_features import Attention, ClipTextEncoder, TransformerBlock
from models.galip import GALIP, PromptedViT
from models.layers import AffineFusion, ConditionalAffine, FusionBlock
from models.types import TextFeatures, Update


class PlainAttention(Attention):
    """torch's multi-head attention, tokens first, as OpenAI's code calls it."""

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:
        x = x.transpose(0, 1)  # (T, N, C)
        mask = x.new_full((len(x), len(x)), -torch.inf).triu_(1) if causal else None
        attended, _ = F.multi_head_attention_forward(
            x, x, x, x.shape[-1], self.num_heads, self.in_proj_weight, self.in_proj_bias, None, None, False, 0.0,
            self.out_proj.weight, self.out_proj.bias, training=False, need_weights=False, attn_mask=mask,
        )  # fmt: skip
        return attended.transpose(0, 1)


class PlainTransformerBlock(TransformerBlock):
    def forward(self, x: Tensor, causal: bool = False) -> Tensor:
        x = x + self.attn(self.ln_1(x), causal)
        hidden = self.mlp.c_fc(self.ln_2(x))
        return x + self.mlp.c_proj(hidden * torch.sigmoid(1.702 * hidden))


class PlainTextEncoder(ClipTextEncoder):
    """All 77 positions, whatever the captions' lengths."""

    def forward(self, captions: Tensor, lengths: Tensor | None = None) -> TextFeatures:
        padded = F.pad(captions, (0, self.max_words - captions.shape[1]))
        return super().forward(padded, torch.full((len(captions),), self.max_words))


class PlainAffine(ConditionalAffine):
    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        gamma = self.gamma(condition)[:, :, None, None].expand_as(x)
        beta = self.beta(condition)[:, :, None, None].expand_as(x)
        return gamma * x + beta


class PlainFusion(AffineFusion):
    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        for affine in (self.affine0, self.affine1):
            x = F.leaky_relu(affine(x, condition), 0.2)
        return x


class PlainFusionBlock(FusionBlock):
    """Features are upsampled first, and fused at full size."""

    def forward(self, x: Tensor, condition: Tensor, upsample: bool = False, size: int | None = None) -> Tensor:
        if upsample or size is not None:
            x = F.interpolate(x, size=size or 2 * x.shape[-1], mode="nearest")
        residual = self.conv1(self.fusion1(x, condition))
        return self.shortcut(x) + self.conv2(self.fusion2(residual, condition))


PLAIN: dict[type[nn.Module], type[nn.Module]] = {
    Attention: PlainAttention,
    TransformerBlock: PlainTransformerBlock,
    ClipTextEncoder: PlainTextEncoder,
    ConditionalAffine: PlainAffine,
    AffineFusion: PlainFusion,
    FusionBlock: PlainFusionBlock,
}


class PlainGALIP(GALIP):
    """The objective on plain networks: the same updates, without the shortcuts."""

    def updates(self, batch: Batch, noise: Tensor) -> Iterator[Update]:
        generator, discriminator = self.networks["generator"], self.networks["discriminator"]
        image_encoder = self.networks["image_encoder"]
        text = self.networks["text_encoder"](batch.captions, batch.lengths).detach()
        sentence = text.sentence.requires_grad_()

        # D on real pairs, wrong captions and fake images.
        real_maps, _ = image_encoder(batch.single_size.detach().requires_grad_())
        features = discriminator.features(real_maps)
        real_logits = discriminator.logits(features, sentence)
        mismatched_logits = discriminator.logits(features, torch.cat([sentence[1:], sentence[:1]]))
        fake = generator(noise, text.detach()).images[-1]
        fake_maps, fake_codes = image_encoder(fake)
        fake_logits = discriminator([m.detach() for m in fake_maps], sentence)

        # Hinge and penalty in one update.
        gradients = torch.autograd.grad(
            real_logits, (*real_maps, sentence), torch.ones_like(real_logits), create_graph=True, retain_graph=True
        )
        norm = torch.cat([gradient.flatten(1) for gradient in gradients], dim=1).square().sum(dim=1).sqrt()
        hinge = F.relu(1 - real_logits).mean()
        hinge = hinge + (F.relu(1 + fake_logits).mean() + F.relu(1 + mismatched_logits).mean()) / 2
        yield Update("discriminator", {"hinge": hinge, "penalty": 2.0 * norm.pow(6.0).mean()})

        # G: fake images up, and close to their captions in CLIP.
        similarity = F.cosine_similarity(fake_codes, text.sentence).mean()
        adversarial = -discriminator(fake_maps, text.sentence).mean()
        yield Update("generator", {"adversarial": adversarial, "similarity": -4.0 * similarity})


def plain_galip(system: GALIP) -> PlainGALIP:
    """The plain form of a system of ours, on copies of its networks: same settings, same weights. Raises ConfigError."""
    check_plain_form(system, {"betas", "generator_lr", "discriminator_lr"})
    networks = {name: copy.deepcopy(network) for name, network in system.networks.items()}
    plain = PlainGALIP(networks, **vars(system.settings))

    # Copies of a generator share its ViT; here each needs its own.
    vit = system.networks["generator"].vit
    own = PromptedViT(len(vit.class_embedding), len(vit.transformer.resblocks)).to(vit.class_embedding)
    own.load_state_dict(vit.state_dict())
    plain.networks["generator"].vit = own

    # The plain classes add no state, so a copied part becomes plain by taking on the other class.
    for network in plain.networks.values():
        for part in network.modules():
            part.__class__ = PLAIN.get(type(part), type(part))
    plain.train()
    return plain
