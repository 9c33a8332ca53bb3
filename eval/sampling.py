"""Sample folders: images for the captions of a split or of the user, written with names that say what they are.

Drawing itself is eval/pipeline.py's; scores read the folders that are written here.
"""

import glob
import json
import logging
import os
import re
import zlib
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from datasets.layout import SPLITS
from datasets.text_image import Records, load_resized
from eval.attention import caption_words, check_attends, write_strips
from eval.networks import hash_tensors
from eval.pipeline import Generated, TextToImage
from miscc.checkpoint import write_atomically, write_json, write_text
from miscc.errors import ConfigError, DataError
from miscc.images import caption_grid, encode_png, grid, save_image, to_uint8, unit_to_uint8
from miscc.randomness import stream
from models.types import TextFeatures

logger = logging.getLogger(__name__)

EXAMPLES = "example_filenames.txt"
CAPTIONS, ABOUT, PICTURE = "captions.jsonl", "samples.json", "samples.png"
MOST_PICTURED = 24  # captions in samples.png


class Request(NamedTuple):
    """One image to draw: the caption and where it comes from. index numbers the requests; noise depends on it."""

    index: int
    caption: str
    key: str
    caption_number: int
    sample: int


def split_requests(
    records: Records,
    captions_per_image: int = 1,
    per_caption: int = 1,
    num_images: int | None = None,
    seed: int = 0,
) -> list[Request]:
    """What to draw for a split: `per_caption` images for each of the first `captions_per_image` captions of every image.

    captions_per_image 0: all of them. With num_images, so many captions instead, drawn from all captions of the split as a
    function of the seed; when there are fewer, they come again with other noise.
    """
    if num_images is None:
        numbers = [range(len(captions))[: captions_per_image or None] for captions in records.captions]
        pairs = [(index, n) for index in range(len(records)) for n in numbers[index] for _ in range(per_caption)]
    else:
        everything = [(i, c) for i, captions in enumerate(records.captions) for c in range(len(captions))]
        rounds = -(-num_images // len(everything))
        orders = [stream(seed, "sampled captions", number).permutation(len(everything)) for number in range(rounds)]
        pairs = [everything[place] for place in np.concatenate(orders)[:num_images]]
    counts: dict[tuple[int, int], int] = {}
    requests = []
    for number, (index, caption) in enumerate(pairs):
        sample = counts[index, caption] = counts.get((index, caption), -1) + 1
        requests.append(Request(number, records.text(index, caption), records.keys[index], caption, sample))
    return requests


def caption_requests(captions: Sequence[str], per_caption: int = 1) -> list[Request]:
    """What to draw for a user's own captions."""
    pairs = [(number, sample) for number in range(len(captions)) for sample in range(per_caption)]
    return [
        Request(index, captions[number], f"caption{number:03d}", 0, sample)
        for index, (number, sample) in enumerate(pairs)
    ]


def example_requests(data_dir: str | Path) -> list[Request]:
    """What to draw for AttnGAN's example_filenames.txt in a data folder: every line names a file of captions there, with
    or without `.txt`, for instance example_captions; each of its lines is drawn once. Raises DataError."""
    root = Path(data_dir)
    requests = []
    names = _read_lines(root / EXAMPLES)
    if not names:
        raise DataError(f"{root / EXAMPLES}: names no file of captions; write one a line, such as example_captions")
    for name in names:
        key = name.removesuffix(".txt")
        try:
            captions = read_captions(root / f"{key}.txt")
        except DataError as error:
            raise DataError(f"{error}, which {root / EXAMPLES} names") from None
        for number, caption in enumerate(captions):
            requests.append(Request(len(requests), caption, key, number, 0))
    return requests


def each_split_requests(
    read: Callable[[str], Records], present: Collection[str], number: int, seed: int
) -> Iterator[tuple[Records, list[Request]]]:
    """For each split: `number` of its captions, drawn without replacement as a function of the seed.

    read: a split's records by its name; present: the names that the data set has. A split that it lacks is named in a
    warning, and so is one with fewer captions, which are all drawn then.
    """
    for split in SPLITS:
        if split not in present:
            logger.warning("the data set has no split %r: skipped", split)
            continue
        records = read(split)
        total = sum(map(len, records.captions))
        if total < number:
            logger.warning("the split %r has only %d captions: all of them are drawn, not %d", split, total, number)
        yield records, split_requests(records, num_images=min(number, total), seed=seed)


def read_captions(path: str | Path) -> list[str]:
    """A text file with one caption a line; empty lines are passed over. Raises DataError."""
    captions = _read_lines(path)
    if not captions:
        raise DataError(f"{path}: holds no caption; write one a line")
    return captions


def _read_lines(path: str | Path) -> list[str]:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file of captions") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    return [line.strip() for line in lines if line.strip()]


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


@torch.inference_mode()
def interpolate(
    pipeline: TextToImage, first: str, second: str, steps: int = 8, seed: int = 0, truncation: float | None = None
) -> np.ndarray:
    """A strip (H, steps·W, 3) uint8 from one caption to another under the same noise: text features mixed linearly.

    With the same caption twice: from one noise to another, along the arc between them.
    """
    text = pipeline.encode([first, second])
    weights = torch.linspace(0, 1, steps, device=pipeline.device)
    noise = pipeline.noise(seed, [0, 1], truncation).to(pipeline.device)
    if first == second:
        mixed_noise, text = _along_arc(noise[0], noise[1], weights), text.select([0] * steps)
    else:
        mixed_noise, text = noise[:1].expand(steps, -1), _mix(text, weights)
    images = to_uint8(pipeline.synthesize(text, mixed_noise).images[-1])
    return grid([list(images)])


def _mix(text: TextFeatures, weights: torch.Tensor) -> TextFeatures:
    sentence = torch.lerp(text.sentence[:1], text.sentence[1:], weights[:, None])
    words = torch.lerp(text.words[:1], text.words[1:], weights[:, None, None])
    return TextFeatures(sentence, words, (text.mask[0] & text.mask[1]).expand(len(weights), -1))


def _along_arc(a: torch.Tensor, b: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Spherical interpolation: a mean of two normal noises would be too short to look like one."""
    if torch.allclose(a, b):
        return a.expand(len(weights), -1)
    angle = torch.acos((a @ b / (a.norm() * b.norm())).clamp(-1, 1))
    parts = torch.sin(torch.stack([(1 - weights) * angle, weights * angle], dim=1)) / torch.sin(angle)
    return parts @ torch.stack([a, b])


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
