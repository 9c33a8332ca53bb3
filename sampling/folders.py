"""Folders of samples: draws requests into PNG files whose names say image key, caption and sample number.

Images are drawn by pipeline.py; the scores read the folders that are written here.
"""

import glob
import json
import logging
import os
import re
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from datasets.records import Records
from datasets.text_image import load_resized
from miscc.checkpoint import hash_tensors
from miscc.errors import ConfigError, DataError
from miscc.files import parse_json, stays_inside, write_atomically, write_json, write_text
from miscc.pictures import caption_grid, encode_png, save_image, unit_to_uint8
from miscc.progress import ProgressBar
from sampling.attention import caption_words, check_attends, write_strips
from sampling.pipeline import Generated, TextToImage
from sampling.requests import Request

logger = logging.getLogger(__name__)

CAPTIONS, ABOUT, PICTURE = "captions.jsonl", "samples.json", "samples.png"
MOST_PICTURED = 24  # captions in samples.png


def prepare_folder(folder: str | Path, overwrite: bool, requests: Sequence[Request] = ()) -> Path:
    """The folder to write to, without earlier samples.

    requests: what will be drawn there.

    Raises DataError where overwrite is False and the folder holds samples, or another file of a picture's name.
    """
    folder = Path(folder)
    if not (folder / CAPTIONS).exists() and not (folder / ABOUT).exists():
        if not overwrite and requests:
            _check_free(folder, requests)
        return folder

    # Earlier samples, also of a sampling that was stopped.
    names = sampled_files(folder)
    if not overwrite:
        raise DataError(f"{folder}: holds samples already; give --overwrite, or another folder with --out")

    # Delete what the earlier sampling wrote, and nothing else.
    for name in names:
        stem = name.removesuffix(".png")
        pattern = f"{glob.escape(stem)}_*px.png"
        maps = [path for kind in ("masks", "attention") for path in (folder / kind).glob(pattern)]
        real = folder / "real" / f"{re.sub(r'_c[0-9]+_s[0-9]+$', '', stem)}.png"
        for path in (folder / name, *maps, real):
            path.unlink(missing_ok=True)
    return folder


def _check_free(folder: Path, requests: Sequence[Request]) -> None:
    """Raises DataError where the folder holds a file with the name of an image to draw, or of their picture."""
    for name in (PICTURE, *(f"{file_stem(request)}.png" for request in requests)):
        if (folder / name).exists():
            raise DataError(f"{folder / name}: exists already; give --overwrite, or another folder with --out")


def sampled_files(folder: Path) -> list[str]:
    """The images that a folder's captions.jsonl lists. Raises DataError for a file that no sampling of ours wrote."""
    if not (folder / CAPTIONS).is_file():
        return []
    names: list[str] = []
    try:
        lines = [parse_json(line) for line in (folder / CAPTIONS).read_text(encoding="utf-8").split("\n") if line]
        names = [line["file"] for line in lines]
        ours = all(re.search(r"_c[0-9]+_s[0-9]+\.png$", name) and stays_inside(name) for name in names)
    except (ValueError, TypeError, KeyError):
        ours = False
    if not ours:
        raise DataError(f"{folder / CAPTIONS}: no sampling wrote this file; give another folder with --out")
    return names


def file_stem(request: Request) -> str:
    """The file of a request's image, without suffix: image key, caption number and sample number."""
    return f"{key_stem(request.key)}_c{request.caption_number}_s{request.sample}"


def key_stem(key: str) -> str:
    """An image key as a path inside a folder; where characters are replaced, with a checksum that keeps it unique."""
    parts = [re.sub(r"[^\w.\-]+", "_", part) for part in key.split("/") if part not in ("", ".", "..")]
    stem = "/".join(parts) or "image"
    return stem if stem == key else f"{stem}-{zlib.crc32(key.encode()):08x}"


def sample(
    pipeline: TextToImage,
    requests: Sequence[Request],
    folder: str | Path,
    *,
    seed: int = 0,
    truncation: float | None = None,
    batch_size: int = 32,
    with_masks: bool = False,
    with_attention: bool = False,
    real: Records | None = None,
    overwrite: bool = False,
    about: dict[str, Any] | None = None,
) -> Path:
    """Draw all requests into a folder: PNG files, captions.jsonl, samples.json, and one picture of the first.

    seed, truncation: of the noise
    batch_size: images drawn at once
    with_masks: write the masks of every stage under masks/
    with_attention: write where the words attend, stage by stage, under attention/
    real: the split whose real images are written under real/, cropped and scaled as in training
    overwrite: replace earlier samples
    about: more for samples.json

    Returns the picture's path. Raises DataError for captions without a known word, for no request, and when samples are
    there and overwrite is False; ConfigError for attention or masks of a generator that has none.
    """
    # Every check comes before anything in the folder is changed.
    _check(pipeline, requests, with_masks, with_attention)
    folder = prepare_folder(folder, overwrite, requests)

    # What the folder holds; `finished` tells a stopped sampling from a whole one.
    settings = _settings(pipeline, requests, seed, truncation) | (about or {})
    _write_captions(requests, seed, folder / CAPTIONS)
    write_json(folder / ABOUT, settings | {"finished": False})

    # The images; the first batch also with masks, for the picture.
    pictured = None
    with _writing(4 * batch_size) as write, ProgressBar(what="sampling", total=len(requests), unit="images") as bar:
        for start in range(0, len(requests), batch_size):
            batch = requests[start : start + batch_size]
            captions, indices = [r.caption for r in batch], [r.index for r in batch]
            drawn = pipeline.generate(
                captions, seed, truncation, batch_size, indices, with_attention, with_masks or pictured is None
            )
            if pictured is None:
                pictured = generated_picture(captions[:MOST_PICTURED], drawn)
            _write_images(drawn, batch, folder, write, with_masks)
            if with_attention:
                stems = [folder / "attention" / file_stem(request) for request in batch]
                write_strips(drawn, caption_words(pipeline, captions), stems, write)
            bar.update(len(batch))

    # Real images, and the picture of the first.
    if real is not None:
        _write_real(real, requests, folder / "real", pipeline.image_size)
    write_json(folder / ABOUT, settings | {"finished": True})
    if pictured is not None:
        save_image(pictured, folder / PICTURE)
    return folder / PICTURE


def _check(pipeline: TextToImage, requests: Sequence[Request], with_masks: bool, with_attention: bool) -> None:
    """Raise DataError or ConfigError where these requests cannot be drawn."""
    if not requests:
        raise DataError("there is no caption to draw")
    if with_attention:
        check_attends(pipeline)
    if with_masks and not pipeline.predicts_masks:
        raise ConfigError("--masks: this generator predicts no masks; SSA-GAN's does")
    pipeline.check([request.caption for request in requests])


def _settings(
    pipeline: TextToImage, requests: Sequence[Request], seed: int, truncation: float | None
) -> dict[str, Any]:
    """What samples.json says: how the images were drawn, and by which weights."""
    return {
        "seed": seed,
        "truncation": truncation,
        "num_images": len(requests),
        "image_size": pipeline.image_size,
        **{name: value for name, value in pipeline.origin.items() if name != "config"},
        "encoder_hash": hash_tensors(pipeline.text_encoder.state_dict()),
    }


def generated_picture(captions: Sequence[str], drawn: Generated) -> np.ndarray:
    """Captions beside their images and the masks of the last stage, if any: (.., .., 3) uint8."""
    cells = []
    for row in range(len(captions)):
        mask = [unit_to_uint8(drawn.masks[-1][row])] if drawn.masks else []
        cells.append([drawn.images[row], *mask])
    return caption_grid(captions, cells, headings=("image", "mask")[: len(cells[0])])


def _describe(request: Request, name: str, seed: int) -> dict[str, Any]:
    return {
        "file": name, "key": request.key, "caption_number": request.caption_number, "sample": request.sample,
        "caption": request.caption, "seed": seed, "index": request.index,
    }  # fmt: skip


def _write_captions(requests: Sequence[Request], seed: int, path: Path) -> None:
    lines = [_describe(request, f"{file_stem(request)}.png", seed) for request in requests]
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def num_writers() -> int:
    """Number of threads that encode and write images while the next are drawn."""
    # Threads, not processes: PIL compresses without Python's lock, and no pixels are copied.
    return min(16, max(2, os.cpu_count() or 1))


def _write_png(pixels: np.ndarray, path: Path) -> None:
    encoded = encode_png(pixels)  # in memory first: PIL would write the file in many small pieces
    write_atomically(path, lambda stream: stream.write(encoded), flush=False)


@contextmanager
def _writing(most: int) -> Iterator[Callable[[np.ndarray, Path], None]]:
    """`with _writing(100) as write:` write(pixels, path) encodes and writes in other threads; at the end all are written.

    most: pictures that may wait; beyond it a call of `write` waits for the oldest
    """
    waiting: deque[Future] = deque()
    with ThreadPoolExecutor(num_writers()) as threads:

        def write(pixels: np.ndarray, path: Path) -> None:
            waiting.append(threads.submit(_write_png, pixels, path))
            if len(waiting) > most:
                waiting.popleft().result()

        yield write

        # Errors of the last ones are raised here.
        for future in waiting:
            future.result()


def _write_images(
    drawn: Generated,
    batch: Sequence[Request],
    folder: Path,
    write: Callable[[np.ndarray, Path], None],
    with_masks: bool,
) -> None:
    """The images of a batch and, with_masks, the masks of every stage as `masks/<stem>_<h>px.png`."""
    stems = [file_stem(request) for request in batch]
    for image, stem in zip(drawn.images, stems, strict=True):
        write(image, folder / f"{stem}.png")

    # Masks of different stages differ in size, which the name says.
    for stage in drawn.masks if with_masks else []:
        for mask, stem in zip(unit_to_uint8(stage), stems, strict=True):
            write(mask, folder / "masks" / f"{stem}_{mask.shape[0]}px.png")


def _write_real(records: Records, requests: Sequence[Request], folder: Path, image_size: int) -> None:
    """The real images of the requests' keys: the middle of what training takes its crops from."""
    index_of = {key: index for index, key in enumerate(records.keys)}
    keys = list(dict.fromkeys(request.key for request in requests if request.key in index_of))
    for key in ProgressBar(keys, "real images", unit="images"):
        index = index_of[key]
        box = None if records.boxes is None else records.boxes[index]

        # Boxes as in training, then the middle crop instead of a random one.
        pixels = load_resized(records.image_paths[index], box, image_size)
        top, left = (pixels.shape[0] - image_size) // 2, (pixels.shape[1] - image_size) // 2
        _write_png(pixels[top : top + image_size, left : left + image_size], folder / f"{key_stem(key)}.png")
