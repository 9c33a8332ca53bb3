"""Errors that the user can mend: one line that says what to change. Anything else is a bug and keeps its traceback."""

import reprlib
import sys
from collections.abc import Callable


class UserError(Exception):
    """Something the user can mend; the message names the thing and says what to do about it."""


class ConfigError(UserError):
    """A setting is unknown, of the wrong type, or does not fit the others."""


class DataError(UserError):
    """A data set, caption or image is missing, broken or does not fit."""


class CheckpointError(UserError):
    """A weight file is missing, broken, unsafe or of another system."""


class DamagedError(CheckpointError):
    """A weight file whose bytes are not those that were written: cut off, or changed on the disk."""


class WriteError(UserError):
    """A file cannot be written: the disk is full or read-only, or the folder is gone."""


class TrainingError(UserError):
    """Training cannot go on, e.g. because a loss is no longer finite."""


class CollapseError(TrainingError):
    """A training has failed, and going on would not mend it.

    kind: of failure, see training/watch.py; "finite": losses or weights are not.
    """

    def __init__(self, message: str, kind: str = "finite"):
        super().__init__(message)
        self.kind = kind


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80
_SHORT.maxlevel = 2


def shown(value: object) -> str:
    """A value as an error shows it: its repr, cut where it is long."""
    return _SHORT.repr(value)


def run_command(main: Callable[[], object]) -> None:
    """Run an entry script's `main`: a UserError becomes one line on stderr and exit code 2, Ctrl-C exit code 130.

    The same holds for an OSError that names a file: no permission, a name that is too long, a loop of links.
    """
    # Exit codes: 2 for what a user can mend, 130 and 141 as shells have them.
    try:
        code = main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the program that reads our output, such as `head`, has ended
        sys.stderr.close()
        sys.exit(141)
    except OSError as error:
        if error.filename is None:
            raise
        remedy = "; change its permissions" if isinstance(error, PermissionError) else ""
        print(f"error: {error.filename}: {error.strerror}{remedy}", file=sys.stderr)
        sys.exit(2)
    sys.exit(code if isinstance(code, int) else 0)
