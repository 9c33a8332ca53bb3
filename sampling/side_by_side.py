"""The same captions and noise by several models, in one picture: `python -m sampling.side_by_side A=CKPT B=CKPT --out FILE`.

A picture to compare by eye; scores come from eval/evaluate.py.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from miscc.command_line import CommandParser, add_device_option, named_device, positive, seed_number, truncation
from miscc.errors import UserError, run_command
from miscc.files import check_free
from miscc.pictures import caption_grid, save_image, unit_to_uint8
from sampling.pipeline import TextToImage
from sampling.requests import read_captions

MOST_COLUMNS = 64  # images of one model beside each other


def side_by_side(
    pipelines: Mapping[str, TextToImage],
    captions: Sequence[str],
    per_caption: int = 1,
    seed: int = 0,
    truncation: float | None = None,
    masks: bool = False,
) -> np.ndarray:
    """A picture (.., .., 3) uint8: a row for each caption, `per_caption` columns for each model, under its name.

    The i-th image of a caption has the same noise in all models that take as many random numbers.

    seed, truncation: of the noise
    masks: show the last stage's mask beside each image, where a model predicts masks
    """
    cells: list[list[np.ndarray]] = [[] for _ in captions]
    headings: list[str] = []
    for name, pipeline in pipelines.items():
        for sample in range(per_caption):
            indices = [row * per_caption + sample for row in range(len(captions))]
            drawn = pipeline.generate(captions, seed, truncation, indices=indices, with_masks=masks)

            # One more column, or two with masks.
            shows_masks = bool(drawn.masks)
            headings += [name if sample == 0 else "", *(["mask"] if shows_masks else [])]
            for row, cell in enumerate(cells):
                cell.append(drawn.images[row])
                if shows_masks:
                    cell.append(unit_to_uint8(drawn.masks[-1][row]))
    return caption_grid(captions, cells, columns=1, headings=headings)


def main() -> None:
    parser = CommandParser(prog="python -m sampling.side_by_side", description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", metavar="NAME=CKPT", help="checkpoints of ours, each with a name to show")
    parser.add_argument("--caption", action="append", default=[], metavar="TEXT", help="may be repeated")
    parser.add_argument("--captions", metavar="FILE", help="a text file with a caption a line")
    parser.add_argument("--per-caption", type=positive, default=1, metavar="N", help="images of each caption and model")
    parser.add_argument("--seed", type=seed_number, default=0, metavar="N", help="of the noise")
    parser.add_argument("--truncation", type=truncation, metavar="T", help="cut the noise at +-2 and scale it by T")
    parser.add_argument("--masks", action="store_true", help="show the last masks, too")
    parser.add_argument("--out", required=True, metavar="FILE", help="the picture, a PNG")
    parser.add_argument("--overwrite", action="store_true", help="replace a file of that name")
    add_device_option(parser)
    options = parser.parse_args()

    # What to draw: captions of both options together.
    captions = [*options.caption, *(read_captions(options.captions) if options.captions else [])]
    if not captions:
        raise UserError("give --caption TEXT or --captions FILE")

    # The picture, which all models' images must fit.
    if options.per_caption > MOST_COLUMNS:
        raise UserError(
            f"--per-caption {options.per_caption}: at most {MOST_COLUMNS} images of a model fit beside each other"
        )
    check_free(options.out, options.overwrite)

    # The models, each under its own name.
    device, pipelines = named_device(options.device), {}
    for model in options.models:
        name, sign, path = model.partition("=")
        if not sign:
            name, path = Path(model).stem, model
            if not Path(path).exists():
                raise UserError(f"{model}: no such checkpoint; name each model as NAME=CKPT")
        if name in pipelines:
            raise UserError(f"{model}: there are two models of the name {name}; name them NAME=CKPT")
        pipelines[name] = TextToImage.load(path, device)

    # The same captions and noise for all of them.
    chosen = (options.per_caption, options.seed, options.truncation, options.masks)
    save_image(side_by_side(pipelines, captions, *chosen), options.out)
    print(options.out)


if __name__ == "__main__":
    run_command(main)
