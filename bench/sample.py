"""Images a second into a folder of PNGs against the generator's own: `python -m bench.sample --image-size 64 --nf 16`.

Encoding and writing go on in threads while the next images are drawn; on a CPU these threads share the generator's cores.
Fresh weights. The cost of a new file depends on the disk: --folder names another, such as /dev/shm.
"""

import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from bench import common
from miscc.command_line import positive
from miscc.errors import ConfigError, run_command
from miscc.files import write_atomically
from miscc.pictures import encode_png
from miscc.vocabulary import Vocabulary
from models.damsm import TextEncoder
from models.layers import num_upsamples
from models.ssa_gan import SSAGenerator
from sampling.folders import file_stem, num_writers, sample
from sampling.pipeline import TextToImage
from sampling.requests import caption_requests

WORDS = ["<end>", *"this small red bird has black wings and a short yellow beak with white belly".split()]
CAPTION = "this small red bird has black wings and a short yellow beak"


def fresh_pipeline(options, device: torch.device) -> TextToImage:
    """A randomly initialised generator and text encoder, which take the same time as trained ones."""
    torch.manual_seed(0)
    generator = SSAGenerator(nf=options.nf, image_size=options.image_size).to(device).eval()

    # Make its smooth colours as noisy as photographs, or PNG would encode them too easily.
    with torch.no_grad():
        for name, parameter in generator.named_parameters():
            if name.endswith("gate"):
                parameter.fill_(1)
        generator.get_parameter("to_rgb.2.weight").mul_(10)

    vocabulary = Vocabulary(list(dict.fromkeys(WORDS)))
    return TextToImage(generator, TextEncoder(len(vocabulary)).to(device).eval(), vocabulary)


def measure(pipeline: TextToImage, options, device: torch.device) -> dict:
    """{way: images a second, share of the generator's rate, single runs}: drawn alone, written by `sample`, and plainly."""
    requests = caption_requests([CAPTION], options.images)

    def draw() -> list:
        drawn = []
        for start in range(0, len(requests), options.batch):
            part = requests[start : start + options.batch]
            captions, indices = [r.caption for r in part], [r.index for r in part]
            drawn.append(pipeline.generate(captions, 0, None, options.batch, indices, with_masks=False))
        return drawn

    # As users sample, and plainly: draw all, then write one after the other.
    def write(folder: str) -> None:
        sample(pipeline, requests, folder, batch_size=options.batch)

    def one_after_the_other(folder: str) -> None:
        images = [image for drawn in draw() for image in drawn.images]
        for request, image in zip(requests, images, strict=True):
            Image.fromarray(image).save(Path(folder) / f"{file_stem(request)}.png")

    def in_new_folder(way: Callable[[str], None]) -> Callable[[], None]:
        def run() -> None:
            with tempfile.TemporaryDirectory(dir=options.folder) as folder:
                way(folder)

        return run

    # All of them in turn.
    ways = {"generator alone": draw} | {
        name: in_new_folder(way)
        for name, way in {"into a folder": write, "plain: draw, then write": one_after_the_other}.items()
    }
    seconds = common.take_turns(ways, options.rounds, 1, device)
    return {
        name: {
            "images_per_second": options.images / common.summary(values)["median"],
            "of_the_generators": common.ratio(seconds["generator alone"], values)["of_medians"],
            "runs": values,
        }
        for name, values in seconds.items()
    }


def writing_costs(images: np.ndarray, options) -> dict[str, float]:
    """Seconds for encoding one of the images (N, H, W, 3), and for writing it to the folder: medians of the rounds."""
    encoded = [encode_png(pixels) for pixels in images]
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        # New files each time: replacing one costs more.
        numbers = itertools.count()

        def write() -> None:
            for content in encoded:
                path = Path(folder) / f"{next(numbers)}.png"
                write_atomically(path, lambda stream, content=content: stream.write(content), flush=False)

        ways = {"encoding": lambda: [encode_png(pixels) for pixels in images], "writing": write}
        seconds = common.take_turns(ways, options.rounds)
    return {name: common.summary(values)["median"] / len(images) for name, values in seconds.items()}


def ceiling(ways: dict, costs: dict[str, float], device: torch.device) -> str:
    """A sentence on what writing costs, and on a CPU the largest share of the generator's rate that it leaves."""
    writing, threads = costs["encoding"] + costs["writing"], torch.get_num_threads()

    # Both costs for a single image.
    text = (
        f"\nEncoding an image takes {costs['encoding'] * 1e3:.2f} ms of one core, writing its file there "
        f"{costs['writing'] * 1e3:.2f} ms."
    )
    if device.type != "cpu":
        return text + "\n"

    # Generator and writers share the cores.
    alone = 1 / ways["generator alone"]["images_per_second"]
    share = alone / (alone + writing / threads)
    return text + f" The generator runs on the same {threads}: at best {share:.0%} of its rate is left.\n"


def check(options) -> None:
    """Raises ConfigError for a size that no generator draws, and for a folder that cannot be written to."""
    try:
        # Before any network is built.
        num_upsamples(options.image_size)
    except ValueError as error:
        raise ConfigError(f"--image-size: {error}") from None
    try:
        tempfile.TemporaryDirectory(dir=options.folder).cleanup()
    except OSError as error:
        raise ConfigError(f"--folder: nothing can be written to {options.folder} ({error.strerror})") from None


def main(arguments: list[str] | None = None) -> None:
    parser = common.parser(__doc__.splitlines()[0])
    parser.add_argument("--image-size", type=positive, default=64)
    parser.add_argument("--nf", type=positive, default=16)
    parser.add_argument(
        "--images", type=positive, default=512, help="many, as a picture of the first 24 is made each time"
    )
    parser.add_argument("--batch-size", "--batch", dest="batch", type=positive, default=32)
    parser.add_argument("--folder", metavar="DIR", help="where to write, instead of the system's temporary folder")
    options = parser.parse_args(arguments)
    check(options)

    # Measure.
    device = common.start(options)
    settings = {name: value for name, value in vars(options).items() if name not in ("json", "name")}
    results = {"machine": common.machine(device), "settings": settings}
    pipeline = fresh_pipeline(options, device)
    images = pipeline.generate([CAPTION] * options.batch).images
    results |= {"ways": measure(pipeline, options, device), "seconds": writing_costs(images, options)}

    # As a table.
    rows = [
        [name, f"{row['images_per_second']:.1f}", f"{row['of_the_generators']:.0%}"]
        for name, row in results["ways"].items()
    ]
    text = (
        f"# Sampling into a folder\n\n{common.machine_line(results['machine'])}. SSA-GAN, {options.image_size} px, nf "
        f"{options.nf}, {options.images} images in batches of {options.batch}, {num_writers()} writing threads, into "
        f"{options.folder or tempfile.gettempdir()}; {options.rounds} rounds, taking turns; medians.\n\n"
    )
    header = ["way", "images/s", "of the generator's own"]
    end = ceiling(results["ways"], results["seconds"], device)
    common.report(options, results, text + common.markdown_table(header, rows) + end)


if __name__ == "__main__":
    run_command(main)
