"""Small data sets and legacy pickles, made on the spot, for the tests of the data room."""

from pathlib import Path

import numpy as np
from PIL import Image

from datasets.records import Records
from miscc.vocabulary import Vocabulary

REAL_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"  # not part of the project; tests skip without it
CUB_CLASSES = {"001.Finch": 3, "002.Gull": 2, "003.Jay": 2}  # of `write_cub`: class and number of images


def python2_pickle(value) -> bytes:
    """What Python 2's cPickle writes with protocol 2: its str is a byte string there (BINSTRING), in latin-1 here."""
    return b"\x80\x02" + _python2(value) + b"."


def _python2(value) -> bytes:
    if isinstance(value, str):
        raw = value.encode("latin-1")
        return b"U" + bytes([len(raw)]) + raw if len(raw) < 256 else b"T" + len(raw).to_bytes(4, "little") + raw
    if isinstance(value, int):
        return b"J" + value.to_bytes(4, "little", signed=True)
    if isinstance(value, list):
        return b"](" + b"".join(_python2(item) for item in value) + b"e"
    if isinstance(value, dict):
        return b"}(" + b"".join(_python2(key) + _python2(item) for key, item in value.items()) + b"u"
    raise TypeError(type(value))


def position_image(width: int, height: int) -> Image.Image:
    """Red is the column, green the row, blue 7: a crop of it tells where it was taken."""
    pixels = np.full((height, width, 3), 7, dtype=np.uint8)
    pixels[..., 0] = np.arange(width)[None, :]
    pixels[..., 1] = np.arange(height)[:, None]
    return Image.fromarray(pixels)


def write_image(path: Path, width: int = 40, height: int = 30, seed: int = 0) -> Path:
    """A picture of noise; the format is the suffix's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def write_broken_image(path: Path) -> Path:
    """A JPEG cut off in the middle."""
    write_image(path, 64, 64)
    path.write_bytes(path.read_bytes()[:900])
    return path


def make_records(root: Path, paths: list[Path], captions_each: int = 3, boxes: np.ndarray | None = None) -> Records:
    """Records over these images; caption j of image i is `word{i} caption{j}` and then fifteen times `and`."""
    texts = [
        [f"word{image} caption{number}" + " and" * 15 for number in range(captions_each)] for image in range(len(paths))
    ]
    vocabulary = Vocabulary.build(caption for group in texts for caption in group)
    return Records(
        name="samples",
        split="train",
        keys=[path.relative_to(root).with_suffix("").as_posix() for path in paths],
        image_paths=list(paths),
        captions=[[np.array(vocabulary.encode(caption)[0]) for caption in group] for group in texts],
        class_ids=np.arange(len(paths)) // 2,
        vocabulary=vocabulary,
        texts=texts,
        boxes=boxes,
    )


def noise_records(root: Path, count: int, **options) -> Records:
    """`count` noise images of differing sizes."""
    paths = [
        write_image(root / "images" / f"{number:02d}.png", 40 + 3 * number, 50 - number, number)
        for number in range(count)
    ]
    return make_records(root, paths, **options)


def write_class_lists(root, train=("001.Finch", "003.Jay"), test=("002.Gull",)):
    (root / "trainvalclasses.txt").write_text("".join(f"{name}\n" for name in train))
    (root / "testclasses.txt").write_text("".join(f"{name}\n" for name in test))


def write_cub(root: Path, classes: dict[str, int], captions: int = 10) -> list[str]:
    """A data set in CUB's own layout, without lists of classes: class folder -> number of images. Returns the keys."""
    keys = [f"{name}/{name[4:]}_{number:04d}" for name, count in classes.items() for number in range(count)]
    base = root / "CUB_200_2011"
    base.mkdir(parents=True)
    for number, key in enumerate(keys):
        write_image(base / "images" / f"{key}.jpg", 40, 30, number)
        text = root / "text" / f"{key}.txt"
        text.parent.mkdir(parents=True, exist_ok=True)
        text.write_text("".join(f"bird {number} says {caption}\n" for caption in range(captions)))
    (base / "images.txt").write_text("".join(f"{number} {key}.jpg\n" for number, key in enumerate(keys, 1)))
    (base / "bounding_boxes.txt").write_text(
        "".join(f"{number} {number}.0 5.0 20.0 10.0\n" for number in range(1, len(keys) + 1))
    )
    return keys
