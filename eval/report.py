"""One HTML file about a run, or several: `python -m eval.report RUN_DIR [RUN_DIR ...]`. It holds all that it shows; no network.

Curves are report_plots.py's, what is computed of samples report_samples.py's. A run is a folder of main.py or of the encoders.
"""

import base64
import html
import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from datasets.records import evenly_spaced
from eval.evaluate import records_for
from eval.protocol.report import lines as score_lines
from eval.report_plots import plots, read_stats
from eval.report_samples import Shown, confusions, nearest_images, worst_captions
from miscc.command_line import CommandParser, positive
from miscc.config import flatten
from miscc.errors import ConfigError, DataError, UserError, run_command
from miscc.files import check_free, read_bytes, write_text
from miscc.pictures import resize_pixels, unit_to_uint8
from miscc.yaml_reader import read_yaml_text
from sampling.encoders import load_encoders
from sampling.pipeline import TextToImage
from sampling.publish import read_evaluations

STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1000px; margin: 2rem auto; padding: 0 1rem; }
img { max-width: 100%; image-rendering: pixelated; }
figure { display: inline-block; margin: 4px; vertical-align: top; max-width: 100%; }
figure[hidden] { display: none; }
figcaption { font-size: 12px; max-width: 14em; overflow-wrap: anywhere; }
table { border-collapse: collapse; display: block; overflow-x: auto; }
td, th { padding: 2px 8px; border-bottom: 1px solid #8884; text-align: left; overflow-wrap: anywhere; }
pre { white-space: pre-wrap; }
input[type=range] { width: 100%; }
svg { max-width: 100%; height: auto; background: white; }
"""
SCRIPT = """
document.querySelectorAll(".slides").forEach(box => {
  const images = box.querySelectorAll("figure"), range = box.querySelector("input");
  const show = () => images.forEach((image, index) => image.hidden = index != range.value);
  range.addEventListener("input", show);
  show();
});
"""


class Run:
    """A run's folder: its settings, curves, pictures, scores, and its newest checkpoint."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not (self.path / "config.yml").is_file():
            raise DataError(
                f"{path}: is no run (config.yml is missing); give a folder such as output/00000-bird-ssa_gan"
            )
        try:
            self.config = read_yaml_text(read_bytes(self.path / "config.yml").decode("utf-8")) or {}
        except (OSError, ValueError, ConfigError) as error:
            raise DataError(f"{self.path / 'config.yml'}: cannot be read ({error})") from None
        if not isinstance(self.config, dict):
            raise DataError(f"{self.path / 'config.yml'}: holds no settings, KEY: value lines; it is no run's")

        # Curves, scores, and the newest checkpoint: where they are depends on the kind of run.
        self.name = self.path.resolve().name
        self.curves = read_stats(self.path / "stats.jsonl")
        self.is_encoders = (self.path / "best.pth").is_file() and not (self.path / "checkpoints").is_dir()
        folder = self.path if self.is_encoders else self.path / "checkpoints"
        found = [folder / name for name in (("best.pth",) if self.is_encoders else ("last.pth", "best.pth"))]
        self.checkpoint = next((file for file in found if file.is_file()), None)
        self.records = read_evaluations(folder / "evaluation.json")

    def changes(self) -> list[str]:
        """`KEY: old -> new` of every resume, with its time, as the log has them."""
        log = self.path / "log.txt"
        text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
        return [line for line in text.splitlines() if " -> " in line]


def report(runs: Sequence[Run], data_dir: str | None = None, num_training: int = 2000, num_captions: int = 200) -> str:
    """The HTML.

    num_training: training images that samples are compared with.
    num_captions: whose similarity is measured.
    """
    title = ", ".join(run.name for run in runs)
    parts = [f"<h1>{_text(title)}</h1>"]
    if len(runs) > 1:
        parts += ["<h2>Runs</h2>", _overview(runs)]

    parts += ["<h2>Curves</h2>", *plots({run.name: run.curves for run in runs}).values()]
    for run in runs:
        parts += [f"<h2>{_text(run.name)}</h2>", *_run_parts(run, data_dir, num_training, num_captions)]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{_text(title)}</title>'
    body = f"{''.join(parts)}<script>{SCRIPT}</script>"
    return f"<!doctype html><html lang=en><head>{head}<style>{STYLE}</style></head><body>{body}</body></html>"


def _run_parts(run: Run, data_dir: str | None, num_training: int, num_captions: int) -> Iterable[str]:
    """Every section of one run; a section that lacks something says what."""
    yield _section("Pictures over time", lambda: _slides(run))
    if run.is_encoders:
        yield _section("Confusions on the test set", lambda: _confused(run, data_dir, num_captions))
    else:
        yield _section("Evaluations", lambda: _evaluations(run))
        yield from _samples(run, data_dir, num_training, num_captions)
    yield _section("Changed on resume", lambda: _list(run.changes()) or "<p>Nothing.</p>")
    yield _section("Settings", lambda: _table(("key", "value"), flatten(run.config).items()))


def _samples(run: Run, data_dir: str | None, num_training: int, num_captions: int) -> Iterable[str]:
    """Masks, nearest training images, captions that fit worst: of the run's newest checkpoint."""
    if run.checkpoint is None:
        yield "<p>There is no checkpoint, so nothing was drawn.</p>"
        return

    # Drawn anew from the newest checkpoint.
    try:
        pipeline = TextToImage.load(run.checkpoint, "cpu")
    except UserError as error:
        yield f"<p>Nothing was drawn: {_text(str(error))}</p>"
        return
    config = pipeline.origin["config"]

    def captions(number: int) -> list[str]:
        records = records_for(config, "test", data_dir, pipeline.vocabulary)
        return [records.text(index, 0) for index in evenly_spaced(len(records), number)]

    def masks() -> str:
        texts = captions(4)
        drawn = pipeline.generate(texts)
        if not drawn.masks:
            return "<p>This system predicts none.</p>"

        # Every stage beside its image.
        rows = []
        for i, text in enumerate(texts):
            stages = [(unit_to_uint8(stage[i]), f"mask {stage.shape[1]} px") for stage in drawn.masks]
            rows.append(Shown([(drawn.images[i], "image"), *stages], text))
        return _shown(rows)

    def nearest() -> str:
        texts = captions(6)
        samples = pipeline.generate(texts, with_masks=False).images
        training = records_for(config, "train", data_dir, pipeline.vocabulary)

        # How to read the distances.
        said = (
            f"<p>Mean colour difference (0 to 255) to the nearest of {min(num_training, len(training))} of "
            f"{len(training)} training images, at 16 px; a copy would have nearly 0.</p>"
        )
        return said + _shown(nearest_images(samples, texts, training, num_training, pipeline.image_size))

    def worst() -> str:
        encoders = load_encoders(run.checkpoint)

        # A checkpoint of a GAN may lack the image encoder: then the one that it was trained with.
        if encoders.image_encoder is None:
            named = (config.get("TEXT") or {}).get("DAMSM_NAME") or ""
            encoders = load_encoders(named)
        return _shown(worst_captions(pipeline, encoders, captions(num_captions)))

    yield _section("Masks", masks)
    yield _section("Nearest training images", nearest)
    yield _section("Captions with the lowest similarity", worst)


def _confused(run: Run, data_dir: str | None, number: int) -> str:
    assert run.checkpoint is not None  # `is_encoders`
    encoders = load_encoders(run.checkpoint)
    said, shown = confusions(encoders, records_for(run.config, "test", data_dir, encoders.vocabulary), number)
    return f"<p>{_text(said)}.</p>{_shown(shown)}"


def _section(title: str, body: Callable[[], str]) -> str:
    """A heading and what belongs under it, or in one line why it is missing."""
    try:
        content = body()
    except UserError as error:
        content = f"<p>Missing: {_text(str(error))}</p>"
    return f"<h3>{_text(title)}</h3>{content}"


def _slides(run: Run) -> str:
    """The pictures that training wrote, of samples or of attention, under a slider."""
    files = sorted([*(run.path / "pictures").glob("*.png"), *(run.path / "attention").glob("*.png")])
    if not files:
        return "<p>The run wrote none.</p>"

    # The last picture is shown first.
    figures = "".join(_figure(file.read_bytes(), file.stem.replace("_", " ")) for file in files)
    last = len(files) - 1
    return f'<div class=slides><input type=range min=0 max={last} value={last} aria-label="picture">{figures}</div>'


def _evaluations(run: Run) -> str:
    """Every record of evaluation.json as its table, with its protocol, hash and warnings."""
    if not run.records:
        return "<p>None; see python -m eval.evaluate.</p>"

    texts = []
    for record in run.records:
        sha256 = (record.get("checkpoint") or {}).get("sha256") or "unknown"
        protocol = ", ".join(f"{key} {value}" for key, value in record["protocol"].items())
        texts.append("\n".join([*score_lines(record), f"checkpoint sha256 {sha256}", f"protocol: {protocol}"]))
    return "".join(f"<pre>{_text(text)}</pre>" for text in texts)


def _overview(runs: Sequence[Run]) -> str:
    """A row a run: steps, and the last of what all have."""
    names = [name for name in runs[0].curves if all(name in run.curves for run in runs)]

    rows = [[run.name, max((c[-1][0] for c in run.curves.values()), default=0),
             *(f"{run.curves[name][-1][1]:.4g}" for name in names)] for run in runs]  # fmt: skip
    return _table(("run", "step", *names), rows)


def _shown(rows: Sequence[Shown]) -> str:
    def enlarged(pixels: Any) -> bytes:
        stream = io.BytesIO()
        Image.fromarray(resize_pixels(pixels, max(96, pixels.shape[0]))).save(stream, format="PNG")
        return stream.getvalue()

    return "".join(
        f"<div><p>{_text(row.text)}</p>{''.join(_figure(enlarged(pixels), words) for pixels, words in row.pictures)}</div>"
        for row in rows
    )


def _figure(png: bytes, words: str) -> str:
    # Inside the file: the report needs nothing beside it.
    data = base64.b64encode(png).decode("ascii")
    image = f'<img alt="{_text(words)}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{_text(words)}</figcaption></figure>"


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    # Everything is escaped: names and captions are the user's.
    cells = [f"<tr>{''.join(f'<td>{_text(str(cell))}</td>' for cell in row)}</tr>" for row in rows]
    return f"<table><tr>{''.join(f'<th>{_text(cell)}</th>' for cell in header)}</tr>{''.join(cells)}</table>"


def _list(items: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{_text(item)}</li>' for item in items)}</ul>" if items else ""


def _text(text: str) -> str:
    return html.escape(text)


def main(words: Sequence[str] | None = None) -> None:
    parser = CommandParser(prog="python -m eval.report", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN_DIR", help="folders of runs, of GANs or of encoders")
    add("--out", metavar="FILE", help="the HTML file (default: report.html in the first run's folder)")
    add("--overwrite", action="store_true", help="replace the file that --out names")
    add("--data-dir", metavar="DIR", help="where the data set is, if it was moved")
    add("--training-images", type=positive, default=2000, metavar="N", help="that samples are compared with (2000)")
    add("--captions", type=positive, default=200, metavar="N", help="whose similarity is measured (200)")
    options = parser.parse_args(words)

    # All runs are opened before anything is written. A run's own report.html is replaced unasked.
    if options.out:
        check_free(options.out, options.overwrite)
    runs = [Run(path) for path in options.runs]
    out = Path(options.out or runs[0].path / "report.html")
    write_text(out, report(runs, options.data_dir, options.training_images, options.captions))
    print(out)


if __name__ == "__main__":
    run_command(main)
