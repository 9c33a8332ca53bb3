"""COCO 2014 with its captions: where the originals lie. Each image is a class of its own, and there are no boxes."""

import logging
import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from datasets.layout import Entry
from datasets.sources.building import BuildOptions, first_present, missing_pieces, named
from miscc.errors import DataError
from miscc.files import parse_json

logger = logging.getLogger(__name__)

CAPTIONS_PER_IMAGE = 5
COUNTS = {"train": 82_783, "test": 40_504}
_PARTS = {"train": "train2014", "test": "val2014"}  # the test split of text-to-image systems is COCO's val
_ANNOTATION_FOLDERS = (".", "annotations", "annotations_trainval2014/annotations")


def locate(root: Path, keys: Sequence[str]) -> tuple[list[Path], None]:
    """The image of each key (`COCO_train2014_000000000009`). Raises DataError when no image folder is there."""
    # The folders that these keys need.
    folders = {part: _image_folder(root, part) for part in _PARTS.values() if any(f"_{part}_" in key for key in keys)}
    folders[""] = first_present(root, ["images"])  # keys of another form
    missing = [f"{root / part}: the images of COCO's {part}" for part, path in folders.items() if part and path is None]
    if missing:
        raise DataError(missing_pieces(f"{root}: the images of the data set are not there", missing))

    parts = [key.split("_")[1] if key.startswith("COCO_") else "" for key in keys]
    return [(folders.get(part) or root / "images") / f"{key}.jpg" for part, key in zip(parts, keys, strict=True)], None


def build(root: Path, options: BuildOptions) -> dict[str, list[Entry]]:
    """The common layout from captions_{train,val}2014.json and the images in train2014/ and val2014/, or images/.

    The first five captions of each image, as the originals take them. Raises DataError listing everything missing.
    """
    # Captions and images of each split: all that is missing is listed at once.
    missing: list[str] = []
    found: dict[str, tuple[Path, Path]] = {}
    for split, part in _PARTS.items():
        name = f"captions_{part}.json"
        annotations = first_present(root, [f"{folder}/{name}" for folder in _ANNOTATION_FOLDERS])
        images = _image_folder(root, part)
        if annotations is None:
            missing.append(f"{root / 'annotations' / name}: the captions (annotations_trainval2014.zip)")
        if images is None:
            missing.append(f"{root / part}: the images ({part}.zip)")
        if annotations is not None and images is not None:
            found[split] = annotations, images
    if missing:
        raise DataError(missing_pieces(f"{root}: the data set is not complete", missing))

    # Entries for the images that are there; with --allow-partial the others are left out.
    splits: dict[str, list[Entry]] = {}
    absent: list[str] = []
    for split, (annotations, images) in found.items():
        there = set(os.listdir(images))
        captions = read_coco_captions(annotations)
        lost = [name for name in captions if name not in there]
        if lost:
            absent.append(f"{images}: {len(lost):,} images that {annotations.name} lists ({named(lost)})")
        folder = images.relative_to(root).as_posix()
        kept = [(name, texts) for name, texts in captions.items() if name in there]
        splits[split] = [
            Entry(os.path.splitext(name)[0], f"{folder}/{name}", texts[:CAPTIONS_PER_IMAGE], class_id)
            for class_id, (name, texts) in enumerate(kept)
        ]
    options.complain(root, absent)
    options.check_counts(root, splits, COUNTS)
    return splits


def _image_folder(root: Path, part: str) -> Path | None:
    return first_present(root, [part, f"images/{part}", "images"])


def read_coco_captions(path: Path) -> dict[str, list[str]]:
    """COCO's caption JSON -> file name to captions, in the order of its image list; images without one are left out.

    Raises DataError when the file is of another form.
    """
    try:
        content = parse_json(path.read_text(encoding="utf-8-sig"))
        captions = defaultdict(list)
        for annotation in content["annotations"]:
            captions[annotation["image_id"]].append(" ".join(annotation["caption"].split()))
        named_images = {image["file_name"]: captions[image["id"]] for image in content["images"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise DataError(f"{path}: is not COCO's caption JSON ({reason}); copy or download it again") from None
    return {name: texts for name, texts in named_images.items() if texts}
