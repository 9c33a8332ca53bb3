"""--dry-run: what a training would be, without starting it: settings, sizes, steps, memory, and what is missing."""

from collections.abc import Callable, Mapping
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from datasets.settings import DataSettings
from miscc.batch import Batch
from miscc.config import Config, flatten, nest, to_yaml
from miscc.distributed import World
from miscc.errors import UserError
from miscc.settings import from_config
from models.choice import ChosenSystem, chosen_system
from models.clip_features import ClipImageEncoder
from models.registry import count_parameters
from models.types import CaptionEncoder, ImageEncoder, System, TextFeatures, Update
from training.build import build_networks, build_system, problems
from training.evaluation import split_records
from training.settings import EvaluationSettings, StartSettings, TrainerSettings, keys_read
from training.step import Stepper, check_batch_size

META = torch.device("meta")  # tensors with a size and no values: nothing is computed
NUM_WORDS, NUM_REGIONS = 18, 8  # of the stand-ins for the encoders


def describe(cfg: Config) -> str:
    """The report as text. Missing data is reported; ConfigError is raised only for settings that are wrong with any data."""
    # Settings, as they were resolved: those of other systems have no effect.
    settings, data = from_config(TrainerSettings, cfg), from_config(DataSettings, cfg)
    start, system = from_config(StartSettings, cfg), chosen_system(cfg)
    check_batch_size(settings.batch_size, accumulate=settings.accumulate)
    used = keys_read(system.name)
    lines = [to_yaml(nest({key: value for key, value in flatten(cfg).items() if key in used})).rstrip(), ""]

    # Sizes and memory.
    with META:
        networks = build_networks(system)
    lines += [f"{part}: {count_parameters(network) / 1e6:.1f} M parameters" for part, network in networks.items()]
    state, kept = memory_estimate(system, networks, start)
    total = state + kept * settings.batch_size
    lines.append(
        f"memory: about {total / 2**30:.1f} GiB ({kept / 2**20:.0f} MiB an image kept for backward at batch "
        f"{settings.batch_size}, {state / 2**30:.2f} GiB weights and optimizers), without the encoders'"
    )

    # Steps, and what is missing.
    share = from_config(EvaluationSettings, cfg).held_out_share
    lines += _describe_steps(settings, data, share, cfg.SEED)
    missing = problems(system, start, data)
    lines += [f"not there yet: {line}" for line in missing] or ["data and encoders: found"]
    return "\n".join(lines)


def _describe_steps(settings: TrainerSettings, data: DataSettings, held_out_share: float, seed: int) -> list[str]:
    """How many steps an epoch and the whole training have."""
    try:
        num_images = len(split_records(data, held_out_share, seed)[0])
    except UserError:
        return ["steps per epoch: unknown until the data is there"]

    steps = num_images // settings.batch_size
    total = min(steps * settings.max_epoch, settings.max_steps or steps * settings.max_epoch)
    lines = [f"steps per epoch: {steps} ({num_images} images), {total} in all"]
    if not steps:
        lines.append(f"not there yet: {num_images} images are fewer than one batch; lower TRAIN.BATCH_SIZE")
    return lines


def memory_estimate(
    chosen: ChosenSystem, networks: Mapping[str, nn.Module], start: StartSettings
) -> tuple[float, float]:
    """(bytes of weights, gradients, Adam's state and averaged G; bytes an image that autograd keeps), float32.

    networks: on the meta device. What is kept is the most that one step of the system holds for its backward passes,
    counted while that step runs on two images without values.
    """
    # Weights: with their gradient and Adam's two averages; G once more, as its average.
    weights = {part: 4 * count_parameters(network) for part, network in networks.items()}
    state = 4 * sum(weights.values()) + weights["generator"]

    # A step: of the system, on two images.
    image_encoder = STAND_INS[chosen.objective.encoders_with_images](start)
    stand_ins = {"text_encoder": _TextEncoder(start.text_dim), "image_encoder": image_encoder}
    system = build_system(chosen, {**networks, **stand_ins})
    system.train()
    images = [torch.zeros(2, 3, size, size, device=META) for size in system.image_sizes]
    batch = Batch(
        images=images if len(images) > 1 else images[0],
        captions=torch.zeros(2, NUM_WORDS, dtype=torch.int64, device=META),
        lengths=torch.full((2,), NUM_WORDS),
        class_ids=torch.zeros(2, dtype=torch.int64, device=META),
        keys=["", ""],
        indices=torch.arange(2),
        caption_numbers=torch.zeros(2, dtype=torch.int64),
    )
    noise = torch.zeros(2, system.generator.noise_dim, device=META)
    return state, _most_kept(system, batch, noise) / 2


def _most_kept(system: System, batch: Batch, noise: Tensor) -> float:
    """The most memory, in bytes, that autograd holds before any backward pass of a step; weights and views not counted."""
    # What is kept now, by its memory: an entry is gone when the graph that held it is.
    kept: WeakValueDictionary[int, _Kept] = WeakValueDictionary()

    def keep(tensor: Tensor) -> tuple[Tensor, _Kept | None]:
        if isinstance(tensor, nn.Parameter):
            return tensor, None
        memory = tensor.untyped_storage()._cdata  # one for a tensor and all its views
        holder = kept.get(memory) or _Kept(tensor)
        kept[memory] = holder
        return tensor, holder

    # The most at any time: the backward pass frees what only its update needed.
    most = 0.0

    def count(update: Update, phase: str) -> None:
        nonlocal most
        if phase == "forward":
            most = max(most, sum(holder.num_bytes for holder in kept.values()))

    # One step.
    optimizers = {name: torch.optim.SGD(spec.parameters, lr=0.0) for name, spec in system.optimizers().items()}
    system.step = system.fullest_step
    stepper = Stepper(system.updates, optimizers, World(0, 1, META))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda pair: pair[0]):
        for _ in stepper.steps(batch, noise, count):
            pass
    return most


class _Kept:
    """The memory behind a tensor that a graph holds; gone when the graph is."""

    def __init__(self, tensor: Tensor):
        self.num_bytes = tensor.untyped_storage().nbytes()


class _TextEncoder(CaptionEncoder):
    """Text features without values, in place of the encoder that the data may still lack."""

    def __init__(self, text_dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(text_dim, NUM_WORDS, device=META))

    def forward(self, captions: Tensor, lengths: Tensor) -> TextFeatures:
        words = self.weight.expand(len(captions), -1, -1)
        return TextFeatures(
            words.mean(dim=2), words, torch.zeros(len(captions), NUM_WORDS, dtype=torch.bool, device=META)
        )


class _ImageEncoder(ImageEncoder):
    """Regions and code of images, without values."""

    def __init__(self, text_dim: int):
        super().__init__()
        self.head = nn.Conv2d(3, text_dim, 1, device=META)

    def head_parameters(self) -> list[nn.Parameter]:
        return list(self.parameters())

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        regions = self.head(images[:, :, :NUM_REGIONS, :NUM_REGIONS])
        return regions, regions.mean(dim=(2, 3))


def _clip_without_values(start: StartSettings) -> ClipImageEncoder:
    """CLIP's image tower of the settings' sizes."""
    with META:
        patch_size = start.image_size // 7
        sizes = {"width": start.width, "num_blocks": start.num_blocks, "text_dim": start.text_dim}
        return ClipImageEncoder(image_size=7 * patch_size, patch_size=patch_size, **sizes)


# In place of the encoder that looks at images, by its kind.
STAND_INS: dict[str, Callable[[StartSettings], ImageEncoder]] = {
    "damsm": lambda start: _ImageEncoder(start.text_dim),
    "clip": _clip_without_values,
}
