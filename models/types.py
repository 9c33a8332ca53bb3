"""What passes between networks and trainer: text features, a generator's output, the protocol of a system."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from miscc.errors import CheckpointError


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


def record(name: str, module: nn.Module) -> dict[str, Any]:
    """A network as plain data: its registry name, constructor arguments and tensors."""
    return {"name": name, "arguments": dict(module.arguments), "state": module.state_dict()}


def rebuild(entry: Mapping[str, Any], registry: Mapping[str, type[nn.Module]]) -> nn.Module:
    """The network of a `record`, with its weights. Raises CheckpointError for a network that this version does not know."""
    if entry["name"] not in registry:
        raise CheckpointError(
            f"the checkpoint holds a network {entry['name']!r}, which this version does not know (it knows: "
            f"{', '.join(registry)}); update the project"
        )
    module = unfilled(registry[entry["name"]], entry["arguments"])
    module.load_state_dict(entry["state"])
    return module


def unfilled(kind: type[nn.Module], arguments: Mapping[str, Any]) -> nn.Module:
    """A network on the CPU whose tensors a state dict will fill.

    A class that says `slow_start = True` draws initial weights for seconds, and all its tensors are in its state dict: it
    is built without values.
    """
    if not getattr(kind, "slow_start", False):
        return kind(**arguments)
    with torch.device("meta"):
        module = kind(**arguments)
    return module.to_empty(device="cpu")


def count_parameters(module: nn.Module) -> int:
    """Number of learnable values, frozen ones included."""
    return sum(parameter.numel() for parameter in module.parameters())


@contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """`with frozen(D):` its parameters take no gradient: G's step then skips D's weight gradients (bit-identical)."""
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


@contextmanager
def exactly(device: torch.device) -> Iterator[None]:
    """`with exactly(images.device):` no autocast and nothing compiled inside: for what is differentiated twice, as compilers
    cannot, and for penalties, whose high power would amplify rounding."""
    kind = "cpu" if device.type == "meta" else device.type  # autocast knows no meta device
    with torch.autocast(kind, enabled=False), torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """`with evaluating(G):` eval mode inside, the former mode afterwards."""
    modes = [module.training for module in modules]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.train(mode)


def device_of(module: nn.Module) -> torch.device:
    """Where a network lives."""
    return next(module.parameters()).device
