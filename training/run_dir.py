"""Numbered run directories: output/00003-bird-ssa_gan/. The only place that spells the names of files in a run."""

import json
import os
import re
from pathlib import Path

from miscc.errors import CheckpointError, UserError
from miscc.files import write_text


class RunDir:
    """One run's directory and the names in it."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config = self.path / "config.yml"
        self.log = self.path / "log.txt"
        self.stats = self.path / "stats.jsonl"
        self.last = self.path / "checkpoints" / "last.pth"
        self.best = self.path / "checkpoints" / "best.pth"

    def numbered(self, epoch: int) -> Path:
        return self.path / "checkpoints" / f"epoch_{epoch:04d}.pth"

    def picture(self, step: int) -> Path:
        return self.path / "pictures" / f"step_{step:07d}.png"

    @classmethod
    def create(cls, output_dir: str | Path, name: str, config_yaml: str) -> "RunDir":
        """Make the next free number's directory with the settings in it; safe against others doing the same."""
        # The folder of all runs.
        output_dir = Path(output_dir)
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"OUTPUT_DIR: {output_dir} cannot be made ({error.strerror}); choose another place"
            ) from None

        # The next number; where another process was faster, the one after it.
        number = max((n for n, _ in _numbered_directories(output_dir)), default=-1) + 1
        while True:
            run = cls(output_dir / f"{number:05d}-{name}")
            try:
                os.mkdir(run.path)
            except FileExistsError:
                number += 1
                continue
            write_text(run.config, config_yaml)
            return run

    @classmethod
    def newest(cls, output_dir: str | Path, name: str, must_exist: bool = True) -> "RunDir | None":
        """The newest run of this name that has a checkpoint; without one CheckpointError, or None if it need not exist."""
        # The newest that is any use.
        directories = [path for _, path in sorted(_numbered_directories(Path(output_dir))) if path.name[6:] == name]
        for path in reversed(directories):
            if cls(path).last.is_file():
                return cls(path)
        if not must_exist:
            return None

        # None: say which of two reasons it is.
        why = f"the {len(directories)} runs of this name hold no checkpoint" if directories else "there is no such run"
        raise CheckpointError(f"nothing to resume for {name!r} in {output_dir}: {why}; start without --resume")

    def truncate_stats(self, step: int) -> None:
        """Drop lines after `step`: a resumed run writes them again."""
        if not self.stats.is_file():
            return

        # The last line of a killed run may be half a line, which is dropped, too.
        kept = []
        for line in self.stats.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (ValueError, KeyError):
                continue
        write_text(self.stats, "".join(f"{line}\n" for line in kept))


class EncoderDir(RunDir):
    """DAMSMencoders/<dataset>/: one training of the encoders, in the place where the GANs look for them."""

    def __init__(self, path: str | Path):
        super().__init__(path)
        self.last = self.path / "last.pth"
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
