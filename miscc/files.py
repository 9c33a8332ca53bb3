"""Files written whole or not at all. Works without torch, as serving an exported model does."""

import contextlib
import errno
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path, PurePath
from typing import IO, Any

from miscc.errors import UserError, WriteError

# A full disk, a limit on files, a disk that fails or was made read-only, a folder that is gone.
WRITING_FAILED = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR,
    errno.ESTALE,
}  # fmt: skip
MOST_BYTES = 1 << 24  # of a JSON file; COCO's vocabulary has 0.3 MB, CLIP's tokenizer 4 MB


def write_atomically(
    path: str | Path, write: Callable[[IO[bytes]], object], flush: bool = True, previous: str | Path | None = None
) -> None:
    """Call `write(stream)` on a temporary file beside `path`, flush it to the disk, then put it in place.

    A reader sees the old file or the new one, never half of one, whenever the process is killed.

    flush: False: whole after a kill, but perhaps not after a power cut; for thousands of small files that can be made again
    previous: in the same folder; what was at `path` before is kept under this name

    Raises WriteError on a full or read-only disk, and where the folder cannot be made.
    """
    path, kept = Path(path), None
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        # Several processes may write the same file, each to a temporary one of its own.
        stream = _create(temporary)
    except OSError as error:
        raise WriteError(f"{path}: cannot be written ({error.strerror}); choose another place") from None

    try:
        with stream:
            write(stream)
            if flush:
                stream.flush()
                os.fsync(stream.fileno())

        # What was there gets a second name; the new file takes its place; then it replaces the one before it. At each moment
        # `path` and `previous` are two files, so that damage to one leaves the other.
        kept = _second_name(path, Path(previous)) if previous is not None and path.exists() else None
        os.replace(temporary, path)
        if kept is not None and previous is not None:
            os.replace(kept, previous)
            _remove(kept)  # where both were names of one file already, that rename has done nothing
        if flush:
            _flush_folder(path.parent)

    # Also on Ctrl-C: leave no temporary file.
    except BaseException as error:
        _remove(temporary)
        if kept is not None:
            _remove(kept)
        if isinstance(error, RuntimeError) and isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None  # torch's zip writer cannot close half an archive, and raises that error instead
        if reason := _failed_write(error):
            before = "; what was there before is kept" if path.exists() else ""
            raise WriteError(f"{path}: cannot be written ({reason}){before}") from None
        raise


def _second_name(path: Path, previous: Path) -> Path | None:
    """Give a file a temporary name beside its own; None, with the file moved to `previous`, where there are no hard links."""
    temporary = previous.with_name(f".{previous.name}.{secrets.token_hex(4)}.tmp")
    try:
        os.link(path, temporary)
    except OSError:  # for a moment the file has its second name alone
        os.replace(path, previous)
        return None
    return temporary


def _failed_write(error: BaseException | None) -> str:
    """The reason in an OSError, or in one that torch's zip writer replaced by a RuntimeError; "" for other errors."""
    if not isinstance(error, (OSError, RuntimeError)):
        return ""

    # Through the errors that it came from.
    while error is not None:
        if isinstance(error, OSError) and error.errno in WRITING_FAILED:
            return error.strerror or type(error).__name__
        error = error.__context__
    return ""


def _flush_folder(folder: Path) -> None:
    """Flush the names in a folder, which a power cut could otherwise undo."""
    with contextlib.suppress(OSError):  # some file systems, and Windows, do not support it
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _remove(path: Path) -> None:
    """Delete a file if that is possible: with the disk, the folder may be gone."""
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def _create(path: Path) -> IO[bytes]:
    """A new file, and its folder where missing (checking for it each time costs more than writing a small image)."""
    try:
        return path.open("xb")
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("xb")


def remove_unfinished(folder: str | Path) -> None:
    """Delete the temporary files of writes into this folder whose process was killed."""
    for path in Path(folder).glob(".*.tmp"):
        _remove(path)


def check_free(path: str | Path, overwrite: bool) -> None:
    """Raises UserError where a file is there already, which a user's slip would otherwise replace."""
    if Path(path).exists() and not overwrite:
        raise UserError(f"{path}: exists already; give --overwrite or another file")


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file, whole or not at all."""
    write_atomically(path, lambda stream: stream.write(text.encode("utf-8")))


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON with an indent, whole or not at all."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def stays_inside(name: str) -> bool:
    """Whether the text of a relative path stays inside its folder. Links in the folder are allowed, and not followed here."""
    path = PurePath(name.replace("\\", "/"))

    # Windows' separators and drives, too: a folder may be copied between systems.
    is_name = bool(path.name) and "\0" not in name and len(name) < 1000
    return is_name and not path.is_absolute() and not path.drive and ".." not in path.parts


def parse_json(text: str) -> Any:
    """json.loads, for text from outside. Raises ValueError for everything that is no JSON."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_bytes(path: str | Path, most_bytes: int = MOST_BYTES) -> bytes:
    """The content of a small file. Raises ValueError for a pipe, device or larger file, OSError where it cannot be opened."""
    # A pipe without a writer would be waited for. Windows has no such flag, but one for text.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    with open(os.open(path, flags), "rb") as stream:
        if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
            raise ValueError("it is no ordinary file")
        content = stream.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise ValueError(f"it has more than {most_bytes >> 20} MiB")
    return content


def read_json(path: str | Path, most_bytes: int = MOST_BYTES) -> Any:
    """A small UTF-8 JSON file from outside. Raises ValueError for everything else, OSError where it cannot be opened."""
    return parse_json(read_bytes(path, most_bytes).decode("utf-8"))


def hash_of_file(path: str | Path) -> str:
    """SHA-256 of a file, 64 hex digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
