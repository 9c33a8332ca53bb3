"""Train a text-to-image GAN or draw with it, as a YAML file says. Arguments and objects only; no maths here.

python main.py --cfg cfg/bird.yml --gpu 0                       train
python main.py --cfg cfg/bird.yml --resume                      go on where it stopped
python main.py --cfg cfg/bird.yml --set B_VALIDATION True       images for the test captions
python main.py --cfg cfg/bird.yml --caption "a small red bird with black wings"
"""

import argparse
import logging
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from miscc.command_line import not_negative, parser_with_settings, positive, settings_from, truncation
from miscc.errors import ConfigError, UserError, run_command

logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
logger = logging.getLogger("main")


# Options that only drawing reads. Where nothing asks for a drawing they would start a training of days.
DRAWING_ONLY = (
    "checkpoint", "out", "overwrite", "seed", "truncation", "split", "per_caption", "captions_per_image", "num_images",
    "batch_size", "masks", "attention", "real", "no_average",
)  # fmt: skip


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = parser_with_settings(__doc__.splitlines()[0], "cfg/bird.yml")
    parser.add_argument("--dry-run", action="store_true", help="say what a training would be, and what is missing")
    draw = parser.add_argument_group(
        "drawing (with --caption, --captions, --interpolate, --each-split, or B_VALIDATION: True)"
    )
    draw.add_argument("--caption", action="append", metavar="TEXT", help="draw this caption; may be repeated")
    draw.add_argument("--captions", metavar="FILE", help="draw each line of a text file")
    draw.add_argument("--interpolate", nargs=2, metavar="TEXT", help="a strip from one caption to the other; the same "
                      "caption twice: from one noise to another")  # fmt: skip
    draw.add_argument(
        "--checkpoint",
        metavar="FILE",
        help="draw with this one, or a published model's folder (default: NET_G, or the newest run's last)",
    )
    draw.add_argument("--out", metavar="DIR", help="folder for the images (default: beside the checkpoint)")
    draw.add_argument("--overwrite", action="store_true", help="replace samples that are in the folder")
    draw.add_argument("--seed", type=not_negative, default=0, metavar="N", help="of the noise")
    draw.add_argument(
        "--truncation", type=truncation, metavar="T", help="cut the noise at +-2 and scale it by T, e.g. 0.8"
    )
    draw.add_argument("--split", help="whose captions B_VALIDATION draws; without it: test")
    draw.add_argument("--each-split", type=positive, metavar="N", help="N captions of each of train, val and test instead, "
                      "without replacement")  # fmt: skip
    draw.add_argument("--per-caption", type=positive, default=1, metavar="N", help="images for each caption")
    draw.add_argument(
        "--captions-per-image", type=not_negative, default=1, metavar="N", help="captions of each image; 0: all"
    )
    draw.add_argument("--num-images", type=positive, metavar="N", help="so many captions instead, drawn from all")
    draw.add_argument("--batch-size", type=positive, default=32, metavar="N", help="images drawn at once")
    draw.add_argument("--masks", action="store_true", help="write the masks of every stage, too")
    draw.add_argument("--attention", action="store_true", help="write where each word looks, too, stage by stage")
    draw.add_argument("--real", action="store_true", help="write the real images of the captions, too")
    draw.add_argument("--no-average", action="store_true", help="draw with G itself, not with its average")
    options = parser.parse_args(arguments)
    changed = [name for name in DRAWING_ONLY if getattr(options, name) != parser.get_default(name)]
    options.drawing_only = ["--" + name.replace("_", "-") for name in changed]
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    from miscc.distributed import refuse_several_processes  # torch comes with the rest: --help should not wait for it
    from training.settings import keys_without_effect, load_config

    changes = settings_from(options)
    cfg = load_config(options.cfg, changes)
    for key in keys_without_effect(options.cfg, changes):
        logger.warning("%s: %s has no effect for %s", options.cfg, key, cfg.GAN.NAME)
    if options.dry_run:
        from training.dry_run import describe

        print(describe(cfg))
        return 0
    if options.interpolate and (options.caption or options.captions):
        raise ConfigError("--interpolate draws a strip of its own; give --caption and --captions in another call")
    if options.interpolate and (options.masks or options.attention):
        raise ConfigError("--interpolate draws one strip, without --masks and --attention; leave them out")
    own = options.caption or options.captions
    if options.real and (own or options.interpolate):
        raise ConfigError(
            "--real writes the real images of a split's captions; captions of one's own have none: leave it out"
        )
    if options.each_split and options.split:
        raise ConfigError("--each-split draws every split; leave --split out")
    asked = own or options.interpolate or options.each_split
    if asked or cfg.B_VALIDATION or not cfg.TRAIN.FLAG:
        refuse_several_processes("drawing")
        return draw(cfg, options)
    if options.drawing_only:
        raise ConfigError(f"{options.drawing_only[0]}: is for drawing, but these settings mean a training; add --set "
                          f"B_VALIDATION True to draw the test captions, or --caption, --captions or --each-split")  # fmt: skip
    from miscc import distributed
    from training.trainer import train

    world = distributed.start(cfg.GPU_ID, cfg.CUDA)
    return train(cfg, world, resume=cfg.RESTORE, resume_if_exists=options.resume_if_exists)


def draw(cfg: Mapping, options: argparse.Namespace) -> int:
    """Images for a split's captions or for the user's own; the path of the picture is the last line printed."""
    from miscc.distributed import choose_device
    from miscc.pictures import save_image
    from models.registry import network_name
    from sampling.folders import sample
    from sampling.interpolate import interpolate

    device = choose_device(cfg.GPU_ID, cfg.CUDA)
    pipeline, folder = find_pipeline(cfg, options, device)
    if (system := network_name(pipeline.generator)) != cfg.GAN.NAME:
        # SEMA's released settings, for one, do not tell themselves from SSA-GAN's.
        logger.warning("the generator is %s's, the settings are for %s: set GAN.NAME %s, so that its defaults hold "
                       "(GAN.TRUNCATION, for one)", system, cfg.GAN.NAME, system)  # fmt: skip
    truncation = options.truncation if options.truncation is not None else cfg.GAN.TRUNCATION
    if options.interpolate:
        strip = interpolate(pipeline, *options.interpolate, seed=options.seed, truncation=truncation)
        path = free_path(Path(options.out or folder) / f"interpolation-seed{options.seed}.png", options.overwrite)
        save_image(strip, path)
        print(path)
        return 0
    # AttnGAN's examples come with attention, as far as the system has any.
    attention = options.attention or (pipeline.attends and draws_examples(cfg, options))
    for requests, place, records in drawings(cfg, options, pipeline, folder):
        picture = sample(
            pipeline,
            requests,
            place,
            seed=options.seed,
            truncation=truncation,
            batch_size=options.batch_size,
            with_masks=options.masks,
            with_attention=attention,
            real=records if options.real else None,
            overwrite=options.overwrite,
            about={"dataset": cfg.DATASET_NAME, "split": records.split if records is not None else None},
        )
        print(f"{len(requests)} image{'s' if len(requests) > 1 else ''} in {place}")
        for kind, written in (("masks", options.masks), ("attention", attention), ("real", options.real)):
            if written:
                print(Path(place) / kind)
        print(picture)
    return 0


def drawings(cfg: Mapping, options: argparse.Namespace, pipeline, folder: Path) -> Iterator[tuple]:
    """What to draw: (requests, the folder they go to, the records of the split or None), one after the other."""
    from datasets.layout import splits_present
    from sampling.requests import caption_requests, each_split_requests, example_requests, read_captions, split_requests
    from training.data import read_records

    def read(split: str):
        return read_records(cfg, split, pipeline.vocabulary)

    out = Path(options.out) if options.out else None
    captions = [*(options.caption or []), *(read_captions(options.captions) if options.captions else [])]
    if captions:
        place = out or free_path(folder / "captions", overwrite=options.overwrite)
        yield caption_requests(captions, options.per_caption), place, None
    elif options.each_split:
        number, present = options.each_split, splits_present(Path(cfg.DATA_DIR))
        for records, requests in each_split_requests(read, present or ["test"], number, options.seed):
            name = records.split if out else f"{records.split}-{number}-seed{options.seed}"
            yield requests, (out or folder) / name, records
    elif draws_examples(cfg, options):
        yield example_requests(cfg.DATA_DIR), out or folder / f"examples-seed{options.seed}", None
    else:
        records = read(options.split or "test")
        choice = (options.captions_per_image, options.per_caption, options.num_images, options.seed)
        yield split_requests(records, *choice), out or folder / f"{records.split}-seed{options.seed}", records


def draws_examples(cfg: Mapping, options: argparse.Namespace) -> bool:
    """Whether AttnGAN's example_filenames.txt is what is drawn: with TRAIN.FLAG False, where nothing else is asked for."""
    other = options.caption or options.captions or options.each_split or options.split or options.num_images
    return (
        not (cfg.TRAIN.FLAG or cfg.B_VALIDATION or other) and (Path(cfg.DATA_DIR) / "example_filenames.txt").is_file()
    )


def find_pipeline(cfg: Mapping, options: argparse.Namespace, device) -> tuple:
    """The drawing pipeline that the options and settings mean, and the folder that its samples go to."""
    from miscc.checkpoint import load_file
    from sampling.pipeline import TextToImage
    from training.build import text_settings
    from training.run_dir import RunDir

    path = options.checkpoint or cfg.TRAIN.NET_G
    if not path:
        name = f"{cfg.CONFIG_NAME}-{cfg.GAN.NAME}"
        try:
            path = RunDir.newest(cfg.OUTPUT_DIR, name).last
        except UserError:
            raise ConfigError(
                f"nothing to draw with: no run of {name!r} in {Path(cfg.OUTPUT_DIR).resolve()}; train one, or name a "
                f"weight file with --checkpoint or TRAIN.NET_G"
            ) from None
    path = Path(path)
    if path.is_dir():
        pipeline = TextToImage.load(path, device, averaged=not options.no_average)
        return pipeline, path / "samples" / f"step{pipeline.origin['step']}"
    content = load_file(path)
    if isinstance(content, dict) and "networks" in content:
        pipeline = TextToImage.load(path, device, averaged=not options.no_average)
        run = path.parent.parent if path.parent.name == "checkpoints" else path.parent
        return pipeline, run / "samples" / f"{path.stem}-step{pipeline.origin['step']}"
    pipeline = TextToImage.from_released(
        path, cfg.TEXT.DAMSM_NAME, cfg.DATA_DIR, device, cfg.TEXT.WORDS_NUM, text_settings(cfg).transformer
    )
    return pipeline, Path(cfg.OUTPUT_DIR) / "samples" / path.stem


def free_path(path: Path, overwrite: bool) -> Path:
    """The path, or path-2, path-3 ... if it is taken and may not be overwritten."""
    number, free = 1, path
    while free.exists() and not overwrite:
        number += 1
        free = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return free


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
