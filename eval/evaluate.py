"""Score a checkpoint by a named protocol: `python -m eval.evaluate --checkpoint CKPT --protocol small`.

Draws into memory, compares with the real images, prints a table and adds a record with everything that is needed to
repeat it to evaluation.json beside the checkpoint. With torchrun the processes share the images. Protocols, their run and
the report are in eval/protocol/, the metrics in a file each.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: this folder hides other packages' names
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from datasets import load_records
from datasets.records import Records
from eval import METRICS
from eval.features.reference import RealImages
from eval.metric import Tools
from eval.protocol.protocols import PROTOCOLS, Protocol, find_protocol
from eval.protocol.report import add_record, check_writable, print_record
from eval.protocol.runner import ImageStream, needs_of, run_protocol
from eval.scripts import add_cache_arguments
from miscc import distributed
from miscc.checkpoint import hash_tensors
from miscc.command_line import CommandParser, add_device_option, named_device, positive
from miscc.distributed import World
from miscc.errors import CheckpointError, ConfigError, UserError, run_command
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
    # A fixed list, or a part of it.
    if protocol.caption_choice != "random":
        most = protocol.captions_per_image if protocol.caption_choice == "first" else 0
        every = split_requests(records, most, protocol.images_per_caption)
        if num_images is None or num_images >= len(every):
            return every
        chosen = sorted(stream(protocol.seed, "quick look").permutation(len(every))[:num_images])
        return [every[position]._replace(index=index) for index, position in enumerate(chosen)]

    # Random captions.
    total = num_images or protocol.num_images
    assert total is not None  # of random captions
    each = protocol.images_per_caption
    chosen = split_requests(records, num_images=-(-total // each), seed=protocol.seed)
    repeated = [(request, sample) for request in chosen for sample in range(each)][:total]
    return [r._replace(index=i, sample=each * r.sample + sample) for i, (r, sample) in enumerate(repeated)]


def real_images_of(protocol: Protocol, records: Records, num_images: int | None = None) -> Records:
    """The real images that a protocol compares with: all, or `num_real` of them drawn by the seed.

    num_images: of a quick run, which then takes no more real images than it draws.
    """
    if protocol.num_real is None:
        return records

    # No more real images than the protocol compares with, nor than a quick run draws.
    num_real = min(protocol.num_real, len(records), max(2, num_images or protocol.num_real))
    if num_real == len(records):
        return records
    return records.select(sorted(stream(protocol.seed, "real images").permutation(len(records))[:num_real]))


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

    real: the real images;
    prompts: whose captions are drawn, None: those of `real`;
    num_images: a quick run instead of the protocol's number; an override, unless the protocol draws and compares as many.
    A metric that lacks its weights is listed as not computed; raises UserError when that leaves none at all.
    """
    tools = tools or Tools()
    prompts = real if prompts is None else prompts
    every, real = real, real_images_of(protocol, real, num_images)
    requests = requests_of(protocol, prompts, num_images)
    is_own = num_images is None or (
        requests == requests_of(protocol, prompts) and len(real) == len(real_images_of(protocol, every))
    )

    def draw(part: Sequence[Request], with_masks: bool) -> Iterator[Generated]:
        return pipeline.generate_batches(part, protocol.seed, protocol.truncation, tools.batch_size, with_masks)

    # What is scored: images of the requests, drawn when they are needed.
    images = ImageStream(
        what="generated",
        requests=requests,
        draw=draw,
        image_size=pipeline.image_size,
        vocabulary=pipeline.vocabulary,
        text_encoder_hash=hash_tensors(pipeline.text_encoder.state_dict()),
        repeats=_repeats(protocol, prompts, first=len(requests)),
        data_set=(pipeline.origin.get("config") or {}).get("DATASET_NAME"),
        trained_with=pipeline.origin.get("trained_with"),
    )
    record = run_protocol(images, protocol, real, pipeline.device, tools, world)
    if record is None:
        return None

    # What the run does not know: captions and generator.
    record["warnings"] = [*_unsuitable(pipeline, protocol, requests), *record["warnings"]]
    record["overrides"] = {} if is_own else {"num_images": num_images}
    record["captions"] = {"data_set": prompts.name, "split": prompts.split, "num_images_with_captions": len(prompts)}
    origin = {name: value for name, value in pipeline.origin.items() if name != "config"}
    record["generator"] = origin | {"text_encoder_hash": images.text_encoder_hash, "image_size": pipeline.image_size}
    return record


def _repeats(protocol: Protocol, records: Records, first: int) -> list[Request]:
    """Several images each of other captions, for metrics that need these; with noise of requests from `first` on."""
    if not protocol.diversity_captions:
        return []

    # Captions by another seed, so that most differ from those of the other scores.
    chosen = split_requests(records, num_images=protocol.diversity_captions, seed=protocol.seed + 1)
    repeated = [request for request in chosen for _ in range(protocol.diversity_images)]
    return [request._replace(index=first + i) for i, request in enumerate(repeated)]


def _unsuitable(pipeline: TextToImage, protocol: Protocol, requests: Sequence[Request]) -> Iterator[str]:
    """Warnings about a generator that does not fit the protocol."""
    # Data set, and which weights.
    trained_on = (pipeline.origin.get("config") or {}).get("DATASET_NAME")
    if protocol.dataset and trained_on and trained_on != protocol.dataset:
        yield f"protocol {protocol.name} is meant for {protocol.dataset}, this generator was trained on {trained_on}"
    if protocol.averaged and pipeline.origin.get("averaged") is False:
        yield "the generator's own weights were used: there is no moving average (EMA) beside them"

    # Words that the vocabulary lacks.
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
    """The floor of a protocol's scores: real training images against the real set, and that set against itself.

    As many training images, chosen by the seed, as the protocol draws, or all there are. The second reads the files
    again and uses no kept features, so it also checks these. Two records, as `evaluate` gives them.
    """
    tools = tools or Tools()
    own_total = min(protocol.num_images or len(train), len(train))
    total = min(num_images or own_total, len(train))
    every, test = test, real_images_of(protocol, test, num_images)
    is_own = total == own_total and len(test) == len(real_images_of(protocol, every))
    chosen = stream(protocol.seed, "self-check").permutation(len(train))[:total]

    # Training images, then the real images themselves.
    records = []
    for what, images in (("real train", train.select(sorted(chosen))), ("the same real images", test)):
        found = run_protocol(_real_stream(what, images, protocol, image_size, tools), protocol, test, device, tools)
        assert found is not None  # there is one process
        found["overrides"] = {} if is_own else {"num_images": num_images}
        found["captions"] = {"data_set": images.name, "split": images.split, "num_images_with_captions": len(images)}
        found["generator"] = None
        records.append(found)
    return records


def _real_stream(what: str, records: Records, protocol: Protocol, image_size: int, tools: Tools) -> ImageStream:
    images = RealImages(records, image_size, protocol.real_crop, protocol.seed)

    def read(part: Sequence[Request], with_masks: bool) -> Iterator[Generated]:
        for batch in images.batches(tools.batch_size, range(part[0].index, part[-1].index + 1)):
            yield Generated(batch, [])

    return ImageStream(what, split_requests(records), read, image_size, records.vocabulary, data_set=records.name)


def records_for(
    config: Mapping[str, Any], split: str, data_dir: str | Path | None, vocabulary: Vocabulary | None
) -> Records:
    """A split of the data that a generator was trained on, with as many captions an image as it was trained with.

    data_dir: where the data is now, None: where it was. Raises DataError, CheckpointError without a data set's name.
    """
    name, folder = config.get("DATASET_NAME"), data_dir or config.get("DATA_DIR")
    if not name or not folder:
        raise CheckpointError(
            "the settings do not say which data it was trained on, or where that is; take one of our own, or give --data-dir"
        )

    # As many captions an image as in training.
    records, _ = load_records(name, folder, split, vocabulary)
    return records.with_captions((config.get("TEXT") or {}).get("CAPTIONS_PER_IMAGE") or None)


def encoders_for(path: str | Path | None, config: Mapping[str, Any], device: torch.device) -> Encoders | None:
    """The encoders that the user names, else those of the training if they are still there, else None."""
    text = config.get("TEXT") or {}
    if path is None and not Path(text.get("DAMSM_NAME") or "").is_file():
        return None
    return load_encoders(path or text["DAMSM_NAME"], device, text.get("WORDS_NUM") or 18)


def load_everywhere(path: str | Path, world: World, averaged: bool) -> tuple[TextToImage, str]:
    """`load_with_hash` in all processes, again where a training has replaced the file between two of them."""
    while True:
        pipeline, sha256 = load_with_hash(path, world.device, averaged)
        differs = sha256 != distributed.share(sha256, world)
        if not distributed.any_process(differs, world):
            return pipeline, sha256


def load_with_hash(path: str | Path, device: torch.device, averaged: bool) -> tuple[TextToImage, str]:
    """The generator of a checkpoint, and the sha256 of the file that it was read from.

    Loads again where a running training has replaced the file meanwhile. Raises CheckpointError as `TextToImage.load`.
    """
    while True:
        before = _hash_of(path)
        pipeline = TextToImage.load(path, device, averaged=averaged)
        if before is not None and before == _hash_of(path):
            return pipeline, before


def _hash_of(path: str | Path) -> str | None:
    """None where there is no file, which `TextToImage.load` reports."""
    file = weight_file(path)
    return hash_of_file(file) if file.is_file() else None


def arguments() -> argparse.ArgumentParser:
    parser = CommandParser(
        description="score a checkpoint by a named protocol",
        epilog=_listing(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="CKPT", help="one of our checkpoints, or a published model")
    add("--protocol", required=True, metavar="NAME", help="see below, e.g. small")
    add("--num-images", type=positive, metavar="N", help="a quick run with so many, recorded as an override")
    add("--selfcheck", action="store_true", help="the floor instead: real against real, nothing is generated")

    # Where the user keeps what the protocol needs.
    add("--data-dir", metavar="DIR", help="where the data set is, if it was moved")
    add("--encoders", metavar="CKPT", help="DAMSM encoders for R-precision (default: those of the training)")
    add("--weights", metavar="PATH", help="weight file of the protocol's network (default: torch hub's cache)")
    add("--lpips-weights", metavar="PATH", help="AlexNet's weights for LPIPS (default: torch hub's cache)")
    add("--clip", metavar="NAME", help="folder of a CLIP, or its name in Hugging Face's cache")

    # Where results go, and how they are computed.
    add("--out", metavar="PATH", help="file of results (default: evaluation.json beside the checkpoint)")
    add_device_option(parser)
    add("--batch-size", type=positive, default=32, help="images at a time (default 32)")
    add_cache_arguments(parser)
    return parser


def _listing() -> str:
    """All protocols and metrics, for --help."""
    protocols = [f"  {name:<18}{protocol.about}" for name, protocol in PROTOCOLS.items()]
    metrics = [f"  {name:<18}{about}" for name, (_, about) in METRICS.items()]
    return "\n".join(["protocols (eval/protocol/protocols.py):", *protocols, "", "metrics:", *metrics])


def main(words: Sequence[str] | None = None) -> None:
    args = arguments().parse_args(words)
    protocol = find_protocol(args.protocol)
    if args.num_images == 1:
        raise ConfigError("--num-images 1: give 2 or more")

    world = _world(args)
    try:
        with distributed.naming_lost_processes(world, "start the evaluation again"):
            _run(args, protocol, world)
    finally:
        distributed.stop()


def _run(args: argparse.Namespace, protocol: Protocol, world: World) -> None:
    """Score the checkpoint, or check the protocol itself; the main process adds the records to the file of results."""
    # The generator, and where the results go.
    pipeline, sha256 = load_everywhere(args.checkpoint, world, protocol.averaged)
    config, vocabulary = pipeline.origin["config"], pipeline.vocabulary
    out = Path(args.out) if args.out else weight_file(args.checkpoint).with_name("evaluation.json")
    check_writable(out)

    # What the protocol's metrics need, and the real images.
    tools = _tools(args, protocol, config, world.device)
    real = records_for(config, protocol.real_split, args.data_dir, vocabulary)

    if args.selfcheck:
        train = records_for(config, "train", args.data_dir, vocabulary)
        choices = {"num_images": args.num_images, "tools": tools}
        results = self_check(protocol, train, real, pipeline.image_size, world.device, **choices)
    else:
        same = protocol.caption_split == protocol.real_split
        prompts = None if same else records_for(config, protocol.caption_split, args.data_dir, vocabulary)
        found = evaluate(pipeline, protocol, real, prompts, num_images=args.num_images, tools=tools, world=world)
        results = [] if found is None else [found]

    if results:  # in the main process
        about = {"path": str(Path(args.checkpoint).resolve()), "sha256": sha256}
        about |= {name: pipeline.origin[name] for name in ("step", "epoch")}
        for result in results:
            result["checkpoint"] = about
            result["real"]["data_dir"] = str(args.data_dir or config["DATA_DIR"])
            print_record(result)
            add_record(out, result)
        print(f"written to {out}")


def _tools(args: argparse.Namespace, protocol: Protocol, config: Mapping[str, Any], device: torch.device) -> Tools:
    """What the options name. Encoders of the training that cannot be loaded cost only the metrics that need them."""
    encoders, reason = None, ""
    if any(needs.encoders for needs in needs_of(protocol, {}).values()):
        try:
            encoders = encoders_for(args.encoders, config, device)
        except UserError as error:
            if args.encoders is not None:
                raise
            reason = str(error)
    files = (args.weights, args.lpips_weights, args.clip, args.cache_dir)
    return Tools(encoders, *files, args.batch_size, no_encoders=reason)


def _world(args: argparse.Namespace) -> World:
    """The processes of torchrun, else this one on the device that was asked for. Raises ConfigError."""
    on_cpu = args.device == "cpu"
    found = distributed.start(gpu=-1 if on_cpu else None) if distributed.launched() else None
    if found is None:
        return World(0, 1, named_device(args.device))
    if args.selfcheck:
        raise ConfigError("--selfcheck runs in one process; start it without torchrun")

    # As one process computes: `start` allows what is faster in training and less precise.
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.benchmark = False
    return found


if __name__ == "__main__":
    run_command(main)
