"""CLIP (Radford et al. 2021, arXiv 2103.00020): its ViT image tower and its text tower behind one small interface.

The towers are ours, with the names that OpenAI's files give their tensors, and not a library's: GALIP puts prompt tokens between
the blocks of the ViT inside its generator, and its discriminator reads the features after single blocks and needs no
others. Neither transformers' CLIPModel nor open_clip offers that without reaching into their layers, whose signatures
change between versions; and transformers cannot read OpenAI's files, nor open_clip Hugging Face's. models/clip_files.py
reads all three; the tokenizer is miscc/byte_pairs.py.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miscc.errors import CheckpointError, ConfigError
from models.types import CaptionEncoder, ImageEncoder, TextFeatures

HEAD_DIM = 64  # channels of an attention head in all of OpenAI's CLIPs
LAYERS = (1, 4, 8)  # blocks after which GALIP's discriminator reads the ViT-B/32, counted from 0
MEAN = (0.48145466, 0.4578275, 0.40821073)  # of the pixels that CLIP was trained on, in [0, 1]
DEVIATION = (0.26862954, 0.26130258, 0.27577711)
MOST_UNTRAINED = 1 << 29  # values of an untrained CLIP at most; ViT-L/14 has 428 M, those of our checks 0.5 M


def quick_gelu(x: Tensor) -> Tensor:
    """x · sigmoid(1.702 x), OpenAI's approximation of GELU; as a SiLU, which keeps one tensor for backward, not three."""
    return F.silu(1.702 * x) / 1.702


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"quick_gelu": quick_gelu, "gelu": F.gelu}


class Attention(nn.Module):
    """Multi-head self-attention; its tensors are named as those of nn.MultiheadAttention."""

    def __init__(self, width: int, num_heads: int = 0):
        super().__init__()
        self.num_heads = num_heads or max(1, width // HEAD_DIM)
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:  # (N, T, C) -> (N, T, C)
        projected = F.linear(x, self.in_proj_weight, self.in_proj_bias)  # (N, T, 3C)
        query, key, value = projected.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (N, heads, T, c)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=causal)
        return self.out_proj(attended.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Linear layer, activation, linear layer, each token by itself."""

    def __init__(self, width: int, inner: int, activation: str):
        super().__init__()
        self.c_fc = nn.Linear(width, inner)
        self.c_proj = nn.Linear(inner, width)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:  # (N, T, C) -> (N, T, C)
        return self.c_proj(self.activation(self.c_fc(x)))


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)). num_heads 0: width/64; mlp_width 0: four times the width."""

    def __init__(self, width: int, activation: str, num_heads: int = 0, mlp_width: int = 0):
        super().__init__()
        inner = mlp_width or 4 * width
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, num_heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = MLP(width, inner, activation)

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:  # (N, T, C) -> (N, T, C)
        x = x + self.attn(self.ln_1(x), causal)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """A stack of blocks, which callers run one by one."""

    def __init__(self, width: int, num_blocks: int, activation: str, num_heads: int = 0, mlp_width: int = 0):
        super().__init__()
        self.resblocks = nn.ModuleList(
            TransformerBlock(width, activation, num_heads, mlp_width) for _ in range(num_blocks)
        )


class ClipImageEncoder(ImageEncoder):
    """CLIP's ViT. It computes the same in training and in eval mode; the caller must freeze it before a training.

    image_size: pixels; images of other sizes are resized to it.
    patch_size: pixels, height and width of the patch behind a token.
    width, num_blocks, num_heads, mlp_width: of the Transformer, see TransformerBlock.
    text_dim: length of the embedding.
    layers: blocks after which patch features are read, counted from 0.
    activation: quick_gelu (OpenAI's weights) or gelu.
    scaled_twice: GALIP's own scaling of pixels, see `pixels`.
    """

    slow_start = True  # a state dict fills all its tensors
    compiled_methods = ("forward", "patches")

    @dataclass(frozen=True)
    class Settings:
        image_size: int = 224
        patch_size: int = 32
        width: int = 768
        num_blocks: int = 12
        text_dim: int = 512
        layers: Sequence[int] = LAYERS
        activation: str = "quick_gelu"
        scaled_twice: bool = False
        num_heads: int = 0
        mlp_width: int = 0

    def __init__(self, *arguments: Any, **named: Any):
        super().__init__(*arguments, **named)
        image_size, patch_size, width = self.settings.image_size, self.settings.patch_size, self.settings.width
        self.image_size, self.layers = image_size, tuple(self.settings.layers)
        self.grid_size = image_size // patch_size

        # In the order of the forward pass: patches, class token, positions, blocks, projection.
        self.conv1 = nn.Conv2d(3, width, patch_size, stride=patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros(self.grid_size**2 + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = _transformer(self.settings)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.zeros(width, self.settings.text_dim))

    def pixels(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) in [-1, 1] -> (N, 3, image_size, image_size), as CLIP was trained: [0, 1], then mean and deviation.

        Another size is resized to image_size by nearest neighbours, as GALIP does with real images. With scaled_twice the
        mapping from [-1, 1] to [0, 1] is applied twice, as in GALIP's released code, whose weights were trained with that:
        CLIP then sees [1/2, 1].
        """
        # To CLIP's size and range.
        if images.shape[-1] != self.image_size:
            images = F.interpolate(images, size=self.image_size, mode="nearest")
        scaled = images / 4 + 0.75 if self.settings.scaled_twice else images / 2 + 0.5

        # Channel by channel with plain numbers: a tensor of constants would be copied to a GPU at every call.
        channels = zip(scaled.unbind(dim=1), MEAN, DEVIATION, strict=True)
        return torch.stack([(channel - mean) / deviation for channel, mean, deviation in channels], dim=1)

    def tokens(self, images: Tensor) -> Tensor:  # (N, 3, H, W) -> (N, 1 + patches, width): what the first block reads
        patches = self.conv1(self.pixels(images)).flatten(2).transpose(1, 2)
        class_token = self.class_embedding.to(patches.dtype).expand(patches.shape[0], 1, -1)
        return self.ln_pre(torch.cat([class_token, patches], dim=1) + self.positional_embedding)

    def patches(self, images: Tensor) -> list[Tensor]:
        """(N, 3, H, W) in [-1, 1] -> patch features (N, width, grid, grid) after each of `layers`; later blocks are left out."""
        return self._through(images, max(self.layers) + 1)[0]

    def forward(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """(N, 3, H, W) in [-1, 1] -> the same patch features, and the embedding (N, text_dim), not normalised."""
        maps, x = self._through(images, len(self.transformer.resblocks))
        return maps, self.ln_post(x[:, 0]) @ self.proj

    def _through(self, images: Tensor, num_blocks: int) -> tuple[list[Tensor], Tensor]:
        # Token 0 is the class token, which has no place in a map.
        x, maps = self.tokens(images), []
        for index, block in enumerate(self.transformer.resblocks[:num_blocks]):
            x = block(x)
            if index in self.layers:
                maps.append(to_map(x[:, 1:], self.grid_size))
        return maps, x


class ClipTextEncoder(CaptionEncoder):
    """CLIP's text tower. A caption's features are those of its last token, `<|endoftext|>`, the vocabulary's largest index.

    vocabulary_size: byte-pair tokens.
    max_words: tokens of a caption at most.
    width, num_blocks, num_heads, mlp_width: of the Transformer, see TransformerBlock.
    text_dim: length of the sentence.
    activation: quick_gelu (OpenAI's weights) or gelu.
    """

    slow_start = True  # a state dict fills all its tensors

    @dataclass(frozen=True)
    class Settings:
        vocabulary_size: int = 49408
        max_words: int = 77
        width: int = 512
        num_blocks: int = 12
        text_dim: int = 512
        activation: str = "quick_gelu"
        num_heads: int = 0
        mlp_width: int = 0

    def __init__(self, *arguments: Any, **named: Any):
        super().__init__(*arguments, **named)
        vocabulary_size, width = self.settings.vocabulary_size, self.settings.width
        max_words = self.settings.max_words

        # In the order of the forward pass.
        self.token_embedding = nn.Embedding(vocabulary_size, width)
        self.positional_embedding = nn.Parameter(torch.zeros(max_words, width))
        self.transformer = _transformer(self.settings)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.zeros(width, self.settings.text_dim))

    @property
    def embedding(self) -> nn.Embedding:  # pyrefly: ignore[bad-override]  # read-only: callers only read it
        """One row for each token of the vocabulary."""
        return self.token_embedding

    def forward(self, captions: Tensor, lengths: Tensor | None = None) -> TextFeatures:
        """TextFeatures: sentence (N, text_dim), not normalised; words (N, width, T'), the tokens' states, not projected.

        captions: (N, T) int64, padded with 0.
        lengths: (N,) from 1 to T, best on the CPU; None: read from the captions.

        T' is the longest caption's length: no token reads a later one, so the padding behind it need not be computed.
        """
        longest = int((captions.argmax(dim=1) + 1 if lengths is None else lengths).max())
        return self.encode(captions[:, :longest])

    def encode(self, captions: Tensor) -> TextFeatures:
        """TextFeatures as in `forward`, but with all T positions of the captions (N, T)."""
        # Each token reads itself and those before it.
        x = self.token_embedding(captions) + self.positional_embedding[: captions.shape[1]]  # (N, T, width)
        for block in self.transformer.resblocks:
            x = block(x, causal=True)
        states = self.ln_final(x)

        # The last token has read the whole caption.
        ends = captions.argmax(dim=1)
        last = states.gather(1, ends[:, None, None].expand(-1, 1, states.shape[2]))[:, 0]  # (N, width)
        padding = torch.arange(captions.shape[1], device=states.device) > ends[:, None]
        return TextFeatures(last @ self.text_projection, states.transpose(1, 2), padding)


class Clip(nn.Module):
    """Both towers: `visual(images) -> (patch features, embedding)`, `text(token ids) -> sentence`."""

    def __init__(self, visual: ClipImageEncoder, text_encoder: ClipTextEncoder):
        super().__init__()
        self.visual, self.text_encoder = visual, text_encoder

    def text(self, tokens: Tensor) -> Tensor:  # (N, T) int64, padded with 0 -> (N, text_dim), not normalised
        return self.text_encoder(tokens).sentence


def load_clip(
    state_dict: Mapping[str, Tensor],
    layers: Sequence[int] = LAYERS,
    activation: str = "quick_gelu",
    scaled_twice: bool = False,
    image_heads: int = 0,
    text_heads: int = 0,
) -> Clip:
    """Both towers, frozen, in float32, from tensors with OpenAI's names; sizes are read from the shapes.

    layers, activation, scaled_twice: see ClipImageEncoder.
    image_heads, text_heads: attention heads of the towers; 0: width/64.

    Raises CheckpointError where tensors are missing or do not fit together.
    """
    # What the shapes do not say.
    image = {"layers": tuple(layers), "activation": activation, "scaled_twice": scaled_twice, "num_heads": image_heads}
    text = {"activation": activation, "num_heads": text_heads}
    try:
        clip = Clip(
            ClipImageEncoder(**image_arguments(state_dict), **image),
            ClipTextEncoder(**text_arguments(state_dict), **text),
        )
    except KeyError as error:
        raise CheckpointError(
            f"these are not the tensors of a CLIP with a ViT: {error.args[0]} is missing; OpenAI's ViT-B-32.pt has it"
        ) from None

    # The image tower's tensors have a prefix.
    _fill(clip.visual, {name.removeprefix("visual."): value for name, value in state_dict.items() if "visual." in name})
    _fill(clip.text_encoder, {name: value for name, value in state_dict.items() if "visual." not in name})
    return clip.eval().requires_grad_(False)


def image_arguments(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The image tower's sizes, from tensors with OpenAI's names. Raises KeyError."""
    width, _, _, patch_size = state["visual.conv1.weight"].shape

    # One position a patch, and one for the class token.
    grid_size = round((len(state["visual.positional_embedding"]) - 1) ** 0.5)
    return {
        "image_size": grid_size * patch_size,
        "patch_size": patch_size,
        "width": width,
        "num_blocks": count_blocks(state, "visual.transformer.resblocks."),
        "mlp_width": _mlp_width(state, "visual."),
        "text_dim": state["visual.proj"].shape[1],
    }


def text_arguments(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The text tower's sizes, from tensors with OpenAI's names. Raises KeyError."""
    vocabulary_size, width = state["token_embedding.weight"].shape
    return {
        "vocabulary_size": vocabulary_size,
        "max_words": len(state["positional_embedding"]),
        "width": width,
        "num_blocks": count_blocks(state, "transformer.resblocks."),
        "mlp_width": _mlp_width(state, ""),
        "text_dim": state["text_projection"].shape[1],
    }


def count_blocks(state: Mapping[str, Tensor], prefix: str) -> int:
    """How many Transformer blocks have names with this prefix, which ends before their numbers."""
    return len({name[len(prefix) :].partition(".")[0] for name in state if name.startswith(prefix)})


def untrained_clip(
    image_size: int, patch_size: int, width: int, num_blocks: int, text_dim: int, vocabulary_size: int, **options: Any
) -> Clip:
    """A CLIP with random weights, always the same, to try whether a training runs: its features mean nothing.

    options: of load_clip.

    Raises ConfigError for sizes that would fill the memory.
    """

    def towers() -> tuple[ClipImageEncoder, ClipTextEncoder]:
        image = ClipImageEncoder(image_size, patch_size, width, num_blocks, text_dim)
        return image, ClipTextEncoder(vocabulary_size, 77, width, 2, text_dim)

    # Counted before memory is taken: settings allow larger sizes than any CLIP has.
    with torch.device("meta"):
        num_values = sum(value.numel() for tower in towers() for value in tower.state_dict().values())
    if num_values > MOST_UNTRAINED:
        raise ConfigError(
            f"CLIP.WIDTH: an untrained CLIP of width {width} and {num_blocks} blocks has {num_values / 1e6:,.0f} M values, more "
            f"than the {MOST_UNTRAINED / 1e6:,.0f} M allowed; lower CLIP.WIDTH or CLIP.BLOCKS, or name weights in CLIP.WEIGHTS"
        )

    # Random weights by name: norms start as the identity, products keep their inputs' size.
    image, text = towers()
    state = {f"visual.{name}": value for name, value in image.state_dict().items()} | text.state_dict()
    generator = torch.Generator().manual_seed(0)
    for name, value in sorted(state.items()):
        if "ln_" in name or name.endswith("bias"):
            state[name] = torch.full_like(value, float(name.endswith("weight")))
        else:
            state[name] = torch.randn(value.shape, generator=generator) / value[0].numel() ** 0.5
    return load_clip(state, **options)


def _mlp_width(state: Mapping[str, Tensor], prefix: str) -> int:
    """Inner width of the MLPs; 0 where it is the usual one."""
    inner, width = state[f"{prefix}transformer.resblocks.0.mlp.c_fc.weight"].shape
    return 0 if inner == 4 * width else inner


def _transformer(settings: Any) -> Transformer:
    return Transformer(settings.width, settings.num_blocks, settings.activation, settings.num_heads, settings.mlp_width)


def to_map(tokens: Tensor, grid_size: int) -> Tensor:
    """Patch tokens (N, grid², C) -> (N, C, grid, grid)."""
    return tokens.transpose(1, 2).unflatten(2, (grid_size, grid_size))


def _fill(tower: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a tower's tensors and ignore others. Raises CheckpointError where one is missing or has another shape."""
    # Checked before loading: one line for the user, where torch would list every tensor.
    expected = tower.state_dict()
    for name, value in expected.items():
        if name not in state:
            raise CheckpointError(f"these are not the tensors of a CLIP with a ViT: {name} is missing")
        if state[name].shape != value.shape:
            raise CheckpointError(
                f"CLIP: {name} is {tuple(state[name].shape)}, the other tensors mean {tuple(value.shape)}; copy the file again"
            )
    tower.load_state_dict({name: state[name] for name in expected})
