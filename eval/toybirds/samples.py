"""Generated ToyBirds to be judged: drawn by a checkpoint for the test captions, or read from a folder of samples; and
the script, with its options and output, that attributes.py and mask_iou.py are."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from datasets.toybirds.dataset import ToyBirds
from eval.features.sources import batches, read_samples
from eval.features.statistics import default_cache, load_source
from eval.protocol.scores import add_arguments as add_score_arguments
from eval.protocol.scores import named_device, seed_number, versions
from eval.toybirds.classifiers import Recipe
from miscc.errors import DataError
from miscc.files import write_json
from miscc.randomness import stream
from sampling.pipeline import TextToImage


class GeneratedBirds(NamedTuple):
    """N images with what they were made from.

    images: (N, S, S, 3) uint8; captions: N; keys: of the real bird that a caption was written for, "" for none;
    masks: the generator's, of each stage (N, h, w) float32 in [0, 1], coarse to fine, empty where there are none;
    origin: where they come from, for reports; device: on which to judge them.
    """

    images: np.ndarray
    captions: list[str]
    keys: list[str]
    masks: list[np.ndarray]
    origin: dict[str, Any]
    device: torch.device
    warnings: tuple[str, ...] = ()

    @property
    def image_size(self) -> int:
        return self.images.shape[1]


def captions_of_test_birds(number: int, seed: int = 0, per_caption: int = 1) -> tuple[list[str], list[str]]:
    """`number` captions of the test birds and the keys of these birds, drawn by the seed from all 20,000.

    Each comes `per_caption` times in a row. None comes again in later rows before all have come.
    """
    birds = ToyBirds("test")
    each = len(birds.captions(0))
    different = -(-number // per_caption)
    rounds = -(-different // (len(birds) * each))
    orders = [stream(seed, "toybirds test captions", n).permutation(len(birds) * each) for n in range(rounds)]
    places = np.repeat(np.concatenate(orders)[:different], per_caption)[:number].tolist()
    known = {index: birds.captions(index) for index in sorted({place // each for place in places})}
    return [known[place // each][place % each] for place in places], [f"test/{place // each}" for place in places]


def generate_birds(
    pipeline: TextToImage,
    number: int = 500,
    seed: int = 0,
    truncation: float | None = None,
    per_caption: int = 1,
    batch_size: int = 32,
    with_masks: bool = True,
) -> GeneratedBirds:
    """Draw birds for test captions. seed: of the captions and of the noise. Raises DataError for number < 1."""
    if number < 1 or per_caption < 1:
        raise DataError(f"{number} images, {per_caption} a caption; ask for at least one")
    captions, keys = captions_of_test_birds(number, seed, per_caption)
    images, masks = [], []
    with tqdm(total=number, desc="generating", unit="image", leave=False) as bar:
        for start in range(0, number, batch_size):
            rows = range(start, min(start + batch_size, number))
            texts = [captions[i] for i in rows]
            drawn = pipeline.generate(texts, seed, truncation, batch_size, indices=rows, with_masks=with_masks)
            images.append(drawn.images)
            masks.append(drawn.masks)
            bar.update(len(rows))
    origin = {name: value for name, value in pipeline.origin.items() if name != "config"}
    origin |= {"seed": seed, "truncation": truncation, "per_caption": per_caption, "captions": "toybirds test"}
    stages = [np.concatenate(stage) for stage in zip(*masks, strict=True)]
    warnings = tuple(_foreign((pipeline.origin.get("config") or {}).get("DATASET_NAME")))
    return GeneratedBirds(np.concatenate(images), captions, keys, stages, origin, pipeline.device, warnings)


def _foreign(name: str | None) -> Iterator[str]:
    if name not in (None, "toybirds"):
        yield f"this generator was trained on {name}, not on toybirds; what is read off its images means little"


def read_birds(
    folder: str | Path, skip_broken: bool = False, with_masks: bool = True, workers: int | None = None
) -> GeneratedBirds:
    """The images that main.py sampled into a folder, by name, with their masks if they all have them.

    workers: threads that decode, None: one a core. Raises DataError when captions or images are missing or broken, or
    images differ in size or are not square.
    """
    folder = Path(folder)
    by_file = {sample.file: sample for sample in read_samples(folder)}
    source, skipped = load_source(folder, skip_broken)
    samples = [by_file[name] for name in source.names]
    images: list[np.ndarray] = []
    with tqdm(total=len(source), desc="reading", unit="image", leave=False) as bar:
        for some in batches(source, 256, workers):
            images += some
            bar.update(len(some))
    for sample, image in zip(samples, images, strict=True):
        if image.shape != images[0].shape or image.shape[0] != image.shape[1]:
            raise DataError(
                f"{folder / sample.file}: is {image.shape[1]} x {image.shape[0]}; the images must all be square and of "
                f"one size: sample them again"
            )
    masks = _read_masks(folder, [sample.file for sample in samples]) if with_masks else []
    captions, keys = [sample.caption for sample in samples], [sample.key for sample in samples]
    warnings = [f"{folder}: {len(skipped)} broken images were left out, e.g. {skipped[0]}"] if skipped else []
    about = _about(folder)
    warnings += _foreign(about.get("dataset"))
    return GeneratedBirds(np.stack(images), captions, keys, masks, about, torch.device("cpu"), tuple(warnings))


def _about(folder: Path) -> dict[str, Any]:
    """What the sampler noted about the folder."""
    try:
        about = json.loads((folder / "samples.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        about = {}
    return {"samples": str(folder)} | (about if isinstance(about, dict) else {})


def _read_masks(folder: Path, files: Sequence[str]) -> list[np.ndarray]:
    """masks/NAME_16px.png ... beside NAME.png, by rising size; [] when not every image has the same sizes."""
    stems = [folder / "masks" / Path(file).with_suffix("") for file in files]
    first = stems[0]
    found = [path.stem.rpartition("_")[2] for path in first.parent.glob(f"{first.name}_*px.png")]
    sizes = sorted(int(name[:-2]) for name in found if name[:-2].isdigit())
    paths = [[stem.with_name(f"{stem.name}_{size}px.png") for stem in stems] for size in sizes]
    if not all(path.is_file() for stage in paths for path in stage):
        return []
    return [np.stack([_read_mask(path) for path in tqdm(stage, "masks", leave=False)]) for stage in paths]


def _read_mask(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("L"), dtype=np.float32) / 255
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"{path}: cannot be read as a mask ({error}); sample again") from None


def run_script(
    name: str,
    description: str,
    score: Callable[[GeneratedBirds, argparse.Namespace], tuple[Any, Recipe]],
    with_masks: bool = False,
) -> None:
    """A script that judges birds. name: of the report in the JSON; score: gives a report with `lines()` and `record()`,
    and the recipe of the judge that made it."""
    parser = argparse.ArgumentParser(description=description)
    _add_arguments(parser)
    args = parser.parse_args()
    birds = _birds_of(args, with_masks)
    report, recipe = score(birds, args)
    _print_report(name, report.lines(), report.record(), birds, recipe, args.json)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    """--checkpoint or --samples, how many to draw and how, where judges are kept, and what all scores have."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", metavar="CKPT", help="draw with this generator for captions of the test birds")
    source.add_argument("--samples", metavar="DIR", help="judge a folder that main.py sampled into instead")
    parser.add_argument("--num-images", type=int, default=500, metavar="N", help="to draw (default 500)")
    parser.add_argument("--per-caption", type=int, default=1, metavar="N", help="images of each caption (default 1)")
    parser.add_argument("--seed", type=seed_number, default=0, help="of captions and noise (default 0)")
    parser.add_argument("--truncation", type=float, metavar="T", help="draw with truncated noise, e.g. 0.8")
    cache = default_cache()
    parser.add_argument("--cache", type=Path, default=cache, help=f"folder where trained judges are kept ({cache})")
    add_score_arguments(parser, network=False, weights=False)


def _birds_of(args: argparse.Namespace, with_masks: bool) -> GeneratedBirds:
    """The birds that the options ask for."""
    device = named_device(args.device)
    if args.samples:
        birds = read_birds(args.samples, args.skip_broken, with_masks, args.workers)._replace(device=device)
    else:
        pipeline = TextToImage.load(args.checkpoint, device)
        choices = (args.num_images, args.seed, args.truncation, args.per_caption, args.batch_size, with_masks)
        birds = generate_birds(pipeline, *choices)
    for warning in birds.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    return birds


def _print_report(
    name: str,
    lines: Sequence[str],
    record: dict[str, Any],
    birds: GeneratedBirds,
    recipe: Recipe,
    json_path: str | None,
) -> None:
    """Print the table; with `json_path` also write everything as JSON there, "-" prints the JSON instead."""
    judge = dataclasses.asdict(recipe) | {"recipe_hash": recipe.key()}
    warnings = list(birds.warnings)
    whole = {name: record, "origin": birds.origin, "judge": judge, "versions": versions(), "warnings": warnings}
    print("\n".join(lines), file=sys.stderr if json_path == "-" else sys.stdout)
    if json_path == "-":
        print(json.dumps(whole, indent=1, ensure_ascii=False))
    elif json_path:
        write_json(json_path, whole)
