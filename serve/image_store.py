"""Images that clients fetch by URL: a folder with a size limit, whose oldest files go first."""

import re
import secrets
import threading
from collections import OrderedDict
from pathlib import Path

NAME = re.compile(r"[A-Za-z0-9_-]{22}\.png")


class ImageStore:
    """PNG files under names that cannot be guessed. folder: of its own; limit_bytes: of all files together."""

    def __init__(self, folder: Path, limit_bytes: int = 256 * 2**20):
        self.folder, self.limit_bytes = folder, limit_bytes
        self._sizes: OrderedDict[str, int] = OrderedDict()
        self._lock = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def num_bytes(self) -> int:
        return sum(self._sizes.values())

    def add(self, png: bytes) -> str:
        """Keep a PNG file; returns its name."""
        name = f"{secrets.token_urlsafe(16)}.png"
        (self.folder / name).write_bytes(png)

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
