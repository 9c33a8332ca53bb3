"""`python -m serve --checkpoint CKPT`: a page and an API for one or several models, on this machine unless --host says else.

python -m serve --checkpoint output/00003-bird-ssa_gan/checkpoints/last.pth
python -m serve --checkpoint A --checkpoint B             to compare two models
python -m serve --onnx model.onnx --no-page               without PyTorch, without Gradio
python -m serve --onnx model.onnx --caption "a red bird" --out bird.png       one image, no server
"""

import argparse
import os
import sys

from miscc.command_line import CommandParser, HelpWithDefaults, add_device_option, not_negative, positive, truncation
from miscc.errors import UserError, run_command


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(
        prog="python -m serve", description=__doc__.splitlines()[0], allow_abbrev=False,
        formatter_class=HelpWithDefaults,
    )  # fmt: skip

    # What draws, and where.
    add = parser.add_argument
    add("--checkpoint", action="append", default=[], metavar="CKPT", help="a checkpoint, or a published model's folder")
    add("--onnx", action="append", default=[], metavar="FILE", help="a model that serve.export wrote")
    add_device_option(parser)

    # The server: who reaches it, and how much it takes.
    add("--host", default="127.0.0.1", metavar="ADDRESS", help="0.0.0.0: anybody who can reach this machine may draw")
    add("--port", type=port_number, default=7860, metavar="N", help="0: any free one")
    add("--no-page", action="store_true", help="the API alone, which does not need Gradio")
    add("--batch-size", type=positive, default=16, metavar="N", help="images drawn at once")
    add("--queue", type=positive, default=256, metavar="N", help="images that may wait")
    add("--max-caption", type=positive, default=500, metavar="N", help="characters of a caption")
    add("--max-body", type=positive, default=64, metavar="KB", help="of a request")
    add("--images-mb", type=positive, default=256, metavar="MB", help="of images kept for /bird and /birds")
    add("--rate", type=not_negative, metavar="N", help="drawing requests a minute of a client, 0: no limit (without it: no "
        "limit on this machine, 120 from elsewhere)")  # fmt: skip
    add("--allow-host", action="append", default=[], metavar="NAME", help="another name that this server answers to")
    add("--cors", action="append", default=[], metavar="ORIGIN", help="let scripts of this origin call the API")

    # Without a server.
    one = parser.add_argument_group("one image instead of a server")
    one.add_argument("--caption", metavar="TEXT", help="what to draw")
    one.add_argument("--out", metavar="FILE", help="the PNG file")
    one.add_argument("--seed", type=not_negative, default=0, metavar="N", help="of the noise")
    one.add_argument("--truncation", type=truncation, metavar="T", help="cut the noise at +-2 and scale it by T")
    return parser.parse_args(words)


def port_number(text: str) -> int:
    """An argument's type: a port, 0 to 65535."""
    value = int(text)
    if not 0 <= value <= 65535:
        raise argparse.ArgumentTypeError(f"must be 0 to 65535, not {value}")
    return value


def main(words: list[str] | None = None) -> None:
    options = parse_arguments(words)
    if bool(options.caption) != bool(options.out):
        raise UserError("--caption and --out draw one image: give both, or neither to start the server")

    # Models first: without them there is nothing to start.
    from serve.models import load_models

    models = load_models(options.checkpoint, options.onnx, options.device)
    if options.caption:
        draw_one(models, options)
        return
    try:
        from serve.api import NUM_BIRDS
        from serve.app import TOKEN_VARIABLE, Settings, serve
        from serve.drawing import WALK_STEPS
    except ImportError as error:
        raise UserError(f"{error.name} is missing; pip install -r requirements-serve.txt") from None

    # An empty shell variable is no token, which its user may not know.
    token = os.environ.get(TOKEN_VARIABLE, "")
    if TOKEN_VARIABLE in os.environ and not token:
        print(f"warning: {TOKEN_VARIABLE} is empty: whoever reaches the server may draw", file=sys.stderr)

    settings = Settings(
        host=options.host, port=options.port, page=not options.no_page, batch_size=options.batch_size,
        queue_size=options.queue, caption_length=options.max_caption, body_bytes=options.max_body * 1024,
        images_bytes=options.images_mb * 2**20, rate=options.rate, hosts=tuple(options.allow_host),
        cors=tuple(options.cors), token=token,
    )  # fmt: skip

    # What is queued together must find room in an empty queue.
    least = max(options.batch_size, WALK_STEPS, NUM_BIRDS)
    if options.queue < least:
        raise UserError(
            f"--queue {options.queue}: must be at least {least}; a batch has {options.batch_size} images, a walk "
            f"{WALK_STEPS}, /birds {NUM_BIRDS}"
        )
    try:
        serve(models, settings)
    except ImportError as error:
        raise UserError(f"{error.name} is missing; pip install -r requirements-serve.txt, or give --no-page") from None


def draw_one(models: dict, options: argparse.Namespace) -> None:
    """--caption: one image into a file, of the first model."""
    from miscc.pictures import save_image
    from serve.batcher import Batcher
    from serve.drawing import Studio

    studio = Studio(models, Batcher())
    picture = studio.submit([options.caption], 1, options.seed, options.truncation).pictures()[0]
    if picture.unknown:
        print(f"words that the model does not know are left out: {', '.join(picture.unknown)}", file=sys.stderr)
    save_image(picture.image, options.out)
    print(options.out)


if __name__ == "__main__":
    run_command(main)
