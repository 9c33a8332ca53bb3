"""What the classifier and the segmenter of ToyBirds share: drawings to train on, the training loop, the cache.

The networks are in eval/toybirds/networks.py and eval/mask_iou.py, the generated birds in eval/toybirds/samples.py.

Both are small networks, trained on real drawings alone, as in training a generator: the box is cut out, scaled and
randomly cropped. There is one for 64 px and one for 32; images of other sizes are scaled down.
"""

import hashlib
import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from datasets.text_image import load_resized
from datasets.toybirds.dataset import ATTRIBUTES, VERSION, ToyBird, ToyBirds, bounding_box
from datasets.toybirds.drawing import draw
from miscc.checkpoint import load_checkpoint, save_checkpoint
from miscc.errors import CheckpointError, DataError, UserError
from miscc.images import from_uint8
from miscc.progress import ProgressBar
from miscc.randomness import seed_everything, stream

SIZES = (64, 32)  # pixels a side of their input
DRAWN_AT = 128  # pixels a side of the drawings before the crop, as `prepare toybirds` writes them
FACING = list(ATTRIBUTES).index("facing")


@dataclass(frozen=True)
class Recipe:
    """All that the trained network depends on; its hash names the file in which the network is kept."""

    kind: str
    image_size: int
    epochs: int
    width: int
    most_noise: float  # standard deviation, of images in [-1, 1]
    most_blur: float  # share of a blurred copy
    num_drawings: int = 6000
    num_held_out: int = 2000
    batch_size: int = 64
    learning_rate: float = 4e-3
    weight_decay: float = 0.02
    most_tint: float = 0.06  # shift of each colour channel, and relative change of contrast
    seed: int = 0
    version: int = 1  # raised when the same values give another network
    drawings_version: int = VERSION

    def key(self) -> str:
        """12 hex digits that change with every value above."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]


class Drawings(NamedTuple):
    """N real drawings: pixels, N rectangles (h, w, 3) uint8 from which crops are taken, shorter side 76/64 of the image
    size; masks, likewise (h, w) uint8; labels (N, 9) int64, the value's index for each of ATTRIBUTES."""

    pixels: list[np.ndarray]
    masks: list[np.ndarray]
    labels: np.ndarray


class Examples(NamedTuple):
    """A batch of crops: images (N, 3, S, S) float32 in [-1, 1]; masks (N, 1, S, S) float32 in [0, 1]; labels (N, 9)."""

    images: Tensor
    masks: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> "Examples":
        return Examples(*(value.to(device) for value in self))


def classifier_size(image_size: int) -> int:
    """The input size for images of `image_size`. Raises DataError for images that are too small."""
    if image_size < min(SIZES):
        raise DataError(f"images of {image_size} px are too small to read birds off; the smallest are {min(SIZES)} px")
    return next(size for size in SIZES if size <= image_size)


class _Drawer(Dataset):
    """Item i is (pixels, mask, labels) of drawing i; a data loader spreads the drawing over processes."""

    def __init__(self, split: str, size: int, image_size: int, seed: int):
        self.birds, self.image_size, self.seed = ToyBirds(split, size, DRAWN_AT), image_size, seed

    def __len__(self) -> int:
        return len(self.birds)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray, list[int]]:
        bird = self.birds[index] if self.birds.split == "test" else self._any_bird(index)
        pixels, mask = box_resized(bird.image, bird.mask, self.image_size)
        return pixels, mask, value_indices(bird.attributes)

    def _any_bird(self, index: int) -> ToyBird:
        """A bird whose attributes are independent. In the training split they are not: its wings and bellies
        come in 75 pairs, from which a classifier would learn to guess one by the other."""
        attributes = any_attributes(self.seed, index)
        # The streams' names fix the drawings, and with them every published score: not to be renamed.
        image, mask = draw(attributes, stream(self.seed, "judge's drawings", index), DRAWN_AT)
        return ToyBird(image, mask, attributes, [])


def any_attributes(seed: int, index: int) -> dict[str, str]:
    """Attributes of training bird `index`, each drawn independently."""
    rng = stream(seed, "judge's attributes", index)
    return {name: values[int(rng.integers(len(values)))] for name, values in ATTRIBUTES.items()}


def box_resized(image: np.ndarray, mask: np.ndarray, image_size: int) -> tuple[np.ndarray, np.ndarray]:
    """The box around a drawn bird, scaled as training images are: pixels (h, w, 3) and mask (h, w), both uint8."""
    box = bounding_box(mask)
    pixels = load_resized(_encoded(image, "JPEG", quality=95, subsampling=0), box, image_size)
    return pixels, load_resized(_encoded(mask, "BMP"), box, image_size)[:, :, 0]


def value_indices(attributes: Mapping[str, str]) -> list[int]:
    """The index of a bird's value for each of ATTRIBUTES."""
    return [values.index(attributes[name]) for name, values in ATTRIBUTES.items()]


def draw_captioned(named: Sequence[Mapping[str, str]], image_size: int, seed: int = 0) -> Drawings:
    """A drawing for each caption: the attributes that it names, as far as birds have them; all else by (seed, index)."""
    pixels, masks, labels = [], [], []
    for index, values in enumerate(named):
        drawn = any_attributes(seed, index)
        attributes = drawn | {name: value for name, value in values.items() if value in ATTRIBUTES[name]}
        image, mask = draw(attributes, stream(seed, "captioned drawings", index), DRAWN_AT)
        scaled = box_resized(image, mask, image_size)
        pixels.append(scaled[0])
        masks.append(scaled[1])
        labels.append(value_indices(attributes))
    return Drawings(pixels, masks, np.array(labels, dtype=np.int64))


def _encoded(pixels: np.ndarray, file_format: str, **options) -> io.BytesIO:
    """The drawing as the file that `prepare toybirds` would write, so that it is read the same way."""
    # In memory, with the settings of `prepare`.
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, file_format, **options)
    file.seek(0)
    return file


@lru_cache(maxsize=2)  # both networks train on the same drawings
def draw_birds(split: str, num_drawings: int, image_size: int, seed: int = 0, workers: int | None = None) -> Drawings:
    """Drawings to train on ("train": all combinations of attributes alike) or held-out ones ("test": ToyBirds' own).

    workers: processes, None: one a core where that pays.
    """
    drawer = _Drawer(split, num_drawings, image_size, seed)
    generator = torch.Generator()  # else seeds for workers, unused here, would be drawn from the global generator
    workers = _workers(num_drawings, workers)
    loader = DataLoader(drawer, batch_size=50, num_workers=workers, collate_fn=list, generator=generator)

    # Drawn by several processes; each drawing is a function of its index.
    items = []
    with ProgressBar(what=f"drawing {split} birds", total=num_drawings, unit="birds") as bar:
        for chunk in loader:
            items += chunk
            bar.update(len(chunk))
    pixels, masks, labels = zip(*items, strict=True)
    return Drawings(list(pixels), list(masks), np.array(labels, dtype=np.int64))


def _workers(num_drawings: int, workers: int | None) -> int:
    # One a core, where starting them pays.
    if workers is None:
        workers = min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 8)
    return workers if workers > 1 and num_drawings >= 500 else 0  # starting processes takes longer than a few drawings


def convolution(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """Convolution, batch norm, ReLU: (N, inputs, H, W) -> (N, outputs, H / stride, W / stride)."""
    layer = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU())


def crops(
    drawings: Drawings, indices: Sequence[int] | np.ndarray, image_size: int, rng: np.random.Generator
) -> Examples:
    """Random crops, half of them flipped, as in training a generator; a flipped bird faces the other way."""
    pixels = np.empty((len(indices), image_size, image_size, 3), dtype=np.uint8)
    masks = np.empty((len(indices), image_size, image_size), dtype=np.uint8)
    labels = drawings.labels[indices].copy()

    # Each at a position of its own.
    for row, index in enumerate(indices):
        whole = drawings.pixels[index]
        top, left = (int(rng.integers(length - image_size + 1)) for length in whole.shape[:2])
        area = (slice(top, top + image_size), slice(left, left + image_size))
        step = 1
        if rng.random() < 0.5:
            step, labels[row, FACING] = -1, 1 - labels[row, FACING]
        pixels[row], masks[row] = whole[area][:, ::step], drawings.masks[index][area][:, ::step]

    # As the networks take them.
    images = from_uint8(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    return Examples(images, torch.from_numpy(masks)[:, None].float() / 255, torch.from_numpy(labels))


def disturb(images: Tensor, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """(N, 3, S, S) in [-1, 1] -> the same blurred, tinted and with noise, each image to another degree.

    So that the network also reads generated images, which are less sharp and clean than drawings.
    """

    def uniform(*shape: int) -> Tensor:
        return torch.rand(len(images), *shape, generator=generator)

    # Less sharp, then another contrast and tint, then noise.
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    images = images.lerp(blurred, uniform(1, 1, 1) * recipe.most_blur)
    contrast, tint = (2 * uniform(1, 1, 1) - 1) * recipe.most_tint, (2 * uniform(3, 1, 1) - 1) * recipe.most_tint
    noise = torch.randn(images.shape, generator=generator) * uniform(1, 1, 1) * recipe.most_noise
    return (images * (1 + contrast) + tint + noise).clamp(-1, 1)


def train(
    network: nn.Module,
    loss: Callable[[Any, Examples], Tensor],
    drawings: Drawings,
    recipe: Recipe,
    device: torch.device,
) -> None:
    """Train in place: AdamW, one cycle of the learning rate (Smith and Topin 2018), disturbed random crops."""
    per_epoch = len(drawings.pixels) // recipe.batch_size
    if not per_epoch:
        raise DataError(f"{len(drawings.pixels)} drawings do not fill a batch of {recipe.batch_size}")

    # Optimizer and schedule.
    network.train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    steps = recipe.epochs * per_epoch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.learning_rate, total_steps=steps, pct_start=0.2)
    generator = torch.Generator().manual_seed(recipe.seed)

    with ProgressBar(what=f"training the {recipe.kind}", total=steps) as bar:
        for epoch in range(recipe.epochs):
            order = stream(recipe.seed, "judge order", epoch).permutation(len(drawings.pixels))
            rng = stream(recipe.seed, "judge crops", epoch)
            for rows in np.split(order[: per_epoch * recipe.batch_size], per_epoch):
                clean = crops(drawings, rows, recipe.image_size, rng)
                examples = clean._replace(images=disturb(clean.images, recipe, generator)).to(device)

                # One step.
                value = loss(network(examples.images.contiguous(memory_format=torch.channels_last)), examples)
                optimizer.zero_grad(set_to_none=True)
                value.backward()
                optimizer.step()
                schedule.step()
                bar.update()
    network.eval().requires_grad_(False)


def held_out_examples(recipe: Recipe) -> Iterator[Examples]:
    """Undisturbed random crops of held-out drawings, always the same, each drawing once."""
    drawings = draw_birds("test", recipe.num_held_out, recipe.image_size, recipe.seed)
    rng = stream(recipe.seed, "judge held out")
    for start in range(0, recipe.num_held_out, 100):
        yield crops(drawings, range(start, min(start + 100, recipe.num_held_out)), recipe.image_size, rng)


def trained(
    recipe: Recipe,
    build: Callable[[Recipe], nn.Module],
    train_and_measure: Callable[[nn.Module, Drawings, Recipe, torch.device], dict[str, Any]],
    device: str | torch.device = "cpu",
    cache: str | Path | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """The network of a recipe and what was measured on held-out drawings: from the cache, else trained and kept there.

    build: an untrained network;
    train_and_measure: trains it in place and returns the measurements, numbers and tensors by name;
    cache: a folder, None: keep nothing. A kept file that is damaged is made again.
    """
    device = torch.device(device)
    path = None if cache is None else kept_file(cache, recipe)
    if path is not None and path.is_file():
        try:
            network, measured = _load(path, build(recipe))
            return network.to(device), measured
        except CheckpointError as error:
            print(f"warning: {error}; a new {recipe.kind} is trained, about a minute, and put there", file=sys.stderr)

    # Trained now: weights depend on the recipe alone.
    started = time.monotonic()
    drawings = draw_birds("train", recipe.num_drawings, recipe.image_size, recipe.seed)
    with torch.random.fork_rng(devices=[]):  # the caller's random state stays
        seed_everything(recipe.seed)
        network = build(recipe).to(device).to(memory_format=torch.channels_last)
    measured = train_and_measure(network, drawings, recipe, device) | {"seconds": round(time.monotonic() - started, 1)}

    if path is not None:
        state = {name: tensor.cpu() for name, tensor in network.state_dict().items()}
        try:
            save_checkpoint(path, {"networks": {recipe.kind: state}, "recipe": asdict(recipe), "measured": measured})
        except (OSError, UserError) as error:  # on a full or read-only disk the run goes on
            print(f"warning: the {recipe.kind} is not kept ({error})", file=sys.stderr)
    return network, measured


def kept_file(cache: str | Path, recipe: Recipe) -> Path:
    """Where the trained network of a recipe is kept below a cache folder."""
    return Path(cache) / "toybirds" / f"{recipe.kind}-{recipe.image_size}px-{recipe.key()}.pth"


def _load(path: Path, network: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
    """Raises CheckpointError for a file that is damaged or of another network."""
    content = load_checkpoint(path)

    try:
        (state,) = content["networks"].values()
        network.load_state_dict(state)
        measured = dict(content["measured"])
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:100]
        raise CheckpointError(
            f"{path}: the kept network does not fit this version of the project, or was replaced ({reason})"
        ) from None
    return network.eval().requires_grad_(False).to(memory_format=torch.channels_last), measured


def prepared(images: np.ndarray, size: int, device: torch.device) -> Tensor:
    """(N, H, H, 3) uint8 of any H -> (N, 3, size, size) float32 in [-1, 1], scaled down smoothly. Raises DataError."""
    if images.shape[1] != images.shape[2]:
        raise DataError(f"images of {images.shape[2]} x {images.shape[1]} px are not square; the birds' are")
    pixels = from_uint8(torch.from_numpy(np.ascontiguousarray(images)).to(device).permute(0, 3, 1, 2))
    if pixels.shape[2:] != (size, size):
        pixels = F.interpolate(pixels, size=(size, size), mode="bilinear", align_corners=False, antialias=True)
    return pixels.contiguous(memory_format=torch.channels_last)
