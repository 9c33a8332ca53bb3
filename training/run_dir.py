"""Numbered run directories: output/00003-bird-ssa_gan/. The only place that has the names of files in a run.

What the files hold is the trainers'; which of a run's checkpoints it goes on from stands here.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from miscc.checkpoint import check_whole, load_checkpoint, save_checkpoint, validate
from miscc.errors import CheckpointError, ConfigError, DamagedError, UserError, WriteError
from miscc.files import remove_unfinished, write_text
from miscc.lock import FolderLock


def run_name(cfg: Mapping[str, Any]) -> str:
    """What the directories of these settings' runs are called. Raises ConfigError for a CONFIG_NAME that is no file name."""
    name = cfg["CONFIG_NAME"]
    if not re.fullmatch(r"(?!\.)[^/\\\x00-\x1f]{1,100}", name):
        raise ConfigError(
            f"CONFIG_NAME: {name[:100]!r} must be a file name, without slashes; it names the run directory"
        )
    return f"{name}-{cfg['GAN']['NAME']}"


class RunDir:
    """One run's directory and the names in it.

    note: what to log about the checkpoint that the run continues from.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.note = ""
        self._lock: FolderLock | None = None
        self.last_is_good = True  # if not, the next `save` does not keep last.pth as previous.pth
        self.config = self.path / "config.yml"
        self.log = self.path / "log.txt"
        self.stats = self.path / "stats.jsonl"
        self.last = self.path / "checkpoints" / "last.pth"
        self.previous = self.path / "checkpoints" / "previous.pth"
        self.best = self.path / "checkpoints" / "best.pth"

    def numbered(self, epoch: int) -> Path:
        return self.path / "checkpoints" / f"epoch_{epoch:04d}.pth"

    def picture(self, step: int) -> Path:
        return self.path / "pictures" / f"step_{step:07d}.png"

    @classmethod
    def create(cls, output_dir: str | Path, name: str, config_yaml: str) -> "RunDir":
        """Make the directory of the next free number, with the settings in it; safe when several processes do so at once."""
        # The folder of all runs.
        output_dir = Path(output_dir)
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise WriteError(
                f"OUTPUT_DIR: {output_dir} cannot be made ({error.strerror}); choose another place"
            ) from None

        # Runs that were killed while they wrote their first checkpoint are of no use, and large.
        for path in (path for _, path in _numbered_directories(output_dir) if path.name[6:] == name):
            if not cls(path).has_state():
                cls(path)._clear()

        # The next number; where another process was faster, the one after it.
        number = max((n for n, _ in _numbered_directories(output_dir)), default=-1) + 1
        while True:
            run = cls(output_dir / f"{number:05d}-{name}")
            try:
                os.mkdir(run.path)
            except FileExistsError:
                number += 1
                continue
            except OSError as error:
                raise WriteError(
                    f"OUTPUT_DIR: {run.path} cannot be made ({error.strerror}); choose another place"
                ) from None
            run.lock()
            write_text(run.config, config_yaml)
            return run

    @classmethod
    def newest(cls, output_dir: str | Path, name: str, must_exist: bool = True) -> "RunDir | None":
        """The newest run of this name that has a checkpoint; without one CheckpointError, or None if it need not exist."""
        # Those of this name, the newest first.
        directories = [path for _, path in sorted(_numbered_directories(Path(output_dir))) if path.name[6:] == name]
        for path in reversed(directories):
            if cls(path).has_state():
                return cls(path)
        if not must_exist:
            return None

        # None: say which of two reasons it is.
        why = f"the {len(directories)} runs of this name hold no checkpoint" if directories else "there is no such run"
        raise CheckpointError(f"nothing to resume for {name!r} in {output_dir}: {why}; start without --resume")

    # -- one process at a time -----------------------------------------------------------------------------------

    def lock(self) -> None:
        """Keep other processes from training here, see `FolderLock`; then delete what killed ones left half written.

        Raises UserError where a process trains here already.
        """
        self._lock = FolderLock(self.path)
        for folder in (self.path, self.last.parent, self.picture(0).parent):
            remove_unfinished(folder)

    def release(self) -> None:
        """Give up the lock, where this process holds it."""
        if self._lock is not None:
            self._lock.release()

    def _clear(self) -> None:
        """Delete what killed processes left half written, unless another process trains here."""
        try:
            self.lock()
        except UserError:
            return
        self.release()

    # -- the run's state -----------------------------------------------------------------------------------------

    def has_state(self) -> bool:
        """Whether there is a last.pth, or the one before it."""
        return self.last.is_file() or self.previous.is_file()

    def save(self, checkpoint: dict[str, Any]) -> None:
        """Write last.pth; the checkpoint that it replaces is kept as previous.pth, if it was good. Raises WriteError."""
        save_checkpoint(self.last, checkpoint, self.previous if self.last_is_good else None)
        self.last_is_good = bool(checkpoint.get("watch", {}).get("good", True))

    def load(self) -> dict[str, Any]:
        """The checkpoint to go on from: last.pth or, where that is damaged or gone, the newest older one with everything.

        Raises CheckpointError where there is none.
        """
        reason = f"{self.last}: is not there"
        try:
            if self.last.is_file():
                checkpoint = self._load_whole(self.last)
                self.last_is_good = bool(checkpoint.get("watch", {}).get("good", True))
                return checkpoint
        except DamagedError as error:
            reason = str(error)

        # Older ones; those without optimizers are for drawing alone.
        self.last_is_good = False
        for path in self._older():
            try:
                checkpoint = self._load_whole(path)
            except DamagedError:
                continue
            if "optimizers" in checkpoint:
                self.note = f"{reason.partition(';')[0]}; goes on from {path.name}, step {checkpoint.get('step')}"
                return checkpoint
        raise CheckpointError(f"{reason.partition(';')[0]}, and there is no older checkpoint to go on from; start anew")

    def whole_checkpoints(self) -> Iterator[tuple[Path, dict[str, Any]]]:
        """last.pth and older checkpoints that are whole and hold everything."""
        for path in (self.last, *self._older()):
            try:
                checkpoint = self._load_whole(path)
            except CheckpointError:
                continue
            if "optimizers" in checkpoint:
                yield path, checkpoint

    def discard_state(self) -> None:
        """Delete the checkpoints that a training goes on from, where a new one takes this folder; best.pth stays."""
        for path in (self.last, *self._older()):
            path.unlink(missing_ok=True)

    def newest_whole(self) -> Path:
        """The file that `load` would read, or last.pth where none is whole; to draw with."""
        for path in (self.last, *self._older()):
            try:
                check_whole(path)
                return path
            except CheckpointError:
                continue
        return self.last

    def _older(self) -> Iterator[Path]:
        """previous.pth and numbered checkpoints, the newest first."""
        found = [path for path in (self.previous, *self.last.parent.glob("epoch_*.pth")) if path.is_file()]
        yield from sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)

    @staticmethod
    def _load_whole(path: Path) -> dict[str, Any]:
        checkpoint = load_checkpoint(path)
        validate(checkpoint, path)
        return checkpoint

    # -- stats ---------------------------------------------------------------------------------------------------

    def truncate_stats(self, step: int) -> None:
        """Drop lines after `step`: a resumed run writes them again."""
        if not self.stats.is_file():
            return

        # The last line of a killed run may be half a line, which is dropped, too.
        kept = []
        for line in self.stats.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (ValueError, KeyError, TypeError):
                continue
        write_text(self.stats, "".join(f"{line}\n" for line in kept))


class EncoderDir(RunDir):
    """DAMSMencoders/<dataset>/: one training of the encoders, in the place where the GANs look for them."""

    def __init__(self, path: str | Path):
        super().__init__(path)
        self.last = self.path / "last.pth"
        self.previous = self.path / "previous.pth"
        self.best = self.path / "best.pth"

    def numbered(self, epoch: int) -> Path:
        return self.path / f"epoch_{epoch:04d}.pth"

    def picture(self, epoch: int) -> Path:
        return self.path / "attention" / f"epoch_{epoch:04d}.png"


def _numbered_directories(output_dir: Path) -> list[tuple[int, Path]]:
    if not output_dir.is_dir():
        return []
    matches = ((re.match(r"(\d{5})-", path.name), path) for path in output_dir.iterdir() if path.is_dir())
    return [(int(match.group(1)), path) for match, path in matches if match]
