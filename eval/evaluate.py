"""Score a checkpoint by a named protocol: `python -m eval.evaluate --checkpoint CKPT --protocol small`.

Draws straight into memory, compares with the real images, prints a table and adds a record with everything that is
needed to repeat it to evaluation.json beside the checkpoint. With torchrun the images are shared among processes.
Protocols are in protocols.py, the numbers come from judging.py and measures.py, the report is evaluation_report.py's.
"""

import argparse
import functools
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: this folder hides the standard library's and others' names
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from datasets import load_records
from datasets.records import Records
from eval.features.reference import RealImages
from eval.protocol.protocols import Protocol, find_protocol
from eval.protocol.report import add_record, check_writable, print_record
from eval.protocol.runner import Judged, Tools, judge
from eval.protocol.scores import add_cache_arguments, named_device, positive
from miscc import distributed
from miscc.checkpoint import hash_tensors
from miscc.distributed import World
from miscc.errors import CheckpointError, ConfigError, run_command
from miscc.files import hash_of_file
from miscc.randomness import stream
from miscc.vocabulary import Vocabulary
from sampling.encoders import Encoders, load_encoders
from sampling.pipeline import Generated, TextToImage
from sampling.published import weight_file
from sampling.requests import Request, split_requests


def requests_of(protocol: Protocol, records: Records, num_images: int | None = None) -> list[Request]:
    """What a protocol draws for the captions of a split, or so many of it.

    num_images below the protocol's: for caption_choice "random" so many images of as many captions as that needs; else
    so many of the whole list, drawn by the seed.
    """
    if protocol.caption_choice != "random":
        most = protocol.captions_per_image if protocol.caption_choice == "first" else 0
        every = split_requests(records, most, protocol.images_per_caption)
        if num_images is None or num_images >= len(every):
            return every
        chosen = sorted(stream(protocol.seed, "quick look").permutation(len(every))[:num_images])
        return [every[place]._replace(index=index) for index, place in enumerate(chosen)]
    number = num_images or protocol.num_images
    each = protocol.images_per_caption
    chosen = split_requests(records, num_images=-(-number // each), seed=protocol.seed)
    repeated = [(request, sample) for request in chosen for sample in range(each)][:number]
    return [r._replace(index=i, sample=each * r.sample + sample) for i, (r, sample) in enumerate(repeated)]


def real_images_of(protocol: Protocol, records: Records, num_images: int | None = None) -> Records:
    """The real images that a protocol compares with: all, or `num_real` of them drawn by the seed.

    num_images: of a quick look, which then takes no more real images than it draws.
    """
    if protocol.num_real is None:
        return records
    wanted = min(protocol.num_real, len(records), max(2, num_images or protocol.num_real))
    if wanted == len(records):
        return records
    return records.select(sorted(stream(protocol.seed, "real images").permutation(len(records))[:wanted]))


def evaluate(
    pipeline: TextToImage,
    protocol: Protocol,
    real: Records,
    prompts: Records | None = None,
    *,
    num_images: int | None = None,
    tools: Tools | None = None,
    world: World | None = None,
) -> dict[str, Any] | None:
    """Draw by a protocol and score: the record that evaluation.json keeps, None in all processes but the main one.

    real: the real images; prompts: whose captions are drawn, None: those of `real`; a trainer gives held-out training
    records here. num_images: a quick look instead of the protocol's number, which is recorded as an override.
    A number that lacks its weights is listed as not computed; raises UserError when that leaves none at all.
    """
    tools = tools or Tools()
    prompts = real if prompts is None else prompts
    real = real_images_of(protocol, real, num_images)
    requests = requests_of(protocol, prompts, num_images)
    several = _several(protocol, prompts, first=len(requests))
    generate = functools.partial(
        pipeline.generate, seed=protocol.seed, truncation=protocol.truncation, batch_size=tools.batch_size
    )

    def draw(wanted: Sequence[Request], with_masks: bool) -> Iterator[Generated]:
        for start in range(0, len(wanted), tools.batch_size):
            part = wanted[start : start + tools.batch_size]
            captions, indices = [r.caption for r in part], [r.index for r in part]
            with quiet_pipeline():
                drawn = generate(captions, indices=indices, with_masks=with_masks)
            yield drawn

    judged = Judged(
        what="generated",
        requests=requests,
        batches=lambda rows: draw(requests[rows.start : rows.stop], "mask_iou" in protocol.metrics),
        image_size=pipeline.image_size,
        vocabulary=pipeline.vocabulary,
        text_encoder_hash=hash_tensors(pipeline.text_encoder.state_dict()),
        data_set=(pipeline.origin.get("config") or {}).get("DATASET_NAME"),
        diverse=(lambda: ([r.caption for r in several], draw(several, False))) if several else None,
    )
    record = judge(judged, protocol, real, pipeline.device, tools, world)
    if record is None:
        return None
    record["warnings"] = [*_unsuitable(pipeline, protocol, requests), *record["warnings"]]
    record["overrides"] = {} if num_images is None else {"num_images": num_images}
    record["captions"] = {"data_set": prompts.name, "split": prompts.split, "num_images_with_captions": len(prompts)}
    origin = {name: value for name, value in pipeline.origin.items() if name != "config"}
    record["generator"] = origin | {"text_encoder_hash": judged.text_encoder_hash, "image_size": pipeline.image_size}
    return record


def _several(protocol: Protocol, records: Records, first: int) -> list[Request]:
    """What is drawn for diversity: several images each of other captions, with noise of requests from `first` on."""
    if "diversity" not in protocol.metrics or not protocol.diversity_captions:
        return []
    chosen = split_requests(records, num_images=protocol.diversity_captions, seed=protocol.seed + 1)
    repeated = [request for request in chosen for _ in range(protocol.diversity_images)]
    return [request._replace(index=first + place) for place, request in enumerate(repeated)]


@contextmanager
def quiet_pipeline() -> Iterator[None]:
    """A split's captions hold words that the model does not know; `_unsuitable` counts them once."""
    logger = logging.getLogger("sampling.pipeline")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _unsuitable(pipeline: TextToImage, protocol: Protocol, requests: Sequence[Request]) -> Iterator[str]:
    """Warnings about a generator that does not fit the protocol."""
    trained_on = (pipeline.origin.get("config") or {}).get("DATASET_NAME")
    if protocol.dataset and trained_on and trained_on != protocol.dataset:
        yield f"protocol {protocol.name} is meant for {protocol.dataset}, this generator was trained on {trained_on}"
    if protocol.averaged and pipeline.origin.get("averaged") is False:
        yield "the generator's own weights were used: there is no moving average (EMA) beside them"
    captions = {request.caption for request in requests}
    partly = sum(1 for caption in captions if pipeline.vocabulary.encode(caption)[1])
    if partly:
        yield f"{partly} of {len(captions)} captions have words that the generator does not know; these are left out"


def self_check(
    protocol: Protocol,
    train: Records,
    test: Records,
    image_size: int,
    device: torch.device,
    *,
    num_images: int | None = None,
    tools: Tools | None = None,
) -> list[dict[str, Any]]:
    """The floor of a protocol's numbers: real training images against the real set, and that set against itself.

    As many training images, chosen by the seed, as the protocol draws, or all there are. The second reads the files
    again and uses no kept features, so it also checks these. Two records, as `evaluate` gives them.
    """
    tools = tools or Tools()
    test = real_images_of(protocol, test, num_images)
    wanted = min(num_images or protocol.num_images or len(train), len(train))
    chosen = stream(protocol.seed, "self-check").permutation(len(train))[:wanted]
    records = []
    for what, images in (("real train", train.select(sorted(chosen))), ("the same real images", test)):
        found = judge(_judged_real(what, images, protocol, image_size, tools), protocol, test, device, tools)
        found["overrides"] = {} if num_images is None else {"num_images": num_images}
        found["captions"] = {"data_set": images.name, "split": images.split, "num_images_with_captions": len(images)}
        found["generator"] = None
        records.append(found)
    return records


def _judged_real(what: str, records: Records, protocol: Protocol, image_size: int, tools: Tools) -> Judged:
    images = RealImages(records, image_size, protocol.real_crop, protocol.seed)

    def batches(rows: range) -> Iterator[Generated]:
        for batch in images.batches(tools.batch_size, rows):
            yield Generated(batch, [])

    return Judged(what, split_requests(records), batches, image_size, records.vocabulary, data_set=records.name)


def records_for(config: Mapping[str, Any], split: str, data_dir: str | Path | None, vocabulary: Vocabulary) -> Records:
    """A split of the data that a generator was trained on, with as many captions an image as it was trained with.

    data_dir: where the data is now, None: where it was. Raises DataError, CheckpointError without a data set's name.
    """
    name, place = config.get("DATASET_NAME"), data_dir or config.get("DATA_DIR")
    if not name or not place:
        raise CheckpointError("the checkpoint does not say which data it was trained on; evaluate one of our own")
    records, _ = load_records(name, place, split, vocabulary)
    most = (config.get("TEXT") or {}).get("CAPTIONS_PER_IMAGE") or None
    records.captions = [captions[:most] for captions in records.captions]
    if records.texts is not None:
        records.texts = [texts[:most] for texts in records.texts]
    return records


def encoders_for(path: str | Path | None, config: Mapping[str, Any], device: torch.device) -> Encoders | None:
    """The encoders that the user names, else those of the training if they are still there, else None."""
    text = config.get("TEXT") or {}
    if path is None and not Path(text.get("DAMSM_NAME") or "").is_file():
        return None
    return load_encoders(path or text["DAMSM_NAME"], device, text.get("WORDS_NUM") or 18)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="score a checkpoint by a named protocol", allow_abbrev=False)
    add = parser.add_argument
    add(
        "--checkpoint",
        required=True,
        metavar="CKPT",
        help="one of our checkpoints with a generator, or a published model",
    )
    add("--protocol", required=True, metavar="NAME", help="a name in eval/protocol/protocols.py, e.g. small")
    add("--num-images", type=positive, metavar="N", help="a quick look at so many, recorded as an override")
    add("--selfcheck", action="store_true", help="the floor instead: real against real, nothing is generated")
    add("--data-dir", metavar="DIR", help="where the data set is, if it was moved")
    add("--encoders", metavar="CKPT", help="DAMSM encoders for R-precision (default: those of the training)")
    add("--weights", metavar="PATH", help="weight file of the protocol's network (default: torch hub's cache)")
    add("--lpips-weights", metavar="PATH", help="AlexNet's weights for LPIPS (default: torch hub's cache)")
    add("--out", metavar="PATH", help="file of results (default: evaluation.json beside the checkpoint)")
    add("--device", help="cpu, cuda, cuda:1 ... (default: a GPU if there is one)")
    add("--batch-size", type=positive, default=32, help="images at a time (default 32)")
    add_cache_arguments(parser)
    return parser


def main(words: Sequence[str] | None = None) -> None:
    args = arguments().parse_args(words)
    protocol = find_protocol(args.protocol)
    if args.num_images == 1:
        raise ConfigError("--num-images 1: give 2 or more")
    world = _world(args)
    try:
        pipeline = TextToImage.load(args.checkpoint, world.device, averaged=protocol.averaged)
        config, vocabulary = pipeline.origin["config"], pipeline.vocabulary
        out = Path(args.out) if args.out else weight_file(args.checkpoint).with_name("evaluation.json")
        check_writable(out)
        encoders = encoders_for(args.encoders, config, world.device) if "R_precision" in protocol.metrics else None
        tools = Tools(encoders, args.weights, args.lpips_weights, args.cache, args.batch_size, progress=True)
        real = records_for(config, protocol.real_split, args.data_dir, vocabulary)
        if args.selfcheck:
            train = records_for(config, "train", args.data_dir, vocabulary)
            size, number = pipeline.image_size, args.num_images
            results = self_check(protocol, train, real, size, world.device, num_images=number, tools=tools)
        else:
            same = protocol.caption_split == protocol.real_split
            prompts = None if same else records_for(config, protocol.caption_split, args.data_dir, vocabulary)
            results = [
                evaluate(pipeline, protocol, real, prompts, num_images=args.num_images, tools=tools, world=world)
            ]
        if world.is_main:
            about = {"path": str(Path(args.checkpoint).resolve()), "sha256": hash_of_file(weight_file(args.checkpoint))}
            about |= {name: pipeline.origin[name] for name in ("step", "epoch")}
            for result in results:
                result["checkpoint"] = about
                result["real"]["data_dir"] = str(args.data_dir or config["DATA_DIR"])
                print_record(result)
                add_record(out, result)
            print(f"written to {out}")
    finally:
        distributed.stop()


def _world(args: argparse.Namespace) -> World:
    """The processes of torchrun, else this one on the device that was asked for. Raises ConfigError."""
    on_cpu = args.device == "cpu"
    found = distributed.start(gpu=-1 if on_cpu else None) if distributed.launched() else None
    if found is None:
        return World(0, 1, named_device(args.device))
    if args.selfcheck:
        raise ConfigError("--selfcheck runs in one process; start it without torchrun")
    return found


if __name__ == "__main__":
    run_command(main)
