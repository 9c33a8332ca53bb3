"""`python -m serve.export --checkpoint CKPT --format onnx`: text encoder and generator as one graph that runs without this code.

Token ids, lengths and noise in; images, masks and attention out; the batch is dynamic. Every export is compared with the
checkpoint before it takes its place. Drawing from the file is onnx_model.py's.
"""

import json
import logging
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor, nn

from miscc.command_line import CommandParser
from miscc.errors import ConfigError, UserError, run_command
from miscc.files import write_atomically
from miscc.randomness import noise_array, stream
from models.clip_features import ClipTextEncoder
from models.damsm import TextEncoder
from models.types import TextFeatures
from sampling.pipeline import TextToImage
from sampling.publish import describe, example_captions

FORMATS = ("onnx", "pt2")
TOLERANCE = 1e-4  # of images in [-1, 1] and masks in [0, 1]
CHECKED_BATCHES = (1, 2, 5)
INPUTS = ("tokens", "lengths", "noise")


class ExportableTextEncoder(nn.Module):
    """models.damsm.TextEncoder with the same weights, without packed sequences, which do not export.

    Its two directions are two one-way passes. The backward one reads each caption's words in reverse order of its own length,
    so both begin at a word; what follows a caption's end reaches neither its words nor its sentence.
    """

    def __init__(self, encoder: TextEncoder):
        super().__init__()
        self.embedding = encoder.embedding
        self.forwards, self.backwards = (_one_way(encoder.rnn, suffix) for suffix in ("", "_reverse"))

    def forward(self, captions: Tensor, lengths: Tensor) -> TextFeatures:
        embedded = self.embedding(captions)  # (N, T, E)
        positions = torch.arange(captions.shape[1], device=captions.device)[None]
        mask = positions >= lengths[:, None]  # (N, T)

        # Position t of a caption of length n is position n - 1 - t when read backwards; padding takes any valid position.
        reversed_positions = (lengths[:, None] - 1 - positions).clamp_min(0)  # (N, T)
        ahead = self.forwards(embedded)[0]  # (N, T, D/2)
        back = self.backwards(_reordered(embedded, reversed_positions))[0]

        # The state after the last word read, of each direction.
        last = (lengths - 1)[:, None]
        sentence = torch.cat([_reordered(ahead, last), _reordered(back, last)], dim=2)[:, 0]
        words = torch.cat([ahead, _reordered(back, reversed_positions)], dim=2)
        words = words.masked_fill(mask[:, :, None], 0.0)
        return TextFeatures(sentence=sentence, words=words.transpose(1, 2), mask=mask)


class ExportableClipEncoder(nn.Module):
    """models.clip_features.ClipTextEncoder over all its positions, since a graph has one size for captions."""

    def __init__(self, encoder: ClipTextEncoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, captions: Tensor, lengths: Tensor) -> TextFeatures:
        return self.encoder.encode(captions)


# What can be exported, and how.
EXPORTABLE: dict[type, type[nn.Module]] = {TextEncoder: ExportableTextEncoder, ClipTextEncoder: ExportableClipEncoder}


class ExportedModel(nn.Module):
    """(tokens (N, T), lengths (N,), noise (N, noise_dim)) -> the tensors of `output_names`."""

    def __init__(self, pipeline: TextToImage):
        super().__init__()
        self.text_encoder = EXPORTABLE[type(pipeline.text_encoder)](pipeline.text_encoder)
        self.generator = pipeline.generator

    def forward(self, tokens: Tensor, lengths: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
        output = self.generator(noise, self.text_encoder(tokens, lengths))
        stages = [_pixels(images) for images in output.images]
        masks = [mask[:, 0] for mask in output.masks]
        return (*stages, output.images[-1], *masks, *output.attention)


def output_names(pipeline: TextToImage) -> list[str]:
    """Names of the graph's outputs: stage0 ... (N, h, w, 3) uint8, values (N, 3, H, W) in [-1, 1], mask0 ..., attention0 ..."""
    drawn = _drawn(pipeline, *_inputs(pipeline, 1))
    stages = [f"stage{i}" for i in range(len(drawn.images))]
    masks = [f"mask{i}" for i in range(len(drawn.masks))]
    return [*stages, "values", *masks, *(f"attention{i}" for i in range(len(drawn.attention)))]


def export(pipeline: TextToImage, path: str | Path, kind: str = "onnx", overwrite: bool = False) -> dict[str, float]:
    """Write a pipeline on the CPU as `path`; returns the largest difference from it of each output.

    Raises UserError where a package is missing, the model cannot be exported, or the graph differs: then nothing is written, and
    a file that was there is kept.
    """
    # What cannot be exported is refused before the minute that it takes.
    path = Path(path)
    if path.exists() and not overwrite:
        raise UserError(f"{path}: exists already; give --overwrite or another name")
    if type(pipeline.text_encoder) not in EXPORTABLE:
        raise ConfigError(
            "half of this model's sentence comes from a Transformer, which is not exported; serve its checkpoint"
        )
    if pipeline.device.type != "cpu":
        raise ConfigError("export: load the model on the CPU")

    # The graph, and what drawing from it needs besides: words, names of outputs, description.
    names, model = output_names(pipeline), ExportedModel(pipeline).eval()
    about = {
        "model": describe(pipeline, example_captions(pipeline)),
        "outputs": names,
        "vocabulary": pipeline.vocabulary.words,
    }
    program = _captured(model, pipeline)

    # The temporary file is read again and compared before it replaces `path`.
    differences: dict[str, float] = {}

    def write(stream: IO[bytes]) -> None:
        if kind == "onnx":
            _write_onnx(program, names, about, stream)
        else:
            extra = {"model.json": json.dumps(about, ensure_ascii=False)}
            torch.export.save(program, stream, extra_files=extra)
        stream.flush()
        temporary = Path(stream.name)
        run = _onnx_runner(temporary, names) if kind == "onnx" else _pt2_runner(temporary)
        differences.update(compare(pipeline, names, run))
        _check_differences(differences, path)

    write_atomically(path, write)
    return differences


def compare(pipeline: TextToImage, names: Sequence[str], run: Callable[..., Sequence[np.ndarray]]) -> dict[str, float]:
    """The largest difference of each output from the pipeline's own, over batches of CHECKED_BATCHES and all lengths.

    Pixels are left out, as rounding may move them by a level; their own values, `values`, are compared instead.
    """
    # Several sizes of batches, then each length of captions.
    differences = {name: 0.0 for name in names if not name.startswith("stage")}
    longest = pipeline.text_encoder.max_words
    batches = [(size, None) for size in CHECKED_BATCHES] + [(2, length) for length in range(1, longest + 1)]
    for size, length in batches:
        inputs = _inputs(pipeline, size, length)
        own, found = _drawn(pipeline, *inputs), dict(zip(names, run(*inputs), strict=True))

        # The pipeline's own output under the graph's names.
        masks = {f"mask{i}": mask[:, 0] for i, mask in enumerate(own.masks)}
        attention = {f"attention{i}": maps for i, maps in enumerate(own.attention)}
        for name, expected in ({"values": own.images[-1]} | masks | attention).items():
            expected, actual = expected.numpy(), found[name]
            same_shape = expected.shape == actual.shape and np.isfinite(actual).all()
            difference = float(np.abs(expected - actual).max()) if same_shape else float("inf")
            differences[name] = max(differences[name], difference)
    return differences


def _check_differences(differences: Mapping[str, float], path: Path) -> None:
    """Raises UserError where an output differs by more than TOLERANCE."""
    wrong = {name: value for name, value in differences.items() if not value <= TOLERANCE}
    if wrong:
        found = ", ".join(f"{name} by {value:.2g}" for name, value in wrong.items())
        raise UserError(
            f"{path}: not written, as the exported graph differs from the checkpoint ({found}); try another torch"
        )


def _one_way(rnn: nn.Module, suffix: str) -> nn.Module:
    """One direction of a bidirectional LSTM or GRU, as a network of its own with the same weights."""
    single = type(rnn)(rnn.input_size, rnn.hidden_size, batch_first=True)
    names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
    single.load_state_dict({name: getattr(rnn, name + suffix) for name in names})
    return single.eval().requires_grad_(False)


def _reordered(values: Tensor, positions: Tensor) -> Tensor:
    """values (N, T, D) at positions (N, S) -> (N, S, D)."""
    return values.gather(1, positions[:, :, None].expand(-1, -1, values.shape[2]))


def _pixels(images: Tensor) -> Tensor:
    """(N, 3, H, W) in [-1, 1] -> (N, H, W, 3) uint8, as miscc.images.to_uint8 does it."""
    return (images * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def _inputs(pipeline: TextToImage, size: int, length: int | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random captions of this length, or of lengths from 1 to the longest, with their noise."""
    longest, words = pipeline.text_encoder.max_words, len(pipeline.vocabulary)

    # Words follow one another, then padding; both depend on the size and the length alone.
    rng = stream(0, "export", size, length or 0)
    lengths = rng.integers(1, longest + 1, size) if length is None else np.full(size, length)
    tokens = rng.integers(1, words, (size, longest)) * (np.arange(longest) < lengths[:, None])
    return (
        tokens.astype(np.int64),
        lengths.astype(np.int64),
        noise_array(1, 0, range(size), pipeline.generator.noise_dim),
    )


@torch.inference_mode()
def _drawn(pipeline: TextToImage, tokens: np.ndarray, lengths: np.ndarray, noise: np.ndarray) -> Any:
    text = pipeline.text_encoder(torch.from_numpy(tokens), torch.from_numpy(lengths))
    return pipeline.synthesize(text, torch.from_numpy(noise))


def _captured(model: nn.Module, pipeline: TextToImage) -> torch.export.ExportedProgram:
    """The graph, with a dynamic batch. Raises UserError where torch cannot capture it."""
    examples = tuple(torch.from_numpy(array) for array in _inputs(pipeline, 3))
    batch = torch.export.Dim("batch", min=1, max=4096)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.export(model, examples, dynamic_shapes=({0: batch},) * 3)
    except Exception as error:  # torch has no common base for what can go wrong here
        raise UserError(f"this torch ({torch.__version__}) cannot export the model: {str(error)[:300]}") from None


def _write_onnx(program: Any, names: Sequence[str], about: Mapping[str, Any], stream: IO[bytes]) -> None:
    """The program as an ONNX file that carries its vocabulary and description."""
    try:
        import onnx
        import onnxscript  # noqa: F401  torch's exporter writes with it
    except ImportError as error:
        raise UserError(f"{error.name} is missing; pip install -r requirements-export.txt") from None

    # The exporter's own reports are for its developers.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        written = torch.onnx.export(
            program, input_names=list(INPUTS), output_names=list(names), dynamo=True, verbose=False
        )
    assert written is not None  # as `dynamo` promises

    # The vocabulary and the rest travel in the file.
    proto = written.model_proto
    metadata = {name: json.dumps(value, ensure_ascii=False) for name, value in about.items()}
    onnx.helper.set_model_props(proto, metadata)
    stream.write(proto.SerializeToString())


def _onnx_runner(path: Path, names: Sequence[str]) -> Callable[..., Sequence[np.ndarray]]:
    from serve.onnx_model import open_session

    session = open_session(path)
    return lambda *inputs: session.run(list(names), dict(zip(INPUTS, inputs, strict=True)))


def _pt2_runner(path: Path) -> Callable[..., Sequence[np.ndarray]]:
    with path.open("rb") as stream:  # torch warns of paths that do not end in .pt2
        module = torch.export.load(stream).module()

    def run(*inputs: np.ndarray) -> list[np.ndarray]:
        with torch.no_grad():
            return [output.numpy() for output in module(*map(torch.from_numpy, inputs))]

    return run


def default_file(checkpoint: str, ending: str) -> Path:
    """Beside a checkpoint or a published model's folder, with its name."""
    path = Path(os.path.abspath(checkpoint))
    name = path.name if path.is_dir() else path.stem  # a folder's name may have dots: pub-v1.5
    return path.with_name(f"{name}.{ending}")


def main(words: Sequence[str] | None = None) -> None:
    parser = CommandParser(prog="python -m serve.export", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="CKPT", help="one of our checkpoints, or a published model's folder")
    add("--format", choices=FORMATS, default="onnx", help="onnx, or pt2, torch's own (default onnx)")
    add("--out", metavar="FILE", help="the file (default: beside the checkpoint, its name with .onnx or .pt2)")
    add("--no-average", action="store_true", help="export G itself, not its average")
    add("--overwrite", action="store_true", help="replace the file")
    options = parser.parse_args(words)

    pipeline = TextToImage.load(options.checkpoint, "cpu", averaged=not options.no_average)
    out = Path(options.out or default_file(options.checkpoint, options.format))
    start = time.monotonic()
    differences = export(pipeline, out, options.format, options.overwrite)
    largest = max(differences.values())
    print(f"{out}: {out.stat().st_size / 2**20:.1f} MB in {time.monotonic() - start:.0f} s, differs from the checkpoint by "
          f"{largest:.1g} at most")  # fmt: skip


if __name__ == "__main__":
    run_command(main)
