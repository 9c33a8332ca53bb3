"""Sample folders: images for the captions of a split or of the user, written with names that say what they are.

Drawing itself is sampling/pipeline.py's; scores read the folders that are written here.
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
from tqdm import tqdm

from datasets.records import Records
from datasets.text_image import load_resized
from miscc.checkpoint import hash_tensors
from miscc.errors import ConfigError, DataError
from miscc.files import write_atomically, write_json, write_text
from miscc.pictures import caption_grid, encode_png, save_image, unit_to_uint8
from sampling.attention import caption_words, check_attends, write_strips
from sampling.pipeline import Generated, TextToImage
from sampling.requests import Request

logger = logging.getLogger(__name__)

CAPTIONS, ABOUT, PICTURE = "captions.jsonl", "samples.json", "samples.png"
MOST_PICTURED = 24  # captions in samples.png


def prepare_folder(folder: str | Path, overwrite: bool) -> Path:
    """The folder to write to. Raises DataError when samples are there and may not be overwritten."""
    folder = Path(folder)
    if (folder / CAPTIONS).exists() or (folder / ABOUT).exists():
        if not overwrite:
            raise DataError(f"{folder}: holds samples already; give --overwrite, or another folder with --out")
        for name in sampled_files(folder):  # only what an earlier sampling wrote
            stem = name.removesuffix(".png")
            maps = (
                path for kind in ("masks", "attention") for path in (folder / kind).glob(f"{glob.escape(stem)}_*px.png")
            )
            for path in (folder / name, *maps, folder / "real" / f"{re.sub(r'_c[0-9]+_s[0-9]+$', '', stem)}.png"):
                path.unlink(missing_ok=True)
    return folder


def sampled_files(folder: Path) -> Iterator[str]:
    """The images that a folder's captions.jsonl lists."""
    if not (folder / CAPTIONS).is_file():
        return
    for line in (folder / CAPTIONS).read_text(encoding="utf-8").splitlines():
        name = json.loads(line).get("file", "")
        if name and not Path(name).is_absolute() and ".." not in Path(name).parts:
            yield name


def file_stem(request: Request) -> str:
    """Where a request's image goes, without suffix: image key, caption number and sample number."""
    return f"{key_stem(request.key)}_c{request.caption_number}_s{request.sample}"


def key_stem(key: str) -> str:
    """An image key as a path inside a folder; where that changes it, with a checksum, so that no two keys meet."""
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

    with_masks: masks of every stage under masks/; with_attention: where the words look, stage by stage, under attention/;
    real: the split whose real images are written under real/, cropped and scaled as in training. Returns the picture's
    path. Raises DataError for captions without a known word, and when samples are there and overwrite is False;
    ConfigError for attention or masks of a generator that has none.
    """
    if with_attention:
        check_attends(pipeline)
    if with_masks and not pipeline.predicts_masks:
        raise ConfigError("--masks: this generator predicts no masks; SSA-GAN's does")
    pipeline.check([request.caption for request in requests])  # before anything that is there is touched
    folder = prepare_folder(folder, overwrite)
    origin = {name: value for name, value in pipeline.origin.items() if name != "config"}
    settings = {"seed": seed, "truncation": truncation, "num_images": len(requests), "image_size": pipeline.image_size}
    settings |= origin | {"encoder_hash": hash_tensors(pipeline.text_encoder.state_dict())} | (about or {})
    lines = [_describe(request, f"{file_stem(request)}.png", seed) for request in requests]
    write_text(folder / CAPTIONS, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    write_json(folder / ABOUT, settings | {"finished": False})
    batches = [requests[start : start + batch_size] for start in range(0, len(requests), batch_size)]
    first = None
    with _writing(4 * batch_size) as write, tqdm(total=len(requests), desc="sampling", unit="image") as bar:
        for batch in batches:
            captions, indices = [r.caption for r in batch], [r.index for r in batch]
            wanted = {"with_attention": with_attention, "with_masks": with_masks or first is None}  # for the picture
            drawn = pipeline.generate(captions, seed, truncation, batch_size, indices, **wanted)
            first = drawn if first is None else first
            stems = [file_stem(request) for request in batch]
            for image, stem in zip(drawn.images, stems, strict=True):
                write(image, folder / f"{stem}.png")
            if with_masks:
                _write_masks(drawn, [folder / "masks" / stem for stem in stems], write)
            if with_attention:
                places = [folder / "attention" / stem for stem in stems]
                write_strips(drawn, caption_words(pipeline, captions), places, write)
            bar.update(len(batch))
    if real is not None:
        _write_real(real, requests, folder / "real", pipeline.image_size)
    write_json(folder / ABOUT, settings | {"finished": True})
    pictured = [request.caption for request in batches[0][:MOST_PICTURED]]
    save_image(generated_picture(pictured, first), folder / PICTURE)
    return folder / PICTURE


def generated_picture(captions: Sequence[str], drawn: Generated) -> np.ndarray:
    """Captions with their images and, where there are any, the masks of the last stage: (.., .., 3) uint8."""
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


def num_writers() -> int:
    """Threads that encode and write images while the next are drawn: PIL compresses without Python's lock, so that threads
    use as many cores as processes would, and no pixels are copied between processes."""
    return min(16, max(2, os.cpu_count() or 1))


def _write_png(pixels: np.ndarray, path: Path) -> None:
    encoded = encode_png(pixels)  # in memory first: PIL would write the file in many small pieces
    write_atomically(path, lambda stream: stream.write(encoded), flush=False)


@contextmanager
def _writing(most: int) -> Iterator[Callable[[np.ndarray, Path], None]]:
    """`with _writing(100) as write:` write(pixels, path) leaves encoding and writing to threads, but waits for the oldest
    where more than `most` are under way; at the end all are written."""
    waiting: deque[Future] = deque()
    with ThreadPoolExecutor(num_writers()) as threads:

        def write(pixels: np.ndarray, path: Path) -> None:
            waiting.append(threads.submit(_write_png, pixels, path))
            if len(waiting) > most:
                waiting.popleft().result()

        yield write
        for future in waiting:
            future.result()


def _write_masks(drawn: Generated, stems: Sequence[Path], write: Callable[[np.ndarray, Path], None]) -> None:
    """The masks of each image and stage as `<stem>_<h>px.png`."""
    for stage in drawn.masks:
        for mask, stem in zip(unit_to_uint8(stage), stems, strict=True):
            write(mask, stem.with_name(f"{stem.name}_{mask.shape[0]}px.png"))


def _write_real(records: Records, requests: Sequence[Request], folder: Path, image_size: int) -> None:
    """The real images of the sampled keys, the middle of the crop that training takes from."""
    places = {key: index for index, key in enumerate(records.keys)}
    keys = list(dict.fromkeys(request.key for request in requests if request.key in places))
    for key in tqdm(keys, desc="real images", unit="image"):
        box = None if records.boxes is None else records.boxes[places[key]]
        pixels = load_resized(records.image_paths[places[key]], box, image_size)
        top, left = (pixels.shape[0] - image_size) // 2, (pixels.shape[1] - image_size) // 2
        _write_png(pixels[top : top + image_size, left : left + image_size], folder / f"{key_stem(key)}.png")
