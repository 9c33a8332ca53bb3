"""Images a second into a folder of PNGs against the generator's own: `python -m bench.sample --image-size 64 --nf 16`.

Encoding and writing go on in threads while the next images are drawn; without that the three would add up. Fresh weights.
"""

import tempfile
from pathlib import Path

import torch

from bench import common
from datasets.captions import Vocabulary
from eval.pipeline import TextToImage
from eval.sampling import caption_requests, file_stem, num_writers, sample
from miscc.errors import run_command
from miscc.images import save_image
from models.damsm import TextEncoder
from models.ssa_gan import SSAGenerator

WORDS = ["<end>", *"this small red bird has black wings and a short yellow beak with white belly".split()]
CAPTION = "this small red bird has black wings and a short yellow beak"


def measure(options, device: torch.device) -> dict:
    """Seconds for so many images: drawn alone, drawn and written by sampling, and one after the other."""
    torch.manual_seed(0)
    generator = SSAGenerator(nf=options.nf, image_size=options.image_size).to(device).eval()
    vocabulary = Vocabulary(list(dict.fromkeys(WORDS)))
    pipeline = TextToImage(generator, TextEncoder(len(vocabulary)).to(device).eval(), vocabulary)
    requests = caption_requests([CAPTION], options.images)

    def draw() -> list:
        drawn = []
        for start in range(0, len(requests), options.batch):
            part = requests[start : start + options.batch]
            drawn.append(pipeline.generate([r.caption for r in part], 0, None, options.batch, [r.index for r in part]))
        return drawn

    def write() -> None:
        with tempfile.TemporaryDirectory() as folder:
            sample(pipeline, requests, folder, batch_size=options.batch)

    def one_after_the_other() -> None:
        with tempfile.TemporaryDirectory() as folder:
            images = [image for drawn in draw() for image in drawn.images]
            for request, image in zip(requests, images, strict=True):
                save_image(image, Path(folder) / f"{file_stem(request)}.png")

    ways = {"generator alone": draw, "into a folder": write, "plain: draw, then write": one_after_the_other}
    seconds = common.take_turns(ways, options.rounds, 1, device)
    return {
        name: {
            "images_per_second": options.images / common.summary(values)["median"],
            "of_the_generators": common.ratio(seconds["generator alone"], values)["of_medians"],
            "runs": values,
        }
        for name, values in seconds.items()
    }


def ceiling(ways: dict, images: int, device: torch.device) -> str:
    """What writing costs, and the share of the generator's rate that is left where both share the cores."""
    alone, plain = (images / ways[name]["images_per_second"] for name in ("generator alone", "plain: draw, then write"))
    writing, threads = plain - alone, torch.get_num_threads()
    text = f"\nEncoding and writing an image takes one core {writing / images * 1e3:.2f} ms."
    if device.type != "cpu":
        return text + "\n"
    share = alone / (alone + writing / threads)
    return text + f" The generator runs on the same {threads}: at best {share:.0%} of its rate is left.\n"


def main(arguments: list[str] | None = None) -> None:
    parser = common.parser(__doc__.splitlines()[0])
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--nf", type=int, default=16)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch", type=int, default=32)
    options = parser.parse_args(arguments)
    device = common.start(options)
    settings = {name: value for name, value in vars(options).items() if name not in ("json", "name")}
    results = {"machine": common.machine(device), "settings": settings, "ways": measure(options, device)}
    rows = [
        [name, f"{row['images_per_second']:.1f}", f"{row['of_the_generators']:.0%}"]
        for name, row in results["ways"].items()
    ]
    text = (
        f"# Sampling into a folder\n\n{common.machine_line(results['machine'])}. SSA-GAN, {options.image_size} px, nf "
        f"{options.nf}, {options.images} images in batches of {options.batch}, {num_writers()} writing threads; "
        f"{options.rounds} rounds, taking turns; medians.\n\n"
    )
    header = ["way", "images/s", "of the generator's own"]
    common.report(
        options, results, text + common.markdown_table(header, rows) + ceiling(results["ways"], options.images, device)
    )


if __name__ == "__main__":
    run_command(main)
