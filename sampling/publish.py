"""`python -m sampling.publish --checkpoint CKPT --out FOLDER`: a model as a folder that others load without running code.

The folder's form is published.py's, its README.md model_card.py's.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import load_records
from miscc.command_line import CommandParser
from miscc.errors import CheckpointError, DataError, UserError, run_command
from miscc.files import hash_of_file, read_json, write_text
from miscc.pictures import save_image
from models.adversarial import DISCRIMINATORS
from models.registry import network_name, to_state
from sampling.folders import generated_picture
from sampling.model_card import is_result, model_card, without_local_paths
from sampling.pipeline import TextToImage
from sampling.published import (
    CARD,
    CONFIG,
    PICTURE,
    TRAINING_WEIGHTS,
    VOCABULARY,
    WEIGHTS,
    load_weights,
    to_half_precision,
    weight_file,
    write_published,
)
from sampling.requests import read_captions

logger = logging.getLogger(__name__)

NUM_EXAMPLES = 12  # example captions that a model stores and its README.md shows


def publish(
    pipeline: TextToImage,
    folder: str | Path,
    *,
    examples: Sequence[str] = (),
    evaluations: Sequence[dict[str, Any]] = (),
    sha256: str | None = None,
    half: bool = False,
    overwrite: bool = False,
    discriminators: Mapping[str, dict[str, Any]] | None = None,
) -> Path:
    """Write a pipeline as the folder of a published model; returns the folder.

    examples: captions that README.md shows and the web page offers.
    evaluations: the records of evaluation.json.
    sha256: of the checkpoint.
    half: weights in half precision, half of the size; loaded, they compute in float32 as ever.
    discriminators: of the checkpoint, see `discriminators_of`, from which a training goes on.

    Raises UserError where something is there already, DataError for an example without a known word, CheckpointError for
    weights that half precision does not hold.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not overwrite:
        raise UserError(f"{folder}: exists already; give --overwrite or another folder")

    # What may be refused comes before anything is written: weights that are too large, an example without a known word.
    networks = {"generator": pipeline.generator, "text_encoder": pipeline.text_encoder}
    states = {part: to_state(network_name(network), network) for part, network in networks.items()}
    states |= discriminators or {}
    if half:
        states = {part: to_half_precision(part, entry) for part, entry in states.items()}
    picture = generated_picture(examples, pipeline.generate(list(examples))) if examples else None
    about = describe(pipeline, examples) | {"half": half or bool(pipeline.origin.get("half"))}
    about["trainable"] = bool(discriminators)
    card = model_card(folder.resolve().name, about, evaluations, sha256, pictured=picture is not None)

    # The model, which replaces one that is there only once its weights are on the disk; then what describes it.
    folder.mkdir(parents=True, exist_ok=True)
    write_published(folder, states, pipeline.vocabulary, about)
    if picture is not None:
        save_image(picture, folder / PICTURE)
    else:
        (folder / PICTURE).unlink(missing_ok=True)
    write_text(folder / CARD, card)
    return folder


def discriminators_of(checkpoint: str | Path) -> dict[str, dict[str, Any]]:
    """The discriminators in a checkpoint of a training, or in a published folder, without local paths.

    Raises CheckpointError where it has none.
    """
    stored = load_weights(checkpoint)["networks"]
    found = {part: entry for part, entry in stored.items() if part in DISCRIMINATORS}
    if not found:
        raise CheckpointError(
            f"{checkpoint}: holds no discriminator; publish the last.pth of a training, or leave out --with-discriminators"
        )
    return {part: {**entry, "arguments": without_local_paths(entry["arguments"])} for part, entry in found.items()}


def describe(pipeline: TextToImage, examples: Sequence[str] = ()) -> dict[str, Any]:
    """What a model is, as config.json keeps it: system, sizes, words, where it comes from, settings without local paths."""
    origin = pipeline.origin
    return {
        "system": network_name(pipeline.generator),
        "image_size": pipeline.image_size,
        "noise_dim": pipeline.generator.noise_dim,
        "num_words": len(pipeline.vocabulary),
        "max_words": pipeline.text_encoder.max_words,
        "averaged": bool(origin.get("averaged")),
        "step": origin.get("step"),
        "epoch": origin.get("epoch"),
        "examples": list(examples),
        "trained_with": [{**entry, "file": ""} for entry in origin.get("trained_with") or []],
        "settings": without_local_paths(origin.get("config") or {}),
    }


def example_captions(pipeline: TextToImage, number: int = NUM_EXAMPLES) -> list[str]:
    """Example captions: those that a published model stores, else some of its data's test split; [] without either."""
    carried = pipeline.origin.get("examples") or []
    if carried:
        return carried[:number]

    # Of the data that the checkpoint names, if they are here; its settings may be anything.
    config = pipeline.origin.get("config") or {}
    name, data_dir = config.get("DATASET_NAME"), config.get("DATA_DIR")
    if not isinstance(name, str) or not isinstance(data_dir, str):
        return []
    try:
        records, _ = load_records(name, data_dir, "test", pipeline.vocabulary)
    except DataError:
        return []

    return records.examples(number, pipeline.vocabulary)


def read_evaluations(path: str | Path) -> list[dict[str, Any]]:
    """The records of an evaluation.json, [] where there is none. Raises DataError for something else."""
    path = Path(path)
    if not path.exists():
        return []
    try:
        records = read_json(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as a list of results ({error}); move it away") from None

    # A hand-written file may be any JSON.
    if not isinstance(records, list):
        raise DataError(f"{path}: is no list of results; move it away")
    for number, record in enumerate(records, start=1):
        if not is_result(record):
            raise DataError(f"{path}: entry {number} is no result of an evaluation; move the file away")
    return records


def main(words: Sequence[str] | None = None) -> None:
    parser = CommandParser(prog="python -m sampling.publish", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="CKPT", help="one of our checkpoints, or a published model's folder")
    add("--out", required=True, metavar="FOLDER", help="where the model goes; its last part is the model's name")
    add("--caption", action="append", default=[], metavar="TEXT", help="an example caption; may be repeated")
    add("--captions", metavar="FILE", help="example captions, one a line (default: of the data's test split)")
    add("--no-average", action="store_true", help="publish G itself, not its average")
    add(
        "--half",
        action="store_true",
        help="weights in half precision: half of the size; images differ by a few levels of 255",
    )
    add(
        "--with-discriminators",
        action="store_true",
        help="also the discriminators, so that a training goes on from the folder (TRAIN.NET_G)",
    )
    add("--overwrite", action="store_true", help="replace what is in the folder")
    options = parser.parse_args(words)

    # On the CPU: only a few examples are drawn.
    pipeline = TextToImage.load(options.checkpoint, "cpu", averaged=not options.no_average)
    discriminators = discriminators_of(options.checkpoint) if options.with_discriminators else None
    captions = [*options.caption, *(read_captions(options.captions) if options.captions else [])]
    captions = captions or example_captions(pipeline)
    if not captions:
        logger.warning("no caption is at hand, so there are no sample pictures; give some with --caption or --captions")

    # Its scores lie beside the weights.
    weights = weight_file(options.checkpoint)
    folder = publish(
        pipeline,
        options.out,
        examples=captions[:NUM_EXAMPLES],
        evaluations=read_evaluations(weights.with_name("evaluation.json")),
        sha256=hash_of_file(weights),
        half=options.half,
        overwrite=options.overwrite,
        discriminators=discriminators,
    )
    files = [WEIGHTS, *([TRAINING_WEIGHTS] if discriminators else []), CONFIG, VOCABULARY, CARD]
    print(f"{folder}: {', '.join(files)}")


if __name__ == "__main__":
    run_command(main)
