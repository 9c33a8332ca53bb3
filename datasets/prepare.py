"""`python -m datasets.prepare NAME --root DIR`: original downloads, or a folder of one's own, -> our common layout.

Only the command is here: originals are read in sources/, the layout is written in layout.py.
"""

import argparse
import logging
import os
import shlex
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from datasets import DATASETS, check_name
from datasets.layout import SPLITS, VOCABULARY_NAME, Entry, metadata_file, refuse_other_files, write_layout
from datasets.sources.building import BuildOptions
from miscc.command_line import CommandParser, add_data_dir_option, positive, seed_number
from miscc.errors import DataError, run_command
from miscc.images import open_rgb
from miscc.progress import ProgressBar
from miscc.vocabulary import Vocabulary, tokenize

_OWN_PICTURES = ("folder", "flickr")
_ONLY_FOR = {  # options that mean nothing for the others
    "captions": ("folder",),
    "images": _OWN_PICTURES,
    "image_column": ("folder",),
    "caption_columns": ("folder",),
    "class_column": ("folder",),
    "test_fraction": _OWN_PICTURES,
    "val_fraction": _OWN_PICTURES,
    "seed": _OWN_PICTURES,
    "allow_partial": ("birds", "coco"),
    "train_size": ("toybirds",),
    "test_size": ("toybirds",),
    "image_size": ("toybirds",),
}
_SETTINGS = {  # files in cfg/, of the encoders and of the GAN; other data sets use those of `folder`
    "birds": ("bird", "bird"),
    "coco": ("coco", "coco"),
    "folder": ("folder", "folder_projected"),
    "toybirds": ("toybirds", "toybirds_ssa"),
}
LINK = "linked_images"  # in the root, to images outside it
SMALL = 60  # training images; a twentieth is held out, and with fewer the rest may not fill the encoders' batch of 48


def main(argv: Sequence[str] | None = None) -> None:
    """Read the arguments, build the data set, print a summary. Raises DataError for what the user can correct."""
    # Options that belong to another data set are refused.
    args = _parse(argv)
    check_name(args.name)
    given = {name: value for name, value in vars(args).items() if name in _ONLY_FOR and value is not None}
    for name in given:
        if args.name not in _ONLY_FOR[name]:
            option = "--" + name.replace("caption_columns", "caption_column").replace("_", "-")
            raise DataError(f"{option} has no meaning for {args.name}, only for {' and '.join(_ONLY_FOR[name])}")

    # Files of the user's own under the names of a layout are kept.
    root = args.data_dir or Path("data") / args.name
    refuse_other_files(root)

    # ToyBirds' originals are drawn first.
    sizes = {name: given.pop(name) for name in ("train_size", "test_size", "image_size") if name in given}
    if args.name == "toybirds":
        from datasets.toybirds.dataset import write_cub_layout

        write_cub_layout(root, **sizes)

    # Originals -> splits.
    if "caption_columns" in given:
        given["caption_columns"] = tuple(given["caption_columns"])
    splits = DATASETS[args.name].build(root, BuildOptions(name=args.name, **given))
    if args.verify or args.drop_broken:
        splits = verify_images(root, splits, args.drop_broken)

    # Splits -> layout.
    try:
        splits = link_images(root, splits)
        before = Vocabulary.load(root / VOCABULARY_NAME) if (root / VOCABULARY_NAME).is_file() else None
        vocabulary = write_layout(root, splits)
    except OSError as error:
        raise DataError(f"{root}: cannot be written ({error}); the layout goes beside the data") from None
    print("\n".join(_summary(args.name, root, splits, vocabulary, before)))


def link_images(root: Path, splits: dict[str, list[Entry]]) -> dict[str, list[Entry]]:
    """The same splits; images outside the root are reached through a link in it, since a layout names nothing outside."""
    outside = [entry.image for split in splits.values() for entry in split if Path(entry.image).is_absolute()]
    if not outside:
        return splits
    folder, link = Path(os.path.commonpath([str(Path(image).parent) for image in outside])), root / LINK
    if link.is_symlink():
        link.unlink()
    link.symlink_to(folder, target_is_directory=True)

    def linked(entry: Entry) -> Entry:
        path = Path(entry.image)
        return replace(entry, image=f"{LINK}/{path.relative_to(folder).as_posix()}") if path.is_absolute() else entry

    return {split: [linked(entry) for entry in entries] for split, entries in splits.items()}


def next_commands(name: str, root: Path, num_train: int) -> list[str]:
    """The commands that train encoders and a GAN on the data set, with what differs from the files in cfg/."""
    encoders_cfg, gan_cfg = _SETTINGS.get(name, ("folder", "folder"))
    options = [] if root == Path("data") / name else ["--data-dir", str(root)]
    changed = {} if name in _SETTINGS else {"DATASET_NAME": name}
    changed |= {"TRAIN.BATCH_SIZE": "8"} if num_train < SMALL else {}

    # Where encoders of another data set lie already, these get a folder of their own.
    out, others = [], {}
    if (Path("DAMSMencoders") / name / "best.pth").is_file():
        folder = f"DAMSMencoders/{root.resolve().name}" + ("-2" if root.resolve().name == name else "")
        out, others = ["--out", folder], {"TEXT.DAMSM_NAME": f"{folder}/best.pth"}

    def command(*words: str, **settings: str) -> str:
        pairs = [word for pair in settings.items() for word in pair]
        return shlex.join(["python", *words, *options, *(["--set", *pairs] if pairs else [])])

    return [
        command("pretrain_DAMSM.py", "--cfg", f"cfg/DAMSM/{encoders_cfg}.yml", *out, **changed),
        command("main.py", "--cfg", f"cfg/{gan_cfg}.yml", **changed, **others),
    ]


def verify_images(root: Path, splits: dict[str, list[Entry]], drop_broken: bool) -> dict[str, list[Entry]]:
    """Open every image. Raises DataError naming those that cannot be read; with drop_broken they are left out."""

    def complaint(entry: Entry) -> str | None:
        try:
            open_rgb(root / entry.image)
        except DataError as error:
            return str(error)
        return None

    # Open all of them.
    entries = [entry for split in splits.values() for entry in split]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        complaints = list(ProgressBar(pool.map(complaint, entries), "verify", len(entries), "images", leave=True))
    broken = {entry.image: text for entry, text in zip(entries, complaints, strict=True) if text}
    if not broken:
        print(f"verified: all {len(entries):,} images can be read")
        return splits

    # Refuse or drop the broken ones.
    lines = "\n".join(f"  - {text}" for text in broken.values())
    if not drop_broken:
        raise DataError(f"{root}: {len(broken)} images cannot be read; replace them, or use --drop-broken:\n{lines}")
    logging.getLogger(__name__).warning("%d images that cannot be read are left out:\n%s", len(broken), lines)
    kept = {split: [entry for entry in members if entry.image not in broken] for split, members in splits.items()}
    for split, members in kept.items():
        if not members:
            raise DataError(f"{root}: not one image of the split {split!r} can be read")
    return kept


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser(prog="python -m datasets.prepare", description=__doc__.partition("\n")[0])
    parser.add_argument("name", metavar="NAME", help=", ".join(DATASETS))
    add_data_dir_option(parser, "the folder of the data set (default: data/NAME)", "--root")
    parser.add_argument("--verify", action="store_true", help="open every image, and list those that cannot be read")
    parser.add_argument("--drop-broken", action="store_true", help="as --verify, but leave them out")
    parser.add_argument(
        "--allow-partial", action="store_true", default=None, help="birds, coco: prepare what is there, with a warning"
    )

    # Options of single data sets, see _ONLY_FOR.
    own = parser.add_argument_group("folder, flickr")
    own.add_argument("--captions", type=Path, help="the caption file (default: the one .csv, .tsv, .jsonl or .json)")
    own.add_argument("--images", type=Path, help="the folder with the images (default: images/, else all of root)")
    own.add_argument("--image-column", metavar="NAME", help="the column or field that names the image")
    own.add_argument(
        "--caption-column",
        metavar="NAME",
        action="append",
        dest="caption_columns",
        help="a column or field with a caption; may be repeated; A+B joins two columns to one caption",
    )
    own.add_argument("--class-column", metavar="NAME", help="a column whose value is the class (default: no classes)")
    own.add_argument("--test-fraction", type=_fraction, help="where there is no test.txt (default 0.1)")
    own.add_argument("--val-fraction", type=_fraction, help="where there is no val.txt (default 0)")
    own.add_argument("--seed", type=seed_number, help="of the drawn split (default 100)")

    toys = parser.add_argument_group("toybirds")
    toys.add_argument("--train-size", type=positive, help="birds to train on (default 8000)")
    toys.add_argument("--test-size", type=positive, help="birds of the classes kept for testing (default 2000)")
    toys.add_argument("--image-size", type=positive, help="pixels (default 128)")
    return parser.parse_args(argv)


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 0 and below 1")
    return value


def _summary(
    name: str, root: Path, splits: dict[str, list[Entry]], vocabulary: Vocabulary, before: Vocabulary | None
) -> list[str]:
    """The lines that are printed at the end; the last one says where the data set is."""
    # The splits: images, captions, classes.
    lines = [f"{name}: {sum(len(entries) for entries in splits.values()):,} images"]
    longest = 0
    for split in (split for split in SPLITS if split in splits):
        entries = splits[split]
        counts, classes = [len(entry.captions) for entry in entries], len({entry.class_id for entry in entries})
        longest = max([longest, *(len(tokenize(caption)) for entry in entries for caption in entry.captions)])
        each = f"{min(counts)} to {max(counts)}, {statistics.fmean(counts):.1f} on average,"
        lines.append(
            f"  {split:5} {len(entries):7,} images, {sum(counts):8,} captions "
            f"({each if min(counts) != max(counts) else counts[0]} an image), "
            f"{f'{classes:,} classes' if classes < len(entries) else 'each its own class'}"
        )

    # The vocabulary, and what else matters for a training on this.
    lines.append(
        f"  vocabulary: {len(vocabulary):,} entries, the words of {' and '.join(splits)} captions and <end>; "
        f"longest caption: {longest} words"
    )
    if before is not None and before != vocabulary:
        lines.append(
            "  the vocabulary has changed: encoders trained before do not fit it (checkpoints carry their own and do)"
        )
    pickle = metadata_file(root, "train")
    if pickle:
        lines.append(f"  {pickle} is there, too, and comes first when the data set is loaded")

    lines += ["  next:", *(f"    {command}" for command in next_commands(name, root, len(splits["train"])))]
    files = [VOCABULARY_NAME, *(f"{split}.jsonl" for split in SPLITS if split in splits)]
    lines.append(f"ready: {root} ({', '.join(files)})")
    return lines


class _Plain(logging.Formatter):
    """Log lines without a prefix, but for warnings and errors."""

    def format(self, record: logging.LogRecord) -> str:
        prefix = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        return prefix + record.getMessage()


if __name__ == "__main__":
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(_Plain())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    run_command(main)
