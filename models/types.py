"""Contracts: what passes between networks, systems and trainer, and what each of them must declare. No maths here."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from miscc.batch import Batch

# -- what passes ---------------------------------------------------------------------------------------------------


class TextFeatures(NamedTuple):
    """What a text encoder gives for N captions.

    sentence: (N, D).
    words: (N, D, T).
    mask: (N, T), True = padding.
    """

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
    """What a generator gives for N captions.

    images: (N, 3, H, W) in [-1, 1], coarse to fine.
    masks: (N, 1, h, w) in [0, 1], where the generator predicts masks.
    attention: (N, T, h, w), coarse to fine, where the generator attends to words.
    mu, logvar: (N, C), of AttnGAN's conditioning augmentation.
    """

    images: list[Tensor]
    masks: list[Tensor] = field(default_factory=list)
    attention: list[Tensor] = field(default_factory=list)
    mu: Tensor | None = None
    logvar: Tensor | None = None


class Update(NamedTuple):
    """One optimizer step: minimise the sum of `losses` with the optimizer of this name.

    losses: {name: scalar}, logged as loss/name; a name stands for one loss of the step.
    stats: {name in the log: scalar}, for the log alone.
    is_penalty: True for a step of its own that minimises a gradient penalty; the log and the benchmark keep it apart
        from the other steps of the same optimizer.
    group: what the log has in place of "loss", where another update of the step has losses of the same names.
    """

    optimizer: str
    losses: Mapping[str, Tensor]
    stats: Mapping[str, Tensor | float] = {}
    is_penalty: bool = False
    group: str = "loss"

    @property
    def kind(self) -> str:
        """What log and benchmark call this step: the optimizer's name, or "penalty"."""
        return "penalty" if self.is_penalty else self.optimizer

    def named_losses(self) -> dict[str, Tensor]:
        """{name in the log: loss}."""
        return {f"{self.group}/{name}": loss for name, loss in self.losses.items()}


class OptimizerSpec(NamedTuple):
    """What Adam needs to know: parameters, learning rate, betas."""

    parameters: list[nn.Parameter]
    lr: float
    betas: tuple[float, float]


# -- networks ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NoSettings:
    """Settings of a network without arguments."""


class Network(nn.Module):
    """What every network declares.

    Settings: a frozen dataclass of its constructor's arguments; fields that are settings carry their keys.
    settings: the arguments themselves.
    arguments: the same as a plain dict; with the state dict they are all that a checkpoint keeps of a network.
    slow_start: True where drawing initial weights takes seconds; a network that is loaded is then built without values
        (all its tensors must be in its state dict).
    compiled_methods: what TRAIN.COMPILE compiles: the methods that training calls. A network made of other Networks
        leaves that to them.
    """

    Settings: ClassVar[type[Any]] = NoSettings

    settings: Any
    arguments: dict[str, Any]
    slow_start: ClassVar[bool] = False
    compiled_methods: ClassVar[tuple[str, ...]] = ("forward",)

    def __init__(self, *arguments: Any, **named: Any):
        super().__init__()
        self._keep(self.Settings(*arguments, **named))

    def change_settings(self, **changes: Any) -> None:
        """Change arguments that shape no tensor: the network, and what a checkpoint keeps of it."""
        self._keep(replace(self.settings, **changes))

    def _keep(self, settings: Any) -> None:
        self.settings = settings
        values = {one.name: getattr(settings, one.name) for one in fields(settings)}
        self.arguments = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def gates(self) -> Sequence[nn.Parameter]:
        """Learned factors of residual branches. Published ones start at zero, where a branch has no effect (see GAN.GATE)."""
        return []


class Generator(Network):
    """What every generator declares.

    image_size: of the largest image it makes, pixels.
    z_dim: number of values in the noise vector z.
    noise_dim: random numbers that one image takes: z_dim, or more where the system draws others, too.
    num_attending: number of word attention maps in its output.
    predicts_masks: whether its output has masks.
    """

    image_size: int
    z_dim: int
    noise_dim: int
    num_attending: int = 0
    predicts_masks: bool = False

    def forward(self, noise: Tensor, text: TextFeatures) -> GeneratorOutput:
        """noise (N, noise_dim), standard normal -> images of every stage."""
        raise NotImplementedError

    def activation_blocks(self) -> Sequence[nn.Module]:
        """The parts that TRAIN.ACTIVATION_CHECKPOINTING computes again in the backward pass; none: not supported."""
        return []


class Discriminator(Network):
    """What every discriminator declares. Which methods there are beside, its objective knows.

    has_stages: whether it is made of one discriminator for each image size, which the authors keep in a file each.
    """

    has_stages: ClassVar[bool] = False

    def with_stages(self, stages: Sequence["Discriminator"]) -> "Discriminator":
        """A network like this one around given stages. Raises ValueError where they do not fit."""
        raise ValueError("this discriminator has no stages")


class CaptionEncoder(Network):
    """What every text encoder declares.

    max_words: words (or tokens) of a caption at most.
    embedding: one row for each entry of the vocabulary.
    """

    embedding: nn.Embedding

    @property
    def max_words(self) -> int:
        return self.settings.max_words

    def forward(self, captions: Tensor, lengths: Tensor) -> TextFeatures:
        """captions (N, T) int64 padded with 0, lengths (N,) from 1 to T, best on the CPU -> TextFeatures."""
        raise NotImplementedError


class ImageEncoder(Network):
    """What every image encoder declares.

    image_size: pixels; other images are resized to it.
    batch_statistics: True: a pretrained trunk's batch norm follows the mode, as in SSA-GAN's fine-tuning; False: it keeps
        its statistics. Without effect where nothing is pretrained.
    """

    image_size: int
    batch_statistics: bool = False

    def head_parameters(self) -> list[nn.Parameter]:
        """What training changes."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> tuple[Tensor | list[Tensor], Tensor]:
        """images (N, 3, H, W) in [-1, 1] -> regions (N, D, h, w), of CLIP a list of them; code (N, D)."""
        raise NotImplementedError


# -- systems -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ObjectiveSettings:
    """Settings of an objective without arguments."""

    needs_image_encoder: ClassVar[bool] = False  # whether a loss looks at images with the image encoder
    encoders_with_images: ClassVar[str] = "damsm"  # whose encoder that is, see TEXT.ENCODER


@dataclass(frozen=True)
class PlainTextSettings:
    """Settings of a system that takes the text encoder as it is."""

    transformer: ClassVar[str] = ""  # folder of a Transformer that gives half of the sentence


class System:
    """One paper: its networks and its objective. The trainer knows a system by this and nothing else.

    Settings: a frozen dataclass of the objective's arguments; fields that are settings carry their keys.
    TextSettings: the same of what is made of the text encoder for this system.
    NETWORKS: {part: class} of the networks that are built, trained and saved, "generator" and "discriminator" among them.
    DEFAULTS: {key: value} of the loops' settings that this system has otherwise.
    SHOWN: logged values that also stand behind the progress bar.
    PENALTY: name of the loss that is a gradient penalty, where there is one.
    settings: the objective's arguments.
    networks: by part; the encoders beside those of NETWORKS.
    image_sizes: of the real images that a step needs, pixels, coarse to fine.
    seed, step: of the run, and the training steps taken so far; the trainer sets them.
    """

    Settings: ClassVar[type[Any]] = ObjectiveSettings
    TextSettings: ClassVar[type[Any]] = PlainTextSettings

    NETWORKS: ClassVar[Mapping[str, type[Network]]] = {}
    DEFAULTS: ClassVar[Mapping[str, Any]] = {}
    SHOWN: ClassVar[tuple[str, ...]] = ()
    PENALTY: ClassVar[str] = "penalty"

    settings: Any
    networks: dict[str, Any]  # each system has properties that say which kind its networks are
    image_sizes: list[int]
    seed: int = 0
    step: int = 0

    def __init__(self, networks: dict[str, Any], **arguments: Any):
        self.networks = networks
        self.settings = self.Settings(**arguments)
        self.image_sizes = [self.generator.image_size]

    @property
    def generator(self) -> Generator:
        return self.networks["generator"]

    @property
    def text_encoder(self) -> CaptionEncoder:
        return self.networks["text_encoder"]

    @property
    def fullest_step(self) -> int:
        """A step in which all takes part that ever does: what a training needs is measured by it."""
        return 0

    @classmethod
    def parts(cls, settings: Any) -> list[str]:
        """Those of NETWORKS that training with these settings of the objective needs."""
        return list(cls.NETWORKS)

    def optimizers(self) -> Mapping[str, OptimizerSpec]:
        """The optimizers that `updates` names."""
        raise NotImplementedError

    def logit_pairs(self) -> Mapping[str, tuple[str, str]]:
        """{discriminator: (X, Y)} where logits/X and logits/Y are logged: its mean logits of real and of fake images.

        sign/X and sign/Y beside them are the means of the logits' signs. The watch on the training reads them.
        """
        return {}

    def keys_in_use(self) -> set[str]:
        """Keys of parts that this training has already, so that the watch does not advise to add them."""
        return set()

    def remarks(self, last_step: int) -> list[str]:
        """Settings that come to nothing in a training of so many steps, a line each, for people."""
        return []

    def train(self) -> None:
        """Put every network in the mode that it trains in."""
        raise NotImplementedError

    @property
    def observed(self) -> Sequence[str]:
        """Names in the updates' stats that `observe` needs."""
        return ()

    def observe(self, stats: Mapping[str, Tensor], batch_size: int) -> None:
        """Called after each training step.

        stats: {name: scalar} of `observed`, the means over micro-batches and processes, the same in all processes.
        batch_size: of the step, over all of them.
        """

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps of the objective beside networks and optimizers: plain numbers; {}: nothing."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint's `state`, {} of former code: as at the start. Raises CheckpointError."""

    def updates(self, batch: Batch, noise: Tensor) -> Iterator[Update]:
        """The optimizer steps of one training step, in order; noise (N, noise_dim).

        The caller must step the optimizer before requesting the next update.
        """
        raise NotImplementedError
