"""What the metrics' scripts share: `run_script`, their options, the loop over a set of images, the output as lines and JSON."""

import argparse
import itertools
import json
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from eval.features.networks import NETWORKS, RESIZE, FeatureNetwork, WeightsError, load_network
from eval.features.reference import Reference
from eval.features.sources import ImageSource, Sample, batches, read_samples
from eval.features.statistics import collect_features, default_cache, load_source, statistics_of_features
from eval.metric import NOTHING, Metric, Run, Score, ScoringBatch, Tools
from eval.protocol.protocols import Protocol
from miscc.command_line import CommandParser, add_device_option, named_device, positive, seed_number
from miscc.errors import CheckpointError
from miscc.files import read_json, write_json
from miscc.progress import ProgressBar
from sampling.requests import Request
from sampling.trained_with import entries_of

ABOUT_FILE = "samples.json"  # beside sampled images: what they were made with, `encoder_hash`, `trained_with` among it
PACKAGES = ("torch", "torchvision", "torch-fidelity", "lpips", "transformers", "pillow", "numpy", "scipy")


Skipped = tuple[str | Path, Sequence[str]]  # where images are, and the names of broken ones left out
PROTOCOL_FIELDS = ("splits", "kid_subsets", "kid_subset_size", "candidates", "folds", "seed")  # that options may set


def add_arguments(parser: argparse.ArgumentParser, network: bool = True, weights: bool = True) -> None:
    """The options that all metrics have; `network`: also those for the choice of a feature network."""
    add = parser.add_argument
    add_device_option(parser)
    add("--batch-size", type=positive, default=32, help="images at a time (default 32)")
    add("--workers", type=positive, help="threads that decode images (default: one a core, up to 8)")
    add("--json", nargs="?", const="-", metavar="PATH", help="write JSON there; without PATH: print it")
    add("--skip-broken", action="store_true", help="leave out, and count, images that cannot be read")

    # Of the network whose features are read.
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
    """REAL and FAKE.

    statistics: also a .npz of statistics.
    """
    kinds = ".zip, .npz of images or of mu and sigma" if statistics else ".zip or .npz"
    parser.add_argument("real", help=f"real images: folder, list of files, {kinds}")
    parser.add_argument("fake", help="generated images, likewise")


def add_ranking_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of a metric that ranks an image's own caption among others."""
    add = parser.add_argument
    add("--candidates", type=positive, default=99, metavar="N", help="wrong captions an image (default 99)")
    add("--lists", metavar="PATH", help="candidate lists as JSON: read if there, else written")
    add("--folds", type=int, default=10, help="default 10, as AttnGAN")
    add("--seed", type=seed_number, default=2020, help="of candidate lists and folds")


def add_cache_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of a script that keeps reference statistics."""
    add_cache_dir_option(parser, "kept statistics")
    parser.add_argument("--no-cache", dest="cache_dir", action="store_const", const=None, help="keep nothing")


def add_cache_dir_option(parser: argparse.ArgumentParser, content: str) -> None:
    """`--cache-dir` (formerly `--cache`) as the Path `options.cache_dir`.

    content: what is kept there.
    """
    folder = default_cache()
    parser.add_argument(
        "--cache-dir", "--cache", dest="cache_dir", type=Path, default=folder, metavar="DIR",
        help=f"folder of {content} ({folder})",
    )  # fmt: skip


def network_of(args: argparse.Namespace) -> FeatureNetwork:
    """The network that the options name, on the device that they name. Raises CheckpointError without its weights."""
    try:
        return load_network(args.network, args.weights, args.resize, named_device(args.device))
    except WeightsError as error:
        raise CheckpointError(f"{error}; offline take --network efficientnet-lite0") from None


def extraction_of(args: argparse.Namespace) -> dict:
    """The options of `update_from` and of `eval.features.statistics.extract`."""
    return {"batch_size": args.batch_size, "workers": args.workers}


@dataclass(frozen=True)
class ImageSet:
    """Images on disk that are scored.

    skipped: names of broken images that were left out;
    samples: what each image was made from, () where nothing says it.
    """

    path: str | Path
    source: ImageSource
    skipped: tuple[str, ...] = ()
    samples: tuple[Sample, ...] = ()

    @property
    def requests(self) -> list[Request]:
        """The request behind each image; without caption and key where there are no samples."""
        if not self.samples:
            return [Request(index, "", "", 0, 0) for index in range(len(self.source))]
        return [Request(i, s.caption, s.key, s.caption_number, s.sample) for i, s in enumerate(self.samples)]


def open_images(path: str | Path, skip_broken: bool = False, with_samples: bool = False) -> ImageSet:
    """Open a source of eval/features/sources.py.

    with_samples: a folder that main.py sampled into, else DataError.
    """
    by_file = {sample.file: sample for sample in read_samples(path)} if with_samples else {}
    source, skipped = load_source(path, skip_broken)
    return ImageSet(path, source, skipped, tuple(by_file[name] for name in source.names if by_file))


def score_set(
    metric: Metric,
    images: ImageSet,
    real: ImageSet | None = None,
    network: FeatureNetwork | None = None,
    **options,
) -> list[Score]:
    """Update a metric with a set of images; its scores, with descriptions of these and of `real`. options: as `update_from`."""
    scores = update_from(images.source, metric, network, images.requests, **options).compute()
    scores = [score.after_training(trained_with_of(images.path)) for score in scores]
    if real is not None:
        return say_origin(scores, (real.path, real.skipped), (images.path, images.skipped))
    origin = {"images": str(images.path), "skipped": len(images.skipped), "skipped_names": list(images.skipped)}
    return [score.of(origin, broken(images.path, images.skipped)) for score in scores]


def score_images(
    metric: type[Metric],
    path: str | Path,
    real: str | Path | None = None,
    *,
    network: FeatureNetwork | None = None,
    build: Callable[[Run], Metric] | None = None,
    protocol: Protocol = Protocol("script", ""),  # noqa: B008  # frozen
    tools: Tools = Tools(),  # noqa: B008  # frozen
    device: str | torch.device = "cpu",
    skip_broken: bool = False,
    **options,
) -> list[Score]:
    """The scores of images on disk by a metric that is built as for a protocol.

    real: images that they are compared with, where the metric needs any;
    build: makes the metric of the run, None: its `from_run`;
    options: as `update_from`.
    Raises DataError, naming the file, for an image that cannot be read.
    """
    needs = metric.needs
    images = open_images(path, skip_broken, needs.captions)

    # What generated images are compared with.
    others = reference = None
    if needs.real and real is not None and network is not None:
        others = open_images(real, skip_broken)
        features = collect_features(others.source, network, **options)
        statistics = statistics_of_features(features, network.protocol()) if needs.real == "statistics" else None
        reference = Reference(statistics, features, others.source.fingerprint(), from_cache=False)

    # The metric, as a protocol would build it.
    run = Run(
        protocol,
        tools,
        torch.device(device),
        images.requests,
        image_size=images.source.read(0).shape[0],
        vocabulary=None,
        text_encoder_hash=said_of_samples(path, "encoder_hash") if needs.captions else None,
        network=network,
        reference=reference,
        folder=Path(path) if needs.captions else None,
        files=images.source.names,
    )
    built = build(run) if build else metric.from_run(run)
    return score_set(built, images, others, network if needs.features else None, **options)


def said_of_samples(folder: str | Path, field: str) -> Any:
    """A field of samples.json in a folder of samples, such as encoder_hash; None where it does not say."""
    try:
        return read_json(Path(folder) / ABOUT_FILE).get(field)
    except (OSError, ValueError, AttributeError):
        return None


def trained_with_of(folder: str | Path) -> list[dict[str, str]] | None:
    """The networks of the training that samples.json in a folder of samples names; None where it names none."""
    said = said_of_samples(folder, "trained_with")
    return entries_of(said) if isinstance(said, list) else None


def run_script(
    metric: type[Metric],
    add_options: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
    build: Callable[[Run, argparse.Namespace], Metric] | None = None,
    load: Callable[[argparse.Namespace], FeatureNetwork] = network_of,
    tools_of: Callable[[argparse.Namespace], Tools] = lambda args: Tools(),
) -> None:
    """The script of a metric; sources and options follow from what it needs, its class's first line is the description.

    add_options: those of its own; one named as a field of Protocol sets that field;
    build: (run, options) -> metric, None: its `from_run`;
    load: the feature network;
    tools_of: see Tools.
    """
    needs, parser = metric.needs, CommandParser(description=(metric.__doc__ or "").partition("\n")[0])

    # Sources and options follow from what the metric needs.
    if needs.captions:
        parser.add_argument(
            "--samples", dest="images", required=True, metavar="DIR", help="folder of main.py's samples"
        )
    elif needs.real:
        add_sources(parser)
    else:
        parser.add_argument("images", help="generated images: folder, list of files, .zip or .npz")
    add_options(parser)
    add_arguments(parser, network=needs.features, weights=needs.features)
    args = parser.parse_args()

    # Options of a protocol's fields stand for these; network and filter are the network's own.
    values = vars(args)
    choices = {name: values[name] for name in PROTOCOL_FIELDS if name in values}
    network, tools = load(args) if needs.features else None, tools_of(args)
    scores = score_images(
        metric,
        *((args.fake, args.real) if needs.real else (args.images,)),
        network=network,
        build=(lambda run: build(run, args)) if build else None,
        protocol=Protocol("script", "", **choices),
        tools=tools,
        device=named_device(args.device),
        skip_broken=args.skip_broken,
        **extraction_of(args),
    )
    report(scores, args.json)


def update_from(
    source: ImageSource,
    metric: Metric,
    network: FeatureNetwork | None = None,
    requests: Sequence[Request] = (),
    real: ImageSource | None = None,
    batch_size: int = 32,
    workers: int | None = None,
    progress: bool = True,
) -> Metric:
    """Update a metric with the images of a source, batch by batch; returns the metric.

    network: whose features the metric needs;
    requests: the request behind each image;
    real: the real image of each;
    progress: whether to show any.
    Raises DataError, naming the file, for an image that cannot be read.
    """
    done = 0
    with ProgressBar(what=source.path.name, total=len(source), unit="images", shown=progress) as bar:
        partners = batches(real, batch_size, workers) if real else itertools.repeat(())
        for images, real_images in zip(batches(source, batch_size, workers), partners, strict=False):
            rows = range(done, done + len(images))
            features, logits = network.extract_features(images) if network else (NOTHING, NOTHING)
            chosen = requests[rows.start : rows.stop]
            metric.update(ScoringBatch(images, rows, chosen, (), features, logits, real_images))
            done = rows.stop
            bar.update(len(images))
    return metric


def broken(path: str | Path, skipped: Sequence[str]) -> tuple[str, ...]:
    """The warning about images of a folder that were left out; empty where there are none."""
    return (f"{path}: {len(skipped)} broken images were left out, e.g. {skipped[0]}",) if skipped else ()


def say_origin(scores: Sequence[Score], real: Skipped, fake: Skipped) -> list[Score]:
    """The scores with descriptions of the real and the generated images, and warnings of images that were left out."""
    origin, warnings = {}, ()
    for role, (path, skipped) in (("real", real), ("fake", fake)):
        origin |= {role: str(path), f"skipped_{role}": len(skipped), f"skipped_{role}_names": [*skipped]}
        warnings += broken(path, skipped)
    return [score.of(origin, warnings) for score in scores]


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
    # JSON alone on the screen where it goes there: the lines then are messages.
    print("\n".join(lines), file=sys.stderr if json_path == "-" else sys.stdout)
    if json_path == "-":
        print(json.dumps(record, indent=1, ensure_ascii=False))
    elif json_path:
        write_json(json_path, record)
