"""What the data sets' `build` functions share: their options, and messages that list everything that is missing."""

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from datasets.layout import Entry
from miscc.errors import DataError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BuildOptions:
    """What the user may say about the originals; the options of prepare.py.

    name: the data set's
    allow_partial: prepare what is there, with a warning
    captions: the caption file; None: looked for
    images: the folder with the images; None: looked for
    image_column, caption_columns, class_column: names of columns or fields; empty: guessed from their names
    val_fraction, test_fraction: sizes of splits for which there is no list
    seed: of the drawn split
    """

    name: str
    allow_partial: bool = False
    captions: Path | None = None
    images: Path | None = None
    image_column: str | None = None
    caption_columns: tuple[str, ...] = ()
    class_column: str | None = None
    val_fraction: float = 0.0
    test_fraction: float = 0.1
    seed: int = 100

    def complain(self, root: Path, missing: Sequence[str]) -> None:
        """Raises DataError with the whole list; with --allow-partial, which the message offers, only a warning."""
        if not missing:
            return
        text = missing_pieces(f"{root}: the data set is not complete", missing)
        if not self.allow_partial:
            raise DataError(f"{text}\n--allow-partial prepares what is there")
        logger.warning("%s", text)

    def check_counts(self, root: Path, splits: dict[str, list[Entry]], expected: dict[str, int]) -> None:
        """Compare the sizes of the splits with the published ones; as `complain`."""
        self.complain(
            root,
            [
                f"{split}: {len(splits.get(split, [])):,} images instead of {count:,}"
                for split, count in expected.items()
                if len(splits.get(split, [])) != count
            ],
        )


def first_present(root: Path, names: Sequence[str]) -> Path | None:
    """The first of these files or folders below root that is there."""
    return next((path for path in (root / name for name in names) if path.exists()), None)


def read_text(path: Path) -> str:
    """A text file in UTF-8, with Windows' mark or without it. Raises DataError for another encoding."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from None


def missing_pieces(what: str, missing: Sequence[str]) -> str:
    """A message with one line for each missing thing."""
    return "\n".join([f"{what}; missing:", *(f"  - {line}" for line in missing)])


def named(items: Collection[str], limit: int = 3) -> str:
    """The first few of many by name: `a, b, c and 9 more`."""
    # Names of files need not be UTF-8: what cannot be printed is escaped.
    names = [item.encode("utf-8", "backslashreplace").decode() for item in list(items)[:limit]]
    rest = f" and {len(items) - limit:,} more" if len(items) > limit else ""
    return ", ".join(names) + rest
