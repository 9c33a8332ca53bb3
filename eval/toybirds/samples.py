"""Generated ToyBirds: drawn by a checkpoint for the test captions, or read from a folder of samples; and what the metrics of
ToyBirds (eval/attributes.py, mask_iou.py, variety.py) share: their base class, and their script with its options and output."""

import argparse
import dataclasses
import sys
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from PIL import Image

from datasets.toybirds.dataset import ToyBirds
from eval.features.sources import batches
from eval.metric import Metric, Run, ScoringBatch
from eval.scripts import add_arguments, add_cache_dir_option, broken, open_images, print_lines, versions
from eval.toybirds.classifiers import Recipe
from miscc.command_line import CommandParser, named_device, positive, seed_number, truncation
from miscc.errors import ConfigError, DataError
from miscc.files import read_json
from miscc.progress import ProgressBar
from miscc.randomness import stream
from sampling.pipeline import TextToImage
from sampling.requests import Request

NUM_IMAGES = 500  # that are drawn without --num-images


class GeneratedBirds(NamedTuple):
    """N images with what they were made from.

    images: (N, S, S, 3) uint8;
    captions: N;
    keys: of the real bird that a caption was written for, "" for none;
    masks: the generator's, of each stage (N, h, w) float32 in [0, 1], coarse to fine, empty where there are none;
    origin: where they come from, for reports;
    device: where the networks that read them run.
    """

    images: np.ndarray
    captions: list[str]
    keys: list[str]
    masks: list[np.ndarray]
    origin: dict[str, Any]
    device: torch.device
    warnings: tuple[str, ...] = ()


class BirdMetric(Metric):
    """A metric by a network that reads drawn birds. It keeps the images: the network is loaded, or trained, at the end,
    and in the main process alone."""

    accumulated: ClassVar[tuple[str, ...]] = ("images", "masks", "requests")

    def __init__(self, device: str | torch.device, cache: str | Path | None = None, seed: int = 0) -> None:
        """cache: folder of trained networks, None: the usual one, because training takes minutes."""
        self.device, self.cache, self.seed = device, cache, seed
        self.images: list[np.ndarray] = []
        self.masks: list[Sequence[np.ndarray]] = []
        self.requests: list[Request] = []

    @classmethod
    def from_run(cls, run: Run) -> "BirdMetric":
        return cls(run.device, run.tools.cache, run.protocol.seed)

    def update(self, batch: ScoringBatch) -> None:
        self.images.append(np.asarray(batch.images))
        self.masks.append(batch.masks)
        self.requests += batch.requests

    @property
    def image_size(self) -> int:
        return self.images[0].shape[1]

    def all_images(self) -> np.ndarray:
        """(N, S, S, 3) uint8."""
        return np.concatenate(self.images)

    def all_masks(self) -> list[np.ndarray]:
        """The masks of each stage, (N, h, w); empty where there are none."""
        return [np.concatenate(stage) for stage in zip(*self.masks, strict=True)]

    @property
    @abstractmethod
    def reader(self) -> Any:
        """The network that reads the birds, with its `recipe`; loaded at first use."""

    def about(self) -> dict:
        """The field of a score's protocol that says by which network it is."""
        recipe: Recipe = self.reader.recipe
        return {"reader": dataclasses.asdict(recipe) | {"recipe_hash": recipe.key()}}

    @abstractmethod
    def report(self) -> Any:
        """All that was counted: `lines()` for people, `record()` for JSON."""


def captions_of_test_birds(number: int, seed: int = 0, per_caption: int = 1) -> tuple[list[str], list[str]]:
    """`number` captions of the test birds and the keys of these birds, drawn by the seed from all 20,000.

    Each comes `per_caption` times in a row. None comes again in later rows before all have come.
    """
    birds = ToyBirds("test")
    each = len(birds.captions(0))
    different = -(-number // per_caption)

    # Every caption once, in random order, before any comes again.
    rounds = -(-different // (len(birds) * each))
    orders = [stream(seed, "toybirds test captions", n).permutation(len(birds) * each) for n in range(rounds)]
    chosen = np.repeat(np.concatenate(orders)[:different], per_caption)[:number].tolist()

    # Caption i % each of bird i // each.
    known = {index: birds.captions(index) for index in sorted({i // each for i in chosen})}
    return [known[i // each][i % each] for i in chosen], [f"test/{i // each}" for i in chosen]


def generate_birds(
    pipeline: TextToImage,
    number: int = 500,
    seed: int = 0,
    truncation: float | None = None,
    per_caption: int = 1,
    batch_size: int = 32,
    with_masks: bool = True,
) -> GeneratedBirds:
    """Draw birds for test captions.

    seed: fixes the choice of captions and the noise.

    Raises DataError for number < 1.
    """
    if number < 1 or per_caption < 1:
        raise DataError(f"{number} images, {per_caption} a caption; ask for at least one")
    captions, keys = captions_of_test_birds(number, seed, per_caption)
    requests = _requests(captions, keys)

    # Drawn in batches; all are kept, since the metrics' networks read them at the end.
    images, masks = [], []
    with ProgressBar(what="generating", total=number, unit="images") as bar:
        for drawn in pipeline.generate_batches(requests, seed, truncation, batch_size, with_masks):
            images.append(drawn.images)
            masks.append(drawn.masks)
            bar.update(len(drawn.images))

    # Where they come from, and whether the generator knows such birds.
    origin = {name: value for name, value in pipeline.origin.items() if name != "config"}
    origin |= {"seed": seed, "truncation": truncation, "per_caption": per_caption, "captions": "toybirds test"}
    stages = [np.concatenate(stage) for stage in zip(*masks, strict=True)]
    warnings = tuple(_foreign((pipeline.origin.get("config") or {}).get("DATASET_NAME")))
    return GeneratedBirds(np.concatenate(images), captions, keys, stages, origin, pipeline.device, warnings)


def _requests(captions: Sequence[str], keys: Sequence[str]) -> list[Request]:
    return [Request(index, *pair, 0, 0) for index, pair in enumerate(zip(captions, keys, strict=True))]


def _foreign(name: str | None) -> Iterator[str]:
    if name not in (None, "toybirds"):
        yield f"this generator was trained on {name}, not on toybirds; what is read off its images means little"


def read_birds(
    folder: str | Path, skip_broken: bool = False, with_masks: bool = True, workers: int | None = None
) -> GeneratedBirds:
    """The images that main.py sampled into a folder, by name, with their masks if they all have them.

    workers: threads that decode, None: one a core.
    Raises DataError when captions or images are missing or broken, or images differ in size or are not square.
    """
    folder = Path(folder)
    found = open_images(folder, skip_broken, with_samples=True)
    source, samples, skipped = found.source, found.samples, found.skipped
    images: list[np.ndarray] = []
    with ProgressBar(what="reading", total=len(source), unit="images") as bar:
        for some in batches(source, 256, workers):
            images += some
            bar.update(len(some))

    # One size, square.
    for sample, image in zip(samples, images, strict=True):
        if image.shape != images[0].shape or image.shape[0] != image.shape[1]:
            raise DataError(
                f"{folder / sample.file}: is {image.shape[1]} x {image.shape[0]}; the images must all be square and of "
                f"one size: sample them again"
            )

    # Masks, where every image has them, and what the sampler wrote.
    masks = _read_masks(folder, [sample.file for sample in samples]) if with_masks else []
    captions, keys = [sample.caption for sample in samples], [sample.key for sample in samples]
    about = _about(folder)
    warnings = (*broken(folder, skipped), *_foreign(about.get("dataset")))
    return GeneratedBirds(np.stack(images), captions, keys, masks, about, torch.device("cpu"), warnings)


def _about(folder: Path) -> dict[str, Any]:
    """What the sampler wrote about the folder."""
    # A folder of older samples may not say.
    try:
        about = read_json(folder / "samples.json")
    except (OSError, ValueError):
        about = {}
    return {"samples": str(folder)} | (about if isinstance(about, dict) else {})


def _read_masks(folder: Path, files: Sequence[str]) -> list[np.ndarray]:
    """masks/NAME_16px.png ... beside NAME.png, by rising size; [] when not every image has the same sizes."""
    stems = [folder / "masks" / Path(file).with_suffix("") for file in files]
    first = stems[0]

    # The sizes that the first image has; the others must have the same.
    found = [path.stem.rpartition("_")[2] for path in first.parent.glob(f"{first.name}_*px.png")]
    sizes = sorted(int(name[:-2]) for name in found if name[:-2].isdigit())
    paths = [[stem.with_name(f"{stem.name}_{size}px.png") for stem in stems] for size in sizes]
    if not all(path.is_file() for stage in paths for path in stage):
        return []
    return [np.stack([_read_mask(path) for path in ProgressBar(stage, "masks", unit="masks")]) for stage in paths]


def _read_mask(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("L"), dtype=np.float32) / 255
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"{path}: cannot be read as a mask ({error}); sample again") from None


def run_bird_script(name: str, description: str, metric_class: type[BirdMetric]) -> None:
    """The script of a metric of ToyBirds.

    name: of the report in the JSON.
    """
    parser = CommandParser(description=description)
    _add_arguments(parser)
    args = parser.parse_args()

    # The birds, drawn or read.
    with_masks = metric_class.needs.masks
    birds = _birds_of(args, with_masks)
    if with_masks and not birds.masks:
        hint = "sample it again with --masks" if args.samples else "SSA-GAN predicts them, AttnGAN and DF-GAN do not"
        raise DataError(f"{args.samples or args.checkpoint}: there are no masks; {hint}")

    # Their scores.
    metric = metric_class(birds.device, args.cache_dir, args.seed)
    requests = _requests(birds.captions, birds.keys)
    metric.update(ScoringBatch(list(birds.images), range(len(birds.images)), requests, birds.masks))

    report = metric.report()
    record = {name: report.record(), "origin": birds.origin, **metric.about()}
    record |= {"versions": versions(), "warnings": list(birds.warnings)}
    print_lines(report.lines(), record, args.json)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    """--checkpoint or --samples, how many to draw and how, where trained networks are kept, and what all metrics have."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", metavar="CKPT", help="draw with this generator for captions of the test birds")
    source.add_argument("--samples", metavar="DIR", help="score a folder that main.py sampled into instead")
    parser.add_argument("--num-images", type=positive, metavar="N", help=f"to draw (default {NUM_IMAGES})")
    parser.add_argument("--per-caption", type=positive, metavar="N", help="images of each caption (default 1)")
    parser.add_argument("--seed", type=seed_number, default=0, help="of captions and noise (default 0)")
    parser.add_argument("--truncation", type=truncation, metavar="T", help="draw with truncated noise, e.g. 0.8")
    add_cache_dir_option(parser, "trained networks")
    add_arguments(parser, network=False, weights=False)


def _birds_of(args: argparse.Namespace, with_masks: bool) -> GeneratedBirds:
    """The birds that the options ask for."""
    # Options of drawing say nothing about images that are there.
    drawing = {"num_images": args.num_images, "per_caption": args.per_caption, "truncation": args.truncation}
    given = [f"--{name.replace('_', '-')}" for name, value in drawing.items() if value is not None]
    if args.samples and given:
        raise ConfigError(f"{given[0]}: is for drawing with --checkpoint; leave it out with --samples")

    device = named_device(args.device)
    if args.samples:
        birds = read_birds(args.samples, args.skip_broken, with_masks, args.workers)._replace(device=device)
    else:
        pipeline = TextToImage.load(args.checkpoint, device)
        number, per_caption = args.num_images or NUM_IMAGES, args.per_caption or 1
        choices = (number, args.seed, args.truncation, per_caption, args.batch_size, with_masks)
        birds = generate_birds(pipeline, *choices)

    for warning in birds.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    return birds
