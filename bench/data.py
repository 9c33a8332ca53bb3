"""How many images a second the data path gives, on one core or with --workers: `python -m bench.data`.

Batches as training takes them, without and with the cache, against a plain path in PIL and numpy as the originals have
it: decode, scale the shorter side, crop, flip, to floats in [-1, 1], one sample at a time.
"""

import functools
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from bench import common
from datasets.cache import ImageCache
from datasets.loading import training_loader
from datasets.records import Records
from datasets.text_image import TextImageDataset
from miscc.command_line import positive
from miscc.errors import ConfigError, run_command
from miscc.randomness import stream
from miscc.vocabulary import Vocabulary

WIDTH, HEIGHT, QUALITY = 500, 375, 90  # the size of most of CUB's photographs
MAX_WORDS = 18
PREFETCHED = 2  # batches of each worker, torch's default


def write_photographs(folder: Path, count: int) -> Records:
    """JPEG files with about as much detail as a photograph, with ten captions each."""
    # Coarse colours enlarged, and noise, which JPEG compresses about as badly as a photograph.
    paths = []
    for number in range(count):
        random = stream(0, "bench photograph", number)
        coarse = Image.fromarray(random.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)).astype(int)
        pixels = (smooth + random.integers(-12, 13, smooth.shape)).clip(0, 255).astype(np.uint8)
        paths.append(folder / f"{number:04d}.jpg")
        Image.fromarray(pixels).save(paths[-1], quality=QUALITY)

    words = ["<end>", *(f"word{number}" for number in range(99))]
    captions = [[np.arange(1, 16, dtype=np.int64)] * 10 for _ in paths]
    class_ids = np.arange(count, dtype=np.int64)
    return Records("bench", "train", [path.stem for path in paths], paths, captions, class_ids, Vocabulary(words))


class PlainDataset(torch.utils.data.Dataset):
    """The originals' way in PIL and numpy, with Python's and numpy's global random numbers."""

    def __init__(self, records: Records, image_size: int):
        self.records, self.image_size = records, image_size

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple:
        # Decode and scale.
        image = Image.open(self.records.image_paths[index]).convert("RGB")
        short = int(self.image_size * 76 / 64)
        scale = short / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BILINEAR)

        # Crop and flip.
        left, top = (np.random.randint(side - self.image_size + 1) for side in image.size)
        image = image.crop((left, top, left + self.image_size, top + self.image_size))
        if np.random.rand() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)

        # To floats, with a random caption.
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)
        pixels = (pixels - 0.5) / 0.5
        tokens = self.records.captions[index][np.random.randint(10)]
        caption = np.zeros(MAX_WORDS, dtype=np.int64)
        caption[: len(tokens)] = tokens
        return pixels, caption, len(tokens), self.records.class_ids[index], self.records.keys[index]


def paths_of(options, folder: Path) -> tuple[dict[str, Callable[[], Iterator]], int]:
    """{way to read: function that starts it anew and returns its endless batches}, and the number of batches to time."""
    records = write_photographs(folder, options.images)
    cache = ImageCache.open(records, options.image_size, folder / "cache", progress=False)

    def plain() -> Iterator:
        dataset = PlainDataset(records, options.image_size)
        # Without end, as the pause between two epochs of so few images would be most of the time.
        endless = torch.utils.data.RandomSampler(dataset, num_samples=2**31)
        return iter(torch.utils.data.DataLoader(dataset, options.batch, sampler=endless, num_workers=options.workers))

    def ours(cache: ImageCache | None, as_bytes: bool) -> Iterator:
        dataset = TextImageDataset(records, [options.image_size], MAX_WORDS, cache=cache, as_bytes=as_bytes)
        return iter(training_loader(dataset, options.batch, seed=0, workers=options.workers))

    paths = {
        "plain": plain,
        "ours": lambda: ours(None, True),
        "ours, floats by the loader": lambda: ours(None, False),
        "ours with the cache": lambda: ours(cache, True),
        "ours with the cache, floats by the loader": lambda: ours(cache, False),
    }

    # Workers deliver in bursts: time many deliveries from each.
    return paths, max(len(records) // options.batch, 10 * options.workers)


def measure(options, folder: Path) -> dict:
    """{path: images a second, spread, single runs, ratio to the plain path}."""
    paths, steps = paths_of(options, folder)
    reading: dict[str, Iterator] = {}

    def start(name: str) -> None:
        # Without the workers of the path before, and past the batches that were read in advance.
        reading.clear()
        reading[name] = paths[name]()
        for _ in range(1 + PREFETCHED * options.workers):
            next(reading[name])

    def read(name: str) -> None:
        for _ in range(steps):
            next(reading[name])

    ways = {name: functools.partial(read, name) for name in paths}
    seconds = common.take_turns(ways, options.rounds, prepare=start)
    reading.clear()
    count = steps * options.batch
    return {
        name: {
            "images_per_second": count / common.summary(values)["median"],
            "fastest_images_per_second": count / min(values),
            "spread": common.summary(values)["spread"],
            "runs": values,
            "ratio": common.ratio(seconds["plain"], values),
        }
        for name, values in seconds.items()
    }


def _where(workers: int) -> str:
    return f"with {workers} workers" if workers else "on one core"


def main(arguments: list[str] | None = None) -> None:
    parser = common.parser(__doc__.splitlines()[0])
    parser.add_argument("--image-size", type=positive, default=256)
    parser.add_argument("--images", type=positive, default=192)
    parser.add_argument("--batch-size", "--batch", dest="batch", type=positive, default=24)
    parser.add_argument("--workers", type=int, default=0, help="reading processes beside the main one")
    options = parser.parse_args(arguments)

    if options.images < options.batch:
        raise ConfigError(
            f"--images: {options.images} are less than a batch of {options.batch}; more, or a lower --batch-size"
        )

    # One core a process, as training's workers have.
    torch.set_num_threads(1)
    settings = {name: value for name, value in vars(options).items() if name not in ("json", "name")}
    results = {"machine": common.machine(torch.device("cpu")) | {"cores": os.cpu_count()}, "settings": settings}
    with tempfile.TemporaryDirectory() as folder:
        results["paths"] = measure(options, Path(folder))

    # As a table.
    rows = [
        [name, f"{row['images_per_second']:.0f}", f"{row['fastest_images_per_second']:.0f}",
         f"×{row['ratio']['of_medians']:.2f}", f"×{row['ratio']['of_fastest']:.2f}"]
        for name, row in results["paths"].items()
    ]  # fmt: skip
    text = (
        f"# Data: images a second {_where(options.workers)}\n\n{common.machine_line(results['machine'])}. "
        f"JPEGs of {WIDTH}×{HEIGHT} scaled and cropped to {options.image_size} px, batches of {options.batch}; "
        f"{options.images} different images, {options.rounds} rounds, taking turns. Bytes become floats on the training's "
        f"device.\n\n"
    )
    header = ["path", "median", "fastest", "ratio of medians", "of fastest"]
    common.report(options, results, text + common.markdown_table(header, rows))


if __name__ == "__main__":
    run_command(main)
