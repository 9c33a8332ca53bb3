"""A lock that one process holds on a folder until it ends, however it ends."""

import os
import socket
from pathlib import Path

from miscc.errors import UserError, WriteError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


class FolderLock:
    """A lock on the file `lock` in a folder, which names host and process of the holder for people to read.

    The operating system holds the lock (POSIX record lock) and releases it when the process ends: a crash or a reboot
    leaves no lock behind, and the file alone means nothing. Worker processes do not inherit it. Within one process it
    refuses nothing.

    Network file systems: NFS passes it on to the server, so that it holds between machines (version 4 always; version 3
    where lockd runs, and not with the mount options nolock or local_lock). Lustre needs the mount option flock; with
    localflock, as on most FUSE mounts (sshfs), it holds on one machine only. Where nothing can be locked, on Windows too,
    `held` is False, and nothing is refused.
    """

    def __init__(self, folder: str | Path, use: str = "trained", other: str = "start a run of its own"):
        """Take the lock; makes the folder.

        use, other: what the holder does with the folder, and what else one can do; for the message

        Raises UserError where another process holds the lock, WriteError where its file cannot be written.
        """
        self.path, self.held = Path(folder) / "lock", False
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a+", encoding="utf-8")
        except OSError as error:
            raise WriteError(f"{self.path}: cannot be written ({error.strerror}); choose another place") from None

        # Where another process holds it, the file says which.
        if fcntl is not None:
            try:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self.held = True
            except (BlockingIOError, PermissionError):
                self._file.seek(0)
                holder = self._file.read(200).strip() or "another process"
                self._file.close()
                raise UserError(
                    f"{folder}: is being {use} by {holder}; wait until it ends, stop it, or {other}"
                ) from None
            except OSError:  # a file system without locks
                pass

        # For people to read. A full disk must not stop the run.
        try:
            self._file.truncate(0)
            self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            self._file.flush()
        except OSError:
            pass

    def release(self) -> None:
        """Give the lock up before the process ends."""
        try:
            self._file.close()
        except OSError:  # the text that a full disk did not store
            pass
