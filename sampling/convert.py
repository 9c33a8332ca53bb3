"""`python -m sampling.convert FILE ...`: what weight files are, and --convert: the authors' loose files as one of ours.

Files are recognised and loaded in models/released.py.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch

from miscc.checkpoint import load_file, save_checkpoint, validate
from miscc.command_line import CommandParser, positive
from miscc.errors import CheckpointError, DataError, UserError, run_command
from miscc.files import hash_of_file
from models import SYSTEMS, networks_of
from models.registry import count_parameters, network_name, to_state
from models.released import LOADERS, holds, load_discriminator, load_discriminator_files, load_generator, naming
from models.types import Discriminator, Generator, Network
from sampling.encoders import ENCODERS, check_sentence_length, released_vocabulary
from sampling.pipeline import TextToImage
from sampling.published import read_published


def describe(path: str | Path) -> list[str]:
    """What a weight file is, a line a network. Raises CheckpointError with the reason where it cannot be loaded."""
    content = read_published(path) if Path(path).is_dir() else load_file(path)

    # Ours name their networks; the authors' are recognised by their tensors.
    if isinstance(content, Mapping) and "networks" in content:
        validate(content, path)
        return _describe_ours(path, content)
    parts = [part for part in LOADERS if holds(content, part)]

    # Nothing known: loading it raises the error that says why.
    with naming(path):
        if not parts:
            load_generator(content)
        return [f"{path}: {_network_line(part, LOADERS[part](content))}" for part in parts]


def convert(
    generator_path: str | Path,
    encoder_path: str | Path,
    data_dir: str | Path,
    out: str | Path,
    discriminator_path: str | Path | None = None,
    dataset: str = "",
    max_words: int = 18,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Join generator, encoders and vocabulary into one checkpoint of ours at `out`, which draws, scores and fine-tunes.

    generator_path, encoder_path: netG*.pth and text_encoder*.pth; image_encoder*.pth beside it is taken along
    data_dir: the folder with the captions.pickle that the encoder was trained with
    discriminator_path: AttnGAN's first, others lie beside it; None: the one in the generator's file, if any
    dataset: our name for the data; empty: the folder's
    max_words, overwrite: words of a caption at most; replace `out`

    Returns the checkpoint. Raises UserError where parts do not belong together, or `out` exists.
    """
    out = Path(out)
    if out.exists() and not overwrite:
        raise UserError(f"{out}: exists already; give --overwrite or another name")

    # Load the parts; those that do not belong together are refused.
    content = load_file(generator_path)
    with naming(generator_path):
        generator = load_generator(content)
    kind = SYSTEMS[network_name(generator)].DEFAULTS.get("TEXT.ENCODER", "damsm")
    encoders = ENCODERS[kind](encoder_path, max_words=max_words)
    vocabulary = encoders.vocabulary or released_vocabulary(data_dir)
    TextToImage(generator, encoders.text_encoder, vocabulary)  # raises where the vocabulary is of another size
    check_sentence_length(encoders.text_encoder, generator, encoder_path)

    # Write them as training would.
    networks = {
        "generator": generator,
        "text_encoder": encoders.text_encoder,
        "image_encoder": encoders.image_encoder,
        "discriminator": _discriminator(generator, content, discriminator_path),
    }
    checkpoint = {
        "config": {
            "CONFIG_NAME": out.stem,
            "DATASET_NAME": dataset or Path(data_dir).resolve().name,
            "DATA_DIR": str(data_dir),
            "GAN": {"NAME": network_name(generator)},
            "TEXT": {"WORDS_NUM": encoders.max_words, "ENCODER": kind},
        },
        "vocabulary": vocabulary.words,
        "networks": {part: to_state(network_name(net), net) for part, net in networks.items() if net is not None},
        "step": 0,
        "epoch": 0,
        "released": {
            str(path): hash_of_file(path) for path in (generator_path, discriminator_path, encoders.file) if path
        },
    }
    save_checkpoint(out, checkpoint)
    return checkpoint


def _describe_ours(path: str | Path, content: Mapping) -> list[str]:
    """The lines of one of our checkpoints: what it is, then a line a network."""
    networks, config = content["networks"], content.get("config", {})
    data = config.get("DATASET_NAME", "unknown data")
    lines = [
        f"{path}: checkpoint of this project, step {content.get('step')}, epoch {content.get('epoch')}, {data}, "
        f"{len(content.get('vocabulary', ()))} words, {'with' if 'optimizers' in content else 'without'} optimizers"
    ]
    for part, entry in networks.items():
        total = sum(tensor.numel() for tensor in entry["state"].values())
        lines.append(f"  {part}: {entry['name']}, {total / 1e6:.1f} M numbers, {_sizes(entry['arguments'])}")
    return lines


def _network_line(part: str, network: Network) -> str:
    millions = count_parameters(network) / 1e6
    return f"{part} {network_name(network)}, {millions:.1f} M parameters, {_sizes(network.arguments)}"


def _sizes(arguments: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in arguments.items())


def _discriminator(generator: Generator, content: Any, path: str | Path | None) -> Discriminator | None:
    """The discriminator that goes with a released generator, of its own file or of the generator's."""
    if path is None:
        return load_discriminator(content) if holds(content, "discriminator") else None
    with torch.device("meta"):  # only its sizes are asked for
        kind = cast(type[Discriminator], networks_of("discriminator")[network_name(generator)])
        shared = ("base_size", "num_stages") if kind.has_stages else ()
        like = kind(**{name: generator.arguments[name] for name in shared})
    discriminator = load_discriminator_files(path, like)

    # The same system and sizes as the generator's.
    if type(discriminator) is not kind:
        raise CheckpointError(
            f"{path}: is the discriminator of {network_name(discriminator)}, the generator is {network_name(generator)}'s; "
            f"name the one that was trained with it"
        )
    for name in ("image_size", "sentence_dim"):
        actual, expected = discriminator.arguments.get(name), generator.arguments.get(name)
        if None not in (actual, expected) and actual != expected:
            raise CheckpointError(
                f"{path}: its {name} is {actual}, the generator's {expected}; name the one that was trained with it"
            )
    return discriminator


def main() -> None:
    parser = CommandParser(prog="python -m sampling.convert", description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", metavar="FILE", help="weight files: the authors' or ours")
    join = parser.add_argument_group("one checkpoint of ours from the authors' generator file")
    join.add_argument("--convert", metavar="OUT", help="write it here, e.g. models/bird_AttnGAN2_ours.pth")
    join.add_argument(
        "--encoder", metavar="FILE", help="text_encoder*.pth; image_encoder*.pth beside it is taken along"
    )
    join.add_argument("--data", metavar="DIR", help="the folder with AttnGAN's captions.pickle, e.g. data/birds")
    join.add_argument("--discriminator", metavar="FILE", help="netD*.pth, for fine-tuning; AttnGAN: netD0.pth")
    join.add_argument("--dataset", default="", metavar="NAME", help="birds, coco, ... (default: the name of --data)")
    join.add_argument(
        "--max-words", type=positive, default=18, metavar="N", help="words of a caption at most (default 18)"
    )
    join.add_argument("--overwrite", action="store_true", help="replace OUT")
    options = parser.parse_args()

    # Say what the files are.
    if not options.convert:
        for path in options.files:
            print("\n".join(describe(path)))
        return

    # Or join them.
    if len(options.files) != 1 or not options.encoder or not options.data:
        raise DataError("--convert takes one generator file, --encoder and --data; see --help")
    convert(
        options.files[0],
        options.encoder,
        options.data,
        options.convert,
        options.discriminator,
        options.dataset,
        options.max_words,
        options.overwrite,
    )
    print("\n".join(describe(options.convert)))


if __name__ == "__main__":
    run_command(main)
