"""Images and a protocol in, a record of scores out; whoever makes the images, a generator or the real world.

Drawing and the command are eval/evaluate.py's, the numbers eval/protocol/measures.py's, the report eval/protocol/report.py's.
"""

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from datasets.records import Records
from eval.features.networks import WeightsError, load_network
from eval.features.reference import RealImages, reference
from eval.protocol.measures import (
    FROM_FEATURES,
    OF_BIRDS,
    SINGLE_FEATURES,
    BirdMeasure,
    DiversityMeasure,
    FeatureMeasure,
    Measure,
    RetrievalMeasure,
)
from eval.protocol.protocols import Protocol
from eval.protocol.report import environment
from eval.protocol.scores import Score
from miscc.distributed import World
from miscc.errors import CheckpointError, DataError, UserError
from miscc.vocabulary import Vocabulary
from sampling.encoders import Encoders
from sampling.pipeline import Generated
from sampling.requests import Request

MISSING = (UserError, ImportError)  # what costs one number and not the others: weights, packages, unsuitable images


@dataclass(frozen=True)
class Tools:
    """What a protocol does not name because it changes no number, or because only the user can say where it is.

    encoders: of R-precision; weights, lpips_weights: files in place of those in torch hub's cache; cache: folder of kept
    features and judges, None: keep no features.
    """

    encoders: Encoders | None = None
    weights: str | Path | None = None
    lpips_weights: str | Path | None = None
    cache: str | Path | None = None
    batch_size: int = 32
    progress: bool | None = None


@dataclass(frozen=True)
class Judged:
    """Images to be judged, whoever makes them: what they are, the request behind each, and a way to get them in batches.

    text_encoder_hash: of the generator that draws them, None for real images; data_set: that they are of, or that the
    generator was trained on, None where it is not known.
    """

    what: str
    requests: Sequence[Request]
    batches: Callable[[range], Iterator[Generated]]
    image_size: int
    vocabulary: Vocabulary
    text_encoder_hash: str | None = None
    diverse: Callable[[], tuple[list[str], Iterator[Generated]]] | None = None
    data_set: str | None = None


def judge(
    judged: Judged, protocol: Protocol, real: Records, device: torch.device, tools: Tools, world: World | None = None
) -> dict[str, Any] | None:
    """All numbers of a protocol for some images: a record without what only their maker knows. Raises as `evaluate`."""
    world = world or World(0, 1, device)
    started = time.monotonic()
    total = len(judged.requests)
    if total < max(2, world.size):
        raise DataError(f"{total} image(s) to judge; give a larger --num-images")
    rows = range(total * world.rank // world.size, total * (world.rank + 1) // world.size)
    real_images = RealImages(real, judged.image_size, protocol.real_crop, protocol.seed)
    measures, missing, about_real = _prepare(judged, protocol, real_images, rows, device, tools, world)
    if not measures:
        raise UserError(f"protocol {protocol.name}: nothing can be computed: {_reasons(missing)}")
    ready = time.monotonic()
    hidden = not (world.is_main and (sys.stderr.isatty() if tools.progress is None else tools.progress))
    with tqdm(total=len(rows), desc=judged.what, unit="image", leave=False, disable=hidden) as bar:
        for drawn in judged.batches(rows):
            for measure in measures:
                measure.update(drawn)
            bar.update(len(drawn.images))
    for measure in measures:
        measure.gather(world)
    if not world.is_main:
        return None
    if "diversity" in protocol.metrics:
        measures += _diversity(judged, tools, device, missing)
    drawn_at = time.monotonic()
    scores = _finish(measures, protocol, missing)
    if not scores:
        raise UserError(f"protocol {protocol.name}: nothing can be computed: {_reasons(missing)}")
    network = next((m.network.protocol() for m in measures if isinstance(m, FeatureMeasure)), None)
    return {
        "judged": judged.what,
        "protocol": asdict(protocol),
        "overrides": {},
        "scores": [score.record() for score in scores],
        "not_computed": missing,
        "num_images": total,
        "network": network,
        "real": {"data_set": real.name, "split": real.split, "num_images": len(real), **about_real},
        "warnings": list(dict.fromkeys(warning for score in scores for warning in score.warnings)),
        "seconds": {
            "loading and real images": round(ready - started, 1),
            "drawing and looking": round(drawn_at - ready, 1),
            "scores": round(time.monotonic() - drawn_at, 1),
        },
        **environment(device, world.size),
    }


def _prepare(
    judged: Judged,
    protocol: Protocol,
    real_images: RealImages,
    rows: range,
    device: torch.device,
    tools: Tools,
    world: World,
) -> tuple[list[Measure], dict[str, str], dict[str, Any]]:
    """The measures, why others are missing, and what the real images were."""
    measures: list[Measure] = []
    missing: dict[str, str] = {}
    about_real: dict[str, Any] = {}
    wanted = [metric for metric in protocol.metrics if metric in FROM_FEATURES]
    try:
        network = load_network(protocol.network, tools.weights, protocol.resize, device) if wanted else None
    except MISSING as error:
        network = None
        missing |= dict.fromkeys(wanted, str(error))
    if network is not None:
        found = None
        if world.is_main and wanted != ["IS"]:
            single = bool(set(wanted) & set(SINGLE_FEATURES))
            found = reference(real_images, network, single, tools.cache, tools.batch_size, tools.progress)
            about_real = {"fingerprint": found.fingerprint, "from_cache": found.from_cache}
        measures.append(FeatureMeasure(network, protocol, found, rows, len(judged.requests)))
    if "R_precision" in protocol.metrics:
        try:
            if tools.encoders is None:
                raise CheckpointError("no encoders; name a DAMSM checkpoint by --encoders")
            arguments = (judged.vocabulary, judged.requests, protocol, judged.text_encoder_hash)
            measures.append(RetrievalMeasure(tools.encoders, *arguments))
        except MISSING as error:
            missing["R_precision"] = str(error)
    of_birds = [metric for metric in protocol.metrics if metric in OF_BIRDS]
    if of_birds and judged.data_set not in (None, "toybirds"):
        reason = f"the judges know drawn birds (toybirds) alone, these images are of {judged.data_set}"
        missing |= dict.fromkeys(of_birds, reason)
    elif of_birds:
        measures.append(BirdMeasure(judged.requests, protocol, device, tools.cache))
    return measures, missing, about_real


def _diversity(judged: Judged, tools: Tools, device: torch.device, missing: dict[str, str]) -> list[Measure]:
    """Draw several images of some captions and look at them."""
    try:
        if judged.diverse is None:
            raise DataError("there is one image of each caption")
        captions, batches = judged.diverse()
        measure = DiversityMeasure(tools.lpips_weights, judged.image_size, captions, device)
    except WeightsError as error:
        missing["diversity"] = f"{error.text}, or give its place with --lpips-weights PATH"
        return []
    except MISSING as error:
        missing["diversity"] = str(error)
        return []
    for drawn in batches:
        measure.update(drawn)
    return [measure]


def _finish(measures: Sequence[Measure], protocol: Protocol, missing: dict[str, str]) -> list[Score]:
    """The scores in the protocol's order; what cannot be computed is added to `missing`."""
    parts = {metric: part for measure in measures for metric, part in measure.parts.items()}
    scores = []
    for metric in protocol.metrics:
        if metric in parts:
            try:
                scores += parts[metric]()
            except MISSING as error:
                missing[metric] = str(error)
    return scores


def _reasons(missing: Mapping[str, str]) -> str:
    return "; ".join(f"{metric}: {reason}" for metric, reason in missing.items())
