"""Options of the command line that several commands have, and the types of their values. One spelling, one meaning."""

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miscc.errors import ConfigError
from miscc.progress import set_quiet

if TYPE_CHECKING:
    import torch


class CommandParser(argparse.ArgumentParser):
    """A command's parser, with the option that every command has: --quiet holds from the moment it is read."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.add_argument("--quiet", action="store_true", help="print results, warnings and errors alone, no progress")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        options, others = super().parse_known_args(args, namespace)
        set_quiet(options.quiet)
        return options, others


class HelpWithDefaults(argparse.ArgumentDefaultsHelpFormatter):
    """Help that names the default of each option, unless it is None, False or []."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False, []) else super()._get_help_string(action)


# -- values --------------------------------------------------------------------------------------------------------


def positive(text: str) -> int:
    """An argument's type: a whole number from 1 on."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def at_least(lowest: int) -> Callable[[str], int]:
    """An argument's type: a whole number from `lowest` on."""

    def number(text: str) -> int:
        value = int(text)
        if value < lowest:
            raise argparse.ArgumentTypeError(f"must be at least {lowest}, not {value}")
        return value

    return number


def not_negative(text: str) -> int:
    """An argument's type: a whole number from 0 on."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must not be negative, but is {value}")
    return value


def seed_number(text: str) -> int:
    """An argument's type: a seed, 0 to 2³² − 1 as numpy takes it."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must not be negative, but is {value}")
    if value >= 2**32:
        raise argparse.ArgumentTypeError("must be 0 to 4294967295")
    return value


def truncation(text: str) -> float:
    """An argument's type: the factor of truncated noise, above 0."""
    value = float(text)

    # The upper bound also refuses infinity.
    if not 0 < value < 100:
        raise argparse.ArgumentTypeError(f"must be a number above 0, such as 0.8, not {text}")
    return value


def device_name(text: str) -> str:
    """An argument's type: 0, 1, ... -> cuda:0, cuda:1, ...; -1 -> cpu; a name such as cpu or cuda:1 as it is."""
    if text == "-1":
        return "cpu"
    return f"cuda:{int(text)}" if text.isdecimal() else text


# -- options -------------------------------------------------------------------------------------------------------


def add_device_option(parser: argparse.ArgumentParser) -> None:
    """`--gpu` and `--device`, which are the same: as `options.device`, for `named_device` or `gpu_number`."""
    parser.add_argument(
        "--gpu",
        "--device",
        dest="device",
        type=device_name,
        metavar="N",
        help="number of the GPU, or cuda:N; -1 or cpu: the CPU (without it: a GPU if there is one)",
    )


def add_data_dir_option(parser: argparse.ArgumentParser, help: str, *former: str) -> None:
    """`--data-dir`, the folder of the data set, as the Path `options.data_dir`. former: other spellings of it."""
    parser.add_argument("--data-dir", *former, dest="data_dir", type=Path, metavar="DIR", help=help)


def named_device(name: str | None) -> "torch.device":
    """The device that `--device` names, None: a GPU if there is one. Raises ConfigError for a device that is not there."""
    import torch  # not above: `--help` should not wait for it

    from miscc.distributed import choose_device

    if name is None:
        return choose_device()

    # Only using it shows whether it is there.
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"--gpu (--device) {name}: cannot be used here ({reason}); --gpu cpu always works") from None
    return device


def gpu_number(name: str | None) -> int | None:
    """The GPU_ID that `--gpu` means: -1 for the CPU, None: a GPU if there is one. Raises ConfigError for other devices."""
    if name is None:
        return None
    if name == "cpu":
        return -1

    # Others, such as mps, are no setting of a training.
    if match := re.fullmatch(r"cuda(?::(\d+))?", name):
        return int(match[1] or 0)
    raise ConfigError(f"--gpu (--device) {name}: must be the number of a GPU, cuda:N, or cpu")


# -- settings ------------------------------------------------------------------------------------------------------


def parser_with_settings(description: str, default_cfg: str) -> argparse.ArgumentParser:
    """A parser with --cfg, --set, --resume, --continue and the short forms of single settings."""
    parser = CommandParser(description=description, formatter_class=HelpWithDefaults, allow_abbrev=False)
    add = parser.add_argument
    add("--cfg", default=default_cfg, metavar="FILE", help="settings of the experiment")
    add("--set", nargs="+", action="append", default=[], metavar="KEY VALUE", help="change settings, may be repeated")

    # Going on with an earlier run.
    add("--resume", action="store_true", help="go on where the newest training of these settings stopped")
    add(
        "--continue",
        dest="resume_if_exists",
        action="store_true",
        help="the same if there is one to go on with, else start",
    )

    # Short forms of single settings, see settings_from.
    add_device_option(parser)
    add_data_dir_option(parser, "the same as --set DATA_DIR DIR", "--data_dir")
    add("--manualSeed", type=int, metavar="N", help="the same as --set SEED N")
    add("--cache", action="store_true", help="the same as --set DATA_CACHE True")
    return parser


def settings_from(options: argparse.Namespace) -> list[tuple[str, str]]:
    """`--set` and the short forms as (key, value) pairs; the short forms win. Raises ConfigError."""
    shorter = {"GPU_ID": gpu_number(options.device), "SEED": options.manualSeed, "DATA_DIR": options.data_dir}

    # The last value of a key holds, so the short forms come after `--set`.
    pairs = setting_pairs(options.set)
    pairs += [(key, str(value)) for key, value in shorter.items() if value is not None]
    return pairs + [("DATA_CACHE", "True")] * options.cache + [("RESTORE", "True")] * options.resume


def setting_pairs(given: Sequence[Sequence[str]]) -> list[tuple[str, str]]:
    """The words behind each `--set` as (key, value) pairs. Raises ConfigError for a key without a value."""
    pairs = []
    for words in given:
        # Several pairs may follow one `--set`.
        if len(words) % 2:
            raise ConfigError(
                f"--set {' '.join(words)}: give pairs of a key and a value, e.g. --set TRAIN.BATCH_SIZE 8"
            )
        pairs += zip(words[::2], words[1::2], strict=True)
    return pairs
