"""Arguments that main.py and pretrain_DAMSM.py share."""

import argparse

from miscc.errors import ConfigError


def parser_with_settings(description: str, default_cfg: str) -> argparse.ArgumentParser:
    """A parser with --cfg, --gpu, --set, --resume, --continue and the short forms of single settings."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--cfg", default=default_cfg, metavar="FILE", help="settings of the experiment")
    add("--gpu", type=int, metavar="N", help="number of the GPU, -1: CPU (without it: a GPU if there is one)")
    add("--set", nargs="+", action="append", default=[], metavar="KEY VALUE", help="change settings, may be repeated")
    add("--resume", action="store_true", help="go on where the newest training of these settings stopped")
    add("--continue", dest="go_on", action="store_true", help="the same if there is one to go on with, else start")
    add("--manualSeed", type=int, metavar="N", help="the same as --set SEED N")
    add("--data_dir", metavar="DIR", help="the same as --set DATA_DIR DIR")
    add("--cache", action="store_true", help="the same as --set DATA_CACHE True")
    return parser


def settings_from(options: argparse.Namespace) -> list[tuple[str, str]]:
    """`--set` and the short forms as (key, value) pairs; the short forms win. Raises ConfigError."""
    pairs = []
    for words in options.set:
        if len(words) % 2:
            raise ConfigError(
                f"--set {' '.join(words)}: give pairs of a key and a value, e.g. --set TRAIN.BATCH_SIZE 8"
            )
        pairs += zip(words[::2], words[1::2], strict=True)
    shorter = {"GPU_ID": options.gpu, "SEED": options.manualSeed, "DATA_DIR": options.data_dir}
    pairs += [(key, str(value)) for key, value in shorter.items() if value is not None]
    return pairs + [("DATA_CACHE", "True")] * options.cache + [("RESTORE", "True")] * options.resume


def not_negative(text: str) -> int:
    """An argument's type: a whole number from 0 on."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must not be negative, but is {value}")
    return value


def truncation(text: str) -> float:
    """An argument's type: the factor of truncated noise, above 0."""
    value = float(text)
    if not 0 < value < 100:
        raise argparse.ArgumentTypeError(f"must be a number above 0, such as 0.8, not {text}")
    return value


def positive(text: str) -> int:
    """An argument's type: a whole number from 1 on."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value
