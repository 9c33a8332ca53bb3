"""Files written whole or not at all. Works without torch, as serving an exported model does."""

import errno
import hashlib
import json
import os
import secrets
from collections.abc import Callable
from pathlib import Path, PurePath
from typing import IO, Any

from miscc.errors import UserError


def write_atomically(path: str | Path, write: Callable[[IO[bytes]], object], flush: bool = True) -> None:
    """Call `write(stream)` on a temporary file beside `path`, flush it to the disk, then put it in place.

    A reader sees the old file or the new one, never half of one, whenever the process is killed.

    flush: False: whole after a kill, but perhaps not after a power cut; for thousands of small files that can be made again
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        stream = _create(temporary)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another place") from None

    try:
        with stream:
            write(stream)
            if flush:
                stream.flush()
                os.fsync(stream.fileno())
        os.replace(temporary, path)

    # Also on Ctrl-C: leave no temporary file. A full disk is the user's to mend.
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise UserError(f"{path}: cannot be written ({error.strerror}); what was there before is kept") from None
        raise


def _create(path: Path) -> IO[bytes]:
    """A new file, and its folder where missing (checking for it each time costs more than writing a small image)."""
    try:
        return path.open("xb")
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("xb")


def remove_unfinished(folder: str | Path) -> None:
    """Delete what writes into this folder left unfinished when their process was killed."""
    for path in Path(folder).glob(".*.tmp"):
        path.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file, whole or not at all."""
    write_atomically(path, lambda stream: stream.write(text.encode("utf-8")))


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON with an indent, whole or not at all."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def stays_inside(name: str) -> bool:
    """Whether a relative path, as it is written, names something inside its folder. Links in the folder are its owner's."""
    path = PurePath(name.replace("\\", "/"))
    is_name = bool(path.name) and "\0" not in name and len(name) < 1000
    return is_name and not path.is_absolute() and not path.drive and ".." not in path.parts


def parse_json(text: str) -> Any:
    """json.loads, for text that somebody else wrote. Raises ValueError for everything that is no JSON."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def hash_of_file(path: str | Path) -> str:
    """SHA-256 of a file, 64 hex digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
