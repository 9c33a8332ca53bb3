"""The run of a protocol: a stream of images and a protocol in, a record of scores out.

Drawing and the command are in eval/evaluate.py, the metrics in a file each, the report in eval/protocol/report.py.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch

from datasets.records import Records
from eval import find_metric
from eval.features.networks import FeatureNetwork, load_network
from eval.features.reference import RealImages, reference
from eval.metric import NOTHING, Metric, Needs, Run, Score, ScoringBatch, Tools
from eval.protocol.protocols import Protocol
from eval.protocol.report import environment
from miscc.distributed import World, gather
from miscc.errors import CheckpointError, DataError, UserError
from miscc.progress import ProgressBar
from miscc.vocabulary import Vocabulary
from sampling.pipeline import Generated
from sampling.requests import Request

MISSING = (UserError, ImportError)  # what fails one metric and not the others: weights, packages, unsuitable images


@dataclass(frozen=True)
class ImageStream:
    """Images to score: what they are, the request behind each, and a way to get them in batches.

    requests: one an image, in order;
    draw: (some of the requests, whether masks are needed) -> their images in batches;
    text_encoder_hash: of the generator that draws them, None for real images;
    repeats: several requests of each of some captions, apart from the others, for metrics that need them;
    data_set: that they are of, or that the generator was trained on, None where it is not known;
    trained_with: the networks of the generator's training, see sampling/trained_with.py, None where they are not known.
    """

    what: str
    requests: Sequence[Request]
    draw: Callable[[Sequence[Request], bool], Iterator[Generated]]
    image_size: int
    vocabulary: Vocabulary
    text_encoder_hash: str | None = None
    repeats: Sequence[Request] = ()
    data_set: str | None = None
    trained_with: Sequence[Mapping[str, str]] | None = None


class _Task(NamedTuple):
    """What a protocol is run with: its images, what they are compared with, where and by which means."""

    stream: ImageStream
    protocol: Protocol
    real_images: RealImages
    device: torch.device
    tools: Tools
    world: World


def run_protocol(
    stream: ImageStream,
    protocol: Protocol,
    real: Records,
    device: torch.device,
    tools: Tools,
    world: World | None = None,
) -> dict[str, Any] | None:
    """All scores of a protocol for some images: a record without the fields that only the caller can fill.

    None in all processes but the main one. Raises as `eval.evaluate.evaluate`.
    """
    world = world or World(0, 1, device)
    started = time.monotonic()
    total = len(stream.requests)
    if total < max(2, world.size):
        raise DataError(f"{total} image(s) to score; give a larger --num-images")

    # Metrics, feature network and real images.
    missing: dict[str, str] = {}
    real_images = RealImages(real, stream.image_size, protocol.real_crop, protocol.seed)
    task = _Task(stream, protocol, real_images, device, tools, world)
    run, about_real = _prepare(task, missing)
    metrics = _build_metrics(task, run, missing)
    if world.is_main and not metrics:
        raise UserError(f"protocol {protocol.name}: nothing can be computed: {_reasons(missing)}")
    by_others = _distances_by_other_networks(task, missing)
    ready = time.monotonic()

    # This process's share of the images, then those of the other processes, then images drawn for single metrics.
    shared = {name: metric for name, metric in metrics.items() if not metric.needs.repeats}
    rows = range(total * world.rank // world.size, total * (world.rank + 1) // world.size)
    groups = [(run, list(shared.values())), *((other, [metric]) for other, metric in by_others.values())]
    _update(groups, stream, rows, real_images, progress=world.is_main)
    _merge_processes([metric for _, members in groups for metric in members], world)
    if not world.is_main:
        return None
    _update_with_repeats(list(metrics.values()), stream, run, real_images)
    drawn = time.monotonic()

    # Scores in the protocol's order.
    metrics |= {name: metric for name, (_, metric) in by_others.items()}
    scores = [score.after_training(stream.trained_with) for score in _compute(metrics, missing)]
    if not scores:
        raise UserError(f"protocol {protocol.name}: nothing can be computed: {_reasons(missing)}")
    done = time.monotonic()
    return {
        "image_source": stream.what,
        "protocol": asdict(protocol),
        "overrides": {},
        "scores": [score.record() for score in scores],
        "not_computed": missing,
        "num_images": total,
        "network": run.network.protocol() if run.network else None,
        "real": _about_records(real, metrics) | about_real,
        "warnings": list(dict.fromkeys(warning for score in scores for warning in score.warnings)),
        "seconds": _seconds(ready - started, drawn - ready, done - drawn),
        **environment(device, world.size),
    }


def _prepare(task: _Task, missing: dict[str, str]) -> tuple[Run, dict[str, Any]]:
    """What metrics are built from, and what the real images were. Adds metrics that cannot be imported to `missing`."""
    stream, protocol, tools, device = task.stream, task.protocol, task.tools, task.device
    needs = needs_of(protocol, missing)
    about_stream = (stream.requests, stream.image_size, stream.vocabulary, stream.text_encoder_hash)
    run = Run(protocol, tools, device, *about_stream)

    # The feature network, once for all metrics.
    by_features = [name for name, need in needs.items() if need.features]
    try:
        network = load_network(protocol.network, tools.weights, protocol.resize, device) if by_features else None
    except MISSING as error:
        missing |= dict.fromkeys(by_features, str(error))
        return run, {}

    # Features of the real images, where a metric compares with them.
    real = {needs[name].real for name in by_features} - {""}
    if network is None or not task.world.is_main or not real:
        return replace(run, network=network), {}
    found = reference(task.real_images, network, "features" in real, tools.cache, tools.batch_size, tools.progress)
    about = {"fingerprint": found.fingerprint, "from_cache": found.from_cache}
    return replace(run, network=network, reference=found), about


def needs_of(protocol: Protocol, missing: dict[str, str]) -> dict[str, Needs]:
    """What each metric of the protocol needs; those that cannot be imported are added to `missing`."""
    needs = {}
    for name in protocol.metrics:
        try:
            needs[name] = find_metric(name).needs
        except ImportError as error:
            missing[name] = str(error)
    return needs


def _build_metrics(task: _Task, run: Run, missing: dict[str, str]) -> dict[str, Metric]:
    """The metrics that can be computed; the others are added to `missing`."""
    stream, real_keys = task.stream, set(task.real_images.records.keys)
    metrics = {}
    for name in run.protocol.metrics:
        if name in missing:
            continue
        metric, needs = find_metric(name), find_metric(name).needs
        if needs.repeats and not task.world.is_main:
            continue  # the main process alone draws for it

        # What the metric needs must be there; building it may still show that weights are missing.
        try:
            if needs.data_set and stream.data_set not in (None, needs.data_set):
                raise DataError(f"it reads images of {needs.data_set} alone, these are of {stream.data_set}")
            if needs.encoders and task.tools.encoders is None and task.tools.no_encoders:
                raise CheckpointError(task.tools.no_encoders)
            if needs.repeats and not stream.repeats:
                raise DataError("there is one image of each caption")
            if needs.real_images and not all(request.key in real_keys for request in stream.requests):
                raise DataError("the real image of some captions is not among the real images of the protocol")
            metrics[name] = metric.from_run(replace(run, requests=stream.repeats) if needs.repeats else run)
        except MISSING as error:
            missing[name] = str(error)
    return metrics


def _distances_by_other_networks(task: _Task, missing: dict[str, str]) -> dict[str, tuple[Run, Metric]]:
    """FID by each of the protocol's more_networks, with the run that has this network; by names for `missing`."""
    found: dict[str, tuple[Run, Metric]] = {}
    for network in task.protocol.more_networks if "FID" in task.protocol.metrics else ():
        # The protocol with this network and FID alone; a weight file of the user's is of the first network.
        protocol = replace(task.protocol, network=network, more_networks=(), metrics=("FID",))
        own = task._replace(protocol=protocol, tools=replace(task.tools, weights=None))
        lacks: dict[str, str] = {}
        run, _ = _prepare(own, lacks)
        metrics = _build_metrics(own, run, lacks)
        missing |= {f"{name} by {network}": reason for name, reason in lacks.items()}
        found |= {f"{name} by {network}": (run, metric) for name, metric in metrics.items()}
    return found


def _update(
    groups: Sequence[tuple[Run, Sequence[Metric]]],
    stream: ImageStream,
    rows: range,
    real_images: RealImages,
    progress: bool,
) -> None:
    """Draw the images of `rows` and update the metrics with them.

    groups: metrics by the run whose network they read.
    """
    # What the metrics need beside the images.
    requests, tools = stream.requests[rows.start : rows.stop], groups[0][0].tools
    metrics = [metric for _, members in groups for metric in members]
    with_masks = any(metric.needs.masks for metric in metrics)
    index_of = {}
    if any(metric.needs.real_images for metric in metrics):
        index_of = {key: index for index, key in enumerate(real_images.records.keys)}

    done, shown = 0, progress and tools.progress
    with ProgressBar(what=stream.what, total=len(rows), unit="images", shown=shown) as bar:
        for drawn in stream.draw(requests, with_masks):
            part = slice(done, done + len(drawn.images))
            others = [real_images.read(index_of[request.key]) for request in requests[part]] if index_of else []
            for run, members in groups:
                batch = replace(_batch(drawn, rows[part], requests[part], run.network), real_images=others)
                for metric in members:
                    metric.update(batch)
            done = part.stop
            bar.update(len(drawn.images))


def _merge_processes(metrics: Sequence[Metric], world: World) -> None:
    """Give the main process's metrics what those of the other processes have accumulated."""
    for metric in metrics:
        for other in gather(metric, world)[1:]:
            metric.merge(other)


def _update_with_repeats(metrics: Sequence[Metric], stream: ImageStream, run: Run, real_images: RealImages) -> None:
    """Draw the stream's repeats for the metrics that need them, if there are any."""
    repeated = [metric for metric in metrics if metric.needs.repeats]
    if repeated:
        group = (replace(run, network=None), repeated)
        rows = range(len(stream.repeats))
        _update([group], replace(stream, requests=stream.repeats), rows, real_images, progress=False)


def _batch(drawn: Generated, rows: range, requests: Sequence[Request], network: FeatureNetwork | None) -> ScoringBatch:
    images = list(drawn.images)
    features, logits = network.extract_features(images) if network else (NOTHING, NOTHING)
    return ScoringBatch(images, rows, requests, drawn.masks, features, logits)


def _compute(metrics: Mapping[str, Metric], missing: dict[str, str]) -> list[Score]:
    """The scores, in the protocol's order; what cannot be computed is added to `missing`."""
    scores = []
    for name, metric in metrics.items():
        try:
            scores += metric.compute()
        except MISSING as error:
            missing[name] = str(error)
    return scores


def _about_records(real: Records, metrics: Mapping[str, Metric]) -> dict[str, Any]:
    """The real images' split, and the names of the metrics that compare with it."""
    readers = [name for name, metric in metrics.items() if metric.needs.real or metric.needs.real_images]
    return {"data_set": real.name, "split": real.split, "num_images": len(real), "read_by": readers}


def _seconds(loading: float, drawing: float, scoring: float) -> dict[str, float]:
    """As records of earlier versions name them."""
    parts = {"loading and real images": loading, "drawing and looking": drawing, "scores": scoring}
    return {part: round(value, 1) for part, value in parts.items()}


def _reasons(missing: Mapping[str, str]) -> str:
    return "; ".join(f"{metric}: {reason}" for metric, reason in missing.items())
