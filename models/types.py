"""What passes between networks and trainer: text features, a generator's output, the protocol of a system."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Protocol

from torch import Tensor, nn


class TextFeatures(NamedTuple):
    """What a text encoder says of N captions: sentence (N, D), words (N, D, T), mask (N, T) with True = padding."""

    sentence: Tensor
    words: Tensor
    mask: Tensor

    def detach(self) -> "TextFeatures":
        return TextFeatures(self.sentence.detach(), self.words.detach(), self.mask)

    def select(self, rows: Any) -> "TextFeatures":
        """The captions at `rows` (a slice or indices)."""
        return TextFeatures(self.sentence[rows], self.words[rows], self.mask[rows])


@dataclass
class GeneratorOutput:
    """images: (N, 3, H, W) in [-1, 1], coarse to fine; masks: (N, 1, h, w) in [0, 1]; attention: (N, T, h, w), coarse
    to fine, where the system has any; mu, logvar (N, C): of AttnGAN's conditioning augmentation."""

    images: list[Tensor]
    masks: list[Tensor] = field(default_factory=list)
    attention: list[Tensor] = field(default_factory=list)
    mu: Tensor | None = None
    logvar: Tensor | None = None


class Update(NamedTuple):
    """One optimizer step: minimise the sum of `losses` with the optimizer of this name.

    losses: {name: scalar}; stats: {name: tensor or number} that only go to the log.
    """

    optimizer: str
    losses: Mapping[str, Tensor]
    stats: Mapping[str, Any] = {}


class Generator(Protocol):
    """What every generator says of itself, beside being a module with `arguments` to its constructor."""

    image_size: int  # of the largest image it makes, pixels
    z_dim: int  # length of the noise z
    noise_dim: int  # random numbers that one image takes: z_dim, or more where the system draws others, too

    def __call__(self, noise: Tensor, text: TextFeatures) -> GeneratorOutput:
        """noise (N, noise_dim), standard normal -> images of every stage."""
        ...


class System(Protocol):
    """One paper: its networks and its objective. The trainer knows a system by this and nothing else.

    The class names the settings of its parts as {argument: key}; so a key that no part names has no effect. A class may
    also have EXTRA_NETWORKS = {part: {argument: key}}, networks beyond G and D that are built, trained and saved alike
    (their registries are in models.NETWORKS), and TEXT_SETTINGS, what is made of the text encoder for this system.
    """

    GENERATOR_SETTINGS: ClassVar[Mapping[str, str]]
    DISCRIMINATOR_SETTINGS: ClassVar[Mapping[str, str]]
    OBJECTIVE_SETTINGS: ClassVar[Mapping[str, str]]
    SHOWN: ClassVar[tuple[str, ...]]  # logged values that also stand behind the progress bar

    networks: dict[str, nn.Module]  # "generator", "discriminator", "text_encoder", "image_encoder": what is saved
    image_sizes: list[int]  # of the real images a step needs, coarse to fine

    def optimizers(self) -> Mapping[str, tuple[list[nn.Parameter], float, tuple[float, float]]]:
        """{name: (parameters, learning rate, betas)}."""
        ...

    def train(self) -> None:
        """Put every network in the mode it trains in."""
        ...

    def updates(self, batch: Any, noise: Tensor) -> Iterator[Update]:
        """The optimizer steps of one training step, in order. The trainer steps before it asks for the next."""
        ...
