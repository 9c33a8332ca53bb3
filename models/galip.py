"""GALIP (Tao et al., CVPR 2023, arXiv 2301.12959): a frozen CLIP inside G and in front of D, and the objective.

Written from the paper and from what is known of the released code's behaviour; where the two differ the released code is
followed: images of CLIP's own 224 pixels, no tanh, pixels scaled twice (a switch), mismatched pairs by rolling the sentences.
Not followed where it only costs: D's step sends no gradient through CLIP, and real images go no further than the last block
that D reads.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miscc.batch import Batch
from miscc.errors import ConfigError
from miscc.losses import hinge_discriminator_loss, hinge_generator_loss, matching_aware_gradient_penalty
from miscc.settings import setting
from models.adversarial import AdversarialSystem, logit_stats
from models.clip_features import ClipImageEncoder, Transformer, to_map
from models.df_gan import CHANNELS
from models.kernels import Conv2d, LeakyReLU
from models.layers import AffineFusion, FusionBlock, at_least_float32, last_multipliers
from models.modes import full_precision, no_parameter_grad
from models.settings import (
    AdversarialSettings,
    ClipSizeSettings,
    ClipWidthSettings,
    NoiseSettings,
    PenaltySettings,
    SentenceSettings,
    SizeSettings,
)
from models.types import Discriminator, Generator, GeneratorOutput, Network, TextFeatures, Update

GRID = 7  # height and width of CLIP's patch features, of G's first features and of what D's head reads
CODE_CHANNELS, MIDDLE_CHANNELS, NUM_MAPPING_BLOCKS = 64, 32, 4
MAPPED_WEIGHT = 0.1  # of the ViT's output, which is added to the bridge features


class MappingBlock(nn.Module):
    """out = x + residual(x), residual = Conv3×3, fusion, Conv3×3, fusion: (N, 64, 7, 7) with a condition (N, D)."""

    def __init__(self, condition_dim: int):
        super().__init__()
        self.conv1 = nn.Conv2d(CODE_CHANNELS, MIDDLE_CHANNELS, 3, padding=1)
        self.conv2 = nn.Conv2d(MIDDLE_CHANNELS, CODE_CHANNELS, 3, padding=1)
        self.fusion1 = AffineFusion(MIDDLE_CHANNELS, condition_dim, MIDDLE_CHANNELS)
        self.fusion2 = AffineFusion(CODE_CHANNELS, condition_dim, CODE_CHANNELS)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        residual = self.fusion1(self.conv1(x), condition)
        return x + self.fusion2(self.conv2(residual), condition)


class PromptedViT(nn.Module):
    """CLIP's ViT without its patch embedding: bridge features take the patches' place, prompts stand behind them.

    Its tensors are buffers, since nothing trains them: no optimizer, average or gradient sees them, and copies of a
    generator share them. They are zeros until `fill` or a state dict gives them values.
    """

    def __init__(self, width: int, num_blocks: int):
        super().__init__()
        with torch.device("meta"):  # initial values of 85 M weights would take seconds
            self.class_embedding = nn.Parameter(torch.empty(width))
            self.positional_embedding = nn.Parameter(torch.empty(GRID**2 + 1, width))
            self.ln_pre = nn.LayerNorm(width)
            self.transformer = Transformer(width, num_blocks, "quick_gelu")
        for module in self.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                delattr(module, name)
                module.register_buffer(name, torch.zeros(parameter.shape))

    def __deepcopy__(self, memo: dict) -> "PromptedViT":
        return self

    @property
    def is_filled(self) -> bool:
        scale = self.ln_pre.weight  # zeros until the ViT is filled
        return not scale.is_meta and bool(scale.any())

    def fill(self, encoder: ClipImageEncoder) -> None:
        """Take an image tower's weights, without a copy: they are in memory and in a checkpoint once. Raises ValueError."""
        tensors = encoder.state_dict()
        for name, own in self.state_dict().items():
            if name not in tensors or tensors[name].shape != own.shape:
                raise ValueError(f"GALIP's generator was made for another CLIP than this one ({name} differs)")
            module, _, last = name.rpartition(".")
            setattr(self.get_submodule(module), last, tensors[name])

    def equals(self, encoder: ClipImageEncoder) -> bool:
        """Whether these are an image tower's weights."""
        tensors = encoder.state_dict()
        return all(name in tensors and torch.equal(tensors[name], own) for name, own in self.state_dict().items())

    def forward(self, bridge: Tensor, prompts: Tensor) -> Tensor:
        """bridge (N, C, 7, 7), prompts (N, P, C) -> patch features (N, C, 7, 7).

        Blocks are counted from 0. Blocks 1 to P get a prompt each, as one more token that is dropped after the block.
        """
        # Tokens: the class token, then the bridge features as patches.
        class_token = self.class_embedding.to(bridge.dtype).expand(bridge.shape[0], 1, -1)
        x = torch.cat([class_token, bridge.flatten(2).transpose(1, 2)], dim=1)  # (N, 50, C)
        x = self.ln_pre(x + self.positional_embedding)

        for index, block in enumerate(self.transformer.resblocks):
            if 1 <= index <= prompts.shape[1]:
                prompt = prompts[:, index - 1, None].to(x.dtype)  # (N, 1, C)
                x = block(torch.cat([x, prompt], dim=1))[:, :-1]
            else:
                x = block(x)
        return to_map(x[:, 1:], GRID)


class GALIPGenerator(Generator):
    """noise and sentence -> image: bridge features, a frozen ViT with prompts on top of them, then fusion blocks of growing size.

    nf: base number of channels.
    z_dim, sentence_dim: lengths of noise and sentence features.
    image_size: pixels, as CLIP reads; above 8. ValueError otherwise.
    width, num_blocks: of CLIP's ViT, which must cut images into 7×7 patches.
    num_prompts: blocks that get a prompt.

    Without a tanh: the images may leave [-1, 1]; values outside are clamped when images become uint8.
    """

    slow_start = True  # a state dict fills all its tensors

    @dataclass(frozen=True)
    class Settings(ClipSizeSettings, NoiseSettings, SentenceSettings, SizeSettings):
        image_size: int = 224
        sentence_dim: int = 512
        num_prompts: int = 8

    def __init__(self, *arguments: Any, **named: Any):
        super().__init__(*arguments, **named)
        nf, width, num_prompts = self.settings.nf, self.settings.width, self.settings.num_prompts
        z_dim = self.z_dim = self.noise_dim = self.settings.z_dim
        image_size = self.image_size = self.settings.image_size
        condition_dim = z_dim + self.settings.sentence_dim

        # The size after each fusion block; channels before the first block and after each.
        self.sizes = block_sizes(image_size)
        channels = [nf * multiplier for multiplier in last_multipliers(CHANNELS, len(self.sizes) + 1)]

        # noise and sentence -> bridge features, which take the place of the ViT's patches, and its prompts.
        self.fc = nn.Linear(z_dim, CODE_CHANNELS * GRID**2)
        self.mapping_blocks = nn.ModuleList(MappingBlock(condition_dim) for _ in range(NUM_MAPPING_BLOCKS))
        self.bridge = nn.Conv2d(CODE_CHANNELS, width, 5, padding=2)
        self.prompt = nn.Linear(condition_dim, num_prompts * width)
        self.vit = PromptedViT(width, self.settings.num_blocks)

        # Bridge features and the ViT's output -> image.
        self.adapter = nn.Conv2d(width, channels[0], 5, padding=2)
        self.blocks = nn.ModuleList(
            FusionBlock(a, b, condition_dim) for a, b in zip(channels, channels[1:], strict=False)
        )
        self.to_rgb = nn.Sequential(nn.LeakyReLU(0.2), nn.Conv2d(channels[-1], 3, 3, padding=1))

    def activation_blocks(self) -> list[nn.Module]:
        return [*self.mapping_blocks, *self.blocks]

    def bridge_features(self, noise: Tensor, condition: Tensor) -> Tensor:  # (N, z_dim), (N, D) -> (N, width, 7, 7)
        x = self.fc(noise).view(noise.shape[0], CODE_CHANNELS, GRID, GRID)
        for block in self.mapping_blocks:
            x = block(x, condition)
        return self.bridge(x)

    def prompts(self, condition: Tensor) -> Tensor:  # (N, D) -> (N, num_prompts, width)
        return self.prompt(condition).unflatten(1, (self.settings.num_prompts, -1))

    def forward(self, noise: Tensor, text: TextFeatures) -> GeneratorOutput:  # (N, z_dim) -> images (N, 3, H, W)
        condition = torch.cat([noise, text.sentence], dim=1)  # (N, z_dim + sentence_dim)
        bridge = self.bridge_features(noise, condition)
        mapped = self.vit(bridge, self.prompts(condition))
        x = self.adapter(bridge + MAPPED_WEIGHT * mapped)  # (N, C, 7, 7)
        for block, size in zip(self.blocks, self.sizes, strict=True):
            x = block(x, condition, size=size)
        return GeneratorOutput(images=[self.to_rgb(x)])


class PatchBlock(nn.Module):
    """shortcut(x) + gate·residual(x), and extra_gate·extra where a further map comes in; the gates are 0 at the start."""

    def __init__(self, channels_in: int, channels_out: int, takes_extra: bool):
        super().__init__()
        self.residual = nn.Sequential(
            Conv2d(channels_in, channels_out, 3, padding=1, bias=False),
            LeakyReLU(),
            Conv2d(channels_out, channels_out, 3, padding=1, bias=False),
            LeakyReLU(),
        )
        self.shortcut = nn.Identity() if takes_extra else Conv2d(channels_in, channels_out, 1)
        self.gate = nn.Parameter(torch.zeros(1))
        self.extra_gate = nn.Parameter(torch.zeros(1)) if takes_extra else None

    def forward(self, x: Tensor, extra: Tensor | None = None) -> Tensor:  # (N, C, 7, 7) -> (N, C', 7, 7)
        out = self.shortcut(x) + self.gate * self.residual(x)
        return out if extra is None or self.extra_gate is None else out + self.extra_gate * extra


class GALIPDiscriminator(Discriminator):
    """CLIP's patch features of an image after several blocks, and the sentence, give one logit. CLIP itself is not in here.

    width: channels of the maps.
    num_maps: how many there are.
    channels: of the features that are joined with the sentence.
    sentence_dim: length of the sentence features.
    head_channels: channels within the head.
    """

    compiled_methods = ("features", "logits")

    @dataclass(frozen=True)
    class Settings(SentenceSettings, ClipWidthSettings):
        sentence_dim: int = 512
        num_maps: int = 3
        channels: int = 512
        head_channels: int = 128

    def __init__(self, *arguments: Any, **named: Any):
        super().__init__(*arguments, **named)
        width, num_maps, channels = self.settings.width, self.settings.num_maps, self.settings.channels
        sentence_dim, head_channels = self.settings.sentence_dim, self.settings.head_channels
        self.blocks = nn.ModuleList(PatchBlock(width, width, takes_extra=True) for _ in range(num_maps - 1))
        self.last = PatchBlock(width, channels, takes_extra=False)
        self.head = nn.Sequential(
            Conv2d(channels + sentence_dim, head_channels, 4, bias=False),
            LeakyReLU(),
            Conv2d(head_channels, 1, GRID - 3, bias=False),
        )

    def gates(self) -> list[nn.Parameter]:
        extra_gates = [block.get_parameter("extra_gate") for block in self.blocks]
        return [*(block.get_parameter("gate") for block in self.blocks), *extra_gates, self.last.gate]

    def features(self, maps: Sequence[Tensor]) -> Tensor:  # num_maps times (N, width, 7, 7) -> (N, channels, 7, 7)
        x = maps[0]
        for block, extra in zip(self.blocks, maps[1:], strict=True):
            x = block(x, extra)
        return self.last(x)

    def logits(self, features: Tensor, sentence: Tensor) -> Tensor:  # (N, channels, 7, 7), (N, D) -> (N,)
        replicated = sentence[:, :, None, None].expand(-1, -1, GRID, GRID)
        return self.head(torch.cat([features, replicated], dim=1)).flatten()

    def forward(self, maps: Sequence[Tensor], sentence: Tensor) -> Tensor:  # as `features` and `logits` -> (N,)
        return self.logits(self.features(maps), sentence)


def block_sizes(image_size: int) -> list[int]:
    """The sizes after G's blocks: powers of two from 8 on, and the image's own at the end. Raises ValueError."""
    if image_size <= 8:
        raise ValueError(f"GALIP's images must be larger than 8 pixels, not {image_size}")
    return [2**power for power in range(3, (image_size - 1).bit_length())] + [image_size]


class GALIP(AdversarialSystem):
    """The objective: matching-aware hinge and MA-GP on CLIP's features in one step of D; hinge and CLIP similarity for G.

    networks: generator, discriminator, text_encoder (CLIP's, frozen), image_encoder (CLIP's, frozen).
    """

    SHOWN: ClassVar[tuple[str, ...]] = ("loss/hinge", "loss/penalty", "loss/adversarial", "similarity", "logits/real",
                                        "logits/fake")  # fmt: skip

    @dataclass(frozen=True)
    class Settings(PenaltySettings, AdversarialSettings):
        encoders_with_images: ClassVar[str] = "clip"

        similarity_weight: float = setting(
            "GALIP.SIMILARITY_WEIGHT", 4.0, "weight of the cosine of a fake image's CLIP embedding and its sentence"
        )
        real_size: int = setting(
            "GALIP.REAL_SIZE",
            256,
            "pixels of the real images, which CLIP reads scaled by nearest neighbours; 0: TREE.BASE_SIZE",
            maximum=8192,
        )

        @property
        def needs_image_encoder(self) -> bool:
            return True

    NETWORKS: ClassVar[Mapping[str, type[Network]]] = {"generator": GALIPGenerator, "discriminator": GALIPDiscriminator}
    DEFAULTS: ClassVar[Mapping[str, Any]] = {"TEXT.ENCODER": "clip", "TRAIN.BATCH_SIZE": 16, "TRAIN.MAX_EPOCH": 1502}

    def __init__(self, networks: dict[str, Any], **arguments: Any):
        super().__init__(networks, **arguments)
        generator, image_encoder = self.generator, self.image_encoder
        self.image_sizes = [self.settings.real_size or generator.image_size]

        # A ViT without values, or with the encoder's, shares the encoder's tensors: they are in memory once.
        if not generator.vit.is_filled or generator.vit.equals(image_encoder):
            try:
                generator.vit.fill(image_encoder)
            except ValueError as error:
                raise ConfigError(f"CLIP.WEIGHTS: {error}; set CLIP.WIDTH and CLIP.BLOCKS to its sizes") from None
        if image_encoder.image_size != generator.image_size:
            raise ConfigError(
                f"TREE.BASE_SIZE: is {generator.image_size}, but this CLIP reads images of {image_encoder.image_size} pixels; "
                f"set it to {image_encoder.image_size}"
            )

    @property
    def generator(self) -> GALIPGenerator:
        return self.networks["generator"]

    @property
    def image_encoder(self) -> ClipImageEncoder:
        return self.networks["image_encoder"]

    @property
    def discriminator(self) -> GALIPDiscriminator:
        return self.networks["discriminator"]

    def updates(self, batch: Batch, noise: Tensor) -> Iterator[Update]:
        """Discriminator, then generator."""
        generator, discriminator = self.generator, self.discriminator
        image_encoder = self.image_encoder

        # What CLIP sees. The fake images' features serve both steps: CLIP does not change between them.
        text = self.text_encoder(batch.captions, batch.lengths).detach()
        fake_images = generator(noise, text).images[-1]
        seen = self.seen(batch, fake_images)
        fake_maps, fake_codes = image_encoder(fake_images)
        with torch.no_grad():
            real_maps = image_encoder.patches(seen.real)

        # D alone sees augmented images; captions are matched to the images themselves.
        if self.settings.augment_kinds:
            fake_maps = image_encoder.patches(seen.fake)

        # D: real pairs up; fake images and wrong captions down; and the penalty.
        losses, stats = self.discriminator_losses(real_maps, [m.detach() for m in fake_maps], text.sentence)
        yield Update("discriminator", losses, stats)

        # G: fake images up, and close to their captions in CLIP.
        with no_parameter_grad(discriminator):
            adversarial = hinge_generator_loss(discriminator(fake_maps, text.sentence))
            similarity = F.cosine_similarity(at_least_float32(fake_codes), at_least_float32(text.sentence)).mean()
            losses = {"adversarial": adversarial, "similarity": -self.settings.similarity_weight * similarity}
            losses |= self.diversity_losses(fake_images, noise, text)
            yield Update("generator", losses, {"similarity": similarity.detach(), **self.augmentation_stats()})

    def discriminator_losses(
        self, real_maps: Sequence[Tensor], fake_maps: Sequence[Tensor], sentence: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """({"hinge", "penalty"}, values for the log): CLIP's maps (N, C, 7, 7) and sentences (N, D), all without a graph.

        The penalty is taken for the maps and the sentence, not for pixels, and shares its forward pass with the hinge.
        """
        # The penalty's gradients are taken for these two, in full precision.
        discriminator = self.discriminator
        maps = at_least_float32(torch.stack(list(real_maps), dim=1).detach()).requires_grad_()  # (N, maps, C, 7, 7)
        own = at_least_float32(sentence.detach()).requires_grad_()
        with full_precision(maps.device):
            features = discriminator.features(maps.unbind(dim=1))
            real_logits = discriminator.logits(features, own)
            penalty = {}
            if self.settings.penalty_is_due(self.step):
                value = matching_aware_gradient_penalty(real_logits, maps, own, **self.settings.penalty)
                penalty = {"penalty": value}

        # Wrong captions and fake images, for the hinge alone.
        mismatched_logits = discriminator.logits(features, sentence.roll(-1, dims=0))
        fake_logits = discriminator(fake_maps, sentence)
        losses = {"hinge": hinge_discriminator_loss(real_logits, fake_logits, mismatched_logits)} | penalty
        losses |= self.lecam_losses("discriminator", real_logits, fake_logits)
        logits = {"real": real_logits, "fake": fake_logits, "mismatched": mismatched_logits}
        return losses, logit_stats(logits)
