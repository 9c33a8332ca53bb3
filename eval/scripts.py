"""What the metrics' scripts share: their options, the loop over a folder of images, and the output as lines and JSON."""

import argparse
import itertools
import json
import platform
import sys
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path

from tqdm import tqdm

from eval.features.networks import NETWORKS, RESIZE, FeatureNetwork, WeightsError, load_network
from eval.features.sources import ImageSource, Sample, batches, read_samples
from eval.features.statistics import default_cache, load_source
from eval.metric import Metric, Score, ScoringBatch
from miscc.command_line import add_device_option, named_device, positive, seed_number
from miscc.errors import CheckpointError
from miscc.files import write_json
from sampling.requests import Request

PACKAGES = ("torch", "torchvision", "torch-fidelity", "lpips", "transformers", "pillow", "numpy", "scipy")


def add_arguments(parser: argparse.ArgumentParser, network: bool = True, weights: bool = True) -> None:
    """The options that all metrics have; `network`: also those for the choice of a feature network."""
    add = parser.add_argument
    add_device_option(parser)
    add("--batch-size", type=positive, default=32, help="images at a time (default 32)")
    add("--workers", type=positive, help="threads that decode images (default: one a core, up to 8)")
    add("--json", nargs="?", const="-", metavar="PATH", help="write JSON there; without PATH: print it")
    add("--skip-broken", action="store_true", help="leave out, and count, images that cannot be read")
    if weights:
        add("--weights", metavar="PATH", help="weight file (default: torch hub's cache)")
    if network:
        add("--network", default="inception-tf", choices=list(NETWORKS), help="default inception-tf")
        add(
            "--resize",
            choices=list(RESIZE),
            help="tf1: as torch-fidelity (default of inception-tf); bilinear: as pytorch-fid; clean: as clean-fid",
        )
        add("--seed", type=seed_number, default=2020, help="of shuffles and subsets (default 2020)")


def add_sources(parser: argparse.ArgumentParser, statistics: bool = False) -> None:
    """REAL and FAKE. statistics: also a .npz of statistics."""
    kinds = ".zip, .npz of images or of mu and sigma" if statistics else ".zip or .npz"
    parser.add_argument("real", help=f"real images: folder, list of files, {kinds}")
    parser.add_argument("fake", help="generated images, likewise")


def add_ranking_arguments(parser: argparse.ArgumentParser) -> None:
    """A folder of samples, and the options of a metric that ranks an image's own caption among others."""
    add = parser.add_argument
    add("--samples", required=True, metavar="DIR", help="folder that main.py sampled into")
    add("--candidates", type=positive, default=99, metavar="N", help="wrong captions an image (default 99)")
    add("--lists", metavar="PATH", help="candidate lists as JSON: read if there, else written")
    add("--folds", type=int, default=10, help="default 10, as AttnGAN")
    add("--seed", type=seed_number, default=2020, help="of candidate lists and folds")
    add_arguments(parser, network=False, weights=False)


def ranking_options(args: argparse.Namespace) -> dict:
    """What `add_ranking_arguments` adds, beside samples and device."""
    names = {"num_candidates": args.candidates, "folds": args.folds, "seed": args.seed, "lists": args.lists}
    return names | {"skip_broken": args.skip_broken, **extraction_of(args)}


def add_cache_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of a script that keeps reference statistics."""
    parser.add_argument(
        "--cache", type=Path, default=default_cache(), help=f"folder of kept statistics ({default_cache()})"
    )
    parser.add_argument("--no-cache", dest="cache", action="store_const", const=None, help="keep nothing")


def network_of(args: argparse.Namespace) -> FeatureNetwork:
    """The network that the options name, on the device that they name. Raises CheckpointError without its weights."""
    try:
        return load_network(args.network, args.weights, args.resize, named_device(args.device))
    except WeightsError as error:
        raise CheckpointError(f"{error}; offline take --network efficientnet-lite0") from None


def extraction_of(args: argparse.Namespace) -> dict:
    """The options of `update_from` and of `eval.features.statistics.extract`."""
    return {"batch_size": args.batch_size, "workers": args.workers, "progress": True}


def open_samples(folder: str | Path, skip_broken: bool = False) -> tuple[ImageSource, list[Sample], tuple[str, ...]]:
    """The images that main.py sampled into a folder, what each was made from, and the names of broken ones left out."""
    by_file = {sample.file: sample for sample in read_samples(folder)}
    source, skipped = load_source(folder, skip_broken)
    return source, [by_file[name] for name in source.names], skipped


def update_from(
    source: ImageSource,
    metric: Metric,
    network: FeatureNetwork | None = None,
    samples: Iterable[Sample] = (),
    real: ImageSource | None = None,
    batch_size: int = 32,
    workers: int | None = None,
    progress: bool | None = None,
) -> Metric:
    """Update a metric with the images of a source, batch by batch; returns the metric.

    network: whose features the metric needs;
    samples: what each image was made from;
    real: the real image of each;
    progress: whether to show a bar, None: on a terminal only.
    Raises DataError, naming the file, for an image that cannot be read.
    """
    # The request behind each image, where samples say it.
    requests = [Request(i, s.caption, s.key, s.caption_number, s.sample) for i, s in enumerate(samples)]

    # Batch by batch, with features and real images where they are needed.
    done, hidden = 0, not (sys.stderr.isatty() if progress is None else progress)
    with tqdm(total=len(source), desc=source.path.name, unit="image", leave=False, disable=hidden) as bar:
        partners = batches(real, batch_size, workers) if real else itertools.repeat(())
        for images, real_images in zip(batches(source, batch_size, workers), partners, strict=False):
            rows = range(done, done + len(images))
            features, logits = network.extract_features(images) if network else (None, None)
            chosen = requests[rows.start : rows.stop]
            metric.update(ScoringBatch(images, rows, chosen, (), features, logits, real_images))
            done = rows.stop
            bar.update(len(images))
    return metric


def broken(path: str | Path, skipped: Sequence[str]) -> tuple[str, ...]:
    """The warning about images of a folder that were left out; empty where there are none."""
    return (f"{path}: {len(skipped)} broken images were left out, e.g. {skipped[0]}",) if skipped else ()


def describe(role: str, path: str | Path, skipped: Sequence[str]) -> dict:
    """The fields of a score's protocol that say what a set of images was."""
    return {role: str(path), f"skipped_{role}": len(skipped), f"skipped_{role}_names": [*skipped]}


def versions() -> dict[str, str]:
    """The versions of what computed a score."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def report(scores: Sequence[Score], json_path: str | None) -> None:
    """Print a line for each score and its warnings; with `json_path` also write them there, "-" prints JSON instead."""
    for warning in dict.fromkeys(warning for score in scores for warning in score.warnings):
        print(f"warning: {warning}", file=sys.stderr)

    lines = [score.line() for score in scores]
    print_lines(lines, {"scores": [score.record() for score in scores], "versions": versions()}, json_path)


def print_lines(lines: Sequence[str], record: dict, json_path: str | None) -> None:
    """Print lines; with `json_path` also write the record there as JSON, "-" prints JSON instead."""
    print("\n".join(lines), file=sys.stderr if json_path == "-" else sys.stdout)
    if json_path == "-":
        print(json.dumps(record, indent=1, ensure_ascii=False))
    elif json_path:
        write_json(json_path, record)
