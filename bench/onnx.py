"""Images a second of an exported file under onnxruntime, against the checkpoint in PyTorch: `python -m bench.onnx`.

Both draw the same captions and noise in one process, taking turns. The file is what serve.export wrote of the checkpoint.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from bench import common
from miscc.command_line import positive
from miscc.errors import UserError, run_command
from sampling.pipeline import TextToImage


def measure(options) -> dict[str, Any]:
    """Images a second of each, at the median, the ratio of both, and how far their images are apart, in levels of 255."""
    try:
        import onnxruntime
    except ImportError:
        raise UserError("onnxruntime is missing; pip install -r requirements-export.txt") from None
    pipeline = TextToImage.load(options.checkpoint, "cpu")
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(options.onnx, settings, providers=["CPUExecutionProvider"])

    # The same captions and noise for both.
    words = pipeline.vocabulary.words[1:]
    captions = [" ".join(words[(7 * row + place) % len(words)] for place in range(8)) for row in range(options.batch)]
    encoded, noise = pipeline.tokens(captions), pipeline.noise(0, range(options.batch))
    inputs = {"tokens": encoded.tokens.numpy(), "lengths": encoded.lengths.numpy(), "noise": noise.numpy()}
    last = max(output.name for output in session.get_outputs() if output.name.startswith("stage"))

    def eager() -> np.ndarray:
        return pipeline.generate(captions, batch_size=options.batch, with_masks=False).images

    def exported() -> np.ndarray:
        return session.run([last], inputs)[0]

    # First that both draw the same.
    difference = int(np.abs(eager().astype(int) - exported()).max())
    seconds = common.take_turns({"PyTorch": eager, "onnxruntime": exported}, options.rounds, warm_up=3)
    rates = {name: options.batch / float(np.median(values)) for name, values in seconds.items()}
    return {"images_per_second": rates, "ratio": common.ratio(seconds["PyTorch"], seconds["onnxruntime"]),
            "levels_apart": difference}  # fmt: skip


def main(words: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True, metavar="CKPT", help="the model in PyTorch")
    parser.add_argument("--onnx", required=True, metavar="FILE", help="the same as serve.export wrote it")
    parser.add_argument(
        "--batch-size", "--batch", dest="batch", type=positive, default=16, metavar="N", help="images at once"
    )
    options = parser.parse_args(words)
    device = common.start(options)
    results = {"machine": common.machine(device), "batch": options.batch} | measure(options)

    # Both rates, and what they mean together.
    rows = [[name, f"{rate:.1f}"] for name, rate in results["images_per_second"].items()]
    ratio = results["ratio"]
    text = (
        f"# An exported model under onnxruntime\n\n{common.machine_line(results['machine'])}. Batches of {options.batch}, "
        f"{options.rounds} rounds, taking turns; medians.\n\n{common.markdown_table(['', 'images/s'], rows)}\n"
        f"onnxruntime is x{ratio['by_round']:.2f} as fast as PyTorch; pixels differ by {results['levels_apart']} level(s) of 255 "
        f"at most.\n"
    )
    common.report(options, results, text)


if __name__ == "__main__":
    run_command(main)
