"""Images that clients fetch by URL: a folder with a size limit, whose oldest files go first."""

import contextlib
import re
import secrets
import threading
from collections import OrderedDict
from pathlib import Path

from miscc.errors import WriteError

NAME = re.compile(r"[A-Za-z0-9_-]{22}\.png")


class ImageStore:
    """PNG files under names that cannot be guessed.

    folder: of its own.
    limit_bytes: of all files together.
    """

    def __init__(self, folder: Path, limit_bytes: int = 256 * 2**20):
        self.folder, self.limit_bytes = folder, limit_bytes
        self._sizes: OrderedDict[str, int] = OrderedDict()
        self._lock = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def num_bytes(self) -> int:
        return sum(self._sizes.values())

    def add(self, png: bytes) -> str:
        """Keep a PNG file; returns its name. Raises WriteError, without a path, as clients read it."""
        name = f"{secrets.token_urlsafe(16)}.png"
        path = self.folder / name

        # The folder again: a cleaner of temporary files may have removed it.
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.write_bytes(png)
        except OSError as error:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
            raise WriteError(
                f"images: the server cannot keep any ({error.strerror}); free space in its temporary folder, or ask "
                f"/api/v1.0/images, which needs no file"
            ) from None

        # The oldest go as soon as all together are too large.
        with self._lock:
            self._sizes[name] = len(png)
            total = sum(self._sizes.values())
            while total > self.limit_bytes and len(self._sizes) > 1:
                oldest, size = self._sizes.popitem(last=False)
                total -= size
                (self.folder / oldest).unlink(missing_ok=True)
        return name

    def read(self, name: str) -> bytes | None:
        """The file of this name, None where there is none (any more)."""
        if not NAME.fullmatch(name) or name not in self._sizes:
            return None
        try:
            return (self.folder / name).read_bytes()
        except OSError:
            return None
