"""Train a text-to-image GAN or draw with it, as a YAML file says.

Arguments and objects only; no maths here.

python main.py --cfg cfg/bird.yml --gpu 0                       train
python main.py --cfg cfg/bird.yml --resume                      go on where it stopped
python main.py --cfg cfg/bird.yml --set B_VALIDATION True       images for the test captions
python main.py --cfg cfg/bird.yml --caption "a small red bird with black wings"
"""

import argparse
import logging
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from miscc.command_line import not_negative, parser_with_settings, positive, settings_from, truncation
from miscc.config import Config
from miscc.errors import ConfigError, run_command
from miscc.settings import from_config

# What needs torch is imported inside the functions: --help should not wait for it.

logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
logger = logging.getLogger("main")

# -- options -------------------------------------------------------------------------------------------------------

FLAG = {"action": "store_true"}
OPTIONS: dict[str, dict[str, Any]] = {
    "--dry-run": FLAG | {"help": "says what a training would be, and what is missing"},
    # What is drawn.
    "--caption": {"action": "append", "metavar": "TEXT", "help": "draws this caption; may be repeated"},
    "--captions": {"metavar": "FILE", "help": "draws each line of a text file"},
    "--interpolate": {
        "nargs": 2,
        "metavar": "TEXT",
        "help": "draws a strip from one caption to the other; the same caption twice: from one noise to another",
    },
    "--each-split": {
        "type": positive,
        "metavar": "N",
        "help": "draws N captions of each of train, val and test, without replacement",
    },
    "--split": {"help": "names the split whose captions B_VALIDATION draws; without it: test"},
    "--captions-per-image": {
        "type": not_negative,
        "default": 1,
        "metavar": "N",
        "help": "draws so many captions of each image; 0: all",
    },
    "--num-images": {"type": positive, "metavar": "N", "help": "draws so many captions of a split, out of all of them"},
    "--per-caption": {"type": positive, "default": 1, "metavar": "N", "help": "draws so many images of each caption"},
    # With what, and where to.
    "--checkpoint": {"metavar": "FILE", "help": "draws with this one (default: NET_G, or the newest run's last)"},
    "--no-average": FLAG | {"help": "draws with G itself, not with its average"},
    "--seed": {"type": not_negative, "default": 0, "metavar": "N", "help": "seeds the noise"},
    "--truncation": {"type": truncation, "metavar": "T", "help": "cuts the noise at +-2 and scales it by T, e.g. 0.8"},
    "--out": {"metavar": "DIR", "help": "names the folder for the images (default: beside the checkpoint)"},
    "--overwrite": FLAG | {"help": "replaces samples that are in the folder"},
    "--batch-size": {"type": positive, "default": 32, "metavar": "N", "help": "draws so many images at once"},
    # What is written beside the images.
    "--masks": FLAG | {"help": "writes the masks of every stage, too"},
    "--attention": FLAG | {"help": "writes where each word attends, too, stage by stage"},
    "--real": FLAG | {"help": "writes the real images of a split's captions, too"},
}
DRAWING = ("--checkpoint", "--no-average", "--seed", "--truncation", "--out", "--overwrite")
PICTURES = (*DRAWING, "--batch-size", "--masks", "--attention")


def parser_of(names: Iterable[str]) -> argparse.ArgumentParser:
    """A parser with the options that all modes have, and with those of these names."""
    parser = parser_with_settings(__doc__.splitlines()[0], "cfg/bird.yml")
    group = parser.add_argument_group(
        "drawing (--caption, --captions, --interpolate, --each-split, or B_VALIDATION: True)"
    )
    for name in names:
        (parser if name == "--dry-run" else group).add_argument(name, **OPTIONS[name])
    return parser


def parse(mode: "Mode", arguments: list[str] | None) -> argparse.Namespace:
    """The options of one mode. Raises ConfigError, naming the remedy, for an option of another mode."""
    options, others = parser_of(mode.options).parse_known_args(arguments)
    if others:
        option = others[0].split("=")[0]
        known = OPTIONS.get(option, {"help": "has no meaning"})
        raise ConfigError(mode.refusal.format(option=option, help=known["help"]))
    return options


# -- modes ---------------------------------------------------------------------------------------------------------


def run_dry(cfg: Config, options: argparse.Namespace) -> int:
    """Say what a training would be."""
    from training.dry_run import describe

    print(describe(cfg))
    return 0


def run_training(cfg: Config, options: argparse.Namespace) -> int:
    """Train, or go on training."""
    from miscc import distributed
    from training.trainer import train

    world = distributed.start(cfg.GPU_ID, cfg.CUDA)
    return train(cfg, world, resume=cfg.RESTORE, resume_if_exists=options.resume_if_exists)


def draw_strip(cfg: Config, options: argparse.Namespace) -> int:
    """A strip of images between two captions."""
    from miscc.pictures import save_image
    from sampling.drawing import free_path
    from sampling.interpolate import interpolate

    drawing = open_drawing(cfg, options)
    chosen = {"seed": drawing.seed, "truncation": drawing.truncation}
    strip = interpolate(drawing.pipeline, *options.interpolate, **chosen)

    # Where it goes: never over an earlier strip, unless --overwrite says so.
    path = (drawing.out or drawing.folder) / f"interpolation-seed{options.seed}.png"
    path = free_path(path, options.overwrite)
    save_image(strip, path)
    print(path)
    return 0


def draw_captions(cfg: Config, options: argparse.Namespace) -> int:
    """The user's own captions."""
    from sampling.drawing import free_path
    from sampling.requests import caption_requests, read_captions

    drawing = open_drawing(cfg, options)
    captions = [*(options.caption or []), *(read_captions(options.captions) if options.captions else [])]

    # One folder for all of them.
    folder = drawing.out or free_path(drawing.folder / "captions", options.overwrite)
    drawing.into(folder, caption_requests(captions, options.per_caption))
    return 0


def draw_each_split(cfg: Config, options: argparse.Namespace) -> int:
    """So many captions of every split."""
    from datasets.layout import splits_present
    from datasets.settings import DataSettings
    from sampling.requests import each_split_requests
    from training.data import read_records

    drawing, count = open_drawing(cfg, options), options.each_split

    # Every split that the data set has; a data set without any is read as its test split.
    data = from_config(DataSettings, cfg)
    present = splits_present(Path(cfg.DATA_DIR)) or ["test"]

    def read(split: str) -> Any:
        return read_records(data, split, drawing.pipeline.vocabulary)

    for records, requests in each_split_requests(read, present, count, options.seed):
        name = records.split if drawing.out else f"{records.split}-{count}-seed{options.seed}"
        drawing.into((drawing.out or drawing.folder) / name, requests, records)
    return 0


def draw_split(cfg: Config, options: argparse.Namespace) -> int:
    """The captions of one split; with TRAIN.FLAG False those of AttnGAN's example_filenames.txt, where it is there."""
    from datasets.settings import DataSettings
    from sampling.requests import EXAMPLES, example_requests, split_requests
    from training.data import read_records

    drawing = open_drawing(cfg, options)
    chooses = options.split or options.num_images or options.real
    chooses = chooses or (options.captions_per_image, options.per_caption) != (1, 1)
    is_plain = not (cfg.TRAIN.FLAG or cfg.B_VALIDATION or chooses)
    if is_plain and (Path(cfg.DATA_DIR) / EXAMPLES).is_file():
        # The examples come with attention, as far as the system has any.
        drawing = drawing.with_attention()
        drawing.into(drawing.out or drawing.folder / f"examples-seed{options.seed}", example_requests(cfg.DATA_DIR))
        return 0

    records = read_records(from_config(DataSettings, cfg), options.split or "test", drawing.pipeline.vocabulary)
    choice = (options.captions_per_image, options.per_caption, options.num_images, options.seed)
    folder = drawing.out or drawing.folder / f"{records.split}-seed{options.seed}"
    drawing.into(folder, split_requests(records, *choice), records)
    return 0


class Mode(NamedTuple):
    """One thing that main.py does.

    run: does it, with the configuration and the mode's own options.
    options: names of its options, beside those that all modes have.
    refusal: what is said of an option of another mode.
    """

    run: Callable[[Config, argparse.Namespace], int]
    options: tuple[str, ...]
    refusal: str


NOT_DRAWING = (
    "{option}: is for drawing, but these settings mean a training; add --set B_VALIDATION True to draw the test captions, "
    "or --caption, --captions or --each-split"
)
TRAINING = Mode(run_training, (), NOT_DRAWING)
DRY_RUN = Mode(run_dry, ("--dry-run",), NOT_DRAWING)
STRIP = Mode(
    draw_strip,
    ("--interpolate", *DRAWING),
    "--interpolate draws one strip, without {option}; leave it out, or draw in another call",
)
CAPTIONS = Mode(
    draw_captions,
    ("--caption", "--captions", "--per-caption", *PICTURES),
    "{option} {help}; captions of one's own are of no split: leave it out",
)
EACH_SPLIT = Mode(
    draw_each_split,
    ("--each-split", *PICTURES, "--real"),
    "--each-split draws every split, so many captions of each; leave {option} out",
)
SPLIT = Mode(
    draw_split,
    ("--split", "--captions-per-image", "--num-images", "--per-caption", *PICTURES, "--real"),
    "{option}: has no meaning for drawing a split; leave it out",
)


def mode_of(options: argparse.Namespace, cfg: Config) -> Mode:
    """Which mode the options, and where they leave it open the settings, mean."""
    # An option of drawing decides; without one the settings do.
    if options.dry_run:
        return DRY_RUN
    if options.interpolate:
        return STRIP
    if options.caption or options.captions:
        return CAPTIONS
    if options.each_split:
        return EACH_SPLIT
    return TRAINING if cfg.TRAIN.FLAG and not cfg.B_VALIDATION else SPLIT


# -- objects -------------------------------------------------------------------------------------------------------


def open_drawing(cfg: Config, options: argparse.Namespace) -> Any:
    """The pipeline that options and settings mean, with what the options say about drawing."""
    from miscc.distributed import choose_device, refuse_several_processes
    from models.choice import chosen_system
    from models.registry import network_name
    from sampling.drawing import Drawing, open_pipeline
    from training.settings import StartSettings

    # Encoders and captions: for the authors' files, which hold none. Ours hold all that they need.
    refuse_several_processes("drawing")
    start = from_config(StartSettings, cfg)
    released = {"text_encoder_path": start.encoders_path, "data_dir": cfg.DATA_DIR, "max_words": cfg.TEXT.WORDS_NUM}
    released |= {"encoders": start.kind, "transformer": chosen_system(cfg).text.transformer}
    pipeline, folder = open_pipeline(
        options.checkpoint or cfg.TRAIN.NET_G or newest_checkpoint(cfg),
        choose_device(cfg.GPU_ID, cfg.CUDA),
        not options.no_average,
        cfg.OUTPUT_DIR,
        **released,
    )
    if (system := network_name(pipeline.generator)) != cfg.GAN.NAME:
        # SEMA's released settings, for one, look like SSA-GAN's.
        logger.warning("the generator is %s's, the settings are for %s: set GAN.NAME %s, so that its defaults hold "
                       "(GAN.TRUNCATION, for one)", system, cfg.GAN.NAME, system)  # fmt: skip

    # What is written beside the images: as far as the mode has these options.
    pictures = {
        name: getattr(options, name) for name in ("batch_size", "masks", "attention", "real") if name in options
    }
    return Drawing(
        pipeline,
        folder,
        Path(options.out) if options.out else None,
        options.seed,
        cfg.GAN.TRUNCATION if options.truncation is None else options.truncation,
        options.overwrite,
        cfg.DATASET_NAME,
        **pictures,
    )


def newest_checkpoint(cfg: Config) -> Path:
    """The last checkpoint of the newest run of these settings. Raises ConfigError where there is none."""
    from training.run_dir import RunDir, run_name

    name = run_name(cfg)
    run = RunDir.newest(cfg.OUTPUT_DIR, name, must_exist=False)
    if run is None:
        raise ConfigError(
            f"nothing to draw with: no run of {name!r} in {Path(cfg.OUTPUT_DIR).resolve()}; train one, or name a "
            f"weight file with --checkpoint or TRAIN.NET_G"
        )

    # last.pth, unless it is damaged.
    path = run.newest_whole()
    if path != run.last:
        logger.warning("%s is damaged or gone: drawing with %s", run.last, path.name)
    return path


def main(arguments: list[str] | None = None) -> int:
    # What all modes read: the file of settings.
    options = parser_of(OPTIONS).parse_args(arguments)
    from training.settings import keys_without_effect, load_config

    changes = settings_from(options)
    cfg = load_config(options.cfg, changes)
    for key in keys_without_effect(options.cfg, changes):
        logger.warning("%s: %s has no effect for %s", options.cfg, key, cfg.GAN.NAME)

    # What is done, and its own options.
    mode = mode_of(options, cfg)
    for given, option in ((options.resume, "--resume"), (options.resume_if_exists, "--continue")):
        if given and mode not in (TRAINING, DRY_RUN):
            raise ConfigError(
                f"{option}: goes on with a training, but these options draw; leave {option} or the drawing out"
            )
    return mode.run(cfg, parse(mode, arguments))


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
